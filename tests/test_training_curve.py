"""Training a small NG-GNN on fitted digit networks: the fused kernels' loss curve is the reference backend's."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from conftest import KERNELS

import ngkernels as ngk
from neural_graphs.data import DigitConfig, SirenConfig, digit_inrs
from neural_graphs.models import NGGNN
from neural_graphs.tasks.inr_classification import InrInputs, ShuffledBatches

pytestmark = pytest.mark.usefixtures("one_thread")
COUNT, STEPS = 64, 48
fused = pytest.mark.parametrize("backend", KERNELS)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """(curve, kept): `curve` trains; `kept` remembers what it gave."""
    networks = digit_inrs(DigitConfig(images=COUNT, per_image=1, siren=SirenConfig(steps=60)), tmp_path_factory.mktemp("cache"), workers=1)
    weights, biases = InrInputs(networks, None)(networks)
    labels = torch.arange(COUNT) % 2  # shown by the sign of the last layer: to be read off the weights, and learned in a few steps
    weights[-1] = weights[-1].abs() * torch.where(labels == 1, 1.0, -1.0)[:, None, None, None]

    def curve(backend: str, dtype: torch.dtype, seed: int, memory: str = "recompute") -> torch.Tensor:
        """The loss of every step of Adam, float64 [STEPS]; `seed`: of the parameters and of the batches."""
        torch.manual_seed(seed)
        model = NGGNN(networks.layout, d_hid=8, num_layers=3, out_features=2, fourier_features=16, fourier_sigma=0.5, edge_memory=memory)
        model, batches = model.to(dtype), ShuffledBatches(COUNT, 16, seed)
        optimizer, losses = torch.optim.Adam(model.parameters(), lr=3e-3), []
        with ngk.use_backend(backend):
            for step in range(STEPS):
                part = batches(step)
                logits = model([w[part].to(dtype) for w in weights], [b[part].to(dtype) for b in biases])
                loss = torch.nn.functional.cross_entropy(logits, labels[part])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach().double())
        return torch.stack(losses)

    return curve, lru_cache(curve)


@fused
@pytest.mark.parametrize("memory", ["recompute", "hybrid", "store"])
def test_float64_curve_is_the_reference_backends(task, memory: str, backend: str):
    curve, kept = task
    wanted = kept("reference", torch.float64, 0)
    assert wanted[:4].mean() > 0.6 and wanted[-4:].mean() < 0.2, "something has to be learned"
    assert (curve(backend, torch.float64, 0, memory) - wanted).abs().max() <= 1e-12


@fused
def test_float32_curve_is_far_closer_than_another_seeds(task, backend: str):
    curve, kept = task
    wanted = kept("reference", torch.float32, 0)
    noise = (kept("reference", torch.float32, 1) - wanted).abs().mean()
    assert noise > 0.05
    assert (curve(backend, torch.float32, 0) - wanted).abs().max() <= 1e-3 * noise

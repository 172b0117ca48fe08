"""Plans for a GPU beside what PyTorch allocates on one. Run by `make gpu`; elsewhere left out, and so counted."""

from __future__ import annotations

import gc

import pytest
import torch
from allocations import planned_and_allocated
from test_planner import APPLIES

import ngkernels as ngk
from neural_graphs.models import NGGNN, NGT
from neural_graphs.models.memory import EdgeMemory
from ngkernels import backends, limits

pytestmark = pytest.mark.gpu
TINY = [2, 8, 16, 3]
MODELS = {
    "ng-gnn": ([2, 2048, 4096, 3], lambda layout: NGGNN(layout, d_hid=32)),
    "ng-t-edges": ([2, 1024, 2048, 3], lambda layout: NGT(layout, attention="edges")),
}


@pytest.mark.parametrize(("backend", "method", "policy"), [
    ("triton", "ng-gnn", "recompute"), ("triton", "ng-gnn", "store"), pytest.param("triton", "ng-t-edges", "store", marks=pytest.mark.slow), ("cuda", "ng-gnn", "recompute"),
    ("cuda", "ng-t-edges", "recompute"), ("cuda", "ng-t-edges", "store"),
])  # fmt: skip
def test_peaks_within_a_tenth_of_measured_ones(backend: str, method: str, policy: str, monkeypatch):
    """Of two steps with gradients of the weights, after a tiny one: what libraries keep from their first call on is no part of a plan."""
    reason = backends.why_not(backend, torch.device("cuda"))
    assert reason is None, reason
    monkeypatch.setattr(limits, "applies", APPLIES)  # what Triton's kernels would spill is refused, as it is outside of tests
    layout, make = MODELS[method]
    for of in (TINY, layout):
        model = make(of)
        model.memory = EdgeMemory.parse(policy)
        gc.collect()
        planned, allocated = planned_and_allocated(model, ngk.NeuralGraph.mlp(of), backend, policy, True, "cuda")
    assert planned == pytest.approx(allocated, rel=0.1)

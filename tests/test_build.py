"""Builders: modules and files to neural graphs."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from neural_graphs import build
from neural_graphs.models import NGGNN


class Sine(nn.Module):
    def forward(self, x):
        return torch.sin(30 * x)


def test_a_sequential_becomes_a_graph_of_views():
    module = nn.Sequential(
        nn.Linear(2, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.1), nn.GELU()), nn.Linear(16, 3, bias=False)
    )
    network = build.from_module(module)
    graph, weights, biases = network
    assert [tuple(w.shape) for w in weights] == [(1, 2, 8, 1), (1, 8, 16, 1), (1, 16, 3, 1)]
    assert [tuple(b.shape) for b in biases] == [(1, 8, 1), (1, 16, 1), (1, 3, 1)]
    assert graph.num_nodes == 29
    assert network.layout == (2, 8, 16, 3)
    assert network.activations == ("relu", "gelu")
    assert weights[0].data_ptr() == module[0].weight.data_ptr()
    assert torch.equal(weights[0][0, :, :, 0], module[0].weight.T)
    assert torch.equal(biases[2], torch.zeros(1, 3, 1))


def test_single_linear_sines_and_linears_in_a_row():
    assert build.from_module(nn.Linear(3, 4)).layout == (3, 4)
    siren = nn.Sequential(nn.Linear(2, 8), Sine(), nn.Linear(8, 8), nn.Linear(8, 1))
    assert build.from_module(siren).activations == ("sine", "none")
    assert build.from_module(siren, reverse=True).graph.has_reverse


def test_a_built_network_goes_through_a_model_and_gradients_reach_it():
    module = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 3))
    graph, weights, biases = build.from_module(module)
    model = NGGNN([2, 6, 3], d_hid=8, num_layers=2, encoder="linear")
    logits = model(weights, biases)
    torch.testing.assert_close(model.forward_graph(graph, weights, biases), logits)
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())


@pytest.mark.parametrize(
    ("module", "named"),
    [
        (nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 1)), "LayerNorm"),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()), "Conv2d"),
        (nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.ReLU()), "ReLU"),
        (nn.TransformerEncoderLayer(8, 2), "TransformerEncoderLayer"),
        (nn.Sequential(), "Sequential"),
    ],
)
def test_other_modules_are_refused_by_name(module: nn.Module, named: str):
    with pytest.raises(NotImplementedError, match=f"from_module: expected .* got {named}"):
        build.from_module(module)


def test_linears_must_fit():
    with pytest.raises(ValueError, match=r"from_module: expected weight 1 of shape \(out, 4\), got \(1, 5\)"):
        build.from_module(nn.Sequential(nn.Linear(2, 4), nn.Linear(5, 1)))
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got int"):
        build.from_module(3)
    with pytest.raises(ValueError, match=r"from_layers: expected bias 0 of shape \(4,\), got \(3,\)"):
        build.from_layers([torch.zeros(4, 2)], [torch.zeros(3)])
    with pytest.raises(ValueError, match=r"from_layers: expected at least one weight"):
        build.from_layers([], [])


@pytest.mark.parametrize("prefix", ["seq.", "", "model.net."])
def test_safetensors(tmp_path, prefix: str):
    state = {
        f"{prefix}{k}.{n}": t
        for k, n, t in [(0, "weight", torch.randn(4, 2)), (0, "bias", torch.randn(4)), (10, "weight", torch.randn(1, 4))]
    }
    save_file(state, tmp_path / "net.safetensors")
    graph, weights, biases = build.from_safetensors(tmp_path / "net.safetensors")
    assert graph.parts[0].layers == (2, 4, 1)
    assert torch.equal(weights[0][0, :, :, 0], state[f"{prefix}0.weight"].T)
    assert torch.equal(biases[0][0, :, 0], state[f"{prefix}0.bias"])
    assert torch.equal(biases[1], torch.zeros(1, 1, 1))


def test_broken_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"from_safetensors: expected a file, got .*none.safetensors"):
        build.from_safetensors(tmp_path / "none.safetensors")
    path = tmp_path / "net.safetensors"
    save_file({"0.weight": torch.randn(64, 64)}, path)
    whole = path.read_bytes()
    for broken in (whole[:-100], whole[:6], b"", b"\xff" * 200):
        path.write_bytes(broken)
        with pytest.raises(
            build.CheckpointError, match=r"expected a complete safetensors file, got .*net.safetensors.*copy or download it again"
        ):
            build.from_safetensors(path)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            {"0.weight": torch.zeros(3, 2), "norm.scale": torch.zeros(3)},
            r"expected numbered linear layers .* or a LLaMA-shaped decoder .*, got 'norm.scale'",
        ),
        ({"a.0.weight": torch.zeros(3, 2), "b.0.weight": torch.zeros(3, 2)}, r"expected one chain of layers, got a.k, b.k"),
        ({"0.bias": torch.zeros(3)}, r"expected a weight for each bias, got layer 0"),
        ({"0.weight": torch.zeros(3, 2), "1.weight": torch.zeros(1, 4)}, r"expected weight 1 of shape \(out, 3\), got \(1, 4\)"),
        ({}, r"expected one chain of layers, got no tensors"),
    ],
)
def test_other_state_dicts_are_refused(state: dict, message: str):
    with pytest.raises(build.CheckpointError, match=f"from_state_dict: {message}"):
        build.from_state_dict(state)


def test_pad_kernel_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"pad_kernel: expected a kernel of at most \(3, 3\), got \(5, 5\)"):
        build.pad_kernel(torch.zeros(1, 1, 5, 5), (3, 3))
    with pytest.raises(ValueError, match=r"pad_kernel: expected kernel of shape \(\*, kh, kw\), got \(3,\)"):
        build.pad_kernel(torch.zeros(3), (3, 3))


@pytest.mark.parametrize("pattern", ["net.{}.linear", "fc{}", "seq.{}", "decoder.layers.{}.linear"])
def test_names_of_linear_layers(pattern: str):
    state = {f"{pattern.format(k)}.weight": torch.randn(o, i) for k, (i, o) in enumerate([(2, 4), (4, 3), (3, 1)])}
    network = build.from_state_dict(state)
    assert network.layout == (2, 4, 3, 1)
    assert network.origin.layers == ("input", *(pattern.format(k) for k in range(3)))


def test_convolutions_and_norms_are_not_built():
    for shape in [(4, 3, 3, 3), (4,)]:
        with pytest.raises(
            NotImplementedError, match=r"expected linear layers with weights \(out, in\), got 0.weight of shape .*convolutions and norms"
        ):
            build.from_state_dict({"0.weight": torch.zeros(shape), "1.weight": torch.zeros(2, 4)})
    with pytest.raises(TypeError, match=r"expected weight 0 of a floating dtype, got torch.int8"):
        build.from_state_dict({"0.weight": torch.zeros(3, 2, dtype=torch.int8)})

"""Thin modules: PNA layers against PyTorch Geometric, encoders, norms, recomputation."""

from __future__ import annotations

import pytest
import torch
from torch_geometric.nn import PNAConv

import ngkernels as ngk
from ngkernels import nn
from ngkernels.ops.node_map import node_map

LAYOUT = [3, 5, 4]


class Modulated(PNAConv):
    """PyG's layer with the reference's messages: s * pre([x_i ; x_j]) + t, or sigmoid(s) * pre([x_i ; x_j])."""

    def __init__(self, *args, edge_dim: int, gate: bool, **kwargs):
        super().__init__(*args, **kwargs)
        self.gate = gate
        self.edge_encoder = torch.nn.Linear(edge_dim, 2 * self.F_in)

    def message(self, x_i, x_j, edge_attr):
        scale, shift = self.edge_encoder(edge_attr)[:, None].chunk(2, -1)
        both = torch.cat([x_i, x_j], -1)
        q = torch.stack([pre(both[:, k]) for k, pre in enumerate(self.pre_nns)], 1)
        return scale.sigmoid() * q if self.gate else scale * q + shift


@pytest.mark.parametrize("modulate", ["film", "gate", "concat"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"towers": 2, "pre_layers": 2},
        {"towers": 4, "post_layers": 3, "aggregators": ["std", "sum", "mean"]},
        {"scalers": ["linear", "identity", "attenuation", "inverse_linear"], "aggregators": ["max", "var"]},
        {"pre_layers": 3, "post_layers": 2, "scalers": ["amplification"]},
    ],
)
def test_pna_layer_is_pyg_s(backend: str, modulate: str, options: dict):
    torch.set_default_dtype(torch.float64)
    try:
        histogram = torch.tensor([3, 0, 0, 5, 0, 4])
        options = {"aggregators": ["mean", "min", "max", "std"], "scalers": ["identity", "amplification"], **options}
        layer = nn.PNALayer(6, 8, 5, histogram=histogram, modulate=modulate, **options)
        extra = {"edge_dim": 5} if modulate == "concat" else {"edge_dim": 5, "gate": modulate == "gate"}
        other = (PNAConv if modulate == "concat" else Modulated)(6, 8, deg=histogram, divide_input=False, **options, **extra)
        other.load_state_dict(layer.state_dict())
        graph = ngk.NeuralGraph.mlp(LAYOUT)
        x = torch.randn(graph.num_nodes, 6, requires_grad=True)
        weights = [torch.randn(1, i, o, 5, requires_grad=True) for i, o in zip(LAYOUT, LAYOUT[1:])]
        first = torch.tensor(LAYOUT).cumsum(0).tolist()
        layers = [torch.arange(end - width, end) for end, width in zip(first, LAYOUT)]
        edge_index = torch.cat([torch.cartesian_prod(s, t) for s, t in zip(layers, layers[1:])]).T
        wanted = other(x, edge_index, torch.cat([w.flatten(0, 2) for w in weights]))
        with ngk.use_backend(backend):
            edges = ngk.EdgeState(graph, weights, ngk.encoders.Identity())
            found = layer(x, edges)
            last = layer(x, edges.restrict(-1))
            grads = torch.autograd.grad(found.sin().sum(), [x, *weights, *layer.parameters()])
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(last, wanted[-LAYOUT[-1] :], rtol=1e-10, atol=1e-12)
        names = dict(other.named_parameters())
        expected = torch.autograd.grad(wanted.sin().sum(), [x, *weights, *(names[n] for n, _ in layer.named_parameters())])
        for f, e in zip(grads, expected, strict=True):
            torch.testing.assert_close(f, e, rtol=1e-9, atol=1e-11)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("reciprocal", [False, True])
@pytest.mark.parametrize("kind", ["fourier", "linear"])
def test_encoder_of_edges_and_of_values_are_the_module_itself(backend: str, kind: str, reciprocal: bool):
    encoder = nn.Encoder(2, 4, kind, features=5, sigma=0.7, layers=2, reciprocal=reciprocal).double()
    out = torch.nn.Linear(4, 4).double()
    graph = ngk.NeuralGraph.mlp([2, 3], reverse=reciprocal)
    w = torch.randn(1, 2, 3, 2, dtype=torch.float64)
    zero = torch.zeros_like(w)
    forward = torch.cat([w, zero, w], -1) if reciprocal else w
    with ngk.use_backend(backend):
        blocks = ngk.readout(encoder.edges(graph, [w]), [(out.weight, out.bias)])
        folded = ngk.readout(encoder.edges(graph, [w], out), [(torch.eye(4, dtype=torch.float64), None)])
        torch.testing.assert_close(blocks[0], out(encoder(forward)))
        torch.testing.assert_close(folded[0], blocks[0])
        if reciprocal:
            torch.testing.assert_close(blocks[1], out(encoder(torch.cat([zero, w, w], -1))).transpose(1, 2))
        else:
            torch.testing.assert_close(encoder.values(w[0, 0], out), out(encoder(w[0, 0])))


@pytest.mark.parametrize("assign", [False, True])
def test_loaded_frequencies_bring_their_own_grid_also_to_compiled_code(backend: str, assign: bool):
    """Sixty times higher frequencies: on the old grid, the tabulated encoder would be wrong in its first digit."""
    encoder, other, out = nn.Encoder(1, 5, features=16, sigma=0.5), nn.Encoder(1, 5, features=16, sigma=30.0), torch.nn.Linear(5, 4)
    v = torch.rand(64, 1) - 0.5
    nn.diagonal_graph(64)  # made here: compiled code cannot
    encoder.load_state_dict(other.state_dict(), assign=assign)
    torch._dynamo.reset()
    with ngk.use_backend(backend):
        found = torch.compile(encoder.values, fullgraph=True, backend="eager")(v, out)
        torch.testing.assert_close(found, out(encoder(v)), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(encoder.values(v, out), out(encoder(v)), rtol=1e-4, atol=1e-4)


NETWORKS = {
    "one": [ngk.NeuralGraph.mlp([3, 5])],
    "equal": [ngk.NeuralGraph.mlp([1, 3], 2)],
    "unequal": [ngk.NeuralGraph.mlp([n, 2]) for n in (1, 3)],
}


@pytest.mark.parametrize("networks", NETWORKS)
@pytest.mark.parametrize("over", ["layer", "graph", "batch_graph", None])
@pytest.mark.parametrize("act_first", [False, True])
def test_norm_and_activation_after_a_node_map(backend: str, act_first: bool, over: str | None, networks: str):
    graph = ngk.NeuralGraph.batch(NETWORKS[networks])
    after = nn.NormAct(None if over is None else nn.NodeNorm(4, over).double(), "tanh", act_first, graph)
    n = graph.num_nodes
    x, reduced, matrix, bias = (torch.randn(*s, dtype=torch.float64) for s in ((n, 3), (n, 2), (4, 5), (4,)))
    wanted = after(torch.cat([x, reduced], 1) @ matrix.T + bias, *after.tensors)
    with ngk.use_backend(backend):
        torch.testing.assert_close(node_map(x, reduced, [matrix, bias], [None], after.after(n, x.device)), wanted, rtol=1e-10, atol=1e-12)


def test_recompute_keeps_its_arguments_alone():
    x, w = torch.randn(5, 3, dtype=torch.float64, requires_grad=True), torch.randn(3, dtype=torch.float64, requires_grad=True)

    def function(x, w):
        return torch.nn.functional.silu(torch.nn.functional.layer_norm(x, (3,), w)).exp()

    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        nn.recompute(function, x, w)
    assert {t.data_ptr() for t in kept} == {x.data_ptr(), w.data_ptr()}
    assert torch.autograd.gradcheck(lambda *a: nn.recompute(function, *a), (x, w))
    assert torch.autograd.gradgradcheck(lambda *a: nn.recompute(function, *a), (x, w))
    assert torch.autograd.gradcheck(lambda *a: nn.recompute(function, *a), (x.detach(), w))


def test_recompute_repeats_autocast():
    seen = []

    def function(x):
        y = x @ x.T
        seen.append(y.dtype)
        return y

    x = torch.randn(4, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = nn.recompute(function, x)
    y.sum().backward()
    assert seen == [torch.bfloat16, torch.bfloat16]
    y = nn.recompute(function, x)
    with torch.autocast("cpu", torch.bfloat16):
        y.sum().backward()
    assert seen[2:] == [torch.float32, torch.float32]

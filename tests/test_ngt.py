"""NG-T as a model: against the dense formulas, symmetries, batches, memory."""

from __future__ import annotations

import copy

import attention_oracle as dense
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import check_unequal, flat, networks, permuted, relative, saved_tensors

import ngkernels as ngk
from neural_graphs.models import NGT
from ngkernels.blocks import DENSE, DIAGONAL

LAYOUT = [2, 5, 4, 3]
SMALL = {"d_node": 12, "d_edge": 6, "d_attn_hid": 8, "d_node_hid": 10, "d_edge_hid": 7, "num_heads": 2, "num_layers": 3, "d_out_hid": 9, "fourier_features": 5}  # fmt: skip
STATS = {"weights_mean": [0.1, 0.2, -0.1], "weights_std": [1.1, 0.7, 2.0], "biases_mean": [0.3, 0.1, 0.0], "biases_std": [0.5, 2.0, 1.5]}
ATTENTION = ("all", "edges")


def model_of(layout=LAYOUT, **options) -> NGT:
    """A small model in float64 whose biases and norms are not 0 and 1."""
    model = NGT(layout, **{**SMALL, **options}).double()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p += 0.2 * torch.randn_like(p)
    return model


def of_network(tensors, k: int) -> list[torch.Tensor]:
    return [t[k] for t in tensors]


# ---- the dense formulas ----
def check_against_formulas(model: NGT, layers, blocks, weights, biases, backend: str, stats=None) -> None:
    """Results and the gradients of everything."""
    leaves = [t.detach().clone().requires_grad_() for t in (*weights, *biases)]
    weights, biases = leaves[: len(weights)], leaves[len(weights) :]
    kinds = [DENSE if w.dim() == 4 else DIAGONAL for w in weights]
    graph = ngk.NeuralGraph.from_blocks(layers, [ngk.Block(kind, *b, k) for k, (kind, b) in enumerate(zip(kinds, blocks))], len(weights[0]))
    with ngk.use_backend(backend):
        found = flat(model.forward_graph(graph, weights, biases))
    state = dict(model.named_parameters())
    options = {"heads": model.layers[0].self_attn.heads, "reverse": model.reverse_edges, "over": model.attention}
    each = [dense.dense(layers, blocks, of_network(weights, k), of_network(biases, k), stats) for k in range(len(weights[0]))]
    if model.construct_graph.gpf is None:
        probed = [None] * len(each)
    else:
        probed = model.construct_graph.gpf(weights, biases)
    if model.head == "equivariant":
        results = [dense.updates(state, layers, blocks, n, probed=p, **options) for n, p in zip(each, probed)]
        wanted = [torch.stack(column) for part in zip(*results) for column in zip(*part)]
    else:
        pooling = (model.pooling.method, model.pooling.where)
        wanted = [torch.stack([dense.logits(state, layers, n, pooling=pooling, probed=p, **options) for n, p in zip(each, probed)])]
    inputs = {**{f"input {k}": t for k, t in enumerate(leaves)}, **{n: p for n, p in state.items() if p.requires_grad}}
    assert len(found) == len(wanted)
    for f, w in zip(found, wanted, strict=True):
        assert relative(f, w) < 1e-11
    grads, expected = (
        torch.autograd.grad(sum(t.sin().sum() for t in out), list(inputs.values()), allow_unused=True) for out in (found, wanted)
    )
    scale = max(e.abs().max() for e in expected if e is not None)
    for name, g, e in zip(inputs, grads, expected, strict=True):
        g, e = (torch.zeros_like(inputs[name]) if t is None else t for t in (g, e))
        assert (g - e).abs().max() <= 1e-9 * max(e.abs().max(), 1e-4 * scale), name


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"modulate_v": False, "num_layers": 2},
        {"reverse_edges": True},
        {"pooling": "cls_token"},
        {"pooling": "cls_token", "reverse_edges": True, "num_heads": 4},
        {"pooling": ("mean", "all"), "update_edges": False},
        {"pooling": ("max", "last"), "norm": None, "num_heads": 1},
        {"pooling": ("mean_edge", "all")},
        {"pooling": ("mean_edge", "last"), "num_layers": 1},
        {"pooling": ("mean_edge", "all"), "update_edges": False},
        {"pooling": ("max_edge", "all"), "reverse_edges": True},
        {"pooling": ("max_edge", "all"), "update_edges": False, "num_layers": 1},
        {"encoder": "linear", "input_layers": 2, "out_layers": 3},
        {"zero_out_weights": True},
        {"zero_out_biases": True, "positional": False, "num_probe_features": 3},
        {"stats": STATS, "reverse_edges": True},
        {"head": "equivariant"},
        {"head": "equivariant", "reverse_edges": True, "num_layers": 1},
        {"head": "equivariant", "update_edges": False},
    ],
    ids=lambda options: " ".join(f"{k}={v}" if k != "stats" else k for k, v in options.items()) or "plain",
)
def test_the_dense_formulas(backend: str, attention: str, options: dict):
    weights, biases = networks(LAYOUT, dtype=torch.float64)
    blocks = [(k, k + 1) for k in range(3)]
    check_against_formulas(model_of(attention=attention, **options), LAYOUT, blocks, weights, biases, backend, options.get("stats"))


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize(
    "options", [{}, {"reverse_edges": True, "pooling": "max"}, {"pooling": "cls_token"}, {"pooling": ("mean_edge", "last")}, {"pooling": ("max_edge", "all")}]
)
def test_residual_connections(backend: str, attention: str, options: dict):
    """A diagonal block from one hidden layer to a later one of another width; two channels for every weight."""
    layers, blocks = [2, 4, 3, 5, 3], [(0, 1), (1, 2), (2, 3), (3, 4), (1, 3)]
    weights = [0.5 * torch.randn(2, layers[s], layers[t], 2, dtype=torch.float64) for s, t in blocks[:4]]
    weights.append(0.5 * torch.randn(2, 4, 2, dtype=torch.float64))
    _, biases = networks(layers, dtype=torch.float64)
    model = model_of(layers, attention=attention, edge_channels=2, **options)
    check_against_formulas(model, layers, blocks, weights, biases, backend)


@pytest.mark.parametrize("head", ["classification", "equivariant"])
@pytest.mark.parametrize("edge_memory", ["hybrid", "store", "every:2"])
def test_every_edge_memory_gives_the_same_gradients(backend: str, head: str, edge_memory: str):
    weights, biases = networks(LAYOUT, dtype=torch.float64)
    blocks = [(k, k + 1) for k in range(3)]
    model = model_of(attention="edges", head=head, edge_memory=edge_memory, num_layers=4)
    check_against_formulas(model, LAYOUT, blocks, weights, biases, backend)


# ---- symmetries ----
layouts = st.lists(st.integers(1, 6), min_size=1, max_size=3).map(lambda hidden: [2, *hidden, 3])
symmetry = settings(max_examples=8, deadline=None, derandomize=True)


@symmetry
@given(
    layout=layouts,
    seed=st.integers(0, 1000),
    reverse=st.booleans(),
    attention=st.sampled_from(ATTENTION),
    pooling=st.sampled_from(["cat", "mean", "max", "cls_token", ("mean_edge", "all")]),
)
def test_logits_do_not_depend_on_the_order_of_hidden_neurons(layout, seed, reverse, attention, pooling):
    torch.manual_seed(seed)
    model = NGT(layout, **SMALL, reverse_edges=reverse, attention=attention, pooling=pooling)
    weights, biases = networks(layout)
    other_weights, other_biases, _ = permuted(weights, biases, layout)
    assert relative(model(other_weights, other_biases), model(weights, biases)) <= 1e-5


@symmetry
@given(layout=layouts, seed=st.integers(0, 1000), reverse=st.booleans(), attention=st.sampled_from(ATTENTION))
def test_updates_follow_the_order_of_hidden_neurons(layout, seed, reverse, attention):
    torch.manual_seed(seed)
    model = NGT(layout, **SMALL, reverse_edges=reverse, attention=attention, head="equivariant")
    weights, biases = networks(layout)
    other_weights, other_biases, orders = permuted(weights, biases, layout)
    delta_weights, delta_biases = model(weights, biases)
    moved_weights, moved_biases = model(other_weights, other_biases)
    for k, (w, b) in enumerate(zip(delta_weights, delta_biases, strict=True)):
        assert w.shape == weights[k].shape
        assert b.shape == biases[k].shape
        # an untrained head's update can be 0 but for rounding: then a tenth of its scale, 0.01, is the measure
        assert relative(moved_weights[k], w[:, orders[k]][:, :, orders[k + 1]], 1e-3) <= 1e-5
        assert relative(moved_biases[k], b[:, orders[k + 1]], 1e-3) <= 1e-5


# ---- batches ----
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("norm", ["layer", "graph", None])
@pytest.mark.parametrize("pooling", ["cat", "mean", ("mean", 1), "cat_mean", "cls_token", ("mean_edge", "last")])
def test_a_network_does_not_feel_its_batch_mates(backend: str, attention, norm, pooling):
    model = NGT(LAYOUT, **SMALL, norm=norm, pooling=pooling, attention=attention)
    weights, biases = networks(LAYOUT, 3)
    with ngk.use_backend(backend):
        together = model(weights, biases)
        alone = torch.cat([model([w[k : k + 1] for w in weights], [b[k : k + 1] for b in biases]) for k in range(3)])
    assert relative(together, alone) <= 1e-6


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("pooling", ["cat", "mean", ("max", "last"), "cls_token", ("mean_edge", "all"), ("max_edge", "all")])
@pytest.mark.parametrize("norm", ["layer", "graph"])
def test_unequal_networks_in_one_batch(backend: str, attention, pooling, norm):
    """No padding: each network is computed as if it were alone."""
    model = NGT([2, 9, 9, 3], **SMALL, pooling=pooling, norm=norm, reverse_edges=True, attention=attention)
    with ngk.use_backend(backend):
        check_unequal(model, reverse=False)


def test_equivariant_head_on_unequal_networks(backend: str):
    model = model_of([2, 9, 9, 3], head="equivariant")
    shapes = [[2, 5, 3], [2, 6, 4, 3]]
    inputs = [networks(layout, 1, torch.float64) for layout in shapes]
    graphs = [ngk.NeuralGraph.mlp(layout) for layout in shapes]
    weights, biases = [w for ws, _ in inputs for w in ws], [b for _, bs in inputs for b in bs]
    with ngk.use_backend(backend):
        together = flat(model.forward_graph(ngk.NeuralGraph.batch(graphs), weights, biases))
        alone = [model.forward_graph(g, *i) for g, i in zip(graphs, inputs, strict=True)]
    assert all(relative(t, a) <= 1e-12 for t, a in zip(together, [*alone[0][0], *alone[1][0], *alone[0][1], *alone[1][1]], strict=True))


def test_reference_names_round_trip(backend: str):
    first, second = (NGT([2, 6, 3], **SMALL, pooling="cls_token") for _ in range(2))
    second.load_state_dict(first.state_dict())
    weights, biases = networks([2, 6, 3])
    with ngk.use_backend(backend):
        logits = first(weights, biases)
        assert torch.equal(second(weights, biases), logits)
        assert torch.equal(copy.deepcopy(first)(weights, biases), logits)
    names = set(first.state_dict())
    assert {
        "cls_token",
        "layers.0.self_attn.qkv_edge.weight",
        "layers.1.edge_updates.edge_mlp0.lin0_e.bias",
        "layers.2.node_ln1.weight",
    } <= names
    assert not any(name.startswith("layers.2.edge_updates") for name in names)


# ---- memory ----
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("head", ["classification", "equivariant"])
def test_nothing_with_a_row_for_each_pair_is_kept(backend: str, attention: str, head: str):
    layout = [4, 96, 96, 4]
    model = NGT(layout, **SMALL, head=head, attention=attention)
    weights, biases = networks(layout, 1, scale=0.05)  # the encoder's table grows with the largest weight, not with their number
    edges = sum(w.numel() for w in weights)
    weights = [w.requires_grad_() for w in weights]
    with ngk.use_backend(backend):
        kept = saved_tensors(model, weights, biases)
    assert max(t.untyped_storage().nbytes() for t in kept) < 4 * edges * 4, "6 numbers for each edge would be more"


@pytest.mark.parametrize("attention", ATTENTION)
def test_bytes_kept_for_each_neuron(backend: str, attention: str):
    """At most 16 kB at the default widths with 4 layers, weights left out; plain PyTorch keeps more than 22 kB."""
    sizes = {}
    for width in (64, 128):
        model = NGT([2, width, 2, width, 3], attention=attention)
        weights, biases = networks([2, width, 2, width, 3], 1, scale=0.05)
        inputs = {t.untyped_storage().data_ptr() for t in (*weights, *model.parameters())}
        with ngk.use_backend(backend):
            kept = saved_tensors(model, weights, biases)
        sizes[width] = sum(t.untyped_storage().nbytes() for t in kept if t.untyped_storage().data_ptr() not in inputs)
    assert (sizes[128] - sizes[64]) / (2 * (128 - 64)) <= 16 * 1024

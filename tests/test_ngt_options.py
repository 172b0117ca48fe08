"""NG-T's options and errors."""

from __future__ import annotations

import math

import pytest
import torch
from networks import check_compiles, check_low_precision, networks, relative
from test_ngt import SMALL

import ngkernels as ngk
from neural_graphs.models import NGT
from ngkernels import nn


# ---- options ----
@pytest.mark.parametrize("attention", ["all", "edges"])
@pytest.mark.parametrize(
    "options",
    [
        {"encoder": "linear", "input_layers": 2},
        {"norm": "graph", "dropout": 0.5},
        {"norm": None, "modulate_v": False, "head": "regression"},
        {"update_edges": False, "positional": False, "out_features": 4},
        {"num_layers": 1, "out_features": 4, "pooling": ("max", -2)},
        {"zero_out_weights": True, "pooling": "cls_token"},
        {"zero_out_biases": True, "num_probe_features": 3},
        {"stats": {"weights_mean": [0.1, 0.2], "biases_std": [2.0, 3.0]}, "check_finite": "error"},
    ],
)
def test_options_run_and_train(backend: str, attention: str, options: dict):
    model = NGT([2, 5, 3], **{**SMALL, **options}, attention=attention)
    weights, biases = networks([2, 5, 3], 2)
    with ngk.use_backend(backend):
        out = model(weights, biases)
        out.square().sum().backward()
    assert out.shape == (2, 1 if options.get("head") == "regression" else options.get("out_features", 10))
    assert all(math.isfinite(p.grad.abs().sum()) for p in model.parameters() if p.grad is not None)
    unread = {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert unread == ({"construct_graph.proj_edge_in.weight"} if "zero_out_weights" in options else set())


def test_dropout_acts_in_training_alone(backend: str):
    torch.manual_seed(0)
    model, weights, biases = NGT([2, 5, 3], **SMALL, dropout=0.4), *networks([2, 5, 3], 2)
    plain = NGT([2, 5, 3], **SMALL)
    plain.load_state_dict(model.state_dict())
    with ngk.use_backend(backend):
        assert not torch.equal(model(weights, biases), model(weights, biases))
        assert torch.equal(model.eval()(weights, biases), plain(weights, biases))


def test_activation_embedding(backend: str):
    model = NGT([2, 5, 4, 3], **SMALL, activation_embedding=True)
    weights, biases = networks([2, 5, 4, 3], 2)
    with ngk.use_backend(backend):
        same = model(weights, biases, ["relu", "gelu"])
        each = model(weights, biases, [["relu", "gelu"], ["relu", "tanh"]])
        assert relative(each[0], same[0]) < 1e-6
        assert relative(each[1], same[1]) > 1e-6
        with pytest.raises(ValueError, match=r"NGT: expected activations \(activation_embedding is on\), got None"):
            model(weights, biases)


def test_two_dimensional_weights_of_one_network(backend: str):
    model, weights, biases = NGT([2, 5, 3], **SMALL), *networks([2, 5, 3], 1)
    with ngk.use_backend(backend):
        wanted = model(weights, biases)
        assert torch.equal(model.forward_graph(ngk.NeuralGraph.mlp([2, 5, 3]), [w[0, :, :, 0] for w in weights], biases), wanted)


def test_low_precision_weights_and_autocast(backend: str):
    with ngk.use_backend(backend):
        check_low_precision(NGT([2, 16, 3], **SMALL))


@pytest.mark.parametrize(
    "options", [{}, {"pooling": "cls_token", "attention": "edges"}, {"pooling": ("mean_edge", "last"), "norm": "graph"}]
)
def test_compiles_in_one_piece(options: dict):
    check_compiles(NGT([2, 5, 3], **SMALL, **options))


def test_it_says_what_it_is():
    text = repr(NGT([2, 5, 3], **SMALL, attention="edges"))
    assert (
        "layout=[2, 5, 3], d_node=12, d_edge=6, head=classification, pooling=(cat, last), attention=edges, num_heads=2, num_layers=3"
        in text
    )
    assert "hidden=8, heads=2, modulate_v=True" in text


@pytest.mark.parametrize("norm", ["layer", "graph", "batch_graph", None])
def test_the_rows_that_are_pooled_are_rows_of_the_whole(backend: str, norm: str | None):
    """Norms over a network see all its neurons, also where only the last layer's states are wanted."""
    model, graph = NGT([2, 5, 3], **SMALL, norm=norm), ngk.NeuralGraph.mlp([2, 5, 3], 2)
    weights, _ = networks([2, 5, 3], 2)
    first = model.first_states(graph, torch.randn(20, 12), weights)
    with ngk.use_backend(backend):
        whole, _ = model.layers_of(*first)
        last, _ = model.layers_of(*first, rows=-1)
    assert relative(last, whole.view(2, 10, -1)[:, 7:].flatten(0, 1)) < 1e-5


# ---- checkpoints of the reference ----
CONFIG = {
    "layout": [2, 6, 3], "d_node": 12, "d_edge": 6, "d_attn_hid": 8, "d_node_hid": 10, "d_edge_hid": 7, "d_out_hid": 9, "n_layers": 3, "n_heads": 2,
}  # fmt: skip


def same_function(first: NGT, second: NGT) -> None:
    weights, biases = networks([2, 6, 3])
    with ngk.use_backend("reference"):
        assert torch.equal(first(weights, biases), second(weights, biases))


@pytest.mark.parametrize(
    ("options", "config"),
    [
        ({}, {}),
        ({}, {"layout": None, "layer_layout": [2, 6, 3], "pooling_method": "cat", "pooling_layer_idx": "last", "use_cls_token": False}),
        (
            {"reverse_edges": True, "pooling": "cls_token"},
            {"rev_edge_features": True, "use_cls_token": True, "pooling_method": "cls_token"},
        ),
        ({"pooling": ("mean", "all"), "modulate_v": False}, {"pooling": ["mean", "all"]}),
        ({"pooling": ("mean_edge", "all"), "out_layers": 3}, {"pooling_method": "mean_edge", "pooling_layer_idx": "all"}),
        ({"encoder": "linear", "input_layers": 3, "norm": None}, {"graph_constructor": {"sin_emb": False, "input_layers": 3}}),
        ({"positional": False, "zero_out_weights": True}, {"graph_constructor": {"use_pos_embed": False, "zero_out_weights": True}}),
        ({"update_edges": False, "num_probe_features": 3, "d_out_hid": 4}, {"disable_edge_updates": True, "d_out_hid": 4}),
    ],
)
def test_from_reference_reads_what_the_config_leaves_out(options: dict, config: dict):
    model = NGT([2, 6, 3], **{**SMALL, **options})
    config = {k: v for k, v in {**CONFIG, **config}.items() if v is not None}
    unread = {"layers.2.edge_updates.eln0.weight": torch.zeros(6), "construct_graph.pos_embed": torch.zeros(6, 12)}
    state = {
        **{k: v for k, v in unread.items() if k not in model.state_dict() and "mean_edge" not in options.get("pooling", ())},
        **model.state_dict(),
    }
    loaded = NGT.from_reference({f"_orig_mod.{k}": v for k, v in state.items()}, config)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    same_function(loaded, model)


def test_from_reference_says_what_does_not_fit():
    state = NGT([2, 6, 3], **SMALL).state_dict()
    assert NGT.from_reference(state, CONFIG, attention="edges", edge_memory="store").memory.every == 1
    with pytest.raises(ValueError, match=r"NGT.from_reference: .*missing: proj_out.0.bias; left over: other"):
        NGT.from_reference({**{n: t for n, t in state.items() if n != "proj_out.0.bias"}, "other": torch.zeros(1)}, CONFIG)
    with pytest.raises(ValueError, match=r"layers.0.lin0.weight \(12, 12\) instead of \(14, 14\)"):
        NGT.from_reference(state, {**CONFIG, "d_node": 14})
    with pytest.raises(ValueError, match=r"expected config with n_layers, n_heads, got"):
        NGT.from_reference(state, {k: v for k, v in CONFIG.items() if not k.startswith("n_")})
    with pytest.raises(NotImplementedError, match=r"expected config node_update_type='rt', got 'pna'"):
        NGT.from_reference(state, {**CONFIG, "node_update_type": "pna"})


# ---- errors ----
def test_inputs_that_do_not_fit():
    model = NGT([2, 5, 3], **SMALL)
    weights, biases = networks([2, 5, 3], 2)
    graph = ngk.NeuralGraph.mlp([2, 5, 3], 2)
    for broken, error, message in [
        ((graph, weights[:1], biases), ValueError, r"expected 2 weight tensors .* got 1"),
        (
            (graph, [w.transpose(1, 2) for w in weights], biases),
            ValueError,
            r"expected weights\[0\] of shape \(2, 2, 5, 1\) .*, got \(2, 5, 2, 1\)",
        ),
        (
            (ngk.NeuralGraph.mlp([2, 5, 3], 2, reverse=True), weights, biases),
            ValueError,
            r"reverse=False .* got True; build it with reverse=False",
        ),
        ((graph.restrict(-1), weights, biases), ValueError, r"expected an unrestricted graph"),
        ((graph.closure("all"), weights, biases), ValueError, r"expected a graph of edges alone"),
        ((graph.with_token(), weights, biases), ValueError, r"expected a graph of edges alone"),
        ((graph, weights, [biases[0], biases[1].double()]), TypeError, r"expected biases\[1\] of a dtype that fits"),
        ((ngk.NeuralGraph.mlp([2, 5, 4]), *networks([2, 5, 4], 1)), ValueError, r"at most 2 inputs, 1 hidden layers and 3 outputs"),
    ]:
        with pytest.raises(error, match=f"NGT: .*{message}"):
            model.forward_graph(*broken)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"attention": "sparse"}, ValueError, r"NGT: expected attention in all, edges, got 'sparse'"),
        (
            {"edge_memory": "store"},
            ValueError,
            r"expected edge_memory='recompute' with attention='all' .*, got 'store'; use attention='edges'",
        ),
        ({"edge_memory": "hybrid"}, ValueError, r"with attention='all' .*, got 'hybrid'"),
        ({"attention": "edges", "edge_memory": "some"}, ValueError, r"edge_memory: expected auto, auto:SIZE, recompute, store, hybrid, every:k"),
        ({"num_heads": 3}, ValueError, r"RelationalAttention: expected heads to divide hidden, got heads=3, hidden=8"),
        ({"num_heads": 0}, ValueError, r"got heads=0"),
        ({"num_layers": 0}, ValueError, r"NGT: expected .*num_layers.* of at least 1"),
        ({"d_edge": 0}, ValueError, r"NGT: expected .*d_edge.* of at least 1"),
        ({"norm": "batch"}, ValueError, r"NGT: expected norm in layer, graph, batch_graph, None, got 'batch'"),
        ({"pooling": ("max_edge", "last")}, ValueError, r"NGT: expected pooling cat, mean, max, cat_mean, cls_token"),
        ({"pooling": ("cat", "all")}, ValueError, r"NGT: expected pooling cat, mean, max, cat_mean, cls_token"),
        ({"pooling": "cls_token", "head": "equivariant"}, ValueError, r"NGT: expected pooling"),
        ({"head": "none"}, ValueError, r"NGT: expected head in classification, regression, equivariant"),
        ({"layout": [2]}, ValueError, r"NGT: expected layout of at least 2 layers"),
        ({"stats": {"mean": [1]}}, ValueError, r"NGT: expected stats of weights_mean"),
        ({"num_probe_features": 2, "edge_channels": 2}, ValueError, r"NGT: expected one channel with probe features"),
    ],
)
def test_options_that_do_not_fit(options: dict, error: type, message: str):
    with pytest.raises(error, match=message):
        NGT(**{"layout": [2, 5, 3], **SMALL, **options})


def test_the_layer_by_itself(backend: str):
    """As another library would use it: on a graph of its own, one node layer's rows."""
    layer = nn.RelationalLayer(12, 6, 8, 10, 7, heads=2)
    graph = ngk.NeuralGraph.mlp([4, 5, 3])
    encoder = nn.Encoder(1, 6, features=5)
    x, weights = torch.randn(12, 12), [torch.randn(4, 5), torch.randn(5, 3)]
    edges = encoder.edges(graph, weights)
    for over in ("all", "edges", "in", "out"):
        with ngk.use_backend(backend):
            found, longer = layer(x, edges, over)
            assert relative(layer.nodes(x, edges.restrict(-1), over), found[-3:]) < 1e-6
        assert len(longer.steps) == 2

"""NG-GNN's options and errors."""

from __future__ import annotations

import math

import pytest
import torch
from networks import check_compiles, check_low_precision, networks, relative

import ngkernels as ngk
from neural_graphs.models import NGGNN

SMALL = {"d_hid": 8, "num_layers": 3, "fourier_features": 16}


# ---- options ----
@pytest.mark.parametrize(
    "options",
    [
        {"encoder": "linear", "input_layers": 2},
        {"norm": None, "act": "gelu", "act_first": True, "dropout": 0.5},
        {"modulate": "gate", "towers": 2, "pre_layers": 2, "post_layers": 2},
        {"modulate": "concat", "aggregators": ("std", "sum"), "scalers": ("attenuation", "linear", "inverse_linear")},
        {"update_edges": False, "positional": False, "head": "regression"},
        {"num_layers": 1, "out_features": 4, "pooling": ("max", -2)},
        {"zero_out_weights": True},
        {"zero_out_biases": True, "num_probe_features": 3},
        {"stats": {"weights_mean": [0.1, 0.2], "biases_std": [2.0, 3.0]}, "check_finite": "error"},
    ],
)
def test_options_run_and_train(backend: str, options: dict):
    model = NGGNN([2, 5, 3], **{**SMALL, **options})
    weights, biases = networks([2, 5, 3], 2)
    with ngk.use_backend(backend):
        out = model(weights, biases)
        out.square().sum().backward()
    assert out.shape == (2, 1 if options.get("head") == "regression" else options.get("out_features", 10))
    assert all(math.isfinite(p.grad.abs().sum()) for p in model.parameters() if p.grad is not None)
    assert sum(p.grad is not None for p in model.parameters()) > 10


def test_activation_embedding(backend: str):
    model = NGGNN([2, 5, 4, 3], **SMALL, activation_embedding=True)
    weights, biases = networks([2, 5, 4, 3], 2)
    with ngk.use_backend(backend):
        same = model(weights, biases, ["relu", "gelu"])
        each = model(weights, biases, [["relu", "gelu"], ["relu", "tanh"]])
        assert torch.equal(same[0], each[0])
        assert relative(each[1], same[1]) > 1e-6
        with pytest.raises(ValueError, match=r"expected activations \(activation_embedding is on\), got None"):
            model(weights, biases)
        with pytest.raises(ValueError, match=r"expected 2 activations .* got \['relu', 'sine'\]"):
            model(weights, biases, ["relu", "sine"])
        with pytest.raises(ValueError, match=r"expected activations for 2 networks, got 1"):
            model(weights, biases, [["relu", "relu"]])


def test_low_precision_weights_and_autocast(backend: str):
    with ngk.use_backend(backend):
        check_low_precision(NGGNN([2, 16, 3], **SMALL))


def test_compiles_in_one_piece():
    check_compiles(NGGNN([2, 5, 3], **SMALL))


# ---- errors ----
def test_from_reference_says_what_does_not_fit():
    config = {
        "layout": [2, 6, 3], "d_hid": 8, "pooling": ["cat", "last"], "rev_edge_features": False, "d_out": 10,
        "pna": {"num_layers": 2, "aggregators": ["mean"], "scalers": ["identity"], "norm": "layernorm", "act": "silu", "update_edge_attr": True},
        "graph_constructor": {"sin_emb": True, "sin_emb_dim": 4},
    }  # fmt: skip
    model = NGGNN(
        **{**SMALL, "fourier_features": 4, "num_layers": 2}, layout=[2, 6, 3], modulate="concat", aggregators=["mean"], scalers=["identity"]
    )
    state = model.state_dict()
    loaded = NGGNN.from_reference(state, config, edge_memory="store")
    assert loaded.gnn.norms[0].over == "batch_graph"
    assert all(torch.equal(t, state[n]) for n, t in loaded.state_dict().items())
    unread = {"gnn.edge_update.1.lin_e.weight": torch.zeros(8, 8)}  # made by final_edge_update, never read
    NGGNN.from_reference({**state, **unread}, config)
    with pytest.raises(ValueError, match=r"from_reference: .*missing: proj_out.0.bias; left over: other"):
        NGGNN.from_reference({**{n: t for n, t in state.items() if n != "proj_out.0.bias"}, "other": torch.zeros(1)}, config)
    with pytest.raises(ValueError, match=r"proj_out.0.bias \(3,\) instead of \(8,\)"):
        NGGNN.from_reference({**state, "proj_out.0.bias": torch.zeros(3)}, config)
    with pytest.raises(ValueError, match=r"expected config with pna, graph_constructor"):
        NGGNN.from_reference(state, {"layout": [2, 6, 3], "d_hid": 8})
    with pytest.raises(NotImplementedError, match=r"expected pna jk=None, got 'cat'"):
        NGGNN.from_reference(state, {**config, "pna": {**config["pna"], "jk": "cat"}})
    with pytest.raises(NotImplementedError, match=r"pna norm layernorm or None, got 'batchnorm'"):
        NGGNN.from_reference(state, {**config, "pna": {**config["pna"], "norm": "batchnorm"}})


def test_inputs_that_do_not_fit_the_layout():
    model = NGGNN([2, 5, 3], **SMALL)
    weights, biases = networks([2, 5, 3], 2)
    for broken, message in [
        ((weights[:1], biases), r"expected 2 weights \(layout \(2, 5, 3\)\), got 1"),
        ((weights, biases[:1]), r"expected 2 biases .* got 1"),
        (([weights[0].transpose(1, 2), weights[1]], biases), r"expected weights\[0\] of shape \(2, 2, 5, 1\) .*, got \(2, 5, 2, 1\)"),
        (([weights[0], weights[1][:1]], biases), r"expected weights\[1\] of shape \(2, 5, 3, 1\)"),
        (([weights[0][0, :, :, 0], weights[1]], biases), r"weights\[0\] .* weight.T\[None, :, :, None\]"),
        ((weights, [biases[0][:, :, 0], biases[1]]), r"expected biases\[0\] of shape \(2, 5, 1\) .*, got \(2, 5\)"),
        (([w[:0] for w in weights], [b[:0] for b in biases]), r"at least one network"),
    ]:
        with pytest.raises(ValueError, match=f"NGGNN: .*{message}"):
            model(*broken)
    for broken, message in [
        ((weights[0], biases), r"expected weights to be a list of tensors"),
        ((weights, [biases[0].long(), biases[1]]), r"expected biases\[0\] of a floating dtype, got torch.int64"),
        (([weights[0].double(), weights[1]], biases), r"expected weights\[0\] of a dtype that fits .* convert the weights with .float\(\)"),
        (([weights[0], weights[1].to("meta")], biases), r"expected weights\[1\] on cpu .* got meta"),
    ]:
        with pytest.raises(TypeError, match=f"NGGNN: {message}"):
            model(*broken)


def test_graphs_that_do_not_fit_the_model():
    model = NGGNN([2, 5, 3], **SMALL)
    weights, biases = networks([2, 5, 3], 1)
    graph = ngk.NeuralGraph.mlp([2, 5, 3])
    for broken, error, message in [
        ((graph.restrict(-1), weights, biases), ValueError, r"expected an unrestricted graph"),
        ((ngk.NeuralGraph.mlp([2, 5, 3], reverse=True), weights, biases), ValueError, r"reverse=False .* got True; build it with reverse=False"),
        (("graph", weights, biases), TypeError, r"expected graph to be a NeuralGraph, got str"),
        ((graph, weights, biases[:1]), ValueError, r"expected biases of shapes"),
        ((graph, weights, torch.zeros(3, 1)), ValueError, r"expected biases of shape \(10, 1\)"),
        ((ngk.NeuralGraph.mlp([2, 5, 4]), *networks([2, 5, 4], 1)), ValueError, r"at most 2 inputs, 1 hidden layers and 3 outputs"),
        ((ngk.NeuralGraph.batch([graph, ngk.NeuralGraph.mlp([2, 5, 2])]), *map(sum, zip(networks([2, 5, 3], 1), networks([2, 5, 2], 1)), ([], []))),
         ValueError, r"equal widths of the pooled layer for pooling cat, got \[2, 3\]; use mean or max"),
    ]:  # fmt: skip
        with pytest.raises(error, match=f"NGGNN: .*{message}"):
            model.forward_graph(*broken)
    with pytest.raises(ValueError, match=r"expected networks with a node layer 2 \(the model's pooling\), got one of 2 layers"):
        NGGNN([2, 5, 3], **SMALL, pooling=("mean", 2)).forward_graph(ngk.NeuralGraph.mlp([2, 3]), *networks([2, 3], 1))
    with pytest.raises(TypeError, match=r"expected a model of torch.float32 or torch.float64, got torch.bfloat16"):
        NGGNN([2, 5, 3], **SMALL).bfloat16()(weights, biases)
    with pytest.raises(NotImplementedError, match=r"probe features are built for batches of equal networks"):
        NGGNN([2, 5, 3], **SMALL, num_probe_features=2).forward_graph(ngk.NeuralGraph.batch([graph, graph]), weights * 2, biases * 2)
    with pytest.raises(NotImplementedError, match=r"equivariant head of a packed graph"):
        packed = ngk.NeuralGraph.batch([graph], packed=True)
        NGGNN([2, 5, 3], **SMALL, head="equivariant").forward_graph(packed, graph.pack(weights), torch.zeros(10, 1))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layout": [2]}, ValueError, r"expected layout of at least 2 layers"),
        ({"layout": [2, 0, 3]}, ValueError, r"at least 1 neuron"),
        ({"layout": [2, 1.5, 3]}, TypeError, r"expected layout of integers"),
        ({"edge_memory": "some"}, ValueError, r"edge_memory: expected auto, auto:SIZE, recompute, store, hybrid, every:k .* got 'some'"),
        ({"edge_memory": 0}, ValueError, r"got 0"),
        ({"encoder": "mlp"}, ValueError, r"expected kind fourier or linear, got 'mlp'"),
        ({"input_layers": 0}, ValueError, r"at least 1 layer"),
        ({"norm": "batch"}, ValueError, r"expected norm in layer, graph, batch_graph, None, got 'batch'"),
        ({"act": "swish"}, ValueError, r"expected act in silu"),
        ({"head": "none"}, ValueError, r"expected head in classification, regression, equivariant"),
        ({"pooling": ("cat", "all")}, ValueError, r"expected pooling cat, mean"),
        ({"pooling": "sum"}, ValueError, r"got 'sum'"),
        ({"aggregators": ("median",)}, ValueError, r"expected aggregators to be different names of sum, mean"),
        ({"scalers": ("log",)}, ValueError, r"expected scalers of identity"),
        ({"modulate": "add"}, ValueError, r"expected modulate in film, gate, concat"),
        ({"towers": 3}, ValueError, r"towers to divide out_channels"),
        ({"pre_layers": 0}, ValueError, r"pre_layers and post_layers of at least 1"),
        ({"num_layers": 0}, ValueError, r"d_hid and num_layers of at least 1"),
        ({"stats": {"mean": [1]}}, ValueError, r"expected stats of weights_mean"),
        ({"stats": {"weights_std": [1.0, 0.0]}}, ValueError, r"a std above 0"),
        ({"check_finite": "maybe"}, ValueError, r"expected check_finite in None, warn, error"),
        ({"degree_histogram": torch.zeros(3)}, ValueError, r"at least one node"),
        ({"num_probe_features": 2, "edge_channels": 2}, ValueError, r"expected one channel with probe features"),
    ],
)
def test_options_that_do_not_fit(options: dict, error: type, message: str):
    with pytest.raises(error, match=message):
        NGGNN(**{"layout": [2, 5, 3], "d_hid": 8, **options})


def test_nan_in_the_input_is_reported_as_asked():
    weights, biases = networks([2, 5, 3], 2)
    weights[1][0, 0, 0] = math.inf
    with ngk.use_backend("reference"):
        with pytest.raises(ValueError, match=r"expected finite weights\[1\], got NaN or infinity; leave that network out"):
            NGGNN([2, 5, 3], **SMALL, check_finite="error")(weights, biases)
        with pytest.warns(RuntimeWarning, match=r"expected finite weights\[1\]"):
            NGGNN([2, 5, 3], **SMALL, check_finite="warn")(weights, biases)

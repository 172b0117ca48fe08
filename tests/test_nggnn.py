"""NG-GNN as a model: symmetries, batches, memory, options, errors."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ngkernels as ngk
from neural_graphs.models import NGGNN

POLICIES = ("recompute", "hybrid", "store", "every:2", 3)
SMALL = {"d_hid": 8, "num_layers": 3, "fourier_features": 16}


def networks(layout, batch=2, dtype=torch.float32, scale=0.5, channels=1):
    weights = [scale * torch.randn(batch, i, o, channels, dtype=dtype) for i, o in zip(layout, layout[1:])]
    return weights, [scale * torch.randn(batch, o, channels, dtype=dtype) for o in layout[1:]]


def flat(result) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else [*result[0], *result[1]]


def gradients(model, weights, biases) -> list[torch.Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (*weights, *biases)]
    out = flat(model(leaves[: len(weights)], leaves[len(weights) :]))
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.autograd.grad(sum(t.sin().sum() for t in out), [*leaves, *parameters])


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)).item()


# ---- values and gradients ----
@pytest.mark.parametrize("head", ["classification", "equivariant"])
def test_every_edge_memory_gives_the_same_gradients(backend: str, head: str):
    weights, biases = networks([2, 5, 6, 3], dtype=torch.float64)
    wanted = None
    with ngk.use_backend(backend):
        for policy in POLICIES:
            torch.manual_seed(1)
            model = NGGNN([2, 5, 6, 3], d_hid=8, num_layers=4, edge_memory=policy, head=head, fourier_features=16).double()
            found = gradients(model, weights, biases)
            wanted = wanted or found
            assert max(relative(f, w) for f, w in zip(found, wanted, strict=True)) < 1e-11, policy


def test_second_derivatives_run_through_the_recomputed_parts():
    model = NGGNN([2, 4, 2], d_hid=4, num_layers=2, out_features=1, fourier_features=4, norm="graph").double()
    weights, biases = networks([2, 4, 2], 1, torch.float64)
    with ngk.use_backend("reference"):
        assert torch.autograd.gradgradcheck(lambda b: model(weights, [b, biases[1]]), biases[0].requires_grad_(), atol=1e-6)


def test_reference_names_round_trip(backend: str):
    first, second = NGGNN([2, 6, 3], **SMALL), NGGNN([2, 6, 3], **SMALL)
    second.load_state_dict(first.state_dict())
    weights, biases = networks([2, 6, 3])
    with ngk.use_backend(backend):
        logits = first(weights, biases)
        assert torch.equal(second(weights, biases), logits)
        assert torch.equal(copy.deepcopy(first)(weights, biases), logits)
    names = first.state_dict().keys()
    assert {"construct_graph.proj_weight.0.b", "gnn.convs.0.edge_encoder.weight", "gnn.edge_update.1.lin_e.bias", "proj_out.4.bias"} <= names
    assert not first.construct_graph.proj_weight[0].b.requires_grad


def test_from_reference_says_what_does_not_fit():
    config = {
        "layout": [2, 6, 3], "d_hid": 8, "pooling": ["cat", "last"], "rev_edge_features": False, "d_out": 10,
        "pna": {"num_layers": 2, "aggregators": ["mean"], "scalers": ["identity"], "norm": "layernorm", "act": "silu", "update_edge_attr": True},
        "graph_constructor": {"sin_emb": True, "sin_emb_dim": 4},
    }  # fmt: skip
    model = NGGNN(**{**SMALL, "fourier_features": 4, "num_layers": 2}, layout=[2, 6, 3], modulate="concat", aggregators=["mean"], scalers=["identity"])
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


# ---- symmetries ----
layouts = st.lists(st.integers(1, 6), min_size=1, max_size=3).map(lambda hidden: [2, *hidden, 3])
symmetry = settings(max_examples=8, deadline=None, derandomize=True)


def permuted(weights, biases, layout):
    """The same functions with the hidden neurons in another order, and the orders."""
    orders = [torch.arange(layout[0]), *(torch.randperm(d) for d in layout[1:-1]), torch.arange(layout[-1])]
    weights = [w[:, a][:, :, b] for w, a, b in zip(weights, orders, orders[1:])]
    return weights, [b[:, o] for b, o in zip(biases, orders[1:])], orders


@symmetry
@given(layout=layouts, seed=st.integers(0, 1000), reverse=st.booleans(), pooling=st.sampled_from(["cat", "mean", "max", ("mean_edge", "all")]))
def test_logits_do_not_depend_on_the_order_of_hidden_neurons(layout, seed, reverse, pooling):
    torch.manual_seed(seed)
    model = NGGNN(layout, d_hid=16, fourier_features=32, reverse_edges=reverse, pooling=pooling)
    weights, biases = networks(layout)
    other_weights, other_biases, _ = permuted(weights, biases, layout)
    assert relative(model(other_weights, other_biases), model(weights, biases)) <= 1e-5


@symmetry
@given(layout=layouts, seed=st.integers(0, 1000), reverse=st.booleans())
def test_updates_follow_the_order_of_hidden_neurons(layout, seed, reverse):
    torch.manual_seed(seed)
    model = NGGNN(layout, d_hid=16, fourier_features=32, reverse_edges=reverse, head="equivariant")
    weights, biases = networks(layout)
    other_weights, other_biases, orders = permuted(weights, biases, layout)
    delta_weights, delta_biases = model(weights, biases)
    moved_weights, moved_biases = model(other_weights, other_biases)
    for k, (w, b) in enumerate(zip(delta_weights, delta_biases, strict=True)):
        assert w.shape == weights[k].shape
        assert b.shape == biases[k].shape
        assert relative(moved_weights[k], w[:, orders[k]][:, :, orders[k + 1]]) <= 1e-5
        assert relative(moved_biases[k], b[:, orders[k + 1]]) <= 1e-5


def test_bias_updates_come_from_their_own_neurons(backend: str):
    """The reference reads them from the input neurons on: neurons of one layer then get another layer's update."""
    model = NGGNN([2, 4, 3], **SMALL, head="equivariant", positional=False).double()
    weights = [torch.zeros(1, 2, 4, 1, dtype=torch.float64), torch.zeros(1, 4, 3, 1, dtype=torch.float64)]
    biases = [torch.tensor([0.0, 0.0, 1.0, 0.0], dtype=torch.float64).view(1, 4, 1), torch.zeros(1, 3, 1, dtype=torch.float64)]
    with ngk.use_backend(backend):
        _, (found, _) = model(weights, biases)
    others = found[0, [0, 1, 3], 0]
    assert (others - others[0]).abs().max() < 1e-15
    assert (found[0, 2, 0] - others[0]).abs() > 1e-9


# ---- batches ----
@pytest.mark.parametrize("norm", ["layer", "graph", None])
@pytest.mark.parametrize("pooling", ["cat", "mean", "max", ("mean", 1), "cat_mean", ("max_edge", "all"), ("mean_edge", "last")])
def test_a_network_does_not_feel_its_batch_mates(backend: str, norm, pooling):
    model = NGGNN([2, 5, 4, 3], **SMALL, norm=norm, pooling=pooling)
    weights, biases = networks([2, 5, 4, 3], 3)
    with ngk.use_backend(backend):
        together = model(weights, biases)
        alone = torch.cat([model([w[k : k + 1] for w in weights], [b[k : k + 1] for b in biases]) for k in range(3)])
    assert relative(together, alone) <= 1e-6


def test_the_whole_batch_norm_does_feel_them(backend: str):
    model = NGGNN([2, 5, 4, 3], **SMALL, norm="batch_graph")
    weights, biases = networks([2, 5, 4, 3], 2)
    with ngk.use_backend(backend):
        together, alone = model(weights, biases), model([w[:1] for w in weights], [b[:1] for b in biases])
    assert relative(together[:1], alone) > 1e-5


@pytest.mark.parametrize("pooling", ["cat", "mean", "max", ("max", "last"), ("mean_edge", "all")])
@pytest.mark.parametrize("norm", ["layer", "graph"])
def test_unequal_networks_in_one_batch(backend: str, pooling, norm):
    model = NGGNN([2, 9, 9, 3], **SMALL, pooling=pooling, norm=norm, reverse_edges=True)
    layouts = [[2, 5, 3], [2, 6, 4, 3], [2, 5, 3]]
    inputs = [networks(layout, 1) for layout in layouts]
    graphs = [ngk.NeuralGraph.mlp(layout, reverse=True) for layout in layouts]
    weights, biases = [w for ws, _ in inputs for w in ws], [b for _, bs in inputs for b in bs]
    with ngk.use_backend(backend):
        together = model.forward_graph(ngk.NeuralGraph.batch(graphs), weights, biases)
        alone = torch.cat([model.forward_graph(g, *i) for g, i in zip(graphs, inputs, strict=True)])
        assert relative(together, alone) <= 1e-6
        unpacked, packed = ngk.NeuralGraph.batch(graphs), ngk.NeuralGraph.batch(graphs, packed=True)
        values = torch.cat([torch.cat([torch.zeros(2, 1), *(b[0] for b in bs)]) for _, bs in inputs])
        assert relative(model.forward_graph(packed, unpacked.pack(weights), values), alone) <= 1e-6


def test_equivariant_head_on_unequal_networks(backend: str):
    model = NGGNN([2, 9, 9, 3], **SMALL, head="equivariant")
    layouts = [[2, 5, 3], [2, 6, 4, 3]]
    inputs = [networks(layout, 1) for layout in layouts]
    graphs = [ngk.NeuralGraph.mlp(layout) for layout in layouts]
    weights, biases = [w for ws, _ in inputs for w in ws], [b for _, bs in inputs for b in bs]
    with ngk.use_backend(backend):
        together = flat(model.forward_graph(ngk.NeuralGraph.batch(graphs), weights, biases))
        alone = [model.forward_graph(g, *i) for g, i in zip(graphs, inputs, strict=True)]
        assert all(relative(t, a) <= 1e-6 for t, a in zip(together, [*alone[0][0], *alone[1][0], *alone[0][1], *alone[1][1]], strict=True))
        values = torch.cat([torch.cat([torch.zeros(2, 1), *(b[0] for b in bs)]) for _, bs in inputs])
        _, rows = model.forward_graph(ngk.NeuralGraph.batch(graphs), weights, values)
    assert torch.equal(rows[2:10, 0], torch.cat([b.flatten() for b in alone[0][1]])) or rows.shape == values.shape


# ---- memory ----
def saved_tensors(model, weights, biases) -> list[torch.Tensor]:
    saved: dict[int, torch.Tensor] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        saved.setdefault(t.untyped_storage().data_ptr(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = model(weights, biases)
    sum(t.sum() for t in flat(out)).backward()
    return list(saved.values())


@pytest.mark.parametrize("policy", ["recompute", "hybrid"])
@pytest.mark.parametrize("head", ["classification", "equivariant"])
def test_nothing_with_a_row_for_each_edge_is_kept(backend: str, policy: str, head: str):
    layout = [4, 192, 192, 4]
    model = NGGNN(layout, edge_memory=policy, head=head)
    weights, biases = networks(layout, 1)
    edges = sum(w.numel() for w in weights)
    weights = [w.requires_grad_() for w in weights]
    with ngk.use_backend(backend):
        kept = saved_tensors(model, weights, biases)
    assert max(t.untyped_storage().nbytes() for t in kept) < 4 * edges * 8, "32 numbers for each edge would be four times as much"


def test_bytes_kept_for_each_neuron(backend: str):
    """At most 3 kB at d_hid 32 with 4 layers, weights left out; plain PyTorch keeps more than 10 kB."""
    sizes = {}
    for width in (64, 192):
        model = NGGNN([2, width, 2, width, 3])
        weights, biases = networks([2, width, 2, width, 3], 1)
        inputs = {t.untyped_storage().data_ptr() for t in (*weights, *model.parameters())}
        with ngk.use_backend(backend):
            kept = saved_tensors(model, weights, biases)
        sizes[width] = sum(t.untyped_storage().nbytes() for t in kept if t.untyped_storage().data_ptr() not in inputs)
    assert (sizes[192] - sizes[64]) / (2 * (192 - 64)) <= 3072


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
    model = NGGNN([2, 16, 3], **SMALL)
    weights, biases = networks([2, 16, 3], 2)
    with ngk.use_backend(backend):
        wanted = model(weights, biases)
        assert relative(model([w.bfloat16() for w in weights], [b.bfloat16() for b in biases]), wanted) < 0.3
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(weights, biases)
        logits.float().sum().backward()
    assert relative(logits.float(), wanted) < 0.1


def test_compiles_in_one_piece():
    torch._dynamo.reset()
    model = NGGNN([2, 5, 3], **SMALL)
    weights, biases = networks([2, 5, 3], 2)
    with ngk.use_backend("reference"):
        model.graph(2)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert relative(compiled(weights, biases), model(weights, biases)) < 1e-5


# ---- errors ----
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
        ({"edge_memory": "some"}, ValueError, r"edge_memory: expected recompute, store, hybrid, every:k .* got 'some'"),
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

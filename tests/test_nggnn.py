"""NG-GNN as a model: gradients, symmetries, batches, memory."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import check_unequal, flat, networks, permuted, relative, saved_tensors

import ngkernels as ngk
from neural_graphs.models import NGGNN, NGT

POLICIES = ("recompute", "hybrid", "store", "every:2", 3)
SMALL = {"d_hid": 8, "num_layers": 3, "fourier_features": 16}


def gradients(model, weights, biases) -> list[torch.Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (*weights, *biases)]
    out = flat(model(leaves[: len(weights)], leaves[len(weights) :]))
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.autograd.grad(sum(t.sin().sum() for t in out), [*leaves, *parameters])


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
    assert {
        "construct_graph.proj_weight.0.b",
        "gnn.convs.0.edge_encoder.weight",
        "gnn.edge_update.1.lin_e.bias",
        "proj_out.4.bias",
    } <= names
    assert not first.construct_graph.proj_weight[0].b.requires_grad


# ---- symmetries ----
layouts = st.lists(st.integers(1, 6), min_size=1, max_size=3).map(lambda hidden: [2, *hidden, 3])
symmetry = settings(max_examples=8, deadline=None, derandomize=True)


@symmetry
@given(
    layout=layouts, seed=st.integers(0, 1000), reverse=st.booleans(), pooling=st.sampled_from(["cat", "mean", "max", ("mean_edge", "all")])
)
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
        # an untrained head's update can be 0 but for rounding: then a tenth of its scale, 0.01, is the measure
        assert relative(moved_weights[k], w[:, orders[k]][:, :, orders[k + 1]], 1e-3) <= 1e-5
        assert relative(moved_biases[k], b[:, orders[k + 1]], 1e-3) <= 1e-5


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
    with ngk.use_backend(backend):
        check_unequal(model, reverse=True)


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
    delta = [[b.flatten() for b in bs] for _, bs in alone]
    wanted = torch.cat([torch.zeros(2), *delta[0], torch.zeros(2), *delta[1]])[:, None]
    assert relative(rows, wanted) <= 1e-6


# ---- memory ----
@pytest.mark.parametrize("policy", ["recompute", "hybrid"])
@pytest.mark.parametrize("head", ["classification", "equivariant"])
def test_nothing_with_a_row_for_each_edge_is_kept(backend: str, policy: str, head: str):
    layout = [4, 192, 192, 4]
    model = NGGNN(layout, edge_memory=policy, head=head)
    weights, biases = networks(layout, 1, scale=0.05)  # the encoder's table grows with the largest weight, not with their number
    edges = sum(w.numel() for w in weights)
    weights = [w.requires_grad_() for w in weights]
    with ngk.use_backend(backend):
        kept = saved_tensors(model, weights, biases)
    assert max(t.untyped_storage().nbytes() for t in kept) < 4 * edges * 8, "32 numbers for each edge would be four times as much"


def test_bytes_kept_for_each_neuron(backend: str):
    """At most 3 kB at d_hid 32 with 4 layers, weights left out; plain PyTorch keeps more than 10 kB."""
    sizes = {}
    for width in (512, 1536):
        model = NGGNN([2, width, 2, width, 3])
        weights, biases = networks([2, width, 2, width, 3], 1, scale=0.05)
        inputs = {t.untyped_storage().data_ptr() for t in (*weights, *model.parameters())}
        with ngk.use_backend(backend):
            kept = saved_tensors(model, weights, biases)
        sizes[width] = sum(t.untyped_storage().nbytes() for t in kept if t.untyped_storage().data_ptr() not in inputs)
    assert (sizes[1536] - sizes[512]) / (2 * (1536 - 512)) <= 3072


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (NGGNN, {}), (NGGNN, {"norm": "graph"}), (NGGNN, {"pooling": ("mean", "all")}), (NGGNN, {"head": "equivariant"}), (NGT, {}),
        (NGT, {"attention": "edges"}), (NGT, {"pooling": ("mean", "last")}),
    ],
    ids=str,
)  # fmt: skip
def test_a_training_step_after_a_look_in_inference_mode(make, options: dict, backend: str):
    """What a graph keeps must not be inference tensors, which autograd refuses."""
    layout = [2, 4, 5, 3]
    model = make(layout, **options)
    weights = [torch.randn(2, a, b, 1) for a, b in zip(layout, layout[1:])]
    biases = [torch.randn(2, b, 1) for b in layout[1:]]
    with ngk.use_backend(backend):
        with torch.inference_mode():
            model(weights, biases)
        tensors = torch.utils._pytree.tree_leaves(model(weights, biases))
        sum(t.sum() for t in tensors).backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())

"""EdgeState: an immutable expression over tensors of any strides; it computes nothing until a consumer asks."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from compare import assert_bitwise, assert_close
from layouts import LAYOUTS, NETWORK, guarded, shifted
from oracle import mlp
from sample_list import PLAIN, REVERSED
from samples import cast, coefficients, edge_state, engine, leaves, message_of, run, run_engine

import ngkernels as ngk
from ngkernels import encoders

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- any strides ----
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "changes",
    [{}, {"networks": REVERSED, "reciprocal": True}, {"memory": ("virtual", None)}, {"encoder": "fourier", "table": "auto"}, {"networks": (NETWORK,)}],
    ids=["plain", "reversed", "virtual", "table", "diagonal"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_weights_are_read_in_place(layout, changes: dict, dtype: torch.dtype, backend: str):
    sample = PLAIN.but("strided", channels=1 if "table" in changes else 3, **changes)
    t = cast(leaves(sample), torch.float32, dtype)
    wanted = run_engine(sample, t, backend)
    strided = {name: layout(v) if name.startswith("weights.") else v for name, v in t.items()}
    assert not strided["weights.1"].is_contiguous() or layout in (shifted, guarded)
    with ngk.use_backend(backend):
        live = {name: v.detach().requires_grad_() for name, v in strided.items()}
        assert all(live[n].data_ptr() == strided[n].data_ptr() for n in live)
        found = run_in_place(sample, live)
    assert_bitwise(found, wanted)


def run_in_place(sample, live):
    """samples.run on these very tensors: a clone would lose their strides."""
    outputs = engine(sample, live)
    loss = sum((o * c).sum() for o, c in zip(outputs, coefficients(outputs), strict=True))
    grads = torch.autograd.grad(loss, list(live.values()), allow_unused=True)
    result = {f"out.{k}": o.detach() for k, o in enumerate(outputs)}
    return {**result, **{f"grad.{n}": torch.zeros_like(v) if g is None else g for (n, v), g in zip(live.items(), grads, strict=True)}}


def test_expanded_weights(backend: str):
    """One network, seen as three copies: stride 0 in the batch; the gradient of the one adds up."""
    many = PLAIN.but("many", networks=(mlp(2, 5, 3, copies=3),))
    t = leaves(many)
    for k in range(2):
        t[f"weights.{k}"] = t[f"weights.{k}"][:1]
    with ngk.use_backend(backend):
        found, wanted = (
            run(lambda live, view=view: engine(many, {n: view(v) if n.startswith("weights.") else v for n, v in live.items()}), t)
            for view in (lambda v: v.expand(3, -1, -1, -1), lambda v: torch.cat([v] * 3))
        )
    assert_close(found, wanted, 1e-13)


def test_expanded_leaf_weights(backend: str):
    """A leaf with stride 0 gets a gradient of its full shape."""
    sample = PLAIN.but("many", networks=(mlp(2, 5, 3, copies=3),))
    t = leaves(sample)
    for k in range(2):
        t[f"weights.{k}"] = t[f"weights.{k}"][:1].expand(3, -1, -1, -1)
    with ngk.use_backend(backend):
        found = run_in_place(sample, {n: v.detach().requires_grad_() for n, v in t.items()})
    assert_bitwise(found, run_engine(sample, t, backend))


def test_node_states_and_matrices_of_any_strides(backend: str):
    t = cast(leaves(PLAIN), torch.float32)
    wanted = run_engine(PLAIN, t, backend)
    strided = {n: v.T.contiguous().T if v.dim() == 2 else v for n, v in t.items()}
    strided["x"] = torch.stack([t["x"], torch.full_like(t["x"], torch.nan)], 1)[:, 0]
    strided["x0"] = torch.stack([t["x0"], torch.full_like(t["x0"], torch.nan)], 2)[..., 0]
    assert not any(strided[n].is_contiguous() for n in ("x", "x0", "message.edge.weight"))
    with ngk.use_backend(backend):
        found = run_in_place(PLAIN, {n: v.detach().requires_grad_() for n, v in strided.items()})
    assert_close(found, wanted, 1e-6)


def test_a_matrix_is_one_network_with_one_channel(backend: str):
    """2-D weights (n_src, n_dst), as the transposed weight of a Linear layer."""
    modules = [torch.nn.Linear(2, 5), torch.nn.Linear(5, 3)]
    graph, encoder = ngk.NeuralGraph.mlp([2, 5, 3]), encoders.Linear(torch.randn(4, 1), torch.randn(4))
    x = torch.randn(10, 6)
    message = ngk.Message.film(x, torch.randn(6, 4), torch.randn(6), torch.randn(3, 6), torch.randn(3, 6))
    views = [m.weight.T for m in modules]
    with ngk.use_backend(backend):
        found = ngk.aggregate(ngk.EdgeState(graph, views, encoder), message, ("mean", "std"))
        wanted = ngk.aggregate(
            ngk.EdgeState(graph, [w.detach().contiguous()[None, :, :, None] for w in views], encoder), message, ("mean", "std")
        )
        found.sum().backward()
    assert torch.equal(found, wanted)
    assert all(m.weight.grad is not None and m.weight.grad.shape == m.weight.shape for m in modules)


# ---- the description ----
def test_states_are_immutable_and_computed_later():
    e = edge_state(PLAIN, leaves(PLAIN))
    with pytest.raises(dataclasses.FrozenInstanceError):
        e.width = 3
    assert len(e.steps) == len(PLAIN.residual) and e.width == PLAIN.width
    assert len(e.restrict(-1).steps) == len(e.steps) and e.graph.rows is None
    assert e.then("relu", torch.zeros(9, PLAIN.width)).width == 9


def test_weights_are_not_copied():
    t = leaves(PLAIN)
    e = edge_state(PLAIN, t)
    assert [w.data_ptr() for w in e.weights] == [t["weights.0"].data_ptr(), t["weights.1"].data_ptr()]


def test_statistics_scale_and_shift_each_tensor(backend: str):
    """(scale w + shift) by the engine equals weights prepared by hand, and the gradient carries the scale."""
    sample = PLAIN.but("affine", affine=True)
    t, (scale, shift) = leaves(sample), sample.scales
    prepared = {**t, **{f"weights.{k}": t[f"weights.{k}"] * scale[k] + shift[k] for k in range(2)}}
    wanted = run_engine(PLAIN, prepared, backend)
    for k in range(2):
        wanted[f"grad.weights.{k}"] *= scale[k]
    assert_close(run_engine(sample, t, backend), wanted, 1e-12)


@pytest.mark.parametrize("packed", [False, True])
def test_one_pair_of_statistics_for_packed_weights(packed: bool, backend: str):
    graph = ngk.NeuralGraph.batch([ngk.NeuralGraph.mlp([2, 3])] * 2, packed=packed)
    weights = [torch.randn(1, 2, 3, 1) for _ in range(2)]
    affine = ((2.0,), (1.0,)) if packed else ((2.0, 2.0), (1.0, 1.0))
    with ngk.use_backend(backend):
        e = ngk.EdgeState(graph, graph.pack([torch.cat(weights)]) if packed else weights, encoders.Identity(), affine)
        values = torch.cat([v.flatten() for v in ngk.readout(e, [(torch.eye(1), None)])])
    torch.testing.assert_close(values, 2 * torch.cat([w.flatten() for w in weights]) + 1)


def test_reciprocal_features_are_own_reverse_and_sum(backend: str):
    graph = ngk.NeuralGraph.mlp([2, 3], reverse=True)
    w = torch.randn(1, 2, 3, 1)
    with ngk.use_backend(backend):
        forward, backward = ngk.readout(ngk.EdgeState(graph, [w], encoders.Identity(reciprocal=True)), [(torch.eye(3), None)])
    none = torch.zeros_like(w)
    assert torch.equal(forward, torch.cat([w, none, w], -1))
    assert torch.equal(backward, torch.cat([none, w, w], -1).transpose(1, 2))


def test_frequencies_changed_in_place_are_noticed():
    """As when a state dict is loaded: the table's basis, which is kept from call to call, is made anew."""
    sample = PLAIN.but("loaded", reduce=(), encoder="fourier", table="auto")
    t = cast(leaves(sample), torch.float32)
    frequencies = torch.randn(sample.frequencies, 1)
    graph = edge_state(sample, t).graph

    def read(table: str) -> torch.Tensor:
        encoder = encoders.Fourier(frequencies, t["encoder.weight"], t["encoder.bias"], table=table, step=8, table_range=2.0)
        state = ngk.EdgeState(graph, [t["weights.0"], t["weights.1"]], encoder)
        return ngk.readout(state, [(torch.eye(sample.width), None)])[0]

    for _ in range(3):
        torch.testing.assert_close(read("auto"), read("never"), rtol=1e-5, atol=1e-5)
        frequencies.copy_(torch.randn(sample.frequencies, 1))


@pytest.mark.parametrize(
    "encoder", [{"encoder": "linear"}, {"encoder": "fourier"}, {"encoder": "fourier", "table": "auto"}], ids=["linear", "fourier", "table"]
)
def test_a_state_may_be_used_again(encoder: dict, backend: str):
    """In two backward passes, first without gradients, after a parameter has changed: nothing of a call is left behind in it."""
    sample = PLAIN.but("again", head=0, **encoder)
    t = {name: v.requires_grad_() for name, v in cast(leaves(sample), torch.float32).items()}
    wanted = run_engine(sample, {n: v.detach() for n, v in t.items()}, backend)
    with ngk.use_backend(backend):
        e, message = edge_state(sample, t), message_of(sample, t)
        with torch.no_grad():
            ngk.aggregate(e, message, sample.reduce)
        for _ in range(2):
            out = ngk.aggregate(e, message, sample.reduce)
            grads = torch.autograd.grad((out * coefficients([out])[0]).sum(), list(t.values()))
            assert_close({f"grad.{n}": g for n, g in zip(t, grads, strict=True)}, {n: g for n, g in wanted.items() if n != "out.0"}, 1e-6)
        with torch.no_grad():
            t["encoder.weight"].mul_(2)
            found = ngk.aggregate(e, message, sample.reduce)
    wanted = run_engine(sample, {n: v.detach() for n, v in t.items()}, backend, set())
    assert_close({"out.0": found}, wanted, 1e-6)

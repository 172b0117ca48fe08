"""Every check of the edge states, messages and ops: the documented type, and a text with the rule, the value and what to do."""

from __future__ import annotations

import pytest
import torch
from conftest import DECLARED

import ngkernels as ngk
from ngkernels import encoders

pytestmark = pytest.mark.usefixtures("one_thread")
N, D, H, F, X = 10, 5, 7, 4, 6  # nodes, widths of the state, the update, the message, the node states
GRAPH = ngk.NeuralGraph.mlp([2, 5, 3])


def zeros(*shape: int, **options) -> torch.Tensor:
    return torch.zeros(*shape, **options)


def weights(**options) -> list[torch.Tensor]:
    return [zeros(1, 2, 5, 1, **options), zeros(1, 5, 3, 1, **options)]


def state(w=None, encoder=None, affine=None) -> ngk.EdgeState:
    return ngk.EdgeState(GRAPH, weights() if w is None else w, encoder or encoders.Linear(zeros(D, 1), zeros(D)), affine)


def update(**changed) -> ngk.EdgeState:
    arguments = {
        "x": zeros(N, X), "weight_edge": zeros(H, D), "weight_dst": zeros(H, X), "weight_src": zeros(H, X), "bias": zeros(H),
        "weight_out": zeros(D, H), "bias_out": zeros(D),
    }  # fmt: skip
    return state().update(**{**arguments, **changed})


def aggregate(kind: str = "film", reduce=("sum",), over: str = "edges", **changed) -> torch.Tensor:
    rows = 2 * F if kind == "film" else F
    arguments = {
        "x": zeros(N, X),
        "weight_edge": zeros(rows, D),
        "bias_edge": zeros(rows),
        "weight_dst": zeros(F, X),
        "weight_src": zeros(F, X),
        "bias": zeros(F),
    }
    return ngk.aggregate(state(), getattr(ngk.Message, kind)(**{**arguments, **changed}), reduce, over)


def readout(mlp=None, **changed) -> list[torch.Tensor]:
    arguments = {"x": zeros(N, X), "weight_dst": zeros(H, X), "weight_src": zeros(H, X)}
    return ngk.readout(state(), [(zeros(H, D), zeros(H)), (zeros(2, H), None)] if mlp is None else mlp, **{**arguments, **changed})


def shape(*sizes) -> str:
    return r"\(" + ", ".join(str(s) for s in sizes) + (r",?\)" if len(sizes) == 1 else r"\)")


VALUES = {
    # EdgeState
    "weights-missing": (lambda: state(weights()[:1]), r"EdgeState: expected 2 weight tensors \(one for each forward block\), got 1"),
    "weights-too-many": (lambda: state(weights() * 2), "EdgeState: expected 2 weight tensors .*, got 4"),
    "weights-shape": (lambda: state([zeros(1, 5, 2, 1), zeros(1, 5, 3, 1)]), rf"EdgeState: expected weights\[0\] of shape {shape(1, 2, 5, 1)} \(copies, n_src, n_dst, channels\), got {shape(1, 5, 2, 1)}"),
    "weights-transposed-matrix": (lambda: state([zeros(5, 2), zeros(3, 5)]), rf"EdgeState: expected weights\[0\] of shape {shape(1, 2, 5, 1)}.* got {shape(1, 5, 2, 1)}"),
    "weights-copies": (lambda: state([zeros(2, 2, 5, 1), zeros(1, 5, 3, 1)]), rf"EdgeState: expected weights\[0\] of shape {shape(1, 2, 5, 1)}.* got {shape(2, 2, 5, 1)}"),
    "weights-rank-1": (lambda: state([zeros(10), zeros(15)]), rf"EdgeState: expected weights\[0\] of shape .*got {shape(10)}"),
    "weights-rank-0": (lambda: state([zeros(()), zeros(())]), r"EdgeState: expected weights\[0\] of shape .*got \(\)"),
    "weights-mixed-channels": (lambda: state([zeros(1, 2, 5, 1), zeros(1, 5, 3, 2)]), rf"EdgeState: expected weights\[1\] of shape {shape(1, 5, 3, 1)}.* got {shape(1, 5, 3, 2)}"),
    "weights-no-channels": (lambda: state([zeros(1, 2, 5, 0), zeros(1, 5, 3, 0)], encoders.Linear(zeros(D, 0), zeros(D))), "EdgeState: expected weights with at least one channel, got 0"),
    "no-blocks": (lambda: ngk.EdgeState(ngk.NeuralGraph.from_blocks([2, 3], []), [], encoders.Identity()), "EdgeState: expected a graph with at least one block, got none"),
    "affine-length": (lambda: state(affine=((1.0,), (0.0,))), "EdgeState: expected 2 affine scale values, got 1"),
    "affine-shift": (lambda: state(affine=((1.0, 1.0), (0.0,))), "EdgeState: expected 2 affine shift values, got 1"),
    "affine-pair": (lambda: state(affine=((1.0, 1.0),)), r"EdgeState: expected affine to be \(scale, shift\), got 1 entries"),
    "linear-weight": (lambda: state(encoder=encoders.Linear(zeros(D, 2), zeros(D))), rf"EdgeState: expected encoder.weight of shape \(\*, 1\), got {shape(D, 2)}"),
    "linear-reciprocal": (lambda: state(encoder=encoders.Linear(zeros(D, 1), zeros(D), reciprocal=True)), rf"EdgeState: expected encoder.weight of shape \(\*, 3\), got {shape(D, 1)}"),
    "linear-bias": (lambda: state(encoder=encoders.Linear(zeros(D, 1), zeros(1))), rf"EdgeState: expected encoder.bias of shape {shape(D)}, got {shape(1)}"),
    "fourier-frequencies": (lambda: state(encoder=encoders.Fourier(zeros(3, 2), zeros(D, 6), zeros(D))), rf"EdgeState: expected encoder.frequencies of shape \(\*, 1\), got {shape(3, 2)}"),
    "fourier-weight": (lambda: state(encoder=encoders.Fourier(zeros(3, 1), zeros(D, 3), zeros(D))), rf"EdgeState: expected encoder.weight of shape \(\*, 6\), got {shape(D, 3)}"),
    "fourier-bias": (lambda: state(encoder=encoders.Fourier(zeros(3, 1), zeros(D, 6), zeros(D + 1))), rf"EdgeState: expected encoder.bias of shape {shape(D)}, got {shape(D + 1)}"),
    "fourier-table": (lambda: state(encoder=encoders.Fourier(zeros(3, 1), zeros(D, 6), zeros(D), table="on")), "EdgeState: expected encoder.table to be auto or never, got 'on'"),
    # then, update
    "then-activation": (lambda: state().then("swish", zeros(D, D)), "EdgeState.then: expected activation in silu, relu, gelu, tanh, sigmoid, leaky_relu, identity, got 'swish'"),
    "then-weight": (lambda: state().then("silu", zeros(D, D + 1)), rf"EdgeState.then: expected weight of shape \(\*, {D}\), got {shape(D, D + 1)}"),
    "then-bias": (lambda: state().then("silu", zeros(3, D), zeros(D)), rf"EdgeState.then: expected bias of shape {shape(3)}, got {shape(D)}"),
    "update-activation": (lambda: update(activation="elu"), "EdgeState.update: expected activation in .*, got 'elu'"),
    "update-x-rows": (lambda: update(x=zeros(N - 1, X)), rf"EdgeState.update: expected x of shape \({N}, d\) \(the graph's nodes\), got {shape(N - 1, X)}"),
    "update-x-rank": (lambda: update(x=zeros(N)), rf"EdgeState.update: expected x of shape \({N}, d\).*, got {shape(N)}"),
    "update-weight-edge": (lambda: update(weight_edge=zeros(H, D + 1)), rf"EdgeState.update: expected weight_edge of shape \(\*, {D}\), got {shape(H, D + 1)}"),
    "update-weight-edge-rank": (lambda: update(weight_edge=zeros(D)), rf"EdgeState.update: expected weight_edge of shape \(\*, {D}\), got {shape(D)}"),
    "update-weight-dst": (lambda: update(weight_dst=zeros(X, H)), rf"EdgeState.update: expected weight_dst of shape {shape(H, X)}, got {shape(X, H)}"),
    "update-weight-src": (lambda: update(weight_src=zeros(H, X + 1)), rf"EdgeState.update: expected weight_src of shape {shape(H, X)}, got {shape(H, X + 1)}"),
    "update-bias": (lambda: update(bias=zeros(1)), rf"EdgeState.update: expected bias of shape {shape(H)}, got {shape(1)}"),
    "update-weight-out": (lambda: update(weight_out=zeros(D, D)), rf"EdgeState.update: expected weight_out of shape \(\*, {H}\), got {shape(D, D)}"),
    "update-bias-out": (lambda: update(bias_out=zeros(1)), rf"EdgeState.update: expected bias_out of shape {shape(D)}, got {shape(1)}"),
    "update-residual": (lambda: update(weight_out=zeros(3, H), bias_out=zeros(3), residual=True), rf"EdgeState.update: expected weight_out with {D} rows \(residual\), got 3"),
    # aggregate
    "reduce-none": (lambda: aggregate(reduce=()), r"aggregate: expected reduce to be different names of sum, mean, min, max, std, var, got \(\)"),
    "reduce-unknown": (lambda: aggregate(reduce=("sum", "median")), "aggregate: expected reduce to be different names of .*, got .*'median'"),
    "over-unknown": (lambda: aggregate(over="all"), "aggregate: expected over to be edges, or pairs of a closed state .*, got 'all'"),
    "over-pairs-of-an-open-state": (lambda: aggregate(over="pairs"), "aggregate: expected over to be edges, or pairs of a closed state .*, got 'pairs' of NeuralGraph"),
    "reduce-twice": (lambda: aggregate(reduce=("sum", "sum")), r"aggregate: expected reduce to be different names of .*, got \('sum', 'sum'\)"),
    "message-kind": (lambda: ngk.aggregate(state(), ngk.Message("attend", zeros(F, D), None, ngk.NodeTerm(zeros(N, X), zeros(F, X), zeros(F, X)))), "aggregate: expected a message of kind film, gate, product, concat, got 'attend'"),
    "message-activation": (lambda: aggregate(activation="elu"), "aggregate: expected activation in .*, got 'elu'"),
    "message-weight-edge": (lambda: aggregate(weight_edge=zeros(2 * F, D - 1)), rf"aggregate: expected weight_edge of shape \(\*, {D}\), got {shape(2 * F, D - 1)}"),
    "message-film-rows": (lambda: aggregate(weight_edge=zeros(F, D), bias_edge=None), f"aggregate: expected weight_edge with {2 * F} rows for a film message, got {F}"),
    "message-gate-rows": (lambda: aggregate("gate", weight_edge=zeros(2 * F, D), bias_edge=None), f"aggregate: expected weight_edge with {F} rows for a gate message, got {2 * F}"),
    "message-concat-rows": (lambda: aggregate("concat", mlp=[(zeros(3, F), None)], weight_edge=zeros(3, D), bias_edge=None), f"aggregate: expected weight_edge with {F} rows for a concat message, got 3"),
    "message-bias-edge": (lambda: aggregate(bias_edge=zeros(1)), rf"aggregate: expected bias_edge of shape {shape(2 * F)}, got {shape(1)}"),
    "message-x": (lambda: aggregate(x=zeros(N + 1, X)), rf"aggregate: expected x of shape \({N}, d\).*, got {shape(N + 1, X)}"),
    "message-weight-dst": (lambda: aggregate(weight_dst=zeros(F, X + 1)), rf"aggregate: expected weight_dst of shape {shape(F, X)}, got {shape(F, X + 1)}"),
    "message-weight-src": (lambda: aggregate(weight_src=zeros(F + 1, X)), rf"aggregate: expected weight_src of shape {shape(F, X)}, got {shape(F + 1, X)}"),
    "message-bias": (lambda: aggregate(bias=zeros(F + 1)), rf"aggregate: expected bias of shape {shape(F)}, got {shape(F + 1)}"),
    "message-mlp-weight": (lambda: aggregate(mlp=[(zeros(F, F + 1), None)]), rf"aggregate: expected mlp\[0\] weight of shape \(\*, {F}\), got {shape(F, F + 1)}"),
    "message-mlp-bias": (lambda: aggregate(mlp=[(zeros(F, F), None), (zeros(F, F), zeros(1))]), rf"aggregate: expected mlp\[1\] bias of shape {shape(F)}, got {shape(1)}"),
    # readout
    "readout-empty": (lambda: readout(mlp=[]), r"readout: expected mlp of at least one \(weight, bias\), got none"),
    "readout-activation": (lambda: readout(activation="elu"), "readout: expected activation in .*, got 'elu'"),
    "readout-first": (lambda: readout(mlp=[(zeros(H, D + 1), None)]), rf"readout: expected mlp\[0\] weight of shape \(\*, {D}\), got {shape(H, D + 1)}"),
    "readout-second": (lambda: readout(mlp=[(zeros(H, D), None), (zeros(2, D), None)]), rf"readout: expected mlp\[1\] weight of shape \(\*, {H}\), got {shape(2, D)}"),
    "readout-bias": (lambda: readout(mlp=[(zeros(H, D), zeros(1))]), rf"readout: expected mlp\[0\] bias of shape {shape(H)}, got {shape(1)}"),
    "readout-x": (lambda: readout(x=zeros(N, X, 1)), rf"readout: expected x of shape \({N}, d\).*, got {shape(N, X, 1)}"),
    "readout-weight-dst": (lambda: readout(weight_dst=zeros(2, X)), rf"readout: expected weight_dst of shape {shape(H, X)}, got {shape(2, X)}"),
    "readout-weight-src": (lambda: readout(weight_src=zeros(H, 1)), rf"readout: expected weight_src of shape {shape(H, X)}, got {shape(H, 1)}"),
    "readout-x-alone": (lambda: readout(weight_src=None), "readout: expected x, weight_dst and weight_src together or none of them, got 2 of 3"),
    "readout-without-x": (lambda: readout(x=None), "readout: expected x, weight_dst and weight_src together or none of them, got 2 of 3"),
}  # fmt: skip


def integers(t: torch.Tensor) -> torch.Tensor:
    return t.to(torch.int64)


TYPES = {
    "weights-integer": (lambda: state([integers(w) for w in weights()]), r"EdgeState: expected weights\[0\] .*floating dtype, got torch.int64"),
    "weights-complex": (lambda: state([w.to(torch.complex64) for w in weights()]), r"EdgeState: expected weights\[0\] .*floating dtype, got torch.complex64"),
    "weights-list": (lambda: state([[0.0], [0.0]]), r"EdgeState: expected weights\[0\] to be a tensor, got list"),
    "weights-mixed": (lambda: state([weights()[0], weights(dtype=torch.float64)[1]]), "EdgeState: expected weights all float64 or none, got torch.float32 and torch.float64"),
    "weights-devices": (lambda: state([weights()[0], weights(device="meta")[1]]), r"EdgeState: expected weights\[1\] on cpu, got meta"),
    "encoder-kind": (lambda: state(encoder="linear"), "EdgeState: expected encoder Linear, Fourier or Identity .*, got str"),
    "encoder-device": (lambda: state(encoder=encoders.Linear(zeros(D, 1, device="meta"), zeros(D))), "EdgeState: expected encoder.weight on cpu, got meta"),
    "encoder-integer": (lambda: state(encoder=encoders.Linear(integers(zeros(D, 1)), zeros(D))), "EdgeState: expected encoder.weight .*floating dtype, got torch.int64"),
    "then-none": (lambda: state().then("silu", None), "EdgeState.then: expected weight .*tensor.*, got NoneType"),
    "update-x": (lambda: update(x=integers(zeros(N, X))), "EdgeState.update: expected x .*floating dtype, got torch.int64"),
    "update-bias": (lambda: update(bias=[0.0] * H), "EdgeState.update: expected bias .*tensor.*, got list"),
    "update-device": (lambda: update(x=zeros(N, X, device="meta")), "EdgeState.update: expected x on cpu, got meta; move it with"),
    "update-matrix-device": (lambda: update(weight_out=zeros(D, H, device="meta")), "EdgeState.update: expected weight_out on cpu, got meta"),
    "aggregate-device": (lambda: aggregate(weight_edge=zeros(2 * F, D, device="meta")), "aggregate: expected weight_edge on cpu, got meta"),
    "aggregate-integer": (lambda: aggregate(weight_src=integers(zeros(F, X))), "aggregate: expected weight_src .*floating dtype, got torch.int64"),
    "readout-device": (lambda: readout(x=zeros(N, X, device="meta")), "readout: expected x on cpu, got meta"),
    "readout-dtype": (lambda: readout(dtype=torch.int64), "readout: expected dtype float32, bfloat16, float16 or float64, got torch.int64"),
}  # fmt: skip

MISSING = {
    "sparse-coo": (lambda: state([zeros(2, 5).to_sparse(), zeros(5, 3)]), r"EdgeState: expected weights\[0\] to be a strided tensor, got torch.sparse_coo; .*to_dense"),
    "sparse-csr": (lambda: state([zeros(2, 5).to_sparse_csr(), zeros(5, 3)]), r"EdgeState: expected weights\[0\] to be a strided tensor, got torch.sparse_csr; .*to_dense"),
    "trainable-frequencies": (lambda: state(encoder=encoders.Fourier(zeros(3, 1, requires_grad=True), zeros(D, 6), zeros(D))), "EdgeState: gradients of encoder.frequencies are not available .*; detach them"),
}  # fmt: skip


def test_the_arguments_are_right_before_they_are_broken(backend: str):
    with ngk.use_backend(backend):
        assert update().width == D and aggregate().shape == (N, 1, F) and aggregate("gate").shape == (N, 1, F)
        assert [tuple(o.shape) for o in readout()] == [(1, 2, 5, 2), (1, 5, 3, 2)]


@pytest.mark.parametrize(("call", "text"), VALUES.values(), ids=VALUES.keys())
def test_shapes_and_options_raise_value_errors(call, text: str, backend: str):
    with ngk.use_backend(backend), pytest.raises(ValueError, match=text):
        call()


@pytest.mark.parametrize(("call", "text"), TYPES.values(), ids=TYPES.keys())
def test_dtypes_devices_and_kinds_raise_type_errors(call, text: str, backend: str):
    with ngk.use_backend(backend), pytest.raises(TypeError, match=text):
        call()


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize(("call", "text"), MISSING.values(), ids=MISSING.keys())
def test_what_is_not_built_says_so(call, text: str, backend: str):
    with ngk.use_backend(backend), pytest.raises(NotImplementedError, match=text):
        call()


@pytest.mark.skipif("cpp" not in DECLARED, reason="needs the cpp backend")
def test_memory_that_is_not_there_is_named():
    """26 TB: the kernels' own allocations fail as PyTorch's do, and say so."""
    graph, w = ngk.NeuralGraph.mlp([40_000, 40_000]), zeros(1, 1, 1, 1).expand(1, 40_000, 40_000, 1)
    e = ngk.EdgeState(graph, [w], encoders.Linear(zeros(4, 1), zeros(4)))
    with ngk.use_backend("cpp"), pytest.raises(RuntimeError, match=r"ngkernels: not enough memory for a tensor of 6553600000000 numbers of 4 bytes; the planner"):
        ngk.readout(e, [(zeros(4096, 4), None)])

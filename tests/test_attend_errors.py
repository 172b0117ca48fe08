"""Every check of attention, pair updates, tokens and closed graphs, in the style of test_errors.py."""

from __future__ import annotations

import pytest
import torch
from test_errors import GRAPH, D, H, N, integers, shape, state, weights, zeros
from test_errors import update as plain_update

import ngkernels as ngk
from ngkernels import encoders

pytestmark = pytest.mark.usefixtures("one_thread")
TWICE = ngk.NeuralGraph.from_blocks((2, 5, 3), [ngk.Block("dense", 0, 1, 0), ngk.Block("dense", 1, 2, 1), ngk.Block("diagonal", 0, 1, 2)])


def attend(edges: ngk.EdgeState | None = None, **changed) -> torch.Tensor:
    arguments = {"q": zeros(N, 4), "k": zeros(N, 4), "v": zeros(N, 6), "weight_q": zeros(4, D), "weight_k": zeros(4, D), "weight_add": zeros(6, D), "weight_mul": zeros(6, D), "heads": 2}  # fmt: skip
    return ngk.attend(state() if edges is None else edges, **{**arguments, **changed})


def update(**changed) -> ngk.EdgeState:
    return plain_update(**{"weight_reverse": zeros(H, D), "norm": ngk.Norm(zeros(D), zeros(D)), **changed})


def twice() -> ngk.EdgeState:
    """Two blocks between the same layers."""
    return ngk.EdgeState(TWICE, [*weights(), zeros(1, 2, 1)], encoders.Linear(zeros(D, 1), zeros(D)))


def turned(edges: ngk.EdgeState) -> ngk.EdgeState:
    return edges.update(None, zeros(H, D), None, None, None, zeros(D, H), None, weight_reverse=zeros(H, D))


CHECKPOINTED = r"NeuralGraph.closure: expected a graph whose states were not checkpointed.*; checkpoint the closed state: edges.closure\(\).checkpoint\(\)"
VALUES = {
    # attend
    "q-rank": (lambda: attend(q=zeros(N)), rf"attend: expected q of shape \({N}, columns\) \(the graph's nodes\), got {shape(N)}"),
    "q-rows": (lambda: attend(q=zeros(N + 1, 4)), rf"attend: expected q of shape \({N}, columns\).*, got {shape(N + 1, 4)}"),
    "k-rows": (lambda: attend(k=zeros(1, 4)), rf"attend: expected k of shape \({N}, columns\).*, got {shape(1, 4)}"),
    "k-columns": (lambda: attend(k=zeros(N, 6)), "attend: expected q and k with the same number of columns, got 4 and 6"),
    "v-rank": (lambda: attend(v=zeros(N, 3, 2)), rf"attend: expected v of shape \({N}, columns\).*, got {shape(N, 3, 2)}"),
    "v-columns": (lambda: attend(v=zeros(N, 5)), "attend: expected heads to divide the columns of v, got 2 heads and 5 columns"),
    "v-none": (lambda: attend(v=zeros(N, 0)), "attend: expected heads to divide the columns of v, got 2 heads and 0 columns"),
    "heads-zero": (lambda: attend(heads=0), "attend: expected heads to divide the columns of q, got 0 heads and 4 columns"),
    "heads-three": (lambda: attend(heads=3), "attend: expected heads to divide the columns of q, got 3 heads and 4 columns"),
    "weight-q-width": (lambda: attend(weight_q=zeros(4, D + 1)), rf"attend: expected weight_q of shape \(\*, {D}\), got {shape(4, D + 1)}"),
    "weight-q-rank": (lambda: attend(weight_q=zeros(D)), rf"attend: expected weight_q of shape \(\*, {D}\), got {shape(D)}"),
    "weight-q-rows": (lambda: attend(weight_q=zeros(6, D)), "attend: expected weight_q with 4 rows, got 6"),
    "weight-k-rows": (lambda: attend(weight_k=zeros(5, D)), "attend: expected weight_k with 4 rows, got 5"),
    "weight-add-rows": (lambda: attend(weight_add=zeros(4, D)), "attend: expected weight_add with 6 rows, got 4"),
    "weight-mul-rows": (lambda: attend(weight_mul=zeros(4, D)), "attend: expected weight_mul with 6 rows, got 4"),
    "weight-mul-width": (lambda: attend(weight_mul=zeros(6, D + 1)), rf"attend: expected weight_mul of shape \(\*, {D}\), got {shape(6, D + 1)}"),
    "over": (lambda: attend(over="both"), "attend: expected over to be one of all, edges, in, out, got 'both'"),
    "over-none": (lambda: attend(over=None), "attend: expected over to be one of all, edges, in, out, got None"),
    "scale": (lambda: attend(scale=float("nan")), "attend: expected a finite scale, got nan"),
    "dropout-one": (lambda: attend(dropout=1.0), "attend: expected dropout of at least 0 and below 1, got 1.0"),
    "dropout-negative": (lambda: attend(dropout=-0.1), "attend: expected dropout of at least 0 and below 1, got -0.1"),
    "dropout-nan": (lambda: attend(dropout=float("nan")), "attend: expected dropout of at least 0 and below 1, got nan"),
    "seed": (lambda: attend(seed=2**70), "attend: expected a seed of 64 bits, got 11805"),
    "self-all": (lambda: attend(include_self=False), "attend: expected include_self=True with over='all', got False; use over='edges', 'in' or 'out'"),
    "two-blocks": (lambda: attend(twice(), over="edges"), "NeuralGraph.closure: expected at most one block between two node layers, got several between 0 and 1"),
    "closed-over-less": (lambda: attend(state().closure("edges")), "NeuralGraph.closure: expected a graph that is not closed, or over 'all', got one closed over 'edges'"),
    "closed-over-more": (lambda: attend(state().closure("all"), over="in"), "NeuralGraph.closure: expected a graph that is not closed, or over 'edges', got one closed over 'all'"),
    "all-of-a-checkpoint": (lambda: attend(update().checkpoint()), "NeuralGraph.closure: .*got one closed over 'edges'"),
    "virtual-not-closed": (lambda: attend(state().checkpoint(), over="edges"), CHECKPOINTED),
    "stored-not-closed": (lambda: attend(state().checkpoint(torch.float32), over="in"), CHECKPOINTED),
    "token-missing-rows": (lambda: attend(ngk.EdgeState(GRAPH.with_token(), weights(), encoders.Linear(zeros(D, 1), zeros(D)))), rf"attend: expected q of shape \({N + 1}, columns\)"),
    # pair updates
    "reverse-width": (lambda: update(weight_reverse=zeros(H, D + 1)), rf"EdgeState.update: expected weight_reverse of shape \(\*, {D}\), got {shape(H, D + 1)}"),
    "reverse-rows": (lambda: update(weight_reverse=zeros(H + 1, D)), rf"EdgeState.update: expected weight_reverse with {H} rows \(as weight_edge\), got {H + 1}"),
    "reverse-of-two-blocks": (lambda: turned(twice()), "NeuralGraph.closure: expected at most one block between two node layers, got several between 0 and 1"),
    "reverse-not-stored": (lambda: turned(state().checkpoint(torch.float32)), CHECKPOINTED),
    "norm-weight": (lambda: update(norm=ngk.Norm(zeros(D + 1), zeros(D))), rf"EdgeState.update: expected norm.weight of shape {shape(D)}, got {shape(D + 1)}"),
    "norm-bias": (lambda: update(norm=ngk.Norm(zeros(D), zeros(1))), rf"EdgeState.update: expected norm.bias of shape {shape(D)}, got {shape(1)}"),
    "norm-eps": (lambda: update(norm=ngk.Norm(zeros(D), zeros(D), -1.0)), "EdgeState.update: expected norm.eps of at least 0, got -1.0"),
    # closed graphs, tokens
    "closure-over": (lambda: state().closure("in"), "NeuralGraph.closure: expected over to be all or edges, got 'in'"),
    "checkpoint-of-all": (lambda: state().closure("all").checkpoint(), r"checkpoint: expected a state that is not closed over all pairs \(N x N x D values\), got one; use recompute"),
    "token-twice": (lambda: GRAPH.with_token().with_token(), "NeuralGraph.with_token: expected an unrestricted graph without tokens; add the token first, then restrict"),
    "token-restricted": (lambda: GRAPH.restrict(-1).with_token(), "NeuralGraph.with_token: expected an unrestricted graph without tokens"),
    "token-closed": (lambda: GRAPH.closure().with_token(), "NeuralGraph.with_token: expected an unrestricted graph without tokens"),
    "batch-closed": (lambda: ngk.NeuralGraph.batch([GRAPH.closure(), GRAPH]), "NeuralGraph.batch: expected graphs that are not closed; batch first, then close"),
    "pairs-over": (lambda: GRAPH.pairs_as("every"), "NeuralGraph.pairs_as: expected over to be one of all, edges, in, out, got 'every'"),
}  # fmt: skip
TYPES = {
    "q-integer": (lambda: attend(q=integers(zeros(N, 4))), "attend: expected q to be a tensor of a floating dtype, got torch.int64"),
    "k-list": (lambda: attend(k=[0.0]), "attend: expected k to be a tensor of a floating dtype, got list"),
    "v-device": (lambda: attend(v=zeros(N, 6, device="meta")), "attend: expected v on cpu, got meta; move it with"),
    "weight-q-none": (lambda: attend(weight_q=None), "attend: expected weight_q to be a tensor of a floating dtype, got NoneType"),
    "weight-k-device": (lambda: attend(weight_k=zeros(4, D, device="meta")), "attend: expected weight_k on cpu, got meta"),
    "weight-add-integer": (lambda: attend(weight_add=integers(zeros(6, D))), "attend: expected weight_add to be a tensor of a floating dtype, got torch.int64"),
    "weight-mul-device": (lambda: attend(weight_mul=zeros(6, D, device="meta")), "attend: expected weight_mul on cpu, got meta"),
    "heads": (lambda: attend(heads=2.0), "attend: expected heads to be an integer, got 2.0"),
    "seed": (lambda: attend(seed="7"), "attend: expected seed to be an integer, got '7'"),
    "scale": (lambda: attend(scale="1"), "attend: expected scale to be a number, got '1'"),
    "dropout": (lambda: attend(dropout=None), "attend: expected dropout to be a number, got None"),
    "reverse-integer": (lambda: update(weight_reverse=integers(zeros(H, D))), "EdgeState.update: expected weight_reverse to be a tensor of a floating dtype, got torch.int64"),
    "reverse-device": (lambda: update(weight_reverse=zeros(H, D, device="meta")), "EdgeState.update: expected weight_reverse on cpu, got meta"),
    "norm-kind": (lambda: update(norm=1e-5), "EdgeState.update: expected norm to be a Norm or None, got float"),
    "norm-none": (lambda: update(norm=ngk.Norm(zeros(D), None)), "EdgeState.update: expected norm.bias to be a tensor of a floating dtype, got NoneType"),
    "norm-integer": (lambda: update(norm=ngk.Norm(integers(zeros(D)), zeros(D))), "EdgeState.update: expected norm.weight to be a tensor of a floating dtype, got torch.int64"),
    "norm-device": (lambda: update(norm=ngk.Norm(zeros(D, device="meta"), zeros(D))), "EdgeState.update: expected norm.weight on cpu, got meta"),
}  # fmt: skip
MISSING = {
    "virtual-then-pair-update": (lambda: ngk.readout(turned(update(weight_reverse=None).checkpoint()), [(zeros(1, D), None)]), "EdgeState: expected no pair update between a virtual checkpoint and an aggregate or readout"),
}  # fmt: skip


def test_the_arguments_are_right_before_they_are_broken(backend: str):
    with ngk.use_backend(backend):
        assert attend().shape == attend(update(), weight_add=None, weight_mul=None).shape == (N, 6)
        assert attend(update().checkpoint(), over="in", scale=2, dropout=0, include_self=False).shape == (N, 6)
        assert turned(state()).paired and not state().paired
        both = ngk.NeuralGraph.mlp([2, 5, 3], reverse=True)  # a stored state of both directions needs no closing
        assert turned(ngk.EdgeState(both, weights(), encoders.Linear(zeros(D, 1), zeros(D))).checkpoint(torch.float32)).paired


@pytest.mark.parametrize(("call", "text"), VALUES.values(), ids=VALUES.keys())
def test_shapes_and_options_raise_value_errors(call, text: str, backend: str):
    with ngk.use_backend(backend), pytest.raises(ValueError, match=text):
        call()


@pytest.mark.parametrize(("call", "text"), TYPES.values(), ids=TYPES.keys())
def test_dtypes_devices_and_kinds_raise_type_errors(call, text: str, backend: str):
    with ngk.use_backend(backend), pytest.raises(TypeError, match=text):
        call()


@pytest.mark.parametrize(("call", "text"), MISSING.values(), ids=MISSING.keys())
def test_what_is_not_built_says_so(call, text: str, backend: str):
    with ngk.use_backend(backend), pytest.raises(NotImplementedError, match=text):
        call()

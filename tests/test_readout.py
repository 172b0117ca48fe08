"""readout against the oracle: shapes by block, packed, restricted; values and gradients; result dtypes; blocks that nobody reads."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from compare import assert_budget, assert_close
from oracle import mlp
from sample_list import ACTIVATIONS, LOW_PRECISION, PLAIN, SAMPLES, UNEQUAL, UNEQUAL_REVERSED
from samples import Sample, cast, coefficients, edge_state, engine, float32_oracle, float64_oracle, leaves, named, run_engine, run_oracle
from samples import oracle as oracle_of

import ngkernels as ngk

pytestmark = pytest.mark.usefixtures("one_thread")
FLOAT32_FLOOR = 8e-6
BFLOAT16_FLOOR = 2**-8  # one rounding
READ = tuple(replace(s, reduce=()) for s in SAMPLES if s.head and not any(s.memory))
HEADS = (
    *(s.but(f"head-{s.activation}", reduce=(), head=3, residual=(True,)) for s in ACTIVATIONS),
    PLAIN.but("head-alone-3", reduce=(), head=3, head_nodes=False),
    PLAIN.but("head-without-biases", reduce=(), bias=False),
    PLAIN.but("head-wide", reduce=(), head=2, hidden=130, width=17, networks=(mlp(3, 14, 2),), scale=0.2),
)


@pytest.mark.parametrize("sample", **named((*READ, *HEADS)))
def test_float64_outputs_and_every_gradient(sample: Sample, backend: str):
    assert_close(run_engine(sample, leaves(sample), backend), float64_oracle(sample), 1e-10)


@pytest.mark.parametrize("sample", **named((*READ, *HEADS)))
def test_float32_within_twice_the_error_of_plain_pytorch(sample: Sample, backend: str):
    wanted, plain = float32_oracle(sample)
    assert_budget(run_engine(sample, cast(leaves(sample), torch.float32), backend), wanted, plain, FLOAT32_FLOOR)


@pytest.mark.parametrize("sample", **named(replace(s, reduce=()) for s in LOW_PRECISION if s.kind == "film"))
def test_bfloat16_operands_within_twice_the_error_of_plain_autocast(sample: Sample, backend: str):
    t = cast(leaves(sample), torch.float32)
    wanted, plain = run_oracle(sample, cast(t, torch.float64)), run_oracle(sample, t, low=True)
    assert_budget(run_engine(sample, t, backend, autocast=torch.bfloat16), wanted, plain, BFLOAT16_FLOOR)


@pytest.mark.parametrize("weights", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_result_dtypes_round_once(dtype: torch.dtype, weights: torch.dtype, backend: str):
    sample = PLAIN.but("dtype", reduce=())
    t = cast(leaves(sample), weights)
    wanted = oracle_of(sample, cast(t, torch.float64))
    mlp_layers = [(t[f"head{k}.weight"], t[f"head{k}.bias"]) for k in range(2)]
    with ngk.use_backend(backend):
        found = ngk.readout(edge_state(sample, t), mlp_layers, t["x"], t["head.dst"], t["head.src"], "silu", dtype)
    rounding = max(torch.finfo(dtype).eps / 2, 10 * torch.finfo(weights).eps)
    for f, w in zip(found, wanted, strict=True):
        assert f.dtype == dtype
        torch.testing.assert_close(f.double(), w, rtol=1.01 * rounding, atol=10 * torch.finfo(weights).eps)


def test_default_dtype_follows_the_weights_and_not_the_autocast(backend: str):
    sample = PLAIN.but("dtype", reduce=())
    with ngk.use_backend(backend), torch.autocast("cpu", dtype=torch.bfloat16):
        assert {o.dtype for o in engine(sample, cast(leaves(sample), torch.float32, torch.bfloat16))} == {torch.float32}
        assert {o.dtype for o in engine(sample, leaves(sample))} == {torch.float64}


@pytest.mark.parametrize("packed", [False, True], ids=["blocks", "packed"])
@pytest.mark.parametrize("networks", [UNEQUAL, UNEQUAL_REVERSED], ids=["weights-unread", "one-direction-unread"])
@pytest.mark.parametrize("unread", [0, 1, 3])
def test_a_block_that_nobody_reads_has_no_gradient(unread: int, networks, packed: bool, backend: str):
    """Only some of the outputs enter the loss; the others' edges must count as zero."""
    sample = PLAIN.but("some", reduce=(), networks=networks, packed=packed)
    t = leaves(sample)
    results = []
    for f in (lambda live: oracle_of(sample, live), lambda live: engine(sample, live)):
        live = {name: v.clone().requires_grad_() for name, v in t.items()}
        with ngk.use_backend(backend):
            out = f(live)
            if packed:  # one tensor holds all blocks
                out = list(out[0].split([10 * (unread + 1), out[0].shape[0] - 10 * (unread + 1)]))
            kept = [(o * c).sum() for k, (o, c) in enumerate(zip(out, coefficients(out), strict=True)) if k != unread % len(out)]
            grads = torch.autograd.grad(sum(kept), list(live.values()), allow_unused=True)
        results.append({name: torch.zeros_like(v) if g is None else g for (name, v), g in zip(live.items(), grads, strict=True)})
    assert_close(results[1], results[0], 1e-10)


def test_reading_the_raw_weight_gives_it_back_bitwise(backend: str):
    """An identity head on the identity encoder: the weights themselves, in their own order, with the gradient of a copy."""
    graph = ngk.NeuralGraph.mlp([3, 4, 2], batch_size=2, reverse=True)
    weights = [torch.randn(2, 3, 4, 2).requires_grad_(), torch.randn(2, 4, 2, 2).requires_grad_()]
    with ngk.use_backend(backend):
        out = ngk.readout(ngk.EdgeState(graph, weights, ngk.encoders.Identity()), [(torch.eye(2), None)])
        grads = torch.autograd.grad(out[0].sum() + 3 * out[1].sum() + 4 * out[2].sum(), weights)
    assert torch.equal(out[0], weights[0]) and torch.equal(out[1], weights[1])
    assert torch.equal(out[2], weights[0].transpose(1, 2)) and torch.equal(out[3], weights[1].transpose(1, 2))
    assert (grads[0] == 5).all() and (grads[1] == 3).all()


def test_a_layer_without_incoming_edges_reads_nothing(backend: str):
    sample = PLAIN.but("nothing", reduce=(), restrict=0)
    with ngk.use_backend(backend):
        assert engine(sample, leaves(sample)) == []

"""aggregate against the oracle: every option in float64, the error budget in float32 and with bfloat16 operands, weight dtypes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from compare import assert_budget, assert_close
from oracle import mlp
from sample_list import ENCODERS, FOURIER, GRAPHS, LOW_PRECISION, PLAIN, REVERSED, SAMPLES, SIZES, TABLES
from samples import Sample, cast, float32_oracle, float64_oracle, leaves, named, run, run_engine, run_oracle
from samples import oracle as oracle_of

import ngkernels as ngk

pytestmark = pytest.mark.usefixtures("one_thread")
FLOAT32_FLOOR = 8e-6  # of the largest entry: plain PyTorch's own error is sometimes 0 by luck
BFLOAT16_FLOOR = 2**-8  # one rounding
REDUCED = tuple(replace(s, head=0) for s in SAMPLES if s.reduce and not any(s.memory))


@pytest.mark.parametrize("sample", **named(REDUCED))
def test_float64_outputs_and_every_gradient(sample: Sample, backend: str):
    assert_close(run_engine(sample, leaves(sample), backend), float64_oracle(sample), 1e-10)


@pytest.mark.parametrize("sample", **named(REDUCED))
def test_float32_within_twice_the_error_of_plain_pytorch(sample: Sample, backend: str):
    wanted, plain = float32_oracle(sample)
    assert_budget(run_engine(sample, cast(leaves(sample), torch.float32), backend), wanted, plain, FLOAT32_FLOOR)


@pytest.mark.parametrize("sample", **named(LOW_PRECISION))
def test_bfloat16_operands_within_twice_the_error_of_plain_autocast(sample: Sample, backend: str):
    t = cast(leaves(sample), torch.float32)
    wanted, plain = run_oracle(sample, cast(t, torch.float64)), run_oracle(sample, t, low=True)
    assert_budget(run_engine(sample, t, backend, autocast=torch.bfloat16), wanted, plain, BFLOAT16_FLOOR)


def test_autocast_to_float16_computes_in_float32(backend: str):
    t = cast(leaves(PLAIN), torch.float32)
    wanted, plain = float32_oracle(PLAIN)
    assert_budget(run_engine(PLAIN, t, backend, autocast=torch.float16), wanted, plain, FLOAT32_FLOOR)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sample", **named((PLAIN, TABLES[0], TABLES[-1], ENCODERS[0], FOURIER[0], GRAPHS[1])))
def test_weight_dtypes_keep_their_gradients_dtype(sample: Sample, dtype: torch.dtype, backend: str):
    """Weights are read in their own dtype; everything else is float32."""
    t = cast(leaves(sample), torch.float32, dtype)
    wanted = run_oracle(sample, cast(t, torch.float64))
    plain = run(lambda live: oracle_of(sample, {name: v.float() for name, v in live.items()}), t)
    assert_budget(run_engine(sample, t, backend), wanted, plain, max(FLOAT32_FLOOR, torch.finfo(dtype).eps))


def test_float64_weights_compute_in_float64_with_float32_parameters(backend: str):
    t = cast(leaves(PLAIN), torch.float32, torch.float64)
    wanted = run(lambda live: oracle_of(PLAIN, {name: v.double() for name, v in live.items()}), t)
    found = run_engine(PLAIN, t, backend)
    assert {name: v.dtype for name, v in found.items()} == {name: v.dtype for name, v in wanted.items()}
    assert_close(
        {k: v for k, v in found.items() if v.dtype == torch.float64}, {k: v for k, v in wanted.items() if v.dtype == torch.float64}
    )


@pytest.mark.parametrize(
    "networks", [(mlp(5000, 1),), (mlp(1, 5000),), (mlp(2100, 70, reverse=True),)], ids=["hub-in", "hub-out", "hub-both"]
)
def test_hubs_above_every_block_size(networks, backend: str):
    sample = PLAIN.but("hub", networks=networks, head=0, residual=(True,), width=3, features=2)
    assert_close(run_engine(sample, leaves(sample), backend), float64_oracle(sample), 1e-10)


# ---- reductions: what the words mean ----
def reduced(messages: torch.Tensor, reduce: tuple[str, ...], backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Reductions [K, F] of messages [n, F] that arrive at one node, and the gradients [n, F] of their sum over k times (k + 1)."""
    n, width = messages.shape
    graph = ngk.NeuralGraph.mlp([n, 1])
    weights = torch.zeros(1, n, 1, 1, dtype=messages.dtype)
    e = ngk.EdgeState(graph, [weights], ngk.encoders.Identity())
    x = torch.cat([messages, messages.new_zeros(1, width)]).requires_grad_()
    nothing, eye = messages.new_zeros(width, width), torch.eye(width, dtype=messages.dtype)
    with ngk.use_backend(backend):
        out = ngk.aggregate(e, ngk.Message.concat(x, messages.new_zeros(width, 1), None, nothing, eye), reduce)[n]
        (grad,) = torch.autograd.grad((out * torch.arange(1, len(reduce) + 1, dtype=out.dtype)[:, None]).sum(), x)
    return out.detach(), grad[:n]


def test_results_come_in_the_order_asked_for(backend: str):
    m = torch.tensor([[1.0], [2.0], [6.0]], dtype=torch.float64)
    names = ("std", "max", "sum", "var", "min", "mean")
    var = 14 / 3
    out, grad = reduced(m, names, backend)
    torch.testing.assert_close(out[:, 0], torch.tensor([var**0.5, 6, 9, var, 1, 3], dtype=torch.float64), rtol=1e-14, atol=0)
    centred = m[:, 0] - 3
    wanted = centred / (3 * var**0.5) + 2 * torch.tensor([0, 0, 1]) + 3 + 4 * 2 * centred / 3 + 5 * torch.tensor([1, 0, 0]) + 6 / 3
    torch.testing.assert_close(grad[:, 0], wanted, rtol=1e-14, atol=0)


@pytest.mark.parametrize("value", [0.0, 1.5, -2.0])
def test_extremes_share_their_gradient_among_ties(value: float, backend: str):
    """Also at exactly 0, where torch's scatter counts one tie too many."""
    m = torch.tensor([[value], [value + 1], [value], [value - 1], [value + 1], [value - 1], [value - 1]])
    _, low = reduced(m, ("min",), backend)
    assert low[:, 0].tolist() == [0, 0, 0, pytest.approx(1 / 3), 0, pytest.approx(1 / 3), pytest.approx(1 / 3)]
    _, high = reduced(m, ("max",), backend)
    assert high[:, 0].tolist() == [0, 0.5, 0, 0, 0.5, 0, 0]
    _, zero = reduced(m - value - 1, ("max",), backend)
    assert zero[:, 0].tolist() == [0, 0.5, 0, 0, 0.5, 0, 0]


@pytest.mark.parametrize("count", [1, 200, 20_000, 40_000])
def test_tie_counts_of_any_size(count: int, backend: str):
    """16-bit counts up to a degree of 2^15, 32-bit ones beyond."""
    m = torch.full((count, 2), 0.25, dtype=torch.float64)
    out, grad = reduced(m, ("min", "max"), backend)
    assert (out == 0.25).all()
    torch.testing.assert_close(grad, torch.full_like(m, 3 / count), rtol=1e-12, atol=0)


def test_std_is_zero_without_gradient_up_to_the_threshold(backend: str):
    below, above = 0.99e-5**0.5, 1.01e-5**0.5
    m = torch.tensor([[1 - below, 1 - above], [1 + below, 1 + above]], dtype=torch.float64)
    out, grad = reduced(m, ("std",), backend)
    assert out[0, 0] == 0 and (grad[:, 0] == 0).all()
    assert out[0, 1].item() == pytest.approx(above) and grad[1, 1].item() == pytest.approx(0.5)


def test_the_variance_survives_a_large_mean(backend: str):
    """The centred form: E[m^2] - E[m]^2 in float32 would be noise here."""
    m = 4096 + torch.linspace(-1, 1, 1001)[:, None]
    out, _ = reduced(m, ("var", "mean"), backend)
    assert out[0, 0].item() == pytest.approx(m.double().var(0, correction=0).item(), rel=2e-3)
    assert out[1, 0].item() == pytest.approx(4096)


def test_nodes_without_edges_get_zeros_and_no_gradient(backend: str):
    sample = PLAIN.but("inputs", kind="concat", reduce=("sum", "mean", "min", "max", "std", "var"), head=0)
    found = run_engine(sample, leaves(sample), backend)
    assert (found["out.0"][[0, 1, 10, 11]] == 0).all() and (found["out.0"][2:10] != 0).any(-1).any(-1).all()


def test_fourier_features_stay_bounded_for_any_finite_weight(backend: str):
    """|cos|, |sin| <= 1, in float32 too, however large the argument."""
    sample = PLAIN.but("far", encoder="fourier", residual=(), reduce=(), head=1, head_nodes=False, networks=(mlp(40, 1),))
    t = cast(leaves(sample), torch.float32)
    t["weights.0"] = torch.logspace(0, 30, 40).reshape(1, 40, 1, 1)
    bound = (t["encoder.weight"].abs().sum() + t["encoder.bias"].abs().sum()) * t["head0.weight"].abs().sum() + t["head0.bias"].abs().sum()
    assert run_engine(sample, t, backend, set())["out.0"].abs().max() <= bound


@pytest.mark.parametrize("far", [3.0, 100.0])
def test_weights_beyond_the_table_are_evaluated_directly(far: float, backend: str):
    """Beside weights inside it; in value and in the gradients of weight and encoder."""
    sample = PLAIN.but("beyond", encoder="fourier", table="auto", table_range=1.0, head=0, networks=REVERSED, reciprocal=True)
    t = cast(leaves(sample), torch.float32)
    t["weights.0"][0, 1, 2] = far
    t["weights.1"][1, 4, 0] = -far
    wanted, plain = run_oracle(sample, cast(t, torch.float64)), run_oracle(sample, t)
    assert_budget(run_engine(sample, t, backend), wanted, plain, FLOAT32_FLOOR)


@pytest.mark.slow
@pytest.mark.parametrize("sample", **named((*SIZES, *TABLES)))
def test_float32_budget_over_other_random_numbers(sample: Sample, backend: str):
    """Five draws at once: the largest error of them all, because a single number's error is small or large by luck."""
    found, wanted, plain = [], [], []
    for seed in range(1, 6):
        t = cast(leaves(sample, seed), torch.float32)
        found.append(run_engine(sample, t, backend))
        wanted.append(run_oracle(sample, cast(t, torch.float64)))
        plain.append(run_oracle(sample, t))
    together = ({name: torch.stack([r[name] for r in runs]) for name in runs[0]} for runs in (found, wanted, plain))
    assert_budget(*together, FLOAT32_FLOOR)

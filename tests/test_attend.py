"""attend and pair updates against dense formulas: every option in float64, the error budget in float32 and with bfloat16 operands."""

from __future__ import annotations

import pytest
import torch
from compare import assert_budget, assert_close
from oracle import Network, mlp
from pair_list import ALONE, ENCODERS, GRID, HOLES, LOOPS, LOW_PRECISION, OPTIONS, PLAIN, QUICK_GRID, SIZES, TABLES, UNEQUAL
from pair_samples import PairSample, attend, float32_oracle, float64_oracle, leaves, oracle, pair_state, run_engine, run_oracle
from samples import Tensors, cast, coefficients, named, run
from test_backends import isa  # noqa: F401

import ngkernels as ngk

pytestmark = pytest.mark.usefixtures("one_thread")
FLOAT32_FLOOR = 8e-6  # of the largest entry: plain PyTorch's own error is sometimes 0 by luck
BFLOAT16_FLOOR = 2**-8  # one rounding
REST = tuple(s for s in GRID if s not in QUICK_GRID)
LOGITS = ("grad.attend.q", "grad.attend.k", "grad.attend.weight_q", "grad.attend.weight_k")


def assert_budget_of_pairs(found: Tensors, wanted: Tensors, plain: Tensors, floor: float) -> None:
    """assert_budget; gradients of what logits are made of are differences of nearly equal numbers, so the four of them go together."""
    together = ({n: v for n, v in r.items() if n not in LOGITS} for r in (found, wanted, plain))
    logits = ({"grad.logits": torch.cat([r[n].flatten() for n in LOGITS if n in r] or [torch.zeros(0)])} for r in (found, wanted, plain))
    assert_budget(*(a | b for a, b in zip(together, logits, strict=True)), floor)


@pytest.mark.parametrize("sample", **named((*OPTIONS, *QUICK_GRID)))
def test_float64_outputs_and_every_gradient(sample: PairSample, backend: str):
    assert_close(run_engine(sample, leaves(sample), backend), float64_oracle(sample), 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("sample", **named(REST))
def test_float64_rest_of_the_grid(sample: PairSample, backend: str):
    assert_close(run_engine(sample, leaves(sample), backend), float64_oracle(sample), 1e-10)


@pytest.mark.parametrize(
    "sample", **named(s for s in (*OPTIONS, *TABLES) if "one-neuron" not in s.name or s.token)
)  # one logit has no gradient
def test_float32_within_twice_the_error_of_plain_pytorch(sample: PairSample, backend: str):
    wanted, plain = float32_oracle(sample)
    assert_budget_of_pairs(run_engine(sample, cast(leaves(sample), torch.float32), backend), wanted, plain, FLOAT32_FLOOR)


@pytest.mark.parametrize("sample", **named(LOW_PRECISION))
def test_bfloat16_operands_within_twice_the_error_of_plain_autocast(sample: PairSample, backend: str):
    t = cast(leaves(sample), torch.float32)
    wanted, plain = run_oracle(sample, cast(t, torch.float64)), run_oracle(sample, t, low=True)
    assert_budget_of_pairs(run_engine(sample, t, backend, autocast=torch.bfloat16), wanted, plain, BFLOAT16_FLOOR)


@pytest.mark.parametrize("sample", **named((PLAIN, ENCODERS[8], PLAIN.but("loops", networks=(*UNEQUAL, LOOPS)), *SIZES[1:5], SIZES[9])))
def test_every_instruction_set(sample: PairSample, isa: str):  # noqa: F811
    assert_close(run_engine(sample, leaves(sample), "cpp"), float64_oracle(sample), 1e-10)
    t = cast(leaves(sample), torch.float32)
    wanted, plain = float32_oracle(sample)
    assert_budget_of_pairs(run_engine(sample, t, "cpp"), wanted, plain, FLOAT32_FLOOR)


@pytest.mark.parametrize("sample", **named(LOW_PRECISION))
def test_every_instruction_set_with_bfloat16_operands(sample: PairSample, isa: str):  # noqa: F811
    t = cast(leaves(sample), torch.float32)
    wanted, plain = run_oracle(sample, cast(t, torch.float64)), run_oracle(sample, t, low=True)
    assert_budget_of_pairs(run_engine(sample, t, "cpp", autocast=torch.bfloat16), wanted, plain, BFLOAT16_FLOOR)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "sample", **named((PLAIN, TABLES[1], PLAIN.but("packed", packed=True, networks=UNEQUAL), PLAIN.but("loops", networks=(LOOPS,))))
)
def test_weight_dtypes_keep_their_gradients_dtype(sample: PairSample, dtype: torch.dtype, backend: str):
    t = cast(leaves(sample), torch.float32, dtype)
    wanted = run_oracle(sample, cast(t, torch.float64))
    plain = run(lambda live: oracle(sample, {name: v.float() for name, v in live.items()}), t)
    assert_budget_of_pairs(run_engine(sample, t, backend), wanted, plain, max(FLOAT32_FLOOR, torch.finfo(dtype).eps))


VIEWS = {
    "transposed": lambda w: w.transpose(1, 2).contiguous().transpose(1, 2),
    "channels-first": lambda w: w.movedim(3, 1).contiguous().movedim(1, 3),
    "every-other": lambda w: torch.stack([w, w + 1], 3).flatten(2, 3)[:, :, ::2],
    "offset": lambda w: torch.cat([w[:1] + 1, w])[1:],
    "expanded": lambda w: w[:1].expand_as(w),
}


@pytest.mark.parametrize("over", ["all", "edges"])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_weights_of_any_strides(view, over: str, backend: str):
    """A transposed view of a parameter is read as it is; its gradient has its strides."""
    sample = PLAIN.but("views", over=over, channels=2, reciprocal=True)
    t = leaves(sample)
    t = {name: view(w) if name.startswith("weights.") else w for name, w in t.items()}
    live = {name: w.detach().requires_grad_() for name, w in t.items()}  # `run` would make them contiguous
    assert any(not w.is_contiguous() or w.storage_offset() for w in live.values())
    with ngk.use_backend(backend):
        out = attend(sample, live, pair_state(sample, live))
        found = torch.autograd.grad(out.sin().sum(), list(live.values()))
    wanted = torch.autograd.grad(oracle(sample, live)[0].sin().sum(), list(live.values()))
    assert_close(dict(zip(live, found, strict=True)), dict(zip(live, wanted, strict=True)), 1e-10)


def test_query_key_and_value_of_any_strides(backend: str):
    t = leaves(PLAIN)
    wanted = run_engine(PLAIN, t, backend)
    live = {name: v.detach().T.contiguous().T.requires_grad_() if v.dim() == 2 else v.requires_grad_() for name, v in t.items()}
    with ngk.use_backend(backend):
        assert torch.equal(attend(PLAIN, live, pair_state(PLAIN, live)), wanted["out.0"])


# ---- what the softmax is over ----
@pytest.mark.parametrize("sample", **named(s for s in ALONE if "holes" in s.name or s.name in ("no-self-in", "no-self-out")))
def test_a_row_that_reads_nothing_is_zero_with_zero_gradients(sample: PairSample, backend: str):
    """Without itself, a neuron that no block joins reads nothing; its query changes nothing."""
    found = run_engine(sample, leaves(sample), backend)
    out = found["out.0"]
    empty = (out == 0).all(1)
    assert empty.any() and all(v.isfinite().all() for v in found.values())
    if sample.restrict is None:
        assert (found["grad.attend.q"][empty] == 0).all() and (found["grad.attend.q"][~empty] != 0).any(1).all()
    else:
        assert empty.all() == ("holes" in sample.name)


def test_a_neuron_that_reads_itself_alone_gets_its_own_value(backend: str):
    """The softmax over one pair is 1, whatever its logit."""
    sample = PLAIN.but("one", networks=(HOLES,), over="edges", multiply=False, add=False)
    t = leaves(sample)
    found = run_engine(sample, t, backend)
    inside = ngk.NeuralGraph.from_blocks((3, 4, 2, 5), [], 2)
    alone = torch.cat([inside.node_layer(1), inside.node_layer(2)])
    torch.testing.assert_close(found["out.0"][alone], t["attend.v"][alone], rtol=1e-14, atol=1e-14)
    assert (found["grad.attend.q"][alone].abs() < 1e-14).all()


@pytest.mark.parametrize("over", ["all", "edges", "in", "out"])
def test_equal_logits_give_the_mean(over: str, backend: str):
    """[1, 2, 1]: who reads whom, counted by hand."""
    graph = ngk.NeuralGraph.mlp([1, 2, 1])
    weights = [torch.ones(1, 1, 2, 1), torch.ones(1, 2, 1, 1)]
    edges, zero, v = (
        ngk.EdgeState(graph, weights, ngk.encoders.Identity()),
        torch.zeros(4, 1),
        torch.tensor([[1.0], [10.0], [100.0], [1000.0]]),
    )
    reads = {
        "all": ["0123"] * 4,
        "edges": ["012", "013", "023", "123"],
        "in": ["0", "01", "02", "123"],
        "out": ["012", "13", "23", "3"],
    }[over]
    with ngk.use_backend(backend):
        out = ngk.attend(edges, zero, zero, v, torch.zeros(1, 1), torch.zeros(1, 1), heads=1, over=over)
    assert out[:, 0].tolist() == pytest.approx([sum(v[int(j), 0].item() for j in row) / len(row) for row in reads])


def test_the_norm_of_one_number_is_its_bias(backend: str):
    """And what it is the norm of has no gradient."""
    sample = PLAIN.but("one-column", width=1, over="edges")
    found = run_engine(sample, leaves(sample), backend)
    assert_close(found, float64_oracle(sample), 1e-10, least=1.0)
    assert found["grad.encoder.weight"].abs().max() < 1e-12 and found["grad.update1.norm.bias"].abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_one_logit_has_no_gradient(dtype: torch.dtype, backend: str):
    """A single neuron: its weight is 1, in whatever way the softmax is formed again."""
    sample = PLAIN.but("one-neuron", networks=(Network((1,), (("dense", 0, 0),), 2),))
    found = run_engine(sample, cast(leaves(sample), dtype), backend)
    assert all(found[name].abs().max() < 8 * torch.finfo(dtype).eps for name in LOGITS)


# ---- large numbers ----
@pytest.mark.parametrize("low", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("size", [1e4, -1e4, 3e6])
def test_large_logits_do_not_overflow(size: float, low: bool, backend: str):
    """Shifted by the largest of the row: nothing of exp(1e4) is ever formed; weights sum to 1 in the backward pass too."""
    sample = PLAIN.but("large", networks=(mlp(3, 30, 2),), heads=1, dk=1, multiply=False, add=False, attention_scale=1.0)
    t = cast(leaves(sample), torch.float32)
    t["attend.q"], t["attend.k"] = torch.ones_like(t["attend.q"]), torch.full_like(t["attend.k"], size)
    t["attend.k"][::3] -= abs(size)  # a difference of logits as large as they are
    found = run_engine(sample, t, backend, autocast=torch.bfloat16 if low else None)
    assert all(v.isfinite().all() for v in found.values())
    assert found["out.0"].abs().max() <= t["attend.v"].abs().max() * 1.001
    assert found["grad.attend.v"].sum().item() == pytest.approx(coefficients([found["out.0"]])[0].sum().item(), rel=1e-2, abs=1e-2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("where", ["weights.0", "attend.q", "attend.k", "attend.v", "x0"])
@pytest.mark.parametrize("over", ["all", "edges"])
def test_nan_and_inf_stay_in_their_network(value: float, where: str, over: str, backend: str):
    """The first of three networks; parameters are shared, rows and weights are not."""
    sample = PLAIN.but("nan", networks=(mlp(2, 5, 3, copies=3),), over=over)
    t = cast(leaves(sample), torch.float32)
    clean = run_engine(sample, t, backend)
    t[where].view(-1)[0] = value
    found = run_engine(sample, t, backend)
    assert not found["out.0"][:10].isfinite().all()
    own = [n for n in found if n == "out.0" or n.startswith(("grad.attend.q", "grad.attend.k", "grad.attend.v", "grad.x"))]
    for name, first in [*((n, 10) for n in own), ("grad.weights.0", 1), ("grad.weights.1", 1)]:
        assert torch.equal(found[name][first:], clean[name][first:]), name

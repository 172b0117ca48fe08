"""Attention, pair updates, layer norms and tokens of the CUDA kernels on an emulated GPU: values and every gradient against the dense formulas."""

from __future__ import annotations

from pathlib import Path

import emulated_checks as checks
import emulation
import pair_samples
import pytest
import torch
from compare import assert_bitwise, assert_close
from emulation import AHEAD, BACKWARDS, emulated, order  # noqa: F401  a fixture
from layouts import LAYOUTS, NETWORK
from oracle import Network, mlp
from pair_list import GRID, LOW_PRECISION, OPTIONS, PLAIN, TABLES
from pair_samples import PairSample, attend, engine, leaves, pair_state, run_engine
from samples import Tensors, cast, named, run
from test_attend import assert_budget_of_pairs

import ngkernels as ngk
from ngkernels import backends, kept
from ngkernels._cuda import plan

pytestmark = [
    pytest.mark.usefixtures("one_thread", "emulated"),
    pytest.mark.skipif(not emulation.compiler(), reason="no C++ compiler"),
]
QUICK = (
    "three-updates", "pair-update-first", "pair-update-later", "no-pair-update", "nothing-residual", "no-biases", "identity-no-update-token", "identity-both", "fourier-then", "affine-diagonals",
    "messages-reversed", "messages-restricted", "messages-token", "readout-packed", "readout-diagonals", "loops-in-layer0-token", "packed-in-restricted", "holes-all",
    "no-self-edges-holes-restricted", "values-plus", "values-times", "values-as-they-are", "D33-H16-dk5-dv32-heads2", "D8-H8-dk8-dv8-heads5", "D1-H1-dk1-dv1-heads1",
    "memory-same+virtual-none-same-in-token-layer-1", "memory-none-virtual-none-edges-loops", "memory-virtual-none-none-out-packed", "table-both", "table-beyond",
)  # fmt: skip
ONE = {"residual": (True,), "reverse": (True,), "nodes": (True,), "norm": (True,)}
SPARSE = Network((3, 30), (("sparse", 0, 1, tuple((k % 3, k) for k in range(26)) + ((0, 1), (2, 0))), ("sparse", 1, 1, ((3, 3), (4, 5), (5, 4), (0, 29)))))
HUB = Network((2, 40), (("sparse", 1, 0, tuple((k, 1) for k in range(40)) + ((3, 0), (9, 0))),), copies=2)
TINY = Network((301, 44), (("sparse", 0, 1, tuple((k % 301, i) for i in range(44) for k in range(i, i + (300 if i == 25 else i % 5)))),), copies=2)
SMALL = (mlp(1, 19, 2), mlp(3, 5, 4, copies=2))
SHAPES = (
    *(PLAIN.but(f"sparse-{over}", networks=(SPARSE,), over=over, **ONE) for over in ("in", "out", "edges")),
    PLAIN.but("sparse-hub", networks=(HUB,), over="edges", reciprocal=True, encoder="fourier", **ONE),
    PLAIN.but("sparse-no-self", networks=(SPARSE, HUB), over="edges", include_self=False, restrict=-1, **ONE),
    PLAIN.but("messages-sparse", networks=(SPARSE, HUB), over=None, reduce=("mean", "max"), **ONE),
    PLAIN.but("tails", networks=(mlp(3, 35, 17),), over="edges", **ONE),
    PLAIN.but("inside-a-layer", networks=(Network((3, 18), (("dense", 0, 1), ("dense", 1, 1))),), over="edges", **ONE),
    PLAIN.but("tiny-rows", networks=(TINY, *SMALL), over="edges", multiply=True, **ONE),
    PLAIN.but("tiny-rows-out", networks=(TINY, *SMALL), over="out", reciprocal=True, **ONE),
    PLAIN.but("messages-tiny-rows", networks=(TINY, *SMALL), over=None, reduce=("mean", "max"), **ONE),
    PLAIN.but("norm-alone", over=None, reduce=("mean", "max"), head=2, reverse=(False, False)),
)  # fmt: skip
WIDEST = (
    PLAIN.but("widest-attention", networks=(mlp(3, 18, 2),), over="edges", width=97, hidden=70, heads=4, dk=30, dv=25, **ONE),
    PLAIN.but("widest-messages", networks=(mlp(3, 18, 2),), over=None, reduce=("mean", "max"), width=97, hidden=70, **ONE),
)
WIDE = PLAIN.but("wide", networks=(mlp(530, 2),), over="in", multiply=False, add=False, residual=(), reverse=(), nodes=(), norm=())
SAMPLES = {s.name: s for s in (*OPTIONS, *TABLES, *SHAPES, *WIDEST, *GRID)}


def missing(s: PairSample) -> bool:
    """Whether a register would have more than 128 columns."""
    return max([s.width, s.hidden] + [s.heads * s.dk, s.heads * s.dv] * bool(s.over)) > 128


def one_logit(s: PairSample) -> bool:
    """It has no gradient, and the budget of nothing is nothing."""
    return "one-neuron" in s.name and not s.token


def tiered() -> list:
    assert set(QUICK) <= set(SAMPLES)
    found = [s for s in SAMPLES.values() if not missing(s) and not one_logit(s)]
    return [pytest.param(s, id=s.name, marks=() if s.name in QUICK or s in (*SHAPES, *WIDEST) else pytest.mark.slow) for s in found]


def check(sample: PairSample) -> None:
    checks.exact(pair_samples, sample, assert_budget_of_pairs)


@pytest.mark.parametrize("sample", tiered())
def test_float32_within_twice_the_error_of_plain_pytorch(sample: PairSample):
    check(sample)


@pytest.mark.parametrize("sample", **named(s for s in SAMPLES.values() if missing(s)))
def test_what_is_too_wide_is_named(sample: PairSample):
    with pytest.raises(NotImplementedError, match="backend 'cuda' does not run registers of 130 columns, more than 128"):
        run_engine(sample, cast(leaves(sample), torch.float32), "cuda")


def test_float64_is_named():
    with pytest.raises(NotImplementedError, match="attend: backend 'cuda' does not run torch.float64 parameters"):
        run_engine(PLAIN, leaves(PLAIN), "cuda")


@pytest.mark.parametrize("sample", [pytest.param(s, id=s.name, marks=() if k in (1, 5) or s in WIDEST else pytest.mark.slow) for k, s in enumerate((*LOW_PRECISION, *WIDEST))])
@pytest.mark.parametrize("tf32", [False, True], ids=["bf16", "tf32"])
def test_rounded_operands_within_twice_the_error_of_plain_autocast(sample: PairSample, tf32: bool):
    checks.rounded(pair_samples, sample, tf32, assert_budget_of_pairs)


@pytest.mark.parametrize("rate", [0.3, pytest.param(0.9, marks=pytest.mark.slow)])
def test_dropout_drops_what_every_backend_drops(rate: float):
    sample = PLAIN.but("dropout", dropout=rate)
    t = cast(leaves(sample), torch.float32)
    results = []
    for backend in ("reference", "cuda"):
        with ngk.use_backend(backend):
            results.append(run(lambda live: [attend(sample, live, pair_state(sample, live), seed=-(1 << 40) + 12345)], t))
    assert_close(results[1], results[0], 2e-5, 1e-2)


# ---- the same bits ----
BITWISE = tuple(SAMPLES[n] for n in ("pair-update-first", "sparse-hub"))


@pytest.mark.parametrize("sample", **named(BITWISE))
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["exact", "bf16"])
def test_the_order_of_threads_does_not_matter(sample: PairSample, autocast: torch.dtype | None):
    checks.any_order_of_threads(pair_samples, sample, autocast)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["exact", "bf16"])
@pytest.mark.parametrize("sample", **named((PLAIN.but("attention", networks=(NETWORK,)), PLAIN.but("messages", networks=(NETWORK,), over=None, reduce=("mean", "max"), features=5))))
def test_how_weights_lie_in_memory_does_not_matter(sample: PairSample, autocast: torch.dtype | None, dtype: torch.dtype):
    t = cast(leaves(sample), torch.float32, dtype)

    def results(change) -> Tensors:
        def forward(live: Tensors) -> list[torch.Tensor]:
            changed = {n: change(v) if n.startswith("weights.") else v for n, v in live.items()}
            with torch.autocast("cpu", autocast, enabled=autocast is not None):
                return engine(sample, changed)

        with ngk.use_backend("cuda"):
            return run(forward, t)

    wanted = results(lambda w: w)
    for change in LAYOUTS:
        assert_bitwise(results(change), wanted)


@pytest.mark.parametrize(("sample", "shared"), [*((s, 60_000) for s in BITWISE), *((s, limit) for s in WIDEST for limit in (166_912, 101_376))], ids=lambda x: getattr(x, "name", x))
def test_working_memory_outside_of_shared_memory(sample: PairSample, shared: int, monkeypatch):
    """As an A100 and a GeForce RTX 4090 have it, too: there the rows that the widest registers stage lie outside."""
    checks.outside_of_shared_memory(pair_samples, sample, shared, monkeypatch)


@pytest.mark.parametrize("name", ["tails", "sparse-edges", "table-both"])
def test_what_a_cuda_graph_can_capture(name: str, monkeypatch):
    checks.captured(pair_samples, SAMPLES[name], monkeypatch)


def test_partial_results_in_many_launches(monkeypatch):
    checks.in_many_launches(pair_samples, SAMPLES["tails"], monkeypatch)


@pytest.mark.parametrize("wanted", [{"attend.q"}, {"weights.0", "attend.v"}, {"x0"}, {"update0.norm.weight", "update1.reverse"}], ids=lambda names: "+".join(sorted(names)))
def test_gradients_that_are_asked_for(wanted: set[str]):
    checks.gradients_that_are_asked_for(pair_samples, PLAIN, wanted)


@pytest.mark.parametrize("longest", [plan.LONGEST, 1])
def test_split_rows_merge(longest: int, monkeypatch):
    """Destinations with more sources than one panel has; of a hub, in two steps."""
    monkeypatch.setattr(plan, "LONGEST", longest)
    monkeypatch.setattr(plan, "_of_topology", kept.OfTopology(plan.Plan))
    check(WIDE)


# ---- seeded bugs ----
PATCHES = (
    ("partners-with-the-edges-register", "evaluator.h", "b(x ? own : other);", "b(x ? other : own);"),
    ("partners-read-the-edges-nodes", "evaluator.h", "role == side() ? 0 : g.n_nodes", "role == 0 ? 0 : g.n_nodes"),
    ("variance-of-the-padding", "evaluator.h", "if (c * 16 + column_of(k) >= stage.width) continue;", ""),
    ("tokens-start-from-the-encoder", "evaluator.h", "if (FULL && stage.masked && block->token) NGK_UNROLL", "if (false) NGK_UNROLL"),
    ("diagonal-features-everywhere", "edges.h", "present & with_raw(panel)", "present"),
    ("diagonal-gradients-everywhere", "sinks.h", "if (!eval.has_raw(e)) return;", "if (!e.ok) return;"),
    ("gradient-of-the-reverse-matrix-lost", "backprop.h", "if (reverse) matrix_gradient(upper.reverse_gradient, up.own", "if (false) matrix_gradient(upper.reverse_gradient, up.own"),
    ("partners-add-what-only-edges-have", "backprop.h", "stage.held && !(FULL && side && stage.held > g.live)", "stage.held"),
    ("norm-without-the-variances-gradient", "../message_math.h", "V::sub(V::sub(d, total), V::mul(y, along))", "V::sub(V::sub(d, total), V::mul(V::zero(), V::mul(y, along)))"),
    ("sums-not-scaled-with-the-largest-logit", "attend.h", "total[h] * shrink[h];", "total[h];"),
    ("values-not-scaled-with-the-largest-logit", "attend.h", "if (!run.begins) own.v[e] *=", "if (false) own.v[e] *="),
    ("runs-end-in-every-tile", "edges.h", "end < rows || closed});", "true});"),
    ("values-of-the-run-before", "attend.h", "if (!run.begins) own = load4", "own = load4"),
    ("largest-logit-of-the-run-before", "attend.h", "before = run.begins ? -INFINITY : top[h]", "before = top[h]"),
    ("values-of-all-runs", "attend.h", "this->eval.ok[h] && run.has(lane() / 4 + 8 * h)", "this->eval.ok[h]"),
    ("one-destinations-query", "attention.h", "add_nodes(g.q, d, eval.node[0], eval.node[1],", "add_nodes(g.q, d, eval.node[0], eval.node[0],"),
    ("one-destinations-gradient", "attend_back.h", "g.grad_out + own_row(1) * of.d_v}", "g.grad_out + own_row(0) * of.d_v}"),
    ("one-destinations-largest-logit", "attend.h", "to[h] = highest[run.first * heads + h];", "to[h] = highest[h];"),
    ("edges-that-are-none-have-a-share", "attend.h", "this->eval.has(row) ? expf(p[at] - base) : 0.0f", "expf(p[at] - base)"),
    ("panels-merged-without-their-tops", "softmax.h", "scale = expf(p[h] - base);\n      total", "scale = 1;\n      total"),
    ("mask-in-the-normalisation", "../message_math.h", "weight * dot - p * delta", "weight * (dot - delta) + 0 * p"),
    ("gradient-of-the-states-sums-lost", "attend_back.h", "if (g.summed) state_gradients();", ""),
    ("no-barrier-before-the-logits", "attention.h", "put(c, a);\n    }\n    sync_warp();", "put(c, a);\n    }"),
)  # fmt: skip


def passes(library: Path) -> bool:
    """Whether a library of kernels gives right values for a few samples."""
    with backends.emulate_cuda(library):
        try:
            for name in ("three-updates", "pair-update-first", "affine-diagonals", "no-self-edges-token", "D33-H16-dk5-dv32-heads2", "messages-sparse", "tails", "tiny-rows"):
                check(SAMPLES[name])
            check(WIDE)
            test_dropout_drops_what_every_backend_drops(0.3)
            for autocast in (None, torch.bfloat16):
                test_how_weights_lie_in_memory_does_not_matter(PLAIN.but("attention", networks=(NETWORK,)), autocast, torch.bfloat16)
            with order(BACKWARDS):
                check(SAMPLES["pair-update-first"])
        except AssertionError:
            return False
    return True


@pytest.mark.mutants
@pytest.mark.parametrize(("file", "old", "new"), [pytest.param(*p[1:], id=p[0]) for p in PATCHES])
def test_seeded_bugs_are_caught(file: str, old: str, new: str, tmp_path: Path):
    emulation.check_bug(tmp_path, file, old, new, passes)

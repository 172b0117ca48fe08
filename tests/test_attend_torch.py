"""attend as a PyTorch op: gradcheck, opcheck, compile, any choice of gradients, what is saved; bits, threads, batch mates, dropout."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from compare import assert_bitwise, assert_close
from conftest import DECLARED
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import mlp
from pair_list import HOLES, LOOPS, PLAIN, REVERSED, TABLES, UNEQUAL, UNEQUAL_REVERSED
from pair_samples import PairSample, attend, engine, leaves, pair_graph, pair_state, run_engine
from samples import Tensors, cast, named, run
from test_compile import dynamo, one_backend  # noqa: F401
from test_determinism import poisoned, threads  # noqa: F401
from test_torch import Calls, fresh

import ngkernels as ngk

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parent.parent
TINY = PLAIN.but("tiny", networks=(mlp(2, 2, 1),), width=3, hidden=2, node_width=2, dk=2, dv=3)
SMALL = (
    TINY,
    TINY.but("edges-token-both", over="edges", token=True, reciprocal=True, encoder="fourier"),
    TINY.but("in-restricted", over="in", restrict=-1, multiply=False),
    TINY.but("loops-packed", networks=(LOOPS,), packed=True, over="out", add=False, include_self=False),
    TINY.but("no-norm-residual", norm=(False, False), residual=(False, True), activation="tanh"),
    TINY.but("virtual", memory=("virtual", None), closed=True, over="edges"),
    TINY.but("stored", memory=(None, "same"), closed=True, over="in", token=True),
    TINY.but("dropout", dropout=0.4),
    TINY.but("messages-and-readout", over=None, reduce=("sum", "std"), head=1),
)


def function_of(s: PairSample) -> tuple:
    t = leaves(s)
    return lambda *xs: tuple(engine(s, dict(zip(t, xs, strict=True)))), [v.clone().requires_grad_() for v in t.values()]


@pytest.mark.parametrize("sample", **named(SMALL))
def test_gradcheck(sample: PairSample, backend: str):
    f, inputs = function_of(sample)
    with ngk.use_backend(backend):
        assert torch.autograd.gradcheck(f, inputs, fast_mode=True)


def test_second_derivatives_of_attention_say_no(backend: str):
    f, inputs = function_of(TINY)
    with ngk.use_backend(backend):
        grads = torch.autograd.grad(f(*inputs)[0].sin().sum(), inputs, create_graph=True, allow_unused=True)
        with pytest.raises(NotImplementedError, match="attend: second derivatives are not available"):
            torch.autograd.grad(sum(g.sum() for g in grads if g is not None), inputs)


def test_second_derivatives_of_messages_after_pair_updates(backend: str):
    f, inputs = function_of(SMALL[-1])
    with ngk.use_backend(backend):
        assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


# ---- opcheck ----
CHECKED = (
    *SMALL[:5],
    SMALL[7],
    TINY.but("table", encoder="fourier", table="auto"),
    TINY.but("packed-reversed", packed=True, networks=UNEQUAL_REVERSED),
)


@lru_cache
def calls_of(sample: PairSample, backend: str) -> dict[str, tuple]:
    """The arguments of attend and of its backward."""
    t = {name: v.requires_grad_() for name, v in cast(leaves(sample), torch.float32).items()}
    with ngk.use_backend(backend), Calls() as seen:
        engine(sample, t)[0].sin().sum().backward()
    return seen.calls


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("op", ["attend", "attend_backward"])
@pytest.mark.parametrize("sample", **named(CHECKED))
def test_opcheck(sample: PairSample, op: str, grad: bool, backend: str):
    """Schema, fake tensors, autograd registration, and where there is a derivative, AOT dispatch with dynamic shapes."""
    func, args = calls_of(sample, backend)[op]
    tests = ["test_schema", "test_faketensor", "test_autograd_registration"]
    tests += ["test_aot_dispatch_dynamic"] * (op == "attend" or not grad)
    with ngk.use_backend(backend):
        result = torch.library.opcheck(func, tuple(fresh(a, grad) for a in args), test_utils=tests)
    assert set(result.values()) == {"SUCCESS"}


# ---- torch.compile ----
COMPILED = (
    PLAIN,
    PLAIN.but("edges-token", over="edges", token=True, reciprocal=True, restrict=-1),
    PLAIN.but("stored-packed", memory=(None, "same"), closed=True, over="in", packed=True, networks=UNEQUAL_REVERSED),
    PLAIN.but("table", encoder="fourier", table="auto", table_range=2.0, step=8),
)


@one_backend
@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("sample", [*COMPILED[:2], *(pytest.param(s, marks=pytest.mark.slow) for s in COMPILED[2:])], ids=lambda s: s.name)
def test_compiled_without_a_break(sample: PairSample, dynamic: bool, backend: str):
    """Closures of graphs are made before (they are kept with the graph)."""
    t, graph = cast(leaves(sample), torch.float32), pair_graph(sample)
    with ngk.use_backend(backend):
        wanted = run(lambda live: engine(sample, live, graph), t)
        compiled = torch.compile(lambda live: engine(sample, live, graph), fullgraph=True, dynamic=dynamic, backend="aot_eager")
        assert_close(run(compiled, t), wanted, 1e-5)


# ---- needs_input_grad, what is saved ----
@pytest.mark.parametrize("but_one", [False, True], ids=["each-alone", "all-but-one"])
@pytest.mark.parametrize("sample", **named((PLAIN, TABLES[1], PLAIN.but("virtual", memory=("virtual", None), closed=True, over="edges"))))
def test_any_choice_of_gradients(sample: PairSample, but_one: bool, backend: str):
    t = cast(leaves(sample), torch.float32)
    everything = run_engine(sample, t, backend)
    for name in t:
        found = run_engine(sample, t, backend, set(t) - {name} if but_one else {name})
        same = assert_close if backend == "reference" else assert_bitwise
        same(found, {n: everything[n] for n in found})


@pytest.mark.parametrize("encoder", ["linear", "fourier", "table"])
def test_nothing_of_the_size_of_the_pairs_is_saved(encoder: str, backend: str):
    table = {"encoder": "fourier", "table": "auto", "table_range": 0.25, "step": 3} if encoder == "table" else {"encoder": encoder}
    sample = PLAIN.but("saved", networks=(mlp(2, 60, 60, 3),), width=4, hidden=4, dk=2, dv=2, node_width=4, **table)
    t = {name: v.requires_grad_() for name, v in cast(leaves(sample), torch.float32).items()}
    sizes: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return tensor

    with ngk.use_backend(backend), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = engine(sample, t)[0]
    assert sizes and max(sizes) <= 60 * 60 < 125 * 125, sizes  # a weight matrix, not the pairs
    out.sum().backward()


MEMORY = """
import torch, ngkernels as ngk
torch.manual_seed(0)

def status(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

def step(layout, d=32, dx=64, h=64, heads=4):
    R = lambda *s: torch.randn(*s).mul_(0.1).requires_grad_()
    graph, x = ngk.NeuralGraph.mlp(layout), R(sum(layout), dx)
    weights = [R(1, a, b, 1) for a, b in zip(layout, layout[1:])]
    edges = ngk.EdgeState(graph, weights, ngk.encoders.Fourier(torch.randn(16, 1), R(d, 32), R(d)))
    for layer in range(4):
        y = ngk.attend(edges, x @ R(dx, dx), x @ R(dx, dx), x @ R(dx, dx), R(dx, d), R(dx, d), R(dx, d), R(dx, d), heads)
        x = x + y
        edges = edges.update(x, R(h, d), R(h, dx), R(h, dx), R(h), R(d, h), R(d), "gelu", True, R(h, d), ngk.Norm(R(d), R(d)))
    x.square().mean().backward()

step([2, 16, 16, 3])  # loads what is loaded at first use
open("/proc/self/clear_refs", "w").write("5")  # the peak starts again
before = status("VmRSS")
step([2, 256, 512, 3])
print(status("VmHWM") - before)
"""


@pytest.mark.skipif("cpp" not in DECLARED or not Path("/proc/self/clear_refs").exists(), reason="needs the cpp backend and Linux's /proc")
def test_peak_memory_of_a_chain_of_layers():
    """A tensor of one number for each pair and feature would take 76 MB."""
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "NGKERNELS_BACKEND": "cpp",
        "MALLOC_MMAP_THRESHOLD_": str(2**20),
    }
    done = subprocess.run([sys.executable, "-c", MEMORY], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    edges, neurons = 2 * 256 + 256 * 512 + 512 * 3, 2 + 256 + 512 + 3
    assert int(done.stdout) <= 16 * edges + 30_000 * neurons + 40 * 2**20


# ---- bits ----
PARALLEL = (
    PLAIN.but("large", networks=(mlp(3, 71, 150, 2),), width=8, hidden=8),
    PLAIN.but("large-edges", networks=(mlp(3, 71, 150, 2, reverse=True),), over="edges", reciprocal=True, token=True, width=8, hidden=8),
    PLAIN.but("table", networks=(mlp(3, 71, 90, 2),), encoder="fourier", table="auto", width=8, hidden=8, nodes=(False, True)),
    PLAIN.but("many-small", networks=(mlp(2, 5, 3, copies=60), LOOPS)),
)


@pytest.mark.parametrize("sample", **named(PARALLEL))
def test_run_to_run_and_on_any_number_of_threads(sample: PairSample, threads):  # noqa: F811
    t = cast(leaves(sample), torch.float32)
    threads(2)
    wanted = run_engine(sample, t, "cpp")
    for count in (1, 3):
        threads(count)
        assert_bitwise(run_engine(sample, t, "cpp"), wanted)


MATES = (
    ("plain", {}),
    ("edges", {"over": "edges", "reciprocal": True, "token": True}),
    ("table", {"encoder": "fourier", "table": "auto", "nodes": (False, False)}),
    ("stored", {"memory": ("same", None), "closed": True, "over": "in"}),
    ("virtual", {"memory": ("virtual", None), "closed": True, "over": "out"}),
)


@pytest.mark.parametrize("changes", [c for _, c in MATES], ids=[n for n, _ in MATES])
@pytest.mark.parametrize("add", [False, True], ids=["values", "values-plus"])
@pytest.mark.parametrize("networks", [UNEQUAL, (mlp(2, 70, 66, 3), mlp(2, 5, 3, copies=2), HOLES)], ids=["small", "large"])
def test_a_network_alone_and_in_a_batch(networks, changes: dict, add: bool):
    """Its rows, and the gradients of its weights and nodes: bitwise."""
    sample = PLAIN.but("batch", networks=networks, add=add, **changes)
    t = cast(leaves(sample), torch.float32)
    nodes = [name for name in t if name.startswith(("x", "attend.q", "attend.k", "attend.v"))]

    def run_one(s: PairSample, own: Tensors, coefficients: torch.Tensor) -> tuple[torch.Tensor, Tensors]:
        live = {name: v.clone().requires_grad_() for name, v in own.items()}
        with ngk.use_backend("cpp"):
            (out,) = engine(s, live)
        names = [n for n in live if n in nodes or n.startswith("weights.")]
        grads = torch.autograd.grad((out * coefficients).sum(), [live[n] for n in names], allow_unused=True)
        return out.detach(), {n: torch.zeros_like(live[n]) if g is None else g for n, g in zip(names, grads, strict=True)}

    coefficients = torch.randn(len(t["attend.q"]), t["attend.v"].shape[1])
    out, grads = run_one(sample, t, coefficients)
    node, first = 0, 0
    for net in networks:
        for copy in range(net.copies):
            rows, one = slice(node, node + net.num_nodes + sample.token), slice(copy, copy + 1)
            own = {n: v[rows] if n in nodes else v for n, v in t.items() if not n.startswith("weights.")}
            own |= {f"weights.{k}": t[f"weights.{first + k}"][one] for k in range(len(net.blocks))}
            alone, found = run_one(replace(sample, networks=(replace(net, copies=1),)), own, coefficients[rows])
            wanted = {n: grads[n][rows] for n in nodes} | {
                f"weights.{k}": grads[f"weights.{first + k}"][one] for k in range(len(net.blocks))
            }
            assert_bitwise({"out": alone, **found}, {"out": out[rows], **wanted})
            node = rows.stop
        first += len(net.blocks)


POISONED = (
    PLAIN,
    PLAIN.but("loops", networks=(LOOPS, HOLES), over="edges"),
    PLAIN.but("token", token=True, over="in", restrict=0, memory=("virtual", None), closed=True),
    PLAIN.but("packed", packed=True, networks=UNEQUAL, over="out", include_self=False),
    PLAIN.but("reads-nothing", networks=(HOLES,), over="in", include_self=False, restrict=1),
    PLAIN.but("as-they-are", add=False, multiply=False, norm=(False, False), residual=(False, True)),
)


@pytest.mark.parametrize("sample", **named(POISONED))
def test_every_entry_is_written(sample: PairSample, backend: str, poisoned):  # noqa: F811
    t = cast(leaves(sample), torch.float32)
    found = run_engine(sample, t, backend)
    assert all(v.isfinite().all() for v in found.values()), [n for n, v in found.items() if not v.isfinite().all()]
    torch.use_deterministic_algorithms(False)
    assert_bitwise(found, run_engine(sample, t, backend))


@pytest.mark.parametrize("sample", **named(POISONED))
def test_nothing_is_left_of_an_earlier_call(sample: PairSample):
    """The kernels keep their working memory from call to call. A larger call that fills it with NaN goes before."""
    t, dirt = cast(leaves(sample), torch.float32), PLAIN.but("dirt", networks=(mlp(40, 50, 40),), width=40, hidden=40, dk=20, dv=20)
    wanted = run_engine(sample, t, "cpp")
    run_engine(dirt, {name: torch.full_like(v, torch.nan) for name, v in cast(leaves(dirt), torch.float32).items()}, "cpp")
    assert_bitwise(run_engine(sample, t, "cpp"), wanted)


# ---- symmetry ----
@settings(max_examples=12, deadline=None, database=None)
@given(seed=st.integers(0, 10**6), over=st.sampled_from(("all", "edges", "in", "out")), token=st.booleans(), both=st.booleans())
@pytest.mark.parametrize("backend", DECLARED)
def test_equivariant_under_permutations_of_hidden_neurons(seed: int, over: str, token: bool, both: bool, backend: str):
    layout = (2, 5, 4, 3)
    sample = PLAIN.but("permuted", networks=(mlp(*layout),), over=over, token=token, reciprocal=both, encoder="fourier")
    t = leaves(sample, seed)
    g = torch.Generator().manual_seed(seed)
    orders = [torch.arange(d) if k in (0, 3) else torch.randperm(d, generator=g) for k, d in enumerate(layout)]
    starts = [token + sum(layout[:k]) for k in range(len(layout))]
    rows = torch.cat([torch.arange(int(token)), *(start + o for start, o in zip(starts, orders))])
    moved = {
        name: v[rows] if len(v) == len(rows) and name.startswith(("x", "attend.q", "attend.k", "attend.v")) else v for name, v in t.items()
    }
    moved |= {f"weights.{k}": t[f"weights.{k}"][:, orders[k]][:, :, orders[k + 1]] for k in range(3)}
    with ngk.use_backend(backend):
        out, wanted = engine(sample, moved)[0], engine(sample, t)[0][rows]
    assert_close({"out": out}, {"out": wanted}, 1e-12)


# ---- dropout ----
def dropped(sample: PairSample, t: Tensors, backend: str, **options) -> torch.Tensor:
    with ngk.use_backend(backend):
        return attend(sample, t, pair_state(sample, t), **options)


@pytest.mark.parametrize("seed", [0, 7, 2**40 + 3, -5])
@pytest.mark.parametrize("sample", **named((PLAIN, PLAIN.but("edges", over="edges", token=True, networks=REVERSED))))
def test_dropout_has_the_same_mask_on_every_backend(sample: PairSample, seed: int):
    t = leaves(sample)
    found = {b: run(lambda live, b=b: [dropped(sample, live, b, dropout=0.5, seed=seed)], t) for b in DECLARED}
    for result in found.values():
        assert_close(result, found[DECLARED[0]], 1e-10)
    assert not torch.equal(found[DECLARED[0]]["out.0"], dropped(sample, t, DECLARED[0], dropout=0.5, seed=seed + 1))


def counted(sample: PairSample, t: Tensors, backend: str, rate: float, seed: int) -> torch.Tensor:
    """[N, N, heads] what each weight is multiplied with: the values tell the sources apart, all logits are equal."""
    n, zero = len(t["attend.q"]), torch.zeros_like(t["attend.q"])
    e = pair_state(sample, t)
    columns = [torch.eye(n, dtype=torch.float64).repeat(1, sample.heads)]
    with ngk.use_backend(backend):
        out = ngk.attend(
            e, zero, zero, columns[0], t["attend.weight_q"] * 0, t["attend.weight_k"] * 0, None, None, sample.heads, None, "all", rate, seed
        )
    return out.unflatten(1, (sample.heads, n)).transpose(1, 2) * n


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_mean(rate: float, backend: str):
    """Weights are 0 or 1 / (1 - rate), as often as they should be, head by head and row by row."""
    sample = PLAIN.but("many", networks=(mlp(3, 40, 20),), heads=3, width=2, hidden=2)
    kept = counted(sample, leaves(sample), backend, rate, 3)
    alive = kept > 0
    torch.testing.assert_close(kept[alive], torch.full_like(kept[alive], 1 / (1 - rate)), rtol=1e-12, atol=0)
    share = alive.double()
    spread = (rate * (1 - rate)) ** 0.5
    for part, count in (
        (share.mean(), 63 * 63 * 3),
        (share.mean((0, 1)), 63 * 63),
        (share.mean((1, 2)), 63 * 3),
        (share.mean((0, 2)), 63 * 3),
    ):
        assert (part - (1 - rate)).abs().max() < 4.5 * spread / count**0.5
    heads = share - share.mean()
    assert (heads[..., 0] * heads[..., 1]).mean().abs() < 5 * spread**2 / 63  # heads and the two directions are independent
    assert (heads[..., 0] * heads[..., 0].T).triu(1).sum().abs() < 5 * spread**2 * 63


def test_no_dropout_is_exact(backend: str):
    t = leaves(PLAIN)
    assert torch.equal(dropped(PLAIN, t, backend, dropout=0.0, seed=5), dropped(PLAIN, t, backend))

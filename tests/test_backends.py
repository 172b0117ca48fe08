"""Which backend runs, how one is forced, every instruction set, and weights that are not finite."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from compare import assert_bitwise, assert_budget, assert_close
from conftest import DECLARED
from sample_list import ENCODERS, FOURIER, GRAPHS, LOW_PRECISION, MEMORY, MESSAGES, PLAIN, REDUCTIONS, SIZES, TABLES
from samples import Sample, cast, coefficients, device_of, engine, float32_oracle, float64_oracle, leaves, named, run_engine, run_oracle

import ngkernels as ngk
from ngkernels import backends

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parent.parent
ISAS = ("scalar", "avx2", "avx512", "avx512_bf16")
REASON = {name: reason for name in backends.BACKENDS if (reason := backends.why_not(name, torch.device("cpu")))}  # of what cannot run here


# ---- instruction sets ----
def runnable(isa: str) -> bool:
    """What the library itself says of this processor."""
    if backends.why_not("cpp") is not None:
        return False
    try:
        torch.ops.ngkernels_C.set_isa(isa)
    except RuntimeError as error:
        if "does not run" not in str(error):
            raise
        return False
    torch.ops.ngkernels_C.set_isa("")
    return True


RUNNABLE = tuple(isa for isa in ISAS if "cpp" in DECLARED and runnable(isa))


@pytest.fixture(params=RUNNABLE)
def isa(request: pytest.FixtureRequest):
    """An instruction set of this processor, forced; those it lacks are not in the list (test_the_processors_sets_are_run says which)."""
    torch.ops.ngkernels_C.set_isa(request.param)
    yield request.param
    torch.ops.ngkernels_C.set_isa("")


@pytest.mark.skipif("cpp" not in DECLARED, reason="this run does not declare the cpp backend")
def test_the_processors_sets_are_run(record_property):
    """By what the system says of the processor, and not only by what the library says of it."""
    assert "scalar" in RUNNABLE
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    needs = {
        "avx2": {"avx2", "fma"},
        "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
        "avx512_bf16": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"},
    }
    for name, required in needs.items():
        assert (name in RUNNABLE) == required.issubset(flags), f"{name}: runnable here: {RUNNABLE}"
    record_property("instruction sets not runnable on this machine", ", ".join(set(ISAS) - set(RUNNABLE)) or "none")


@pytest.mark.skipif("cpp" not in DECLARED, reason="this run does not declare the cpp backend")
def test_unknown_instruction_sets_are_refused():
    with pytest.raises(RuntimeError, match="this processor does not run sse9"):
        torch.ops.ngkernels_C.set_isa("sse9")
    assert backends.isa() in RUNNABLE


BY_ISA = (PLAIN, *REDUCTIONS[::4], *MESSAGES[::3], *FOURIER[::3], *TABLES[::3], *ENCODERS[::4], *GRAPHS[::5], *SIZES, *MEMORY[::5])


@pytest.mark.parametrize("sample", **named(BY_ISA))
def test_every_instruction_set_in_float64(sample: Sample, isa: str):
    assert backends.isa() == isa
    assert_close(run_engine(sample, leaves(sample), "cpp"), float64_oracle(sample), 1e-10)


@pytest.mark.parametrize("sample", **named(BY_ISA))
def test_every_instruction_set_in_float32(sample: Sample, isa: str):
    wanted, plain = float32_oracle(sample)
    assert_budget(run_engine(sample, cast(leaves(sample), torch.float32), "cpp"), wanted, plain, 8e-6)


@pytest.mark.parametrize("sample", **named(LOW_PRECISION))
def test_every_instruction_set_with_bfloat16_operands(sample: Sample, isa: str):
    t = cast(leaves(sample), torch.float32)
    wanted, plain = run_oracle(sample, cast(t, torch.float64)), run_oracle(sample, t, low=True)
    found = run_engine(sample, t, "cpp", autocast=torch.bfloat16)
    assert_budget(found, wanted, plain, 2**-8)
    without = run_engine(sample, t, "cpp")
    assert torch.equal(found["out.0"], without["out.0"]) == (isa != "avx512_bf16"), (
        "bfloat16 operands are used where, and only where, they are forced"
    )


@pytest.mark.parametrize("reduce", [("min",), ("max",)], ids=["min", "max"])
@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16"])
def test_every_instruction_set_evaluates_again_bitwise(reduce, low: bool, isa: str):
    sample = PLAIN.but("again", networks=GRAPHS[0].networks, reduce=reduce, head=0, features=19, width=21, hidden=37)
    t = cast(leaves(sample), torch.float32)
    t["message.edge.bias"].requires_grad_()
    with ngk.use_backend("cpp"):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            (out,) = engine(sample, t)
        (grad,) = torch.autograd.grad(out.sum(), t["message.edge.bias"])
    reached = 2 * 14  # both copies, every node but the inputs
    assert grad[sample.features :].tolist() == [reached] * sample.features


# ---- forcing a backend ----
def chosen(op: str = "aggregate") -> str:
    return backends.BACKENDS[backends.choose(op, torch.device("cpu"))]


def test_the_fastest_available_backend_is_chosen():
    expected = "cpp" if backends.why_not("cpp") is None else "reference"
    assert {chosen(op) for op in backends.OPS} == {expected}


def test_contexts_nest_and_end_with_an_error():
    default = chosen()
    with ngk.use_backend("reference"):
        assert chosen() == "reference"
        with ngk.use_backend("triton"):
            with pytest.raises(NotImplementedError):
                chosen()
        assert chosen() == "reference"
    with pytest.raises(KeyError), ngk.use_backend("reference"):
        raise KeyError
    assert chosen() == default


def test_a_forced_backend_holds_in_every_thread():
    seen = []
    with ngk.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(chosen()))
        thread.start()
        thread.join()
    assert seen == ["reference"]


@pytest.mark.parametrize("other", ["reference", "cpp"])
def test_backward_runs_where_forward_ran(other: str, backend: str):
    """A loss made under use_backend and differentiated outside of it, or inside another: the extremes must meet their own messages."""
    sample = PLAIN.but("outside", memory=("virtual", None))
    if other not in DECLARED:
        pytest.skip(f"this run does not declare {other}")
    t = cast(leaves(sample), torch.float32)
    wanted = run_engine(sample, t, backend)
    live = {name: v.clone().requires_grad_() for name, v in t.items()}
    with ngk.use_backend(backend):
        out = engine(sample, live)
    with ngk.use_backend(other):
        loss = sum((o * c).sum() for o, c in zip(out, coefficients(out), strict=True))
        grads = torch.autograd.grad(loss, list(live.values()))
    assert_bitwise({f"grad.{n}": g for n, g in zip(live, grads, strict=True)}, {n: v for n, v in wanted.items() if n.startswith("grad.")})


@pytest.mark.parametrize("name", ["", "CPP", "numpy", None])
def test_unknown_backends_are_refused(name):
    with pytest.raises(ValueError, match=f"use_backend: expected one of reference, cpp, triton, cuda, got {name!r}"), ngk.use_backend(name):
        pass


@pytest.mark.parametrize("name", sorted(REASON))
def test_an_unavailable_backend_lists_the_reasons_of_all(name: str):
    text = f"backend '{name}' was forced but {re.escape(REASON[name])}.*reference: runs; cpp: .*; triton: .*; cuda: "
    with ngk.use_backend(name):
        for call in (
            lambda: engine(PLAIN.but("a", head=0), leaves(PLAIN)),
            lambda: engine(PLAIN.but("r", reduce=()), leaves(PLAIN)),
            lambda: engine(MEMORY[1], leaves(MEMORY[1])),
        ):
            with pytest.raises(NotImplementedError, match=text):
                call()


def test_availability_names_every_op_and_backend():
    table = backends.availability()
    assert set(table) == set(backends.OPS) and all(set(row) == set(backends.BACKENDS) for row in table.values())
    assert all(row["reference"] is None for row in table.values())
    assert all(len({row[name] for row in table.values()}) == 1 for name in ("triton", "cuda"))


@pytest.mark.parametrize(("capability", "runs"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_triton_needs_a_gpu_that_it_compiles_for(capability: tuple[int, int], runs: bool, monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed, and this run does not declare its backend")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    reason = backends.why_not("triton", torch.device("cuda"))
    assert reason is None if runs else "it needs compute capability 8.0 or newer, the device has 7.5" in reason
    assert "it runs on cuda tensors" in backends.why_not("triton", torch.device("cpu"))


@pytest.mark.parametrize(("setting", "wanted"), [
    ("pass", False), ("torch.set_float32_matmul_precision('high')", True), ("matmul.allow_tf32 = True", True),
    ("matmul.fp32_precision = 'tf32'", True), ("matmul.fp32_precision = 'ieee'", False), ("torch.backends.fp32_precision = 'tf32'", True),
])  # fmt: skip
def test_tf32_is_read_however_it_was_asked_for(setting: str, wanted: bool):
    """In a process of its own: PyTorch does not read settings of both kinds back."""
    code = f"import torch\nfrom ngkernels import backends\nmatmul = torch.backends.cuda.matmul\n{setting}\nprint(backends.tf32())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.stdout.strip() == str(wanted), done.stderr


def test_without_triton_the_reason_is_kept(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "Triton is not there" in backends.why_not("triton") and "pip install triton" in backends.why_not("triton", torch.device("cuda"))


STEP = """
import os, torch, ngkernels as ngk
from ngkernels import backends
torch.set_default_device(os.environ.get("STEP_DEVICE", "cpu"))
x = torch.ones(5, 2)
print(backends.BACKENDS[backends.choose("aggregate", x.device)])
e = ngk.EdgeState(ngk.NeuralGraph.mlp([2, 3]), [torch.ones(1, 2, 3, 1)], ngk.encoders.Identity())
print(ngk.aggregate(e, ngk.Message.concat(x, torch.ones(2, 1), None, torch.eye(2), torch.eye(2)))[4, 0].tolist())
"""


def in_a_process(**environment: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k != "NGKERNELS_BACKEND"}
    return subprocess.run(
        [sys.executable, "-c", STEP], cwd=ROOT, env={**env, "PYTHONPATH": str(ROOT), **environment}, capture_output=True, text=True
    )


@pytest.mark.parametrize("backend", DECLARED)
def test_the_environment_forces_a_backend(backend: str):
    done = in_a_process(NGKERNELS_BACKEND=backend, STEP_DEVICE=device_of(backend))
    assert done.stdout.splitlines() == [backend, "[6.0, 6.0]"], done.stderr


def test_the_environment_never_falls_back():
    done = in_a_process(NGKERNELS_BACKEND="cuda")
    assert done.returncode and "NotImplementedError: aggregate: backend 'cuda' was forced but" in done.stderr
    done = in_a_process(NGKERNELS_BACKEND="fortran")
    assert done.returncode and "ValueError" in done.stderr and "expected one of reference, cpp, triton, cuda, got 'fortran'" in done.stderr


def test_without_the_library_the_reference_runs_and_says_so(monkeypatch):
    """One warning, with the reason; forcing cpp is an error."""
    monkeypatch.setattr(backends, "_loaded", True)
    monkeypatch.setattr(backends, "_load_error", "the C++ library is not there (no such file)")
    monkeypatch.setattr(backends, "_warned", False)
    with pytest.warns(RuntimeWarning, match="ngkernels runs on its reference backend, slowly .*the C.. library is not there"):
        found = engine(PLAIN, leaves(PLAIN))
    assert_close(
        {f"out.{k}": o for k, o in enumerate(found)}, {k: v for k, v in float64_oracle(PLAIN).items() if k.startswith("out.")}, 1e-10
    )
    assert backends.isa() == "none"
    with ngk.use_backend("cpp"), pytest.raises(NotImplementedError, match="backend 'cpp' was forced but the C.. library is not there"):
        engine(PLAIN, leaves(PLAIN))


# ---- weights that are not finite ----
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize(
    "changes",
    [{}, {"encoder": "fourier"}, {"encoder": "fourier", "table": "auto"}, {"encoder": "fourier", "table": "auto", "table_range": 1.0}],
    ids=["linear", "fourier", "table", "table-range"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_weight_that_is_not_finite_stays_with_its_neuron(value: float, changes: dict, dtype: torch.dtype, backend: str):
    """No crash, no hang; its destination shows NaN in every reduction, all others are bitwise what they were."""
    sample = PLAIN.but("nan", head=0, reduce=("sum", "mean", "min", "max", "std", "var"), **{"table_range": None, **changes})
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    t = cast(leaves(sample), compute, dtype)
    clean = run_engine(sample, t, backend)
    t["weights.1"] = t["weights.1"].clone()
    t["weights.1"][0, 2, 1, 0] = value
    found = run_engine(sample, t, backend)
    node = 2 + 5 + 1
    others = [n for n in range(20) if n != node]
    if "table" not in changes or changes.get("table_range"):  # a measured table is another one for another largest weight
        assert torch.equal(found["out.0"][others], clean["out.0"][others])
    assert found["out.0"][others].isfinite().all() and found["grad.weights.0"][1].isfinite().all()
    assert found["out.0"][node].isnan().all(), found["out.0"][node]

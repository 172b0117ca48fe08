"""Every kernel of the Triton backend compiles for every GPU it is meant for, within limits, without such a GPU being there."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections import defaultdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
from addresses import narrow
from aot_features import WANTED
from aot_list import QUICK, SLOW

ROOT = Path(__file__).resolve().parent.parent
HAVE_TRITON = find_spec("triton") is not None
OLD = os.environ.get("NGKERNELS_AOT_PYTHON")  # the Python of another Triton, whose kernels are as right, and spill as they may
RECORD = json.loads((ROOT / "tests" / "triton_resources.json").read_text())
needs_triton = pytest.mark.skipif(not HAVE_TRITON, reason="Triton is not installed, and this run does not declare its backend")

SHARED = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes a program may use
TENSOR_MEMORY = 512  # columns of sm_100; beyond, compilers have been seen to emit empty kernels
# Instructions. The gradient of values that are read as they are has few: Triton 3.6 makes 336 of them.
SMALLEST = {"aggregate_kernel": 200, "evaluate_kernel": 200, "gradient_kernel": 300, "merge_kernel": 60, "project_kernel": 100, "node_gradient_kernel": 100, "fold_kernel": 40, "cells_kernel": 100, "attend_kernel": 400, "softmax_kernel": 60, "delta_kernel": 60,
            "linear_kernel": 300, "moments_kernel": 150, "spread_kernel": 120, "norm_kernel": 100, "row_sums_kernel": 150, "slopes_kernel": 80, "down_kernel": 80, "inputs_kernel": 150, "maps_kernel": 150}  # fmt: skip
# Bytes that a thread may spill. Most variants spill little, attention up to what its registers hold (ngkernels/limits.py); the others are listed
# with what they need, so that a change for the worse shows.
SPILLED, SPILLING = 384, {
    **dict.fromkeys((name for name in QUICK if name.startswith("heads")), 1024),
    "layer-8": 640, "layer-2-double": 448, "channels-9-32": 672, "residual-layers": 704, "width-130-exact": 9216, "width-256": 1408, "messages-of-pairs": 768,
    "attend": 2944, "attend-exact": 4608, "attend-odd": 1024, "attend-sparse": 2560, "attend-dropout": 1024, "attend-edges-table": 1024,
    "attend-layer": 3968, "attend-layer-exact": 3456, "checkpoint-layer": 448,
}  # fmt: skip


def output_of(*command: str) -> list[str]:
    """Lines that a script prints in a process without the interpreter."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(ROOT), str(ROOT / "python"), str(ROOT / "tests"), env.get("PYTHONPATH", "")])
    done = subprocess.run([OLD or sys.executable, *command], cwd=ROOT, env={**env, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()


def compiled(*variants: str) -> list[dict]:
    return [json.loads(line) for line in output_of("tests/aot.py", "--capabilities", *map(str, SHARED), "--", *variants)]


def check(kernel: dict, variant: str) -> None:
    assert kernel["instructions"] >= SMALLEST[kernel["kernel"]], f"a kernel without content: {kernel}"
    assert kernel["shared"] <= SHARED[kernel["capability"]] and kernel["tensor_memory"] <= TENSOR_MEMORY, kernel
    assert not kernel["narrow"], f"addresses of 32 bits: {kernel}"
    assert OLD or kernel["spilled"] <= SPILLING.get(variant, SPILLED), kernel
    if kernel["products"] and "exact" not in variant and "double" not in variant:
        assert kernel["mma"] > 0, f"no matrix instructions: {kernel}"


def check_all(kernels: list[dict], variant: str) -> None:
    mine = [k for k in kernels if variant in k["variants"]]
    assert {k["capability"] for k in mine} == set(SHARED)
    for kernel in mine:
        check(kernel, variant)


@pytest.fixture(scope="module")
def quick() -> list[dict]:
    """What came of the quick variants, all compiled in one go."""
    return compiled("QUICK")


@needs_triton
@pytest.mark.parametrize("variant", QUICK)
def test_quick_variants_compile_for_every_architecture(variant: str, quick: list[dict]):
    check_all(quick, variant)


@needs_triton
@pytest.mark.parametrize("capability", SHARED)
def test_all_that_kernels_are_made_of_is_compiled(capability: int, quick: list[dict]):
    """The quick variants have everything that the list names along each axis of each kernel, and nothing that it does not."""
    found: dict = defaultdict(lambda: defaultdict(set))
    for k in quick:
        if k["capability"] == capability:
            for axis, values in k["features"].items():
                found[k["kernel"]][axis] |= set(values)
    assert {kernel: dict(axes) for kernel, axes in found.items()} == {kernel: {axis: set(v) for axis, v in axes.items()} for kernel, axes in WANTED.items()}


@pytest.fixture(scope="module")
def recorded() -> list[dict]:
    """What came of the launches of the slow variants when they were compiled; those that have changed since are missing."""
    launches = [json.loads(line) for line in output_of("tests/aot.py", "--capabilities", *map(str, SHARED), "--list", "--", "SLOW")]
    rows = [RECORD["kernels"].get(f"{k['fingerprint']} {k['capability']}") for k in launches]
    return [k | ({"missing": True} if row is None else dict(zip(RECORD["columns"], row, strict=True))) for k, row in zip(launches, rows, strict=True)]


@needs_triton
@pytest.mark.skipif(bool(OLD) or (HAVE_TRITON and version("triton") != RECORD["triton"]), reason="kernels were written down for another Triton: make test-full compiles them")
@pytest.mark.parametrize("variant", SLOW)
def test_every_variant_was_compiled_for_every_architecture(variant: str, recorded: list[dict]):
    """All kernels are those that were compiled, within the same limits, and written down (tests/aot.py)."""
    missing = sorted({k["kernel"] for k in recorded if variant in k["variants"] and "missing" in k})
    assert not missing, f"{missing} of {variant} have changed: compile them with python tests/aot.py --record"
    check_all(recorded, variant)


@needs_triton
def test_what_kernels_are_known_by():
    """Their code and that of all that they call, with the numbers that they name; not what is said about it."""
    script = "from aot import code_of; from ngkernels._triton.gradient_kernel import gradient_kernel; print(code_of(gradient_kernel))"
    text = "\n".join(output_of("-c", script))
    assert all(part in text for part in ("def gradient_kernel", "def backpropagate", "def hermite", "NODE_STRIDE = 9", "tl.debug_barrier()"))
    assert "Gradients through the edges of one panel" not in text and "#" not in text


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("variant", SLOW)
def test_every_variant_compiles_for_every_architecture(variant: str):
    check_all(compiled(variant), variant)


@needs_triton
def test_a_step_waits_for_nothing_on_the_host():
    """What a CUDA graph can capture; see tests/capture.py."""
    lines = output_of("tests/capture.py")
    assert len(lines) >= 16 and all(line.endswith(": ok") for line in lines), "\n".join(lines)


def test_nothing_is_added_with_atomics():
    """Sums have one order."""
    calls = [node.attr for path in (ROOT / "ngkernels" / "_triton").glob("*.py") for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]
    assert "load" in calls and "dot" in calls and not [name for name in calls if "atomic" in name]


ROWS = """
  %row = tt.load %lists : !tt.ptr<{type}>
  %wide = arith.constant 70 : {type}
  %at = arith.muli %row, %wide : {type}
  %c = tt.make_range {{end = 16 : i32, start = 0 : i32}} : tensor<16xi32>
  %here = tt.splat %at : {type} -> tensor<16x{type}>
  %p = tt.addptr %base, %here : tensor<16x!tt.ptr<f32>>, tensor<16x{type}>
"""


@pytest.mark.parametrize(("type", "wrong"), [("i32", 1), ("i64", 0)])
def test_addresses_that_32_bits_may_not_hold_are_found(type: str, wrong: int):
    assert len(narrow(ROWS.format(type=type))) == wrong

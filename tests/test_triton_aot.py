"""Every kernel of the Triton backend compiles for every GPU it is meant for, within limits, without such a GPU being there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HAVE_TRITON = find_spec("triton") is not None
pytestmark = pytest.mark.skipif(not HAVE_TRITON, reason="Triton is not installed, and this run does not declare its backend")

SHARED = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes a program may use
TENSOR_MEMORY = 512  # columns of sm_100; beyond, compilers have been seen to emit empty kernels
SMALLEST = {"aggregate_kernel": 300, "evaluate_kernel": 200, "gradient_kernel": 600, "merge_kernel": 60, "project_kernel": 100, "node_gradient_kernel": 100, "fold_kernel": 40, "cells_kernel": 100, "attend_kernel": 400, "softmax_kernel": 60, "delta_kernel": 60,
            "linear_kernel": 300, "moments_kernel": 150, "spread_kernel": 120, "norm_kernel": 100, "row_sums_kernel": 150, "slopes_kernel": 80, "down_kernel": 80, "inputs_kernel": 150, "maps_kernel": 150}  # fmt: skip
# Bytes that a thread may spill. Most variants spill little; the others are listed with what they need, so that a change for the worse shows.
SPILLED, SPILLING = 384, {
    "layer-8": 640, "layer-2-double": 448, "channels-9": 672, "residual-layers": 704, "width-130-exact": 9216, "width-256": 1408, "messages-of-pairs": 768,
    "attend": 2816, "attend-exact": 4608, "attend-odd": 1024, "attend-sparse": 2560, "attend-dropout": 1024, "attend-edges-table": 1024,
}  # fmt: skip
QUICK = ("layer-1", "layer-2", "readout", "nodes-segments", "attend-small")  # a minute together


def output_of(*command: str) -> list[str]:
    """Lines that a script prints in a process without the interpreter."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(ROOT), str(ROOT / "python"), str(ROOT / "tests"), env.get("PYTHONPATH", "")])
    python = os.environ.get("NGKERNELS_AOT_PYTHON", sys.executable)  # that of another Triton
    done = subprocess.run([python, *command], cwd=ROOT, env={**env, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()


def compiled(variant: str, *capabilities: int) -> list[dict]:
    return [json.loads(line) for line in output_of("tests/aot.py", variant, *map(str, capabilities))]


def check(variant: str, *capabilities: int) -> None:
    kernels = compiled(variant, *capabilities)
    main = "evaluate_kernel" if variant.startswith("readout") else "attend_kernel" if variant.startswith("attend") else "aggregate_kernel"
    wanted = {"linear_kernel", "inputs_kernel", "maps_kernel", "down_kernel"} if variant.startswith("nodes") else {main, "gradient_kernel", "fold_kernel"}
    for capability in capabilities:
        assert wanted <= {k["kernel"] for k in kernels if k["capability"] == capability}
    for k in kernels:
        assert k["instructions"] >= SMALLEST[k["kernel"]], f"a kernel without content: {k}"
        assert k["shared"] <= SHARED[k["capability"]] and k["tensor_memory"] <= TENSOR_MEMORY, k
        assert k["spilled"] <= SPILLING.get(variant, SPILLED), k
        if k["products"] and "exact" not in variant and "double" not in variant:
            assert k["mma"] > 0, f"no matrix instructions: {k}"


def variants() -> list:
    if not HAVE_TRITON:
        return []
    names = [line.split('"')[1] for line in (ROOT / "tests" / "aot.py").read_text().splitlines() if line.startswith('    "') and ": Variant(" in line]
    assert set(QUICK) | set(SPILLING) <= set(names)
    return names


@pytest.mark.parametrize("variant", QUICK)
def test_kernels_compile_for_hopper(variant: str):
    check(variant, 90)


@pytest.mark.slow
@pytest.mark.parametrize("variant", variants())
def test_every_variant_compiles_for_every_architecture(variant: str):
    check(variant, *SHARED)


def test_a_step_waits_for_nothing_on_the_host():
    """What a CUDA graph can capture; see tests/capture.py."""
    lines = output_of("tests/capture.py")
    assert len(lines) >= 15 and all(line.endswith(": ok") for line in lines), "\n".join(lines)

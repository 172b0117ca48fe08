"""Ceilings of a GPU: what binds, what is counted; the kernels that measure them compile."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from benchmarks.cases import Case

gpu_rates = pytest.importorskip("benchmarks.gpu_rates", reason="Triton is not installed")


def test_the_largest_of_the_least_times_binds():
    needed, rates = {"mma": 10.0, "fp32": 4.0, "special": 1.0, "memory": 6.0}, {"mma": 10.0, "fp32": 2.0, "special": 1.0, "memory": 6.0}
    assert gpu_rates.share(needed, rates, 8.0) == ("fp32", 0.25)


def test_what_a_step_needs_grows_with_its_edges():
    small, large = (gpu_rates.needed_by_nggnn(Case.parse(text)) for text in ("2x32x32x3@1", "2x32x32x3@8"))
    assert all(large[name] == 8 * small[name] > 0 for name in ("mma", "fp32", "special", "memory"))
    case = Case.parse("2x32x32x3@1")
    assert small["special"] == 32 * 4 * (case.edges * (1 + 2) + case.last_edges * 3)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from benchmarks import gpu_rates as g
for kernel, name, value, wanted in ((g.mma_kernel, "TF32", False, "mma.sync"), (g.mma_kernel, "TF32", True, "mma.sync"), (g.lane_kernel, "SPECIAL", False, "fma.rn.f32"), (g.lane_kernel, "SPECIAL", True, "ex2.approx")):
    source = ASTSource(kernel, {"out": "*fp32", "a": "*fp32", name: "constexpr"}, constexprs={name: value})
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1 if name == "TF32" else 4}).asm["ptx"]
    print(ptx.count(wanted))
"""


def test_the_kernels_are_made_of_what_they_measure():
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # a jit function needs its source: the script only calls what lies in a file
    done = subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(int(line) >= 4 for line in done.stdout.split()), done.stdout

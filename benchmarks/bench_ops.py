"""Timings of single ops with pytest-benchmark: `pytest benchmarks --benchmark-only`.

Every op on every backend, forward and forward with backward, on edge states that are 0 and 2 updates old. Each is first compared
with the reference backend in float64. `extra_info` of --benchmark-json holds edges, FLOPs and the share of the measured GEMM rate.
"""

from __future__ import annotations

import pytest
import torch

import ngkernels as ngk
from benchmarks import machine, ops
from benchmarks.cases import Case

CASES = ("2x32x32x1@64", "2x128x256x3")
BACKENDS = ("cpp", "reference")
TOLERANCE = 1e-3  # in the 2-norm; one min or max that goes to another edge is about 1e-4


@pytest.fixture(scope="module")
def gemm_rate() -> float:
    return machine.gemm_rate(torch.float32, (512, 1024))


def close(found: list, true: list) -> bool:
    """Whether results agree with the float64 ones in the 2-norm."""
    pairs = [(f.double().flatten(), t.flatten()) for f, t in zip(found, true, strict=True) if t is not None]
    mine, exact = (torch.cat(part) for part in zip(*pairs))
    return ((mine - exact).norm() / exact.norm()).item() < TOLERANCE


@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("op", list(ops.OPS))
@pytest.mark.parametrize("backend", BACKENDS)
def bench_op(benchmark, gemm_rate, backend, op, case, depth, direction):
    call, parsed = getattr(ops, direction), Case.parse(case)
    reason = ngk.backends.why_not(backend)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    with ngk.use_backend("reference"):
        true = call(op, ops.Sample(parsed, depth, torch.float64))
    sample = ops.Sample(parsed, depth)
    with ngk.use_backend(backend):
        assert close(call(op, sample), true), f"{op} on {backend} differs from the reference in float64; not timed"
        benchmark.group = f"{op} {case} depth {depth} {direction}"
        benchmark(call, op, sample)
    count = parsed.edges * ops.flops(op, depth, direction == "forward_backward")
    benchmark.extra_info |= {"edges": parsed.edges, "flops": count, "threads": torch.get_num_threads(), "git": machine.git_sha()}
    if benchmark.stats is not None:
        benchmark.extra_info["share_of_gemm_rate"] = count / gemm_rate / benchmark.stats.stats.median

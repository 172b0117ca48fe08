"""The machine: its name, the versions on it, and the rates that the roofline is made of, measured and not looked up."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from neural_graphs.report.machine import device, git_sha, slug, versions

__all__ = ["ROOT", "copy_rate", "device", "gemm_rate", "git_sha", "rates", "slug", "versions"]

ROOT = Path(__file__).resolve().parent.parent


def _best(call, repeat: int) -> float:
    """Shortest of `repeat` calls, after one to warm up: a rate is what the machine can do."""
    call()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def gemm_rate(dtype: torch.dtype, sizes: tuple[int, ...] = (512, 1024, 2048), repeat: int = 5) -> float:
    """FLOP per second of the fastest square matrix product, with the current number of threads."""
    rate = 0.0
    for n in sizes:
        a, b, out = (torch.randn(n, n).to(dtype) for _ in range(3))
        rate = max(rate, 2 * n**3 / _best(lambda: torch.mm(a, b, out=out), repeat))  # noqa: B023
    return rate


def copy_rate(mebibytes: int = 256, repeat: int = 5) -> float:
    """Bytes per second, read and written, of a copy that no cache holds."""
    source = torch.zeros(mebibytes * 2**20 // 4)
    target = torch.zeros_like(source)
    return 2 * source.numel() * 4 / _best(lambda: target.copy_(source), repeat)


def rates(dtypes: list[str], quick: bool = False) -> dict[str, float]:
    """Measured ceilings with the current number of threads: `gemm_fp32`, `gemm_bf16` in FLOP/s, `copy` in bytes/s."""
    repeat = 3 if quick else 7
    found = {"copy": copy_rate(repeat=repeat), "gemm_fp32": gemm_rate(torch.float32, repeat=repeat)}
    if "bf16" in dtypes:
        found["gemm_bf16"] = max(gemm_rate(torch.bfloat16, repeat=repeat), found["gemm_fp32"])
    return found

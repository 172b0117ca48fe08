"""The machine: its name, the versions on it, and the rates that the roofline is made of, measured and not looked up."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from functools import cache
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def cpu_fields() -> dict[str, str]:
    """The first processor's fields of /proc/cpuinfo; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0]
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def cpu_model() -> str:
    return cpu_fields().get("model name") or platform.processor() or platform.machine()


def slug(model: str) -> str:
    """A folder name for a processor: `Intel(R) Xeon(R) Processor` -> `intel-xeon-processor`."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)|@.*", "", model.lower())).strip("-") or "unknown"


@cache
def device() -> dict:
    """What a record says of the machine."""
    fields = cpu_fields()
    isa = [
        f
        for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve")
        if f in (fields.get("flags", "") + " " + fields.get("Features", "")).split()
    ]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "slug": slug(cpu_model()),
        "model": cpu_model(),
        "family": fields.get("cpu family"),
        "model_number": fields.get("model"),
        "cores": os.cpu_count(),
        "memory_bytes": memory,
        "isa": isa,
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
    }


@cache
def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("torch_geometric", "ngkernels"):
        try:
            found[name] = __import__(name).__version__
        except Exception as error:  # a broken installation is worth recording, not worth stopping for
            found[name] = f"not importable: {type(error).__name__}"
    return found


@cache
def git_sha() -> str:
    """The commit, with `+` where the working tree differs from it; `none` outside a repository."""

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    sha = git("rev-parse", "HEAD")
    return (sha + ("+" if git("status", "--porcelain") else "")) or "none"


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

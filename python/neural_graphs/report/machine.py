"""The machine that measurements are taken on: its processor, the versions on it, the commit."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from functools import cache
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent


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
    """The commit, with `+` where the working tree differs from it; `none` for an installed package or without git."""

    def git(*args: str) -> str:
        try:
            done = subprocess.run(["git", *args], cwd=HERE, capture_output=True, text=True, check=False)
        except OSError:
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    if not git("ls-files", "--error-unmatch", Path(__file__).name):  # somebody else's repository around an installation
        return "none"
    sha = git("rev-parse", "HEAD")
    return (sha + ("+" if git("status", "--porcelain") else "")) or "none"

"""The CUDA kernels for the emulated GPU, compiled once for a run of the tests."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ("-std=c++17", "-O1", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared")


def compiler() -> list[str]:
    """The C++ compiler's command; empty without one."""
    return shlex.split(os.environ.get("CXX", "")) or [name for name in ("c++", "g++", "clang++") if shutil.which(name)][:1]


def compile_emulation(csrc: Path, target: Path) -> Path:
    command = [*compiler(), *FLAGS, str(csrc / "cuda" / "emulated.cpp"), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return target


@lru_cache
def library() -> Path:
    folder = tempfile.TemporaryDirectory()
    _kept.append(folder)
    return compile_emulation(ROOT / "csrc", Path(folder.name) / "emulation.so")


_kept: list[tempfile.TemporaryDirectory] = []

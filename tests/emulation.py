"""The CUDA kernels for the emulated GPU, compiled once for a run of the tests."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import pytest

from ngkernels import backends

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


@pytest.fixture
def emulated() -> Iterator[None]:
    with backends.emulate_cuda(library()):
        yield


def check_bug(folder: Path, file: str, old: str, new: str, passes: Callable[[Path], bool]) -> None:
    """A copy of csrc/ in `folder`, with `old` replaced in csrc/cuda/`file`, does not pass."""
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    path = folder / "csrc" / "cuda" / file
    assert path.read_text().count(old) == 1, f"{file} has changed: renew this bug"
    path.write_text(path.read_text().replace(old, new))
    mutant = compile_emulation(folder / "csrc", folder / "mutant.so")
    child = os.fork()  # a bug may end its process, which is to notice it too
    if not child:
        os._exit(0 if passes(mutant) else 1)
    assert os.waitpid(child, 0)[1] != 0, "nobody noticed"


BACKWARDS, AHEAD = 1, 2  # orders of the threads of a block: the opposite one; each warp as far as it can go before the next one


@contextlib.contextmanager
def order(of: int) -> Iterator[None]:
    backends.emulated().ngk_cuda_order(of)
    try:
        yield
    finally:
        backends.emulated().ngk_cuda_order(0)

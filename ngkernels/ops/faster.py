"""Which of the two GPU backends runs a class of expressions, where none is forced: Triton, unless the CUDA kernels measured faster.

`python -m ngkernels.tune` measures both and writes the file that is read here, once for a process: NGKERNELS_FASTER, else in the user's
cache folder, else the table below. `use_backend` and NGKERNELS_BACKEND override it.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

from .. import backends, measured
from . import _cuda, _triton
from . import expression as ex

FIELDS = ("capability", "purpose", "columns", "exact", "backend")  # of a record of the file
COLUMNS = (16, 32, 64)  # classes: widest registers, up to; wider ones stay with Triton
CHANNELS = 8  # most of raw features


class Shape(NamedTuple):
    """A class of expressions: what its CUDA kernel is for ("messages", "options", "attend"), columns of its registers, exact products."""

    purpose: str
    columns: int
    exact: bool


# By compute capability, the backend that measured faster. No device has been measured yet.
MEASURED: dict[tuple[int, int], dict[Shape, str]] = {}


def path() -> Path:
    return measured.path("NGKERNELS_FASTER", "faster.json")


def _entry(purpose: str, columns: int, exact: bool, backend: str) -> tuple[Shape, str]:
    if columns not in COLUMNS or backend not in ("triton", "cuda"):
        raise ValueError(f"{columns} columns and backend {backend!r}")
    return Shape(purpose, columns, exact), backend


@lru_cache(maxsize=8)
def table(file: Path) -> dict[tuple[int, int], dict[Shape, str]]:
    """The records of a file (ngkernels/measured.py) beside those that are built in, by compute capability."""
    found = measured.read(file, FIELDS, _entry)
    return {c: MEASURED.get(c, {}) | found.get(c, {}) for c in MEASURED.keys() | found.keys()}


def write(file: Path, capability: tuple[int, int], shapes: dict[Shape, str]) -> None:
    """Puts what was measured on one architecture beside what was on others."""
    measured.write(file, FIELDS, capability, [(*shape, backend) for shape, backend in shapes.items()])
    table.cache_clear()


def shape_of(e: ex.E, exact: bool, attention: tuple[int, ...] | None = None) -> Shape | None:
    """The class of an expression, None if the CUDA kernels do not run it or none is measured."""
    from .._cuda import launch, lower, memory

    if e.table.dtype != torch.float32 or any(w.dtype is torch.float64 for w in e.weights):
        return None
    try:
        low = lower.lower(tuple(e.program), tuple(x.shape[1] for x in e.xs), len(e.weights), True, attention and lower.Attention(*attention))
        memory.placed(low, "exact" if exact else "bf16", True, launch.shared_limit(e.table.device))
    except lower.Unsupported:
        return None
    purpose = launch.PURPOSES[2 if low.attention else low.full]
    return Shape(purpose, low.d, exact) if low.d in COLUMNS and low.channels <= CHANNELS else None


def backend(e: ex.E, exact: bool, device: torch.device, attention: tuple[int, ...] | None = None) -> str:
    """"cuda" where it measured faster on this device and runs, else "triton"."""
    known = table(path()).get(measured.capability_of(device))
    if not known or backends.why_not("cuda", device):
        return "triton"
    return known.get(shape_of(e, exact, attention), "triton")


def kernels(e: ex.E, compute: int, attention: tuple[int, ...] | None = None) -> ModuleType | None:
    """The kernels of the GPU backend in `compute` or, where the user forced none, of the faster one; None: it is no GPU's. The same on the
    way back.

    Args:
        attention: of attend, heads, columns of queries and of values, whether values are multiplied and states summed.
    """
    name = ex.backend_of(compute)
    if name == "triton" and compute & ex.FREE:
        name = backend(e, not compute & (ex.LOW | ex.TF32), e.table.device, attention)
    return {"triton": _triton, "cuda": _cuda}.get(name)

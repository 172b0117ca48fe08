"""Sizes of tiles by kind of kernel and architecture: a small table, and what was measured on a device (`python -m ngkernels.tune`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from .. import backends
from .. import program as prog
from ..measured import capability_of, read
from ..measured import write as write_records
from .lower import Lowered

WIDTHS = (32, 64, 128, 1 << 30)  # classes of registers
FIELDS = ("capability", "width", "exact", "paired", "edges", "warps")  # of a record of the file


class Kind(NamedTuple):
    """What the best size of a tile depends on: columns of the widest register, up to; exact products; partners evaluated too."""

    width: int
    exact: bool
    paired: bool


class Size(NamedTuple):
    """Edges of a tile, warps of a program."""

    edges: int
    warps: int


_forced: list[Size] = []


def widest(low: Lowered) -> int:
    """Columns of the widest register; of FiLM's, its scales alone."""
    halved = low.start - 1 if low.combine == prog.FILM else -1
    return max(sum(low.chunks[c][2] for c in range(s.first, s.first + s.count)) // (2 if k == halved else 1) for k, s in enumerate(low.steps))


def kind_of(low: Lowered, precision: str) -> Kind:
    width = widest(low)
    return Kind(next(w for w in WIDTHS if width <= w), precision in ("ieee", "float64"), low.paired)


# Warps of a program by class of registers: with bfloat16 or tf32 products, with exact ones; tiles are of 16 edges. Chosen by what compiles
# to few spilled registers and few instructions an edge on sm_80, sm_90 and sm_100 (tests/aot.py), not by measurements.
WARPS = {32: (2, 2), 64: (4, 8), 128: (8, 8), 1 << 30: (8, 8)}
# What differs on an architecture. sm_80, attention with 64 columns of queries: 128 threads spill 2888 bytes each, with 8 warps 256 of
# them 2216.
DIFFERENT = {((8, 0), Kind(1 << 30, False, True)): Size(16, 4), ((8, 6), Kind(1 << 30, False, True)): Size(16, 4)}


REGISTERS = 1 << 16  # of a multiprocessor, for all threads of a program; a thread has 255 at most


def compiler_options(low: Lowered, precision: str, warps: int, device: torch.device) -> dict[str, object]:
    """What keeps the assembler from spilling where it need not, by what it reports of compiled kernels (bytes of a thread that it spills).

    Left alone, it gives a thread of a kernel with exact products in wide registers 32 of its 255 registers (7800 bytes, then 1944), and one of
    attention with 8 warps on sm_80 128 of them (2056 to 2376, then 1328 to 2280). The one for sm_80 spills half of what it would otherwise,
    or nothing, where optimizations that take registers are off (576 and 280, 1296 and 560, 376 and 16)."""
    options: dict[str, object] = {}
    kind, capability = kind_of(low, precision), capability_of(device)
    ampere = capability is not None and capability[0] == 8
    if kind.width > 64 and kind.exact or kind.paired and warps == 8 and ampere:
        options["maxnreg"] = min(255, REGISTERS // (32 * warps))
    # A documented option of ptxas that selects optimizations and not results. It is a beta: another release may do less with it, and then
    # the limits on spilled bytes in tests/test_triton_aot.py show it.
    if ampere:
        options["ptx_options"] = "--register-usage-level=0"
    return options


def usual(kind: Kind, capability: tuple[int, int] | None = None) -> Size:
    """What the tables say."""
    return DIFFERENT.get((capability, kind)) or Size(16, WARPS[kind.width][kind.exact])


def _entry(width: int, exact: bool, paired: bool, edges: int, warps: int) -> tuple[Kind, Size]:
    if edges not in (16, 32, 64, 128) or warps not in (1, 2, 4, 8, 16):
        raise ValueError(f"{edges} edges and {warps} warps")
    return Kind(width, exact, paired), Size(edges, warps)


@lru_cache(maxsize=8)
def measured(path: Path) -> dict[tuple[int, int], dict[Kind, Size]]:
    """The records of a file, by compute capability (ngkernels/measured.py)."""
    return read(path, FIELDS, _entry)


def write(path: Path, capability: tuple[int, int], sizes: dict[Kind, Size]) -> None:
    """Puts the sizes measured on one architecture beside those of others."""
    write_records(path, FIELDS, capability, [(*kind, *size) for kind, size in sizes.items()])
    measured.cache_clear()


@contextlib.contextmanager
def forced(size: Size) -> Iterator[None]:
    """One size for all kernels inside the context: forward and backward must both be in it."""
    _forced.append(size)
    try:
        yield
    finally:
        _forced.pop()


def size_for(low: Lowered, precision: str, device: torch.device) -> Size:
    """The forced size, else the measured one of this architecture, else what the tables say. Nothing is measured here."""
    if _forced:
        return _forced[-1]
    kind, capability = kind_of(low, precision), capability_of(device)
    known = measured(backends.tiles_path()).get(capability, {}) if capability else {}
    return known.get(kind) or usual(kind, capability)

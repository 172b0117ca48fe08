"""Partial results of tiles, summed at their nodes in the order of the tiles: no atomics, so the same bits every time."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import interpreted, run
from .lower import padded
from .plan import Chunk


@triton.jit(do_not_specialize=["first"])
def fold_kernel(out, partial, segments, ranges, entries, first, COLUMNS: tl.constexpr, SEGMENT: tl.constexpr, P: tl.constexpr):
    """out [keys, COLUMNS] += the partial rows of one segment of nodes, one entry after the other."""
    s = (first + tl.program_id(0)).to(tl.int64)
    row = tl.arange(0, SEGMENT)
    column = tl.program_id(1) * P + tl.arange(0, P)
    used = (column < COLUMNS)[None, :]
    here = out + (tl.load(segments + 2 * s) + row)[:, None] * COLUMNS + column[None, :]
    live = used & (row < tl.load(segments + 2 * s + 1))[:, None]
    total = tl.load(here, mask=live, other=0)
    e, end = tl.load(ranges + s), tl.load(ranges + s + 1)
    while e < end:
        offset = tl.load(entries + e * 4 + 1)
        here_too = (row >= offset) & (row < offset + tl.load(entries + e * 4 + 2))
        total += tl.load(partial + (tl.load(entries + e * 4) - offset + row)[:, None] * COLUMNS + column[None, :], mask=used & here_too[:, None], other=0)
        e += 1
    tl.store(here, total, mask=live)


def fold(out: torch.Tensor, partial: torch.Tensor, tables: tuple[torch.Tensor, ...], chunk: Chunk, columns: int, segment: int) -> None:
    """Adds the partial results of a chunk of tiles to out [keys, columns]."""
    first, last = chunk.segments
    if first == last or not columns:
        return
    p = min(padded(columns), 1024 if interpreted() else 128)
    segments, ranges, entries = tables
    run(fold_kernel, (last - first, triton.cdiv(columns, p)), out, partial, segments, ranges, entries, first, columns, segment, p, num_warps=4)

"""Sums of a tile's edges by destination and by source, and their rows in a program's own memory.

A tile is [BI, BJ] edges, destination by destination. Along "i" its rows are the BI destinations (of a sparse block: lines), along "j" the BJ
sources; a sparse block has a source for every edge.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .evaluator import PADDED, columns, used
from .tiles import OK


@triton.jit
def by_row(x, MAX: tl.constexpr, I_SIDE: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, SPARSE: tl.constexpr):
    """Sums, or with MAX the largest, [rows, P] over the edges [BI BJ, P] of each row."""
    if SPARSE and not I_SIDE:
        return x
    else:
        AXIS: tl.constexpr = 1 if I_SIDE else 0
        x = tl.reshape(x, (BI, BJ, x.shape[1]))
        return tl.max(x, AXIS) if MAX else tl.sum(x, AXIS)


@triton.jit
def by_edge(r, I_SIDE: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, SPARSE: tl.constexpr):
    """What rows [rows, P] hold, edge by edge [BI BJ, P]."""
    if I_SIDE:
        return tl.reshape(tl.broadcast_to(r[:, None, :], (BI, BJ, r.shape[1])), (BI * BJ, r.shape[1]))
    elif SPARSE:
        return r
    else:
        return tl.reshape(tl.broadcast_to(r[None, :, :], (BI, BJ, r.shape[1])), (BI * BJ, r.shape[1]))


@triton.jit
def rows_of(at, first, last, I_SIDE: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, SPARSE: tl.constexpr):
    """(rows, which of them exist) of a tile whose first is `first`, up to `last`."""
    if I_SIDE:
        i = (first + tl.arange(0, BI)).to(tl.int32)
        return i, i < last
    elif SPARSE:
        return (first + tl.arange(0, BI * BJ)).to(tl.int32), at[OK]
    else:
        j = (first + tl.arange(0, BJ)).to(tl.int32)
        return j, j < last


@triton.jit
def add_to(pointers, value, mask):
    tl.store(pointers, tl.load(pointers, mask=mask, other=0) + value, mask=mask)


@triton.jit
def add_rows(partial, x, at, first, last, COLUMN: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr, I_SIDE: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, SPARSE: tl.constexpr):
    """Adds the sums of x [BI BJ, P], chunk CHUNK from column COLUMN on, to the rows of `partial` [*, WIDTH]."""
    rows, mask = rows_of(at, first, last, I_SIDE, BI, BJ, SPARSE)
    here = partial + (rows * WIDTH)[:, None] + (COLUMN + columns(CHUNK))[None, :]
    total = by_row(x, False, I_SIDE, BI, BJ, SPARSE)
    if CHUNK[PADDED] == CHUNK[1]:
        add_to(here, total, tl.broadcast_to(mask[:, None], total.shape))
    else:
        add_to(here, total, mask[:, None] & used(CHUNK)[None, :])

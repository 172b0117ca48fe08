"""The gradient of the encoder's table: every edge adds to the lines of two nodes.

Edges put down their cell, their place in it and the gradient of the curve. They are sorted by cell (stably: the order of the tiles), and
one program sums those of a part of a cell, so the sums have one order and there are no atomics.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .edge_math import curve_weight
from .launch import interpreted, run
from .lower import padded

EDGES = 64  # that a program takes at a time


class Slots(NamedTuple):
    """Places for the edges of a chunk of tiles; cell is -1 where nothing is put down."""

    cell: torch.Tensor  # int32 [slots]
    place: torch.Tensor  # [slots], 0 up to 1
    curve: torch.Tensor  # [slots, n_out]


def slot_bytes(width: int, item: int) -> int:
    """What an edge takes, the sort included."""
    return (width + 1) * item + 4 + 3 * 8


def new_slots(count: int, width: int, like: torch.Tensor) -> Slots:
    return Slots(torch.full((count,), -1, dtype=torch.int32, device=like.device), like.new_empty(count), like.new_empty(count, width))


@triton.jit(do_not_specialize=["parts"])
def cells_kernel(out, order, starts, place, curve, parts, WIDTH: tl.constexpr, P: tl.constexpr, SIZE: tl.constexpr):
    """out [parts, cells, 6, WIDTH]: sums over a part of a cell's edges, for the lines of its lower and its upper node."""
    cell, part = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    column = tl.program_id(2) * P + tl.arange(0, P)
    used = column < WIDTH
    begin, end = tl.load(starts + cell), tl.load(starts + cell + 1)
    share = (end - begin + parts - 1) // parts
    at, last = begin + part * share, tl.minimum(begin + (part + 1) * share, end)
    T: tl.constexpr = curve.dtype.element_ty
    zero = tl.zeros((P,), T)
    a, b, c, d, e, f = zero, zero, zero, zero, zero, zero
    while at < last:
        r = at + tl.arange(0, SIZE)
        edge = tl.load(order + r, mask=r < last, other=0)
        u = tl.load(place + edge, mask=r < last, other=0)[:, None]
        g = tl.load(curve + edge[:, None] * WIDTH + column[None, :], mask=(r < last)[:, None] & used[None, :], other=0)
        a += tl.sum(g * curve_weight(u, 0), 0)
        b += tl.sum(g * curve_weight(u, 1), 0)
        c += tl.sum(g * curve_weight(u, 2), 0)
        d += tl.sum(g * curve_weight(u, 3), 0)
        e += tl.sum(g * curve_weight(u, 4), 0)
        f += tl.sum(g * curve_weight(u, 5), 0)
        at += SIZE
    to = out + ((part * tl.num_programs(0) + cell) * 6) * WIDTH + column
    tl.store(to, a, mask=used)
    tl.store(to + WIDTH, b, mask=used)
    tl.store(to + 2 * WIDTH, c, mask=used)
    tl.store(to + 3 * WIDTH, d, mask=used)
    tl.store(to + 4 * WIDTH, e, mask=used)
    tl.store(to + 5 * WIDTH, f, mask=used)


def add_table_gradient(grad_table: torch.Tensor, slots: Slots) -> None:
    """Adds what the edges put down to the table's gradient [directions, nodes, 3, n_out]."""
    directions, nodes, _, width = grad_table.shape
    cells = directions * nodes
    found, order = slots.cell.sort(stable=True)
    starts = torch.searchsorted(found, torch.arange(cells + 1, dtype=torch.int32, device=found.device))
    parts = 1 if interpreted() else min(16, max(1, 4096 // cells))
    sums = grad_table.new_empty(parts, cells, 6, width)
    p = min(padded(width), 64)
    run(cells_kernel, (cells, parts, triton.cdiv(width, p)), sums, order, starts, slots.place, slots.curve, parts, width, p, EDGES, num_warps=2)
    total = sums.sum(0).view(directions, nodes, 6, width)
    grad_table += total[:, :, :3]
    grad_table[:, 1:] += total[:, :-1, 3:]

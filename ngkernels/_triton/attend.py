"""attend, forward, in Triton: softmax sums of each panel's pairs, merged by destination in the order of the panels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import launch
from .attention import join
from .call import Call
from .evaluator import tile
from .launch import interpreted, run
from .lower import padded
from .plan import ATTEND, Chunk, Cut
from .tiles import RAW, panel, sources, views


class Attending(NamedTuple):
    """What attention reads beside the pairs: q [N, H Dk], k, v [N, H Dv]; scale and dropout; the seed as two signed 32-bit numbers."""

    nodes: tuple[torch.Tensor, ...]
    scale: float
    dropout: float
    seed: tuple[int, int]

    @classmethod
    def of(cls, nodes: Sequence[torch.Tensor], scale: float, dropout: float, seed: int) -> Attending:
        halves = (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)
        return cls(tuple(t.contiguous() for t in nodes), float(scale), float(dropout), tuple(h - (h >> 31 << 32) for h in halves))


@triton.jit(do_not_specialize=["first", "n_nodes", "table_nodes", "seed_low", "seed_high"])
def attend_kernel(
    partial, tiles, blocks, lists, weights, pair_weights, nodes, params, table, q, k, v, seed_low, seed_high, first, n_nodes, table_nodes,
    STEPS: tl.constexpr, LIVE: tl.constexpr, CHUNKS: tl.constexpr, COLUMNS: tl.constexpr, EDGE: tl.constexpr, SHARE: tl.constexpr, SHAPE: tl.constexpr,
    WIDTH: tl.constexpr, SCALE: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, POINTERS: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr,
    SPARSE: tl.constexpr,
):  # fmt: skip
    """Softmax sums of the pairs of one panel, by destination; where partners are evaluated to the end, also by source for them."""
    row, local, copy, i0, j0, i1, j1, rows, _ = panel(tiles, (first + tl.program_id(0)).to(tl.int64), blocks)
    raws = views(weights, pair_weights, row, local, copy, RAW, POINTERS)
    to, seed = partial + rows * WIDTH, (seed_low, seed_high)
    i = i0
    while i < i1:
        j, last = sources(row, i, j0, i1, j1, BI, BJ)
        while j < last:
            at, pair_at, regs, others = tile(row, copy, i, j, i1, last, lists, nodes, n_nodes, params, raws, table, table_nodes, STEPS, LIVE, CHUNKS, COLUMNS, PRECISION, BI, BJ, SPARSE)
            join(to, regs, at, (q, k, v), seed, i - i0, i1 - i0, EDGE, SHARE, SHAPE, WIDTH, SCALE, DROPOUT, False, BI, BJ, SPARSE)
            if LIVE == len(STEPS):
                join(to, others, pair_at, (q, k, v), seed, i1 - i0 + j - j0, i1 - i0 + j1 - j0, EDGE, SHARE, SHAPE, WIDTH, SCALE, DROPOUT, True, BI, BJ, SPARSE)
            tl.debug_barrier()  # the next tile adds to what this one has stored, maybe with other threads
            j += BJ
        i += BI


@triton.jit(do_not_specialize=["first"])
def softmax_kernel(
    target, tops, partial, segments, ranges, entries, first,
    COLUMNS: tl.constexpr, OF_HEAD: tl.constexpr, FROM: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, SEGMENT: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Adds columns FROM on of the partial rows of one segment to target [rows, COLUMNS], one entry after the other, all to the largest
    logits `tops` [rows, HEADS] so far. FROM 0: these themselves, in the end."""
    s = (first + tl.program_id(0)).to(tl.int64)
    row, column = tl.arange(0, SEGMENT), tl.program_id(1) * P + tl.arange(0, P)
    head = (column // OF_HEAD)[None, :]
    key = (tl.load(segments + 2 * s) + row)[:, None]
    live = (column < COLUMNS)[None, :] & (row < tl.load(segments + 2 * s + 1))[:, None]
    top = tl.load(tops + key * HEADS + head, mask=live, other=-float("inf"))
    total = tl.load(target + key * COLUMNS + column[None, :], mask=live, other=0)
    e, end = tl.load(ranges + s), tl.load(ranges + s + 1)
    while e < end:
        offset = tl.load(entries + e * 4 + 1)
        mask = live & ((row >= offset) & (row < offset + tl.load(entries + e * 4 + 2)))[:, None]
        here = partial + (tl.load(entries + e * 4) - offset + row)[:, None] * WIDTH
        more_top = tl.load(here + head, mask=mask, other=-float("inf"))
        new = tl.maximum(top, more_top)
        if FROM > 0:
            base = tl.where(new == -float("inf"), 0, new)
            total = total * tl.exp(top - base) + tl.load(here + (FROM + column)[None, :], mask=mask, other=0) * tl.exp(more_top - base)
        top = new
        e += 1
    tl.store(target + key * COLUMNS + column[None, :], total if FROM > 0 else top, mask=live)


def merge(call: Call, chunk: Chunk, work: Cut, tables, partial: torch.Tensor, totals: torch.Tensor, out: torch.Tensor, sums: torch.Tensor, tops: torch.Tensor) -> None:
    """Merges the partial results of a chunk of tiles into the sums of exponentials, of values and of states, and the largest logits."""
    h, (first, last) = call.low.attention, chunk.segments
    targets = [(totals, 1, h.heads), (out, h.dv, 2 * h.heads), (sums, h.de, (2 + h.dv) * h.heads), (tops, 1, 0)]
    for target, of_head, start in targets:
        n = target[0].numel() if len(target) else 0
        if first == last or not n:
            continue
        p = min(padded(n), 512 if interpreted() else 64)
        run(softmax_kernel, (last - first, triton.cdiv(n, p)), target, tops, partial, *tables, first, n, of_head, start, h.heads, h.width, work.segment, p, num_warps=1)


def forward(call: Call, attending: Attending, out: torch.Tensor, sums: torch.Tensor, lse: torch.Tensor) -> None:
    """Writes out [rows, H Dv], sums [rows, H, De or 0] and the log-sum-exp [rows, H]; zeros for rows that read nothing."""
    low, h = call.low, call.low.attention
    out.zero_()
    sums.zero_()
    lse.fill_(-torch.inf)
    totals = torch.zeros_like(lse)
    work = call.cut(ATTEND)
    row_bytes = h.width * out.element_size()
    tiles, *tables, chunks = work.chunks(row_bytes, 0, 0, 0, max(1, launch.BUDGET))
    nodes = call.project()
    for chunk in chunks:
        partial = out.new_zeros(chunk.partials, h.width)
        partial[:, : h.heads] = -torch.inf
        for number, first, last in chunk.launches:
            group = work.groups[number]
            weights, pair_weights = (call.tensors.pointers(group, "raw", call.params, partner) for partner in (False, True))
            run(
                attend_kernel, (last - first,),
                partial, tiles, call.tensors.table(work, number), call.plan.lists, weights, pair_weights, nodes, call.params, call.table,
                *attending.nodes, *attending.seed, first, call.n_nodes, call.table_nodes, call.steps, low.live(group.both), call.chunks, low.columns,
                low.edge, low.message, call.heads, h.width, attending.scale, attending.dropout, call.precision, len(weights), *group.shape, group.sparse,
                **call.options,
            )  # fmt: skip
        merge(call, chunk, work, tables, partial, totals, out, sums, lse)
    empty = totals == 0
    n = torch.where(empty, 1.0, totals)
    out.view(*n.shape, h.dv).div_(n[..., None])
    sums.div_(n[..., None])
    lse.copy_(torch.where(empty, 0.0, lse + n.log()))


# ---- backward ----
@triton.jit
def delta_kernel(delta, out, grad, sums, grad_sums, rows, HEADS: tl.constexpr, DV: tl.constexpr, DE: tl.constexpr, SIZE: tl.constexpr, P: tl.constexpr):
    """delta [rows, HEADS] = <out, grad> + <sums, grad_sums>, head by head."""
    row, h = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE), tl.program_id(1)
    live, at = (row < rows)[:, None], row * HEADS + h
    total = tl.zeros((SIZE, P), delta.dtype.element_ty)
    for first in range(0, DV, P):
        c = first + tl.arange(0, P)
        place, mask = (at * DV)[:, None] + c[None, :], live & (c < DV)[None, :]
        total += tl.load(out + place, mask=mask, other=0) * tl.load(grad + place, mask=mask, other=0)
    for first in range(0, DE, P):
        c = first + tl.arange(0, P)
        place, mask = (at * DE)[:, None] + c[None, :], live & (c < DE)[None, :]
        total += tl.load(sums + place, mask=mask, other=0) * tl.load(grad_sums + place, mask=mask, other=0)
    tl.store(delta + at, tl.sum(total, 1), mask=row < rows)


def deltas(call: Call, out: torch.Tensor, grad: torch.Tensor, sums: torch.Tensor, grad_sums: torch.Tensor) -> torch.Tensor:
    """What every logit's gradient loses to the softmax's sum, [rows, H]."""
    h = call.low.attention
    delta = out.new_empty(len(out), h.heads)
    if len(out):
        size = 64
        run(delta_kernel, (triton.cdiv(len(out), size), h.heads), delta, out, grad, sums, grad_sums, len(out), h.heads, h.dv, h.summed * h.de, size, 32, num_warps=4)
    return delta

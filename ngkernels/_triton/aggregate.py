"""aggregate, forward, in Triton: statistics of each panel's messages, merged by destination in the order of the panels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .call import Call
from .evaluator import PADDED, columns, tile, used
from .launch import constants, interpreted, run
from .lower import padded
from .messages import (
    MAX,
    MAX_TIES,
    MEAN,
    MEAN_AUX,
    MIN,
    MIN_TIES,
    PLANES,
    RESULTS,
    STD,
    STD_THRESHOLD,
    SUM,
    TIES,
    VAR,
    empty,
    merge,
    message,
    slots_of,
    statistics,
)
from .plan import REDUCE
from .tiles import OK, RAW, panel, sources, views


@triton.jit
def joined(stats, na, regs, ok, count, EDGE: tl.constexpr, QUERY: tl.constexpr, CHUNKS: tl.constexpr, N: tl.constexpr, COMBINE: tl.constexpr, SLOTS: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr):
    """The statistics of all chunks with the messages of one more tile, chunk by chunk."""
    out = ()
    for c in tl.static_range(N):
        m = tl.reshape(message(regs, c, EDGE, QUERY, N, COMBINE), (BI, BJ, CHUNKS[EDGE + c][PADDED]))
        mine = stats[6 * c], stats[6 * c + 1], stats[6 * c + 2], stats[6 * c + 3], stats[6 * c + 4], stats[6 * c + 5]
        out = out + merge(mine, na, statistics(m, ok, count, SLOTS), count, SLOTS)
    return out


@triton.jit
def store_planes(partial, stats, live, WIDTH: tl.constexpr, CHUNK: tl.constexpr, SLOTS: tl.constexpr):
    """Statistics of one chunk, [BI, P] each, to the planes of the partial rows [BI, PLANES, WIDTH]."""
    BI: tl.constexpr = stats[0].shape[0]
    here = partial + (tl.arange(0, BI) * (PLANES * WIDTH))[:, None] + columns(CHUNK)[None, :]
    mask = live[:, None] & used(CHUNK)[None, :]
    tl.store(here, stats[0], mask=mask)
    if SLOTS[STD] >= 0 or SLOTS[VAR] >= 0:
        tl.store(here + WIDTH, stats[1], mask=mask)
    if SLOTS[MIN] >= 0:
        tl.store(here + 2 * WIDTH, stats[2], mask=mask)
        tl.store(here + 3 * WIDTH, stats[3], mask=mask)
    if SLOTS[MAX] >= 0:
        tl.store(here + 4 * WIDTH, stats[4], mask=mask)
        tl.store(here + 5 * WIDTH, stats[5], mask=mask)


@triton.jit(do_not_specialize=["first", "n_nodes", "table_nodes"])
def aggregate_kernel(
    partial, tiles, blocks, lists, weights, pair_weights, nodes, params, table, first, n_nodes, table_nodes,
    STEPS: tl.constexpr, LIVE: tl.constexpr, CHUNKS: tl.constexpr, VALUE: tl.constexpr, COLUMNS: tl.constexpr, EDGE: tl.constexpr, QUERY: tl.constexpr,
    N: tl.constexpr, COMBINE: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr, PRECISION: tl.constexpr, POINTERS: tl.constexpr,
    BI: tl.constexpr, BJ: tl.constexpr, SPARSE: tl.constexpr,
):  # fmt: skip
    """Statistics of the messages of BI destinations from a range of sources."""
    row, local, copy, i0, j0, i1, j1, rows, _ = panel(tiles, (first + tl.program_id(0)).to(tl.int64), blocks)
    raws = views(weights, pair_weights, row, local, copy, RAW, POINTERS)
    T: tl.constexpr = params.dtype.element_ty
    stats = ()
    for c in tl.static_range(N):
        stats = stats + empty(BI, VALUE[c][PADDED], T)
    na = tl.zeros((BI, 1), T)
    j, last = sources(row, i0, j0, i1, j1, BI, BJ)
    while j < last:
        at, _pair_at, regs, _others = tile(row, copy, i0, j, i1, last, lists, nodes, n_nodes, params, raws, table, table_nodes, STEPS, LIVE, CHUNKS, COLUMNS, PRECISION, BI, BJ, SPARSE)
        ok = tl.reshape(at[OK], (BI, BJ))
        count = tl.sum(ok.to(T), 1)[:, None]
        stats = joined(stats, na, regs, ok, count, EDGE, QUERY, CHUNKS, N, COMBINE, SLOTS, BI, BJ)
        na += count
        j += BJ
    for c in tl.static_range(N):
        mine = stats[6 * c], stats[6 * c + 1], stats[6 * c + 2], stats[6 * c + 3], stats[6 * c + 4], stats[6 * c + 5]
        store_planes(partial + rows * (PLANES * WIDTH), mine, i0 + tl.arange(0, BI) < i1, WIDTH, VALUE[c], SLOTS)


@triton.jit
def store_results(out, aux, ties, row, live, stats, n, column, WIDTH: tl.constexpr, SLOTS: tl.constexpr):
    """The reductions of rows [SEGMENT] from the statistics of all their n messages."""
    here = out + (row * (SLOTS[RESULTS] * WIDTH))[:, None] + column[None, :]
    tie = ties + (row * (SLOTS[TIES] * WIDTH))[:, None] + column[None, :]
    spread: tl.constexpr = SLOTS[STD] >= 0 or SLOTS[VAR] >= 0
    bad = stats[0] != stats[0]  # a NaN among the messages stays one
    mean = stats[0] if spread else stats[0] / n
    if SLOTS[SUM] >= 0:
        tl.store(here + SLOTS[SUM] * WIDTH, stats[0] * n if spread else stats[0], mask=live)
    if SLOTS[MEAN] >= 0:
        tl.store(here + SLOTS[MEAN] * WIDTH, mean, mask=live)
    if SLOTS[MEAN_AUX]:
        tl.store(aux + (row * WIDTH)[:, None] + column[None, :], mean, mask=live)
    if spread:
        var = stats[1] / n
        if SLOTS[VAR] >= 0:
            tl.store(here + SLOTS[VAR] * WIDTH, var, mask=live)
        if SLOTS[STD] >= 0:
            tl.store(here + SLOTS[STD] * WIDTH, tl.where(var <= STD_THRESHOLD, 0, tl.sqrt(var)), mask=live)
    if SLOTS[MIN] >= 0:
        tl.store(here + SLOTS[MIN] * WIDTH, tl.where(bad, stats[0], stats[2]), mask=live)
        tl.store(tie + SLOTS[MIN_TIES] * WIDTH, stats[3].to(tl.int32).to(ties.dtype.element_ty), mask=live)
    if SLOTS[MAX] >= 0:
        tl.store(here + SLOTS[MAX] * WIDTH, tl.where(bad, stats[0], stats[4]), mask=live)
        tl.store(tie + SLOTS[MAX_TIES] * WIDTH, stats[5].to(tl.int32).to(ties.dtype.element_ty), mask=live)


@triton.jit
def merge_kernel(out, aux, ties, partial, segments, ranges, entries, WIDTH: tl.constexpr, SLOTS: tl.constexpr, SEGMENT: tl.constexpr, P: tl.constexpr):
    """Merges the statistics of one segment of output rows, one entry after the other, and writes its results."""
    s = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, SEGMENT)
    column = tl.program_id(1) * P + tl.arange(0, P)
    used = (column < WIDTH)[None, :]
    T: tl.constexpr = out.dtype.element_ty
    stats = empty(SEGMENT, P, T)
    n = tl.zeros((SEGMENT, 1), T)
    e, end = tl.load(ranges + s), tl.load(ranges + s + 1)
    while e < end:
        offset = tl.load(entries + e * 4 + 1)
        start, live = tl.load(entries + e * 4) - offset, ((r >= offset) & (r < offset + tl.load(entries + e * 4 + 2)))[:, None]
        more = tl.where(live, tl.load(entries + e * 4 + 3).to(T), 0)
        p = partial + ((start + r) * (PLANES * WIDTH))[:, None] + column[None, :]
        mask = live & used
        first = tl.load(p, mask=mask, other=0)
        squares, low, low_ties, high, high_ties = first, first, first, first, first
        if SLOTS[STD] >= 0 or SLOTS[VAR] >= 0:
            squares = tl.load(p + WIDTH, mask=mask, other=0)
        if SLOTS[MIN] >= 0:
            low, low_ties = tl.load(p + 2 * WIDTH, mask=mask, other=float("inf")), tl.load(p + 3 * WIDTH, mask=mask, other=0)
        if SLOTS[MAX] >= 0:
            high, high_ties = tl.load(p + 4 * WIDTH, mask=mask, other=-float("inf")), tl.load(p + 5 * WIDTH, mask=mask, other=0)
        stats = merge(stats, n, (first, squares, low, low_ties, high, high_ties), more, SLOTS)
        n += more
        e += 1
    row = tl.load(segments + 2 * s) + r
    store_results(out, aux, ties, row, used & (n > 0), stats, tl.maximum(n, 1), column, WIDTH, SLOTS)


def forward(call: Call, out: torch.Tensor, aux: torch.Tensor, ties: torch.Tensor) -> None:
    """Writes the reductions `out` [rows, K, F], the mean `aux` [rows, 0..1, F] and the tie counts [rows, 0..2, F]; zeros for rows without messages."""
    low, slots = call.low, constants(slots_of(call.low.mask))
    for t in (out, aux, ties):
        t.zero_()
    work = call.cut(REDUCE)
    if not work.tiles or not out.numel():
        return
    tiles, segments, ranges, entries, (chunk,) = work.chunks(0, 0, 0, 0, 1)
    planes = PLANES.value
    partial = call.params.new_empty(chunk.partials, planes, low.width)
    nodes = call.project()
    for number, first, last in chunk.launches:
        group = work.groups[number]
        weights, pair_weights = (call.tensors.pointers(group, "raw", call.params, partner) for partner in (False, True))
        run(
            aggregate_kernel, (last - first,),
            partial, tiles, call.tensors.table(work, number), call.plan.lists, weights, pair_weights, nodes, call.params, call.table,
            first, call.n_nodes, call.table_nodes, call.steps, low.live(group.both), call.chunks, call.message_chunks, low.columns, low.edge, low.message, low.count, low.combine, low.width, slots, call.precision, len(weights),
            *group.shape, group.sparse, **call.options,
        )  # fmt: skip
    p = min(padded(low.width), 512 if interpreted() else 64)
    run(merge_kernel, (segments.shape[0], triton.cdiv(low.width, p)), out, aux, ties, partial, segments, ranges, entries, low.width, slots, work.segment, p, num_warps=1)

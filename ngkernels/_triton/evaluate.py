"""evaluate, forward, in Triton: the register of every edge, written out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .backprop import write_edges
from .call import Call
from .evaluator import tile
from .launch import run
from .plan import NODES
from .tiles import HAS_VALUES, ITSELF, OK, RAW, VALUES, flag, only, panel, sources, views


@triton.jit
def chunks_from(regs, EDGE: tl.constexpr, N: tl.constexpr):
    out = ()
    for c in tl.static_range(N):
        out = out + (regs[EDGE + c],)
    return out


@triton.jit(do_not_specialize=["first", "n_nodes", "table_nodes"])
def evaluate_kernel(
    values, pair_values, tiles, blocks, lists, weights, pair_weights, nodes, params, table, first, n_nodes, table_nodes,
    STEPS: tl.constexpr, LIVE: tl.constexpr, CHUNKS: tl.constexpr, COLUMNS: tl.constexpr, EDGE: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
    POINTERS: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, SPARSE: tl.constexpr,
):  # fmt: skip
    """Writes the last register of the edges of one panel, and of their partners where that is evaluated too."""
    row, local, copy, i0, j0, i1, j1, _, _ = panel(tiles, (first + tl.program_id(0)).to(tl.int64), blocks)
    raws = views(weights, pair_weights, row, local, copy, RAW, POINTERS)
    to, pair_to = views(values, pair_values, row, local, copy, VALUES, POINTERS)
    wanted, pair_wanted = flag(row, HAS_VALUES, False), flag(row, HAS_VALUES, True)
    i = i0
    while i < i1:
        j, last = sources(row, i, j0, i1, j1, BI, BJ)
        while j < last:
            at, pair_at, regs, others = tile(row, copy, i, j, i1, last, lists, nodes, n_nodes, params, raws, table, table_nodes, STEPS, LIVE, CHUNKS, COLUMNS, PRECISION, BI, BJ, SPARSE)
            write_edges(to, only(at[OK], wanted), chunks_from(regs, EDGE, N), at, EDGE, N, CHUNKS, False)
            if LIVE == len(STEPS):
                write_edges(pair_to, only(at[OK] & (at[ITSELF] == 0), pair_wanted), chunks_from(others, EDGE, N), pair_at, EDGE, N, CHUNKS, False)
            j += BJ
        i += BI


def forward(call: Call, values: Sequence[torch.Tensor]) -> None:
    """Writes the values of every edge: a tensor for each block, or one for a packed graph."""
    low, tensors = call.low, call.tensors
    work = call.cut(NODES)
    if not work.tiles:
        return
    tiles, _, _, _, (chunk,) = work.chunks(0, 0, 0, 0, 1)
    nodes = call.project()
    for number, first, last in chunk.launches:
        group = work.groups[number]
        weights, pair_weights, to, pair_to = (tensors.pointers(group, name, call.params, partner) for name in ("raw", "values") for partner in (False, True))
        run(
            evaluate_kernel, (last - first,),
            to, pair_to, tiles, tensors.table(work, number), call.plan.lists, weights, pair_weights, nodes, call.params, call.table,
            first, call.n_nodes, call.table_nodes, call.steps, low.live(group.both), call.chunks, low.columns, low.edge, low.count, call.precision,
            len(weights), *group.shape, group.sparse, **call.options,
        )  # fmt: skip

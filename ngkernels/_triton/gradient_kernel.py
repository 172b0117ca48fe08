"""The backward kernel of all ops in Triton: every tile is evaluated again, and its gradients go down the steps."""

from __future__ import annotations

import triton
import triton.language as tl

from .attention import STATES, SUMMED, share_gradients
from .backprop import added, backpropagate
from .evaluator import PADDED, START, edge_pointers, tile, used
from .linear_back import END_I, END_J, G_PARTIAL, ROW_I, ROW_J
from .messages import ATTEND, EMIT, PLAIN, coefficients, message, message_gradient, register_gradients
from .tiles import (
    CARRIERS,
    DST,
    GRAD_RAW,
    HAS_VALUES,
    ITSELF,
    NODE_STRIDE,
    OK,
    OUT,
    OUT_STRIDE,
    PARTNER_OUT,
    RAW,
    SAME_NUMBER,
    SRC,
    VALUES,
    WANTS_CARRIER,
    WANTS_RAW,
    I,
    J,
    destinations,
    flag,
    only,
    panel,
    sources,
    views,
)


@triton.jit
def given(values, at, there, CHUNKS: tl.constexpr, EDGE: tl.constexpr, N: tl.constexpr, T: tl.constexpr):
    """Gradients of the values of the edges `there`, as they come in."""
    out = ()
    for c in tl.static_range(N):
        p = edge_pointers(values, at[I], at[J], CHUNKS[EDGE + c][START], CHUNKS[EDGE + c][PADDED])
        out = out + (tl.load(p, mask=there[:, None] & used(CHUNKS[EDGE + c])[None, :], other=0).to(T),)
    return out


@triton.jit
def incoming(reduced, rows, live, VALUE: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr):
    """Coefficients of the messages to the destinations `rows`, chunk by chunk."""
    out = ()
    for c in tl.static_range(N):
        out = out + coefficients(reduced[0], reduced[1], reduced[2], reduced[3], reduced[4], rows, live, WIDTH, VALUE[c], SLOTS)
    return out


@triton.jit
def message_gradients(regs, k, at, CHUNKS: tl.constexpr, EDGE: tl.constexpr, QUERY: tl.constexpr, N: tl.constexpr, COMBINE: tl.constexpr, SLOTS: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr):
    out = ()
    for c in tl.static_range(N):
        mine = k[7 * c], k[7 * c + 1], k[7 * c + 2], k[7 * c + 3], k[7 * c + 4], k[7 * c + 5], k[7 * c + 6]
        out = out + (message_gradient(message(regs, c, EDGE, QUERY, N, COMBINE), at[OK], mine, SLOTS, BI, BJ, CHUNKS[EDGE + c][PADDED]),)
    return out


@triton.jit
def emitted_back(regs, others, at, to, pair_at, pair_to, value, pair_value, row, table, table_nodes, STEPS: tl.constexpr, LIVE: tl.constexpr, CHUNKS: tl.constexpr, EDGE: tl.constexpr, N: tl.constexpr, T: tl.constexpr, BACK: tl.constexpr, NEED: tl.constexpr, SUMS: tl.constexpr, PRECISION: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, SPARSE: tl.constexpr):
    """From the gradients of what was written out."""
    g = given(value, at, only(at[OK], flag(row, HAS_VALUES, False)), CHUNKS, EDGE, N, T)
    h = ()
    if LIVE == len(STEPS):
        h = given(pair_value, pair_at, only(at[OK] & (at[ITSELF] == 0), flag(row, HAS_VALUES, True)), CHUNKS, EDGE, N, T)
    backpropagate(regs, others, g, h, at, to, pair_at, pair_to, tl.load(row + SAME_NUMBER), table, table_nodes, BACK, LIVE, STEPS, CHUNKS, NEED, SUMS, PRECISION, BI, BJ, SPARSE)


@triton.jit
def attended_back(regs, others, at, to, pair_at, pair_to, nodes, saved, seed, row, copy, table, table_nodes, STEPS: tl.constexpr, LIVE: tl.constexpr, CHUNKS: tl.constexpr, COLUMNS: tl.constexpr, EDGE: tl.constexpr, SHARE: tl.constexpr, SHAPE: tl.constexpr, SCALE: tl.constexpr, DROPOUT: tl.constexpr, BACK: tl.constexpr, SHARE_BACK: tl.constexpr, NEED: tl.constexpr, SUMS: tl.constexpr, PRECISION: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, SPARSE: tl.constexpr):
    """From the gradients of attention."""
    shift = copy * (tl.load(row + OUT_STRIDE) - tl.load(row + NODE_STRIDE))
    ends = to[ROW_I], to[END_I], to[ROW_J], to[END_J]
    g, state = share_gradients(regs, at, nodes, saved, seed, to[G_PARTIAL], ends, tl.load(row + OUT) - tl.load(row + DST) + shift, EDGE, SHARE, SHAPE, COLUMNS, SUMS, SCALE, DROPOUT, False, BI, BJ, SPARSE)
    h, pair_state = (), ()
    if LIVE == len(STEPS):
        ends = pair_to[ROW_J], pair_to[END_J], pair_to[ROW_I], pair_to[END_I]
        h, pair_state = share_gradients(others, pair_at, nodes, saved, seed, pair_to[G_PARTIAL], ends, tl.load(row + PARTNER_OUT) - tl.load(row + SRC) + shift, EDGE, SHARE, SHAPE, COLUMNS, SUMS, SCALE, DROPOUT, True, BI, BJ, SPARSE)
    same = tl.load(row + SAME_NUMBER)
    g, h = backpropagate(regs, others, g, h, at, to, pair_at, pair_to, same, table, table_nodes, SHARE_BACK, LIVE, STEPS, CHUNKS, NEED, SUMS, PRECISION, BI, BJ, SPARSE)
    if len(BACK) > 0:
        if SHAPE[SUMMED]:
            g = added(g, state, SHAPE[STATES])
            if LIVE == len(STEPS):
                h = added(h, pair_state, SHAPE[STATES])
        backpropagate(regs, others, g, h, at, to, pair_at, pair_to, same, table, table_nodes, BACK, LIVE, STEPS, CHUNKS, NEED, SUMS, PRECISION, BI, BJ, SPARSE)


@triton.jit(do_not_specialize=["first", "chunk_first", "first_node", "n_nodes", "table_nodes", "seed_low", "seed_high"])
def gradient_kernel(
    tiles, blocks, lists, first, chunk_first, weights, grad_weights, values, carriers, pair_weights, pair_grad_weights, pair_values, pair_carriers,
    saved, attended, seed_low, seed_high, nodes, first_node, n_nodes, params, table, table_nodes, grad_params, partial, cells, places, curves,
    STEPS: tl.constexpr, LIVE: tl.constexpr, PAIRED: tl.constexpr, CHUNKS: tl.constexpr, VALUE: tl.constexpr, COLUMNS: tl.constexpr, SUMS: tl.constexpr,
    EDGE: tl.constexpr, QUERY: tl.constexpr, N: tl.constexpr, COMBINE: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr, SHAPE: tl.constexpr,
    SCALE: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, POINTERS: tl.constexpr, N_PARAMS: tl.constexpr, EDGE_BACK: tl.constexpr,
    QUERY_BACK: tl.constexpr, NEED: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, SPARSE: tl.constexpr,
):  # fmt: skip
    """Gradients through the edges of one panel, with node terms [2, n_nodes, COLUMNS] of the nodes from first_node on. Its partial rows:
    destinations, sources; of partners: destinations (the sources), sources."""
    nodes -= first_node.to(tl.int64) * COLUMNS
    number = (first + tl.program_id(0)).to(tl.int64)
    row, local, copy, i0, j0, i1, j1, rows, slot = panel(tiles, number, blocks)
    T: tl.constexpr = params.dtype.element_ty
    raws = views(weights, pair_weights, row, local, copy, RAW, POINTERS)
    value, pair_value = views(values, pair_values, row, local, copy, VALUES, POINTERS)
    g_raw, pair_g_raw = views(grad_weights, pair_grad_weights, row, local, copy, GRAD_RAW, POINTERS)
    g_carrier, pair_g_carrier = views(carriers, pair_carriers, row, local, copy, CARRIERS, POINTERS)
    g_params, g_partial = grad_params + (number - chunk_first) * N_PARAMS, partial + rows * SUMS
    out_row = tl.load(row + OUT) + copy * tl.load(row + OUT_STRIDE)
    n_i, n_j = i1 - i0, BI * BJ if SPARSE else j1 - j0
    i = i0
    while i < i1:
        j, last = sources(row, i, j0, i1, j1, BI, BJ)
        while j < last:
            at, pair_at, regs, others = tile(row, copy, i, j, i1, last, lists, nodes, n_nodes, params, raws, table, table_nodes, STEPS, LIVE, CHUNKS, COLUMNS, PRECISION, BI, BJ, SPARSE)
            to = (g_params, g_partial, i - i0, n_i + j - j0, n_i, n_i + n_j, g_raw, g_carrier, flag(row, WANTS_RAW, False), flag(row, WANTS_CARRIER, False), cells, places, curves, slot)
            at_j, at_i = n_i + n_j, n_i + 2 * n_j
            pair_to = (g_params, g_partial, at_i + i - i0, at_j + j - j0, at_i + n_i, at_j + n_j, pair_g_raw, pair_g_carrier, flag(row, WANTS_RAW, True), flag(row, WANTS_CARRIER, True), cells, places, curves, slot + BI * BJ)
            if COMBINE == EMIT:
                emitted_back(regs, others, at, to, pair_at, pair_to, value, pair_value, row, table, table_nodes, STEPS, LIVE, CHUNKS, EDGE, N, T, EDGE_BACK, NEED, SUMS, PRECISION, BI, BJ, SPARSE)
            elif COMBINE == ATTEND:
                attended_back(regs, others, at, to, pair_at, pair_to, attended, saved, (seed_low, seed_high), row, copy, table, table_nodes, STEPS, LIVE, CHUNKS, COLUMNS, EDGE, QUERY, SHAPE, SCALE, DROPOUT, EDGE_BACK, QUERY_BACK, NEED, SUMS, PRECISION, BI, BJ, SPARSE)
            else:
                # read for every tile again: as loop invariants they would occupy registers all the time
                k = incoming(saved, out_row + destinations(row, lists, i, i1, BI, SPARSE), i + tl.arange(0, BI) < i1, VALUE, N, WIDTH, SLOTS)
                g = message_gradients(regs, k, at, CHUNKS, EDGE, QUERY, N, COMBINE, SLOTS, BI, BJ)
                edge, query = register_gradients(regs, g, EDGE, QUERY, N, COMBINE)
                same = tl.load(row + SAME_NUMBER)
                backpropagate(regs, others, edge, (), at, to, pair_at, pair_to, same, table, table_nodes, EDGE_BACK, LIVE, STEPS, CHUNKS, NEED, SUMS, PRECISION, BI, BJ, SPARSE)
                if COMBINE != PLAIN:
                    backpropagate(regs, others, query, (), at, to, pair_at, pair_to, same, table, table_nodes, QUERY_BACK, LIVE, STEPS, CHUNKS, NEED, SUMS, PRECISION, BI, BJ, SPARSE)
            tl.debug_barrier()  # the next tile adds to what this one has stored, maybe with other threads
            slot += BI * BJ * (2 if PAIRED else 1)
            j += BJ
        i += BI

"""Relational attention in Triton on one tile: logits, online softmax by destination, and the way back, one group of heads at a time.

A pair's share r = [query | key | value factor] is the program's last register, its state e an earlier one.

    logit = scale <q_i + r_q, k_j + r_k>,  value = v_j r_v (or v_j),  out_i = sum_j a_ij value,  sums_i = sum_j a_ij e_ij

`nodes` are q, k, v. `side` tells the edges of a tile, whose destinations are its rows along "i", from their partners, whose are those along "j".
"""

from __future__ import annotations

import triton
import triton.language as tl

from .evaluator import PADDED, column_of, columns, live, used
from .rows import add_rows, by_edge, by_row, rows_of
from .tiles import ITSELF, LOCAL_I, LOCAL_J, NODE_I, NODE_J, OK

# Of SHAPE, lower.Heads.flat; from CHUNKS on: of queries and keys by group, of values by group, of states.
HEADS, DK, DV, GROUPS, OF_GROUP, MULTIPLY, SUMMED, DE, STATES, CHUNKS = (tl.constexpr(k) for k in range(10))
LSE, DELTA, GRAD, GRAD_SUMS = (tl.constexpr(k) for k in range(4))  # of what backward has saved


@triton.jit
def by_node(x, first, local, ok, CHUNK: tl.constexpr, WIDTH: tl.constexpr):
    """Chunk [size, P] of the node states x [N, WIDTH] at nodes first + local."""
    return tl.load(x + ((first + local) * WIDTH)[:, None] + columns(CHUNK)[None, :], mask=live(ok, CHUNK), other=0)


@triton.jit
def by_head(x, SHAPE: tl.constexpr):
    """Sums [size, G] over the columns [size, P] of each head."""
    return tl.sum(tl.reshape(x, (x.shape[0], SHAPE[OF_GROUP], x.shape[1] // SHAPE[OF_GROUP])), 2)


@triton.jit
def spread(p, P: tl.constexpr):
    """What heads have [size, G], for each of their columns [size, P]."""
    return tl.reshape(tl.broadcast_to(p[:, :, None], (p.shape[0], p.shape[1], P // p.shape[1])), (p.shape[0], P))


@triton.jit
def query(regs, at, nodes, g: tl.constexpr, SHARE: tl.constexpr, SHAPE: tl.constexpr):
    return by_node(nodes[0], at[NODE_I], at[LOCAL_I], at[OK], SHAPE[CHUNKS + g], SHAPE[HEADS] * SHAPE[DK]) + regs[SHARE + g]


@triton.jit
def key(regs, at, nodes, g: tl.constexpr, SHARE: tl.constexpr, SHAPE: tl.constexpr):
    return by_node(nodes[1], at[NODE_J], at[LOCAL_J], at[OK], SHAPE[CHUNKS + g], SHAPE[HEADS] * SHAPE[DK]) + regs[SHARE + SHAPE[GROUPS] + g]


@triton.jit
def value(at, nodes, g: tl.constexpr, SHAPE: tl.constexpr):
    """v_j."""
    return by_node(nodes[2], at[NODE_J], at[LOCAL_J], at[OK], SHAPE[CHUNKS + SHAPE[GROUPS] + g], SHAPE[HEADS] * SHAPE[DV])


@triton.jit
def factor(x, regs, g: tl.constexpr, SHARE: tl.constexpr, SHAPE: tl.constexpr):
    """x r_v, or x."""
    if SHAPE[MULTIPLY]:
        return x * regs[SHARE + 2 * SHAPE[GROUPS] + g]
    else:
        return x


@triton.jit
def heads_of(g: tl.constexpr, SHAPE: tl.constexpr):
    return g * SHAPE[OF_GROUP] + tl.arange(0, SHAPE[OF_GROUP])


@triton.jit
def dropped(p, at, seed, g: tl.constexpr, SHAPE: tl.constexpr, DROPOUT: tl.constexpr):
    """p [size, G] times 0 or 1 / (1 - rate): by a hash of (seed, i, j, head), ngkernels/reference/attend.py has the same."""
    if DROPOUT == 0:
        return p
    else:
        low, high = seed[0].to(tl.uint32), seed[1].to(tl.uint32)
        i, j = (at[NODE_I] + at[LOCAL_I]).to(tl.uint32), (at[NODE_J] + at[LOCAL_J]).to(tl.uint32)
        x = (i * 0x9E3779B1 + j * 0x85EBCA77)[:, None] + (heads_of(g, SHAPE).to(tl.uint32) * 0xC2B2AE3D)[None, :] + low
        x = (x ^ (x >> 16)) * 0x7FEB352D + high
        x = (x ^ (x >> 15)) * 0x846CA68B + high
        x = x ^ (x >> 16)
        return tl.where(x.to(tl.int64) >= int(DROPOUT * 4294967296), p * (1 / (1 - DROPOUT)), 0)


@triton.jit
def counted(at, PARTNERS: tl.constexpr):
    """Which pairs of a tile a destination reads: a neuron's pair with itself once."""
    if PARTNERS:
        return at[OK] & (at[ITSELF] == 0)
    else:
        return at[OK]


@triton.jit
def join_group(partial, regs, at, nodes, seed, first, last, g: tl.constexpr, EDGE: tl.constexpr, SHARE: tl.constexpr, SHAPE: tl.constexpr, WIDTH: tl.constexpr, SCALE: tl.constexpr, DROPOUT: tl.constexpr, PARTNERS: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, SPARSE: tl.constexpr):
    """A tile's pairs join the softmax sums of their destinations, rows `first` up to `last` of `partial`, for one group of heads."""
    rows, mask = rows_of(at, first, last, not PARTNERS, BI, BJ, SPARSE)
    here = partial + (rows * WIDTH)[:, None]
    head, ok = heads_of(g, SHAPE), counted(at, PARTNERS)[:, None]
    exists = mask[:, None] & (head < SHAPE[HEADS])[None, :]
    logit = by_head(query(regs, at, nodes, g, SHARE, SHAPE) * key(regs, at, nodes, g, SHARE, SHAPE), SHAPE) * SCALE
    before = tl.load(here + head[None, :], mask=exists, other=-float("inf"))
    top = tl.maximum(before, by_row(tl.where(ok, logit, -float("inf")), True, not PARTNERS, BI, BJ, SPARSE))
    base = tl.where(top == -float("inf"), 0, top)
    shrink = tl.exp(before - base)
    p = tl.where(ok, tl.exp(logit - by_edge(base, not PARTNERS, BI, BJ, SPARSE)), 0)
    totals = here + (SHAPE[HEADS] + head)[None, :]
    total = tl.load(totals, mask=exists, other=0) * shrink + by_row(p, False, not PARTNERS, BI, BJ, SPARSE)
    tl.debug_barrier()  # every thread scales with what it has loaded here, and one of them overwrites it now
    tl.store(here + head[None, :], top, mask=exists)
    tl.store(totals, total, mask=exists)
    p = dropped(p, at, seed, g, SHAPE, DROPOUT)
    v = spread(p, SHAPE[CHUNKS + SHAPE[GROUPS] + g][PADDED]) * factor(value(at, nodes, g, SHAPE), regs, g, SHARE, SHAPE)
    shrink_join(here + 2 * SHAPE[HEADS], v, spread(shrink, SHAPE[CHUNKS + SHAPE[GROUPS] + g][PADDED]), mask, SHAPE[CHUNKS + SHAPE[GROUPS] + g], PARTNERS, BI, BJ, SPARSE)
    if SHAPE[SUMMED]:
        for h in tl.static_range(SHAPE[OF_GROUP]):
            if g * SHAPE[OF_GROUP] + h < SHAPE[HEADS]:
                to = here + (2 + SHAPE[DV]) * SHAPE[HEADS] + (g * SHAPE[OF_GROUP] + h) * SHAPE[DE]
                for c in tl.static_range(SHAPE[STATES]):
                    shrink_join(to, column_of(p, h) * regs[EDGE + c], column_of(shrink, h), mask, SHAPE[CHUNKS + 2 * SHAPE[GROUPS] + c], PARTNERS, BI, BJ, SPARSE)


@triton.jit
def shrink_join(here, x, shrink, mask, CHUNK: tl.constexpr, PARTNERS: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, SPARSE: tl.constexpr):
    """What lies at chunk CHUNK from `here` on times `shrink`, and the sums of x [size, P]."""
    exists = mask[:, None] & used(CHUNK)[None, :]
    to = here + columns(CHUNK)[None, :]
    tl.store(to, tl.load(to, mask=exists, other=0) * shrink + by_row(x, False, not PARTNERS, BI, BJ, SPARSE), mask=exists)


@triton.jit
def join(partial, regs, at, nodes, seed, first, last, EDGE: tl.constexpr, SHARE: tl.constexpr, SHAPE: tl.constexpr, WIDTH: tl.constexpr, SCALE: tl.constexpr, DROPOUT: tl.constexpr, PARTNERS: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, SPARSE: tl.constexpr):
    """A tile's pairs join the softmax sums of their destinations."""
    for g in tl.static_range(SHAPE[GROUPS]):
        join_group(partial, regs, at, nodes, seed, first, last, g, EDGE, SHARE, SHAPE, WIDTH, SCALE, DROPOUT, PARTNERS, BI, BJ, SPARSE)


# ---- backward ----
@triton.jit
def of_row(x, row, ok, head, SHAPE: tl.constexpr):
    """What rows and heads have in x [rows, H], [size, G]."""
    return tl.load(x + (row * SHAPE[HEADS])[:, None] + head[None, :], mask=ok[:, None] & (head < SHAPE[HEADS])[None, :], other=0)


@triton.jit
def from_sums(s, regs, w, saved, row, ok, state, g: tl.constexpr, EDGE: tl.constexpr, SHAPE: tl.constexpr):
    """(s [size, G] + <gradient of sums, e> by head, gradients of e: `state` + sum over heads of w times that of sums)."""
    for h in tl.static_range(SHAPE[OF_GROUP]):
        if g * SHAPE[OF_GROUP] + h < SHAPE[HEADS]:
            along = tl.zeros((s.shape[0], 1), s.dtype)
            new = ()
            for c in tl.static_range(SHAPE[STATES]):
                place = (row * SHAPE[HEADS] + (g * SHAPE[OF_GROUP] + h)) * SHAPE[DE]
                grad = tl.load(saved[GRAD_SUMS] + place[:, None] + columns(SHAPE[CHUNKS + 2 * SHAPE[GROUPS] + c])[None, :], mask=live(ok, SHAPE[CHUNKS + 2 * SHAPE[GROUPS] + c]), other=0)
                along += tl.sum(grad * regs[EDGE + c], 1)[:, None]
                new = new + (state[c] + column_of(w, h) * grad,)
            state = new
            s = tl.where((tl.arange(0, SHAPE[OF_GROUP]) == h)[None, :], s + along, s)
    return s, state


@triton.jit
def group_gradients(regs, at, nodes, saved, seed, to, ends, out_shift, state, g: tl.constexpr, EDGE: tl.constexpr, SHARE: tl.constexpr, SHAPE: tl.constexpr, COLUMN: tl.constexpr, SUMS: tl.constexpr, SCALE: tl.constexpr, DROPOUT: tl.constexpr, PARTNERS: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, SPARSE: tl.constexpr):
    """Gradients of one group's shares (query, key, value factor) and of the states; those of q, k, v go to the partial rows."""
    ok, head = counted(at, PARTNERS), heads_of(g, SHAPE)
    row = at[NODE_I] + at[LOCAL_I] + out_shift
    q, k, v = query(regs, at, nodes, g, SHARE, SHAPE), key(regs, at, nodes, g, SHARE, SHAPE), value(at, nodes, g, SHAPE)
    logit = by_head(q * k, SHAPE) * SCALE
    p = tl.where(ok[:, None], tl.exp(logit - of_row(saved[LSE], row, ok, head, SHAPE)), 0)
    w = dropped(p, at, seed, g, SHAPE, DROPOUT)
    grad = by_node(saved[GRAD], out_shift + at[NODE_I], at[LOCAL_I], ok, SHAPE[CHUNKS + SHAPE[GROUPS] + g], SHAPE[HEADS] * SHAPE[DV])
    s = by_head(grad * factor(v, regs, g, SHARE, SHAPE), SHAPE)
    if SHAPE[SUMMED]:
        s, state = from_sums(s, regs, w, saved, row, ok, state, g, EDGE, SHAPE)
    slope = spread((w * s - p * of_row(saved[DELTA], row, ok, head, SHAPE)) * SCALE, SHAPE[CHUNKS + g][PADDED])
    of_value = spread(w, SHAPE[CHUNKS + SHAPE[GROUPS] + g][PADDED]) * grad
    add_rows(to, slope * k, at, ends[0], ends[1], COLUMN, SHAPE[CHUNKS + g], SUMS, not PARTNERS, BI, BJ, SPARSE)
    add_rows(to, slope * q, at, ends[2], ends[3], COLUMN, SHAPE[CHUNKS + g], SUMS, PARTNERS, BI, BJ, SPARSE)
    add_rows(to, factor(of_value, regs, g, SHARE, SHAPE), at, ends[2], ends[3], COLUMN + SHAPE[HEADS] * SHAPE[DK], SHAPE[CHUNKS + SHAPE[GROUPS] + g], SUMS, PARTNERS, BI, BJ, SPARSE)
    return slope * k, slope * q, of_value * v, state


@triton.jit
def share_gradients(regs, at, nodes, saved, seed, to, ends, out_shift, EDGE: tl.constexpr, SHARE: tl.constexpr, SHAPE: tl.constexpr, COLUMN: tl.constexpr, SUMS: tl.constexpr, SCALE: tl.constexpr, DROPOUT: tl.constexpr, PARTNERS: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, SPARSE: tl.constexpr):
    """(gradients of a tile's shares, of their states), as tuples of chunks.

    to: partial rows; ends: first and last of the tile's destinations in them, then of its sources. out_shift: from a destination's node to
    its output row. COLUMN: first column of q's gradients (destinations), and of k's and v's (sources).
    """
    queries, keys, factors, state = (), (), (), ()
    for c in tl.static_range(SHAPE[STATES]):
        state = state + (tl.zeros((BI * BJ, SHAPE[CHUNKS + 2 * SHAPE[GROUPS] + c][PADDED]), regs[EDGE].dtype),)
    for g in tl.static_range(SHAPE[GROUPS]):
        a, b, c, state = group_gradients(regs, at, nodes, saved, seed, to, ends, out_shift, state, g, EDGE, SHARE, SHAPE, COLUMN, SUMS, SCALE, DROPOUT, PARTNERS, BI, BJ, SPARSE)
        queries, keys = queries + (a,), keys + (b,)
        if SHAPE[MULTIPLY]:
            factors = factors + (c,)
    return queries + keys + factors, state

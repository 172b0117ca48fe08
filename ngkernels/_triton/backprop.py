"""The way back through an edge expression in Triton: from the gradient of a register down to the weights, parameters, nodes, table, carriers."""

from __future__ import annotations

import triton
import triton.language as tl

from .edge_math import slope
from .encoder_back import fourier_back, table_back
from .evaluator import (
    ACT,
    ADD,
    ARG0,
    ARG1,
    COUNT,
    FIRST,
    FIRST_IN,
    FOURIER,
    LIN,
    LOAD,
    MARK,
    MASK,
    N_OUT,
    NORM,
    OP,
    PADDED,
    START,
    TABLE,
    B,
    W,
    columns,
    edge_pointers,
    kept,
    moments,
    used,
)
from .linear_back import G_CARRIER, G_PARAMS, G_RAW, LATER, NEED_PARAMS, WANTS_CARRIER, WANTS_RAW, below_linear, parameters_back
from .rows import add_to
from .tiles import ITSELF, NUMBER, OK, PARAMS, THERE, I, J, only

STEP_OF, BELOW, HELD = (tl.constexpr(k) for k in range(3))  # fields of lower.Back


@triton.jit
def write_edges(view, live, g, at, FIRST_CHUNK: tl.constexpr, N: tl.constexpr, CHUNKS: tl.constexpr, ADD_TO: tl.constexpr):
    """Stores values of a tile's edges where `live`, or adds them to what is there."""
    for c in tl.static_range(N):
        p = edge_pointers(view, at[I], at[J], CHUNKS[FIRST_CHUNK + c][START], CHUNKS[FIRST_CHUNK + c][PADDED])
        mask = live[:, None] & used(CHUNKS[FIRST_CHUNK + c])[None, :]
        value = g[c]
        if ADD_TO:
            value = value + tl.load(p, mask=mask, other=0).to(value.dtype)
        tl.store(p, value.to(view[0].dtype.element_ty), mask=mask)


@triton.jit
def raw_back(g, at, to, live, STEP: tl.constexpr, CHUNKS: tl.constexpr, NEED: tl.constexpr):
    """Writes the gradients of the raw weights where `live`; with input statistics, times their scale."""
    live = only(live & at[THERE], to[WANTS_RAW])
    if STEP[ARG0] >= 0:
        scale = tl.load(at[PARAMS] + STEP[ARG0] + 2 * at[NUMBER])
        scaled = ()
        for c in tl.static_range(STEP[COUNT]):
            scaled = scaled + (g[c] * scale,)
        write_edges(to[G_RAW], live, scaled, at, STEP[FIRST], STEP[COUNT], CHUNKS, NEED[LATER])
    else:
        write_edges(to[G_RAW], live, g, at, STEP[FIRST], STEP[COUNT], CHUNKS, NEED[LATER])


@triton.jit
def joined(g, h, where, N: tl.constexpr):
    """g + h for the edges `where`, else g."""
    out = ()
    for c in tl.static_range(N):
        out = out + (tl.where(where[:, None], g[c] + h[c], g[c]),)
    return out


@triton.jit
def norm_back(regs, g, at, to, STEP: tl.constexpr, CHUNKS: tl.constexpr, NEED: tl.constexpr):
    """Through a layer norm, with d = g weight and y the normalised register: (d - mean(d) - y mean(d y)) / deviation."""
    mean, scale = moments(regs, STEP, CHUNKS)
    total, along = tl.zeros(mean.shape, mean.dtype), tl.zeros(mean.shape, mean.dtype)
    for c in tl.static_range(STEP[COUNT]):
        column = columns(CHUNKS[STEP[FIRST] + c])
        mask = used(CHUNKS[STEP[FIRST] + c])
        y = (regs[STEP[FIRST_IN] + c] - mean) * scale
        d = g[c] * tl.load(at[PARAMS] + STEP[W] + column, mask=mask, other=0)[None, :]
        total += tl.sum(d, 1)[:, None]
        along += tl.sum(d * y, 1)[:, None]
        if NEED[NEED_PARAMS]:
            add_to(to[G_PARAMS] + STEP[W] + column, tl.sum(g[c] * y, 0), mask)
            add_to(to[G_PARAMS] + STEP[B] + column, tl.sum(g[c], 0), mask)
    out = ()
    for c in tl.static_range(STEP[COUNT]):
        column = columns(CHUNKS[STEP[FIRST] + c])
        mask = used(CHUNKS[STEP[FIRST] + c])
        y = (regs[STEP[FIRST_IN] + c] - mean) * scale
        d = g[c] * tl.load(at[PARAMS] + STEP[W] + column, mask=mask, other=0)[None, :]
        out = out + (tl.where(mask[None, :], (d - total / STEP[N_OUT] - y * (along / STEP[N_OUT])) * scale, 0),)
    return out


@triton.jit
def mask_back(g, at, N: tl.constexpr):
    out = ()
    for c in tl.static_range(N):
        out = out + (kept(g[c], at),)
    return out


@triton.jit
def activation_back(regs, g, STEP: tl.constexpr):
    out = ()
    for c in tl.static_range(STEP[COUNT]):
        out = out + (g[c] * slope(regs[STEP[FIRST_IN] + c], STEP[ARG0]),)
    return out


@triton.jit
def added(a, b, N: tl.constexpr):
    out = ()
    for c in tl.static_range(N):
        out = out + (a[c] + b[c],)
    return out


@triton.jit
def edge_end(g, h, at, to, pair_at, pair_to, same, PAIRED: tl.constexpr, STEP: tl.constexpr, CHUNKS: tl.constexpr, NEED: tl.constexpr):
    """Gradients of raw weights (LOAD) or carriers (MARK), of the edges and with PAIRED of their partners. What both read is written once."""
    once = at[ITSELF]
    if STEP[OP] != MARK:
        once = once | only(at[OK], same)
    if PAIRED:
        g = joined(g, h, once, STEP[COUNT])
    if STEP[OP] == MARK:
        write_edges(to[G_CARRIER], only(at[OK], to[WANTS_CARRIER]), g, at, STEP[FIRST], STEP[COUNT], CHUNKS, False)
        if PAIRED:
            write_edges(pair_to[G_CARRIER], only(at[OK] & (once == 0), pair_to[WANTS_CARRIER]), h, pair_at, STEP[FIRST], STEP[COUNT], CHUNKS, False)
    else:
        raw_back(g, at, to, at[OK], STEP, CHUNKS, NEED)
        if PAIRED:
            raw_back(h, pair_at, pair_to, once == 0, STEP, CHUNKS, NEED)


@triton.jit
def simple_back(regs, g, at, to, table, table_nodes, STEP: tl.constexpr, CHUNKS: tl.constexpr, NEED: tl.constexpr, SUMS: tl.constexpr, PRECISION: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, SPARSE: tl.constexpr):
    """Through a step that reads the register of its own edges alone."""
    if STEP[OP] == ACT:
        return activation_back(regs, g, STEP)
    elif STEP[OP] == NORM:
        return norm_back(regs, g, at, to, STEP, CHUNKS, NEED)
    elif STEP[OP] == MASK:
        return mask_back(g, at, STEP[COUNT])
    elif STEP[OP] == TABLE:
        return (table_back(regs, g, at, to, table, table_nodes, STEP, CHUNKS, NEED, SUMS, PRECISION, BI, BJ, SPARSE),)
    elif STEP[OP] == FOURIER:
        return (fourier_back(regs, g, at, STEP, CHUNKS),)
    else:
        return g


@triton.jit
def step_back(regs, others, g, h, at, to, pair_at, pair_to, same, table, table_nodes, BELOW_TOO: tl.constexpr, PAIRED: tl.constexpr, STEP: tl.constexpr, CHUNKS: tl.constexpr, NEED: tl.constexpr, SUMS: tl.constexpr, PRECISION: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, SPARSE: tl.constexpr):
    """From the gradients of a step's result to those of its input, of edges and with PAIRED of partners. Both add to the same parameters,
    maybe with other threads: a barrier keeps them apart."""
    if STEP[OP] == LIN:
        parameters_back(regs, others, g, at, to, STEP, CHUNKS, NEED, SUMS, PRECISION, BI, BJ, SPARSE)
        if PAIRED:
            tl.debug_barrier()
            parameters_back(others, regs, h, pair_at, pair_to, STEP, CHUNKS, NEED, SUMS, PRECISION, BI, BJ, SPARSE)
        if BELOW_TOO:
            below = below_linear(regs, g, h, at, True, PAIRED, STEP, CHUNKS, PRECISION)
            if PAIRED or STEP[ARG1] >= 0:
                h = below_linear(regs, h, g, pair_at, PAIRED, True, STEP, CHUNKS, PRECISION)
            g = below
    elif STEP[OP] == MARK or STEP[OP] == LOAD:
        edge_end(g, h, at, to, pair_at, pair_to, same, PAIRED, STEP, CHUNKS, NEED)
    else:
        g = simple_back(regs, g, at, to, table, table_nodes, STEP, CHUNKS, NEED, SUMS, PRECISION, BI, BJ, SPARSE)
        if PAIRED:
            tl.debug_barrier()
            h = simple_back(others, h, pair_at, pair_to, table, table_nodes, STEP, CHUNKS, NEED, SUMS, PRECISION, BI, BJ, SPARSE)
    return g, h


@triton.jit
def backpropagate(regs, others, g, h, at, to, pair_at, pair_to, same, table, table_nodes, BACK: tl.constexpr, LIVE: tl.constexpr, STEPS: tl.constexpr, CHUNKS: tl.constexpr, NEED: tl.constexpr, SUMS: tl.constexpr, PRECISION: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, SPARSE: tl.constexpr):
    """Takes g, the chunks of the gradient of a register (0 for edges that do not exist), down the steps BACK; h: of the partners' register,
    for steps below LIVE. same: whether edges and partners read the same weights. Returns what reaches the input of the last step."""
    held, held_h = g, h
    for s in tl.static_range(len(BACK)):
        if BACK[s][HELD] > 0:
            g = added(g, held, STEPS[BACK[s][STEP_OF]][COUNT])
            if BACK[s][HELD] < LIVE:
                h = added(h, held_h, STEPS[BACK[s][STEP_OF]][COUNT])
        if STEPS[BACK[s][STEP_OF]][OP] == ADD:
            held = g
            if BACK[s][STEP_OF] < LIVE:
                held_h = h
        else:
            g, h = step_back(regs, others, g, h, at, to, pair_at, pair_to, same, table, table_nodes, BACK[s][BELOW], BACK[s][STEP_OF] < LIVE, STEPS[BACK[s][STEP_OF]], CHUNKS, NEED, SUMS, PRECISION, BI, BJ, SPARSE)
    return g, h

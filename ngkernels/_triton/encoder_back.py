"""The way back through encoders in Triton: Fourier features and the tabulated curve."""

from __future__ import annotations

import triton
import triton.language as tl

from .edge_math import dot, hermite, rise_weight, sin_turns
from .evaluator import ARG0, ARG1, COUNT, FEATURES, FIRST, FIRST_IN, N_IN, N_OUT, PADDED, W, columns, fourier, turns, used
from .linear_back import G_CELL, G_CURVE, G_PARAMS, G_PLACE, NEED_PARAMS, NEED_RAW, NEED_TABLE, SLOTS, start_gradient
from .rows import add_to
from .tiles import DIRECTION, OK, PARAMS


@triton.jit
def fourier_back(regs, g, at, STEP: tl.constexpr, CHUNKS: tl.constexpr):
    """Gradient of the raw features [size, C] from those of their cosines and sines."""
    M: tl.constexpr = STEP[N_OUT] // 2
    x = regs[STEP[FIRST_IN]]
    total = tl.zeros(x.shape, x.dtype)
    for c in tl.static_range(STEP[COUNT]):
        q = columns(CHUNKS[STEP[FIRST] + c])
        f = at[PARAMS] + STEP[W] + at[DIRECTION] * (M * STEP[N_IN]) + tl.where(q < M, q, q - M) * STEP[N_IN]
        d = 6.283185307179586 * g[c] * fourier(x, at, True, STEP, CHUNKS[STEP[FIRST] + c])
        for k in tl.static_range(STEP[N_IN]):
            b = tl.load(f + k, mask=used(CHUNKS[STEP[FIRST] + c]), other=0)
            value = tl.sum(d * b[None, :], 1)[:, None]
            total = total + tl.where((tl.arange(0, x.shape[1]) == k)[None, :], value, 0)
    return total


@triton.jit
def beyond_back(x, g, at, to, beyond, total, NEED: tl.constexpr, STEP: tl.constexpr, OUT: tl.constexpr, PRECISION: tl.constexpr):
    """total [size, 1] + the weights' gradients beyond the table; adds those of W."""
    M: tl.constexpr = STEP[N_IN]
    g = tl.where(beyond[:, None], g, 0)
    n = columns(OUT)
    for q in range(0, M, FEATURES):
        f = q + tl.arange(0, FEATURES)
        t, rest = turns(x, at[PARAMS] + STEP[ARG1] + at[DIRECTION] * M, f, f < M, 1)
        mask = used(OUT)[:, None] & (f < M)[None, :]
        w = STEP[W] + n[:, None] * (2 * M) + f[None, :]
        zero = tl.zeros(t.shape, t.dtype)
        cosine = dot(g, tl.load(at[PARAMS] + w, mask=mask, other=0), zero, PRECISION)
        sine = dot(g, tl.load(at[PARAMS] + w + M, mask=mask, other=0), zero, PRECISION)
        b = tl.load(at[PARAMS] + STEP[ARG1] + at[DIRECTION] * M + f, mask=f < M, other=0)
        c, s = sin_turns(t, rest, 0.25), sin_turns(t, rest, 0.0)
        total = tl.where(beyond[:, None], total + 6.283185307179586 * tl.sum((sine * c - cosine * s) * b[None, :], 1)[:, None], total)
        if NEED[NEED_PARAMS]:
            c, s = tl.where(beyond[:, None], c, 0), tl.where(beyond[:, None], s, 0)
            zero_w = tl.zeros((OUT[PADDED], FEATURES), g.dtype)
            add_to(to[G_PARAMS] + w, dot(tl.trans(g), c, zero_w, PRECISION), mask)
            add_to(to[G_PARAMS] + w + M, dot(tl.trans(g), s, zero_w, PRECISION), mask)
    return total


@triton.jit
def table_back(regs, g, at, to, table, table_nodes, STEP: tl.constexpr, CHUNKS: tl.constexpr, NEED: tl.constexpr, SUMS: tl.constexpr, PRECISION: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, SPARSE: tl.constexpr):
    """Gradient of the weights [size, 1] through the tabulated curve. What the table gets is put down edge by edge and summed later."""
    x = regs[STEP[FIRST_IN]]
    inside, cell, u = hermite(tl.sum(x, 1), table_nodes // 2, STEP[ARG0])
    row = at[DIRECTION] * table_nodes + cell
    ok = at[OK] & inside
    beyond = at[OK] & (inside == 0)
    total = tl.zeros(x.shape, x.dtype)
    for c in tl.static_range(STEP[COUNT]):
        start_gradient(to, g[c], at, STEP, CHUNKS[STEP[FIRST] + c], NEED, SUMS, BI, BJ, SPARSE)
        column = columns(CHUNKS[STEP[FIRST] + c])
        mask = used(CHUNKS[STEP[FIRST] + c])[None, :]
        if NEED[NEED_TABLE]:
            place = to[SLOTS] + tl.arange(0, BI * BJ)
            tl.store(to[G_CURVE] + (place * STEP[N_OUT])[:, None] + column[None, :], g[c], mask=mask)
            tl.store(to[G_CELL] + place, tl.where(ok, row, -1).to(tl.int32))
            tl.store(to[G_PLACE] + place, u)
        if NEED[NEED_RAW]:
            for k in tl.static_range(6):
                value = tl.load(table + (row * (3 * STEP[N_OUT]) + k * STEP[N_OUT])[:, None] + column[None, :], mask=mask, other=0)
                total = total + (rise_weight(u, k) * (1 << STEP[ARG0]) * tl.sum(g[c] * value, 1))[:, None]
    total = tl.where(inside[:, None], total, float("nan") if STEP[W] < 0 else 0)
    if STEP[W] >= 0:
        if tl.sum(beyond.to(tl.int32)) > 0:
            for c in tl.static_range(STEP[COUNT]):
                total = beyond_back(x, g[c], at, to, beyond, total, NEED, STEP, CHUNKS[STEP[FIRST] + c], PRECISION)
    return total

"""Forward through an edge expression in Triton: a tile of edges, and one register after the other for it.

A program is a constexpr tuple of lower.Step. Registers are one tuple of chunks [size, P], in the order of lower.Lowered.chunks. A tile is
the tuple `at` (tiles.edges makes it). What is computed for edges that do not exist (the tail of a block) is finite and never used.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import program as prog
from .edge_math import activate, curve_weight, dot, hermite, sin_turns
from .tiles import DIRECTION, LOCAL_I, LOCAL_J, NODES_I, NODES_J, NUMBER, OK, PARAMS, STATE, THERE, I, J, edges, partners

LOAD, FOURIER, TABLE, LIN, ACT, ADD, MARK, NORM, MASK = (tl.constexpr(k) for k in range(9))
if (prog.LOAD, prog.FOURIER, prog.TABLE, prog.LIN, prog.ACT, prog.ADD, prog.MARK, prog.NORM, prog.MASK) != tuple(range(9)):
    raise ImportError("ngkernels._triton.evaluator: the opcodes of ngkernels.program have changed")

OP, FIRST_IN, COUNT_IN, FIRST, COUNT, N_IN, N_OUT, W, B, NODE, ARG0, ARG1 = (tl.constexpr(k) for k in range(12))  # fields of lower.Step
START, USED, PADDED, HEAD, SLOT = (tl.constexpr(k) for k in range(5))  # of a chunk
FEATURES = tl.constexpr(16)  # frequencies at a time, where weights lie beyond the table


@triton.jit
def edge_pointers(view, i, j, first, P: tl.constexpr):
    """Pointers [size, P] to channels from `first` on of the edges (i, j) of a view (pointer, strides of source, destination, channel)."""
    return view[0] + (j * view[1] + i * view[2])[:, None] + (first + tl.arange(0, P))[None, :] * view[3]


@triton.jit
def columns(CHUNK: tl.constexpr):
    """Where the columns of a chunk stand in their register."""
    c = tl.arange(0, CHUNK[PADDED])
    if CHUNK[HEAD] == CHUNK[SLOT]:
        return CHUNK[START] + c
    else:
        return CHUNK[START] + c // CHUNK[SLOT] * CHUNK[HEAD] + c % CHUNK[SLOT]


@triton.jit
def used(CHUNK: tl.constexpr):
    if CHUNK[HEAD] == CHUNK[SLOT]:
        return tl.arange(0, CHUNK[PADDED]) < CHUNK[USED]
    else:
        return (tl.arange(0, CHUNK[PADDED]) % CHUNK[SLOT] < CHUNK[HEAD]) & (columns(CHUNK) < CHUNK[START] + CHUNK[USED])


@triton.jit
def live(ok, CHUNK: tl.constexpr):
    """Which of the entries [size, P] of a chunk exist."""
    if CHUNK[USED] == CHUNK[PADDED]:
        return tl.broadcast_to(ok[:, None], (ok.shape[0], CHUNK[PADDED]))
    else:
        return ok[:, None] & used(CHUNK)[None, :]


@triton.jit
def starting(at, STEP: tl.constexpr, CHUNK: tl.constexpr, COLUMNS: tl.constexpr, T: tl.constexpr):
    """What a linear step adds to its product, [size, P]: s_i + t_j, a bias, or nothing."""
    column = columns(CHUNK)
    if STEP[NODE] >= 0:
        mask = live(at[OK], CHUNK)
        s = tl.load(at[NODES_I] + (at[LOCAL_I] * COLUMNS)[:, None] + (STEP[NODE] + column)[None, :], mask=mask, other=0)
        t = tl.load(at[NODES_J] + (at[LOCAL_J] * COLUMNS)[:, None] + (STEP[NODE] + column)[None, :], mask=mask, other=0)
        return s + t
    elif STEP[B] >= 0:
        bias = tl.load(at[PARAMS] + STEP[B] + column, mask=used(CHUNK), other=0)
        return tl.broadcast_to(bias[None, :], (at[OK].shape[0], CHUNK[PADDED]))
    else:
        return tl.zeros((at[OK].shape[0], CHUNK[PADDED]), T)


@triton.jit
def column_of(x, k: tl.constexpr):
    """Column k of a chunk of few columns, [size, 1]."""
    if x.shape[1] == 1:
        return x
    else:
        return tl.sum(tl.where((tl.arange(0, x.shape[1]) == k)[None, :], x, 0), 1)[:, None]


@triton.jit
def matrix(w, STEP: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr):
    """The part of W [n_out, n_in] that maps chunk IN to chunk OUT, [P_out, P_in]."""
    n, k = columns(OUT), columns(IN)
    if OUT[USED] == OUT[PADDED] and IN[USED] == IN[PADDED]:
        return tl.load(w + n[:, None] * STEP[N_IN] + k[None, :])
    else:
        return tl.load(w + n[:, None] * STEP[N_IN] + k[None, :], mask=used(OUT)[:, None] & used(IN)[None, :], other=0)


@triton.jit
def matrix_column(w, k: tl.constexpr, STEP: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr):
    """Column k of that, [1, P_out]."""
    n = columns(OUT)
    return tl.load(w + n * STEP[N_IN] + (IN[START] + k), mask=used(OUT), other=0)[None, :]


@triton.jit
def product(x, w, acc, STEP: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, PRECISION: tl.constexpr):
    """acc + chunk OUT of W x, of chunk IN alone."""
    if IN[PADDED] >= 16:
        acc = dot(x, tl.trans(matrix(w, STEP, IN, OUT)), acc, PRECISION)
    else:
        for k in tl.static_range(IN[USED]):
            acc = tl.fma(tl.broadcast_to(column_of(x, k), acc.shape), tl.broadcast_to(matrix_column(w, k, STEP, IN, OUT), acc.shape), acc)
    return acc


@triton.jit
def linear(regs, others, at, acc, STEP: tl.constexpr, CHUNKS: tl.constexpr, OUT: tl.constexpr, PRECISION: tl.constexpr):
    """acc + chunk OUT of W e; of a pair update: + that of B e', with the partners' registers `others`."""
    for c in tl.static_range(STEP[COUNT_IN]):
        acc = product(regs[STEP[FIRST_IN] + c], at[PARAMS] + STEP[W] + at[DIRECTION] * STEP[ARG0], acc, STEP, CHUNKS[STEP[FIRST_IN] + c], OUT, PRECISION)
    if STEP[ARG1] >= 0:
        for c in tl.static_range(STEP[COUNT_IN]):
            acc = product(others[STEP[FIRST_IN] + c], at[PARAMS] + STEP[ARG1], acc, STEP, CHUNKS[STEP[FIRST_IN] + c], OUT, PRECISION)
    return acc


@triton.jit
def loaded(at, raw, STEP: tl.constexpr, CHUNK: tl.constexpr, T: tl.constexpr):
    """Raw features of the edges, [size, P]; with input statistics, a w + c."""
    live = at[THERE][:, None] & used(CHUNK)[None, :]
    x = tl.load(edge_pointers(raw, at[I], at[J], CHUNK[START], CHUNK[PADDED]), mask=live, other=0).to(T)
    if STEP[ARG0] >= 0:
        pair = at[PARAMS] + STEP[ARG0] + 2 * at[NUMBER]
        x = tl.where(live, x * tl.load(pair) + tl.load(pair + 1), 0)
    return x


@triton.jit
def moments(regs, STEP: tl.constexpr, CHUNKS: tl.constexpr):
    """Mean and 1 / sqrt(variance + eps) of a register over its columns, [size, 1]."""
    total = tl.zeros((regs[STEP[FIRST_IN]].shape[0], 1), regs[STEP[FIRST_IN]].dtype)
    for c in tl.static_range(STEP[COUNT_IN]):
        total += tl.sum(tl.where(used(CHUNKS[STEP[FIRST_IN] + c])[None, :], regs[STEP[FIRST_IN] + c], 0), 1)[:, None]
    mean = total / STEP[N_OUT]
    squares = tl.zeros(mean.shape, mean.dtype)
    for c in tl.static_range(STEP[COUNT_IN]):
        d = tl.where(used(CHUNKS[STEP[FIRST_IN] + c])[None, :], regs[STEP[FIRST_IN] + c] - mean, 0)
        squares += tl.sum(d * d, 1)[:, None]
    return mean, 1 / tl.sqrt(squares / STEP[N_OUT] + STEP[ARG0])


@triton.jit
def normalised(regs, at, c: tl.constexpr, STEP: tl.constexpr, CHUNKS: tl.constexpr, OUT: tl.constexpr):
    """Chunk c of the layer norm of a register."""
    mean, scale = moments(regs, STEP, CHUNKS)
    column = columns(OUT)
    weight = tl.load(at[PARAMS] + STEP[W] + column, mask=used(OUT), other=0)[None, :]
    bias = tl.load(at[PARAMS] + STEP[B] + column, mask=used(OUT), other=0)[None, :]
    return (regs[STEP[FIRST_IN] + c] - mean) * scale * weight + bias


@triton.jit
def kept(x, at):
    """x, or 0 for the edges of tokens."""
    return tl.where(tl.zeros(x.shape, tl.int64) + at[STATE] != 0, x, 0)


@triton.jit
def turns(x, frequencies, feature, mask, N: tl.constexpr):
    """(b w, what rounding took from it) [size, P] of the rows `feature` [P] of b [*, N]."""
    t = tl.zeros((x.shape[0], feature.shape[0]), x.dtype)
    rest = t
    for c in tl.static_range(N):
        b = tl.broadcast_to(tl.load(frequencies + feature * N + c, mask=mask, other=0)[None, :], t.shape)
        w = tl.broadcast_to(column_of(x, c), t.shape)
        if N == 1:
            t = b * w
            rest = tl.fma(b, w, -t)
        else:
            t = tl.fma(b, w, t)
    return t, rest


@triton.jit
def fourier(x, at, DERIVATIVE: tl.constexpr, STEP: tl.constexpr, CHUNK: tl.constexpr):
    """Columns CHUNK of [cos(2 pi b w) | sin(2 pi b w)]; DERIVATIVE: of its derivative by 2 pi b w."""
    M: tl.constexpr = STEP[N_OUT] // 2
    q = columns(CHUNK)
    cosine = q < M
    t, rest = turns(x, at[PARAMS] + STEP[W] + at[DIRECTION] * (M * STEP[N_IN]), tl.where(cosine, q, q - M), used(CHUNK), STEP[N_IN])
    phase = tl.where(cosine, 0.5, 0.25) if DERIVATIVE else tl.where(cosine, 0.25, 0.0)
    return sin_turns(t, rest, phase.to(x.dtype)[None, :])


@triton.jit
def beyond_table(x, at, acc, STEP: tl.constexpr, OUT: tl.constexpr, PRECISION: tl.constexpr):
    """acc + chunk OUT of W [cos | sin], FEATURES frequencies at a time."""
    M: tl.constexpr = STEP[N_IN]
    n = columns(OUT)
    for q in range(0, M, FEATURES):
        f = q + tl.arange(0, FEATURES)
        t, rest = turns(x, at[PARAMS] + STEP[ARG1] + at[DIRECTION] * M, f, f < M, 1)
        mask = (f < M)[:, None] & used(OUT)[None, :]
        w = at[PARAMS] + STEP[W] + n[None, :] * (2 * M) + f[:, None]
        acc = dot(sin_turns(t, rest, 0.25), tl.load(w, mask=mask, other=0), acc, PRECISION)
        acc = dot(sin_turns(t, rest, 0.0), tl.load(w + M, mask=mask, other=0), acc, PRECISION)
    return acc


@triton.jit
def tabulated(x, at, table, table_nodes, init, STEP: tl.constexpr, OUT: tl.constexpr, PRECISION: tl.constexpr):
    """init + chunk OUT of the tabulated curve at the weights x [size, 1]; beyond the table it is evaluated directly, or NaN where no weight
    should be (W -1)."""
    inside, cell, u = hermite(tl.sum(x, 1), table_nodes // 2, STEP[ARG0])
    line = table + ((at[DIRECTION] * table_nodes + cell) * (3 * STEP[N_OUT]))[:, None] + columns(OUT)[None, :]
    acc = init
    for k in tl.static_range(6):
        value = tl.load(line + k * STEP[N_OUT], mask=used(OUT)[None, :], other=0)
        acc = tl.fma(tl.broadcast_to(curve_weight(u, k)[:, None], acc.shape), value, acc)
    if STEP[W] < 0:
        acc = tl.where(inside[:, None], acc, float("nan"))
    elif tl.sum((at[OK] & (inside == 0)).to(tl.int32)) > 0:
        acc = tl.where(inside[:, None], acc, beyond_table(x, at, init, STEP, OUT, PRECISION))
    return acc


@triton.jit
def chunk_of(regs, others, at, raw, table, table_nodes, c: tl.constexpr, STEP: tl.constexpr, CHUNKS: tl.constexpr, OUT: tl.constexpr, COLUMNS: tl.constexpr, T: tl.constexpr, PRECISION: tl.constexpr):
    """Chunk c of the result of a step."""
    if STEP[OP] == LOAD:
        return loaded(at, raw, STEP, OUT, T)
    elif STEP[OP] == FOURIER:
        return fourier(regs[STEP[FIRST_IN]], at, False, STEP, OUT)
    elif STEP[OP] == TABLE:
        return tabulated(regs[STEP[FIRST_IN]], at, table, table_nodes, starting(at, STEP, OUT, COLUMNS, T), STEP, OUT, PRECISION)
    elif STEP[OP] == ACT:
        return activate(regs[STEP[FIRST_IN] + c], STEP[ARG0])
    elif STEP[OP] == ADD:
        return regs[STEP[FIRST_IN] + c] + regs[STEP[ARG0] + c]
    elif STEP[OP] == MARK:
        return regs[STEP[FIRST_IN] + c]
    elif STEP[OP] == NORM:
        return normalised(regs, at, c, STEP, CHUNKS, OUT)
    elif STEP[OP] == MASK:
        return kept(regs[STEP[FIRST_IN] + c], at)
    else:
        return linear(regs, others, at, starting(at, STEP, OUT, COLUMNS, T), STEP, CHUNKS, OUT, PRECISION)


@triton.jit
def result_of(regs, others, at, raw, table, table_nodes, STEP: tl.constexpr, CHUNKS: tl.constexpr, COLUMNS: tl.constexpr, T: tl.constexpr, PRECISION: tl.constexpr):
    """The chunks of the result of a step."""
    out = ()
    for c in tl.static_range(STEP[COUNT]):
        out = out + (chunk_of(regs, others, at, raw, table, table_nodes, c, STEP, CHUNKS, CHUNKS[STEP[FIRST] + c], COLUMNS, T, PRECISION),)
    return out


@triton.jit
def evaluate(at, raw, pair_at, pair_raw, table, table_nodes, STEPS: tl.constexpr, LIVE: tl.constexpr, CHUNKS: tl.constexpr, COLUMNS: tl.constexpr, T: tl.constexpr, PRECISION: tl.constexpr):
    """(the registers of a tile, those of its partners up to step LIVE); `raw`, `pair_raw`: views of the weights that they read."""
    regs, others = (), ()
    for s in tl.static_range(len(STEPS)):
        new = result_of(regs, others, at, raw, table, table_nodes, STEPS[s], CHUNKS, COLUMNS, T, PRECISION)
        if s < LIVE:
            others = others + result_of(others, regs, pair_at, pair_raw, table, table_nodes, STEPS[s], CHUNKS, COLUMNS, T, PRECISION)
        regs = regs + new
    return regs, others


@triton.jit
def tile(row, copy, i, j, i1, last, lists, nodes, n_nodes, params, raws, table, table_nodes, STEPS: tl.constexpr, LIVE: tl.constexpr, CHUNKS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, SPARSE: tl.constexpr):
    """(the tile from destination i and source j on, that of its partners, the registers of both); raws: views of the weights of both."""
    at = edges(row, copy, i, j, i1, last, lists, nodes, n_nodes, params, COLUMNS, BI, BJ, SPARSE)
    pair_at = partners(at, row, nodes, n_nodes, COLUMNS, SPARSE)
    regs, others = evaluate(at, raws[0], pair_at, raws[1], table, table_nodes, STEPS, LIVE, CHUNKS, COLUMNS, params.dtype.element_ty, PRECISION)
    return at, pair_at, regs, others

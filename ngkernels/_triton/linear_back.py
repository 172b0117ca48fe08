"""The way back through linear steps in Triton.

Sums over edges go to memory of the program's own: parameters to its row of `grad_params` [tiles, n_params], node terms to its rows of
`partial` [rows, SUMS]. Both are added up later, in the order of the tiles. Every tile of edges adds to what the last one left.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .edge_math import dot
from .evaluator import (
    ARG0,
    ARG1,
    COUNT,
    COUNT_IN,
    FIRST,
    FIRST_IN,
    N_IN,
    NODE,
    PADDED,
    START,
    USED,
    B,
    W,
    column_of,
    columns,
    matrix,
    matrix_column,
    used,
)
from .rows import add_rows, add_to
from .tiles import DIRECTION, PARAMS

# Of `to`, where the gradients of a tile's edges, or of their partners, go: this program's parameters and partial rows, in these the tile's first
# destination and source and their ends; views of the raw weights' and carriers' gradients, and whether a block's are wanted; cells, places and
# gradients of the curve, and the tile's first place among them.
G_PARAMS, G_PARTIAL, ROW_I, ROW_J, END_I, END_J, G_RAW, G_CARRIER, WANTS_RAW, WANTS_CARRIER, G_CELL, G_PLACE, G_CURVE, SLOTS = (tl.constexpr(k) for k in range(14))
NEED_PARAMS, NEED_NODES, NEED_RAW, NEED_TABLE, LATER = (tl.constexpr(k) for k in range(5))  # of NEED


@triton.jit
def start_gradient(to, g, at, STEP: tl.constexpr, OUT: tl.constexpr, NEED: tl.constexpr, SUMS: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, SPARSE: tl.constexpr):
    """Of what a linear step adds to its product: the node term (with it the bias), or the bias."""
    if STEP[NODE] >= 0:
        if NEED[NEED_NODES] or NEED[NEED_PARAMS]:
            add_rows(to[G_PARTIAL], g, at, to[ROW_I], to[END_I], STEP[NODE], OUT, SUMS, True, BI, BJ, SPARSE)
            add_rows(to[G_PARTIAL], g, at, to[ROW_J], to[END_J], STEP[NODE], OUT, SUMS, False, BI, BJ, SPARSE)
    elif STEP[B] >= 0 and NEED[NEED_PARAMS]:
        add_to(to[G_PARAMS] + STEP[B] + columns(OUT), tl.sum(g, 0), used(OUT))


@triton.jit
def matrix_gradient(w, x, g, STEP: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, PRECISION: tl.constexpr):
    """Adds g^T x [P_out, P_in] to the gradient of a part of W."""
    n, k = columns(OUT), columns(IN)
    if IN[PADDED] >= 16:
        total = dot(tl.trans(g), x, tl.zeros((OUT[PADDED], IN[PADDED]), g.dtype), PRECISION)
        if OUT[USED] == OUT[PADDED] and IN[USED] == IN[PADDED]:
            p = w + n[:, None] * STEP[N_IN] + k[None, :]
            tl.store(p, tl.load(p) + total)
        else:
            add_to(w + n[:, None] * STEP[N_IN] + k[None, :], total, used(OUT)[:, None] & used(IN)[None, :])
    else:
        for c in tl.static_range(IN[USED]):
            add_to(w + n * STEP[N_IN] + (IN[START] + c), tl.sum(g * column_of(x, c), 0), used(OUT))


@triton.jit
def input_gradient(g, w, acc, STEP: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, PRECISION: tl.constexpr):
    """acc + g W [size, P_in], of chunk OUT alone."""
    if IN[PADDED] >= 16:
        return dot(g, matrix(w, STEP, IN, OUT), acc, PRECISION)
    else:
        for c in tl.static_range(IN[USED]):
            value = tl.sum(g * matrix_column(w, c, STEP, IN, OUT), 1)[:, None]
            acc = acc + tl.where((tl.arange(0, IN[PADDED]) == c)[None, :], value, 0)
        return acc


@triton.jit
def add_matrix_gradients(w, x, g, STEP: tl.constexpr, CHUNKS: tl.constexpr, PRECISION: tl.constexpr):
    """Adds g^T x to the gradient of a matrix at w, for the input register x of a step."""
    for i in tl.static_range(STEP[COUNT_IN]):
        for c in tl.static_range(STEP[COUNT]):
            matrix_gradient(w, x[STEP[FIRST_IN] + i], g[c], STEP, CHUNKS[STEP[FIRST_IN] + i], CHUNKS[STEP[FIRST] + c], PRECISION)


@triton.jit
def through_matrix(g, w, acc, i: tl.constexpr, STEP: tl.constexpr, CHUNKS: tl.constexpr, PRECISION: tl.constexpr):
    """acc + chunk i of g W, for the matrix at w."""
    for c in tl.static_range(STEP[COUNT]):
        acc = input_gradient(g[c], w, acc, STEP, CHUNKS[STEP[FIRST_IN] + i], CHUNKS[STEP[FIRST] + c], PRECISION)
    return acc


@triton.jit
def parameters_back(regs, others, g, at, to, STEP: tl.constexpr, CHUNKS: tl.constexpr, NEED: tl.constexpr, SUMS: tl.constexpr, PRECISION: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, SPARSE: tl.constexpr):
    """Gradients of a linear step's bias or node term and of its matrices."""
    for c in tl.static_range(STEP[COUNT]):
        start_gradient(to, g[c], at, STEP, CHUNKS[STEP[FIRST] + c], NEED, SUMS, BI, BJ, SPARSE)
    if NEED[NEED_PARAMS]:
        add_matrix_gradients(to[G_PARAMS] + STEP[W] + at[DIRECTION] * STEP[ARG0], regs, g, STEP, CHUNKS, PRECISION)
        if STEP[ARG1] >= 0:
            add_matrix_gradients(to[G_PARAMS] + STEP[ARG1], others, g, STEP, CHUNKS, PRECISION)


@triton.jit
def below_linear(regs, g, h, at, OWN: tl.constexpr, OTHER: tl.constexpr, STEP: tl.constexpr, CHUNKS: tl.constexpr, PRECISION: tl.constexpr):
    """Gradient of the input register: with OWN g W of its own result, with OTHER of a pair update h B of its partners' result."""
    below = ()
    for i in tl.static_range(STEP[COUNT_IN]):
        acc = tl.zeros(regs[STEP[FIRST_IN] + i].shape, regs[STEP[FIRST_IN] + i].dtype)
        if OWN:
            acc = through_matrix(g, at[PARAMS] + STEP[W] + at[DIRECTION] * STEP[ARG0], acc, i, STEP, CHUNKS, PRECISION)
        if OTHER and STEP[ARG1] >= 0:
            acc = through_matrix(h, at[PARAMS] + STEP[ARG1], acc, i, STEP, CHUNKS, PRECISION)
        below = below + (acc,)
    return below

"""The backward pass of node_map in Triton: the linear part is computed again, and gradients go back through norm and activation to the maps.

Sums over rows are made by a few programs, each over rows of its own, and their results are added up in the order of the rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..program import full_precision
from . import launch
from .edge_math import activate, dot, slope
from .launch import run
from .node_map import GRAPH, IDENTITY, Nodes, block, linear, moments, scaling, size, summed
from .nodes import BLOCK, times

PART = 256  # rows of a partial sum, at least
MOST_PARTS = 256


@triton.jit
def normalised(v, grad, mean, inverse, weight, bias, ACT: tl.constexpr, FIRST: tl.constexpr):
    """(n, the gradient of weight n + bias) where n are the normalised values, of the gradient of the result."""
    if FIRST:
        v = activate(v, ACT)
    n = (v - mean) * inverse
    if not FIRST:
        grad = grad * slope(n * weight + bias, ACT)
    return n, grad


@triton.jit(do_not_specialize=["rows", "width"])
def row_sums_kernel(sums, y, grad, kept, segment, weight, bias, rows, width, NORM: tl.constexpr, ACT: tl.constexpr, FIRST: tl.constexpr, EPS: tl.constexpr, SIZE: tl.constexpr):
    """sums [rows, 2]: over each row, of the gradient of the normalised values, and of it times them."""
    r = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    live = r < rows
    mean, inverse = scaling(kept, segment, r, live, width, NORM, EPS)
    one = tl.zeros((SIZE,), y.dtype.element_ty)
    two = one
    first = 0
    while first < width:
        c = first + tl.arange(0, BLOCK)
        here, there = (r * width)[:, None] + c[None, :], live[:, None] & (c < width)[None, :]
        w = tl.load(weight + c, mask=c < width, other=0)[None, :]
        n, d = normalised(tl.load(y + here, mask=there, other=0), tl.load(grad + here, mask=there, other=0), mean, inverse, w, tl.load(bias + c, mask=c < width, other=0)[None, :], ACT, FIRST)
        one += tl.sum(d * w, 1)  # where there is no column, both are 0
        two += tl.sum(d * w * n, 1)
        first += BLOCK
    tl.store(sums + 2 * r, one, mask=live)
    tl.store(sums + 2 * r + 1, two, mask=live)


@triton.jit(do_not_specialize=["width"])
def slopes_kernel(slopes, sums, stats, bounds, width, EPS: tl.constexpr, SIZE: tl.constexpr):
    """slopes [segments, 2]: what the segment's mean and spread take from the gradient: a number, and a number times the normalised value."""
    s = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(bounds + s), tl.load(bounds + s + 1)
    n = (end - begin).to(slopes.dtype.element_ty) * width
    spread = tl.load(stats + 2 * s + 1)
    along = summed(sums, begin, end, 1, SIZE) / n / spread
    tl.store(slopes + 2 * s, summed(sums, begin, end, 0, SIZE) / n / (spread + EPS))
    tl.store(slopes + 2 * s + 1, tl.where(spread > 0, along, 0))  # equal states have no slope


@triton.jit(do_not_specialize=["rows", "width", "share"])
def down_kernel(
    g, partial, y, grad, kept, lost, segment, weight, bias, rows, width, share,
    NORM: tl.constexpr, ACT: tl.constexpr, FIRST: tl.constexpr, EPS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """g [rows, width]: the gradient of the linear part; partial [parts, 3, width]: over `share` rows, the sums of g and those that are the
    gradients of the norm's bias and weight. lost: sums of the rows, or slopes of their segments."""
    T: tl.constexpr = y.dtype.element_ty
    to_bias, to_shift, to_scale = tl.zeros((BLOCK,), T), tl.zeros((BLOCK,), T), tl.zeros((BLOCK,), T)
    at = tl.program_id(0).to(tl.int64) * share
    end = tl.minimum(at + share, rows)
    while at < end:
        r, live, c, used, here, there = block(at, SIZE, end, width)
        v, d = tl.load(y + here, mask=there, other=0), tl.load(grad + here, mask=there, other=0)
        if NORM:
            mean, inverse = scaling(kept, segment, r, live, width, NORM, EPS)
            w = tl.load(weight + c, mask=used, other=0)[None, :]
            n, d = normalised(v, d, mean, inverse, w, tl.load(bias + c, mask=used, other=0)[None, :], ACT, FIRST)
            to_shift += tl.sum(d, 0)
            to_scale += tl.sum(d * n, 0)
            k = tl.load(segment + r, mask=live, other=0) if NORM == GRAPH else r
            a, b = tl.load(lost + 2 * k, mask=live, other=0)[:, None], tl.load(lost + 2 * k + 1, mask=live, other=0)[:, None]
            if NORM != GRAPH:
                a, b = a * (inverse / width), b * (inverse / width)
            d = d * w * inverse - a - n * b
        if FIRST or not NORM:
            d = d * slope(v, ACT)
        d = tl.where(there, d, 0)
        tl.store(g + here, d, mask=there)
        to_bias += tl.sum(d, 0)
        at += SIZE
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    to = partial + tl.program_id(0).to(tl.int64) * 3 * width + c
    tl.store(to, to_bias, mask=c < width)
    tl.store(to + width, to_shift, mask=c < width)
    tl.store(to + width + width, to_scale, mask=c < width)


@triton.jit(do_not_specialize=["rows", "width", "columns", "inputs", "share"])
def maps_kernel(partial, g, x, factor, rows, width, columns, inputs, share, SCALED: tl.constexpr, PRECISION: tl.constexpr, SIZE: tl.constexpr):
    """partial [parts, width, inputs], its first `columns` columns: over `share` rows, the sums of g (outer) x, scaled by `factor`."""
    inputs = inputs.to(tl.int64)
    n, k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK, BLOCK), g.dtype.element_ty)
    at = tl.program_id(0).to(tl.int64) * share
    end = tl.minimum(at + share, rows)
    while at < end:
        r = at + tl.arange(0, SIZE)
        live = (r < end)[:, None]
        a = tl.load(g + (r * width)[:, None] + n[None, :], mask=live & (n < width)[None, :], other=0)
        b = tl.load(x + (r * columns)[:, None] + k[None, :], mask=live & (k < columns)[None, :], other=0)
        if SCALED:
            b = b * tl.load(factor + r, mask=r < end, other=0)[:, None]
        acc = dot(tl.trans(a), b, acc, PRECISION)
        at += SIZE
    here = partial + tl.program_id(0).to(tl.int64) * width * inputs + (n * inputs)[:, None] + k[None, :]
    tl.store(here, acc, mask=(n < width)[:, None] & (k < columns)[None, :])


@triton.jit(do_not_specialize=["rows", "width", "columns", "inputs"])
def inputs_kernel(out, g, w, factors, rows, width, columns, inputs, PARTS: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr, SIZE: tl.constexpr):
    """out [rows, columns] = sum over s of a_s (g W_s); W_s: `columns` columns from s * columns on of w [width, inputs]."""
    columns, inputs = columns.to(tl.int64), inputs.to(tl.int64)
    r, live, _, _, here, there = block(tl.program_id(0).to(tl.int64) * SIZE, SIZE, rows, columns)
    first = tl.program_id(1) * BLOCK
    zero = tl.zeros((SIZE, BLOCK), out.dtype.element_ty)
    acc = zero
    for s in tl.static_range(PARTS):
        part = w + s * columns + first
        if (UNIT >> s) & 1:
            acc = times(g, width, r, live, 0, width, part, inputs, 1, columns - first, acc, PRECISION)
        else:
            scale = tl.load(factors[s] + r, mask=live, other=0)[:, None]
            acc += scale * times(g, width, r, live, 0, width, part, inputs, 1, columns - first, zero, PRECISION)
    tl.store(out + here, acc, mask=there)


# ---- on the host ----
def shares(rows: int, entries: int, item: int) -> tuple[int, int]:
    """(parts, rows of each): as many partial sums of so many entries as are worth it and as memory is meant for."""
    parts = max(1, min(triton.cdiv(rows, PART), MOST_PARTS, launch.BUDGET // (entries * item)))
    share = triton.cdiv(triton.cdiv(rows, parts), size()) * size()
    return triton.cdiv(rows, share), share


def through_norm(k: Nodes, grad: torch.Tensor, stats: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(the gradient of the linear part [R, O]; [3, O]: the gradients of its bias, and of the norm's bias and weight)."""
    y = linear(k, torch.empty_like(grad), IDENTITY)
    kept, lost, form = stats, stats, (k.norm, k.act, k.first, k.eps, size())
    if k.norm:
        kept = stats if k.norm == GRAPH.value else moments(k, y)
        lost = y.new_empty(len(y), 2)
        run(row_sums_kernel, k.grid[:1], lost, y, grad, kept, k.segment, *k.affine, *y.shape, *form, num_warps=4)
    if k.norm == GRAPH.value:
        sums, lost = lost, torch.empty_like(stats)
        run(slopes_kernel, (len(stats),), lost, sums, stats, k.bounds, k.width, k.eps, 1024, num_warps=4)
    parts, share = shares(len(y), 3 * k.width, y.element_size())
    g, partial = torch.empty_like(y), y.new_empty(parts, 3, k.width)
    run(down_kernel, (parts, k.grid[1]), g, partial, y, grad, kept, lost, k.segment, *k.affine, *y.shape, share, *form, num_warps=4)
    return g, partial.sum(0)


def to_matrix(k: Nodes, g: torch.Tensor) -> torch.Tensor:
    """The gradient of the folded matrix, [O, F + S C]."""
    inputs, grid = k.matrix.shape[1], k.grid[1]
    parts, share = shares(len(g), k.matrix.numel(), g.element_size())
    partial = g.new_empty(parts, *k.matrix.shape)
    scaled = [(k.reduced, factor, not k.unit >> s & 1) for s, factor in enumerate(k.factors)]
    first = 0
    for x, factor, has_factor in [(k.x, k.x, False), *scaled]:
        columns = x.shape[1]
        if columns:
            run(
                maps_kernel, (parts, grid, triton.cdiv(columns, BLOCK.value)),
                partial.view(-1)[first:], g, x, factor, len(g), k.width, columns, inputs, share, has_factor, k.precision, size(), num_warps=4,
            )  # fmt: skip
        first += columns
    return partial.sum(0)


def to_inputs(k: Nodes, g: torch.Tensor, x: torch.Tensor, matrix: torch.Tensor, factors: tuple[torch.Tensor, ...], unit: int) -> None:
    """Writes the gradient of x or of reduced."""
    rows, columns = x.shape
    grid = (k.grid[0], triton.cdiv(columns, BLOCK.value))
    run(inputs_kernel, grid, x, g, matrix, factors, rows, k.width, columns, k.matrix.shape[1], len(factors), unit, k.precision, size(), num_warps=4)


def to_maps(maps: Sequence[torch.Tensor], matrix: torch.Tensor | None, bias: torch.Tensor, grads: Sequence[torch.Tensor]) -> None:
    """Writes the gradients of the maps from those of the folded matrix and bias, products in float64."""
    if len(maps) == 2:
        found = (lambda: matrix), (lambda: bias)
    else:
        with full_precision(bias.device):
            first, first_bias, lin, _ = (t.double() for t in maps)
            found = (
                lambda: lin.T @ matrix.double(), lambda: lin.T @ bias.double(),
                lambda: torch.addr(matrix.double() @ first.T, bias.double(), first_bias), lambda: bias,
            )  # fmt: skip
    with full_precision(bias.device):
        for to, gradient in zip(grads, found, strict=True):
            if to.numel():
                to.copy_(gradient())


def backward(k: Nodes, maps: Sequence[torch.Tensor], grad: torch.Tensor, stats: torch.Tensor, grads: Sequence[torch.Tensor]) -> None:
    """Writes the gradients of x, reduced, the maps, weight and bias of the norm; an empty one is not wanted."""
    grad_x, grad_reduced, *rest = grads
    of_maps, of_norm = rest[: len(maps)], rest[len(maps) :]
    if not k.x.shape[0] or not k.width:
        for t in grads:
            t.zero_()
        return
    g, (bias, shift, scale) = through_norm(k, grad.contiguous(), stats)
    for to, found in zip(of_norm, (scale, shift), strict=False):
        if to.numel():
            to.copy_(found)
    f = k.x.shape[1]
    if grad_x.numel():
        to_inputs(k, g, grad_x, k.matrix, (k.x,), 1)
    if grad_reduced.numel() and k.factors:
        to_inputs(k, g, grad_reduced, k.matrix.view(-1)[f:], k.factors, k.unit)
    elif grad_reduced.numel():
        grad_reduced.zero_()
    matrix = to_matrix(k, g) if any(t.numel() for t in of_maps[::2]) else None
    to_maps(maps, matrix, bias, of_maps)

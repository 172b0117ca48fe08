"""node_map, forward, in Triton: a product for each block of rows and columns, then the norm and the activation.

A row's product, moments and result depend on that row alone, and those of a segment on its rows alone, whatever else is in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..checks import ACTIVATIONS
from ..program import full_precision
from .edge_math import activate
from .launch import interpreted, run
from .nodes import BLOCK, times

LAYER, GRAPH = (tl.constexpr(k) for k in (1, 2))  # positions in reference.node_map.NORMS
IDENTITY = ACTIVATIONS.index("identity")


@triton.jit
def block(first, SIZE: tl.constexpr, rows, width):
    """(rows, which exist, columns, which exist, places [SIZE, BLOCK] in [rows, width], which exist) of a program's rows from `first` on."""
    r, c = first + tl.arange(0, SIZE), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live, used = r < rows, c < width
    return r, live, c, used, (r * width)[:, None] + c[None, :], live[:, None] & used[None, :]


@triton.jit(do_not_specialize=["rows", "f", "c", "width"])
def linear_kernel(out, x, reduced, factors, w, bias, rows, f, c, width, PARTS: tl.constexpr, UNIT: tl.constexpr, ACT: tl.constexpr, PRECISION: tl.constexpr, SIZE: tl.constexpr):
    """out [rows, width] = act(x W_x^T + sum over s of a_s (reduced W_s^T) + bias), w = [W_x | W_0 | ..]; a_s is 1 where bit s of UNIT is set."""
    r, live, n, used, here, there = block(tl.program_id(0).to(tl.int64) * SIZE, SIZE, rows, width)
    first = tl.program_id(1) * BLOCK
    f, c = f.to(tl.int64), c.to(tl.int64)
    inputs = f + PARTS * c
    zero = tl.zeros((SIZE, BLOCK), out.dtype.element_ty)
    acc = zero + tl.load(bias + n, mask=used, other=0)[None, :]
    acc = times(x, f, r, live, 0, f, w + first * inputs, 1, inputs, width - first, acc, PRECISION)
    for s in tl.static_range(PARTS):
        part = w + first * inputs + f + s * c
        if (UNIT >> s) & 1:
            acc = times(reduced, c, r, live, 0, c, part, 1, inputs, width - first, acc, PRECISION)
        else:
            scale = tl.load(factors[s] + r, mask=live, other=0)[:, None]
            acc += scale * times(reduced, c, r, live, 0, c, part, 1, inputs, width - first, zero, PRECISION)
    tl.store(out + here, activate(acc, ACT), mask=there)


@triton.jit(do_not_specialize=["rows", "width"])
def moments_kernel(moments, y, rows, width, ACT: tl.constexpr, SIZE: tl.constexpr):
    """moments [rows, 2]: the mean of each row of act(y) [rows, width], and the sum of squares about it."""
    r = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    live, here = (r < rows)[:, None], y + (r * width)[:, None]
    total = tl.zeros((SIZE,), y.dtype.element_ty)
    first = 0
    while first < width:
        c = first + tl.arange(0, BLOCK)[None, :]
        total += tl.sum(tl.where(c < width, activate(tl.load(here + c, mask=live & (c < width), other=0), ACT), 0), 1)
        first += BLOCK
    mean = total / width
    squares = tl.zeros((SIZE,), y.dtype.element_ty)
    first = 0
    while first < width:
        c = first + tl.arange(0, BLOCK)[None, :]
        d = tl.where(c < width, activate(tl.load(here + c, mask=live & (c < width), other=0), ACT) - mean[:, None], 0)
        squares += tl.sum(d * d, 1)
        first += BLOCK
    tl.store(moments + 2 * r, mean, mask=r < rows)
    tl.store(moments + 2 * r + 1, squares, mask=r < rows)


@triton.jit
def summed(pairs, begin, end, FIELD: tl.constexpr, SIZE: tl.constexpr):
    """The sum of pairs[begin:end, FIELD]."""
    total = tl.zeros((SIZE,), pairs.dtype.element_ty)
    at = begin
    while at < end:
        r = at + tl.arange(0, SIZE)
        total += tl.load(pairs + 2 * r + FIELD, mask=r < end, other=0)
        at += SIZE
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["width"])
def spread_kernel(stats, moments, bounds, width, SIZE: tl.constexpr):
    """stats [segments, 2]: mean and standard deviation of all values of a segment's rows."""
    s = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(bounds + s), tl.load(bounds + s + 1)
    n = (end - begin).to(stats.dtype.element_ty)
    mean = summed(moments, begin, end, 0, SIZE) / n
    between = tl.zeros((SIZE,), stats.dtype.element_ty)
    at = begin
    while at < end:
        r = at + tl.arange(0, SIZE)
        d = tl.where(r < end, tl.load(moments + 2 * r, mask=r < end, other=0) - mean, 0)
        between += d * d
        at += SIZE
    squares = summed(moments, begin, end, 1, SIZE) + width * tl.sum(between, 0)
    tl.store(stats + 2 * s, mean)
    tl.store(stats + 2 * s + 1, tl.sqrt(squares / (n * width)))


@triton.jit
def scaling(kept, segment, r, live, width, NORM: tl.constexpr, EPS: tl.constexpr):
    """(mean, 1 / s) [SIZE, 1] of the rows r: from the moments of each, or from the statistics of its segment."""
    if NORM == GRAPH:
        k = tl.load(segment + r, mask=live, other=0)
        return tl.load(kept + 2 * k)[:, None], (1 / (tl.load(kept + 2 * k + 1) + EPS))[:, None]
    else:
        squares = tl.load(kept + 2 * r + 1, mask=live, other=0)
        return tl.load(kept + 2 * r, mask=live, other=0)[:, None], (1 / tl.sqrt(squares / width + EPS))[:, None]


@triton.jit(do_not_specialize=["rows", "width"])
def norm_kernel(out, y, kept, segment, weight, bias, rows, width, NORM: tl.constexpr, ACT: tl.constexpr, FIRST: tl.constexpr, EPS: tl.constexpr, SIZE: tl.constexpr):
    """out [rows, width] = act(norm(y)), or norm(act(y)) with FIRST."""
    r, live, c, used, here, there = block(tl.program_id(0).to(tl.int64) * SIZE, SIZE, rows, width)
    mean, inverse = scaling(kept, segment, r, live, width, NORM, EPS)
    v = tl.load(y + here, mask=there, other=0)
    if FIRST:
        v = activate(v, ACT)
    v = (v - mean) * inverse * tl.load(weight + c, mask=used, other=0)[None, :] + tl.load(bias + c, mask=used, other=0)[None, :]
    if not FIRST:
        v = activate(v, ACT)
    tl.store(out + here, v, mask=there)


# ---- on the host ----
class Nodes(NamedTuple):
    """One call: contiguous tensors, the folded matrix [O, F + S C] and bias [O]; factors: one for each s, any tensor where bit s of `unit` is
    set; segment: of each row, for a norm over segments."""

    x: torch.Tensor
    reduced: torch.Tensor
    matrix: torch.Tensor
    bias: torch.Tensor
    factors: tuple[torch.Tensor, ...]
    unit: int
    affine: tuple[torch.Tensor, ...]
    bounds: torch.Tensor
    segment: torch.Tensor
    norm: int
    act: int
    first: bool
    eps: float

    @classmethod
    def of(cls, x, reduced, maps, factors: Sequence[torch.Tensor], unit: Sequence[int], affine, bounds, form: Sequence[int], eps: float) -> Nodes:
        if reduced.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"node_map: expected reduced in float32 or float64 for the Triton kernels, got {reduced.dtype}; convert it with .float()")
        matrix, bias = folded(maps)
        given = iter(factors)
        factors = tuple(reduced if one else next(given).contiguous() for one in unit)
        segment = bounds
        if form[0] == GRAPH.value:
            segment = torch.searchsorted(bounds, torch.arange(x.shape[0], device=x.device), right=True) - 1
        mask = sum(one << k for k, one in enumerate(unit))
        affine = tuple(t.contiguous() for t in affine) or (bias, bias)
        return cls(x.contiguous(), reduced.contiguous(), matrix, bias, factors, mask, affine, bounds.contiguous(), segment, form[0], form[1], bool(form[2]), eps)

    @property
    def width(self) -> int:
        return self.matrix.shape[0]

    @property
    def precision(self) -> str:
        """Exact: nodes are few."""
        return "float64" if self.x.dtype == torch.float64 else "ieee"

    @property
    def grid(self) -> tuple[int, int]:
        return triton.cdiv(self.x.shape[0], size()), triton.cdiv(self.width, BLOCK.value)


def size() -> int:
    """Rows of a program."""
    return 64 if interpreted() else 32


def folded(maps: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Matrix and bias of `lin` after the first map, multiplied in float64."""
    if len(maps) == 2:
        return maps[0].contiguous(), maps[1].contiguous()
    with full_precision(maps[0].device):
        matrix, bias, lin, lin_bias = (t.double() for t in maps)
        return (lin @ matrix).to(maps[0].dtype), torch.addmv(lin_bias, lin, bias).to(maps[0].dtype)


def linear(k: Nodes, out: torch.Tensor, act: int) -> torch.Tensor:
    """Writes act of the linear part to out [R, O]."""
    run(
        linear_kernel, k.grid,
        out, k.x, k.reduced, k.factors or (k.x,), k.matrix, k.bias, *k.x.shape, k.reduced.shape[1], k.width, len(k.factors), k.unit, act, k.precision, size(),
        num_warps=4,
    )  # fmt: skip
    return out


def moments(k: Nodes, y: torch.Tensor) -> torch.Tensor:
    """[R, 2]: means of the rows of what is normalised, and sums of squares about them."""
    found = y.new_empty(len(y), 2)
    run(moments_kernel, k.grid[:1], found, y, *y.shape, k.act if k.first else IDENTITY, size(), num_warps=4)
    return found


def forward(k: Nodes, out: torch.Tensor, stats: torch.Tensor) -> None:
    """Writes out [R, O], and for a norm over segments its mean and standard deviation, stats [segments, 2]."""
    if not out.numel():
        stats.zero_()
        return
    if not k.norm:
        linear(k, out, k.act)
        return
    y = linear(k, torch.empty_like(out), IDENTITY)
    kept = moments(k, y)
    if k.norm == GRAPH.value:
        run(spread_kernel, (len(stats),), stats, kept, k.bounds, k.width, 1024, num_warps=4)
        kept = stats
    run(norm_kernel, k.grid, out, y, kept, k.segment, *k.affine, *y.shape, k.norm, k.act, k.first, k.eps, size(), num_warps=4)

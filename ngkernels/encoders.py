"""Encoders: how an edge's raw features become its first hidden state e0."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from . import mapped
from .kept import hold, kept

MAX_TABLE_NODES = 1 << 14  # beyond this |w|, weights take the direct path one by one
ASSUMED_RANGE = 2.0  # of weights that cannot be looked at: in compiled code, in plans


@dataclass(frozen=True)
class Linear:
    """e0 = weight w + bias. weight [D, C], bias [D]."""

    weight: torch.Tensor
    bias: torch.Tensor
    reciprocal: bool = False


@dataclass(frozen=True)
class Fourier:
    """e0 = weight [cos(2 pi b w), sin(2 pi b w)] + bias: Gaussian Fourier features and a linear map.

    frequencies b [m, C] (frozen), weight [D, 2m], bias [D]. With one channel the map w -> e0 is tabulated
    (float32; float64 evaluates it directly): quintic Hermite on a grid of step 2^-k, built from `frequencies` in float64;
    `table_range` is the largest |w| in the table (None: measured; under torch.compile and on GPUs, 2.0), `step` is k (None: from
    the frequencies, which reads them: give it under torch.compile, or every edge is evaluated directly).

    Reference: Tancik et al., NeurIPS 2020, as used by Kofinas et al., ICLR 2024.
    """

    frequencies: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    reciprocal: bool = False
    table_range: float | None = None
    table: str = "auto"  # or "never"
    step: int | None = None


@dataclass(frozen=True)
class Identity:
    """e0 = w: the raw features, C wide, are the hidden state."""

    reciprocal: bool = False


def expansion(channels: int, direction: int, like: torch.Tensor) -> torch.Tensor:
    """[3C, C] matrix X with X w = [e, e_reversed, e + e_reversed] of a forward (0) or reversed (1) edge.

    In a layered network only one of the two directions carries the weight, so the other entry is 0.
    """
    eye, zero = torch.eye(channels, dtype=like.dtype, device=like.device), like.new_zeros(channels, channels)
    return torch.cat([eye, zero, eye] if direction == 0 else [zero, eye, eye])


def table_step(frequencies: torch.Tensor) -> int:
    """k of the grid step 2^-k: values to about 3e-8 of the curve's size (2^-7 at sigma = 3).

    The interpolation error of a wave of frequency b is (2 pi b h)^6 / 46080. A quintic needs a grid four times
    coarser than a cubic, so that the part of it that most weights use stays in the first-level cache.
    """

    def step() -> int:
        rms = frequencies.double().pow(2).mean().sqrt().item()  # waits for a GPU: once
        return max(0, 5 + round(math.log2(max(rms, 1e-3))))

    return _kept(frequencies, ("step",), step)


@dataclass(frozen=True)
class Table:
    """A tabulated encoder, made once for all consumers of a state (EdgeState.tabulate).

    values [directions, nodes, 3, n] of the map w -> e0 without its constant, or, `through`, of weight_edge of the state's first update times
    it; complete: no weight lies beyond the table.
    """

    values: torch.Tensor
    complete: bool
    through: bool = False

    def times(self, weight: torch.Tensor, through: bool = False) -> Table:
        """The table of the map that `weight` [m, n] follows."""
        return Table(self.values @ weight.to(self.values.dtype).T, self.complete, through)


def make_table(enc: Fourier, weights, affine, dtype: torch.dtype, directions: int) -> Table | None:
    """The table of `enc` for these weights, in steps of 2^-grid_step(enc); None where edges are evaluated directly."""
    step = grid_step(enc)
    if weights[0].shape[-1] != 1 or enc.table == "never" or dtype == torch.float64 or step is None:
        return None
    limit = measured_range(weights, affine) if enc.table_range is None else enc.table_range
    half = table_half(step, ASSUMED_RANGE if limit is None else limit)
    complete = enc.table_range is None and limit is not None and half < MAX_TABLE_NODES
    weight = enc.weight.to(dtype)
    tabulate = torch.ops.ngkernels.tabulate  # ops import this module
    each = [tabulate(weight, enc.frequencies, d, step, half) for d in (range(directions) if enc.reciprocal else [-1])]
    return Table(each[0][None] if len(each) == 1 else torch.stack(each), complete)


def grid_step(enc: Fourier) -> int | None:
    """k of the grid of `enc`; None under torch.compile where it is not given."""
    return enc.step if enc.step is not None or torch.compiler.is_compiling() else table_step(enc.frequencies)


class Grid(NamedTuple):
    """Fourier features, h times their first and h^2 times their second derivative at a grid's nodes, [nodes, 3, 2m], for `tabulate`.

    The inner nodes' are left @ right, [inner, 3, r] and [r, 2m]: on a bounded range the waves are nearly dependent, r is a third of 2m, and
    the rounding of the longer sums in float32 is larger than what this leaves out (largest error of a table of 641 nodes: 8e-7 in place of
    1.7e-6). Which nodes are inner ones does not depend on how many there are, so that a table's values do not either. outer: the others'.
    """

    left: torch.Tensor
    right: torch.Tensor
    outer: torch.Tensor | None


_basis_cache: dict = {}


def inner_half(k: int) -> int:
    return table_half(k, ASSUMED_RANGE)


def grid_values(k: int, half: int, features: int) -> tuple[int, int]:
    """(about how many numbers a Grid holds, products of a column with it)."""
    inner = inner_half(k)
    rank, lines = min(features, 24 + inner // 5), 3 * (2 * inner + 1)  # measured: 39 at 96, 61 at 192, 86 at 320, 186 at 1024
    outer = 6 * max(0, half - inner) * features
    return rank * (lines + features) + outer, rank * (min(lines, 3 * (2 * half + 1)) + features) + outer


def grid_basis(frequencies: torch.Tensor, direction: int | None, k: int, half: int, dtype: torch.dtype) -> Grid:
    """The grid of steps 2^-k from -half to half. `direction`: None, or that of a reciprocal encoder.

    Depends on the frozen frequencies only, so its parts are kept for the next step.
    """
    inner = inner_half(k)

    def waves(nodes: torch.Tensor) -> torch.Tensor:
        step = 2.0**-k
        b = frequencies.detach().double()
        b = 2 * math.pi * (b if direction is None else b @ expansion(1, direction, b)).reshape(1, -1)
        arg = nodes.to(b)[:, None] * step * b
        cos, sin = arg.cos(), arg.sin()
        slope, bend = b * step, (b * step) ** 2
        return torch.stack([torch.cat([cos, sin], 1), torch.cat([-sin * slope, cos * slope], 1), torch.cat([-cos * bend, -sin * bend], 1)], 1)

    def factors() -> tuple[torch.Tensor, torch.Tensor]:
        basis = waves(torch.arange(-inner, inner + 1, dtype=torch.float64))
        flat = basis.flatten(0, 1)
        energies, directions = torch.linalg.eigh(flat.T @ flat)
        right = directions[:, energies > 1e-15 * energies[-1]].T
        return (basis @ right.T).to(dtype), right.contiguous().to(dtype)

    def outer() -> torch.Tensor:
        nodes = torch.arange(-half, half + 1, dtype=torch.float64)
        return waves(nodes[nodes.abs() > inner]).to(dtype)

    left, right = _kept(frequencies, (direction, k, dtype), factors)
    if half > inner:
        return Grid(left, right, _kept(frequencies, (direction, k, dtype, half), outer))
    return Grid(left[inner - half : inner + half + 1], right, None)


def _kept(frequencies: torch.Tensor, key: tuple, make: Callable):
    """What `make` returned for these frequencies and this key. They are kept too: nothing else can come to lie where they do."""
    key = (frequencies.data_ptr(), frequencies._version, tuple(frequencies.shape), frequencies.stride(), frequencies.dtype, *key)
    if key not in _basis_cache and len(_basis_cache) >= 16:
        _basis_cache.pop(next(iter(_basis_cache)))
    found = kept(_basis_cache, key, lambda: (frequencies, make()))
    if not torch.compiler.is_compiling():
        _basis_cache[key] = hold(_basis_cache.pop(key))  # those asked for last stay
    return found[1]


def _extremes(w: torch.Tensor):
    """Smallest and largest value."""
    file = mapped.find(w)
    return w.detach().aminmax() if file is None else file.extremes(w)


def measured_range(weights: tuple[torch.Tensor, ...], affine) -> float | None:
    """The largest |scale w + shift|; None where that is not finite, under torch.compile, in plans, and on GPUs, which would have to be
    waited for."""
    if torch.compiler.is_compiling() or weights[0].is_meta or weights[0].is_cuda:
        return None
    scale, shift = affine or ((1.0,) * len(weights), (0.0,) * len(weights))
    ends = [(_extremes(w), a, c) for w, a, c in zip(weights, scale, shift, strict=True) if w.numel()]
    limit = max((abs(float(v) * a + c) for pair, a, c in ends for v in pair), default=0.0)
    return limit if math.isfinite(limit) else None


def table_half(k: int, limit: float) -> int:
    """Half the number of grid nodes that covers |w| <= limit, rounded up in steps of at most a quarter so that
    grids are reused."""
    nodes = max(1, math.ceil(limit * 2.0**k) + 1)
    unit = 1 << max(0, nodes.bit_length() - 3)
    return min(MAX_TABLE_NODES, -(-nodes // unit) * unit)

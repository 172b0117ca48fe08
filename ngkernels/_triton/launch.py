"""Sizes of launches: edges of a tile and warps of a program (sizes.py); how matrix products round.

A forward and its backward pass use the same sizes, so that both evaluate an expression to the very same bits.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch.utils._pytree import tree_leaves

from .. import backends
from .lower import Lowered
from .sizes import compiler_options, size_for

INTERPRETED = 256  # edges of a tile in the interpreter, where every operation costs the same whatever its size
BUDGET = 128 << 20  # bytes of partial results in memory at a time,
MOST_TILES = 256  # or more, where so many tiles take more: fewer would leave a GPU idle
OPTIONS = {"enable_fp_fusion": False}  # multiplications and additions contract where the kernels say so: the same on the way there and back


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return bool(triton.knobs.runtime.interpret)


@lru_cache(maxsize=4096)
def constants(value: tuple) -> tuple:
    """Nested tuples of numbers as a constexpr argument: to Triton 3.6 their fields are constants only if each of them is one."""
    if interpreted():
        return value
    return tuple(constants(v) if isinstance(v, tuple) else tl.constexpr(v) for v in value)


def run(kernel: triton.runtime.KernelInterface, grid: tuple[int, ...], *args, **options) -> None:
    """Launches a kernel. Where a step is planned, of tensors without values, the plan takes note of the tensors instead."""
    if (note := backends.planned(args)) is not None:
        note(*tree_leaves(args))
    else:
        kernel[grid](*args, **OPTIONS, **options)


def tile(low: Lowered, precision: str, device: torch.device) -> tuple[int, dict[str, object]]:
    """(edges of a tile, options of launches of the kernels over edges)."""
    if interpreted():
        return INTERPRETED, {"num_warps": 4}
    size = size_for(low, precision, device)
    return size.edges, {"num_warps": size.warps, **compiler_options(low, precision, size.warps, device)}


def precision(dtype: torch.dtype, low: bool, tf32: bool) -> str:
    """How matrix products round their operands: "float64", "bf16", "tf32" or "ieee"; sums are in float32 (float64)."""
    if dtype == torch.float64:
        return "float64"
    if interpreted():
        return "ieee"  # the interpreter's bfloat16 arithmetic is wrong, and it has no tf32
    return "bf16" if low else "tf32" if tf32 else "ieee"

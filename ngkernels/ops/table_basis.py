"""table_basis: the grid of a tabulated encoder as an op, for compiled code (the eager path calls the function)."""

from __future__ import annotations

import torch

from ..encoders import grid_basis
from . import expression as ex

ex.library.define("table_basis(Tensor frequencies, int direction, int k, int half, ScalarType dtype) -> Tensor")


@torch.library.register_fake("ngkernels::table_basis", lib=ex.library)
def _fake(frequencies, direction, k, half, dtype):
    return frequencies.new_empty(2 * half + 1, 3, 2 * frequencies.shape[0], dtype=dtype)


@torch.library.impl("ngkernels::table_basis", "CompositeExplicitAutograd", lib=ex.library)
def _run(frequencies, direction, k, half, dtype):
    return grid_basis(frequencies, None if direction < 0 else direction, k, half, dtype).clone()  # compiled code may write to it

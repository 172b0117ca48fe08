"""tabulate: a scalar Fourier encoder on the grid of its table. Linear in the encoder's matrix, whose gradient is the adjoint.

    [2 half + 1, 3, n]: value, h times slope and h^2 times curvature of w -> weight [cos(2 pi b w), sin(2 pi b w)] in steps of h = 2^-k

for weight [n, 2m] and frozen frequencies b [m, C]; direction: -1, or that of a reciprocal encoder (C = 3). Called by ngkernels/encoders.py.
"""

from __future__ import annotations

import torch

from ..encoders import Grid, grid_basis
from ..program import full_precision
from . import expression as ex
from .autograd import register

_GRID = "Tensor frequencies, int direction, int k, int half"
ex.library.define(f"tabulate(Tensor weight, {_GRID}) -> Tensor")
ex.library.define(f"tabulate_backward(Tensor grad, {_GRID}) -> Tensor")


def _grid(like: torch.Tensor, frequencies, direction, k, half) -> Grid:
    return grid_basis(frequencies, None if direction < 0 else direction, k, half, like.dtype)


@torch.library.register_fake("ngkernels::tabulate", lib=ex.library)
def _fake(weight, frequencies, direction, k, half):
    return weight.new_empty(2 * half + 1, 3, weight.shape[0])


@torch.library.register_fake("ngkernels::tabulate_backward", lib=ex.library)
def _fake_backward(grad, frequencies, direction, k, half):
    return grad.new_empty(grad.shape[2], 2 * frequencies.shape[0])


def _forward(weight, frequencies, direction, k, half):
    grid = _grid(weight, frequencies, direction, k, half)
    with full_precision(weight.device):
        inner = grid.left @ (grid.right @ weight.T)
        if grid.outer is None:
            return inner
        below, above = (grid.outer @ weight.T).chunk(2)
        return torch.cat([below, inner, above])


def _backward(grad, frequencies, direction, k, half):
    grid = _grid(grad, frequencies, direction, k, half)
    beyond = (grad.shape[0] - grid.left.shape[0]) // 2
    with full_precision(grad.device):
        inner = (grad[beyond : grad.shape[0] - beyond].flatten(0, 1).T @ grid.left.flatten(0, 1)) @ grid.right
        if grid.outer is None:
            return inner
        outer = torch.cat([grad[:beyond], grad[grad.shape[0] - beyond :]])
        return inner + outer.flatten(0, 1).T @ grid.outer.flatten(0, 1)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])
    ctx.grid = inputs[2:]


def _autograd(ctx, need, grad):
    return [_run_backward(grad, *ctx.saved_tensors, *ctx.grid) if need[0] else None, None]


def _autograd_double(ctx, need, second):
    return [torch.ops.ngkernels.tabulate(second, *ctx.saved_tensors, *ctx.grid) if need[0] else None, None]


_run_backward = register("tabulate_backward", _backward, _autograd_double, _setup)
register("tabulate", _forward, _autograd, _setup)

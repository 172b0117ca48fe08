"""Calls into the C++ library: outputs are allocated here, kernels write them."""

from __future__ import annotations

import torch

from . import expression as ex


def aggregate(e: ex.E, compute: int, out: torch.Tensor, aux: torch.Tensor, ties: torch.Tensor) -> None:
    torch.ops.ngkernels_C.aggregate(e.weights, e.xs, e.params, e.table, e.topology, e.program, compute & 1, out, aux, ties)


def aggregate_backward(grad, out, aux, ties, e: ex.E, compute: int, grads: list[torch.Tensor]) -> None:
    torch.ops.ngkernels_C.aggregate_backward(grad, out, aux, ties, e.weights, e.xs, e.params, e.table, e.topology, e.program, compute & 1, grads)


def evaluate(e: ex.E, compute: int, out: list[torch.Tensor]) -> None:
    torch.ops.ngkernels_C.evaluate(e.weights, e.xs, e.params, e.table, e.topology, e.program, compute & 1, out)


def evaluate_backward(grad_out: list[torch.Tensor], e: ex.E, compute: int, grads: list[torch.Tensor]) -> None:
    torch.ops.ngkernels_C.evaluate_backward(grad_out, e.weights, e.xs, e.params, e.table, e.topology, e.program, compute & 1, grads)

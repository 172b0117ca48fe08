"""Calls into the C++ library: outputs are allocated here, kernels write them."""

from __future__ import annotations

import torch

from .. import backends
from . import expression as ex

backends.why_not("cpp")  # loads the library now, not while something is traced; the reason is kept where it is not there


def _arguments(e: ex.E, compute: int) -> tuple:
    """What every kernel takes; node states may come with any strides (compiled code hands them over as they are)."""
    xs = [x.contiguous() for x in e.xs]
    return e.weights, xs, e.params, e.table.contiguous(), e.topology, e.program, compute & 1


def aggregate(e: ex.E, compute: int, out: torch.Tensor, aux: torch.Tensor, ties: torch.Tensor) -> None:
    torch.ops.ngkernels_C.aggregate(*_arguments(e, compute), out, aux, ties)


def aggregate_backward(grad, out, aux, ties, e: ex.E, compute: int, grads: list[torch.Tensor]) -> None:
    torch.ops.ngkernels_C.aggregate_backward(grad, out, aux, ties, *_arguments(e, compute), grads)


def evaluate(e: ex.E, compute: int, out: list[torch.Tensor]) -> None:
    torch.ops.ngkernels_C.evaluate(*_arguments(e, compute), out)


def evaluate_backward(grad_out: list[torch.Tensor], e: ex.E, compute: int, grads: list[torch.Tensor]) -> None:
    torch.ops.ngkernels_C.evaluate_backward(grad_out, *_arguments(e, compute), grads)


def attend(e: ex.E, compute: int, nodes, shape, scale: float, dropout: float, seed: int, outputs) -> None:
    torch.ops.ngkernels_C.attend(*_arguments(e, compute), *nodes, shape, scale, dropout, seed, *outputs)


def attend_backward(saved, e: ex.E, compute: int, nodes, shape, scale: float, dropout: float, seed: int, grads) -> None:
    """saved: grad, grad_sums, out, sums, lse; grads: of the expression's tensors, then of q, k, v."""
    saved = [t.contiguous() for t in saved]
    torch.ops.ngkernels_C.attend_backward(*saved, *_arguments(e, compute), *nodes, shape, scale, dropout, seed, grads)


def node_map(x, reduced, maps, factors, unit, affine, bounds, form, eps: float, out: torch.Tensor, stats: torch.Tensor) -> None:
    torch.ops.ngkernels_C.node_map(*_node_arguments(x, reduced, maps, factors, unit, affine, bounds, form), eps, out, stats)


def node_map_backward(grad, stats, x, reduced, maps, factors, unit, affine, bounds, form, eps: float, grads: list[torch.Tensor]) -> None:
    arguments = _node_arguments(x, reduced, maps, factors, unit, affine, bounds, form)
    torch.ops.ngkernels_C.node_map_backward(grad.contiguous(), stats, *arguments, eps, grads)


def _node_arguments(x, reduced, maps, factors, unit, affine, bounds, form) -> tuple:
    """Contiguous tensors: compiled code hands them over with any strides."""
    lists = ([t.contiguous() for t in tensors] for tensors in (maps, factors, affine))
    maps, factors, affine = lists
    return x.contiguous(), reduced.contiguous(), maps, factors, unit, affine, bounds, form

"""Calls into the Triton kernels, which are imported at their first use: outputs are allocated here, kernels write them."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence

import torch

from ..program import full_precision, recipe_of
from ..reference.fold import fold
from . import expression as ex


def _module(name: str):
    return importlib.import_module(f"ngkernels._triton.{name}")


def packed(e: ex.E, params: Sequence[torch.Tensor]) -> torch.Tensor:
    """The packed parameters made of `params`: small matrices, multiplied in float64."""
    with full_precision(e.table.device):
        return fold([t.double() for t in params], recipe_of(e.program), e.table.new_empty(0, dtype=torch.float64)).to(e.table.dtype)


def _call(e: ex.E, compute: int, params: torch.Tensor | None = None, **more):
    e = e._replace(params=packed(e, e.params) if params is None else params)
    return _module("call").Call(e, bool(compute & ex.LOW), bool(compute & ex.TF32), **more)


@contextlib.contextmanager
def differentiated(e: ex.E, compute: int, grads: list[torch.Tensor], make: Callable = _call, **more) -> Iterator:
    """A call, made by `make`, that is given the expression's gradients to write, `grads`. Those of the packed parameters go on to what they are made of."""
    first, last = len(e.weights) + len(e.xs), len(e.weights) + len(e.xs) + len(e.params)
    to = grads[first:last]
    with ex.autograd_enabled():
        leaves = [t.detach().requires_grad_(g.numel() > 0) for t, g in zip(e.params, to, strict=True)]
        params = packed(e, leaves)
    needed = [(leaf, g) for leaf, g in zip(leaves, to, strict=True) if leaf.requires_grad]
    grad = torch.empty_like(params.detach()) if needed else params.new_empty(0)
    yield make(e, compute, params.detach(), grads=[*grads[:first], grad, *grads[last:]], **more)
    if not needed:
        return
    found = torch.autograd.grad(params, [leaf for leaf, _ in needed], grad, allow_unused=True) if params.requires_grad else [None] * len(needed)
    for (_, g), value in zip(needed, found, strict=True):
        g.zero_() if value is None else g.copy_(value)


def aggregate(e: ex.E, compute: int, out: torch.Tensor, aux: torch.Tensor, ties: torch.Tensor) -> None:
    with torch.cuda.device_of(e.table):
        _module("aggregate").forward(_call(e, compute), out, aux, ties)


def aggregate_backward(grad, out, aux, ties, e: ex.E, compute: int, grads: list[torch.Tensor]) -> None:
    gradients = _module("gradients")
    with torch.cuda.device_of(e.table), differentiated(e, compute, grads) as call:
        gradients.backward_pass(call, gradients.Saved((out, aux, ties, grad)))


def evaluate(e: ex.E, compute: int, out: list[torch.Tensor]) -> None:
    with torch.cuda.device_of(e.table):
        _module("evaluate").forward(_call(e, compute, values=out), out)


def evaluate_backward(grad_out: list[torch.Tensor], e: ex.E, compute: int, grads: list[torch.Tensor]) -> None:
    gradients = _module("gradients")
    with torch.cuda.device_of(e.table), differentiated(e, compute, grads, values=grad_out) as call:
        gradients.backward_pass(call, gradients.Saved())


def attend(e: ex.E, compute: int, nodes, shape, scale: float, dropout: float, seed: int, outputs) -> None:
    attend = _module("attend")
    with torch.cuda.device_of(e.table):
        call = _call(e, compute, attention=_attention(nodes, shape), nodes=len(nodes[0]))
        attend.forward(call, attend.Attending.of(nodes, scale, dropout, seed), *outputs)


def attend_backward(saved, e: ex.E, compute: int, nodes, shape, scale: float, dropout: float, seed: int, grads) -> None:
    """saved: grad, grad_sums, out, sums, lse; grads: of the expression's tensors, then of q, k, v."""
    attend, gradients = _module("attend"), _module("gradients")
    grad, grad_sums, out, sums, lse = (t.contiguous() for t in saved)
    more = {"attention": _attention(nodes, shape), "nodes": len(nodes[0])}
    with torch.cuda.device_of(e.table), differentiated(e, compute, grads[:-3], **more) as call:
        kept = (lse, attend.deltas(call, out, grad, sums, grad_sums), grad, grad_sums)
        gradients.backward_pass(call, gradients.Saved(kept, attend.Attending.of(nodes, scale, dropout, seed), tuple(grads[-3:])))


def _attention(nodes, shape) -> tuple[int, ...]:
    """heads, columns of queries and values, whether values are multiplied and states summed."""
    q, _, v = nodes
    return shape[0], q.shape[1], v.shape[1], shape[1], shape[2]


def node_map(x, reduced, maps, factors, unit, affine, bounds, form, eps: float, out: torch.Tensor, stats: torch.Tensor) -> None:
    kernels = _module("node_map")
    with torch.cuda.device_of(reduced):
        kernels.forward(kernels.Nodes.of(x, reduced, maps, factors, unit, affine, bounds, form, eps), out, stats)


def node_map_backward(grad, stats, x, reduced, maps, factors, unit, affine, bounds, form, eps: float, grads: list[torch.Tensor]) -> None:
    with torch.cuda.device_of(reduced):
        nodes = _module("node_map").Nodes.of(x, reduced, maps, factors, unit, affine, bounds, form, eps)
        _module("node_map_back").backward(nodes, maps, grad, stats, grads)

"""Calls into the CUDA kernels, whose host side is imported at its first use: outputs are allocated here, kernels write them."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator

import torch

from . import expression as ex
from ._triton import differentiated, packed


def _module(name: str):
    return importlib.import_module(f"ngkernels._cuda.{name}")


@contextlib.contextmanager
def _named(op: str) -> Iterator[None]:
    """Says of what the kernels do not run which op and backend it was."""
    try:
        yield
    except _module("lower").Unsupported as error:
        raise NotImplementedError(f"{op}: backend 'cuda' does not run {error} yet; use another backend") from error


def _call(e: ex.E, compute: int, params: torch.Tensor | None = None, grads: list[torch.Tensor] | None = None, **more):
    e = e._replace(params=packed(e, e.params) if params is None else params)
    return _module("call").Call(e, bool(compute & ex.LOW), bool(compute & ex.TF32), grads, **more)


def aggregate(e: ex.E, compute: int, out: torch.Tensor, aux: torch.Tensor, ties: torch.Tensor) -> None:
    with torch.cuda.device_of(e.table), _named("aggregate"):
        _module("aggregate").forward(_call(e, compute), out, aux, ties)


def aggregate_backward(grad, out, aux, ties, e: ex.E, compute: int, grads: list[torch.Tensor]) -> None:
    with torch.cuda.device_of(e.table), _named("aggregate"), differentiated(e, compute, grads, _call) as call:
        _module("aggregate").aggregate_backward(call, out, aux, ties, grad)


def evaluate(e: ex.E, compute: int, out: list[torch.Tensor]) -> None:
    with torch.cuda.device_of(e.table), _named("evaluate"):
        _module("aggregate").evaluate(_call(e, compute, values=out))


def evaluate_backward(grad_out: list[torch.Tensor], e: ex.E, compute: int, grads: list[torch.Tensor]) -> None:
    with torch.cuda.device_of(e.table), _named("evaluate"), differentiated(e, compute, grads, _call, values=grad_out) as call:
        _module("aggregate").evaluate_backward(call)


def _attention(nodes, shape) -> dict:
    q, _, v = nodes
    return {"attention": _module("lower").Attention(shape[0], q.shape[1], v.shape[1], shape[1], shape[2]), "nodes": len(q)}


def attend(e: ex.E, compute: int, nodes, shape, scale: float, dropout: float, seed: int, outputs) -> None:
    attend = _module("attend")
    with torch.cuda.device_of(e.table), _named("attend"):
        attend.forward(_call(e, compute, **_attention(nodes, shape)), attend.Attending(tuple(nodes), scale, dropout, seed), *outputs)


def attend_backward(saved, e: ex.E, compute: int, nodes, shape, scale: float, dropout: float, seed: int, grads) -> None:
    """saved: grad, grad_sums, out, sums, lse; grads: of the expression's tensors, then of q, k, v."""
    attend, more = _module("attend"), _attention(nodes, shape)
    with torch.cuda.device_of(e.table), _named("attend"), differentiated(e, compute, grads[:-3], _call, **more) as call:
        attend.backward(call, attend.Attending(tuple(nodes), scale, dropout, seed), saved, grads[-3:])

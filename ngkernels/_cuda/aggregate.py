"""aggregate and evaluate in CUDA C++: what goes into their kernels and what comes out."""

from __future__ import annotations

import torch

from .backward import Backward
from .call import Call, slots_of
from .launch import simple
from .memory import MESSAGE_PLANES, STATISTIC_PLANES


def padded(width: int) -> int:
    return -(-width // 16) * 16


def forward(call: Call, out: torch.Tensor, aux: torch.Tensor, ties: torch.Tensor) -> None:
    """Writes the reductions `out` [rows, K, F], the mean `aux` [rows, 0..1, F] and the tie counts [rows, 0..2, F]; zeros for rows without messages."""
    for t in (out, aux, ties):
        t.zero_()
    work = call.work.reduce()
    if not work.n or not out.numel():
        return
    width = padded(call.low.width)
    partial = call.params.new_empty(work.partials, STATISTIC_PLANES, width)
    call.run(call.fields(call.project()) | {"partial": partial}, work)
    (keys, starts, order), messages = work.sums[0], work.messages
    sizes = (keys.numel(), call.low.width, width, ties.element_size())
    simple("merge", keys.numel() * call.low.width, out, aux, ties, partial, keys, starts, order, messages, *sizes, *slots_of(call.low.mask))


def coefficients(call: Call, out: torch.Tensor, aux: torch.Tensor, ties: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """[rows, MESSAGE_PLANES, F padded]: what turns a message of each row into its gradient."""
    width = padded(call.low.width)
    to = call.params.new_empty(out.shape[0], MESSAGE_PLANES, width)
    sizes = (out.shape[0], call.low.width, width, ties.element_size())
    simple("coefficients", out.shape[0] * width, to, out, aux, ties, grad, call.plan.degrees(out.shape[0]), *sizes, *slots_of(call.low.mask))
    return to


def evaluate(call: Call) -> None:
    """Writes the values of every edge to the call's tensors."""
    work = call.work.reduce()
    if work.n:
        call.run(call.fields(call.project()), work)


def aggregate_backward(call: Call, out: torch.Tensor, aux: torch.Tensor, ties: torch.Tensor, grad: torch.Tensor) -> None:
    """Writes the wanted gradients of the call, from what forward returned and the gradient of its first."""
    back = Backward(call)
    back.clear()
    if back.wanted and out.numel():
        back.run(coefficients=coefficients(call, out, aux, ties, grad))


def evaluate_backward(call: Call) -> None:
    """Writes the wanted gradients of the call, from those of its values."""
    back = Backward(call)
    back.clear()
    if back.wanted:
        back.run()

"""aggregate and evaluate in CUDA C++: what goes into their kernels and what comes out."""

from __future__ import annotations

import torch

from .backward import Backward
from .call import Call, slots_of
from .launch import Some, padded, simple
from .memory import MESSAGE_PLANES, STATISTIC_PLANES
from .plan import Chunk


def forward(call: Call, out: torch.Tensor, aux: torch.Tensor, ties: torch.Tensor) -> None:
    """Writes the reductions `out` [rows, K, F], the mean `aux` [rows, 0..1, F] and the tie counts [rows, 0..2, F]; zeros for rows without messages."""
    for t in (out, aux, ties):
        t.zero_()
    work = call.work.reduce()
    if not work.launches or not out.numel():
        return
    width = padded(call.low.width)
    partial = call.params.new_empty(work.partials, STATISTIC_PLANES, width)
    call.run(call.fields() | call.project() | {"partial": partial}, *work.launches)
    for (keys, starts, order), messages in zip(work.sums, work.messages, strict=True):
        merged = None if keys is work.sums[-1].keys else call.params.new_empty(len(keys), STATISTIC_PLANES, width)
        sizes = (keys.numel(), call.low.width, width, ties.element_size())
        simple("merge", keys.numel() * call.low.width, out, aux, ties, merged, partial, keys, starts, order, messages, *sizes, *slots_of(call.low.mask))
        partial = merged


class Coefficients:
    """What turns a message of each output row into its gradient: of aggregate's results and of the gradient of its first."""

    def __init__(self, call: Call, out: torch.Tensor, aux: torch.Tensor, ties: torch.Tensor, grad: torch.Tensor):
        self.call, self.tensors, self.width = call, (out, aux, ties, grad), padded(call.low.width)
        self.node_bytes = MESSAGE_PLANES * self.width * 4

    def of(self, chunk: Chunk) -> dict[str, Some]:
        """[rows, MESSAGE_PLANES F padded] of the output rows of a chunk."""
        first, end = chunk.rows
        low, (out, aux, ties, grad) = self.call.low, (t[first:end] for t in self.tensors)
        to = self.call.params.new_empty(end - first, MESSAGE_PLANES * self.width)
        sizes = (end - first, low.width, self.width, ties.element_size())
        simple("coefficients", (end - first) * self.width, to, out, aux, ties, grad, self.call.plan.degrees(len(self.tensors[0]))[first:end], *sizes, *slots_of(low.mask))
        return {"coefficients": Some(to, first)}


def evaluate(call: Call) -> None:
    """Writes the values of every edge to the call's tensors."""
    work = call.work.reduce()
    if work.launches:
        call.run(call.fields() | call.project(), *work.launches)


def aggregate_backward(call: Call, out: torch.Tensor, aux: torch.Tensor, ties: torch.Tensor, grad: torch.Tensor) -> None:
    """Writes the wanted gradients of the call, from what forward returned and the gradient of its first."""
    back = Backward(call)
    back.clear()
    if back.wanted and out.numel():
        back.run(Coefficients(call, out, aux, ties, grad))


def evaluate_backward(call: Call) -> None:
    """Writes the wanted gradients of the call, from those of its values."""
    back = Backward(call)
    back.clear()
    if back.wanted:
        back.run()

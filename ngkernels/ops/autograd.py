"""Autograd of the ops. As torch.library.register_autograd, for ops that take lists of tensors, at a tenth of its cost a call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .expression import library


def _tensors(arguments) -> list[Tensor]:
    """Those among the arguments, and those in lists among them, in their order."""
    found: list[Tensor] = []
    for a in arguments:
        if isinstance(a, Tensor):
            found.append(a)
        elif isinstance(a, (list, tuple)) and a and isinstance(a[0], Tensor):
            found += a
    return found


def register_autograd(name: str, backward: Callable, setup: Callable | None = None) -> None:
    """Registers the derivative of an op whose arguments are tensors, lists of tensors and constants.

    Args:
        setup: (ctx, inputs, output), as for torch.library.register_autograd.
        backward: (ctx, need, *grads) -> a gradient or None for each tensor of the arguments, those of lists one by one; `need` says
            for each of them whether it is wanted; grads: of each tensor of the output.
    """
    op = getattr(torch.ops.ngkernels, name).default
    many = "Tensor[]" in str(op._schema).rpartition("->")[2]

    def call(keyset, arguments):
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx, keyset, arguments, *_tensors):
            output = call(keyset, arguments)
            if setup is not None:
                setup(ctx, arguments, output)
            return tuple(output)

        @staticmethod
        def backward(ctx, *grads):
            return (None, None, *backward(ctx, ctx.needs_input_grad[2:], *grads))

    Node.__name__ = Node.__qualname__ = "".join(part.capitalize() for part in name.split("_"))

    def differentiable(keyset, *arguments):
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments)):
            return call(keyset, arguments)
        output = Node.apply(keyset, arguments, *_tensors(arguments))
        return list(output) if many else output

    library.impl(name, differentiable, "Autograd", with_keyset=True)

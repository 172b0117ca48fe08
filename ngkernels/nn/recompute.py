"""Cheap node-side functions evaluated again in backward instead of keeping their intermediate results."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..backends import kind_of


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, *tensors):
        ctx.function = function
        ctx.save_for_backward(*tensors)
        device = kind_of(tensors[0].device)
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        return function(*tensors)

    @staticmethod
    def backward(ctx, grad):
        need = ctx.needs_input_grad[1:]
        second = torch.is_grad_enabled()  # create_graph=True: differentiate through the saved tensors themselves
        tensors = ctx.saved_tensors if second else [t.detach().requires_grad_(n) for t, n in zip(ctx.saved_tensors, need, strict=True)]
        device, dtype, enabled = ctx.autocast
        with torch.enable_grad():
            if enabled or torch.is_autocast_enabled(device):
                with torch.autocast(device, dtype, enabled):
                    output = ctx.function(*tensors)
            else:
                output = ctx.function(*tensors)
        wanted = [t for t, n in zip(tensors, need, strict=True) if n]
        found = iter(torch.autograd.grad(output, wanted, grad, create_graph=second, allow_unused=True))
        return (None, *(next(found) if n else None for n in need))


def plain() -> bool:
    """Whether hand-written backward passes stay out of the way: while compiling, under torch.func, without gradients."""
    return torch.compiler.is_compiling() or not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()


def recompute(function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
    """function(*tensors), keeping `tensors` alone for backward.

    Args:
        function: deterministic, one tensor out; everything to be differentiated is among `tensors`.

    Note: under torch.compile and torch.func a plain call. Double backward works.
    """
    return function(*tensors) if plain() else _Recompute.apply(function, *tensors)

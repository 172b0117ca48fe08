"""Cheap node-side functions evaluated again in backward instead of keeping their intermediate results."""

from __future__ import annotations

from collections.abc import Callable

import torch


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(function, *tensors):
        return function(*tensors)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.function = inputs[0]
        ctx.save_for_backward(*inputs[1:])
        device = output.device.type
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))

    @staticmethod
    def backward(ctx, grad):
        need = ctx.needs_input_grad[1:]
        second = torch.is_grad_enabled()  # create_graph=True: differentiate through the saved tensors themselves
        tensors = ctx.saved_tensors if second else [t.detach().requires_grad_(n) for t, n in zip(ctx.saved_tensors, need, strict=True)]
        device, dtype, enabled = ctx.autocast
        with torch.enable_grad(), torch.autocast(device, dtype, enabled):
            output = ctx.function(*tensors)
        wanted = [t for t, n in zip(tensors, need, strict=True) if n]
        found = iter(torch.autograd.grad(output, wanted, grad, create_graph=second, allow_unused=True))
        return (None, *(next(found) if n else None for n in need))


def recompute(function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
    """function(*tensors), keeping `tensors` alone for backward.

    Args:
        function: deterministic, one tensor out; everything to be differentiated is among `tensors`.

    Note: under torch.compile a plain call: the compiler decides what to keep. Double backward works.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return function(*tensors)
    return _Recompute.apply(function, *tensors)

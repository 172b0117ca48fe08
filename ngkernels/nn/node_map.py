"""The node side of PNA: y = x W_x^T + b + sum over scalers s of a_s * (reduced W_s^T), without the scaled columns."""

from __future__ import annotations

import torch

from .recompute import plain

Factor = torch.Tensor | None
ROWS = 1 << 14  # of a temporary in backward


def _plain(x: torch.Tensor, reduced: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor, *factors: Factor) -> torch.Tensor:
    w_x, *w_s = matrix.split([x.shape[1], *[reduced.shape[1]] * len(factors)], 1)
    y = torch.addmm(bias, x, w_x.T)
    for a, w in zip(factors, w_s, strict=True):
        y = y + (reduced @ w.T if a is None else a * (reduced @ w.T))
    return y


class _NodeMap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, reduced, matrix, bias, *factors):
        ctx.save_for_backward(x, reduced, matrix, bias, *factors)
        w_x, *w_s = matrix.split([x.shape[1], *[reduced.shape[1]] * len(factors)], 1)
        y = torch.addmm(bias, x, w_x.T)
        for a, w in zip(factors, w_s, strict=True):
            y = y.addmm_(reduced, w.T) if a is None else y.addcmul_(a, reduced @ w.T)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, reduced, matrix, bias, *factors = ctx.saved_tensors
        need = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():  # create_graph=True
            tensors = [x, reduced, matrix, bias]
            with torch.enable_grad():
                y = _plain(*tensors, *factors)
                found = iter(torch.autograd.grad(y, [t for t, n in zip(tensors, need, strict=True) if n], grad, create_graph=True))
            return (*(next(found) if n else None for n in need), *[None] * len(factors))
        return (*_gradients(grad.contiguous(), x, reduced, matrix, factors, need), *[None] * len(factors))


def _gradients(grad, x, reduced, matrix, factors, need):
    """Gradients of x, reduced, matrix and bias, None where not needed. The scaled gradient exists for some rows at a time."""
    sizes = [x.shape[1], *[reduced.shape[1]] * len(factors)]
    w_x, *w_s = matrix.split(sizes, 1)
    grad_x = grad @ w_x if need[0] else None
    grad_reduced = torch.empty_like(reduced) if need[1] else None
    grad_matrix = torch.empty_like(matrix) if need[2] else None
    if need[2]:
        torch.mm(grad.T, x, out=grad_matrix[:, : sizes[0]])
    for start in range(0, max(1, grad.shape[0]), ROWS):
        rows = slice(start, start + ROWS)
        g, r = grad[rows], reduced[rows]
        for s, (a, w) in enumerate(zip(factors, w_s, strict=True)):
            scaled = g if a is None else a[rows] * g
            if need[1]:
                torch.addmm(grad_reduced[rows], scaled, w, beta=int(s > 0), out=grad_reduced[rows])
            if need[2]:
                piece = grad_matrix[:, sizes[0] + s * sizes[1] :][:, : sizes[1]]
                torch.addmm(piece, scaled.T, r, beta=int(start > 0), out=piece)
    return grad_x, grad_reduced, grad_matrix, grad.sum(0) if need[3] else None


def node_map(x: torch.Tensor, reduced: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor, *factors: Factor) -> torch.Tensor:
    """x W_x^T + bias + sum over s of a_s * (reduced W_s^T), with matrix = [W_x | W_0 | W_1 ..].

    Args:
        x: [R, F]. reduced: [R, C]. matrix: [O, F + S C]. bias: [O].
        factors: S of them, [R, 1] without gradient, or None for 1.

    Returns:
        Tensor [R, O].

    Note: kept for backward: the arguments. Backward needs little beside its results.
        Double backward works. Under autocast, torch.compile and torch.func the same in plain operations.
    """
    if plain() or torch.is_autocast_enabled(x.device.type):
        return _plain(x, reduced, matrix, bias, *factors)
    return _NodeMap.apply(x, reduced, matrix, bias, *factors)

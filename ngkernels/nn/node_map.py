"""The node side of PNA: z = after(x W_x^T + b + sum over scalers s of a_s * (reduced W_s^T)), without the scaled columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from .recompute import plain

Factor = torch.Tensor | None
ROWS = 1 << 12  # of a temporary in backward


def _split(x: torch.Tensor, reduced: torch.Tensor, matrix: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    """W_x [O, F] and each W_s [O, C]."""
    return matrix.split([x.shape[1], *[reduced.shape[1]] * count], 1)


def _plain(x, reduced, matrix, bias, factors) -> torch.Tensor:
    w_x, *w_s = _split(x, reduced, matrix, len(factors))
    y = torch.addmm(bias, x, w_x.T)
    for a, w in zip(factors, w_s, strict=True):
        y = y + (reduced @ w.T if a is None else a * (reduced @ w.T))
    return y


def _pieces(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The tensors, ROWS of their rows at a time."""
    n = tensors[0].shape[0]
    if n <= ROWS:
        yield tensors
        return
    for start in range(0, n, ROWS):
        yield tuple(t[start : start + ROWS] for t in tensors)


def _in_place(x, reduced, matrix, bias, factors) -> torch.Tensor:
    w_x, *w_s = _split(x, reduced, matrix, len(factors))
    y = torch.addmm(bias, x, w_x.T)
    for a, w in zip(factors, w_s, strict=True):
        if a is None:
            y.addmm_(reduced, w.T)
            continue
        for to, r, scale in _pieces(y, reduced, a):
            to.addcmul_(scale, r @ w.T)
    return y


class _NodeMap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, after, scalers, x, reduced, matrix, bias, *rest):
        ctx.after, ctx.scalers = after, scalers
        ctx.save_for_backward(x, reduced, matrix, bias, *rest)
        y = _in_place(x, reduced, matrix, bias, rest[:scalers])
        return y if after is None else after.in_place(y, *rest[scalers:])

    @staticmethod
    def backward(ctx, grad):
        tensors, need = ctx.saved_tensors, ctx.needs_input_grad[2:]
        maps, factors, more = tensors[:4], tensors[4 : 4 + ctx.scalers], tensors[4 + ctx.scalers :]
        if torch.is_grad_enabled():  # create_graph=True
            with torch.enable_grad():
                z = _plain(*maps, factors)
                z = z if ctx.after is None else ctx.after(z, *more)
                wanted = [t for t, n in zip(tensors, need, strict=True) if n]
                found = iter(torch.autograd.grad(z, wanted, grad, create_graph=True))
            return (None, None, *(next(found) if n else None for n in need))
        grad, grad_more = grad.contiguous(), []
        if ctx.after is not None:
            grad, *grad_more = ctx.after.gradients(grad, _in_place(*maps, factors), *more)
        return (None, None, *_gradients(grad, *maps[:3], factors, need[:4]), *[None] * ctx.scalers, *grad_more)


def _gradients(grad, x, reduced, matrix, factors, need):
    """Gradients of x, reduced, matrix and bias, None where not needed. The scaled gradient exists for some rows at a time."""
    w_x, *w_s = _split(x, reduced, matrix, len(factors))
    grad_reduced = torch.empty_like(reduced) if need[1] else None
    grad_matrix = torch.empty_like(matrix) if need[2] else None
    g_x, *g_s = _split(x, reduced, grad_matrix, len(factors)) if need[2] else [None] * (1 + len(factors))
    if need[2]:
        torch.mm(grad.T, x, out=g_x)
    for k, (a, w, g_w) in enumerate(zip(factors, w_s, g_s, strict=True)):
        tensors = [grad, reduced, *([] if a is None else [a]), *([grad_reduced] if need[1] else [])]
        for start, (g, r, *more) in enumerate(_pieces(*tensors)):
            scaled = g if a is None else more[0] * g
            if need[1]:
                torch.addmm(more[-1], scaled, w, beta=int(k > 0), out=more[-1])
            if need[2]:
                torch.addmm(g_w, scaled.T, r, beta=int(start > 0), out=g_w)
    return grad @ w_x if need[0] else None, grad_reduced, grad_matrix, grad.sum(0) if need[3] else None


def node_map(
    x: torch.Tensor,
    reduced: torch.Tensor,
    matrix: torch.Tensor,
    bias: torch.Tensor,
    *factors: Factor,
    after: Callable[..., torch.Tensor] | None = None,
    tensors: tuple[torch.Tensor, ...] = (),
) -> torch.Tensor:
    """after(x W_x^T + bias + sum over s of a_s * (reduced W_s^T), *tensors), with matrix = [W_x | W_0 | W_1 ..].

    Args:
        x: [R, F]. reduced: [R, C]. matrix: [O, F + S C]. bias: [O].
        factors: S of them, [R, 1] without gradient, or None for 1.
        after: None, or a deterministic function of (y [R, O], *tensors) with a method gradients(grad, y, *tensors) that gives those of y and
            of each tensor, and may overwrite y.

    Returns:
        Tensor [R, O].

    Note: kept for backward: the arguments; y is computed again. Backward needs little beside its results.
        Double backward works. Under autocast, torch.compile and torch.func the same in plain operations.
    """
    if plain() or torch.is_autocast_enabled(x.device.type):
        y = _plain(x, reduced, matrix, bias, factors)
        return y if after is None else after(y, *tensors)
    return _NodeMap.apply(after, len(factors), x, reduced, matrix, bias, *factors, *tensors)

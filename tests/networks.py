"""Random networks and comparisons that several test files use."""

from __future__ import annotations

import torch


def networks(layout, batch=2, dtype=torch.float32, scale=0.5):
    """Weights (batch, in, out, 1) and biases (batch, out, 1) of random networks."""
    weights = [scale * torch.randn(batch, i, o, 1, dtype=dtype) for i, o in zip(layout, layout[1:])]
    return weights, [scale * torch.randn(batch, o, 1, dtype=dtype) for o in layout[1:]]


def flat(result) -> list[torch.Tensor]:
    """The tensors of a model's result: logits, or updates of weights and biases."""
    return [result] if isinstance(result, torch.Tensor) else [*result[0], *result[1]]


def relative(found: torch.Tensor, wanted: torch.Tensor, least: float = 1e-30) -> float:
    """Largest error over the largest wanted value, or over `least` if that is more."""
    return ((found - wanted).abs().max() / wanted.abs().max().clamp(min=least)).item()


def permuted(weights, biases, layout):
    """The same functions with the hidden neurons in another order, and the orders."""
    orders = [torch.arange(layout[0]), *(torch.randperm(d) for d in layout[1:-1]), torch.arange(layout[-1])]
    weights = [w[:, a][:, :, b] for w, a, b in zip(weights, orders, orders[1:])]
    return weights, [b[:, o] for b, o in zip(biases, orders[1:])], orders


def saved_tensors(model, weights, biases) -> list[torch.Tensor]:
    """What a step of `model` keeps for its backward pass, each storage once."""
    saved: dict[int, torch.Tensor] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        saved.setdefault(t.untyped_storage().data_ptr(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = model(weights, biases)
    sum(t.sum() for t in flat(out)).backward()
    return list(saved.values())

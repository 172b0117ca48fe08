"""What the models without a graph share: features as one tensor for each weight and one for each bias."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from .checks import check_batch, check_finite, check_tensors

Features = tuple[list[torch.Tensor], list[torch.Tensor]]  # (of the weights, of the biases)


class Each(nn.Module):
    """`function` of every tensor by itself."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.function = function

    def forward(self, features: Features) -> Features:
        weights, biases = features
        return [self.function(w) for w in weights], [self.function(b) for b in biases]


def checked_features(op: str, layout, weights, biases, channels: int, parameter: torch.Tensor, finite: str | None) -> Features:
    """Weights and biases in the dtype of the model's `parameter`, once they are known to be those of networks of `layout`.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices that do not fit.
    """
    check_batch(op, layout, weights, biases, channels, channels)
    check_tensors(op, weights, biases, parameter)
    if not torch.compiler.is_compiling():
        check_finite(op, weights, biases, finite)
    return [w.to(parameter.dtype) for w in weights], [b.to(parameter.dtype) for b in biases]

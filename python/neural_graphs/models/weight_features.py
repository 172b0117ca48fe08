"""What the models without a graph share: features as one tensor for each weight and one for each bias."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

Features = tuple[list[torch.Tensor], list[torch.Tensor]]  # (of the weights, of the biases)


class Each(nn.Module):
    """`function` of every tensor by itself."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.function = function

    def forward(self, features: Features) -> Features:
        weights, biases = features
        return [self.function(w) for w in weights], [self.function(b) for b in biases]


def to_dtype(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """The tensors in the model's dtype; those that have it stay what they are."""
    return [t.to(dtype) for t in tensors]

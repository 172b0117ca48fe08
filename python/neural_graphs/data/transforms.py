"""What may be done to the weights of a SIREN without changing what it draws, or changing it in a known way.

All functions take and return `(weights, biases)` with weights[l] [M, d_l, d_{l+1}] and biases[l] [M, d_{l+1}], and never change their input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Network = tuple[list[Tensor], list[Tensor]]


def canonical_signs(weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Network:
    """Flips hidden neurons so that every hidden bias is >= 0; the function is unchanged.

    sin is odd: changing the sign of a neuron's incoming weights, its bias and its outgoing weights changes nothing.
    """
    weights, biases = list(weights), list(biases)
    for layer in range(len(weights) - 1):
        sign = torch.where(biases[layer] < 0, -1.0, 1.0).to(biases[layer].dtype)  # [M, d]
        weights[layer] = weights[layer] * sign.unsqueeze(1)
        biases[layer] = biases[layer] * sign
        weights[layer + 1] = weights[layer + 1] * sign.unsqueeze(2)
    return weights, biases


def permute_hidden(weights: Sequence[Tensor], biases: Sequence[Tensor], orders: Sequence[Tensor]) -> Network:
    """Reorders the hidden neurons of each layer; the function is unchanged.

    Args:
        orders: per hidden layer, the old position of each new neuron: [M, d] int64.
    """
    weights, biases = list(weights), list(biases)
    for layer, order in enumerate(orders):
        weights[layer] = weights[layer].gather(2, order.unsqueeze(1).expand_as(weights[layer]))
        biases[layer] = biases[layer].gather(1, order)
        weights[layer + 1] = weights[layer + 1].gather(1, order.unsqueeze(2).expand_as(weights[layer + 1]))
    return weights, biases


def random_orders(biases: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Returns a random permutation per network and hidden layer, for `permute_hidden`."""
    return [torch.rand(bias.shape, generator=generator).argsort(1).to(bias.device) for bias in biases[:-1]]


def sorted_orders(biases: Sequence[Tensor]) -> list[Tensor]:
    """Returns the permutations that sort the hidden neurons of each layer by bias, for `permute_hidden`."""
    return [bias.argsort(1) for bias in biases[:-1]]


@dataclass(frozen=True)
class PictureMotion:
    """How far augmentation may move the picture: turn in radians, relative scale, shift in half picture widths (all uniform, both ways)."""

    turn: float = 0.25
    scale: float = 0.12
    shift: float = 0.12


def move_picture(weights: Sequence[Tensor], biases: Sequence[Tensor], motion: PictureMotion, generator: torch.Generator) -> Network:
    """Turns, scales and shifts the picture that each network draws, exactly, by changing its first layer only.

    f(x A^T + t) has the first layer (x A^T + t) W + b = x (A^T W) + (b + t W). One random (A, t) per network, for 2-D coordinates.
    Hidden biases change sign under a shift: apply `canonical_signs` afterwards.
    """
    weights, biases = list(weights), list(biases)
    count, inputs = weights[0].shape[:2]
    if inputs != 2:
        raise ValueError(f"move_picture: expected networks of 2-D coordinates, got {inputs} inputs")
    draw = torch.rand(count, 4, generator=generator).mul_(2).sub_(1).to(weights[0])  # [M, 4] in [-1, 1]
    angle, scale = draw[:, 0] * motion.turn, torch.exp(draw[:, 1] * math.log1p(motion.scale))
    cos, sin = angle.cos() * scale, angle.sin() * scale
    matrix_t = torch.stack([torch.stack([cos, sin], -1), torch.stack([-sin, cos], -1)], 1)  # A^T [M, 2, 2]
    shift = draw[:, 2:] * motion.shift  # [M, 2]
    biases[0] = biases[0] + torch.bmm(shift.unsqueeze(1), weights[0]).squeeze(1)
    weights[0] = torch.bmm(matrix_t, weights[0])
    return weights, biases


@dataclass(frozen=True)
class Normalisation:
    """One mean and standard deviation per layer for weights and for biases: (value - mean) / std."""

    weight_mean: tuple[float, ...]
    weight_std: tuple[float, ...]
    bias_mean: tuple[float, ...]
    bias_std: tuple[float, ...]

    @staticmethod
    def measure(weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Normalisation:
        """Returns the statistics of a training set."""

        def spread(tensor: Tensor) -> float:
            std = float(tensor.double().std(correction=0))
            return std if std > 1e-8 else 1.0  # a constant layer (one network, one bias) stays as it is, centred

        return Normalisation(
            tuple(float(weight.double().mean()) for weight in weights),
            tuple(spread(weight) for weight in weights),
            tuple(float(bias.double().mean()) for bias in biases),
            tuple(spread(bias) for bias in biases),
        )

    def __call__(self, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Network:
        return (
            [(weight - mean) / std for weight, mean, std in zip(weights, self.weight_mean, self.weight_std)],
            [(bias - mean) / std for bias, mean, std in zip(biases, self.bias_mean, self.bias_std)],
        )


def flatten(weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """Returns all numbers of each network in one row: [M, weights + biases]."""
    return torch.cat([tensor.flatten(1) for pair in zip(weights, biases) for tensor in pair], dim=1)

"""SIREN implicit neural representations, thousands at a time.

A SIREN of layout [d_0, ..., d_L] maps a coordinate to pixel values:

    a_0 = x,   a_{l+1} = sin(omega (a_l W_l + b_l)) for hidden layers,   f(x) = a_{L-1} W_{L-1} + b_{L-1} + offset

Here the weights of M networks are stacked: W_l is [M, d_l, d_{l+1}] (input, output), b_l is [M, d_{l+1}].
All M networks are fitted in one batched Adam loop whose backward pass is written out by hand, because autograd would spend
most of the time of such small matrices on bookkeeping.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SirenConfig:
    """How SIRENs are initialised and fitted.

    The defaults are for small images and are chosen so that the *weights* carry the image: a small, low-frequency start
    (`first_bound`, `bias_bound`) and decoupled decay (`decay`: W <- (1 - decay lr) W at every step). With the plain SIREN
    initialisation (`first_bound=None`, `decay=0`) the fit is far better, but the weights are mostly initialisation noise.
    """

    layout: tuple[int, ...] = (2, 8, 8, 1)
    steps: int = 250
    lr: float = 5e-3  # Adam, cosine to zero
    decay: float = 2.0
    first_bound: float | None = 0.005  # first layer U(-bound, bound); None: 1 / d_0, the SIREN paper's
    bias_bound: float | None = 0.005  # None: 1 / sqrt(fan_in), torch's default for linear layers
    omega: float = 30.0
    offset: float = 0.5
    points_per_step: int | None = None  # None: every pixel at every step

    def __post_init__(self) -> None:
        if len(self.layout) < 2 or min(self.layout) < 1:
            raise ValueError(f"SirenConfig: expected layout to be at least two positive widths, got {list(self.layout)}")
        if self.steps < 1:
            raise ValueError(f"SirenConfig: expected steps >= 1, got {self.steps}")


def pixel_grid(height: int, width: int) -> Tensor:
    """Returns the pixel coordinates (row, column) in [-1, 1], row by row: [height * width, 2]."""
    rows, columns = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).reshape(-1, 2)


def init_siren(config: SirenConfig, count: int, generator: torch.Generator, shared: bool = False) -> tuple[list[Tensor], list[Tensor]]:
    """Returns (weights, biases) of `count` random networks; `shared=True` gives every network the same start.

    Returns:
        weights[l] [count, d_l, d_{l+1}], biases[l] [count, d_{l+1}], float32.
    """
    weights, biases = [], []
    drawn = 1 if shared else count
    for layer, (fan_in, fan_out) in enumerate(zip(config.layout[:-1], config.layout[1:])):
        hidden_bound = math.sqrt(6 / fan_in) / config.omega
        bound = hidden_bound if layer else (1 / fan_in if config.first_bound is None else config.first_bound)
        bias_bound = 1 / math.sqrt(fan_in) if config.bias_bound is None else config.bias_bound
        weight = torch.rand(drawn, fan_in, fan_out, generator=generator).mul_(2).sub_(1).mul_(bound)
        bias = torch.rand(drawn, fan_out, generator=generator).mul_(2).sub_(1).mul_(bias_bound)
        weights.append(weight.expand(count, -1, -1).clone())
        biases.append(bias.expand(count, -1).clone())
    return weights, biases


def siren_forward(weights: Sequence[Tensor], biases: Sequence[Tensor], points: Tensor, omega: float = 30.0, offset: float = 0.5) -> Tensor:
    """Returns the values of M networks at the given points.

    Args:
        weights: per layer [M, d_l, d_{l+1}]. biases: per layer [M, d_{l+1}].
        points: [P, d_0] (the same points for all), or [M, P, d_0].

    Returns:
        [M, P, d_L].
    """
    count = weights[0].shape[0]
    value = points if points.dim() == 3 else points.expand(count, -1, -1)
    last = len(weights) - 1
    for layer, (weight, bias) in enumerate(zip(weights, biases)):
        if layer < last:
            value = torch.baddbmm(bias.unsqueeze(1), value, weight, beta=omega, alpha=omega).sin_()
        else:
            value = torch.baddbmm(bias.unsqueeze(1) + offset, value, weight)
    return value


@torch.no_grad()
def fit_sirens(
    targets: Tensor,
    points: Tensor,
    config: SirenConfig,
    generator: torch.Generator,
    shared_init: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Fits one network to each target: Adam on the mean squared error, cosine learning rate, decoupled decay.

    Args:
        targets: values at the points, [M, P, d_L], float32.
        points: coordinates, [P, d_0], float32.
        generator: draws initial weights and, with `points_per_step`, the points of each step; same state, same result.
        progress: called with (steps done, steps) about twenty times.

    Returns:
        weights[l] [M, d_l, d_{l+1}], biases[l] [M, d_{l+1}], and the mean squared error of each network over all points [M].

    Raises:
        ValueError: the targets or points do not fit the layout.
    """
    _check_fit(targets, points, config)
    count = targets.shape[0]
    weights, biases = init_siren(config, count, generator, shared_init)
    parameters = [p for weight, bias in zip(weights, biases) for p in (weight, bias.unsqueeze_(1))]
    adam = _Adam(parameters, config.lr, config.decay)
    all_points = points.expand(count, -1, -1)
    for step in range(config.steps):
        if config.points_per_step is None:
            at, wanted = all_points, targets
        else:
            chosen = torch.randint(points.shape[0], (config.points_per_step,), generator=generator)
            at, wanted = points[chosen].expand(count, -1, -1), targets[:, chosen]
        gradients = _gradients(parameters, at, wanted, config)
        adam.step(gradients, 0.5 * (1 + math.cos(math.pi * step / config.steps)))
        if progress is not None and (step + 1) % max(1, config.steps // 20) == 0:
            progress(step + 1, config.steps)
    biases = [bias.squeeze(1) for bias in biases]
    error = siren_forward(weights, biases, points, config.omega, config.offset).sub_(targets).square_().mean((1, 2))
    return weights, biases, error


def psnr(mean_squared_error: Tensor) -> Tensor:
    """Returns the peak signal to noise ratio in dB of pixels in [0, 1]."""
    return -10 * mean_squared_error.clamp_min(1e-12).log10()


def _check_fit(targets: Tensor, points: Tensor, config: SirenConfig) -> None:
    if points.dim() != 2 or points.shape[1] != config.layout[0]:
        raise ValueError(f"fit_sirens: expected points of shape [P, {config.layout[0]}], got {list(points.shape)}")
    if targets.dim() != 3 or targets.shape[1:] != (points.shape[0], config.layout[-1]):
        raise ValueError(f"fit_sirens: expected targets of shape [M, {points.shape[0]}, {config.layout[-1]}], got {list(targets.shape)}")


def _gradients(parameters: list[Tensor], points: Tensor, wanted: Tensor, config: SirenConfig) -> list[Tensor]:
    """Gradients of each network's mean squared error, in the order [W_0, b_0, W_1, b_1, ...]; b is [M, 1, d]."""
    omega, last = config.omega, len(parameters) // 2 - 1
    inputs, slopes = [points], []  # a_l, and cos(omega z_l) for hidden layers
    for layer in range(last):
        z = torch.baddbmm(parameters[2 * layer + 1], inputs[-1], parameters[2 * layer], beta=omega, alpha=omega)
        slopes.append(z.cos())
        inputs.append(z.sin_())
    grad = torch.baddbmm(parameters[2 * last + 1], inputs[-1], parameters[2 * last])  # dL/dz of the layer in hand
    grad = grad.add_(config.offset).sub_(wanted).mul_(2 / (wanted.shape[1] * wanted.shape[2]))
    gradients: list[Tensor] = [grad] * len(parameters)
    for layer in range(last, -1, -1):
        gradients[2 * layer] = torch.bmm(inputs[layer].transpose(1, 2), grad)
        gradients[2 * layer + 1] = grad.sum(1, keepdim=True)
        if layer:
            grad = torch.bmm(grad, parameters[2 * layer].transpose(1, 2)).mul_(slopes[layer - 1]).mul_(omega)
    return gradients


class _Adam:
    """Adam (0.9, 0.999) with decoupled decay on the weights only, over a list of tensors at once."""

    def __init__(self, parameters: list[Tensor], lr: float, decay: float):
        self.parameters, self.lr, self.decay, self.count = parameters, lr, decay, 0
        self.first = [torch.zeros_like(p) for p in parameters]
        self.second = [torch.zeros_like(p) for p in parameters]

    def step(self, gradients: list[Tensor], schedule: float) -> None:
        self.count += 1
        lr = self.lr * schedule
        if self.decay:
            torch._foreach_mul_(self.parameters[0::2], 1 - self.decay * lr)
        torch._foreach_lerp_(self.first, gradients, 0.1)
        torch._foreach_mul_(self.second, 0.999)
        torch._foreach_addcmul_(self.second, gradients, gradients, 0.001)
        scale = torch._foreach_div(self.second, 1 - 0.999**self.count)
        torch._foreach_sqrt_(scale)
        torch._foreach_add_(scale, 1e-8)
        torch._foreach_addcdiv_(self.parameters, self.first, scale, -lr / (1 - 0.9**self.count))

"""Which networks are read: a layout and a batch size, and random networks of that kind."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

CLASSES = 10


@dataclass(frozen=True)
class Case:
    """`batch` networks of one layout (neurons per layer, inputs first)."""

    layout: tuple[int, ...]
    batch: int = 1

    def __post_init__(self):
        if len(self.layout) < 2 or min(self.layout) < 1 or self.batch < 1:
            raise ValueError(f"Case: expected two or more layers and positive sizes, got {self.layout} x {self.batch}")

    @property
    def edges(self) -> int:
        return self.batch * sum(a * b for a, b in zip(self.layout, self.layout[1:]))

    @property
    def last_edges(self) -> int:
        """Edges into the output neurons."""
        return self.batch * self.layout[-2] * self.layout[-1]

    @property
    def nodes(self) -> int:
        return self.batch * sum(self.layout)

    @property
    def pairs(self) -> int:
        """Ordered pairs of neurons of the same network, each with itself included."""
        return self.batch * sum(self.layout) ** 2

    @property
    def last_pairs(self) -> int:
        """Ordered pairs whose first neuron is an output."""
        return self.batch * self.layout[-1] * sum(self.layout)

    @property
    def label(self) -> str:
        return "x".join(map(str, self.layout)) + f"@{self.batch}"

    @staticmethod
    def parse(text: str, batch: int = 1) -> Case:
        """`2x64x128x3`, or `2x32x32x1@64` with its own batch size."""
        layout, _, own = text.strip().partition("@")
        try:
            return Case(tuple(int(n) for n in layout.split("x")), int(own) if own else batch)
        except ValueError:
            raise ValueError(f"Case: expected a layout such as 2x64x128x3 or 2x32x32x1@64, got {text!r}") from None

    def inputs(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Weights [B, d_l, d_(l+1), 1] ~ N(0, 1 / d_l), biases [B, d_(l+1), 1] ~ N(0, 0.1^2), class labels [B]."""
        generator = torch.Generator().manual_seed(seed)
        weights, biases = [], []
        for fan_in, width in zip(self.layout, self.layout[1:]):
            weight = torch.empty(self.batch, fan_in, width, 1, dtype=dtype)
            weights.append(weight.normal_(std=1 / math.sqrt(fan_in), generator=generator))
            biases.append(torch.empty(self.batch, width, 1, dtype=dtype).normal_(std=0.1, generator=generator))
        return weights, biases, torch.randint(CLASSES, (self.batch,), generator=generator)

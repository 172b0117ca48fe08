"""The published code's front end, shared by the baselines: raw weights and biases to the first states of edges and nodes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def dense_values(layout: Sequence[int], weights: list[Tensor], biases: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Raw features of all pairs of neurons [B, n, n, 1] (row: source; 0 where there is no edge) and of all neurons [B, n, 1]."""
    batch, n = weights[0].shape[0], sum(layout)
    pairs, first = weights[0].new_zeros(batch, n, n, 1), 0
    for weight in weights:
        middle = first + weight.shape[1]
        pairs[:, first:middle, middle : middle + weight.shape[2]] = weight
        first = middle
    return pairs, torch.cat([biases[0].new_zeros(batch, layout[0], 1), *biases], dim=1)


class GaussianEncoding(nn.Module):
    """gamma(v) = [cos(2 pi v b^T), sin(2 pi v b^T)] with a frozen b ~ N(0, sigma^2)."""

    def __init__(self, sigma: float, num_features: int):
        super().__init__()
        self.b = nn.Parameter(torch.randn(num_features, 1) * sigma, requires_grad=False)

    def forward(self, value: Tensor) -> Tensor:
        phase = (2 * math.pi * value) @ self.b.T  # [rows, num_features]
        return torch.cat([phase.cos(), phase.sin()], dim=-1)


class GraphConstructor(nn.Module):
    """Encodes raw weights [..., 1] to width d_edge and biases to width d_node, and adds the positional embedding to nodes."""

    def __init__(self, layout: list[int], d_node: int, d_edge: int, fourier_features: int, sigma: float):
        super().__init__()
        self.proj_weight = nn.Sequential(GaussianEncoding(sigma, fourier_features), nn.Linear(2 * fourier_features, d_edge))
        self.proj_bias = nn.Sequential(GaussianEncoding(sigma, fourier_features), nn.Linear(2 * fourier_features, d_node))
        self.proj_node_in = nn.Linear(d_node, d_node)
        self.proj_edge_in = nn.Linear(d_edge, d_edge)
        rows = layout[0] + len(layout) - 2 + layout[-1]
        self.pos_embed = nn.Parameter(torch.randn(rows, d_node))
        row_of_node = list(range(layout[0]))
        for layer, width in enumerate(layout[1:-1]):
            row_of_node += [layout[0] + layer] * width
        row_of_node += range(rows - layout[-1], rows)
        self.register_buffer("row_of_node", torch.tensor(row_of_node), persistent=False)

    def forward(self, edge_value: Tensor, node_value: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """(edge states [..., d_edge], node states [B n, d_node]) from edge values [..., 1] and node values of B n rows."""
        nodes = self.proj_node_in(self.proj_bias(node_value))
        nodes = nodes.view(batch, -1, nodes.shape[-1]) + self.pos_embed[self.row_of_node]
        return self.proj_edge_in(self.proj_weight(edge_value)), nodes.flatten(0, 1)

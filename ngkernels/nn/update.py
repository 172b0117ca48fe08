"""The edge update of NG-GNN as a module."""

from __future__ import annotations

import torch
from torch import nn

from ..edges import EdgeState


class EdgeUpdate(nn.Module):
    """e'_ij = lin1(act(lin_e e_ij + lin_t x_i + lin_s x_j)); i is the destination of the edge, j its source.

    Args:
        edge_dim: D, width of the edge states.
        node_dim: width of the node states.
        activation: one of the engine's activations.
        residual: add e_ij.

    Note: calling the module computes nothing; it returns a longer EdgeState.

    Reference: Kofinas et al., ICLR 2024, section 3.
    """

    def __init__(self, edge_dim: int, node_dim: int, activation: str = "silu", residual: bool = False):
        super().__init__()
        self.lin_e = nn.Linear(edge_dim, edge_dim)
        self.lin_s = nn.Linear(node_dim, edge_dim)
        self.lin_t = nn.Linear(node_dim, edge_dim)
        self.lin1 = nn.Linear(edge_dim, edge_dim)
        self.activation, self.residual = activation, residual

    def forward(self, edges: EdgeState, x: torch.Tensor) -> EdgeState:
        """`edges` after this update. x: node states [N, node_dim]."""
        bias = self.lin_e.bias + self.lin_s.bias + self.lin_t.bias
        return edges.update(
            x,
            self.lin_e.weight,
            self.lin_t.weight,
            self.lin_s.weight,
            bias,
            self.lin1.weight,
            self.lin1.bias,
            self.activation,
            self.residual,
        )

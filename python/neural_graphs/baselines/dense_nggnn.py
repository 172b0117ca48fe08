"""NG-GNN with the published code's front end: dense n x n edge features, of which the edges are then gathered."""

from __future__ import annotations

import torch
from torch import Tensor
from torch_geometric.utils import to_dense_adj

from .front_end import dense_values
from .pyg_nggnn import PyGNGGNN


class DenseNGGNN(PyGNGGNN):
    """The same function and parameters as PyGNGGNN, with the memory of the published code.

    All n^2 pairs of neurons are encoded, edges or not, and the last edge states are made dense again although the
    classifier reads output neurons only: both as published.

    Args: those of PyGNGGNN; operations and order of edges are the published ones.
    """

    def __init__(self, layout: list[int], d_hid: int = 32, num_layers: int = 4, out_features: int = 10, **options):
        super().__init__(layout, d_hid, num_layers, out_features, style="published", order="source", **options)

    def forward(self, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
        """Logits [B, out_features] from weights[l] [B, d_l, d_(l+1), 1] and biases[l] [B, d_(l+1), 1]."""
        batch, n = weights[0].shape[0], sum(self.layout)
        edge_value, node_value = dense_values(self.layout, weights, biases)
        edges, nodes = self.construct_graph(edge_value, node_value, batch)  # [B, n, n, d_hid], [B n, d_hid]
        one = self.edge_index(1)
        edge_attr = torch.cat([edges[k, one[0], one[1]] for k in range(batch)])
        index = self.edge_index(batch)
        x, edge_attr = self.gnn(nodes, index, edge_attr)
        to_dense_adj(index, torch.arange(batch).repeat_interleave(n).to(index.device), edge_attr)  # published, and not read
        outputs = x.view(batch, -1, self.d_hid)[:, -self.layout[-1] :]
        return self.proj_out(outputs.flatten(1))

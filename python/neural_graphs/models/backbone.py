"""The NG-GNN backbone: PNA layers with norm, activation and an edge update between them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ngkernels import EdgeState
from ngkernels.nn import EdgeUpdate, NodeNorm, NormAct, PNALayer

from .memory import EdgeMemory


def in_degree_histogram(layout: Sequence[int]) -> torch.Tensor:
    """Number of nodes of each in-degree in an MLP of widths `layout` (forward edges), int64 [max + 1]."""
    histogram = torch.zeros(max(layout) + 1, dtype=torch.int64)
    histogram[0] += layout[0]
    for fan_in, width in zip(layout, layout[1:]):
        histogram[fan_in] += width
    return histogram


class Backbone(nn.Module):
    """num_layers times PNALayer; after each but the last: norm, activation (or the other way), dropout, edge update.

    Args:
        width: of node and edge states. norm: see NodeNorm, or None. update_edges: False keeps the first edge state.
        memory: what becomes of edge states that more than one layer reads. conv: further arguments of PNALayer.
    """

    def __init__(
        self,
        width: int,
        num_layers: int,
        norm: str | None,
        act: str,
        act_first: bool,
        dropout: float,
        update_edges: bool,
        memory: EdgeMemory,
        conv: dict,
    ):
        super().__init__()
        self.convs = nn.ModuleList(PNALayer(width, width, width, **conv) for _ in range(num_layers))
        self.norms = nn.ModuleList(NodeNorm(width, norm) for _ in range(num_layers - 1 if norm else 0))
        self.edge_update = nn.ModuleList(EdgeUpdate(width, width, act) for _ in range(num_layers - 1 if update_edges else 0))
        self.act, self.act_first, self.dropout, self.memory = act, act_first, dropout, memory

    def forward(
        self, x: torch.Tensor, edges: EdgeState, rows: int | None = None, read_nodes: bool = True, read_edges: bool = False
    ) -> tuple[torch.Tensor | None, EdgeState]:
        """Node states [rows, width] and the last edge state.

        Args:
            rows: the node layer whose states are wanted, or None for all of them: with it, the last layer looks at
                the edges into that layer only.
            read_nodes: False skips the last layer. read_edges: the caller reads the last edge state.
        """
        last = len(self.convs) - 1
        for k, conv in enumerate(self.convs):
            if k == last:
                if not read_nodes:
                    return None, edges
                return conv(x, edges if rows is None else edges.restrict(rows)), edges
            x = conv(x, edges, NormAct(self.norms[k] if self.norms else None, self.act, self.act_first, edges.graph))
            x = F.dropout(x, self.dropout, self.training) if self.dropout else x
            if self.edge_update:
                edges = self.edge_update[k](edges, x)
                if k + 1 < last or (read_nodes and read_edges):  # else one consumer only
                    edges = self.memory.after(k + 1, edges, x.shape[1])
        raise ValueError("Backbone: expected at least one layer, got none")

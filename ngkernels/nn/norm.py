"""Norms of node states."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..graph import NeuralGraph

NORMS = ("layer", "graph", "batch_graph", None)


class NodeNorm(nn.Module):
    """y = (x - mu) / s * weight + bias, with mu and s taken over a set of nodes and all channels.

    Args:
        width: number of channels.
        over: "layer" (each node by itself: torch's LayerNorm, s = sqrt(var + eps)), "graph" (each network) or
            "batch_graph" (the whole batch, so that a prediction depends on its batch mates); these two have
            s = std + eps.

    Raises:
        ValueError: an unknown `over`.
    """

    def __init__(self, width: int, over: str = "layer", eps: float = 1e-5):
        super().__init__()
        if over not in NORMS[:3]:
            raise ValueError(f"NodeNorm: expected over in {', '.join(NORMS[:3])}, got {over!r}")
        self.over, self.eps = over, eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def function(self, graph: NeuralGraph | None):
        """The norm as a function of (x [N, width], weight, bias)."""
        if self.over == "layer":
            return lambda x, weight, bias: F.layer_norm(x, x.shape[1:], weight, bias, self.eps)
        if self.over == "batch_graph" or graph is None or graph.num_graphs == 1:
            return lambda x, weight, bias: self._whole(x, (0, 1)) * weight + bias
        if len(graph.parts) == 1:
            copies = graph.num_graphs
            return lambda x, weight, bias: self._whole(x.view(copies, -1, x.shape[1]), (1, 2)).reshape(x.shape) * weight + bias
        return lambda x, weight, bias: self._segments(x, graph) * weight + bias

    def _whole(self, x: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
        centred = x - x.mean(dims, keepdim=True)
        return centred / (centred.square().mean(dims, keepdim=True).sqrt() + self.eps)

    def _segments(self, x: torch.Tensor, graph: NeuralGraph) -> torch.Tensor:
        index = graph.on(x.device, "graph of node", graph.graph_of_node)
        size = graph.on(x.device, "nodes of graphs", graph.node_bounds.diff).to(x.dtype)

        def mean(v: torch.Tensor) -> torch.Tensor:
            return (v.new_zeros(graph.num_graphs).index_add(0, index, v.mean(1)) / size)[index, None]

        centred = x - mean(x)
        return centred / (mean(centred.square()).sqrt() + self.eps)

    def bounds(self, graph: NeuralGraph | None, rows: int, device: torch.device) -> torch.Tensor:
        """The first row of each set that is normalised together, and the number of rows: int64 [sets + 1]."""
        if self.over == "batch_graph" or graph is None:
            return torch.arange(2, device=device) * rows
        return graph.on(device, "node bounds", lambda: graph.node_bounds)

    def forward(self, x: torch.Tensor, graph: NeuralGraph | None = None) -> torch.Tensor:
        """x [N, width] normalised; `graph` says which rows belong together."""
        return self.function(graph)(x, self.weight, self.bias)

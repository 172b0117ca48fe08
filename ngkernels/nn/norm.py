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
        index = graph.graph_of_node().to(x.device)
        size = torch.bincount(index, minlength=graph.num_graphs).to(x.dtype)

        def mean(v: torch.Tensor) -> torch.Tensor:
            return (v.new_zeros(graph.num_graphs).index_add(0, index, v.mean(1)) / size)[index, None]

        centred = x - mean(x)
        return centred / (mean(centred.square()).sqrt() + self.eps)

    def in_place(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, graph: NeuralGraph | None) -> torch.Tensor:
        """As `function(graph)`, without gradients; x may be overwritten."""
        copies = self._copies(graph)
        if not copies:
            return self.function(graph)(x, weight, bias)
        y = x.view(copies, -1, x.shape[1])
        spread = self._centre(y)
        return y.div_(spread.add_(self.eps)).mul_(weight).add_(bias).view(x.shape)

    def _copies(self, graph: NeuralGraph | None) -> int:
        """Number of equal slices of the rows that are normalised one by one; 0 where there are none such."""
        if self.over == "layer":
            return 0
        if self.over == "batch_graph" or graph is None:
            return 1
        return graph.num_graphs if len(graph.parts) == 1 else 0

    @staticmethod
    def _centre(x: torch.Tensor) -> torch.Tensor:
        """Takes the mean off each x[k], in place; returns their standard deviations [copies, 1, 1]."""
        x.sub_(x.mean((1, 2), keepdim=True))
        return torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).div_((x.shape[1] * x.shape[2]) ** 0.5)

    def gradients(
        self, grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, graph: NeuralGraph | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of x (which may be overwritten), weight and bias, from that of `function(graph)`."""
        if self.over == "layer":
            _, mean, rstd = torch.native_layer_norm(x, x.shape[1:], weight, bias, self.eps)
            return torch.ops.aten.native_layer_norm_backward(grad, x, x.shape[1:], mean, rstd, weight, bias, [True] * 3)
        if copies := self._copies(graph):
            return self._whole_gradients(grad, x, weight, copies)
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
            return torch.autograd.grad(self.function(graph)(*leaves), leaves, grad)

    def _whole_gradients(self, grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, copies: int) -> tuple[torch.Tensor, ...]:
        """x is overwritten; one temporary of its size beside the result."""
        shape, x, grad = x.shape, x.view(copies, -1, x.shape[1]), grad.view(copies, -1, x.shape[1])
        count = x.shape[1] * x.shape[2]
        spread = self._centre(x)
        scale = spread + self.eps
        product = grad * x
        rows, rows_product = grad.sum(1), product.sum(1)  # [copies, width]
        mean = (rows @ weight)[:, None, None] / count
        slope = (rows_product @ weight)[:, None, None] / (count * scale * spread.clamp(min=1e-30))  # equal states have no slope
        grad_x = torch.mul(grad, weight, out=product).sub_(mean).sub_(x.mul_(slope)).div_(scale)
        return grad_x.view(shape), (rows_product / scale[:, 0]).sum(0), rows.sum(0)

    def forward(self, x: torch.Tensor, graph: NeuralGraph | None = None) -> torch.Tensor:
        """x [N, width] normalised; `graph` says which rows belong together."""
        return self.function(graph)(x, self.weight, self.bias)

"""A norm and an activation that follow something else."""

from __future__ import annotations

import torch

from ..graph import NeuralGraph
from ..ops.node_map import FUNCTIONS as ACTIVATIONS
from ..ops.node_map import After
from .norm import NodeNorm


class NormAct:
    """act(norm(y)), or norm(act(y)) where `act_first`; without a norm act(y).

    Args:
        norm: NodeNorm or None. act: one of the engine's activations. graph: says which rows belong together.
    """

    def __init__(self, norm: NodeNorm | None, act: str, act_first: bool = False, graph: NeuralGraph | None = None):
        self.norm, self.act, self.act_first, self.graph = norm, act, act_first, graph

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What follows y in a call."""
        return () if self.norm is None else (self.norm.weight, self.norm.bias)

    def __call__(self, y: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        act = ACTIVATIONS[self.act]
        if self.norm is None:
            return act(y)
        norm = self.norm.function(self.graph)
        return norm(act(y), *tensors) if self.act_first else act(norm(y, *tensors))

    def after(self, rows: int, device: torch.device) -> After:
        """The same as part of a node map of so many rows."""
        norm = self.norm
        if norm is None:
            return After(self.act)
        bounds = None if norm.over == "layer" else norm.bounds(self.graph, rows, device)
        return After(self.act, "layer" if norm.over == "layer" else "graph", norm.weight, norm.bias, bounds, norm.eps, self.act_first)

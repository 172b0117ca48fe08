"""A norm and an activation after another, with their derivative written out: few operations, few temporaries."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..graph import NeuralGraph
from .norm import NodeNorm

_ops = torch.ops.aten
ACTIVATIONS = {
    "silu": F.silu, "relu": torch.relu, "gelu": F.gelu, "tanh": torch.tanh, "sigmoid": torch.sigmoid,
    "leaky_relu": F.leaky_relu, "identity": lambda x: x,
}  # fmt: skip
_IN_PLACE = {
    "silu": lambda y: F.silu(y, inplace=True), "relu": torch.relu_, "gelu": _ops.gelu_, "tanh": torch.tanh_, "sigmoid": torch.sigmoid_,
    "leaky_relu": lambda y: F.leaky_relu(y, inplace=True), "identity": lambda y: y,
}  # fmt: skip
_BACKWARD = {
    "silu": lambda g, x: _ops.silu_backward(g, x), "relu": lambda g, x: _ops.threshold_backward(g, x, 0),
    "gelu": lambda g, x: _ops.gelu_backward(g, x), "tanh": lambda g, x: _ops.tanh_backward(g, x.tanh()),
    "sigmoid": lambda g, x: _ops.sigmoid_backward(g, x.sigmoid()), "leaky_relu": lambda g, x: _ops.leaky_relu_backward(g, x, 0.01, False),
    "identity": lambda g, x: g,
}  # fmt: skip


class NormAct:
    """act(norm(y, weight, bias)), or norm(act(y), weight, bias) where `act_first`; without a norm act(y).

    Args:
        norm: NodeNorm or None. act: one of the engine's activations. graph: says which rows belong together.
    """

    def __init__(self, norm: NodeNorm | None, act: str, act_first: bool = False, graph: NeuralGraph | None = None):
        self.norm, self.act, self.act_first, self.graph = norm, act, act_first, graph
        self.function = None if norm is None else norm.function(graph)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What follows y in a call."""
        return () if self.norm is None else (self.norm.weight, self.norm.bias)

    def __call__(self, y: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        act = ACTIVATIONS[self.act]
        if self.function is None:
            return act(y)
        return self.function(act(y), *tensors) if self.act_first else act(self.function(y, *tensors))

    def in_place(self, y: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        """The same without gradients; y may be overwritten."""
        act = _IN_PLACE[self.act]
        if self.norm is None:
            return act(y)
        return self.norm.in_place(act(y), *tensors, self.graph) if self.act_first else act(self.norm.in_place(y, *tensors, self.graph))

    def gradients(self, grad: torch.Tensor, y: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Gradients of y and `tensors`, from that of the result; y may be overwritten."""
        act, backward = ACTIVATIONS[self.act], _BACKWARD[self.act]
        if self.norm is None:
            return (backward(grad, y),)
        if self.act_first:
            found = self.norm.gradients(grad, act(y), *tensors, self.graph)
            return backward(found[0], y), *found[1:]
        return self.norm.gradients(backward(grad, self.function(y, *tensors)), y, *tensors, self.graph)

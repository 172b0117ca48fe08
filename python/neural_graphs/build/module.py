"""torch.nn modules to neural graphs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from .network import Network, from_layers

ACTIVATIONS = {
    nn.ReLU: "relu", nn.GELU: "gelu", nn.SiLU: "silu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid", nn.LeakyReLU: "leaky_relu", nn.Identity: "none",
}  # fmt: skip
SINES = ("Sine", "Sin")  # by class name: torch has none
PASSED_OVER = (nn.Dropout, nn.Flatten)


def _flat(module: nn.Module) -> Iterator[nn.Module]:
    if type(module) is nn.Sequential:
        for child in module:
            yield from _flat(child)
    else:
        yield module


def _name(module: nn.Module) -> str | None:
    if type(module).__name__ in SINES and not any(True for _ in module.parameters()):
        return "sine"
    return next((name for kind, name in ACTIVATIONS.items() if type(module) is kind), None)


def from_module(module: nn.Module, reverse: bool = False) -> Network:
    """(graph, weights, biases) of an MLP: a torch.nn.Linear, or Sequentials of Linears and activations.

    Args:
        module: its parameters stay where they are: weights are transposed views, and gradients reach them.
        reverse: add the reversed edges.

    Returns:
        Network: unpacks to (graph, weights (1, in, out, 1), biases (1, out, 1)); `.activations` names the hidden
        layers' activations ("none" between Linears that follow one another). Missing biases are zeros.

    Raises:
        NotImplementedError: any other module. ValueError: Linears that do not fit one another.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"from_module: expected a torch.nn.Module, got {type(module).__name__}")
    linears: list[nn.Linear] = []
    names: list[str] = []
    for part in _flat(module):
        if type(part) is nn.Linear:
            linears.append(part)
            names.append("none")
        elif isinstance(part, PASSED_OVER):
            continue
        elif linears and names[-1] == "none" and _name(part) is not None:
            names[-1] = _name(part)
        else:
            raise NotImplementedError(
                f"from_module: expected a chain of torch.nn.Linear and one activation after each ({', '.join(k.__name__ for k in ACTIVATIONS)}, Sine) "
                f"in torch.nn.Sequential, got {type(part).__name__}; convolutions, norms, attention and modules with a forward of their own are not "
                "built yet: pass the Sequential inside, or the matrices to from_layers"
            )
    if not linears:
        raise NotImplementedError(f"from_module: expected at least one torch.nn.Linear, got {type(module).__name__} without any")
    if any(isinstance(m.weight, nn.UninitializedParameter) for m in linears):
        raise ValueError("from_module: expected initialised parameters, got a lazy module; run it once first")
    biases: list[torch.Tensor | None] = [m.bias for m in linears]
    return from_layers([m.weight for m in linears], biases, names[:-1], reverse, "from_module")

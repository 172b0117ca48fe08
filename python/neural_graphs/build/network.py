"""What builders return: a neural graph, its weights and its biases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ngkernels import NeuralGraph


class _Triple(NamedTuple):
    graph: NeuralGraph
    weights: list[torch.Tensor]  # (1, in, out, 1) views of the parameters
    biases: list[torch.Tensor]  # (1, out, 1)


class Network(_Triple):
    """(graph, weights, biases) of one network; `activations` holds a name for each hidden layer."""

    activations: tuple[str, ...]

    def __new__(cls, graph, weights, biases, activations=()):
        self = super().__new__(cls, graph, weights, biases)
        self.activations = tuple(activations)
        return self

    @property
    def layout(self) -> tuple[int, ...]:
        """Widths of the layers, inputs first."""
        return self.graph.parts[0].layers


def from_layers(
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    activations: Sequence[str] = (),
    reverse: bool = False,
    op: str = "from_layers",
) -> Network:
    """The neural graph of an MLP from its matrices.

    Args:
        weights: (out, in) each, as in torch.nn.Linear. biases: (out,) each, or None for zeros.
        activations: names of the hidden layers' activations, kept with the result.
        reverse: add the reversed edges. op: named in errors.

    Returns:
        Network: weights (1, in, out, 1), transposed views without a copy; biases (1, out, 1).

    Raises:
        ValueError: no layers, shapes that do not follow one another.
    """
    if not weights or len(weights) != len(biases):
        raise ValueError(f"{op}: expected at least one weight and as many biases, got {len(weights)} and {len(biases)}")
    for k, (w, b) in enumerate(zip(weights, biases, strict=True)):
        if w.dim() != 2 or (k and w.shape[1] != weights[k - 1].shape[0]):
            before = f"(out, {weights[k - 1].shape[0]})" if k else "(out, in)"
            raise ValueError(f"{op}: expected weight {k} of shape {before}, got {tuple(w.shape)}")
        if b is not None and tuple(b.shape) != (w.shape[0],):
            raise ValueError(f"{op}: expected bias {k} of shape ({w.shape[0]},), got {tuple(b.shape)}")
    layout = [weights[0].shape[1], *(w.shape[0] for w in weights)]
    given = [w.new_zeros(w.shape[0]) if b is None else b for w, b in zip(weights, biases, strict=True)]
    graph = NeuralGraph.mlp(layout, reverse=reverse)
    return Network(graph, [w.T[None, :, :, None] for w in weights], [b[None, :, None] for b in given], activations)

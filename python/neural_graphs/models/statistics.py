"""Input statistics: weights and biases as (value - mean) / std, one mean and std for each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ngkernels import NeuralGraph

NAMES = ("weights_mean", "weights_std", "biases_mean", "biases_std")


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of each layer's weights and biases; None: raw values."""

    weights: tuple[tuple[float, float], ...] | None = None  # (mean, std) by layer
    biases: tuple[tuple[float, float], ...] | None = None
    denormalize: bool = False
    op: str = "Statistics"  # who asks, for messages

    @classmethod
    def parse(cls, op: str, stats: dict | None, layers: int, denormalize: bool = False) -> Statistics:
        """From a dict of `NAMES`, each one number for each layer; None: no statistics.

        Raises:
            ValueError: unknown names, wrong numbers of values, a std of 0.
        """
        if not stats:
            return cls(denormalize=denormalize, op=op)
        if set(stats) - set(NAMES):
            raise ValueError(f"{op}: expected stats of {', '.join(NAMES)}, got {', '.join(map(str, stats))}")
        values = {}
        for name in NAMES:
            given = stats.get(name)
            values[name] = [float(v) for v in given] if given is not None else [float(name.endswith("std"))] * layers
            if len(values[name]) != layers or (name.endswith("std") and not all(v > 0 for v in values[name])):
                raise ValueError(
                    f"{op}: expected stats[{name!r}] of {layers} numbers (one for each layer; a std above 0), got {values[name]}"
                )
        pairs = [tuple(zip(values[f"{kind}_mean"], values[f"{kind}_std"])) for kind in ("weights", "biases")]
        return cls(*pairs, denormalize, op)

    def affine(self, graph: NeuralGraph):
        """(scale, shift) of each weight tensor of `graph`, for EdgeState; None without statistics.

        Raises:
            ValueError: networks that have not as many weights as there are statistics.
        """
        if self.weights is None:
            return None
        if graph.packed or any(p.num_weights != len(self.weights) for p in graph.parts):
            raise ValueError(
                f"{self.op}: expected networks of {len(self.weights)} weight tensors each (one for each of the stats), got {graph}"
            )
        return tuple(1 / s for _, s in self.weights) * len(graph.parts), tuple(-m / s for m, s in self.weights) * len(graph.parts)

    def node_values(self, graph: NeuralGraph, biases, channels: int, dtype: torch.dtype) -> torch.Tensor:
        """Normalised biases of all nodes [N, C]; input nodes 0.

        Raises:
            ValueError: biases that do not fit the graph.
        """
        if isinstance(biases, torch.Tensor):
            if tuple(biases.shape) != (graph.num_nodes, channels):
                raise ValueError(
                    f"{self.op}: expected biases of shape {(graph.num_nodes, channels)} (all nodes of the graph), got {tuple(biases.shape)}"
                )
            if self.biases is not None:
                raise ValueError(f"{self.op}: expected biases as a list of layers (the model has stats), got one tensor")
            return biases.to(dtype)
        biases = list(biases)
        wanted = [(p.copies, width, channels) for p in graph.parts for width in p.layers[1:]]
        if [tuple(b.shape) for b in biases] != wanted:
            raise ValueError(f"{self.op}: expected biases of shapes {wanted}, got {[tuple(b.shape) for b in biases]}")
        if any(len(p.layers) == 1 for p in graph.parts):
            raise ValueError(f"{self.op}: expected biases as one tensor [N, C] for networks of one node layer, got a list of layers")
        pieces, left = [], iter(biases)
        for p in graph.parts:
            layers = [self._normalized(k, next(left).to(dtype)) for k in range(len(p.layers) - 1)]
            pieces.append(torch.cat([layers[0].new_zeros(p.copies, p.layers[0], channels), *layers], 1).flatten(0, 1))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _normalized(self, layer: int, b: torch.Tensor) -> torch.Tensor:
        if self.biases is None:
            return b
        mean, std = self.biases[layer]
        return (b - mean) / std

    def weight_update(self, layer: int, t: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """scale * t, with t in units of the layer's statistics when `denormalize`."""
        return self._update(self.weights, layer, t, scale)

    def bias_update(self, layer: int, t: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """As weight_update."""
        return self._update(self.biases, layer, t, scale)

    def _update(self, pairs: Sequence | None, layer: int, t: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        if self.denormalize and pairs is not None:
            t = t * pairs[layer][1] + pairs[layer][0]
        return t * scale

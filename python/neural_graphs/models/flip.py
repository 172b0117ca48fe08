"""Neural graphs with every edge turned round: for models whose rows are the sources of the weights."""

from __future__ import annotations

import torch

from ngkernels import Block, NeuralGraph
from ngkernels.blocks import DENSE, Part


def flip(graph: NeuralGraph) -> NeuralGraph:
    """The same networks, nodes and order of the blocks; every block runs from its destination to its source. Kept."""
    if "flip" not in graph._cache:
        parts = [Part(p.layers, tuple(Block(b.kind, b.dst, b.src, b.weight) for b in p.blocks), p.copies) for p in graph.parts]
        graph._cache["flip"] = NeuralGraph(parts, packed=graph.packed)
    return graph._cache["flip"]


def flip_weights(graph: NeuralGraph, weights: list[torch.Tensor]) -> list[torch.Tensor]:
    """The weights of `graph` as those of flip(graph): transposed views; one reordered copy if the graph is packed."""
    if graph.packed:
        return [weights[0].index_select(0, _order(graph).to(weights[0].device))]
    return [w.transpose(0, 1) if w.dim() == 2 else w.transpose(1, 2) if w.dim() == 4 else w for w in weights]  # 3-D: diagonal


def _order(graph: NeuralGraph) -> torch.Tensor:
    """Packed position in `graph` of every packed edge of flip(graph), int64 [forward edges]. Kept."""
    if "flip order" not in graph._cache:
        pieces, first = [], 0
        for p in graph.parts:
            own, at = [], 0
            for b in p.blocks:
                n = p.edges_of(b)
                index = torch.arange(at, at + n)
                own.append(index.view(p.layers[b.src], p.layers[b.dst]).T.flatten() if b.kind == DENSE else index)
                at += n
            pieces.append((first + torch.arange(p.copies)[:, None] * at + torch.cat(own)).flatten())
            first += p.copies * at
        graph._cache["flip order"] = torch.cat(pieces)
    return graph._cache["flip order"]

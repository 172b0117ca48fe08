"""Graphs cut into panels: for networks larger than a GPU, whose weights stay on the CPU (ngkernels/ops/in_panels.py).

A panel is a range of one node layer's neurons with the edges that end there: its rows are those of a restricted graph.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .blocks import DIAGONAL, SPARSE, Block, Part
from .edges import EdgeState, Mark
from .graph import NeuralGraph
from .kept import kept

BYTES = 64 << 20  # of raw weights in a panel; those of two are on the GPU at a time


@dataclass(frozen=True)
class Piece:
    """A part of a weight tensor. index: of its axes after the copies: slices, or the numbers of a sparse block's edges."""

    weight: int
    index: tuple[slice | torch.Tensor, ...]

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor[(slice(None), *self.index)]

    def add(self, grad: torch.Tensor, total: torch.Tensor) -> None:
        """Adds the gradient of this piece to that of the whole tensor."""
        if isinstance(self.index[0], torch.Tensor):
            total.index_add_(1, self.index[0], grad)
        else:
            self.of(total).add_(grad)


@dataclass(frozen=True)
class Panel:
    """graph: what the rows of its node layer `layer` (None: all) depend on. nodes: where its nodes stand among all. rows: (first, copies,
    stride, begin, end), where its results stand: rows `begin` to `end` of each of `copies` groups of `stride` rows."""

    graph: NeuralGraph
    layer: int | None
    pieces: tuple[Piece, ...]
    nodes: slice
    rows: tuple[int, int, int, int, int]

    def rows_of(self, result: torch.Tensor) -> torch.Tensor:
        first, copies, stride, begin, end = self.rows
        return result[first : first + copies * stride].unflatten(0, (copies, stride))[:, begin:end]


def cut(edges: EdgeState, op: str, attention: bool) -> list[Panel]:
    """The panels of a graph, in the order of their rows; kept with it.

    Raises:
        NotImplementedError: beyond one panel, a packed, closed or checkpointed state; attention of a network without edges.
    """
    graph, weights = edges.graph, edges.weights
    if sum(w.numel() * w.element_size() for w in weights) <= BYTES:
        pieces = tuple(Piece(k, (slice(None),)) for k in range(len(weights)))
        unrestricted = graph.derived(("unrestricted",), graph.parts, None, graph.closed)
        return [Panel(unrestricted, graph.rows, pieces, slice(0, graph.num_nodes), (0, 1, graph.num_rows, 0, graph.num_rows))]
    if graph.packed or graph.closed or graph.stored or any(isinstance(s, Mark) for s in edges.steps):
        raise NotImplementedError(
            f"{op}: more than {BYTES} bytes of weights on the CPU, under states on a GPU, are read for edge states that are neither packed, closed "
            "nor checkpointed; batch with packed=False, use edge_memory='recompute', or move the weights with .to()"
        )
    most = BYTES // (weights[0].shape[-1] * max(w.element_size() for w in weights))
    both = attention or edges.paired
    return kept(graph._cache, ("panels", most, both, attention), lambda: _panels(op, graph, most, both, attention))


def _panels(op: str, graph: NeuralGraph, most: int, both: bool, attention: bool) -> list[Panel]:
    """most: weights of a panel. both: it has the edges that begin there too. attention: it has rows for neurons without edges."""
    panels, weight, node, row = [], 0, 0, 0
    for part in graph.parts:
        layers = range(len(part.layers)) if graph.rows is None else [graph.rows % len(part.layers)]
        stride = sum(part.layers[layer] for layer in layers)
        at = 0
        for layer in layers:
            touching = _edges_of_a_neuron(part, layer)
            step = max(1, most // touching) if touching else part.layers[layer]
            for begin in range(0, part.layers[layer], step):
                cutter = _Cutter(part, layer, begin, min(begin + step, part.layers[layer]), both, weight)
                if attention and not cutter.pieces:
                    cutter = _without_edges(op, part, layer, weight)
                if cutter.pieces:
                    nodes = slice(node, node + part.copies * part.num_nodes)
                    rows = (row, part.copies, stride, at + cutter.begin, at + cutter.end)
                    panels.append(Panel(NeuralGraph([cutter.cut]), cutter.number, tuple(cutter.pieces), nodes, rows))
            at += part.layers[layer]
        weight, node, row = weight + part.num_weights, node + part.copies * part.num_nodes, row + part.copies * stride
    return panels


def _edges_of_a_neuron(part: Part, layer: int) -> int:
    """About how many edges touch a neuron of a layer, in all copies."""
    touching = [b for b in part.blocks if b.owns and layer in (b.src, b.dst)]
    return part.copies * sum(-(-part.edges_of(b) // part.layers[layer]) for b in touching)


def _without_edges(op: str, part: Part, layer: int, first_weight: int) -> _Cutter:
    """A whole layer that has none, in a network with the edges of one neuron elsewhere, on which its rows do not depend: kernels want weights."""
    for b in part.blocks:
        if b.owns and part.edges_of(b):
            neuron = 0 if b.index is None else int(b.index.dst[0])
            cutter = _Cutter(part, b.dst, neuron, neuron + 1, False, first_weight)
            cutter.number, cutter.begin, cutter.end = cutter.starts[layer], 0, part.layers[layer]
            return cutter
    raise NotImplementedError(f"{op}: networks without any edge are not built for weights on the CPU under states on a GPU; move the weights with .to()")


class _Cutter:
    """One network with a layer cut to the neurons `begin` to `end`, and the blocks that end there. both: those that begin there too.

    cut: the network. number: of the panel's layer in it. pieces: its weights.
    """

    def __init__(self, part: Part, layer: int, begin: int, end: int, both: bool, first_weight: int):
        self.part, self.layer, self.begin, self.end, self.first_weight = part, layer, begin, end, first_weight
        self.pieces: list[Piece] = []
        cuts = {layer}  # a diagonal joins neurons of equal number: both its layers are cut alike
        for b in part.blocks:
            if b.kind == DIAGONAL and layer in (b.src, b.dst):
                cuts |= {b.src, b.dst}
        self.ranges = [self._ranges(width, k in cuts) for k, width in enumerate(part.layers)]
        self.starts = [sum(map(len, self.ranges[:k])) for k in range(len(part.layers))]
        blocks: list[Block] = []
        for b in part.blocks:
            if b.owns:
                blocks += self._blocks(b, both, any(c.reverse and c.weight == b.weight for c in part.blocks))
        widths = tuple(stop - start for ranges in self.ranges for start, stop in ranges)
        self.cut = replace(part, layers=widths, blocks=tuple(blocks))
        self.number = self.starts[layer] + self.ranges[layer].index((begin, end))

    def _ranges(self, width: int, is_cut: bool) -> list[tuple[int, int]]:
        bounds = sorted({0, width, *(b for b in (self.begin, self.end) if is_cut and b < width)})
        return list(zip(bounds, bounds[1:]))

    def _blocks(self, block: Block, both: bool, turned: bool) -> list[Block]:
        """The pieces of a block that rows of the panel depend on, `turned` each with its reversal."""
        found, panel = [], (self.layer, (self.begin, self.end))
        for i, source in enumerate(self.ranges[block.src]):
            for j, to in enumerate(self.ranges[block.dst]):
                if (block.dst, to) != panel and not ((both or turned) and (block.src, source) == panel):
                    continue
                index, edge_index = _within(block, source, to)
                if index is None:
                    continue
                at = self.starts[block.src] + i, self.starts[block.dst] + j, len(self.pieces)
                self.pieces.append(Piece(self.first_weight + block.weight, index))
                piece = Block(block.kind, *at) if edge_index is None else Block.sparse(*at, edge_index)
                found += [piece, piece.reversed()] if turned else [piece]
        return found


def _within(block: Block, source: tuple[int, int], to: tuple[int, int]) -> tuple[tuple | None, torch.Tensor | None]:
    """Which weights of a block join two ranges of neurons, None if none does; of a sparse block, also the pairs, counted in the ranges."""
    if block.kind == SPARSE:
        src, dst = block.index.src.cpu(), block.index.dst.cpu()
        numbers = torch.nonzero((src >= source[0]) & (src < source[1]) & (dst >= to[0]) & (dst < to[1])).flatten()
        return ((numbers,), torch.stack([src[numbers] - source[0], dst[numbers] - to[0]])) if len(numbers) else (None, None)
    if block.kind == DIAGONAL:
        return ((slice(source[0], min(source[1], to[1])),), None) if source[0] == to[0] else (None, None)
    return (slice(*source), slice(*to)), None


def needed(edges: EdgeState) -> bool:
    """Whether a state's weights are on the CPU and everything else on a GPU."""
    return edges.weights[0].device != edges.device

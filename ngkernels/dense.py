"""Sparse blocks as dense ones, for attention over all pairs: raw features for each pair of the joined layers, no more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from .blocks import DENSE, SPARSE, Block, Part, closed_part
from .encoders import expansion

if TYPE_CHECKING:
    from .edges import EdgeState


def dense(edges: EdgeState) -> EdgeState:
    """See EdgeState.dense."""
    if edges.graph.stored or edges.graph.closed:
        raise ValueError("EdgeState.dense: expected a state that is neither checkpointed nor closed, got one that is; make it dense first")
    edges = _unpacked(edges)
    graph = edges.graph
    weights, scale, shift = list(edges.weights), *map(list, edges.affine or ((), ()))
    owners = [(p, b) for p in graph.parts for b in sorted((b for b in p.blocks if b.owns), key=lambda b: b.weight)]
    crossing = edges.encoder.reciprocal and any(_crosses(b, p) for p in graph.parts for b in p.blocks)
    for k, (part, block) in enumerate(owners):
        if edges.affine is not None and (crossing or block.kind == SPARSE):  # a pair that is no edge reads 0, not the image of 0
            weights[k], scale[k], shift[k] = weights[k] * scale[k] + shift[k], 1.0, 0.0
        if block.kind == SPARSE:
            weights[k] = _spread(weights[k], part, block)
    if crossing:
        return _of_both_directions(edges, weights)
    parts = [replace(p, blocks=tuple(replace(b, kind=DENSE, index=None) if b.kind == SPARSE else b for b in p.blocks)) for p in graph.parts]
    affine = None if edges.affine is None else (tuple(scale), tuple(shift))
    return replace(edges, graph=graph.derived(("dense",), parts, graph.rows, None), weights=tuple(weights), affine=affine)


def _unpacked(edges: EdgeState) -> EdgeState:
    """The same state with a view of the packed weights for each block."""
    graph = edges.graph
    if not graph.packed:
        return edges
    rows, weights = edges.weights[0], []
    for part in graph.parts:
        sizes = [size[1:].numel() for size in map(torch.Size, part.weight_sizes)]
        mine, rows = rows[: part.copies * sum(sizes)], rows[part.copies * sum(sizes) :]
        each = mine.unflatten(0, (part.copies, sum(sizes))).split(sizes, 1)
        weights += [w.unflatten(1, size[1:]) for w, size in zip(each, part.weight_sizes, strict=True)]
    affine = edges.affine and tuple(tuple(values) * len(weights) for values in edges.affine)
    return replace(edges, graph=graph.derived(("unpacked",), graph.parts, graph.rows, None, packed=False), weights=tuple(weights), affine=affine)


def _places(part: Part, block: Block, device: torch.device) -> torch.Tensor:
    """Where the edges of a sparse block stand among the n_src n_dst pairs of its layers."""
    return (block.index.src * part.layers[block.dst] + block.index.dst).to(device)


def _spread(w: torch.Tensor, part: Part, block: Block) -> torch.Tensor:
    """Weights (copies, E, C) of a sparse block at their places in (copies, n_src, n_dst, C)."""
    block.index.check_unique("EdgeState.dense")
    size = part.layers[block.src], part.layers[block.dst]
    return w.new_zeros(w.shape[0], size[0] * size[1], w.shape[2]).index_copy(1, _places(part, block, w.device), w).unflatten(1, size)


# ---- both directions of a pair may have a number, and an encoder reads both ----
def _opposite(block: Block, part: Part) -> Block | None:
    """The block that joins the same layers in the other direction, of whatever kind."""
    return next((c for c in part.blocks if (c.src, c.dst) == (block.dst, block.src)), None)


def _crosses(block: Block, part: Part) -> bool:
    """Whether a sparse block's pairs without an edge may reverse edges of other weights than the block's own reversal has."""
    other = _opposite(block, part)
    return block.kind == SPARSE and other is not None and (other is block or other.weight != block.weight)


def _of_both_directions(edges: EdgeState, weights: Sequence[torch.Tensor]) -> EdgeState:
    """Every pair with the 3 C numbers that the encoder makes of its two directions, closed over all pairs: which direction a pair
    reads differs from pair to pair of a block, and a block has one variant of the encoder."""
    parts, features, first = [], [], 0
    for part in edges.graph.parts:
        pairs = _BothDirections(part, weights[first : first + part.num_weights])
        first += part.num_weights
        blocks = [replace(b, kind=_kind(b), weight=k, reverse=False, index=None) for k, b in enumerate(part.blocks)]
        values = [pairs.features(b, _opposite(b, part)) for b in part.blocks]
        for b in part.blocks:
            if _opposite(b, part) is None:
                blocks.append(Block(_kind(b), b.dst, b.src, len(values), edge=False))
                values.append(pairs.turned(b))
        parts.append(closed_part(replace(part, blocks=tuple(blocks)), "all", False))
        features += values
    graph = edges.graph.derived(("dense", "both directions"), parts, edges.graph.rows, "all")
    return replace(edges, graph=graph, weights=tuple(features), affine=None, encoder=replace(edges.encoder, reciprocal=False))


def _kind(block: Block) -> str:
    return DENSE if block.kind == SPARSE else block.kind


@dataclass
class _BothDirections:
    """The dense weights of one part, as features of pairs."""

    part: Part
    weights: Sequence[torch.Tensor]

    def _read(self, block: Block, turn: bool) -> torch.Tensor:
        """Features (copies, n_src, n_dst, 3 C) of the numbers of `block`; `turn`: of its pairs in the other direction."""
        w = self.weights[block.weight]
        against = block.reverse != turn
        return (w.transpose(1, 2) if against and w.dim() == 4 else w) @ expansion(w.shape[-1], int(against), w).T

    def turned(self, block: Block) -> torch.Tensor:
        return self._read(block, True)

    def features(self, block: Block, other: Block | None) -> torch.Tensor:
        """A pair with an edge reads its number, another one that of the edge it reverses."""
        own = self._read(block, False)
        if block.kind != SPARSE or other is None:
            return own
        here = torch.zeros(own[0, ..., 0].numel(), dtype=torch.bool, device=own.device)
        here[_places(self.part, block, own.device)] = True
        return torch.where(here.view(own.shape[1:3])[..., None], own, self.turned(other))

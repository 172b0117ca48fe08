"""Sparse blocks as dense ones, for attention over all pairs: a raw feature for each pair of the joined layers, no more."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from .blocks import DENSE, SPARSE, Block, Part

if TYPE_CHECKING:
    from .edges import EdgeState


def dense(edges: EdgeState) -> EdgeState:
    """See EdgeState.dense."""
    graph = edges.graph
    if graph.stored or graph.closed:
        raise ValueError("EdgeState.dense: expected a state that is neither checkpointed nor closed, got one that is; make it dense first")
    if graph.packed:
        raise NotImplementedError("EdgeState.dense: sparse blocks of a packed graph are not built; batch the graphs with packed=False")
    if edges.encoder.reciprocal and any(b.kind == SPARSE and p.opposite(k) is not None for p in graph.parts for k, b in enumerate(p.blocks)):
        raise NotImplementedError(
            "EdgeState.dense: an encoder that reads both directions is not built where sparse blocks join two layers in both; give dense blocks"
        )
    owners = [(p, b) for p in graph.parts for b in sorted((b for b in p.blocks if b.owns), key=lambda b: b.weight)]
    weights, scale, shift = list(edges.weights), *map(list, edges.affine or ((), ()))
    for k, (part, block) in enumerate(owners):
        if block.kind != SPARSE:
            continue
        if edges.affine is not None:  # a pair that is no edge reads 0, not the image of 0
            weights[k], scale[k], shift[k] = weights[k] * scale[k] + shift[k], 1.0, 0.0
        weights[k] = _spread(weights[k], part, block)
    parts = [replace(p, blocks=tuple(replace(b, kind=DENSE, index=None) if b.kind == SPARSE else b for b in p.blocks)) for p in graph.parts]
    affine = None if edges.affine is None else (tuple(scale), tuple(shift))
    return replace(edges, graph=graph.derived(("dense",), parts, graph.rows, None), weights=tuple(weights), affine=affine)


def _spread(w: torch.Tensor, part: Part, block: Block) -> torch.Tensor:
    """Weights (copies, E, C) of a sparse block at their places in (copies, n_src, n_dst, C)."""
    block.index.check_unique("EdgeState.dense")
    n_src, n_dst = part.layers[block.src], part.layers[block.dst]
    at = (block.index.src * n_dst + block.index.dst).to(w.device)
    return w.new_zeros(w.shape[0], n_src * n_dst, w.shape[2]).index_copy(1, at, w).unflatten(1, (n_src, n_dst))

"""Sums of the nodes' gradients for the nodes of one chunk of work at a time, on GPUs: the window slides over the networks with the work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch


class Chunk(Protocol):
    nodes: tuple[int, int]  # the range of nodes in memory, which no later chunk begins before


def sliding(chunks: Sequence[Chunk], columns: int, like: torch.Tensor) -> Iterator[tuple[Chunk, torch.Tensor, int]]:
    """Each chunk, sums [2, its nodes, columns] for it to add to (0, but for nodes that chunks before have begun), and how many of these nodes are
    done with it: the first ones."""
    sums = like.new_empty(2, 0, columns)
    for chunk, following in zip(chunks, [*chunks[1:], None]):
        first, end = chunk.nodes
        begun, sums = sums, like.new_zeros(2, end - first, columns)
        if begun.shape[1]:
            sums[:, : begun.shape[1]] = begun
        del begun  # or its memory stays
        done = (end if following is None else min(end, following.nodes[0])) - first
        yield chunk, sums, done
        sums = sums[:, done:]

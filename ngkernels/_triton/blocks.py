"""The blocks of a graph as launches see them: rows of the topology table, the lines of sparse ones, groups of launches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from ..edge_index import read_lists
from ..topology import COLUMNS, DIAGONAL, KINDS, PARTNER, SAME, SPARSE, SPARSE_RAW, TRIANGLE, lists_of

POINTERS = 8  # edge tensors that one launch can name


class Row(NamedTuple):
    """One block, or one pair of opposite blocks: a row of the topology table."""

    kind: int
    weight: int
    variant: int
    src: int
    n_src: int
    dst: int
    n_dst: int
    copies: int
    node_stride: int
    out: int
    out_stride: int
    src_axis: int
    shared: int
    offset: int
    edge_stride: int
    block: int
    emit_offset: int
    emit_stride: int
    part: int
    partner: int
    partner_variant: int
    partner_axis: int
    partner_offset: int
    partner_block: int
    partner_emit_offset: int
    partner_out: int
    flags: int
    lists: int
    count: int

    @property
    def diagonal(self) -> bool:
        return KINDS[self.kind] == DIAGONAL

    @property
    def triangle(self) -> bool:
        return KINDS[self.kind] == TRIANGLE

    @property
    def sparse(self) -> bool:
        return KINDS[self.kind] == SPARSE

    @property
    def inside(self) -> bool:
        """Whether both ends lie in the same node layer: a neuron's pair with itself is its own partner."""
        return self.src == self.dst

    @property
    def both(self) -> bool:
        """Whether the results of partners are used too."""
        return bool(self.flags & PARTNER)

    @property
    def edges(self) -> int:
        n = self.n_src
        return self.count if self.sparse else n if self.diagonal else n * (n + 1) // 2 if self.triangle else n * self.n_dst

    @property
    def adds_to_partner(self) -> bool:
        """Whether another row writes gradients of the weights that this row's partners read."""
        return bool(self.shared) and self.partner >= 0 and not self.flags & SAME


if Row._fields != COLUMNS:
    raise ImportError("ngkernels._triton.blocks: Row does not name the columns of the topology table")


class Lines(NamedTuple):
    """A sparse block as lines: up to `width` edges of one destination each. dst, first, count: of each line; src, number, partner: of
    each edge (numbers: its own and its partner's)."""

    width: int
    dst: np.ndarray
    first: np.ndarray
    count: np.ndarray
    src: np.ndarray
    number: np.ndarray
    partner: np.ndarray

    @classmethod
    def of(cls, row: Row, topology: torch.Tensor) -> Lines:
        dst, src, number, partner = (t.numpy() for t in read_lists(lists_of(topology, row.lists).cpu(), row.count))
        begins = np.flatnonzero(np.diff(dst, prepend=-1))
        degree = np.diff(begins, append=len(dst))
        width = 16 if degree.mean() > 6 else 4
        parts = -(-degree // width)
        at = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
        first = np.repeat(begins, parts) + at * width
        count = np.minimum(width, np.repeat(begins + degree, parts) - first)
        return cls(width, dst[first], first, count, src, number, partner)

    def packed(self) -> np.ndarray:
        """(destination, first edge, edges) of each line, then (source, number, partner's number) of each edge."""
        return np.concatenate([np.stack([self.dst, self.first, self.count], 1), np.stack([self.src, self.number, self.partner], 1)]).reshape(-1)


class Group(NamedTuple):
    """Blocks that one launch covers: tiles of one shape, edge tensors of one dtype."""

    rows: tuple[int, ...]  # of the topology table
    shape: tuple[int, int]  # destinations and sources of a tile; sparse: lines, edges of a line
    panels: tuple[tuple[int, int], ...]  # destinations and sources that one program works through, by row
    later: bool  # an earlier group writes gradients of the same weights: these are added
    both: bool  # the results of partners are used too
    sparse: bool
    adds_to_partner: bool


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def tile_shape(row: Row, lines: Lines | None, size: int) -> tuple[int, int]:
    """Destinations and sources of a tile of `size` edges; a block with few sources gets more destinations."""
    width = lines.width if lines is not None else 4 if row.n_src <= 4 else 16
    return size // width, width


def panel(row: Row, lines: Lines | None, shape: tuple[int, int], reduce: bool) -> tuple[int, int]:
    """Destinations and sources of the rectangle that one program works through, tile by tile."""
    if lines is not None:
        return shape
    if reduce:  # the destinations of one tile; sources are split where there are too few destinations to fill a GPU
        splits = 1 if row.diagonal else min(ceil_div(row.n_src, 256), max(4, 512 // ceil_div(row.n_dst, shape[0])))
        return shape[0], max(shape[1], ceil_div(ceil_div(row.n_src, splits), shape[1]) * shape[1])
    edges = row.n_src * row.n_dst
    side = 32 if edges <= 1 << 17 else 64 if edges <= 1 << 22 else 128
    tall, wide = max(side, shape[0]), max(side, shape[1])
    if row.diagonal or row.triangle:
        return max(tall, wide), max(tall, wide)
    if row.n_dst < tall:  # a skinny block: longer the other way
        wide = min(1024, wide * ceil_div(tall, max(16, row.n_dst)))
    elif row.n_src < wide:
        tall = min(1024, tall * ceil_div(wide, max(16, row.n_src)))
    return tall, wide


def grouped(rows: Sequence[Row], lines: dict[int, Lines], active: Sequence[int], dtypes: Sequence[int], size: int, reduce: bool, in_turn: bool) -> list[Group]:
    """The launches; `in_turn`: blocks that write gradients of the same weights, as edges or as partners, come one launch after the other, in
    the order of their nodes: that of sums (plan.py)."""
    seen: tuple[dict, dict] = ({}, {})
    classes: dict[tuple, list[int]] = {}
    for k in sorted(active, key=lambda k: min(rows[k].src, rows[k].dst)):
        row, turn, later = rows[k], 0, False
        if in_turn:
            reads = ((row.weight, row.offset), (row.partner, row.partner_offset))
            turn = max(found.get(read, 0) if read[0] >= 0 else 0 for found, read in zip(seen, reads, strict=True))
            later = row.weight >= 0 and reads[0] in seen[0]
            for found, read in zip(seen, reads, strict=True):
                found[read] = turn + 1
        types = tuple(dtypes[max(w, 0)] if dtypes else 0 for w in (row.weight, row.partner))
        classes.setdefault((turn, tile_shape(row, lines.get(k), size), types, later, row.both, row.sparse, row.adds_to_partner), []).append(k)
    out = []
    for (_, shape, _, *kind), members in sorted(classes.items()):
        limit = len(members) if rows[members[0]].emit_offset >= 0 else POINTERS
        for k in range(0, len(members), limit):
            some = tuple(members[k : k + limit])
            out.append(Group(some, shape, tuple(panel(rows[m], lines.get(m), shape, reduce) for m in some), *kind))
    return out


def coverage(rows: Sequence[Row], active: Sequence[int]) -> tuple[dict[int, int], dict[int, int]]:
    """How many edges of each weight tensor, and of each carrier (packed graphs have one), the active blocks reach for certain."""
    weights: dict[int, int] = {}
    blocks: dict[int, int] = {}
    seen = set()
    for row in (rows[k] for k in active):
        if row.sparse or row.triangle or row.both or row.flags & SPARSE_RAW:
            continue
        block = 0 if row.emit_offset >= 0 else row.block
        blocks[block] = blocks.get(block, 0) + row.copies * row.edges
        if row.weight >= 0 and (row.weight, row.offset) not in seen:
            seen.add((row.weight, row.offset))
            weights[row.weight] = weights.get(row.weight, 0) + row.copies * row.edges
    return weights, blocks

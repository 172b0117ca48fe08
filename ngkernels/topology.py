"""The integer tables that kernels read a graph from: one row for each block, or for each pair of opposite blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from .graph import Block, NeuralGraph, Part

DENSE, DIAGONAL, TRIANGLE = "dense", "diagonal", "triangle"
KINDS = (DENSE, DIAGONAL, TRIANGLE)  # triangle: the unordered pairs i <= j of one node layer; in tables only
OVER = ("all", "edges", "in", "out")

# Columns of the table (csrc/edge_program.h holds the same list). A row stands for the edges (j -> i) of a block; its
# *partners* are the same pairs read in the other direction (i -> j).
COLUMNS = (
    "kind",  # index into KINDS
    "weight",  # index into the list of the weight tensors in use; -1: no edges, raw features 0
    "variant",  # which variant of the encoder these edges use (1: reversed block)
    "src",  # first source node of copy 0
    "n_src",
    "dst",  # first destination node of copy 0
    "n_dst",
    "copies",  # equal graphs, one behind the other
    "node_stride",  # nodes from one copy to the next
    "out",  # first output row of copy 0; equals dst unless the graph is restricted
    "out_stride",
    "src_axis",  # axis of the weight tensor (copies, d0, d1, C) that runs over sources
    "shared",  # 1 when another row adds to the gradient of the same weights
    "offset",  # packed weights: first edge of copy 0, else -1
    "edge_stride",  # packed weights: edges from one copy to the next
    "block",  # index into the list of the blocks in use: of its carrier, of its values
    "emit_offset",  # packed: first edge of copy 0 in a stored state (reversed blocks own their values there)
    "emit_stride",
    "part",  # which part of the disjoint union
    "partner",  # as weight, variant, src_axis, offset, block, emit_offset and out, of the partners
    "partner_variant",
    "partner_axis",
    "partner_offset",
    "partner_block",
    "partner_emit_offset",
    "partner_out",
    "flags",
)
FORWARD, PARTNER, TOKEN, SAME, SPARSE_RAW = 1, 2, 4, 8, 16
# FORWARD, PARTNER: the result of the edges, of their partners, is used. TOKEN: states are 0 before the first update.
# SAME: an edge and its partner read the same number. SPARSE_RAW: only pairs of equal index have raw features.


class Topology(NamedTuple):
    """A table [rows, len(COLUMNS)] int64, the weight tensors and blocks it names, and the number of output rows."""

    table: torch.Tensor
    used_weights: tuple[int, ...]
    used_blocks: tuple[int, ...]
    num_rows: int


class _Numbers(NamedTuple):
    """Where a part begins in each numbering of the union, and how much one copy takes."""

    number: int
    node: int
    weight: int
    edge: int
    emit: int
    block: int
    out: int
    edges_per_copy: int
    emitted_per_copy: int
    rows: int | None  # the node layer that outputs are restricted to
    out_per_copy: int


def _numbers(graph: NeuralGraph) -> list[_Numbers]:
    found, node, weight, edge, emit, block, out = [], 0, 0, 0, 0, 0, 0
    for number, p in enumerate(graph.parts):
        rows = None if graph.rows is None else graph.rows % len(p.layers)
        edges, emitted = sum(p.edges_of(b) for b in p.blocks if b.owns), sum(p.edges_of(b) for b in p.blocks)
        width = p.num_nodes if rows is None else p.layers[rows]
        found.append(_Numbers(number, node, weight, edge, emit, block, out, edges, emitted, rows, width))
        node, weight, block = node + p.copies * p.num_nodes, weight + p.num_weights, block + len(p.blocks)
        edge, emit, out = edge + p.copies * edges, emit + p.copies * emitted, out + p.copies * width
    return found


class _PartTable:
    """Rows of one part."""

    def __init__(self, graph: NeuralGraph, part: Part, at: _Numbers):
        self.packed, self.part, self.at = graph.packed, part, at
        self.starts = [sum(part.layers[:k]) for k in range(len(part.layers))]
        self.offset: dict[int, int] = {}
        edge = at.edge
        for b in part.blocks:
            if b.owns:
                self.offset[b.weight] = edge
                edge += part.edges_of(b)
        self.readers = [b.weight for b in part.blocks if b.weight >= 0]

    def reads(self, block: Block | None) -> list[int]:
        """weight, variant, src_axis, offset of a block's raw features."""
        if block is None or block.weight < 0:
            return [-1, int(block is not None and block.reverse), 1, -1]
        weight = 0 if self.packed else self.at.weight + block.weight
        return [weight, int(block.reverse), 2 if block.reverse else 1, self.offset[block.weight] if self.packed else -1]

    def writes(self, k: int | None) -> list[int]:
        """block, emit_offset of block number k."""
        if k is None:
            return [-1, -1]
        emitted = self.at.emit + sum(self.part.edges_of(c) for c in self.part.blocks[:k])
        return [self.at.block + k, emitted if self.packed else -1]

    def out(self, layer: int) -> int:
        """First output row of a node layer; -1 where outputs are restricted to another."""
        if self.at.rows is None:
            return self.at.out + self.starts[layer]
        return self.at.out if self.at.rows == layer else -1

    def row(self, kind: str, k: int, partner: Block | None, k_partner: int | None, shared: bool, flags: int) -> list[int]:
        p, at, block = self.part, self.at, self.part.blocks[k]
        n_src, n_dst = p.layers[block.src], p.layers[block.dst]
        if kind == DIAGONAL:
            n_src = n_dst = min(n_src, n_dst)
        weight, variant, axis, offset = self.reads(block)
        if p.token and 0 in (block.src, block.dst):
            flags |= TOKEN
        head = [KINDS.index(kind), weight, variant, at.node + self.starts[block.src], n_src, at.node + self.starts[block.dst], n_dst]
        mine = [p.copies, p.num_nodes, self.out(block.dst), at.out_per_copy, axis, int(shared), offset, at.edges_per_copy]
        return [*head, *mine, *self.writes(k), at.emitted_per_copy, at.number, *self.reads(partner), *self.writes(k_partner), self.out(block.src), flags]  # fmt: skip

    def edge_rows(self, paired: bool, reciprocal: bool, messages: bool) -> list[list[int]]:
        """One row for each block that has outputs (`messages`: and is one of edges); `paired`: with its partners."""
        rows, blocks = [], self.part.blocks
        for k, b in enumerate(blocks):
            if self.at.rows not in (None, b.dst) or (messages and not b.edge):
                continue
            partner, same = (self.partner_of(k, reciprocal)) if paired else (None, False)
            shared = self.readers.count(b.weight) > 1 if b.weight >= 0 else False
            if partner is not None and partner.weight >= 0 and not same:
                shared = True  # each of two opposite rows adds to the weights of the other
            rows.append(self.row(b.kind, k, partner, None, shared, FORWARD | (SAME if same else 0)))
        return rows

    def partner_of(self, k: int, reciprocal: bool) -> tuple[Block | None, bool]:
        """What the partners of a block's edges read, and whether that is the edges' own numbers."""
        b = self.part.blocks[k]
        opposite = self.part.opposite(k)
        if opposite is not None:
            other = self.part.blocks[opposite]
            return other, other.weight == b.weight >= 0 and (b.src != b.dst or b.kind == DIAGONAL)
        if reciprocal and b.weight >= 0:
            return b.reversed(), True
        return None, False

    def pair_rows(self, over: str, include_self: bool) -> list[list[int]]:
        """One row for each pair of opposite blocks whose result is used."""
        rows, blocks, seen = [], self.part.blocks, set()
        for k, b in enumerate(blocks):
            if (b.dst, b.src) in seen or (b.src, b.dst) in seen:
                continue
            seen.add((b.src, b.dst))
            other = self.part.opposite(k)
            flags = self.used(b, over, include_self) * FORWARD | self.used(blocks[other], over, include_self) * PARTNER
            if flags == PARTNER:
                k, other, flags = other, k, FORWARD
            if flags == 0:
                continue
            b, partner = blocks[k], blocks[other]
            kind = b.kind
            if over == "all" and kind == DIAGONAL:
                kind, flags = DENSE, flags | (SPARSE_RAW if b.weight >= 0 else 0)
            if b.src == b.dst:
                kind = TRIANGLE if kind == DENSE else kind
                flags = flags if kind == TRIANGLE else flags & ~PARTNER
            if b.weight == partner.weight >= 0 and (b.src != b.dst or b.kind == DIAGONAL):
                flags |= SAME
            rows.append(self.row(kind, k, partner, other, False, flags))
        return rows

    def used(self, block: Block, over: str, include_self: bool) -> bool:
        """Whether the destinations of a block read its states."""
        if self.at.rows not in (None, block.dst):
            return False
        if block.src == block.dst and not block.edge:
            return include_self
        if over in ("all", "edges") or block.src == block.dst or (self.part.token and 0 in (block.src, block.dst)):
            return True
        if over == "in":
            return block.edge
        return self.part.blocks[self.part.opposite(self.part.blocks.index(block))].edge


def _finish(graph: NeuralGraph, table: list[list[int]], numbers: list[_Numbers]) -> Topology:
    """A restricted graph names only the weight tensors and blocks it reads, so gradients of the others do not exist."""
    used = [_renumber(table, "weight", "partner"), _renumber(table, "block", "partner_block")]
    rows = sum(p.copies * at.out_per_copy for p, at in zip(graph.parts, numbers, strict=True))
    return Topology(torch.tensor(table, dtype=torch.int64).reshape(-1, len(COLUMNS)), *used, rows)


def _renumber(table: list[list[int]], *columns: str) -> tuple[int, ...]:
    """Replaces the columns' values by their ranks (-1 stays) and returns the values."""
    at = [COLUMNS.index(c) for c in columns]
    used = sorted({row[c] for row in table for c in at} - {-1})
    rank = {-1: -1, **{value: k for k, value in enumerate(used)}}
    for row in table:
        for c in at:
            row[c] = rank[row[c]]
    return tuple(used)


def edge_topology(graph: NeuralGraph, paired: bool, reciprocal: bool, messages: bool) -> Topology:
    """One row for each block; `paired`: partners too (an expression with a pair update); `messages`: of edges only."""
    numbers = _numbers(graph)
    table = [r for p, at in zip(graph.parts, numbers, strict=True) for r in _PartTable(graph, p, at).edge_rows(paired, reciprocal, messages)]
    return _finish(graph, table, numbers)


def pair_topology(graph: NeuralGraph, over: str, include_self: bool) -> Topology:
    """One row for each pair of opposite blocks of a closed graph: both directions are evaluated together."""
    numbers = _numbers(graph)
    table = [r for p, at in zip(graph.parts, numbers, strict=True) for r in _PartTable(graph, p, at).pair_rows(over, include_self)]
    return _finish(graph, table, numbers)

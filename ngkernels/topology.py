"""The integer tables that kernels read a graph from: one row for each block, or for each pair of opposite blocks."""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.utils.weak import WeakIdKeyDictionary

from .edge_index import Pairs, make_lists

if TYPE_CHECKING:
    from .blocks import Block, Part
    from .graph import NeuralGraph

DENSE, DIAGONAL, TRIANGLE, SPARSE = "dense", "diagonal", "triangle", "sparse"
KINDS = (DENSE, DIAGONAL, TRIANGLE, SPARSE)  # triangle: the unordered pairs i <= j of one node layer; in tables only
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
    "src_axis",  # axis of the weight tensor (copies, d0, d1, C) that runs over sources; sparse: 1 own number, 2 the partner's
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
    "lists",  # sparse: where its lists begin in the tensor (ngkernels/edge_index.py)
    "count",  # sparse: entries of its lists
)
FORWARD, PARTNER, TOKEN, SAME, SPARSE_RAW = 1, 2, 4, 8, 16
# FORWARD, PARTNER: the result of the edges, of their partners, is used. TOKEN: states are 0 before the first update.
# SAME: an edge and its partner read the same number. SPARSE_RAW: only pairs of equal index have raw features.


class Topology(NamedTuple):
    """One int64 tensor on the host (number of rows | rows [rows, len(COLUMNS)] | lists of the sparse ones), the weight tensors and blocks
    that it names, and the number of output rows. Lists that were made on a GPU stay there (`apart`): instead of them, the tensor ends with
    a number that stands for them (lists_of)."""

    table: torch.Tensor
    used_weights: tuple[int, ...]
    used_blocks: tuple[int, ...]
    num_rows: int
    apart: bool = False

    @property
    def rows(self) -> torch.Tensor:
        """[rows, len(COLUMNS)]."""
        return rows_of(self.table)

    def on(self, device: torch.device) -> torch.Tensor:
        """The table for ops on a device: on a CPU, with its lists."""
        return _whole(self.table) if self.apart and not stays(device) else self.table


class Lists:
    """The lists of a table, where they were made. whole: the table with them, on the host, once it was wanted."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor
        self.whole: torch.Tensor | None = None


_numbers_of_lists = itertools.count()
_by_number: weakref.WeakValueDictionary[int, Lists] = weakref.WeakValueDictionary()
_kept_by: WeakIdKeyDictionary = WeakIdKeyDictionary()  # Lists by their table, which they live as long as


def stays(device: torch.device) -> bool:
    """Whether lists that are on a device are left there."""
    return device.type == "cuda"


def rows_of(table: torch.Tensor) -> torch.Tensor:
    return table[1 : 1 + int(table[0]) * len(COLUMNS)].reshape(-1, len(COLUMNS))


def lists_of(table: torch.Tensor, first: int) -> torch.Tensor:
    """The lists that begin at `first`, a row's column "lists", wherever they are.

    Raises:
        RuntimeError: a copy of a table whose graph is gone.
    """
    if len(table) != 2 + int(table[0]) * len(COLUMNS):  # lists of its own are longer than a number
        return table[first:]
    if (found := _by_number.get(int(table[-1]))) is None:
        raise RuntimeError("ngkernels: expected the lists of a sparse graph where they were made, found that graph gone; keep it while its results are in use")
    return found.tensor[first:]


def _whole(table: torch.Tensor) -> torch.Tensor:
    """A table with its lists, on the host."""
    lists = _kept_by[table]
    if lists.whole is None:
        head = table[:-1].clone()
        at = rows_of(head)[:, COLUMNS.index("lists")]
        at[at >= 0] += len(head)
        lists.whole = torch.cat([head, lists.tensor.cpu()])
    return lists.whole


class Row(NamedTuple):
    """The columns of a row, and its lists."""

    columns: list[int]
    lists: torch.Tensor | None = None

    def alone(self) -> Row:
        """Without partners."""
        columns = list(self.columns)
        columns[COLUMNS.index("partner")] = -1
        columns[COLUMNS.index("flags")] &= ~SAME
        return Row(columns, self.lists)


def num_rows(graph: NeuralGraph) -> int:
    """Output rows: all nodes, or those of the layer that outputs are restricted to."""
    return sum(p.copies * (p.num_nodes if graph.rows is None else p.layers[graph.rows]) for p in graph.parts)


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
        edges, emitted = sum(p.features_of(b) for b in p.blocks if b.owns), sum(p.edges_of(b) for b in p.blocks)
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
                edge += part.features_of(b)
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

    def row(self, kind: str, k: int, partner: Block | None, k_partner: int | None, shared: bool, flags: int) -> Row:
        p, at, block = self.part, self.at, self.part.blocks[k]
        n_src, n_dst = p.layers[block.src], p.layers[block.dst]
        if kind == DIAGONAL:
            n_src = n_dst = min(n_src, n_dst)
        weight, variant, axis, offset = self.reads(block)
        if p.token and 0 in (block.src, block.dst):
            flags |= TOKEN
        head = [KINDS.index(kind), weight, variant, at.node + self.starts[block.src], n_src, at.node + self.starts[block.dst], n_dst]
        mine = [p.copies, p.num_nodes, self.out(block.dst), at.out_per_copy, axis, int(shared), offset, at.edges_per_copy]
        theirs = [*self.reads(partner), *self.writes(k_partner), self.out(block.src)]
        return Row([*head, *mine, *self.writes(k), at.emitted_per_copy, at.number, *theirs, flags, -1, 0])

    def edge_rows(self, paired: bool, reciprocal: bool, messages: bool) -> list[Row]:
        """One row for each block that has outputs (`messages`: and is one of edges; sparse: for each kind of features); `paired`: with its
        partners."""
        rows, blocks = [], self.part.blocks
        for k, b in enumerate(blocks):
            if self.at.rows not in (None, b.dst) or (messages and not b.edge):
                continue
            shared = b.weight >= 0 and sum(1 for r in self.readers if r == b.weight) > 1  # list.count of open sizes fails to compile in PyTorch 2.11
            if b.kind == SPARSE:
                rows += self.sparse_edge_rows(k, paired, reciprocal, messages, shared)
                continue
            partner, same = (self.partner_of(k, reciprocal)) if paired else (None, False)
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

    def pair_rows(self, over: str, include_self: bool) -> list[Row]:
        """One row for each pair of opposite blocks whose result is used."""
        rows, blocks, seen = [], self.part.blocks, set()
        for k, b in enumerate(blocks):
            if (b.dst, b.src) in seen or (b.src, b.dst) in seen:
                continue
            seen.add((b.src, b.dst))
            other = self.part.opposite(k)
            if b.kind == SPARSE:
                rows += self.sparse_pair_rows(k, other, over, include_self)
                continue
            flags = self.used(b, over, include_self) * FORWARD | self.used(blocks[other], over, include_self) * PARTNER
            if flags == PARTNER:
                k, other, flags = other, k, FORWARD
            if flags == 0:
                continue
            b, partner = blocks[k], blocks[other]
            kind = b.kind
            if over == "all" and kind == DIAGONAL:
                kind, flags = DENSE, flags | (SPARSE_RAW if max(b.weight, partner.weight) >= 0 else 0)
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

    # ---- sparse blocks ----
    def sparse_edge_rows(self, k: int, paired: bool, reciprocal: bool, messages: bool, shared: bool) -> list[Row]:
        """The pairs of block k (`messages`: those that are edges); `paired`: with the numbers of their partners, -1 for none."""
        block = self.part.blocks[k]
        index = block.index
        mirror = index.mirror or (paired and reciprocal)
        count = index.edges if messages else len(index)
        if not paired and (block.weight < 0 or count <= index.raw):
            return [self.sparse_row(k, None, Pairs.of(index).first(count), (block.weight >= 0, False), False, shared, FORWARD)]
        opposite = self.part.opposite(k)
        other = None if opposite is None else self.part.blocks[opposite].index
        pairs = Pairs.of(index, torch.full_like(index.src, -1) if other is None else index.numbers_in(other)).first(count)
        rows = []
        for found, chosen in pairs.split(self.features(block, pairs.number), self.features(None if other is None else self.part.blocks[opposite], pairs.partner)):
            rows.append(self.sparse_row(k, opposite, chosen, found, mirror, shared or index.mirror, FORWARD))
        return rows if paired else [r.alone() for r in rows]

    @staticmethod
    def features(block: Block | None, number: torch.Tensor) -> torch.Tensor:
        """Whether each pair of a block has raw features."""
        return (number >= 0) & (number < (block.index.raw if block is not None and block.weight >= 0 else 0))

    def sparse_pair_rows(self, k: int, other: int, over: str, include_self: bool) -> list[Row]:
        """The pairs of two opposite blocks of a closed graph, or, inside a layer, each unordered pair of the one block."""
        block, back = self.part.blocks[k], self.part.blocks[other]
        pairs = Pairs.of(block.index, block.index.numbers_in(back.index))
        inside = block.src == block.dst
        if inside:
            pairs = pairs.where(pairs.src <= pairs.dst)
        itself = (pairs.src == pairs.dst) & inside
        forward, backward = ((n < b.index.edges) & b.edge for b, n in ((block, pairs.number), (back, pairs.partner)))
        if over == "out":
            forward, backward = backward, forward
        forward, backward = (torch.where(itself, edge | include_self, edge | (over == "edges")) for edge in (forward, backward))
        into_dst, into_src = (self.at.rows in (None, layer) for layer in (block.dst, block.src))
        rows = []
        for (own, theirs, there, here), chosen in pairs.split(self.features(block, pairs.number), self.features(back, pairs.partner), forward, backward):
            flags, mirror = (there and into_dst) * FORWARD | (here and into_src) * PARTNER, block.index.mirror
            if flags == PARTNER:
                rows.append(self.sparse_row(other, k, chosen.flipped(), (theirs, own), mirror, False, FORWARD, True))
            elif flags:
                rows.append(self.sparse_row(k, other, chosen, (own, theirs), mirror, False, flags, True))
        return rows

    def sparse_row(self, k: int, other: int | None, pairs: Pairs, found: tuple[bool, bool], mirror: bool, shared: bool, flags: int, both: bool = False) -> Row:
        """Pairs of block k which all have, or all have not, raw features of their own and of their partners (`found`). With `mirror`,
        one that has none reads its partner's, reversed. `both`: partners have values of their own, in block `other`."""
        block, partner = self.part.blocks[k], None if other is None else self.part.blocks[other]
        own = (block, 1) if found[0] else (partner.reversed(), 2) if mirror and found[1] else (None, 1)
        theirs = (partner, 2) if found[1] else (block.reversed(), 1) if mirror and found[0] else (None, 2)
        if found[0] and found[1] and k != other and block.weight == partner.weight:
            theirs = (partner, 1)  # a block and its reversal have the same numbers
        reads, partner_reads = self.reads(own[0]), self.reads(theirs[0])
        reads[2], partner_reads[2] = own[1], theirs[1]
        same = own[0] is not None and theirs[0] is not None and (own[0].weight, own[1]) == (theirs[0].weight, theirs[1])
        shared = shared or (not both and theirs[0] is not None and not same)
        row = self.row(SPARSE, k, None, other if both else None, shared, flags | (SAME if same else 0)).columns
        for name, value in zip(("weight", "variant", "src_axis", "offset"), reads, strict=True):
            row[COLUMNS.index(name)] = value
        for name, value in zip(("partner", "partner_variant", "partner_axis", "partner_offset"), partner_reads, strict=True):
            row[COLUMNS.index(name)] = value
        row[COLUMNS.index("count")] = len(pairs.src)
        return Row(row, make_lists(pairs, self.part.layers[block.src]))


def _finish(graph: NeuralGraph, rows: list[Row]) -> Topology:
    """A restricted graph names only the weight tensors and blocks it reads, so gradients of the others do not exist."""
    table, lists = [r.columns for r in rows], []
    used = [_renumber(table, "weight", "partner"), _renumber(table, "block", "partner_block")]
    apart = next((r.lists.device for r in rows if r.lists is not None and stays(r.lists.device)), None)
    at = 1 + len(table) * len(COLUMNS) if apart is None else 0
    for row in rows:
        if row.lists is not None:
            row.columns[COLUMNS.index("lists")] = at
            lists.append(row.lists.to(apart or "cpu"))
            at += len(row.lists)
    head = [len(table), *(v for row in table for v in row)]
    if apart is None:
        found = torch.tensor(head, dtype=torch.int64, device="cpu")
        return Topology(torch.cat([found, *lists]) if lists else found, *used, num_rows(graph))
    number = next(_numbers_of_lists)
    found = torch.tensor([*head, number], dtype=torch.int64, device="cpu")
    _kept_by[found] = _by_number[number] = Lists(torch.cat(lists))
    return Topology(found, *used, num_rows(graph), apart=True)


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
    return _finish(graph, table)


def pair_topology(graph: NeuralGraph, over: str, include_self: bool) -> Topology:
    """One row for each pair of opposite blocks of a closed graph: both directions are evaluated together."""
    numbers = _numbers(graph)
    table = [r for p, at in zip(graph.parts, numbers, strict=True) for r in _PartTable(graph, p, at).pair_rows(over, include_self)]
    return _finish(graph, table)

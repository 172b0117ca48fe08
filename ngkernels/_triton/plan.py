"""A graph as work: blocks cut into tiles, tiles put into launches, and the order in which partial results are summed.

The cut of a block depends on its own size alone and every sum runs in the order of the tiles, so results are bitwise the same from run to
run and for a network alone or in a batch. All of it is made once for a graph and kept on the device; a call only looks it up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from ..kept import OfTopology, Recent
from ..topology import rows_of
from .blocks import Group, Lines, Row, coverage, grouped

TILE = ("row", "copy", "i0", "j0", "partial", "slot")  # columns of the tile table; row: of its group
ENTRY = ("partial", "offset", "rows", "messages")  # columns of the entry table: a partial result of some nodes of a segment
REDUCE, ATTEND, NODES = "reduce", "attend", "nodes"  # what partial results are: statistics of messages, softmax sums, node terms


class Chunk(NamedTuple):
    """Tiles whose partial results are in memory together."""

    launches: tuple[tuple[int, int, int], ...]  # (group, first tile, last tile)
    partials: int  # rows of partial results
    slots: int  # places for edges
    segments: tuple[int, int]  # range of segments
    nodes: tuple[int, int]  # NODES: the range of nodes that are in memory; earlier ones are done, later ones not begun

    @property
    def first(self) -> int:
        return self.launches[0][1]

    @property
    def tiles(self) -> int:
        return self.launches[-1][2] - self.first


class Section(NamedTuple):
    """Rows of partial results: of each, its tile, its place among that tile's rows, and the node it belongs to: segment, place there;
    then how many nodes follow one another, and the messages of each."""

    tile: np.ndarray
    place: np.ndarray
    key: np.ndarray
    offset: np.ndarray
    rows: np.ndarray
    messages: np.ndarray


class Cut:
    """The tiles of some blocks for one kind of work, in the order in which their results are summed.

    Args:
        plan: of the graph. active: which blocks take part. dtypes: a code of each weight tensor's dtype.
        size: edges of a tile. nodes: of the graph. work: REDUCE, ATTEND: results go to output rows; NODES: to destinations and sources.
        paired: partners are evaluated too.

    Note: segments are up to `segment` consecutive nodes; a node with key k is destination k or, from `nodes` on, source k - nodes.
        A tile's partial results are those of its destinations, of its sources, and with `paired` those of its sources and destinations
        as the partners' destinations and sources.
    """

    def __init__(self, plan: Plan, active: Sequence[int], dtypes: Sequence[int], size: int, nodes: int, work: str, paired: bool):
        self.plan, self.size, self.nodes, self.work, self.paired = plan, size, nodes, work, paired
        self.segment = size // 16 if work == REDUCE else 16
        rows = plan.rows
        self.covered_weights, self.covered_blocks = coverage(rows, active)
        self.groups = grouped(rows, plan.lines, active, dtypes, size, work == REDUCE, work == NODES)
        pieces = [[self._tiles(rows[k], local, g) for local, k in enumerate(g.rows)] for g in self.groups]
        self.ends = np.cumsum([0, *(sum(p.shape[1] for p in group) for group in pieces)]).tolist()
        columns = np.concatenate([np.zeros((10, 0), np.int64), *(p for group in pieces for p in group)], 1)
        self.local, self.copy, self.i0, self.j0, self.rows_i, self.rows_j, self.slots, self.first_node, self.last_node, self.new_nodes = columns
        self.rank = np.empty(self.tiles, np.int64)  # of each tile in the order of sums: network by network, from the first layer on
        self.rank[np.argsort(self.first_node, kind="stable")] = np.arange(self.tiles)
        self.row_tables, self._chunks = Recent(max(64, 4 * len(self.groups))), Recent(64)  # tables: of several layouts of tensors

    @property
    def tiles(self) -> int:
        return self.ends[-1]

    def _tiles(self, row: Row, local: int, group: Group) -> np.ndarray:
        """[10, tiles]: row, copy, first destination and source, their numbers, slots for edges; of its block's copy: the range of nodes; its
        share of the destinations, in 2^-16 nodes. Of a sparse block: lines, edges."""
        (bi, bj), (tall, wide) = group.shape, group.panels[local]
        lines = self.plan.lines.get(group.rows[local])
        n_dst, n_src = (row.n_dst, row.n_src) if lines is None else (len(lines.dst), bj)
        i = np.arange(0, n_dst, tall)
        j = np.zeros(1, np.int64) if row.diagonal else np.arange(0, n_src, wide)
        copy, i, j = (a.reshape(-1) for a in np.meshgrid(np.arange(row.copies), i, j, indexing="ij"))
        j = i if row.diagonal else j
        if row.triangle:
            copy, i, j = (a[j + wide > i] for a in (copy, i, j))
        rows_i, rows_j = np.minimum(tall, n_dst - i), np.minimum(wide, n_src - j)
        across = max(1, bi // bj) if row.diagonal else -(-rows_j // bj)  # of a diagonal block: tiles that meet the diagonal
        slots = -(-rows_i // bi) * across * bi * bj * (2 if self.paired else 1)
        first, last = (copy * row.node_stride + n for n in (min(row.src, row.dst), max(row.src + row.n_src, row.dst + row.n_dst)))
        rows_j = bi * bj + 0 * rows_j if group.sparse else rows_j
        share = np.full_like(i, (row.n_dst << 16) * row.copies // max(1, len(i)))
        return np.stack([np.full_like(i, local), copy, i, j, rows_i, rows_j, slots, first, last, share]).astype(np.int64)

    # ---- partial results ----
    def _sizes(self) -> list[np.ndarray]:
        """Rows of partial results of each section of each tile."""
        i, j = self.rows_i, self.rows_j
        return {REDUCE: [i], ATTEND: [i, j], NODES: [i, j, j, i] if self.paired else [i, j]}[self.work]

    def _sections(self) -> list[Section]:
        """Which nodes the partial results of each section belong to."""
        found = []
        for number, (i_side, keys) in enumerate(self._sides()):
            before = sum(self._sizes()[:number], np.zeros(self.tiles, np.int64))
            for group, first, last in zip(self.groups, self.ends[:-1], self.ends[1:], strict=True):
                for local, k in enumerate(group.rows):
                    tiles = first + np.flatnonzero(self.local[first:last] == local)
                    base, stride = keys(self.plan.rows[k])
                    if len(tiles) and base >= 0 and (number == 0 or group.both or self.work != ATTEND):
                        of_block = self._of_lines if group.sparse else self._of_rectangles
                        found.append(of_block(tiles, before, base + self.copy[tiles] * stride, i_side, self.plan.rows[k], self.plan.lines.get(k)))
        return found

    def _sides(self) -> list:
        """Of each section: whether it has destinations of edges, and the key of its block's first node and the stride of copies."""
        if self.work != NODES:
            return [(True, lambda r: (r.out, r.out_stride)), (False, lambda r: (r.partner_out, r.out_stride))][: len(self._sizes())]
        n = self.nodes
        roles = [(True, 0, "dst"), (False, n, "src"), (False, 0, "src"), (True, n, "dst")]
        return [(side, lambda r, n=n, end=end: (n + getattr(r, end), r.node_stride)) for side, n, end in roles[: len(self._sizes())]]

    def _of_rectangles(self, tile: np.ndarray, before: np.ndarray, base: np.ndarray, i_side: bool, row: Row, _lines) -> Section:
        """Runs of up to `segment` nodes of rectangles of a block."""
        start, count = (self.i0[tile], self.rows_i[tile]) if i_side else (self.j0[tile], self.rows_j[tile])
        messages = np.ones_like(count) if row.diagonal else self.rows_j[tile]
        parts = -(-count // self.segment)
        at = np.repeat(np.arange(len(tile)), parts)
        s = (np.arange(len(at)) - np.repeat(np.cumsum(parts) - parts, parts)) * self.segment
        offset = (start[at] + s) % self.segment
        return Section(tile[at], before[tile[at]] + s, base[at] + start[at] + s - offset, offset, np.minimum(self.segment, count[at] - s), messages[at])

    def _of_lines(self, tile: np.ndarray, before: np.ndarray, base: np.ndarray, i_side: bool, _row, lines: Lines) -> Section:
        """Every line's destination (i_side), or every edge's source, on its own."""
        at = np.repeat(np.arange(len(tile)), self.rows_i[tile])
        within = np.arange(len(at)) - np.repeat(np.cumsum(self.rows_i[tile]) - self.rows_i[tile], self.rows_i[tile])
        line = self.i0[tile[at]] + within
        if i_side:
            node, place = lines.dst[line], within
        else:
            count = lines.count[line]
            k = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
            node, place = lines.src[np.repeat(lines.first[line], count) + k], np.repeat(within * lines.width, count) + k
            at, line = np.repeat(at, count), np.repeat(line, count)
        offset = node % self.segment
        return Section(tile[at], before[tile[at]] + place, base[at] + node - offset, offset, np.ones_like(node), lines.count[line])

    def chunks(
        self, partial_bytes: int, tile_bytes: int, slot_bytes: int, node_bytes: int, budget: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, list[Chunk]]:
        """(tiles [n, 6], segments [s, 2], entry ranges [s + 1], entries [m, 4], chunks): what a chunk needs takes up to about `budget` bytes.

        A segment is (first key, nodes); keys of NODES count from the first node of their chunk.

        Args:
            partial_bytes, tile_bytes, slot_bytes, node_bytes: what a row of partial results, a tile, an edge and a node take.
        """
        key = (partial_bytes, tile_bytes, slot_bytes, node_bytes, budget)
        return self._chunks.get(key, lambda: self._chunked(*key))

    def _chunked(self, partial_bytes: int, tile_bytes: int, slot_bytes: int, node_bytes: int, budget: int):
        """Tiles are cut into chunks in the order of sums; in a chunk they stand by group."""
        partial_rows = sum(self._sizes())
        size = (partial_rows * partial_bytes + self.slots * slot_bytes + tile_bytes + (self.new_nodes * node_bytes >> 16))[np.argsort(self.rank)]
        number = (np.cumsum(size) - size) // budget
        number = np.unique(number, return_inverse=True)[1][self.rank] if len(number) else number  # consecutive
        order = np.argsort(number, kind="stable")
        starts = np.concatenate([np.flatnonzero(np.diff(number[order], prepend=-1)), [self.tiles]])
        partial, slot = np.empty_like(partial_rows), np.empty_like(self.slots)
        partial[order], slot[order] = _running(partial_rows[order], starts), _running(self.slots[order], starts)
        tiles = np.stack([self.local, self.copy, self.i0, self.j0, partial, slot], 1)[order]
        group = np.repeat(np.arange(len(self.groups)), np.diff(self.ends))[order]
        ranges_of_nodes = self._ranges(number, len(starts) - 1)
        segments, ranges, entries, chunk_of = self._segments(number, partial, ranges_of_nodes)
        chunks = []
        for c, (a, b) in enumerate(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)):
            cuts = [a, *(a + 1 + np.flatnonzero(np.diff(group[a:b]))).tolist(), b]
            launches = tuple((int(group[lo]), lo, hi) for lo, hi in zip(cuts, cuts[1:]))
            first, last = np.searchsorted(chunk_of, [c, c + 1]).tolist()
            chunks.append(Chunk(launches, int(partial_rows[order[a:b]].sum()), int(self.slots[order[a:b]].sum()), (first, last), tuple(ranges_of_nodes[c].tolist())))
        return (*(torch.from_numpy(np.ascontiguousarray(t)).to(self.plan.device) for t in (tiles, segments, ranges, entries)), chunks)

    def _ranges(self, chunk: np.ndarray, n: int) -> np.ndarray:
        """[n, 2]: of each chunk the first node that it or a later one reaches, and the end of those that it or an earlier one does."""
        found = np.stack([np.full(n, self.nodes), np.zeros(n, np.int64)], 1)
        np.minimum.at(found[:, 0], chunk, self.first_node)
        np.maximum.at(found[:, 1], chunk, self.last_node)
        return np.stack([np.minimum.accumulate(found[::-1, 0])[::-1], np.maximum.accumulate(found[:, 1])], 1)

    def _segments(self, chunk: np.ndarray, partial: np.ndarray, ranges: np.ndarray):
        """Segments, entry ranges, entries and chunks of the segments, sorted by chunk and key; entries in the order of sums."""
        none = np.zeros(0, np.int64)
        found = Section(*(np.concatenate([none, *columns]) for columns in zip(*self._sections(), strict=True))) if self.tiles else Section(*[none] * 6)
        owner = chunk[found.tile]
        sort = np.lexsort((found.place, self.rank[found.tile], found.key, owner))
        keys, owner = found.key[sort], owner[sort]
        first = np.flatnonzero((np.diff(keys, prepend=-1) != 0) | (np.diff(owner, prepend=-1) != 0))
        entries = np.stack([partial[found.tile] + found.place, found.offset, found.rows, found.messages], 1)[sort].reshape(-1, 4)
        size = np.maximum.reduceat(entries[:, 1] + entries[:, 2], first) if len(first) else first
        keys, owner = keys[first], owner[first]
        if self.work == NODES:
            begin, end = ranges[owner].T
            keys = keys - begin - np.where(keys < self.nodes, 0, self.nodes - (end - begin))
        return np.stack([keys, size], 1), np.concatenate([first, [len(sort)]]), entries, owner


def _running(counts: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Sums of `counts` before each position, beginning again at each of `starts`."""
    before = np.cumsum(counts) - counts
    return before - np.repeat(before[starts[:-1]], np.diff(starts))


class Plan:
    """What is known of a topology table on one device."""

    def __init__(self, topology: torch.Tensor, device: torch.device):
        self.rows = [Row(*r) for r in rows_of(topology).tolist()]
        self.device = device
        self.packed = bool(self.rows) and self.rows[0].emit_offset >= 0
        self.active = tuple(k for k, r in enumerate(self.rows) if r.copies and r.edges)
        self.lines = {k: Lines.of(self.rows[k], topology) for k in self.active if self.rows[k].sparse}
        packed = [lines.packed() for lines in self.lines.values()]
        starts = np.cumsum([0, *(len(p) for p in packed)]).tolist()
        self.line_starts = dict(zip(self.lines, starts, strict=False))
        self.lists = torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *packed])).to(device)
        self._cuts, self._degrees = Recent(64), Recent(64)

    def cut(self, active: tuple[int, ...] | None, dtypes: tuple[int, ...], size: int, nodes: int, work: str, paired: bool) -> Cut:
        """Of the blocks `active`, None: of all that have edges."""
        key = (active, dtypes, size, nodes, work, paired)
        return self._cuts.get(key, lambda: Cut(self, self.active if active is None else active, *key[1:]))

    def degrees(self, rows: int, dtype: torch.dtype) -> torch.Tensor:
        """Number of messages of every output row, at least 1, [rows]."""
        return self._degrees.get((rows, dtype), lambda: self._counted(rows).to(self.device, dtype))

    def _counted(self, rows: int) -> torch.Tensor:
        count = np.zeros(rows, np.int64)
        for k in self.active:
            r = self.rows[k]
            index = r.out + np.arange(r.copies)[:, None] * r.out_stride
            if r.sparse:
                np.add.at(count, (index + self.lines[k].dst).reshape(-1), np.tile(self.lines[k].count, r.copies))
            else:
                count[(index + np.arange(r.n_dst)).reshape(-1)] += 1 if r.diagonal else r.n_src
        return torch.from_numpy(np.maximum(count, 1))


plan_of = OfTopology(Plan)

"""The blocks of a graph as panels: rectangles of edges, one for each warp, and the order in which partial results are summed.

The cut of a block depends on its own size alone and every sum runs in the order of the panels, so results are bitwise the same from run to
run and for a network alone or in a batch. All of it is made once for a graph, on the device, and kept there.
"""

from __future__ import annotations

from collections import namedtuple
from typing import NamedTuple

import torch

from ..edge_index import read_lists
from ..kept import OfTopology, Recent
from ..topology import COLUMNS, DENSE, DIAGONAL, FORWARD, KINDS, PARTNER, SPARSE, TRIANGLE, lists_of, rows_of
from .lower import Unsupported

Row = namedtuple("Row", (*COLUMNS, "turned"))  # turned: whether its edges are the partners of the topology's row
PANEL = ("block", "copy", "i0", "i1", "j0", "j1", "rows_i", "rows_j", "slot")  # csrc/cuda/args.h
TILE = 16  # sources that a warp takes at a time
WARPS = 4  # panels of a block of threads
LONGEST = 512  # partial rows that one thread adds up


class Listed(NamedTuple):
    """Edges one by one, in the order of their destinations, TILE to a tile and TILE tiles to a panel. What a panel has of a destination is a
    run. int64.

    On the way back a destination has a partial row a run, a source one an edge; the order in which these are summed (Sums) is the transpose.
    To walk the edges once more, by source, would spare 8 bytes an edge and column (written, then read) and evaluate everything again: by count
    768 bytes of memory traffic at d = 32 against 30 kFLOP, which take about as long; wider states have more arithmetic to a byte.
    """

    edges: torch.Tensor  # [e, 3]: destination x 2^32 + source, number, partner's number
    runs: torch.Tensor  # [tiles]: where runs begin and end, csrc/cuda/args.h
    found: torch.Tensor  # [n, 2]: of each run, its destination and edges
    starts: torch.Tensor  # [panels + 1]: first run of each panel

    @classmethod
    def of(cls, row: Row, topology: torch.Tensor, device: torch.device) -> Listed:
        """Made on the device; so are the lists already where the graph's edges were given there."""
        if KINDS[row.kind] == DIAGONAL:
            n = torch.arange(row.n_src, device=device)
            return cls.cut(n, n, n, n)
        dst, src, number, partner = (t.to(device) for t in read_lists(lists_of(topology, row.lists), row.count))
        if row.turned:
            dst, src, number, partner = src, dst, partner, number
            order = (dst * row.n_src + src).argsort(stable=True)
            order = order[(dst != src)[order]] if row.src == row.dst else order  # a neuron's pair with itself is its own partner
            dst, src, number, partner = dst[order], src[order], number[order], partner[order]
        return cls.cut(dst, src, number, partner)

    @classmethod
    def cut(cls, dst: torch.Tensor, src: torch.Tensor, number: torch.Tensor, partner: torch.Tensor) -> Listed:
        n, place = len(dst), torch.arange(len(dst), device=dst.device)
        begins = place % TILE**2 == 0
        begins[1:] |= dst[1:] != dst[:-1]
        first = begins.nonzero().flatten()
        end = first.new_full((1,), n)
        run, tiles = begins.cumsum(0) - 1, ceil_div(n, TILE)
        bits = place.new_zeros(tiles).index_add_(0, place // TILE, begins.long() << place % TILE)
        ends = torch.cat([begins, begins.new_ones(1)])[place[::TILE].add(TILE).clamp(max=n)]
        starts = run[:: TILE**2]
        within = run[::TILE] - starts.repeat_interleave(TILE)[:tiles]
        count = torch.cat([first, end]).diff()
        runs, found = bits | ends.long() << 16 | within << 32, torch.stack([dst[first], count], 1)
        return cls(torch.stack([dst << 32 | src, number, partner], 1), runs, found, torch.cat([starts, end - n + len(first)]))


class Sums(NamedTuple):
    """Partial rows by the row that they are added to: `order[starts[s]] ..` belong to keys[s]. int64, order int32."""

    keys: torch.Tensor
    starts: torch.Tensor
    order: torch.Tensor

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """Of int64 [partial rows]."""
        total = torch.cat([x.new_zeros(1), x[self.order].cumsum(0)])
        return total[self.starts[1:]] - total[self.starts[:-1]]

    def in_two(self) -> list[Sums]:
        """The sums of up to LONGEST partial rows, then those of such sums: a hub has as many rows as its block has panels, and one thread would
        add them up. Itself alone where none has more."""
        pieces = ceil_div(self.starts.diff(), LONGEST)
        if not len(pieces) or int(pieces.max()) <= 1:
            return [self]
        starts = self.starts[:-1].repeat_interleave(pieces) + LONGEST * _within(pieces)
        every = torch.arange(len(starts), device=starts.device)
        return [
            Sums(every, torch.cat([starts, self.starts[-1:]]), self.order),
            Sums(self.keys, torch.cat([pieces.new_zeros(1), pieces.cumsum(0)]), every.int()),
        ]


class Chunk(NamedTuple):
    """Panels whose partial results are in memory together, in one launch, or in some where they add to gradients of the same weights."""

    launches: list[torch.Tensor]  # int64 [n, len(PANEL)] each
    partials: int  # rows of partial results
    slots: int  # places of edges
    sums: list[Sums]  # one after the other: of the partial rows, then of those sums
    messages: list[torch.Tensor]  # forward: of each partial row, then of each of those sums
    nodes: tuple[int, int] = (0, 0)  # backward: the range of nodes that are in memory; earlier ones are done, later ones not begun
    rows: tuple[int, int] = (0, 0)  # backward: the range of output rows that messages go to


def turned(r: Row) -> Row:
    """The partners of a row's edges as edges of their own."""
    sparse = KINDS[r.kind] == SPARSE
    axis, partner_axis = (3 - r.partner_axis, 3 - r.src_axis) if sparse else (r.partner_axis, r.src_axis)  # sparse: whose number, of the two
    return r._replace(
        src=r.dst, n_src=r.n_dst, dst=r.src, n_dst=r.n_src, out=r.partner_out, partner_out=r.out, src_axis=axis, partner_axis=partner_axis,
        weight=r.partner, variant=r.partner_variant, offset=r.partner_offset, block=r.partner_block, emit_offset=r.partner_emit_offset,
        partner=r.weight, partner_variant=r.variant, partner_offset=r.offset, partner_block=r.block, partner_emit_offset=r.emit_offset, turned=not r.turned,
    )  # fmt: skip


def directed(r: Row) -> list[Row]:
    """A row of pairs as rows of edges: those whose results are used."""
    if KINDS[r.kind] == TRIANGLE:  # both directions of all pairs of a layer
        return [r._replace(kind=KINDS.index(DENSE))]
    return [r] * bool(r.flags & FORWARD) + [turned(r)] * bool(r.flags & PARTNER)


def ceil_div(a, b: int):
    return -(-a // b)


def log_rows(row: Row) -> int:
    """log2 of the rows that a destination of a dense block has in a tile: where there are few sources, a tile has several destinations."""
    return min((row.n_src - 1).bit_length(), TILE.bit_length() - 1)


def step(row: Row) -> int:
    """Destinations of a tile."""
    return TILE >> log_rows(row)


def forward_panel(row: Row) -> tuple[int, int]:
    """Destinations and sources of a panel: a few tiles of several destinations, or long rows in parts where there are few destinations."""
    tiles = ceil_div(row.n_src, TILE)
    splits = min(ceil_div(row.n_src, 256), max(4, 2048 // row.n_dst))
    return max(1, TILE // tiles) * step(row), ceil_div(tiles, splits) * TILE


def backward_panel(row: Row) -> tuple[int, int]:
    """The larger, the fewer partial rows an edge has; small ones keep a GPU busy."""
    edges = row.n_src * row.n_dst
    tall, strips = (32, 1) if edges <= 1 << 17 else (64, 2) if edges <= 1 << 22 else (128, 4)
    if row.n_dst < tall:
        strips = min(64, strips * ceil_div(tall, row.n_dst))
    return tall * step(row), strips * TILE


class Plan:
    """What is known of a topology table on one device."""

    def __init__(self, topology: torch.Tensor, device: torch.device):
        rows = [Row(*r, False) for r in rows_of(topology).tolist()]
        self.rows = [found for r in rows for found in directed(r)]
        self.device = device
        self.active = [k for k, r in enumerate(self.rows) if r.copies and (r.count if KINDS[r.kind] == SPARSE else r.n_src and r.n_dst)]
        listed = [k for k in self.active if KINDS[self.rows[k].kind] in (DIAGONAL, SPARSE)]
        self.listed = {k: Listed.of(self.rows[k], topology, device) for k in listed}
        self.active = [k for k in self.active if k not in self.listed or len(self.listed[k].edges)]
        self._works, self._degrees = Recent(64), Recent(64)

    def degrees(self, rows: int) -> torch.Tensor:
        """Number of messages of every output row, at least 1, float32 [rows]."""
        return self._degrees.get(rows, lambda: self._counted(rows))

    def _counted(self, rows: int) -> torch.Tensor:
        count = torch.zeros(rows, dtype=torch.int64, device=self.device)
        for k in self.active:
            r = self.rows[k]
            first = r.out + torch.arange(r.copies, device=self.device)[:, None] * r.out_stride
            if k in self.listed:
                dst, messages = self.listed[k].found.T
                count.index_add_(0, (first + dst).flatten(), messages.repeat(r.copies))
            else:
                count[(first + torch.arange(r.n_dst, device=self.device)).flatten()] += r.n_src
        return count.clamp(min=1).float()

    def work(self, active: tuple[int, ...] | None = None) -> Work:
        """The panels of the blocks `active`; None: of all that have edges."""
        key = tuple(self.active) if active is None else active
        return self._works.get(key, lambda: Work(self, list(key)))


class Work:
    """The panels of some blocks of a graph."""

    def __init__(self, plan: Plan, active: list[int]):
        self.rows, self.listed, self.device, self.active = plan.rows, plan.listed, plan.device, active
        self.turns, self.added = self._turns()
        self._chunks, self._parts = Recent(64), Recent(1024)
        self.tables = Recent(64)  # of calls (rows.py)

    def _turns(self) -> tuple[dict[int, int], dict[int, bool]]:
        """Of each active block: the launch in which none before it, in the order of their nodes, writes gradients of the same weights, as edges
        or as partners; and whether one before it did as edges, so that its own are added."""
        seen: tuple[dict, dict] = ({}, {})
        turns, added = {}, {}
        for k in sorted(self.active, key=lambda k: min(self.rows[k].src, self.rows[k].dst)):
            row = self.rows[k]
            reads = [(row.weight, row.offset), (row.partner, row.partner_offset)]
            turns[k] = max([0, *(found.get(read, 0) for found, read in zip(seen, reads, strict=True) if read[0] >= 0)])
            added[k] = row.weight >= 0 and reads[0] in seen[0]
            for found, read in zip(seen, reads, strict=True):
                found[read] = turns[k] + 1
        return turns, added

    def _panels(self, k: int, size: tuple[int, int]) -> torch.Tensor:
        """[n, len(PANEL)] of one block; partial rows and slots are still their numbers: destinations, sources, edges in whole tiles."""
        row, (tall, wide), listed = self.rows[k], size, self.listed.get(k)
        if listed:
            row, (tall, wide) = row._replace(n_dst=len(listed.runs), n_src=TILE), (TILE, TILE)
        axes = (torch.arange(0, n, step, device=self.device) for n, step in ((row.copies, 1), (row.n_src, wide), (row.n_dst, tall)))
        copy, j0, i0 = (a.flatten() for a in torch.meshgrid(*axes, indexing="ij"))
        i1, j1 = (i0 + tall).clamp(max=row.n_dst), (j0 + wide).clamp(max=row.n_src)
        edges = ceil_div(i1 - i0, step(row)) * ceil_div(j1 - j0, TILE) * TILE
        destinations = listed.starts.diff()[i0 // TILE] if listed else i1 - i0
        sources = edges if listed else j1 - j0 if step(row) == 1 else torch.full_like(i0, TILE)
        return torch.stack([torch.full_like(i0, self.active.index(k)), copy, i0, i1, j0, j1, destinations, sources, edges], 1)

    def _all(self, panels: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([torch.zeros(0, len(PANEL), dtype=torch.int64, device=self.device), *panels])

    def reduce(self) -> Chunk:
        """All panels of a forward pass; a partial row for each destination of a panel."""
        return self._chunks.get("reduce", self._reduce)

    def _reduce(self) -> Chunk:
        panels = self._all([self._panels(k, forward_panel(self.rows[k])) for k in self.active])
        count = panels[:, 6].clone()
        panels[:, 6] = count.cumsum(0) - count
        panels[:, 7:] = 0
        keys, messages = self._keys(panels, count, "out", "out_stride", False)
        sums = self._sums(keys).in_two()
        return Chunk([panels.contiguous()] * bool(len(panels)), len(keys), 0, sums, [messages, *(s.of(messages) for s in sums[:-1])])

    def gradients(self, row_bytes: int, slot_bytes: int, block_bytes: int, node_bytes: int, budget: int) -> list[Chunk]:
        """The panels of a backward pass, network by network and from the first layer on: what a chunk needs takes up to about `budget` bytes. A
        partial row for each destination and each source of a panel.

        Args:
            row_bytes, slot_bytes, block_bytes, node_bytes: what a partial row, an edge, a block of threads and a node take.
        """
        key = (row_bytes, slot_bytes, block_bytes, node_bytes, budget)
        return self._chunks.get(key, lambda: self._chunked(*key))

    def _chunked(self, row_bytes: int, slot_bytes: int, block_bytes: int, node_bytes: int, budget: int) -> list[Chunk]:
        panels, turn, first, last, new, row, end = self._in_order()
        if not len(panels):
            return []
        size = (panels[:, 6] + panels[:, 7]) * row_bytes + panels[:, 8] * slot_bytes + block_bytes // WARPS + (new * node_bytes >> 16)
        ends = ((size.cumsum(0) - size) // budget).unique_consecutive(return_counts=True)[1].cumsum(0).tolist()
        # of nodes that this chunk or a later one reaches, the first, and of those that it or an earlier one does, the end
        begins, stops = first.flip(0).cummin(0)[0].flip(0), last.cummax(0)[0]
        chunks = []
        for a, b in zip([0, *ends], ends):
            nodes = int(begins[a]), int(stops[b - 1])
            rows = int(row[a:b].min()), int(end[a:b].max())
            chunks.append(self._parts.get((a, b, nodes), lambda a=a, b=b, nodes=nodes, rows=rows: self._backward(panels[a:b].clone(), turn[a:b], nodes, rows)))
        return chunks

    def _in_order(self) -> tuple[torch.Tensor, ...]:
        """Of all panels in the order of sums, that of their blocks' nodes: the panels, their turns, the ranges of nodes of their blocks, their shares
        of the destinations (in 2^-16 nodes), the ranges of output rows."""
        found = [self._panels(k, backward_panel(self.rows[k])) for k in self.active]
        panels, blocks = self._all(found), []
        for k, mine in zip(self.active, found, strict=True):
            r = self.rows[k]
            nodes = (min(r.src, r.dst), max(r.src + r.n_src, r.dst + r.n_dst))
            blocks.append([self.turns[k], *nodes, (r.n_dst << 16) * r.copies // max(1, len(mine)), r.out, r.out + r.n_dst, r.node_stride, r.out_stride])
        turn, first, last, new, row, end, stride, row_stride = torch.tensor(blocks, dtype=torch.int64, device=self.device).reshape(-1, 8)[panels[:, 0]].T
        node, place = panels[:, 1] * stride, panels[:, 1] * row_stride
        order = (first + node).argsort(stable=True)
        return tuple(t[order] for t in (panels, turn, first + node, last + node, new, row + place, end + place))

    def _backward(self, part: torch.Tensor, turn: torch.Tensor, nodes: tuple[int, int], rows: tuple[int, int]) -> Chunk:
        tall, wide, slots = part[:, 6].clone(), part[:, 7].clone(), part[:, 8].clone()
        part[:, 6] = (tall + wide).cumsum(0) - tall - wide
        part[:, 7] = part[:, 6] + tall
        part[:, 8] = slots.cumsum(0) - slots
        keys, (begin, end) = part.new_empty(int((tall + wide).sum())), nodes
        for first, count, of, shift, sources in ((part[:, 6], tall, "dst", begin, False), (part[:, 7], wide, "src", 2 * begin - end, True)):
            found = self._keys(part, count, of, "node_stride", sources)[0]
            keys[_runs(first, count)] = torch.where(found >= 0, found - shift, -1)
        launches = [part[turn == k].contiguous() for k in turn.unique().tolist()]
        return Chunk(launches, len(keys), int(slots.sum()), self._sums(keys).in_two(), [], nodes, rows)

    def _keys(self, panels: torch.Tensor, count: torch.Tensor, first: str, stride: str, sources: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Of `count` partial rows of each panel, of its destinations or `sources`: the nodes or output rows that they belong to (-1: none),
        and the messages of each."""
        starts = [[getattr(self.rows[k], first), getattr(self.rows[k], stride), 1 << log_rows(self.rows[k])] for k in self.active]
        start = torch.tensor(starts, dtype=torch.int64, device=self.device).reshape(-1, 3)[panels[:, 0]]
        owner, within = torch.arange(len(panels), device=self.device).repeat_interleave(count), _within(count)
        place = panels[owner, 2] + within
        if sources:  # of small rows, each tile has them all over again
            rows = start[owner, 2]
            place = panels[owner, 4] + torch.where(rows < TILE, within % rows, within)
            place[place >= panels[owner, 5]] = -1
        messages = (panels[:, 5] - panels[:, 4])[owner]
        for number, k in enumerate(self.active):
            if k not in self.listed:
                continue
            listed, mine = self.listed[k], (panels[owner, 0] == number).nonzero().flatten()
            panel = panels[owner[mine], 2] // TILE
            if sources:
                edge = panel * TILE**2 + within[mine]
                place[mine] = torch.where(edge < len(listed.edges), listed.edges[edge.clamp(max=len(listed.edges) - 1), 0] & 0xFFFFFFFF, -1)
            else:
                place[mine], messages[mine] = listed.found[listed.starts[panel] + within[mine]].T
        return torch.where(place >= 0, start[owner, 0] + panels[owner, 1] * start[owner, 1] + place, -1), messages

    @staticmethod
    def _sums(keys: torch.Tensor) -> Sums:
        if len(keys) >= 1 << 31:
            raise Unsupported(f"{len(keys)} partial rows, 2^31 or more")
        order = keys.argsort(stable=True)
        order = order[keys[order] >= 0]
        found, count = keys[order].unique_consecutive(return_counts=True)
        return Sums(found, torch.cat([count.new_zeros(1), count.cumsum(0)]), order.int())


def _within(count: torch.Tensor) -> torch.Tensor:
    total = torch.arange(int(count.sum()), device=count.device)
    return total - (count.cumsum(0) - count).repeat_interleave(count)


def _runs(first: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """first[k] .. first[k] + count[k] - 1, one run after the other."""
    return first.repeat_interleave(count) + _within(count)


_of_topology = OfTopology(Plan)


def plan_of(topology: torch.Tensor, device: torch.device) -> Plan:
    """The plan of a graph's topology table. Without a device ("meta") its tables are made on the CPU: their sizes depend on their values."""
    return _of_topology(topology, torch.device("cpu") if device.type == "meta" else device)

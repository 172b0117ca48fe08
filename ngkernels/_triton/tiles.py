"""A launch's table of blocks, on the host and in Triton: which edges a program works on, and where their tensors lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..topology import SAME, SPARSE_RAW, TOKEN
from .blocks import Group, Row
from .plan import Cut

# Columns of the table, one int64 row for each block of a launch: of the pairs, then of the edges, then of their partners.
(DIAGONAL, TRIANGLE, DIAGONAL_RAW, INSIDE, SAME_NUMBER, N_SRC, N_DST, SRC, DST, NODE_STRIDE, OUT, PARTNER_OUT, OUT_STRIDE, PANEL_I, PANEL_J,
 HAS_STATE, LINES, ENTRIES) = (tl.constexpr(k) for k in range(18))  # fmt: skip
SIDE = tl.constexpr(18)  # where the edges' columns begin,
SIDES = tl.constexpr(26)  # and how many they are
VARIANT, WEIGHT, HAS_RAW, WANTS_RAW, HAS_VALUES, WANTS_CARRIER = (tl.constexpr(k) for k in range(6))
RAW, GRAD_RAW, VALUES, CARRIERS = (tl.constexpr(k) for k in (6, 11, 16, 21))  # views: start, then strides of copy, source, destination, channel
ROW = tl.constexpr(SIDE.value + 2 * SIDES.value)
NO_VIEW = (0, 0, 0, 0, 0)


# ---- on the host ----
class End(NamedTuple):
    """The edges of a row or their partners, as readers of a weight tensor and owners of values."""

    partner: bool
    weight: int
    variant: int
    axis: int
    offset: int
    block: int
    emit_offset: int

    @classmethod
    def of(cls, r: Row, partner: bool) -> End:
        if partner:
            return cls(True, r.partner, r.partner_variant, r.partner_axis, r.partner_offset, r.partner_block, r.partner_emit_offset)
        return cls(False, r.weight, r.variant, r.src_axis, r.offset, r.block, r.emit_offset)


def view_of(t: torch.Tensor, row: Row, end: End, own: bool) -> tuple[int, ...]:
    """Start and strides (copy, source, destination, channel), in elements, of an edge tensor as edges or partners see it, by their own
    source and destination. own: in the block's order, else in that of the weights, which a reversed block reads against its direction.
    Of a sparse block sources count as numbers: its edges', and its partners' as destinations (the other way about for partners)."""
    diagonal = row.diagonal or row.sparse or (not own and bool(row.flags & SPARSE_RAW))
    n_dst, n_src = (row.n_src, row.n_dst) if end.partner else (row.n_dst, row.n_src)
    flip = not own and end.axis == 2
    offset = end.emit_offset if own else end.offset
    if offset >= 0:  # packed: rows of one tensor [E, C]
        e = t.stride(0)
        start, copy, channel = offset * e, (row.emit_stride if own else row.edge_stride) * e, t.stride(1)
        source, destination = (e, 0) if diagonal else (e, n_src * e) if flip else (n_dst * e, e)
    elif diagonal:
        start, copy, source, destination, channel = 0, t.stride(0), t.stride(1), 0, t.stride(2)
    else:
        start, copy, source, destination, channel = 0, t.stride(0), t.stride(2 if flip else 1), t.stride(1 if flip else 2), t.stride(3)
    if row.sparse and not own and flip != end.partner:  # by the number of the other end
        source, destination = destination, source
    return start, copy, source, destination, channel


class Tensors:
    """Edge tensors of a call, as launches name them: found by block, None where there is none.

    Args:
        others: as grad_weights, where partners add to weights that other blocks' edges have (blocks.Row.adds_to_partner).
    """

    def __init__(self, rows: Sequence[Row], packed: bool, directions: int, weights, grad_weights=(), others=(), values=(), grad_carriers=()):
        self.rows, self.packed, self.directions = rows, packed, directions
        self.lists = {"raw": weights, "grad_raw": grad_weights, "values": values, "carriers": grad_carriers}
        self.others = others

    def of(self, name: str, k: int, partner: bool = False) -> torch.Tensor | None:
        """The tensor of block k among the weights ("raw"), their gradients, the values or the gradients of carriers."""
        row, end = self.rows[k], End.of(self.rows[k], partner)
        tensors = self.others if name == "grad_raw" and partner and row.adds_to_partner else self.lists[name]
        number = end.weight if name in ("raw", "grad_raw") else end.block
        if not len(tensors) or number < 0:
            return None
        t = tensors[0 if self.packed else number]
        return t if t is not None and t.numel() else None

    def pointers(self, group: Group, name: str, missing: torch.Tensor, partner: bool = False) -> tuple[torch.Tensor, ...]:
        """The tensors of a group's blocks; their number is a power of two, so that few kernels are compiled."""
        found = [self._packed(group, name, partner)] if self.packed else [self.of(name, k, partner) for k in group.rows]
        some = next((t for t in found if t is not None), missing)
        found = [some if t is None else t for t in found]
        return tuple(found + [found[-1]] * ((1 << (len(found) - 1).bit_length()) - len(found)))

    def _packed(self, group: Group, name: str, partner: bool) -> torch.Tensor | None:
        """The one tensor of all blocks."""
        tensors = self.others if name == "grad_raw" and partner and group.adds_to_partner else self.lists[name]
        return tensors[0] if len(tensors) and tensors[0] is not None and tensors[0].numel() else None

    def table(self, cut: Cut, number: int) -> torch.Tensor:
        """The table of a group's blocks, int64 [blocks, ROW]; kept for the next call with tensors of the same strides."""
        group, sides = cut.groups[number], [(name, partner) for name in self.lists for partner in (False, True)]
        used = [self._packed(group, *side) for side in sides] if self.packed else [self.of(side[0], k, side[1]) for k in group.rows for side in sides]
        key = (number, self.directions, tuple(None if t is None else t.stride() for t in used))
        return cut.row_tables.get(key, lambda: self._records(cut, group))

    def _records(self, cut: Cut, group: Group) -> torch.Tensor:
        records = [self._record(cut, k, panel) for k, panel in zip(group.rows, group.panels, strict=True)]
        return torch.tensor(records, dtype=torch.int64).to(cut.plan.device)

    def _record(self, cut: Cut, k: int, panel: tuple[int, int]) -> list[int]:
        r, lines, start = self.rows[k], cut.plan.lines.get(k), cut.plan.line_starts.get(k, 0)
        n_src, n_dst = (r.n_src, r.n_dst) if lines is None else (lines.width, len(lines.dst))
        flags = [r.diagonal, r.triangle, bool(r.flags & SPARSE_RAW), r.inside, bool(r.flags & SAME)]
        record = [*map(int, flags), n_src, n_dst, r.src, r.dst, r.node_stride, r.out, r.partner_out, r.out_stride, *panel, int(not r.flags & TOKEN)]
        record += [start, start + (0 if lines is None else 3 * n_dst)]
        return record + [v for partner in (False, True) for v in self._side(k, End.of(r, partner))]

    def _side(self, k: int, end: End) -> list[int]:
        r, found = self.rows[k], {name: self.of(name, k, end.partner) for name in self.lists}
        side = [end.variant if self.directions > 1 else 0, max(end.weight, 0), *(int(t is not None) for t in found.values())]
        for name, t in found.items():
            side += NO_VIEW if t is None else view_of(t, r, end, own=name in ("values", "carriers"))
        return side


# ---- in Triton ----
# Of a tile of edges, or of their partners: places of destinations and sources behind the first ones' nodes; which pairs exist, which have raw
# features, which are of a neuron with itself; places in edge tensors (a sparse block: numbers); the first destination's and source's node, and their
# node terms; all parameters; the encoder's direction, the number of the weight tensor, and 0 for the pairs of tokens (states 0 before the first update).
LOCAL_I, LOCAL_J, OK, THERE, ITSELF, I, J, NODE_I, NODE_J, NODES_I, NODES_J, PARAMS, DIRECTION, NUMBER, STATE = (tl.constexpr(k) for k in range(15))


@triton.jit
def pick(pointers, which, N: tl.constexpr):
    """pointers[which] of N pointers of one type."""
    address = pointers[0].to(tl.int64)
    for k in tl.static_range(1, N):
        address = tl.where(which == k, pointers[k].to(tl.int64), address)
    return address.to(pointers[0].dtype)


@triton.jit
def view(pointers, row, local, copy, OF: tl.constexpr, PARTNER: tl.constexpr, N: tl.constexpr):
    """(pointer to copy `copy` of a block's edge tensor, strides of source, destination, channel)."""
    field = row + SIDE + PARTNER * SIDES + OF
    return pick(pointers, local, N) + (tl.load(field) + copy * tl.load(field + 1)), tl.load(field + 2), tl.load(field + 3), tl.load(field + 4)


@triton.jit
def views(pointers, pair_pointers, row, local, copy, OF: tl.constexpr, N: tl.constexpr):
    """The views of a block's edges and of their partners."""
    return view(pointers, row, local, copy, OF, False, N), view(pair_pointers, row, local, copy, OF, True, N)


@triton.jit
def flag(row, OF: tl.constexpr, PARTNER: tl.constexpr):
    return tl.load(row + SIDE + PARTNER * SIDES + OF)


@triton.jit
def only(mask, number):
    """mask where a number, the same for all, is not 0."""
    return mask & (tl.zeros(mask.shape, tl.int64) + number != 0)


@triton.jit
def panel(tiles, number, blocks):
    """Of the panel with that number: (row of the block, its number in the launch, copy, first destination and source, ends of both, first partial
    row, first slot)."""
    tile = tiles + number * 6
    local, copy, i0, j0 = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    row = blocks + local * ROW
    i1 = tl.minimum(tl.load(row + N_DST), i0 + tl.load(row + PANEL_I))
    j1 = tl.minimum(tl.load(row + N_SRC), j0 + tl.load(row + PANEL_J))
    return row, local, copy, i0, j0, i1, j1, tl.load(tile + 4), tl.load(tile + 5)


@triton.jit
def sources(row, i, j0, i1, j1, BI: tl.constexpr, BJ: tl.constexpr):
    """(first, last) source that the destinations from i on of a tile are joined to; of a diagonal block: whole tiles that meet the diagonal;
    of a triangle: those on or above it."""
    diagonal = tl.load(row + DIAGONAL) != 0
    first = tl.where(tl.load(row + TRIANGLE) != 0, tl.maximum(j0, i // BJ * BJ), j0)
    return tl.where(diagonal, i // BJ * BJ, first), tl.where(diagonal, tl.minimum(i + BI, i1), j1)


@triton.jit
def destinations(row, lists, i, i1, BI: tl.constexpr, SPARSE: tl.constexpr):
    """Destinations [BI] within their layer of a tile from i on."""
    here = i + tl.arange(0, BI)
    if SPARSE:
        return tl.load(lists + tl.load(row + LINES) + 3 * here, mask=here < i1, other=0)
    else:
        return here


@triton.jit
def edges(row, copy, i0, j0, i1, j1, lists, nodes, n_nodes, params, COLUMNS: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, SPARSE: tl.constexpr):
    """The tile of BI destinations from i0 and BJ sources from j0 on, destination by destination; sparse: of BI lines."""
    r = tl.arange(0, BI * BJ)
    first = copy * tl.load(row + NODE_STRIDE)
    dst, src = tl.load(row + DST) + first, tl.load(row + SRC) + first
    if SPARSE:
        live = i0 + r // BJ < i1
        line = lists + tl.load(row + LINES) + 3 * (i0 + r // BJ)
        ok = live & (r % BJ < tl.load(line + 2, mask=live, other=0))
        entry = lists + tl.load(row + ENTRIES) + 3 * (tl.load(line + 1, mask=live, other=0) + r % BJ)
        local_i, local_j = tl.load(line, mask=live, other=0), tl.load(entry, mask=ok, other=0)
        i, j = tl.load(entry + 2, mask=ok, other=0), tl.load(entry + 1, mask=ok, other=0)
        itself = local_i == local_j
        there = ok
    else:
        local_i, local_j = r // BJ, r % BJ
        i, j = i0 + local_i, j0 + local_j
        dst, src = dst + i0, src + j0
        ok = (i < i1) & (j < j1) & (tl.load(row + DIAGONAL) * (i - j) == 0) & (tl.load(row + TRIANGLE) * (i - j) <= 0)
        itself = i == j
        there = ok & (tl.load(row + DIAGONAL_RAW) * (i - j) == 0)
    itself, there = only(itself, tl.load(row + INSIDE)), only(there, flag(row, HAS_RAW, False))
    return (local_i, local_j, ok, there, itself, i, j, dst, src, nodes + dst * COLUMNS, nodes + (n_nodes + src) * COLUMNS, params,
            flag(row, VARIANT, False), flag(row, WEIGHT, False), tl.load(row + HAS_STATE))  # fmt: skip


@triton.jit
def partners(at, row, nodes, n_nodes, COLUMNS: tl.constexpr, SPARSE: tl.constexpr):
    """The tile of the partners of a tile's edges, in the same order."""
    there = at[OK]
    if not SPARSE:
        there = there & (tl.load(row + DIAGONAL_RAW) * (at[I] - at[J]) == 0)
    there = only(there, flag(row, HAS_RAW, True))
    nodes_i, nodes_j = nodes + at[NODE_J] * COLUMNS, nodes + (n_nodes + at[NODE_I]) * COLUMNS
    return (at[LOCAL_J], at[LOCAL_I], at[OK], there, at[ITSELF], at[J], at[I], at[NODE_J], at[NODE_I], nodes_i, nodes_j, at[PARAMS],
            flag(row, VARIANT, True), flag(row, WEIGHT, True), at[STATE])  # fmt: skip

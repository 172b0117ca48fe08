"""The edges of a topology table, one by one: indices and raw features."""

from __future__ import annotations

import torch

from ..edge_index import read_lists
from ..topology import COLUMNS, DIAGONAL, FORWARD, KINDS, PARTNER, SPARSE, SPARSE_RAW, TOKEN, TRIANGLE, lists_of, rows_of

_PARTNER = {"partner": "weight", "partner_variant": "variant", "partner_axis": "src_axis", "partner_offset": "offset"}


class EdgeList:
    """Indices and raw features of all edges of a table's rows, [E] and [E, C], row by row, copy by copy; dense blocks source by source.

    `paired`: the edges' partners follow, in the same order: [2 E].
    """

    def __init__(self, weights: list[torch.Tensor], topology: torch.Tensor, like: torch.Tensor, channels: int, paired: bool = False):
        self.rows, self.topology, self.weights, self.channels, self.like = [dict(zip(COLUMNS, row, strict=True)) for row in rows_of(topology).tolist()], topology, weights, channels, like
        self.paired, self.n_weights = paired, len(weights)
        self.sizes: list[int] = []
        pieces: dict[str, list[torch.Tensor]] = {"src": [], "dst": [], "out": [], "partner_out": [], "used": [], "partner_used": []}
        reads: list[list[tuple]] = [[], []]  # raw features, variant, weight number, token, there: of the edges, of the partners
        for row in self.rows:
            i, j, *numbers = self._pairs(row)
            copy = torch.arange(row["copies"], device=like.device)[:, None]
            node = copy * row["node_stride"]
            pieces["src"].append((row["src"] + node + j).flatten())
            pieces["dst"].append((row["dst"] + node + i).flatten())
            pieces["out"].append((row["out"] + copy * row["out_stride"] + i).flatten())
            pieces["partner_out"].append((row["partner_out"] + copy * row["out_stride"] + j).flatten())
            own = KINDS[row["kind"]] in (TRIANGLE, SPARSE) and row["src"] == row["dst"]  # a neuron's pair with itself is its own partner, and counts once
            pieces["used"].append(torch.full((copy.shape[0], len(i)), bool(row["flags"] & FORWARD), device=like.device).flatten())
            pieces["partner_used"].append((copy.new_tensor(bool(row["flags"] & PARTNER)) & ((i != j) | (not own)) & (copy >= 0)).bool().flatten())
            reads[0].append(self._read(row, i, j, numbers))
            if paired:
                swapped = {"n_src": row["n_dst"], "n_dst": row["n_src"], **{to: row[name] for name, to in _PARTNER.items()}}
                reads[1].append(self._read({**row, **swapped}, j, i, numbers))
            self.sizes.append(len(i) * row["copies"])
        empty = torch.zeros(0, dtype=torch.int64, device=like.device)
        src, dst, self.out, self.partner_out = (torch.cat([empty, *pieces[k]]) for k in ("src", "dst", "out", "partner_out"))
        self.used, self.partner_used = (torch.cat([empty.bool(), *pieces[k]]) for k in ("used", "partner_used"))
        self.src, self.dst = (torch.cat([src, dst]), torch.cat([dst, src])) if paired else (src, dst)
        flat = [r for side in reads for r in side]
        self.raw = torch.cat([like.new_zeros(0, channels).to(flat[0][0].dtype if flat else like.dtype), *[r[0] for r in flat]])
        self.variant, self.weight, self.token = (torch.cat([empty, *[r[k] for r in flat]]) for k in (1, 2, 3))
        self.there = torch.cat([empty.bool(), *[r[4] for r in flat]])

    def _pairs(self, row) -> tuple[torch.Tensor, ...]:
        """Local destination i and source j of one copy's edges; sparse: also their numbers and their partners'."""
        n_src, n_dst, kind = row["n_src"], row["n_dst"], KINDS[row["kind"]]
        device = self.like.device
        if kind == SPARSE:
            return tuple(t.to(device) for t in read_lists(lists_of(self.topology, row["lists"]), row["count"]))
        if kind == DIAGONAL:
            return torch.arange(n_src, device=device), torch.arange(n_src, device=device)
        if kind == TRIANGLE:
            return torch.triu_indices(n_dst, n_src, device=device).unbind()
        return torch.arange(n_dst, device=device).repeat(n_src), torch.arange(n_src, device=device).repeat_interleave(n_dst)

    def _read(self, row, i: torch.Tensor, j: torch.Tensor, numbers: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Raw features [copies n, C], variant, weight number and token flag of the edges (j -> i) that `row` describes."""
        copies, n = row["copies"], len(i)
        constant = [torch.full((copies * n,), v, device=self.like.device) for v in (row["variant"], row["weight"], row["flags"] & TOKEN)]
        if row["weight"] < 0:
            return (self.like.new_zeros(copies * n, self.channels), *constant, constant[0] < -1)
        w = self.weights[row["weight"]]
        copy = torch.arange(copies, device=self.like.device)[:, None]
        diagonal = KINDS[row["kind"]] == DIAGONAL or bool(row["flags"] & SPARSE_RAW)
        there = (i == j) if row["flags"] & SPARSE_RAW else torch.ones_like(i, dtype=torch.bool)
        d0, d1 = (j, i) if row["src_axis"] == 1 else (i, j)
        if numbers:
            d0, diagonal = numbers[row["src_axis"] - 1], True
        if row["offset"] >= 0:  # packed: one tensor [E, C]
            width = row["n_src"] if row["src_axis"] == 2 else row["n_dst"]
            at = row["offset"] + copy * row["edge_stride"] + (torch.where(there, d0, 0) if diagonal else d0 * width + d1)
            raw = w[at.flatten()]
        elif diagonal:
            raw = w[copy, torch.where(there, d0, 0)].flatten(0, 1)
        else:
            raw = w[copy, d0, d1].flatten(0, 1)
        there = there.repeat(copies)
        return (torch.where(there[:, None], raw, 0.0), *constant, there)

    def block_index(self, k: int, side: str) -> tuple[torch.Tensor, ...]:
        """Where row k's edges (side "block") or their partners ("partner_block") stand in their block's values:
        (copy, j, i), (copy, n), or packed one index."""
        row = self.rows[k]
        i, j, *numbers = self._pairs(row)
        copy = torch.arange(row["copies"], device=i.device)[:, None]
        d0, d1, width = (j, i, row["n_dst"]) if side == "block" else (i, j, row["n_src"])
        if numbers:
            d0 = numbers[0 if side == "block" else 1]
        diagonal = KINDS[row["kind"]] in (DIAGONAL, SPARSE)
        offset = row["emit_offset" if side == "block" else "partner_emit_offset"]
        if offset >= 0:
            return (offset + copy * row["emit_stride"] + (d0 if diagonal else d0 * width + d1),)
        return (copy, d0) if diagonal else (copy, d0, d1)

    def block_values(self, tensors: list[torch.Tensor], k: int, side: str, like: torch.Tensor) -> torch.Tensor:
        """The values of row k's edges or partners in tensors by block; zeros where they have no block."""
        block = self.rows[k][side]
        if block < 0:
            return like.new_zeros(self.sizes[k], like.shape[1])
        index = self.block_index(k, side)
        return tensors[0 if len(index) == 1 else block][index].flatten(0, 1)

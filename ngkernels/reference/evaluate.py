"""The edge expression, instruction by instruction, over all edges at once; and the two ops on top of it."""

from __future__ import annotations

import math
import struct

import torch
import torch.nn.functional as F

from .. import program as prog
from ..checks import ACTIVATIONS
from ..topology import FORWARD, PARTNER
from .edge_list import EdgeList
from .fold import fold

STD_THRESHOLD = 1e-5  # a variance up to here counts as 0, with gradient 0 (as PyG's StdAggregation)
_ACT = {
    "silu": F.silu, "relu": torch.relu, "gelu": F.gelu, "tanh": torch.tanh, "sigmoid": torch.sigmoid,
    "leaky_relu": F.leaky_relu, "identity": lambda x: x,
}  # fmt: skip


class Evaluator:
    """Runs the instructions of an expression on an EdgeList; registers are [E, n]."""

    def __init__(self, edges: EdgeList, xs, params, table, carriers, program, compute: int):
        self.edges, self.xs, self.params, self.table, self.carriers = edges, xs, params, table, carriers
        self.low = torch.bfloat16 if compute == 1 else None
        n, self.start = program[1], program[5]
        body = program[prog.HEADER :]
        self.instructions = [body[k * prog.RECORD : (k + 1) * prog.RECORD] for k in range(n)]
        self.directions = program[0]

    def matrix(self, offset: int, *shape: int) -> torch.Tensor:
        return self.params[offset : offset + math.prod(shape)].reshape(shape)

    def matmul(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        if self.low is not None:
            return (x.to(self.low) @ w.to(self.low).T).to(x.dtype)
        return x @ w.T

    def by_variant(self, f) -> torch.Tensor:
        """f(variant, edge indices) over the directions, put back in edge order."""
        if self.directions == 1:
            return f(0, slice(None))
        parts = [(torch.nonzero(self.edges.variant == v).flatten(), v) for v in range(self.directions)]
        order = torch.cat([i for i, _ in parts]).argsort()
        return torch.cat([f(v, i) for i, v in parts])[order]

    def node_term(self, rec) -> torch.Tensor | float:
        _, _, n_out, _, bias, x, wd, ws = rec[:8]
        out = self.matrix(bias, n_out) if bias >= 0 else 0.0
        if x >= 0:
            x = self.xs[x]
            dst, src = x @ self.matrix(wd, n_out, x.shape[1]).T, x @ self.matrix(ws, n_out, x.shape[1]).T
            out = out + dst[self.edges.dst] + src[self.edges.src]
        return out

    def fourier(self, w: torch.Tensor, offset: int, m: int) -> torch.Tensor:
        def one(v, i):
            arg = 2 * math.pi * (w[i] @ self.matrix(offset + v * m * w.shape[1], m, w.shape[1]).T)
            return torch.cat([arg.cos(), arg.sin()], 1)

        return self.by_variant(one)

    def tabulated(self, w: torch.Tensor, rec) -> torch.Tensor:
        """Quintic Hermite interpolation of (value, slope, curvature); direct evaluation beyond the grid."""
        _, m, n_out, weight = rec[:4]
        nodes = self.table.shape[1]
        at = w[:, 0] * 2.0 ** rec[8]
        k = at.detach().floor()
        inside = (k >= -(nodes // 2)) & (k < nodes // 2)
        u = torch.where(inside, at - k, 0.0)[:, None]
        row = (torch.where(inside, k, 0.0) + nodes // 2).long()
        flat = self.table.flatten(0, 1)
        row = row + self.edges.variant * nodes if self.directions > 1 else row
        p, q = flat[row], flat[row + 1]
        v = 1 - u
        curve = v**3 * ((1 + 3 * u + 6 * u**2) * p[:, 0] + u * (1 + 3 * u) * p[:, 1] + 0.5 * u**2 * p[:, 2])
        curve = curve + u**3 * ((1 + 3 * v + 6 * v**2) * q[:, 0] - v * (1 + 3 * v) * q[:, 1] + 0.5 * v**2 * q[:, 2])
        if inside.all():
            return curve
        if weight < 0:  # the caller promised that there are none beyond
            return torch.where(inside[:, None], curve, math.nan)
        direct = self.fourier(w, rec[9], m) @ self.matrix(weight, n_out, 2 * m).T
        return torch.where(inside[:, None], curve, direct)

    def load(self, rec) -> torch.Tensor:
        raw = self.edges.raw.to(self.table.dtype)
        if rec[8] >= 0 and self.edges.n_weights:  # else every pair is none of the edges
            scale, shift = self.matrix(rec[8], self.edges.n_weights, 2)[self.edges.weight].T
            raw = torch.where(self.edges.there[:, None], raw * scale[:, None] + shift[:, None], raw)  # pairs that are no edges stay 0
        return raw

    def run(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(edge register, message register or None)."""
        results, edge = [], None
        for k, rec in enumerate(self.instructions):
            if k == self.start:
                edge = results[-1]
            results.append(self.one(rec, results))
        return (results[-1], None) if edge is None else (edge, results[-1])

    def one(self, rec, results) -> torch.Tensor:
        op, n_in, n_out, weight = rec[:4]
        last = results[-1] if results else None
        if op == prog.LOAD:
            return self.load(rec)
        if op == prog.FOURIER:
            return self.fourier(last, weight, n_out // 2)
        if op == prog.TABLE:
            return self.tabulated(last, rec) + self.node_term(rec)
        if op == prog.ACT:
            return _ACT[ACTIVATIONS[rec[8]]](last)
        if op == prog.ADD:
            return last + results[rec[8]]
        if op == prog.MARK:
            return last.detach() + self.carried(last)
        if op == prog.NORM:
            eps = struct.unpack("<d", struct.pack("<q", rec[8]))[0]
            return F.layer_norm(last, (n_out,), self.matrix(weight, n_out), self.matrix(rec[4], n_out), eps)
        if op == prog.MASK:
            return torch.where((self.edges.token == 0)[:, None], last, 0.0)
        if n_in == 0:
            out = self.node_term(rec)
            return out if out.dim() == 2 else out.expand(len(self.edges.src), n_out)
        if rec[9] >= 0:  # a pair update: the partners' registers as well
            there, back = last.chunk(2)
            reverse = self.matmul(torch.cat([back, there]), self.matrix(rec[9], n_out, n_in))
            return self.matmul(last, self.matrix(weight, n_out, n_in)) + reverse + self.node_term(rec)
        if rec[8]:
            return self.by_variant(lambda v, i: self.matmul(last[i], self.matrix(weight + v * rec[8], n_out, n_in))) + self.node_term(rec)
        return self.matmul(last, self.matrix(weight, n_out, n_in)) + self.node_term(rec)

    def carried(self, last: torch.Tensor) -> torch.Tensor:
        """The carriers' zeros for every edge, and for its partner where that has a block of its own."""
        pieces = [last.new_zeros(0, last.shape[1])]
        for side in ("block", "partner_block")[: 1 + self.edges.paired]:
            pieces += [self.edges.block_values(self.carriers, k, side, last) for k in range(len(self.edges.rows))]
        return torch.cat(pieces)


def emit(weights, xs, params, table, carriers, topology, program, compute, shapes) -> list[torch.Tensor]:
    """e_ij (or a small MLP of it) for every edge: one tensor for each block (copies, n_src, n_dst, n); packed: one [E, n]."""
    edges, value, _ = run_program(weights, xs, params, table, carriers, topology, program, compute)
    out = [value.new_zeros(s) for s in shapes]
    sides = ("block", "partner_block")[: 1 + edges.paired]
    for side, values in zip(sides, value.chunk(len(sides)), strict=True):
        for k, piece in enumerate(values.split(edges.sizes)):
            row = edges.rows[k]
            if not row["flags"] & (FORWARD if side == "block" else PARTNER) or row[side] < 0:
                continue
            index = edges.block_index(k, side)
            at = 0 if len(index) == 1 else row[side]
            out[at] = out[at].index_put(index, piece.reshape(row["copies"], -1, value.shape[1]))
    return out


def run_program(weights, xs, params, table, carriers, topology, program, compute) -> tuple[EdgeList, torch.Tensor, torch.Tensor | None]:
    """(edges, edge register, message register or None); with partners where the program has a pair update."""
    edges = EdgeList(weights, topology, table, program[prog.HEADER + 2], bool(program[10]))
    with prog.full_precision(table.device):
        packed = fold(params, prog.recipe_of(program), table)
        return edges, *Evaluator(edges, xs, packed, table, carriers, program, compute).run()


def messages(weights, xs, params, table, carriers, topology, program, compute) -> tuple[torch.Tensor, EdgeList]:
    """Messages [E, F] and their edges."""
    edges, e, q = run_program(weights, xs, params, table, carriers, topology, program, compute)
    if edges.paired:
        e, q = e.chunk(2)[0], None if q is None else q.chunk(2)[0]
    combine, width = program[2], program[3]
    if combine == prog.PLAIN:
        return e, edges
    if combine == prog.GATE:
        return torch.sigmoid(e) * q, edges
    if combine == prog.PRODUCT:
        return e * q, edges
    return e[:, :width] * q + e[:, width:], edges


def reduce_messages(m: torch.Tensor, out: torch.Tensor, rows: int, mask: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The reductions in `mask`, in the order of program.REDUCE, of messages m [E, F] by their rows out [E].

    Returns:
        results [rows, K, F]; the mean where var or std need it and it is not among them [rows, 0 or 1, F]; the
        number of tied minima and maxima [rows, 0..2, F]. Empty rows are 0.

    Note: gradients of min and max are shared evenly among ties. var is biased, centred.
    """
    ones = torch.ones_like(out, dtype=m.dtype)
    count = torch.zeros(rows, dtype=m.dtype, device=m.device).index_add(0, out, ones).clamp(min=1)[:, None]
    total = m.new_zeros(rows, m.shape[1]).index_add(0, out, m)
    names = prog.reductions(mask)
    results, ties = {"sum": total, "mean": total / count}, []
    for name in ("min", "max"):
        if name in names:
            results[name], tied = _extreme(m, out, rows, name)
            ties.append(tied)
    if "var" in names or "std" in names:
        centred = m - results["mean"][out]
        var = m.new_zeros(rows, m.shape[1]).index_add(0, out, centred * centred) / count
        results["var"] = var
        live = ~(var <= STD_THRESHOLD)  # a NaN stays one
        results["std"] = torch.where(live, torch.where(live, var, 1.0).sqrt(), 0.0)
    none = m.new_zeros(rows, 0, m.shape[1])
    aux = results["mean"][:, None] if prog.aux_slots(mask)[0] else none
    return torch.stack([results[n] for n in names], 1), aux, torch.stack(ties, 1) if ties else none


def _extreme(m: torch.Tensor, out: torch.Tensor, rows: int, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """min or max by row and how many messages reach it; the value of the extreme, the gradient of equal shares."""
    with torch.no_grad():
        index = out[:, None].expand_as(m)
        best = m.new_zeros(rows, m.shape[1]).scatter_reduce(0, index, m, "a" + name, include_self=False)
        tied = (m == best[out]).to(m.dtype)
        ties = m.new_zeros(rows, m.shape[1]).index_add(0, out, tied)
        share = tied / ties.clamp(min=1)[out]
    shared = m.new_zeros(rows, m.shape[1]).index_add(0, out, m * share)
    return best + (shared - shared.detach()), ties


def aggregate(weights, xs, params, table, carriers, topology, program, rows, compute) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See reduce_messages."""
    m, edges = messages(weights, xs, params, table, carriers, topology, program, compute)
    return reduce_messages(m, edges.out, rows, program[4])

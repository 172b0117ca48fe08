"""The backward pass of all ops in CUDA C++."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from .. import program as prog
from ..topology import DENSE, DIAGONAL, KINDS, SPARSE_RAW
from ..window import sliding
from . import launch
from .call import Call
from .launch import Some, simple
from .memory import sides, sum_columns
from .plan import WARPS, Chunk


class OfChunks(Protocol):
    """What an op's kernel reads beside the node terms, for a chunk at a time."""

    node_bytes: int  # about

    def of(self, chunk: Chunk) -> dict[str, Some]: ...


class Backward:
    """One backward pass: writes the wanted gradients of the call, and of attend's q, k and v, `attended`; empty where not wanted.

    Node terms, and the sums of their gradients, are there for the nodes of one chunk at a time: chunks go through the networks in the order of
    their nodes. Nothing depends on where they end but the parameters' own sums.
    """

    def __init__(self, call: Call, attended: Sequence[torch.Tensor] = ()):
        self.call, self.attended = call, attended
        self.marked = any(s.mark for s in call.low.stages)  # gradients stop at a virtual checkpoint: none reach the weights
        self.params, self.table = call.grad_params.numel() > 0, call.grad_table.numel() > 0 and call.low.steps >= 0 and not self.marked
        self.nodes, self.raw = any(g.numel() for g in call.grad_xs), any(g.numel() for g in call.grad_weights) and not self.marked
        self.carriers = any(g.numel() for g in call.grad_carriers)
        self.terms = call.low.columns > 0 and (self.nodes or self.params)
        self.columns = sum_columns(call.low) if self.terms or call.low.attention else 0
        self.curve = call.table.shape[3] if self.table else 0
        self.block_size = call.low.n_gradients * call.low.d**2 + call.low.n_sums * 16 if self.params else 0

    @property
    def wanted(self) -> bool:
        return self.params or self.table or self.nodes or self.raw or self.carriers or any(t.numel() for t in self.attended)

    def clear(self) -> None:
        """Gradients that add up, or that no panel covers, start at zero."""
        call = self.call
        for t in (*call.grad_xs, call.grad_params, call.grad_table, *self.attended):
            t.zero_()
        covered: dict[tuple[bool, int], int] = {}
        for k in call.work.active:
            r = call.plan.rows[k]
            edges = r.copies * {DENSE: r.n_src * r.n_dst, DIAGONAL: r.n_src}.get(KINDS[r.kind], 0)  # of a sparse block for certain: none
            own, raw = (True, 0 if r.emit_offset >= 0 else r.block), edges * (not r.flags & SPARSE_RAW)
            covered[own] = covered.get(own, 0) + edges * self.marked
            covered[False, r.weight] = covered.get((False, r.weight), 0) + raw * (not call.work.added[k] and not self.marked)
        for carrier, tensors in ((False, call.grad_weights), (True, call.grad_carriers)):
            for k, g in enumerate(tensors):
                if g.numel() and covered.get((carrier, k), 0) * g.shape[-1] != g.numel():
                    g.zero_()

    def run(self, read: OfChunks | None = None, **fields: int | torch.Tensor | None) -> None:
        """fields: arguments of the kernel that do not change from chunk to chunk."""
        call = self.call
        of_node = 8 * (call.low.columns + 2 * self.columns) + (0 if read is None else read.node_bytes)  # sums: and a copy of those that are done
        sizes = (4 * self.columns, (4 * self.curve + 8) * sides(call.low) if self.table else 0, 4 * self.block_size, of_node)
        chunks = call.work.gradients(*sizes, launch.BUDGET)
        fields = call.fields() | fields
        fields |= {f"need_{name}": int(value) for name, value in (("parameters", self.params), ("nodes", self.nodes), ("raw", self.raw), ("table", self.table))}
        for chunk, sums, done in sliding(chunks, self.columns, call.params):
            self.add_chunk(fields | call.project(*chunk.nodes) | ({} if read is None else read.of(chunk)), chunk, sums)
            if done:
                self.finish_nodes(sums[:, :done], chunk.nodes[0])
        call.add_others()

    def add_chunk(self, fields: dict, chunk: Chunk, sums: torch.Tensor) -> None:
        """The launches of a chunk; their partial results are added to the sums of its nodes, the parameters and the table."""
        call = self.call
        blocks = [-(-len(panels) // WARPS) for panels in chunk.launches]
        every = not (self.marked or call.low.live or call.low.attention)  # whether every number is written
        partial = (call.params.new_empty if every else call.params.new_zeros)(chunk.partials, self.columns)
        parameters = call.params.new_empty(sum(blocks), self.block_size)
        found = {"partial": partial}
        if self.table:
            slots = chunk.slots * sides(call.low)
            found |= {"cells": call.params.new_empty(slots, dtype=torch.int32), "places": call.params.new_empty(slots)}
            found |= {"curves": call.params.new_empty(slots, self.curve)}
        for panels, of_launch in zip(chunk.launches, parameters.split(blocks), strict=True):
            call.run(fields | found | {"parameters": of_launch}, panels)
        if self.columns:
            for keys, starts, order in chunk.sums:
                to = sums if keys is chunk.sums[-1].keys else sums.new_zeros(len(keys), self.columns)
                simple("fold", keys.numel() * self.columns, to, partial, keys, starts, order, keys.numel(), self.columns)
                partial = to
        if self.params:
            n = call.grad_params.numel()
            simple("sum_blocks", n, call.grad_params, parameters, call.tables[5], n, sum(blocks), self.block_size)
        if self.table:
            self.add_table_gradient(found["cells"], found["places"], found["curves"])

    def add_table_gradient(self, cells: torch.Tensor, places: torch.Tensor, curves: torch.Tensor) -> None:
        """Every edge adds to the lines of two nodes: sorted by cell (stably: in the order of the panels), a piece of them at a time."""
        directions, nodes, lines, width = self.call.grad_table.shape
        found, order = cells.sort(stable=True)
        count, slots = directions * nodes, len(cells)
        starts = torch.searchsorted(found, torch.arange(count + 1, dtype=torch.int32, device=cells.device))
        pieces = -(-slots // launch.PIECE)
        ends, sums = places.new_empty(pieces, 2, 2 * lines, width), places.new_empty(count, 2 * lines, width)
        simple("sum_cells", pieces * width, sums, ends, curves, places, order, found, slots, width, nodes, self.call.low.steps)
        simple("merge_cells", sums.numel(), sums, ends, starts, slots, sums.numel(), width)
        total = sums.view(directions, nodes, 2 * lines, width)
        self.call.grad_table.add_(total[:, :, :lines])
        self.call.grad_table[:, 1:] += total[:, :-1, lines:]

    def finish_nodes(self, sums: torch.Tensor, first: int) -> None:
        """From the sums of nodes from `first` on, [2, nodes, columns], to the gradients of node states and projections, and of q, k and v."""
        nodes = slice(first, first + sums.shape[1])
        if self.terms:
            self.finish_terms(self.of_terms(sums), nodes)
        begin, d = self.call.low.columns * sides(self.call.low), self.call.low.d
        for t, side, start in zip(self.attended, (0, 1, 1), (begin, begin, begin + d)):
            if t.numel():
                t[nodes].copy_(sums[side, :, start : start + t.shape[1]])

    def of_terms(self, sums: torch.Tensor) -> torch.Tensor:
        """[2, nodes, columns of the node terms]: what partners add to their destinations was summed by source, and the other way about."""
        n = self.call.low.columns
        return (sums[:, :, :n] + sums.flip(0)[:, :, n : 2 * n] if self.call.low.live else sums[:, :, :n]).contiguous()

    def finish_terms(self, sums: torch.Tensor, nodes: slice) -> None:
        """From the gradients of the node terms, [2, nodes, columns], to those of node states and projections."""
        call, low = self.call, self.call.low
        if self.params:
            with prog.full_precision(sums.device):
                for t in low.terms:
                    for side, w in ((sums[0, :, t.column : t.column + t.n_out], t.wd), (sums[1, :, t.column : t.column + t.n_out], t.ws)):
                        call.grad_params[w : w + t.n_out * t.width].view(t.n_out, t.width).addmm_(side.T, call.xs[t.x][nodes])
                    if t.b >= 0:
                        call.grad_params[t.b : t.b + t.n_out] += sums[0, :, t.column : t.column + t.n_out].sum(0)
        for k, grad_x in enumerate(call.grad_xs):
            if grad_x.numel():
                shape = (len(low.terms), sums.shape[1], low.columns, k, grad_x.shape[1])
                simple("node_gradient", grad_x[nodes].numel(), grad_x[nodes], sums, call.params, call.tables[3], *shape)

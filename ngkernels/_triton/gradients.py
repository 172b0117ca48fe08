"""The backward pass of all ops in Triton.

A chunk has as many tiles as fit into the memory for partial results; then these are added up, in the order of sums, and the next tiles
follow. Node terms, and the sums of their gradients, are there for the nodes of one chunk at a time: chunks go through the networks in the
order of their nodes. Nothing depends on where they end but the parameters' own sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .. import program as prog
from ..window import sliding
from . import launch
from . import table as tab
from .attend import Attending
from .call import Call
from .fold import fold
from .gradient_kernel import gradient_kernel
from .lower import backward
from .messages import slots_of
from .nodes import node_gradients, parameter_gradients
from .plan import NODES, Chunk, Cut


class Wanted:
    """Which gradients a call wants, and the steps that lead to them."""

    def __init__(self, call: Call):
        def there(t: torch.Tensor | None) -> bool:
            return t is not None and t.numel() > 0

        low = call.low
        marked = any(s.op == prog.MARK for s in low.steps)  # gradients stop at a virtual checkpoint: none reach the weights
        self.weights = not marked and any(there(t) for t in call.grad_weights)
        self.nodes = bool(low.terms) and any(there(t) for t in call.grad_xs)
        self.params, self.carriers = there(call.grad_params), any(there(t) for t in call.grad_carriers)
        self.table_step = next((s for s in low.steps if s.op == prog.TABLE), None)
        self.table = self.table_step is not None and there(call.grad_table)
        flags = (self.weights, self.nodes, self.params, self.table, self.carriers)
        end = len(low.steps)
        if low.attention:  # the share, then what it is made of
            steps = backward(low, 0, end, *flags)
            self.query, self.edge = steps[:1], steps[1:]
        else:
            self.edge = backward(low, 0, end if low.message < 0 else low.start, *flags)
            self.query = () if low.message < 0 else backward(low, low.start, end, *flags)
        self.terms = self.nodes or (self.params and bool(low.terms))
        self.columns = low.columns if self.terms or low.attention else 0  # of a node's gradients: of its terms,
        if low.attention:  # then of its query, or of its key and value
            self.columns += low.attention.heads * (low.attention.dk + low.attention.dv)

    def need(self, later: bool) -> tuple[bool, ...]:
        """The constexpr NEED of a launch."""
        return (self.params, self.nodes, self.weights, self.table, later)


def clear(call: Call, wanted: Wanted, work: Cut) -> None:
    """Gradients that add up, or that no tile covers, start at zero."""
    for t in (*call.grad_xs, call.grad_params, call.grad_table):
        if t.numel():
            t.zero_()
    for tensors, covered, reached in ((call.grad_weights, work.covered_weights, wanted.weights), (call.grad_carriers, work.covered_blocks, wanted.carriers)):
        for k, t in enumerate(tensors):
            if t.numel() and not (reached and covered.get(k, 0) * t.shape[-1] == t.numel()):
                t.zero_()


class Saved(NamedTuple):
    """What aggregate and attend kept for backward: of aggregate its results out, aux, ties and the gradient of out; of attend its log-sum-exp,
    delta (attend.deltas), the gradients of its results. attending, grads: of attend, with the gradients of q, k, v, empty where not wanted."""

    tensors: tuple[torch.Tensor, ...] = ()
    attending: Attending | None = None
    grads: tuple[torch.Tensor, ...] = ()


def backward_pass(call: Call, saved: Saved) -> None:
    """Writes the wanted gradients."""
    low, wanted = call.low, Wanted(call)
    work = call.cut(NODES)
    clear(call, wanted, work)
    for t in saved.grads:
        t.zero_()
    attended = any(t.numel() for t in saved.grads)
    if not work.tiles or not (wanted.edge or wanted.query or attended):
        return
    item = call.params.element_size()
    curve = wanted.table_step.n_out if wanted.table else 0
    columns = wanted.columns
    of_node = 2 * (low.columns + 2 * columns) * item  # terms; sums of their gradients, and a copy of those that are done
    sizes = (columns * item, low.n_params * item if wanted.params else 0, tab.slot_bytes(curve, item) if curve else 0, of_node)
    *tables, chunks = work.chunks(*sizes, max(1, launch.BUDGET, launch.MOST_TILES * sizes[1]))
    for chunk, sums, done in sliding(chunks, columns, call.params):
        add_chunk(call, wanted, work, chunk, tables, saved, curve, sums)
        if columns and done:
            finish_nodes(call, wanted, saved, sums[:, :done].contiguous(), chunk.nodes[0])
    for k, t in enumerate(call.others):
        if t is not None:
            call.grad_weights[k] += t


def add_chunk(call: Call, wanted: Wanted, work: Cut, chunk: Chunk, tables: Sequence[torch.Tensor], saved: Saved, curve: int, node_sums: torch.Tensor) -> None:
    """The launches of a chunk; their partial results are added to the sums of its nodes [2, nodes, columns], the parameters and the table."""
    columns, n_params = wanted.columns, call.low.n_params
    nodes = call.project(*chunk.nodes)
    partial = call.params.new_zeros(chunk.partials, columns) if columns else call.params
    sums = call.params.new_zeros(chunk.tiles, n_params) if wanted.params else call.params
    slots = tab.new_slots(chunk.slots, curve, call.params) if curve else tab.Slots(call.params, call.params, call.params)
    for number, first, last in chunk.launches:
        launch_group(call, wanted, work, number, first, last, chunk, tables[0], nodes, saved, columns, sums, partial, slots)
    if columns:
        fold(node_sums, partial, tuple(tables[1:]), chunk, columns, work.segment)
    if wanted.params:
        call.grad_params += sums.sum(0)
    if curve:
        tab.add_table_gradient(call.grad_table, slots)


def launch_group(
    call: Call, wanted: Wanted, work: Cut, number: int, first: int, last: int, chunk: Chunk, tiles, nodes, saved: Saved, columns: int, sums, partial, slots: tab.Slots
) -> None:
    low, tensors, group, attending = call.low, call.tensors, work.groups[number], saved.attending
    pointers = [tensors.pointers(group, name, call.params, partner) for partner in (False, True) for name in ("raw", "grad_raw", "values", "carriers")]
    kept = saved.tensors or (call.params,) * 4
    if saved.tensors and attending is None:
        kept = (*kept, call.plan.degrees(kept[0].shape[0], call.params.dtype))
    scale, dropout, seed = (0.0, 0.0, (0, 0)) if attending is None else attending[1:]
    launch.run(
        gradient_kernel, (last - first,),
        tiles, tensors.table(work, number), call.plan.lists, first, chunk.first, *pointers, kept, (call.params,) * 3 if attending is None else attending.nodes,
        *seed, nodes, chunk.nodes[0], chunk.nodes[1] - chunk.nodes[0], call.params, call.table, call.table_nodes, sums, partial, *slots,
        call.steps, low.live(group.both), low.paired, call.chunks, call.message_chunks, low.columns, columns, low.edge, low.message, low.count, low.combine,
        low.width, launch.constants(slots_of(low.mask)), call.heads, scale, dropout, call.precision, len(pointers[0]), low.n_params,
        launch.constants(wanted.edge), launch.constants(wanted.query), launch.constants(wanted.need(group.later)), *group.shape, group.sparse,
        **call.options,
    )  # fmt: skip


def finish_nodes(call: Call, wanted: Wanted, saved: Saved, sums: torch.Tensor, begin: int) -> None:
    """From the gradients of the node terms of nodes from `begin` on, [2, nodes, columns], to those of node states and projections; behind
    them stand those of q, and of k and v."""
    nodes = slice(begin, begin + sums.shape[1])
    if wanted.params:
        with prog.full_precision(sums.device):
            parameter_gradients(sums, call.low.terms, [x[nodes] for x in call.xs], call.grad_params)
    if wanted.terms:
        node_gradients(sums, call.low, call.params, [g[nodes] for g in call.grad_xs], call.node_precision)
    if saved.grads:
        first, d = call.low.columns, call.low.attention.heads * call.low.attention.dk
        for t, side, start in zip(saved.grads, (0, 1, 1), (first, first, first + d), strict=True):
            if t.numel():
                t[nodes].copy_(sums[side, :, start : start + t.shape[1]])

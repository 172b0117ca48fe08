"""Folding: an EdgeState and its consumer become a short list of instructions over packed parameters.

Kernels know only this form (csrc/edge_program.h holds the same numbers). Linear maps that follow one another
are multiplied: what is to be computed from the small d x d matrices is written down here (ngkernels/fold.py), and ops
compute it. An affine map that is still pending at the end is applied by the consumer's own matrix.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import accumulate
from typing import NamedTuple

import torch

from .backends import kind_of
from .checks import ACTIVATIONS
from .edges import Activate, Affine, EdgeState, Mark, Message, NodeTerm, Update
from .encoders import Fourier, Linear, Table, expansion, grid_step, make_table
from .fold import Fold, Matrix

LOAD, FOURIER, TABLE, LIN, ACT, ADD, MARK, NORM, MASK = range(9)
RECORD = 10  # ints an instruction: op, n_in, n_out, weight, bias, x, weight_dst, weight_src, arg0, arg1
HEADER = 11  # directions, instructions, combine, F, reductions, message start, xs, params, RECORD, bytes of a tie count, paired
PLAIN, FILM, GATE, PRODUCT, EMIT, ATTEND = range(6)  # what the consumer does with the last register
COMBINE = {"concat": PLAIN, "film": FILM, "gate": GATE, "product": PRODUCT}
REDUCE = ("sum", "mean", "min", "max", "std", "var")


def reductions(mask: int) -> list[str]:
    """Names of the reductions in `mask`, in the order of the output."""
    return [r for k, r in enumerate(REDUCE) if mask >> k & 1]


def aux_slots(mask: int) -> tuple[int, int]:
    """(1 if the mean is kept beside the output, number of tie counts) that the backward pass of `mask` needs."""
    names = reductions(mask)
    return int(("std" in names or "var" in names) and "mean" not in names), ("min" in names) + ("max" in names)


def cut(tensors: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[list[torch.Tensor]]:
    """Consecutive pieces of so many tensors."""
    ends = list(accumulate(sizes))
    return [list(tensors[end - size : end]) for size, end in zip(sizes, ends, strict=True)]


def recipe_of(program: list[int]) -> list[int]:
    """How the packed parameters are made of an expression's params (ngkernels/fold.py)."""
    return program[HEADER + RECORD * program[1] :]


class Expression(NamedTuple):
    """The arguments that every op of the engine takes, in its schema's order.

    params: the small matrices and vectors that the packed parameters are made of, as the recipe at the end of `program` says.
    """

    weights: list[torch.Tensor]
    xs: list[torch.Tensor]
    params: list[torch.Tensor]
    table: torch.Tensor
    carriers: list[torch.Tensor]
    topology: torch.Tensor
    program: list[int]

    @property
    def differentiable(self) -> list[torch.Tensor]:
        return [*self.weights, *self.xs, *self.params, self.table, *self.carriers]

    def with_tensors(self, tensors: list[torch.Tensor]) -> Expression:
        """The same expression over other differentiable tensors."""
        weights, xs, params, (table,), carriers = cut(tensors, [len(self.weights), len(self.xs), len(self.params), 1, len(self.carriers)])
        return Expression(weights, xs, params, table, carriers, self.topology, self.program)


class Term(NamedTuple):
    """A node term of a program, as backends that project all nodes at once lay it out: x[x] times [n_out, width] matrices at wd and ws, bias at b (-1: none),
    from column `column` on."""

    x: int
    width: int
    n_out: int
    wd: int
    ws: int
    b: int
    column: int


class _Builder:
    def __init__(self, edges: EdgeState, dtype: torch.dtype, tabulate: bool, over: str | None = None, include_self: bool = True, messages: bool = False):
        self.edges, self.dtype, self.tabulate, self.over = edges, dtype, tabulate, over
        self.paired = over is not None or edges.paired
        self.directions = 2 if edges.encoder.reciprocal and (edges.graph.has_reverse or self.paired) else 1
        self.topology = edges.graph.pairs_as(over, include_self) if over else edges.graph.edges_as(self.paired, edges.encoder.reciprocal, messages)
        self.masked = edges.graph.stored or not any(p.token for p in edges.graph.parts)  # nothing to mask
        self.fold = Fold(dtype)
        self.matrix = self.fold.leaf
        self.xs: list[torch.Tensor] = []
        self.instructions: list[list[int]] = []
        self.carriers: tuple[torch.Tensor, ...] = ()
        self.table = edges.weights[0].new_empty(0, dtype=dtype)
        self.width = 0  # of the register
        self.pending: tuple[Matrix, Matrix | None] | None = None  # e = M register + c
        self.variants: list[Matrix] | None = None  # pending M for each direction, right after LOAD
        self.start()

    # ---- small helpers ----
    def put(self, first: torch.Tensor | Matrix | None, *more: torch.Tensor | Matrix) -> int:
        """Where the first of the matrices stands among the parameters, others follow; -1 for None."""
        at = -1 if first is None else self.fold.store(first)
        for m in more:
            self.fold.store(m)
        return at

    def vector(self, t: torch.Tensor | None) -> Matrix | None:
        return None if t is None else self.matrix(t)

    def x_index(self, x: torch.Tensor) -> int:
        for k, y in enumerate(self.xs):
            if y is x:
                return k
        self.xs.append(x)
        return len(self.xs) - 1

    def emit(self, op: int, n_in: int, n_out: int, w: int = -1, b: int = -1, node: NodeTerm | None = None, arg0: int = 0, arg1: int = -1) -> None:
        term = [-1, -1, -1]
        if node is not None:
            term = [self.x_index(node.x), self.put(node.weight_dst), self.put(node.weight_src)]
        self.instructions.append([op, n_in, n_out, w, b, *term, arg0, arg1])
        self.width = n_out

    # ---- encoder ----
    def start(self) -> None:
        edges, enc = self.edges, self.edges.encoder
        channels = edges.weights[0].shape[-1]
        affine = -1
        if edges.affine is not None:
            used = torch.tensor(edges.affine, dtype=torch.float64, device=edges.weights[0].device)[:, list(self.topology.used_weights)]
            affine = self.put(used.T)
        self.emit(LOAD, 0, channels, arg0=affine)
        maps = [expansion(channels, d, edges.weights[0]).to(self.dtype) for d in range(self.directions)] if enc.reciprocal else None
        if isinstance(enc, Fourier):
            frequencies = [enc.frequencies.to(self.dtype) @ m for m in maps] if maps else [enc.frequencies]
            self.features = (frequencies, enc)  # emitted with the first linear map
            return
        self.features = None
        if isinstance(enc, Linear):
            m, bias = self.matrix(enc.weight), self.matrix(enc.bias)
            if maps:
                self.variants = [m.times(self.matrix(x)) for x in maps]
            self.pending = (m, bias)
        elif maps:
            self.variants = [self.matrix(x) for x in maps]
            self.pending = (self.variants[0], None)

    def fourier_linear(self, w: torch.Tensor | None, b: torch.Tensor | None, node: NodeTerm | None, through: bool) -> None:
        """register = w e0 + b + node term, where e0 is the encoder's; w None: e0 itself."""
        (frequencies, enc), self.features = self.features, None
        m, channels = enc.frequencies.shape[0], self.instructions[0][2]
        table = self.tabulated(enc, w, through)
        first, bias = None if w is None else self.matrix(w), self.matrix(enc.bias)
        if first is not None:
            bias = first.times(bias) if b is None else self.matrix(b).plus(first.times(bias))
        n_out, bias = bias.shape[0], self.put(self.with_bias(bias, node))
        weight = offset = -1
        if table is None or not table.complete:
            matrix = self.matrix(enc.weight)
            weight = self.put(matrix if first is None else first.times(matrix))
            offset = self.put(*frequencies)
        if table is not None:
            self.table = table.values
            self.emit(TABLE, m, n_out, weight, bias, node, arg0=grid_step(enc), arg1=offset)
            return
        self.emit(FOURIER, channels, 2 * m, offset)
        self.emit(LIN, 2 * m, n_out, weight, bias, node)

    def tabulated(self, enc: Fourier, first: torch.Tensor | None, through: bool) -> Table | None:
        """The table of `first` times the encoder, or None for direct evaluation."""
        table = self.edges.table if self.tabulate else None
        if self.tabulate and (table is None or (table.through and not through)):
            table = make_table(enc, self.edges.weights, self.edges.affine, self.dtype, self.directions)
        if table is None:
            return None
        if table.values.shape[0] != self.directions:
            table = replace(table, values=table.values[: self.directions])
        return table if first is None or table.through else table.times(first)

    # ---- steps ----
    def linear(self, w: torch.Tensor | None, b: torch.Tensor | None, node: NodeTerm | None = None, through: bool = False) -> None:
        """register = w e + b + node term, folded with what is pending; w None: e itself. `through`: w is the first update's."""
        if self.features is not None:
            self.fourier_linear(w, b, node, through)
            return
        b, variants = self.vector(b), self.variants
        if w is None:
            w, b = self.pending
        elif self.pending is None:
            w = self.matrix(w)
        else:
            w = self.matrix(w)
            m, c = self.pending
            if c is not None:
                b = w.times(c) if b is None else b.plus(w.times(c))
            if variants:
                variants = [w.times(v) for v in variants]
            else:
                w = w.times(m)
        b = self.with_bias(b, node)
        self.pending, self.variants = None, None
        variants = variants or [w]
        step = variants[0].numel() if len(variants) > 1 else 0
        self.emit(LIN, variants[0].shape[1], w.shape[0], self.put(*variants), self.put(b), node, arg0=step)

    def with_bias(self, b: Matrix | None, node: NodeTerm | None) -> Matrix | None:
        if node is None or node.bias is None:
            return b
        return self.matrix(node.bias) if b is None else b.plus(self.matrix(node.bias))

    def pair(self, w: torch.Tensor, reverse: torch.Tensor, b: torch.Tensor | None, node: NodeTerm | None) -> None:
        """register = w e + reverse (register of the partner) + b + node term, folded with what is pending."""
        if self.carriers and self.over is None:
            raise NotImplementedError(
                "EdgeState: expected no pair update between a virtual checkpoint and an aggregate or readout; checkpoint after the update, "
                "or use recompute"
            )
        if self.features is not None or self.variants:
            self.materialise()
        w, reverse, b = self.matrix(w), self.matrix(reverse), self.with_bias(self.vector(b), node)
        if self.pending is not None:
            m, c = self.pending
            if c is not None:
                both = w.plus(reverse).times(c)
                b = both if b is None else b.plus(both)
            w, reverse = w.times(m), reverse.times(m)
        self.pending = None
        self.emit(LIN, w.shape[1], w.shape[0], self.put(w), self.put(b), node, arg1=self.put(reverse))

    def mask(self) -> None:
        """The pairs of tokens start from 0: once, where the encoder ends."""
        if not self.masked:
            self.masked = True
            self.materialise()
            self.emit(MASK, self.width, self.width)

    def materialise(self) -> None:
        """Make the register e itself."""
        if self.pending is not None or self.features is not None:
            self.linear(None, None)

    def act(self, name: str) -> None:
        self.emit(ACT, self.width, self.width, arg0=ACTIVATIONS.index(name))

    def step(self, step: Update | Activate | Mark) -> None:
        if isinstance(step, Activate):
            self.materialise()
            self.act(step.activation)
            self.pending = (self.matrix(step.weight), self.vector(step.bias))
            return
        self.mask()
        if isinstance(step, Mark):
            self.materialise()
            self.carriers = step.carriers
            self.emit(MARK, self.width, self.width)
            return
        if step.residual:
            self.materialise()
        kept = len(self.instructions) - 1
        if step.weight_reverse is not None:
            self.pair(step.weight_edge, step.weight_reverse, step.bias, step.node)
        else:
            self.linear(step.weight_edge, step.bias, step.node, step is self.edges.steps[0])
        self.act(step.activation)
        self.pending = (self.matrix(step.weight_out), self.vector(step.bias_out))
        if step.residual or step.norm is not None:
            self.materialise()
        if step.residual:
            self.emit(ADD, self.width, self.width, arg0=kept)
        if step.norm is not None:
            weight, bias = self.put(step.norm.weight), self.put(step.norm.bias)
            self.emit(NORM, self.width, self.width, weight, bias, arg0=_float_bits(step.norm.eps))

    def steps(self) -> None:
        for step in self.edges.steps:
            self.step(step)
        self.mask()

    def finish(self, combine: int, width: int, reduce_mask: int, message_start: int) -> Expression:
        ties = 2 if self.edges.graph.max_in_degree < 1 << 15 else 4
        shape = [self.directions, len(self.instructions), combine, width, reduce_mask, message_start, len(self.xs), self.fold.size]
        header = [*shape, RECORD, ties, int(self.paired)]
        program = header + [v for record in self.instructions for v in record] + self.fold.recipe
        xs = [(x if x.dtype == self.dtype else x.to(self.dtype)).contiguous() for x in self.xs]
        weights = [self.edges.weights[k] for k in self.topology.used_weights]
        carriers = list(self.carriers) if self.edges.graph.packed else [self.carriers[k] for k in self.topology.used_blocks if self.carriers]
        # The topology's rows stay on the host: backends read them there, and keep what they need of them on their device.
        return Expression(weights, xs, self.fold.leaves, self.table, carriers, self.topology.on(self.edges.weights[0].device), program)


def _float_bits(value: float) -> int:
    """A double as an integer of the same bits."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


def _dtype(edges: EdgeState) -> torch.dtype:
    """Compute dtype: float64 when the weights are, else float32 (accumulation; bf16 is an operand format)."""
    return torch.float64 if edges.weights[0].dtype == torch.float64 else torch.float32


def full_precision(device: torch.device) -> AbstractContextManager:
    """Autocast is for the edges' matrix products (the op's `compute`), not for the small matrices folded here."""
    kind = kind_of(device)
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def build_state(
    edges: EdgeState, tabulate: bool, head: Sequence[Affine] = (), node: NodeTerm | None = None, activation: str = "relu", over: str | None = None
) -> Expression:
    """The expression whose register is e_ij itself, or a small MLP of it: W_k .. act(W_0 e + node term + b_0).

    `over`: both directions of a closed graph's pairs together (NeuralGraph.pairs_as).
    """
    with full_precision(edges.weights[0].device):
        b = _Builder(edges, _dtype(edges), tabulate, over)
        b.steps()
        for k, (w, bias) in enumerate(head):
            if k:
                b.act(activation)
            b.linear(w, bias, node if k == 0 else None)
        b.materialise()
        return b.finish(EMIT, b.width, 0, len(b.instructions))


def build_message(edges: EdgeState, message: Message, reduce: Sequence[str], tabulate: bool, pairs: bool = False) -> Expression:
    """The expression of a message and the set of its reductions. pairs: of all pairs of a closed graph, not of edges alone."""
    with full_precision(edges.weights[0].device):
        b = _Builder(edges, _dtype(edges), tabulate, messages=not pairs)
        b.steps()
        mask = sum(1 << REDUCE.index(r) for r in reduce)
        if message.kind == "concat":
            b.linear(message.weight_edge, message.bias_edge, message.node)
            for w, bias in message.mlp:
                b.act(message.activation)
                b.linear(w, bias)
            return b.finish(PLAIN, b.width, mask, len(b.instructions))
        b.linear(message.weight_edge, message.bias_edge)
        start = len(b.instructions)
        hidden = message.node.weight_dst.shape[0]
        b.emit(LIN, 0, hidden, -1, b.put(message.node.bias), message.node)
        for w, bias in message.mlp:
            b.act(message.activation)
            b.linear(w, bias)
        return b.finish(COMBINE[message.kind], message.width, mask, start)


def build_attention(edges: EdgeState, maps: Sequence[torch.Tensor], over: str, include_self: bool, tabulate: bool) -> Expression:
    """The expression of e_ij and, from it, of `maps` side by side: the edge's share of queries, keys and values."""
    with full_precision(edges.weights[0].device):
        b = _Builder(edges, _dtype(edges), tabulate, over, include_self)
        b.steps()
        b.materialise()
        if all(r[0] in (LOAD, MASK, MARK) for r in b.instructions):  # a raw register has no padding, which kernels want here
            b.linear(torch.eye(b.width, dtype=b.dtype, device=edges.weights[0].device), None)
        start = len(b.instructions)
        b.linear(torch.cat(list(maps)), None)
        return b.finish(ATTEND, b.width, 0, start)

"""A program as what kernels are specialised by: tuples of integers, with every register cut into chunks of columns.

A chunk is a tensor [tile, P] of the kernel, P a power of two up to 64 and, where matrix products read it, at least 16. Chunks keep wide
layers from being padded to the next power of two, and give FiLM its scales and shifts as tensors of their own. In attention a chunk holds
a group of whole heads, each padded to a power of two: queries, keys and values of one group meet column by column.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from .. import program as prog
from ..program import Term

WIDEST = 64  # columns of a chunk
SAME_SHAPE = (prog.ACT, prog.ADD, prog.MARK, prog.NORM, prog.MASK)  # results cut as their inputs are


class Step(NamedTuple):
    """One instruction. Chunks are positions in Lowered.chunks; offsets are those of the program."""

    op: int
    first_in: int
    count_in: int
    first: int  # chunks of the result
    count: int
    n_in: int
    n_out: int
    w: int
    b: int
    node: int  # column of the node term in the projected node states, -1: none
    arg0: int | float  # of ADD: the first chunk that is added; of NORM: eps; else as in the program
    arg1: int


Chunk = tuple[int, int, int, int, int]  # first column, columns in use, padded columns; columns of a head, padded (all: no heads)


class Heads(NamedTuple):
    """Attention: heads, columns of a head's queries and values, groups of heads, heads of a group, whether values are multiplied and edge
    states summed, columns of an edge state; the chunks of queries, of values, and of edge states."""

    heads: int
    dk: int
    dv: int
    groups: int
    of_group: int
    multiply: int
    summed: int
    de: int
    keys: tuple[Chunk, ...]
    values: tuple[Chunk, ...]
    states: tuple[Chunk, ...]

    @property
    def width(self) -> int:
        """Columns of a partial result: largest logits, sums of exponentials, values, edge states."""
        return self.heads * (2 + self.dv + self.summed * self.de)

    @property
    def flat(self) -> tuple:
        """Tuples in tuples in tuples are no constants for Triton 3.6."""
        return (*self[:8], len(self.states), *self.keys, *self.values, *self.states)


class Lowered(NamedTuple):
    steps: tuple[Step, ...]
    chunks: tuple[Chunk, ...]
    terms: tuple[Term, ...]
    columns: int  # of all node terms together; the projected node states are [N, 2 columns]: destinations, sources
    combine: int
    mask: int
    width: int
    start: int  # first step of the message register
    edge: int  # first chunk of the edge register that the consumer reads; of FiLM: its scales, then its shifts
    message: int  # first chunk of the message register
    count: int  # chunks of a message or of a value
    directions: int
    n_params: int
    paired: bool  # edges are evaluated together with their partners
    last_pair: int  # the last step that reads the partners' registers; 0: none
    attention: Heads | None

    def live(self, both: bool) -> int:
        """How many steps are evaluated for partners. both: their results are used too."""
        return len(self.steps) if both else self.last_pair


class Back(NamedTuple):
    """One step of the way back."""

    step: int
    below: int  # 1: the gradient of its input is needed
    held: int  # the ADD that left a gradient for this step's result, to be added first; 0: none


def padded(n: int) -> int:
    """Columns of a chunk that holds n."""
    return max(16, power(n))


def plain(first: int, used: int, width: int) -> Chunk:
    return first, used, width, width, width


def cut(first: int, n: int) -> list[Chunk]:
    """Chunks of the columns first .. first + n - 1, all as wide as one another: with a narrow last one beside wide ones, registers of 130
    columns spilled five times as much, and exact ones left ptxas 13 with 32 registers a thread."""
    wide = padded(n) if n <= WIDEST else min((WIDEST, WIDEST // 2), key=lambda p: -(-n // p) * p)
    return [plain(first + k, min(wide, n - k), wide) for k in range(0, n, wide)]


def power(n: int) -> int:
    return 1 << (n - 1).bit_length()


def cut_heads(first: int, heads: int, of_group: int, width: int) -> list[Chunk]:
    """Chunks of groups of heads, each `width` columns."""
    slot = max(power(width), 16 // of_group)
    return [(first + h * width, min(of_group, heads - h) * width, of_group * slot, width, slot) for h in range(0, heads, of_group)]


def heads_of(heads: int, d: int, d_v: int, multiply: int, summed: int, de: int) -> Heads:
    dk, dv = d // heads, d_v // heads
    of_group = max(1, min(16, power(heads), WIDEST // power(max(dk, dv))))
    keys, values = cut_heads(0, heads, of_group, dk), cut_heads(0, heads, of_group, dv)
    return Heads(heads, dk, dv, len(keys), of_group, multiply, summed, de, tuple(keys), tuple(values), tuple(cut(0, de)))


def records(program: Sequence[int]) -> list[list[int]]:
    body = program[prog.HEADER :]
    return [list(body[k * prog.RECORD : (k + 1) * prog.RECORD]) for k in range(program[1])]


def _loaded(instructions: list[list[int]], channels: int) -> list[Chunk]:
    """Chunks of the raw features: a few channels stay a few columns where only products of columns read them."""
    narrow = len(instructions) > 1 and instructions[1][0] in (prog.LIN, prog.FOURIER, prog.TABLE) and all(rec[0] != prog.ADD or rec[8] for rec in instructions)
    return [plain(0, channels, power(channels))] if narrow and channels <= 8 else cut(0, channels)


def lower(program: Sequence[int], x_widths: Sequence[int], attention: tuple[int, ...] = ()) -> Lowered:
    """The constants of a program over node states of the given widths. attention: heads, columns of queries and values, whether values
    are multiplied, whether edge states are summed."""
    directions, _, combine, width, mask, start, _, n_params = program[:8]
    instructions = records(program)
    heads = heads_of(*attention, instructions[start - 1][2]) if attention else None
    steps: list[Step] = []
    chunks: list[Chunk] = []
    terms: list[Term] = []
    columns = 0
    for k, (op, n_in, n_out, w, b, x, wd, ws, arg0, arg1) in enumerate(instructions):
        before = steps[-1] if steps else None
        first = len(chunks)
        if op == prog.LOAD:
            chunks += _loaded(instructions, n_out)
        elif op in SAME_SHAPE:
            chunks += chunks[before.first : before.first + before.count]
        elif combine == prog.FILM and k == start - 1:
            chunks += cut(0, width) + cut(width, width)
        elif heads is not None and k == start:
            for part, of_head in ((0, heads.dk), (attention[1], heads.dk), (2 * attention[1], heads.dv))[: 2 + heads.multiply]:
                chunks += cut_heads(part, heads.heads, heads.of_group, of_head)
        else:
            chunks += cut(0, n_out)
        node = -1
        if x >= 0:
            node = columns
            terms.append(Term(x, x_widths[x], n_out, wd, ws, b, columns))
            columns += n_out
        source = (before.first, before.count) if before is not None and n_in else (0, 0)
        if op == prog.ADD:
            arg0 = steps[arg0].first
        elif op == prog.NORM:
            arg0 = struct.unpack("<d", struct.pack("<q", arg0))[0]
        steps.append(Step(op, *source, first, len(chunks) - first, n_in, n_out, w, -1 if x >= 0 else b, node, arg0, arg1))
    whole = combine in (prog.PLAIN, prog.EMIT)
    edge = steps[-1].first if whole else steps[start - 1].first
    return Lowered(
        tuple(steps), tuple(chunks), tuple(terms), columns, combine, mask, width, start, edge, -1 if whole else steps[-1].first, len(cut(0, width)),
        directions, n_params, bool(program[10]), max([0, *(k for k, rec in enumerate(instructions) if rec[0] == prog.LIN and rec[9] >= 0)]), heads,
    )  # fmt: skip


@lru_cache(maxsize=1024)
def backward(low: Lowered, begin: int, end: int, weights: bool, nodes: bool, params: bool, table: bool, carriers: bool) -> tuple[Back, ...]:
    """The steps from the result of step end - 1 down to what still has a gradient to give, `begin` at the lowest."""
    wants: list[bool] = []  # whether step k, or one below it, gives a gradient
    for k in range(begin, end):
        s, below = low.steps[k], bool(wants) and wants[-1]
        if s.op == prog.LOAD:
            wants.append(weights)
        elif s.op == prog.MARK:
            wants.append(carriers)
        elif s.op == prog.TABLE:
            wants.append(weights or params or table or (nodes and s.node >= 0))
        elif s.op == prog.NORM:
            wants.append(below or params)
        elif s.op == prog.LIN:
            wants.append(below or params or (nodes and s.node >= 0))
        else:
            wants.append(below)
    held = {_producer(low, s.arg0): k for k, s in enumerate(low.steps[:end]) if k >= begin and s.op == prog.ADD}
    steps = []
    for k in range(end - 1, begin - 1, -1):
        if not wants[k - begin]:
            break
        mark, first = low.steps[k].op == prog.MARK, low.steps[k].count_in == 0
        below = not mark and not first and k > begin and wants[k - begin - 1]
        steps.append(Back(k, int(below), held.get(k, 0)))
        if mark:
            break
    return tuple(steps)


def _producer(low: Lowered, chunk: int) -> int:
    return next(k for k, s in enumerate(low.steps) if s.first == chunk)

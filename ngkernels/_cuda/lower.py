"""A program as stages of the CUDA kernels, and the places of its parameters there.

A stage is a linear step, what is added to it, and the activation behind it (csrc/cuda/args.h). Registers are padded to 16, 32, 64 or 128
columns. Kernels read matrices as fragments of mma.sync; index maps say which parameter each number is.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from .. import program as prog
from ..program import Term

WIDTHS = (16, 32, 64, 128)  # columns of a register
FROM_RAW, FROM_REGISTER, FROM_TABLE, FROM_NODES, FROM_COPY, FROM_FOURIER = range(6)
NAMES = {
    prog.NORM: "layer norms of edge states",
    prog.MASK: "tokens among the nodes",
}


class Unsupported(NotImplementedError):
    """An expression that these kernels do not run; its text says what of it."""


class Stage(NamedTuple):
    """As csrc/cuda/args.h has it."""

    source: int
    width: int
    halves: int = 1
    act: int = -1
    slot: int = -1
    add: int = -1
    node: int = -1
    bias: int = -1
    weight: int = -1
    back: int = -1
    gradient: int = -1
    sums: int = -1
    held: int = 0
    mark: int = 0
    frequencies: int = -1
    count: int = 0
    groups: int = 0


class Lowered(NamedTuple):
    stages: tuple[Stage, ...]  # of the edge register, then of the message register
    edge_stages: int
    terms: tuple[Term, ...]
    columns: int  # of all node terms
    d: int  # columns of a register
    channels: int
    directions: int
    combine: int
    mask: int
    width: int  # of a message or of a value
    carrier_width: int  # of the stored state at which gradients stop, 0: none
    steps: int  # of the table: log2 of cells a unit; -1: no table
    affine: int  # place of the (scale, shift) pairs among the constants, -1: none
    slots: int
    constants: np.ndarray  # parameter of each constant, -1: 0
    matrices: np.ndarray  # of each number of the packed matrices
    gradients: np.ndarray  # place of each parameter's gradient among a block's, -1: none
    n_gradients: int  # matrices
    n_sums: int  # blocks of 16 columns
    buffers: tuple[int, int, int, int]  # of staged rows: of the message register, two for stages below the last, inputs


def records(program: Sequence[int]) -> list[list[int]]:
    body = program[prog.HEADER :]
    return [list(body[k * prog.RECORD : (k + 1) * prog.RECORD]) for k in range(program[1])]


class _Lowering:
    def __init__(self, program: Sequence[int], x_widths: Sequence[int], weights: int, backward: bool):
        self.directions, _, self.combine, self.width, self.mask, self.start, _, self.n_params = program[:8]
        self.instructions, self.x_widths, self.weights, self.backward = records(program), x_widths, weights, backward
        if program[10]:
            raise Unsupported("updates that read reverse partners")
        self.channels = self.instructions[0][2]
        self.stages: list[dict] = []
        self.stage_of: dict[int, int] = {}  # the stage whose result is an instruction's
        self.steps = -1
        self.affine = self.instructions[0][8]
        for k in range(len(self.instructions)):
            self.instruction(k)
        self.d = self.columns_of_registers()
        self.kb = self.d // 16

    # ---- stages ----
    def instruction(self, k: int) -> None:
        op, n_in, n_out, w, b, x, wd, ws, arg0, arg1 = self.instructions[k]
        if op in NAMES:
            raise Unsupported(NAMES[op])
        if op == prog.LOAD:
            if self.raw_is_a_register():
                self.begin(k, FROM_COPY, n_out)
            return
        if op == prog.ACT:
            self.attach(k, "act", arg0)
            return
        if op == prog.FOURIER:
            if self.stages:
                raise Unsupported("raw features that are read beside their Fourier features")
            return
        if op == prog.MARK:
            self.stages[-1]["mark"], self.stage_of[k] = 1, len(self.stages) - 1
            return
        if op == prog.ADD:
            self.attach(k, "add", self.stage_of[arg0])
            self.stages[self.stage_of[arg0]]["held"] = 1
            return
        if op == prog.TABLE:
            source, self.steps, fourier = FROM_TABLE, arg0, arg1 if w >= 0 else -1
            n_in = 2 * n_in if w >= 0 else 0
        else:
            fourier = self.instructions[k - 1][3] if self.instructions[k - 1][0] == prog.FOURIER else -1
            source = FROM_NODES if n_in == 0 else FROM_FOURIER if fourier >= 0 else FROM_RAW if k == 1 and not self.stages else FROM_REGISTER
            if arg1 >= 0 and op == prog.LIN:
                raise Unsupported("updates that read reverse partners")
            if arg0 and source != FROM_RAW:
                raise Unsupported("reciprocal features whose register is read twice")
        halves = 2 if self.combine == prog.FILM and k == self.start - 1 else 1
        if halves == 2 and x >= 0:
            raise Unsupported("node terms of FiLM's scales")
        term = (x, wd, ws) if x >= 0 else None
        self.begin(k, source, n_out // halves, halves=halves, n_in=n_in, w=w, b=b, term=term, step=arg0, fourier=fourier)

    def raw_is_a_register(self) -> bool:
        """Whether raw features are more than the input of the first linear step."""
        if len(self.instructions) < 2:
            return True
        return (self.channels > 8 and self.instructions[1][0] == prog.LIN) or self.instructions[1][0] not in (prog.LIN, prog.TABLE, prog.FOURIER, *NAMES) or any(r[0] == prog.ADD and r[8] == 0 for r in self.instructions)

    def begin(self, k: int, source: int, width: int, **more) -> None:
        self.stages.append({"source": source, "width": width, "halves": 1, "act": -1, "add": -1, "held": 0, "mark": 0, "instruction": k, **more})
        self.stage_of[k] = len(self.stages) - 1

    def attach(self, k: int, name: str, value: int) -> None:
        stage = self.stages[-1]
        if stage["act"] >= 0 or stage[name] >= 0 or (stage["mark"] and name == "add"):
            raise Unsupported("this order of activations and sums")
        stage[name] = value
        self.stage_of[k] = len(self.stages) - 1

    def columns_of_registers(self) -> int:
        most = max(s["width"] for s in self.stages)
        if most > WIDTHS[-1]:
            raise Unsupported(f"registers of {most} columns, more than {WIDTHS[-1]}")
        return next(w for w in WIDTHS if most <= w)

    # ---- places ----
    def lowered(self) -> Lowered:
        whole = self.combine in (prog.PLAIN, prog.EMIT)
        edges = len(self.stages) if whole else sum(s["instruction"] < self.start for s in self.stages)
        lasts = {edges - 1, len(self.stages) - 1}
        for k in lasts:
            s = self.stages[k]
            if s["act"] >= 0 or s["held"] or (self.combine != prog.EMIT and (s["add"] >= 0 or s["mark"] or s["source"] == FROM_COPY)):
                raise Unsupported("results that are not those of a linear step")
        constants, forward, back, terms, stages = _Places(self), [], [], [], []
        slots = n_sums = 0
        for k, s in enumerate(self.stages):
            found = {name: s[name] for name in ("source", "width", "halves", "act", "add", "held", "mark")}
            if s["held"] or (self.backward and k not in lasts):
                found["slot"], slots = slots, slots + 1
            if s["add"] >= 0:
                found["add"] = stages[s["add"]].slot
            if s.get("term"):
                x, wd, ws = s["term"]
                found["node"] = len(terms) * self.d
                terms.append(Term(x, self.x_widths[x], s["width"], wd, ws, s["b"], found["node"]))
            elif s.get("b", -1) >= 0:
                found["bias"] = constants.rows(s["b"], s)
            if s["source"] == FROM_RAW:
                found["weight"] = constants.raw(s)
            if found.get("bias", -1) >= 0 or s["source"] == FROM_RAW:
                found["sums"] = n_sums
                n_sums += (1 + (self.directions * self.channels if s["source"] == FROM_RAW else 0)) * s["halves"] * self.kb
            if s["source"] == FROM_REGISTER:
                found["weight"] = found["gradient"] = len(forward)
                for h in range(s["halves"]):
                    forward.append(self.packed(s, h, False))
                    back.append(self.packed(s, h, True))
            if s.get("fourier", -1) >= 0:  # the features themselves, or those of weights beyond the table
                count, frequencies = s["n_in"] // 2, s["fourier"]
                found |= {"count": count, "groups": -(-s["n_in"] // self.d), "weight": len(forward), "gradient": len(forward)}
                found["frequencies"] = constants.put(np.arange(frequencies, frequencies + self.directions * count * self.channels))
                for group in range(found["groups"]):
                    for h in range(s["halves"]):
                        forward.append(self.packed(s, h, False, group * self.d))
                        back.append(self.packed(s, h, True, group * self.d))
            stages.append(Stage(**found))
        stages = [s._replace(back=s.weight + len(forward)) if s.gradient >= 0 else s for s in stages]
        matrices = np.concatenate([np.zeros(0, np.int32), *forward, *(back if self.backward else [])])
        affine = -1 if self.affine < 0 else constants.put(np.arange(self.affine, self.affine + 2 * self.weights))
        deep = not whole and len(self.stages) - edges > 1
        return Lowered(
            tuple(stages), edges, tuple(terms), len(terms) * self.d, self.d, self.channels, self.directions, self.combine, self.mask, self.width,
            max([0, *(s["width"] for s in self.stages if s["mark"])]), self.steps, affine, slots, constants.map(), matrices, self.gradient_places(stages, len(forward)), len(forward), n_sums,
            (2, 3, 2, 4) if deep else (2, 2, 0, 3),
        )  # fmt: skip

    def packed(self, s: dict, h: int, transposed: bool, first: int = 0) -> np.ndarray:
        """Parameters of a matrix [n_out, n_in], of its columns from `first` on, as right operands: [fragments of results, fragments of
        inputs, lanes, 8]."""
        c, k, lane, e = np.meshgrid(np.arange(self.kb), np.arange(self.kb), np.arange(32), np.arange(8), indexing="ij")
        inner = k * 16 + 2 * (lane % 4) + np.array([0, 1, 8, 9])[e % 4]
        outer = c * 16 + e // 4 * 8 + lane // 4
        i, o = (outer + first, inner) if transposed else (inner + first, outer)
        return np.where((o < s["width"]) & (i < s["n_in"]), s["w"] + (h * s["width"] + o) * s["n_in"] + i, -1).astype(np.int32).reshape(-1)

    def gradient_places(self, stages: Sequence[Stage], matrices: int) -> np.ndarray:
        """Where a block of threads leaves the gradient of each parameter."""
        places = np.full(self.n_params, -1, np.int64)
        first = matrices * self.kb * self.kb * 256
        for s, stage in zip(self.stages, stages, strict=True):
            n_in, column = s.get("n_in", 0), np.arange(s["width"])
            for h in range(s["halves"]):
                if stage.gradient >= 0:
                    o, i = np.meshgrid(column, np.arange(n_in), indexing="ij")
                    matrix = stage.gradient + i // self.d * s["halves"] + h
                    fragment = (matrix * self.kb + o // 16) * self.kb + i % self.d // 16
                    lane, value = o % 8 * 4 + i % 8 // 2, i % 16 // 8 * 4 + o % 16 // 8 * 2 + i % 2
                    places[s["w"] + (h * s["width"] + o) * n_in + i] = (fragment * 32 + lane) * 8 + value
                if stage.bias >= 0:
                    places[s["b"] + h * s["width"] + column] = first + (stage.sums + h * self.kb) * 16 + column
                if stage.source != FROM_RAW:
                    continue
                for d in range(self.directions if s["step"] else 1):
                    for ch in range(self.channels):
                        block = stage.sums + ((1 + d * self.channels + ch) * s["halves"] + h) * self.kb
                        places[s["w"] + d * s["step"] + (h * s["width"] + column) * n_in + ch] = first + block * 16 + column
        return places.astype(np.int32)


class _Places:
    """The constants: biases, matrices of raw features, input statistics."""

    def __init__(self, lowering: _Lowering):
        self.lowering, self.parts, self.size = lowering, [], 0

    def put(self, part: np.ndarray) -> int:
        at = self.size
        part = np.concatenate([part.reshape(-1), np.full(-part.size % 4, -1, np.int64)])
        self.parts.append(part)
        self.size += len(part)
        return at

    def rows(self, offset: int, s: dict) -> int:
        """A vector [halves width], its halves padded."""
        row = np.full((s["halves"], self.lowering.d), -1, np.int64)
        row[:, : s["width"]] = offset + np.arange(s["halves"] * s["width"]).reshape(s["halves"], -1)
        return self.put(row)

    def raw(self, s: dict) -> int:
        """Matrices [directions, halves width, channels] as [directions, channels, halves D]."""
        low = self.lowering
        rows = np.full((low.directions, low.channels, s["halves"], low.d), -1, np.int64)
        found = s["w"] + np.arange(s["halves"] * s["width"] * low.channels).reshape(s["halves"], s["width"], low.channels)
        for d in range(low.directions):
            rows[d, :, :, : s["width"]] = found.transpose(2, 0, 1) + d * s["step"]
        return self.put(rows)

    def map(self) -> np.ndarray:
        return np.concatenate([np.zeros(0, np.int64), *self.parts]).astype(np.int32)


@lru_cache(maxsize=1024)
def lower(program: tuple[int, ...], x_widths: tuple[int, ...], weights: int, backward: bool) -> Lowered:
    """The stages of a program over node states of the given widths and so many weight tensors, with all that the way back needs if `backward`.

    Raises:
        Unsupported: what the kernels do not run.
    """
    return _Lowering(program, x_widths, weights, backward).lowered()

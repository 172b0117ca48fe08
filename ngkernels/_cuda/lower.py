"""A program as stages of the CUDA kernels, and the places of its parameters there.

A stage is a linear step, what is added to it, and the activation behind it (csrc/cuda/args.h). Registers are padded to 16, 32, 64 or 128
columns. Kernels read matrices as fragments of mma.sync; index maps say which parameter each number is.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from .. import program as prog
from ..program import Term
from . import packing

WIDTHS = (16, 32, 64, 128)  # columns of a register
FROM_RAW, FROM_REGISTER, FROM_TABLE, FROM_NODES, FROM_COPY, FROM_FOURIER, FROM_NORM = range(7)


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
    masked: int = 0
    input: int = -1
    eps: int = 0
    reverse: int = -1
    reverse_back: int = -1
    reverse_gradient: int = -1
    padding: int = 0


class Attention(NamedTuple):
    """The shape of attend: heads, columns of queries and of values, whether values are multiplied and states summed."""

    heads: int
    d: int
    d_v: int
    multiply: int
    summed: int


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
    buffers: tuple[int, ...]  # of staged rows: of the message register, two for stages below the last, inputs; of partners: two, inputs
    full: bool  # whether it takes the kernels with all options
    live: int  # stages that are evaluated for partners too
    attention: Attention | None
    de: int  # columns of the state that attention reads


def records(program: Sequence[int]) -> list[list[int]]:
    body = program[prog.HEADER :]
    return [list(body[k * prog.RECORD : (k + 1) * prog.RECORD]) for k in range(program[1])]


class _Lowering:
    def __init__(self, program: Sequence[int], x_widths: Sequence[int], weights: int, backward: bool, attention: Attention | None):
        self.directions, _, self.combine, self.width, self.mask, self.start, _, self.n_params = program[:8]
        self.instructions, self.x_widths, self.weights, self.backward = records(program), x_widths, weights, backward
        self.attention = attention
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
        if op == prog.MASK:
            if self.stages[-1]["act"] >= 0:
                raise Unsupported("this order of activations and masks")
            self.stages[-1]["masked"], self.stage_of[k] = 1, len(self.stages) - 1
            return
        if op == prog.NORM:
            if self.stages[-1]["act"] >= 0 or self.stages[-1]["held"]:
                raise Unsupported("this order of activations and layer norms")
            self.stages[-1]["kept"] = 1
            self.begin(k, FROM_NORM, n_out, w=w, b=b, eps=_single_bits(arg0))
            return
        if op == prog.ADD:
            self.attach(k, "add", self.stage_of[arg0])
            self.stages[self.stage_of[arg0]]["held"] = len(self.stages)
            return
        if op == prog.TABLE:
            source, self.steps, fourier = FROM_TABLE, arg0, arg1 if w >= 0 else -1
            n_in = 2 * n_in if w >= 0 else 0
        else:
            fourier = self.instructions[k - 1][3] if self.instructions[k - 1][0] == prog.FOURIER else -1
            source = FROM_NODES if n_in == 0 else FROM_FOURIER if fourier >= 0 else FROM_RAW if k == 1 and not self.stages else FROM_REGISTER
            if arg0 and source != FROM_RAW:
                raise Unsupported("reciprocal features whose register is read twice")
        parts = self.parts_of(k, n_out)
        if len(parts) > 1 and x >= 0:
            raise Unsupported("node terms of FiLM's scales")
        term = (x, wd, ws) if x >= 0 else None
        reverse = arg1 if op == prog.LIN else -1
        self.begin(k, source, max(n for _, n in parts), parts=parts, n_in=n_in, w=w, b=b, term=term, step=arg0, fourier=fourier, reverse=reverse)

    def parts_of(self, k: int, n_out: int) -> list[tuple[int, int]]:
        """(first row, rows) of the parts of a linear step's result."""
        if self.combine == prog.FILM and k == self.start - 1:
            return [(0, n_out // 2), (n_out // 2, n_out // 2)]
        if self.combine == prog.ATTEND and k == self.start:
            d, d_v = self.attention.d, self.attention.d_v
            return [(0, d), (d, d), (2 * d, d_v)][: 2 + self.attention.multiply]
        return [(0, n_out)]

    def raw_is_a_register(self) -> bool:
        """Whether raw features are more than the input of the first linear step."""
        if len(self.instructions) < 2:
            return True
        op, *_, partner = self.instructions[1]
        linear = op == prog.LIN and self.channels <= 8 and partner < 0
        return not (linear or op in (prog.TABLE, prog.FOURIER)) or any(r[0] == prog.ADD and r[8] == 0 for r in self.instructions)

    def begin(self, k: int, source: int, width: int, **more) -> None:
        stage = {"source": source, "width": width, "parts": [(0, width)], "act": -1, "add": -1, "held": 0, "mark": 0, "masked": 0, "kept": 0, "instruction": k}
        self.stages.append(stage | more)
        self.stage_of[k] = len(self.stages) - 1

    def attach(self, k: int, name: str, value: int) -> None:
        stage = self.stages[-1]
        if stage["act"] >= 0 or stage[name] >= 0 or (stage["mark"] and name == "add"):
            raise Unsupported("this order of activations and sums")
        stage[name] = value
        self.stage_of[k] = len(self.stages) - 1

    def columns_of_registers(self) -> int:
        most = max([*(s["width"] for s in self.stages), self.attention.d_v if self.attention else 0])
        self.full = self.combine == prog.ATTEND or any(s["masked"] or s["source"] == FROM_NORM or s.get("reverse", -1) >= 0 for s in self.stages)
        if most > WIDTHS[-1]:
            raise Unsupported(f"registers of {most} columns, more than {WIDTHS[-1]}")
        return next(w for w in WIDTHS if most <= w)

    # ---- places ----
    def lowered(self) -> Lowered:
        whole = self.combine in (prog.PLAIN, prog.EMIT, prog.ATTEND)
        edges = len(self.stages) if whole else sum(s["instruction"] < self.start for s in self.stages)
        lasts = {edges - 1, len(self.stages) - 1}
        if self.attention and self.attention.summed:  # its state gets a gradient beside that of the share
            self.stages[-2]["held"] = len(self.stages)
        for k in lasts:
            s = self.stages[k]
            if s["act"] >= 0 or s["held"] or s.get("reverse", -1) >= 0 or (self.combine != prog.EMIT and (s["add"] >= 0 or s["mark"] or s["source"] in (FROM_COPY, FROM_NORM) or s["masked"])):
                raise Unsupported("results that are not those of a linear step")
        self.constants, self.matrices, self.terms, self.placed = packing.Constants(self.d), [], [], []
        self.slots = self.n_sums = 0
        for k, s in enumerate(self.stages):
            self.placed.append(self.place(k, s, s["held"] or s["kept"] or (self.backward and k not in lasts)))
        count = len(self.matrices)
        stages = [s._replace(back=s.weight + count) if s.gradient >= 0 else s for s in self.placed]
        stages = [s._replace(reverse_back=s.reverse + count) if s.reverse >= 0 else s for s in stages]
        live = max([0, *(k for k, s in enumerate(stages) if s.reverse >= 0)])
        packed = [m.packed(self.d, transposed) for transposed in (False, True)[: 1 + self.backward] for m in self.matrices]
        affine = -1 if self.affine < 0 else self.constants.put(np.arange(self.affine, self.affine + 2 * self.weights))
        deep = not whole and len(self.stages) - edges > 1
        return Lowered(
            tuple(stages), edges, tuple(self.terms), len(self.terms) * self.d, self.d, self.channels, self.directions, self.combine, self.mask, self.width,
            max([0, *(s["width"] for s in self.stages if s["mark"])]), self.steps, affine, self.slots, self.constants.map(),
            np.concatenate([np.zeros(0, np.int32), *packed]), self.gradient_places(stages), count, self.n_sums, self.buffers(deep, live), self.full, live,
            self.attention, self.stages[-2]["width"] if self.attention else 0,
        )  # fmt: skip

    def place(self, k: int, s: dict, kept: bool) -> Stage:
        """Stage k with the places of all that it reads and adds to."""
        found = {name: s[name] for name in ("source", "width", "act", "add", "held", "mark", "masked")} | {"halves": len(s["parts"])}
        if kept:
            found["slot"], self.slots = self.slots, self.slots + 1
        if s["add"] >= 0:
            found["add"] = self.placed[s["add"]].slot
        if s.get("term"):
            x, wd, ws = s["term"]
            found["node"] = len(self.terms) * self.d
            self.terms.append(Term(x, self.x_widths[x], s["width"], wd, ws, s["b"], found["node"]))
        elif s.get("b", -1) >= 0:
            found["bias"] = self.constants.rows(s["b"], s["parts"])
        if s["source"] == FROM_RAW:
            found["weight"] = self.constants.raw(s["w"], s["parts"], self.channels, self.directions, s["step"])
        if s["source"] == FROM_NORM:
            found |= {"input": self.placed[k - 1].slot, "eps": s["eps"], "weight": self.constants.rows(s["w"], s["parts"])}
        if found.get("bias", -1) >= 0 or s["source"] == FROM_RAW:
            found["sums"] = self.n_sums
            self.n_sums += (1 + {FROM_RAW: self.directions * self.channels, FROM_NORM: 1}.get(s["source"], 0)) * len(s["parts"]) * self.kb
        if s["source"] == FROM_REGISTER:
            found["weight"] = found["gradient"] = len(self.matrices)
            self.matrices += [packing.Matrix(s["w"], s["n_in"], *part) for part in s["parts"]]
            if s["reverse"] >= 0:
                found["reverse"] = found["reverse_gradient"] = len(self.matrices)
                self.matrices.append(packing.Matrix(s["reverse"], s["n_in"], *s["parts"][0]))
        if s.get("fourier", -1) >= 0:  # the features themselves, or those of weights beyond the table
            count, frequencies = s["n_in"] // 2, s["fourier"]
            found |= {"count": count, "groups": -(-s["n_in"] // self.d), "weight": len(self.matrices), "gradient": len(self.matrices)}
            found["frequencies"] = self.constants.put(np.arange(frequencies, frequencies + self.directions * count * self.channels))
            self.matrices += [packing.Matrix(s["w"], s["n_in"], *part, group * self.d) for group in range(found["groups"]) for part in s["parts"]]
        return Stage(**found)

    def buffers(self, deep: bool, live: int) -> tuple[int, ...]:
        if self.attention:  # its shares are done with when the second stage below them is reached
            parts = 2 + self.attention.multiply
            return (0, parts, 0, parts + 1, *((parts + 2, 1, parts + 3) if live else (0, 0, 0)))
        own = (2, 3, 2, 4) if deep else (2, 2, 0, 3)
        return (*own, own[3] + 1, own[3] + 2, own[3] + 3) if live else (*own, 0, 0, 0)

    def gradient_places(self, stages: Sequence[Stage]) -> np.ndarray:
        """Where a block of threads leaves the gradient of each parameter: matrices, then sums of columns."""
        places = np.full(self.n_params, -1, np.int64)
        for k, m in enumerate(self.matrices):
            m.put_places(places, k, self.d)
        first = len(self.matrices) * self.d**2
        for s, stage in zip(self.stages, stages, strict=True):
            for h, (row, width) in enumerate(s["parts"]):
                column = np.arange(width)
                if stage.bias >= 0:
                    places[s["b"] + row + column] = first + (stage.sums + h * self.kb) * 16 + column
                if stage.source == FROM_NORM:
                    places[s["w"] + column] = first + (stage.sums + self.kb) * 16 + column
                if stage.source != FROM_RAW:
                    continue
                for d in range(self.directions if s["step"] else 1):
                    for ch in range(self.channels):
                        block = stage.sums + ((1 + d * self.channels + ch) * len(s["parts"]) + h) * self.kb
                        places[s["w"] + d * s["step"] + (row + column) * s["n_in"] + ch] = first + block * 16 + column
        return places.astype(np.int32)


def _single_bits(double_bits: int) -> int:
    """Of a double's bits, those of the float32 nearest to it."""
    return struct.unpack("<i", struct.pack("<f", struct.unpack("<d", struct.pack("<q", double_bits))[0]))[0]


@lru_cache(maxsize=1024)
def lower(program: tuple[int, ...], x_widths: tuple[int, ...], weights: int, backward: bool, attention: Attention | None = None) -> Lowered:
    """The stages of a program over node states of the given widths and so many weight tensors, with all that the way back needs if `backward`.

    Raises:
        Unsupported: what the kernels do not run.
    """
    return _Lowering(program, x_widths, weights, backward, attention).lowered()

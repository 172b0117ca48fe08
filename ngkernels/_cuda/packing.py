"""Where the kernels want parameters: index maps of matrices as fragments of mma.sync, and of constants with padded columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Matrix(NamedTuple):
    """Of the parameters from `at` on, [*, n_in]: `width` rows from `row` on, the columns from `first` on that fit into a register."""

    at: int
    n_in: int
    row: int
    width: int
    first: int = 0

    def packed(self, d: int, transposed: bool) -> np.ndarray:
        """The parameter of each number, -1: 0, as right operands: [fragments of results, fragments of inputs, lanes, 8]."""
        c, k, lane, e = np.meshgrid(np.arange(d // 16), np.arange(d // 16), np.arange(32), np.arange(8), indexing="ij")
        inner = k * 16 + 2 * (lane % 4) + np.array([0, 1, 8, 9])[e % 4]
        outer = c * 16 + e // 4 * 8 + lane // 4
        i, o = (outer + self.first, inner) if transposed else (inner + self.first, outer)
        return np.where((o < self.width) & (i < self.n_in), self.at + (self.row + o) * self.n_in + i, -1).astype(np.int32).reshape(-1)

    def put_places(self, places: np.ndarray, number: int, d: int) -> None:
        """Of its parameters, where their gradients are among those of all matrices, as it is number `number`."""
        o, i = np.meshgrid(np.arange(self.width), np.arange(min(d, self.n_in - self.first)), indexing="ij")
        fragment = (number * (d // 16) + o // 16) * (d // 16) + i // 16
        lane, value = o % 8 * 4 + i % 8 // 2, i % 16 // 8 * 4 + o % 16 // 8 * 2 + i % 2
        places[self.at + (self.row + o) * self.n_in + self.first + i] = (fragment * 32 + lane) * 8 + value


LANES_ORDER = [8 * n + 2 * lane + p for lane in range(4) for n in range(2) for p in range(2)]  # columns: csrc/cuda/memory.h


class Constants:
    """Biases, matrices of raw features, input statistics, for registers of d columns. parts: (first row, rows) of each."""

    def __init__(self, d: int):
        self.d, self.parts, self.size = d, [], 0
        self.order = (16 * np.arange(d // 16)[:, None] + LANES_ORDER).reshape(-1)

    def put(self, part: np.ndarray) -> int:
        """Its place."""
        at = self.size
        part = np.concatenate([part.reshape(-1), np.full(-part.size % 4, -1, np.int64)])
        self.parts.append(part)
        self.size += len(part)
        return at

    def rows(self, offset: int, parts: Sequence[tuple[int, int]]) -> int:
        """A vector, its parts padded and in lanes' order."""
        rows = np.full((len(parts), self.d), -1, np.int64)
        for h, (row, width) in enumerate(parts):
            rows[h, :width] = offset + row + np.arange(width)
        return self.put(rows[..., self.order])

    def raw(self, offset: int, parts: Sequence[tuple[int, int]], channels: int, directions: int, step: int) -> int:
        """Matrices [directions, rows of the parts, channels], `step` from one to the next, as [directions, channels, parts d] in lanes' order."""
        rows = np.full((directions, channels, len(parts), self.d), -1, np.int64)
        for h, (row, width) in enumerate(parts):
            found = offset + row * channels + np.arange(width * channels).reshape(width, channels).T
            for d in range(directions):
                rows[d, :, h, :width] = found + d * step
        return self.put(rows[..., self.order])

    def map(self) -> np.ndarray:
        """The parameter of each constant, -1: 0."""
        return np.concatenate([np.zeros(0, np.int64), *self.parts]).astype(np.int32)

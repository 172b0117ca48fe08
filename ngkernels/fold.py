"""Products and sums of small matrices, written down first; an op computes them with the rest of its work."""

from __future__ import annotations

import torch

LEAF, COPY, ADD, MULTIPLY = range(4)  # csrc/fold_call.h holds the same numbers
RECORD = 4  # ints a matrix: op, its two operands (of a leaf: its number and -1), offset in the result or -1


class Matrix:
    """A matrix that is not computed yet. A vector [n] counts as [n, 1]."""

    __slots__ = ("fold", "number", "shape")

    def __init__(self, fold: Fold, number: int, shape: tuple[int, int]):
        self.fold, self.number, self.shape = fold, number, shape

    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    def times(self, other: Matrix) -> Matrix:
        return self.fold.new(MULTIPLY, self.number, other.number, (self.shape[0], other.shape[1]))

    def plus(self, other: Matrix) -> Matrix:
        return self.fold.new(ADD, self.number, other.number, self.shape)


class Fold:
    """What is to be computed from `leaves`, by a `recipe`: its result is a vector of `size` numbers, the stored matrices."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self.leaves: list[torch.Tensor] = []
        self.recipe: list[int] = []
        self.size = 0

    def new(self, op: int, a: int, b: int, shape: tuple[int, int]) -> Matrix:
        self.recipe += (op, a, b, -1)
        return Matrix(self, len(self.recipe) // RECORD - 1, shape)

    def leaf(self, t: torch.Tensor | Matrix) -> Matrix:
        """A vector or matrix, in the dtype of the result, as an operand."""
        if isinstance(t, Matrix):
            return t
        self.leaves.append(t if t.dtype == self.dtype else t.to(self.dtype))
        shape = t.shape
        return self.new(LEAF, len(self.leaves) - 1, -1, shape if len(shape) == 2 else (shape[0], 1))

    def store(self, t: torch.Tensor | Matrix) -> int:
        """Where the matrix will stand in the result: behind what was stored before."""
        matrix = self.leaf(t)
        if self.recipe[RECORD * matrix.number + 3] >= 0:  # it has its place already; another one has a gradient of its own
            matrix = self.new(COPY, matrix.number, -1, matrix.shape)
        self.recipe[RECORD * matrix.number + 3] = at = self.size
        self.size += matrix.numel()
        return at

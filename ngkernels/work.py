"""Work of an op: floating-point operations and bytes, counted from its program and its topology table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .program import ATTEND, HEADER, LIN, MARK, RECORD
from .topology import COLUMNS, KINDS, PARTNER, SPARSE, TRIANGLE

_AT = {name: k for k, name in enumerate(COLUMNS)}


@dataclass(frozen=True)
class Work:
    """`edge_flops`: multiplications and additions of matrix products over edges, 2 for each multiply-add. `node_flops`: of all other matrix
    products. Activations, norms and tables do not count. `bytes`: read and written at least, every tensor once for each op."""

    edge_flops: int = 0
    node_flops: int = 0
    bytes: int = 0

    @property
    def flops(self) -> int:
        return self.edge_flops + self.node_flops

    def __add__(self, other: Work) -> Work:
        return Work(self.edge_flops + other.edge_flops, self.node_flops + other.node_flops, self.bytes + other.bytes)

    def bound_seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """The roofline: no machine of those rates takes less."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


def edges_of(row: Sequence[int]) -> int:
    """Edges that a row of a topology table stands for, partners not counted."""
    kind, n, m = KINDS[row[_AT["kind"]]], row[_AT["n_src"]], row[_AT["n_dst"]]
    each = {"dense": n * m, "diagonal": n, TRIANGLE: n * (n + 1) // 2, SPARSE: row[_AT["count"]]}[kind]
    return row[_AT["copies"]] * each


def program_flops(
    program: Sequence[int], rows: Sequence[Sequence[int]], heads: int, summed: bool, backward: bool, need_weights: bool
) -> int:
    """FLOPs of one call over all rows of its table: the matrix products of every edge (and partner), and for attention the logits,
    weighted values and sums of states.

    A backward pass evaluates everything again and then makes two products for each: the gradient of the matrix and that of the input; the
    latter not where nothing below wants it.
    """
    records = [program[k : k + RECORD] for k in range(HEADER, HEADER + RECORD * program[1], RECORD)]
    marked = max((k for k, r in enumerate(records) if r[0] == MARK), default=-1)  # gradients stop there
    last_pair = max((k for k, r in enumerate(records) if r[0] == LIN and r[9] >= 0), default=0)
    total = 0
    for row in rows:
        both = bool(row[_AT["flags"]] & PARTNER)
        live = len(records) if both else last_pair
        each = sum(_instruction(k, r, k < live, backward and k > marked, need_weights) for k, r in enumerate(records))
        if program[2] == ATTEND:
            d, d_e = program[3], records[program[5] - 1][2]
            each += (2 if both else 1) * (3 if backward else 1) * (2 * d + 2 * heads * d_e * summed)
        total += edges_of(row) * each
    return total


def _instruction(k: int, record: Sequence[int], both: bool, backward: bool, need_weights: bool) -> int:
    """FLOPs of instruction `k` for an edge, its partner included where `both`."""
    if record[0] != LIN or not record[1]:
        return 0
    pair = record[9] >= 0  # both directions of a pair update are a sum and a difference: one product each
    product = 2 * record[1] * record[2] * (2 if both or pair else 1)
    return product * (1 + backward * (1 + (k > 1 or need_weights)))

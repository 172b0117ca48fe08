"""What the ops share on the host: an expression, how it is lowered and cut, and its node terms."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from .. import program as prog
from . import launch, nodes
from .lower import Lowered, cut, lower
from .plan import Cut, plan_of
from .tiles import Tensors

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@lru_cache(maxsize=1024)
def _lowered(program: tuple[int, ...], x_widths: tuple[int, ...], attention: tuple[int, ...]) -> Lowered:
    return lower(program, x_widths, attention)


class Call:
    """One call of an op on an expression.

    Args:
        e: the expression, over its packed parameters [n_params]. low, tf32: whether matrix products may round their operands to bfloat16, to tf32.
        values: tensors by block that are written or read beside the weights. grads: gradients of e's tensors, empty where not wanted.
        attention: heads, columns of queries and values, whether values are multiplied, whether edge states are summed; nodes: their number.
    """

    def __init__(
        self, e: prog.Expression, low: bool, tf32: bool, values: Sequence[torch.Tensor] = (), grads: Sequence[torch.Tensor] = (),
        attention: tuple[int, ...] = (), nodes: int = 0,
    ):  # fmt: skip
        self.xs = [x.contiguous() for x in e.xs]
        self.params, self.table = e.params.contiguous(), e.table.contiguous()
        self.low = _lowered(tuple(e.program), tuple(x.shape[1] for x in e.xs), attention)
        self.plan = plan_of(e.topology, self.params.device)
        self.precision = launch.precision(self.params.dtype, low, tf32)
        self.size, self.options = launch.tile(self.low, self.precision, self.params.device)
        self.steps, self.chunks = launch.constants(self.low.steps), launch.constants(self.low.chunks)
        self.message_chunks = () if attention else launch.constants(tuple(cut(0, self.low.width)))
        self.heads = launch.constants(self.low.attention.flat) if attention else ()
        self.n_nodes = self.xs[0].shape[0] if self.xs else nodes
        self.table_nodes = self.table.shape[1] if self.table.numel() else 0
        w, x = len(e.weights), len(e.xs)
        self.grad_weights, self.grad_xs = grads[:w], grads[w : w + x]
        self.grad_params, self.grad_table = (grads[w + x], grads[w + x + 1]) if len(grads) else (None, None)
        self.grad_carriers = grads[w + x + 2 :]
        self.weights = e.weights
        self.others = self._others()
        self.tensors = Tensors(self.plan.rows, self.plan.packed, self.low.directions, e.weights, self.grad_weights, self.others, values, self.grad_carriers)

    def _others(self) -> list[torch.Tensor | None]:
        """Room for the gradients of weights that partners read and other blocks own (added in the end)."""
        if not self.low.last_pair or not self.grad_weights:
            return []
        read = {0 if self.plan.packed else r.partner for r in self.plan.rows if r.adds_to_partner}
        return [torch.zeros_like(g) if k in read and g.numel() else None for k, g in enumerate(self.grad_weights)]

    def cut(self, work: str) -> Cut:
        """The tiles of all blocks that have edges; of evaluate, of those that have values too."""
        active = None
        if self.low.combine == prog.EMIT and not self.plan.packed:
            active = tuple(k for k in self.plan.active if any(self.tensors.of("values", k, partner) is not None for partner in (False, True)))
        return self.plan.cut(active, tuple(DTYPES.index(w.dtype) for w in self.weights), self.size, self.n_nodes, work, self.low.paired)

    def project(self, first: int = 0, end: int | None = None) -> torch.Tensor:
        """Node terms of the nodes `first` to `end`."""
        return nodes.project(self.low, [x[first:end] for x in self.xs], self.params, self.node_precision)

    @property
    def node_precision(self) -> str:
        """Of the products with node states: there are few, so they are exact."""
        return "float64" if self.precision == "float64" else "ieee"

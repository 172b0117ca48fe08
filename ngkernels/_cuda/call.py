"""What forward and backward share: a call's tensors, tables, packed parameters, node terms and working memory."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from .. import backends
from .. import program as prog
from ..kept import Recent
from ..topology import SAME
from . import launch
from .launch import Some, simple
from .lower import FROM_TABLE, Attention, Lowered, Unsupported, lower
from .memory import PLACES, placed, sum_columns
from .plan import WARPS, plan_of
from .rows import DTYPES, of_block, table_of

FIELDS = (
    "stages", "blocks", "panels", "matrices", "constants", "nodes", "table", "coefficients", "partial", "parameters", "curves", "places", "cells", "n_panels",
    "first_panel", "n_nodes", "columns", "table_nodes", "edge_stages", "message_stages", "channels", "combine", "width", "carrier_width", "steps", "matrices_copied",
    "n_constants", "spread", "low", "high", "need_parameters", "need_nodes", "need_raw", "need_table", "n_slots", "n_gradients", "n_sums", "message_buffer",
    "free_0", "free_1", "inputs_buffer", "live", "partner_0", "partner_1", "partner_inputs", "sum_columns", "q", "k", "v", "lse", "delta", "grad_out", "grad_sums",
    "heads", "dk", "dv", "de", "multiply", "summed", "attention_columns", "dropped_below", "seed", "scale", "keep",
)  # fmt: skip



class Call:
    """One op on an expression, over its packed parameters [n_params].

    Args:
        low, tf32: whether matrix products may round their operands to bfloat16, to tf32. grads: gradients of e's tensors, empty where not
            wanted; None: forward. values: of evaluate, by block, what it writes or the gradients of that; empty where not wanted.
        attention: of attend; nodes: how many there are.

    Raises:
        Unsupported: what the kernels do not run.
    """

    def __init__(
        self, e: prog.Expression, low: bool, tf32: bool, grads: Sequence[torch.Tensor] | None = None, values: Sequence[torch.Tensor] = (),
        attention: Attention | None = None, nodes: int = 0,
    ):  # fmt: skip
        self.params, self.table = e.params.contiguous(), e.table.contiguous()
        if self.params.dtype != torch.float32:
            raise Unsupported(f"{self.params.dtype} parameters")
        wrong = [t.dtype for t in (*e.weights, *values) if t.dtype not in DTYPES]
        if wrong:
            raise Unsupported(f"{wrong[0]} edge values")
        self.device = self.params.device
        self.xs = [x.contiguous() for x in e.xs]
        self.backward = grads is not None
        self.low = lower(tuple(e.program), tuple(x.shape[1] for x in e.xs), len(e.weights), self.backward, attention)
        self.values, self.plan = values, plan_of(e.topology, self.device)
        emits = self.low.combine == prog.EMIT
        self.work = self.plan.work(tuple(k for k in self.plan.active if self._writes(k)) if emits else None)
        self.precision = launch.precision(low, tf32)
        self.n_nodes = self.xs[0].shape[0] if self.xs else nodes
        if self.n_nodes >= 1 << 30:
            raise Unsupported(f"graphs of {self.n_nodes} neurons, 2^30 or more")
        self.weights, w, x = e.weights, len(e.weights), len(e.xs)
        grads = grads or []
        self.grad_weights, self.grad_xs = grads[:w], grads[w : w + x]
        self.grad_params, self.grad_table = (grads[w + x], grads[w + x + 1]) if self.backward else (None, None)
        self.grad_carriers = grads[w + x + 2 :]
        self.other_weights, self.other_carriers = self.others(self.grad_weights, "partner", "partner_offset"), self.others(self.grad_carriers, "partner_block", "partner_emit_offset")
        self.tables = tables_of(self.low, self.device)
        lists = (self.weights, self.grad_weights, values, self.grad_carriers, self.other_weights, self.other_carriers)
        self.blocks = table_of(self.plan, self.work, self.low.affine, self.low.directions > 1, lists)
        purpose = "attend" if attention else "options" if self.low.full else "messages"
        self.kernel = launch.edge_kernel(purpose, self.low.d, self.precision, self.backward)

    def others(self, grads: Sequence[torch.Tensor], name: str, offset: str) -> list[torch.Tensor]:
        """Room for what partners add to gradients that the edges of other blocks own; empty where there is nothing."""
        if not self.low.live or not len(grads):
            return []
        rows = [r for r in (self.plan.rows[k] for k in self.work.active) if name != "partner" or not r.flags & SAME]
        read = {0 if getattr(r, offset) >= 0 else getattr(r, name) for r in rows if getattr(r, name) >= 0}
        return [torch.zeros_like(g) if k in read and g.numel() else g.new_empty(0) for k, g in enumerate(grads)]

    def add_others(self) -> None:
        """To the gradients, what partners have added beside them."""
        for grads, others in ((self.grad_weights, self.other_weights), (self.grad_carriers, self.other_carriers)):
            for grad, other in zip(grads, others, strict=False):
                if other.numel():
                    grad += other

    def _writes(self, k: int) -> bool:
        found = of_block(self.values, self.plan.rows[k])
        return found is not None and found.numel() > 0

    # ---- what kernels read ----
    def packed(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(matrices as fragments, constants)."""
        _, matrices, constants, *_ = self.tables
        bf16 = self.precision == "bf16"
        out = self.params.new_empty(matrices.numel(), dtype=torch.bfloat16 if bf16 else torch.float32), self.params.new_empty(constants.numel())
        for to, where, rounded in zip(out, (matrices, constants), (bf16, False), strict=True):
            simple("gather", where.numel(), self.params, where, to, where.numel(), int(rounded))
        return out

    def project(self, first: int = 0, end: int | None = None) -> dict[str, int | Some]:
        """The arguments that tell of the node terms of the nodes `first` to `end`: [2, nodes, columns], as destinations and as sources."""
        n = (self.n_nodes if end is None else end) - first
        out, where = self.params.new_empty(2, n, self.low.columns), self.tables[6]
        if out.numel():
            weights, addresses = self.params.new_empty(where.shape), launch.numbers([x[first:].data_ptr() for x in self.xs], self.device)
            simple("gather", where.numel(), self.params, where, weights, where.numel(), 0)
            simple("project", out.numel(), out, addresses, self.tables[4], self.tables[3], weights, self.params, n, self.low.columns, where.shape[1])
        return {"nodes": Some(out, first), "n_nodes": n}

    # ---- launches ----
    def fields(self) -> dict[str, int | torch.Tensor | Some | None]:
        """The arguments that do not change from launch to launch."""
        low = self.low
        matrices, constants = self.packed()
        names = prog.reductions(low.mask)
        found = dict.fromkeys(FIELDS, 0)
        found |= {"stages": self.tables[0], "blocks": self.blocks, "matrices": matrices, "constants": constants, "columns": low.columns}
        curve = next((s for s in low.stages if s.source == FROM_TABLE), None)
        found |= {"table": None if curve is None else launch.arranged(self.table.view(*self.table.shape[:3], curve.halves, curve.width), low.d)}
        found |= {"table_nodes": self.table.shape[1] if low.steps >= 0 else 0, "edge_stages": low.edge_stages}
        found |= {"message_stages": len(low.stages) - low.edge_stages, "channels": low.channels, "combine": low.combine, "width": low.width, "carrier_width": low.carrier_width}
        found |= {"steps": max(low.steps, 0), "n_constants": constants.numel(), "spread": int("std" in names or "var" in names)}
        found |= {"low": int("min" in names), "high": int("max" in names), "n_slots": low.slots, "n_gradients": low.n_gradients, "n_sums": low.n_sums}
        found |= {"live": low.live, "sum_columns": sum_columns(self.low)}
        return found | dict(zip(("message_buffer", "free_0", "free_1", "inputs_buffer", "partner_0", "partner_1", "partner_inputs"), low.buffers, strict=True))

    def run(self, fields: dict, panels: torch.Tensor) -> None:
        """Launches the panels, in as many launches as memory that does not fit into shared memory asks for."""
        if (note := backends.planned(self.params)) is not None:
            note(*fields.values(), panels, *(t for listed in self.plan.listed.values() for t in listed))
        blocks = -(-len(panels) // WARPS)
        inside, outside, copied = placed(self.low, self.precision, self.backward, launch.shared_limit(self.device))
        each = sum(outside.values())
        wave = launch.multiprocessors(self.device)
        most = max(1, launch.BUDGET // each // wave) * wave if each else blocks  # whole waves
        room = self.params.new_empty(min(blocks, most) * each, dtype=torch.uint8) if each else None
        places, begin = {name: (0, offset, 0) for name, (offset, _) in inside.items()}, 0
        for name, size in outside.items():
            places[name] = (room.data_ptr() + begin, 0, size)
            begin += size * min(blocks, most)
        shared = max([0, *(offset + size for offset, size in inside.values())])
        parameters = fields["parameters"]
        for first in range(0, blocks, most):
            now = fields | {"panels": panels, "n_panels": len(panels), "first_panel": first * WARPS, "matrices_copied": copied}
            if isinstance(parameters, torch.Tensor):
                now["parameters"] = parameters[first:]
            args = [launch.address(now[name]) for name in FIELDS] + [v for name in PLACES for v in places.get(name, (0, 0, 0))]
            launch.run(self.kernel, args, min(most, blocks - first), shared, self.device)


_tables = Recent(1024)


def tables_of(low: Lowered, device: torch.device) -> tuple[torch.Tensor, ...]:
    """(stages, maps of matrices and constants, node terms, term of each of their columns, places of the parameters' gradients, map of the node
    terms' matrices [destinations and sources, widest state, columns]) on a device."""
    # low is kept beside them: so long its id is its own
    return _tables.get((id(low), device), lambda: (low, tuple(t.to(device) for t in _tables_on_host(low))))[1]


def _tables_on_host(low: Lowered) -> tuple[torch.Tensor, ...]:
    owners = [-1] * low.columns
    weights = np.full((2, max([0, *(t.width for t in low.terms)]), low.columns), -1, np.int32)
    for k, t in enumerate(low.terms):
        owners[t.column : t.column + t.n_out] = [k] * t.n_out
        for side, first in enumerate((t.wd, t.ws)):
            weights[side, : t.width, t.column : t.column + t.n_out] = first + np.arange(t.n_out * t.width).reshape(t.n_out, t.width).T
    stages = torch.tensor(low.stages, dtype=torch.int32)
    terms = torch.tensor(low.terms, dtype=torch.int64)
    maps = (torch.tensor(m) for m in (low.matrices, low.constants))
    return stages, *maps, terms, torch.tensor(owners, dtype=torch.int64), torch.tensor(low.gradients), torch.tensor(weights)


@lru_cache(maxsize=256)
def slots_of(mask: int) -> tuple[int, ...]:
    """Slots of csrc/cuda/second_stage.h."""
    names = prog.reductions(mask)
    mean_aux, ties = prog.aux_slots(mask)
    at = {name: k for k, name in enumerate(names)}
    low, high = (at.get(name, -1) for name in ("min", "max"))
    return (
        at.get("sum", -1), at.get("mean", -1), low, high, at.get("std", -1), at.get("var", -1), mean_aux, 0 if low >= 0 else -1,
        int(low >= 0) if high >= 0 else -1, len(names), ties,
    )  # fmt: skip

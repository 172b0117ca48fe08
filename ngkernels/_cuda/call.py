"""What forward and backward share: a call's tensors, tables, packed parameters, node terms and working memory."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from .. import program as prog
from ..topology import DENSE, KINDS
from . import launch
from .launch import simple
from .lower import Lowered, Unsupported, lower
from .plan import WARPS, Launch, Row, plan_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FIELDS = (
    "stages", "blocks", "panels", "matrices", "constants", "nodes", "table", "coefficients", "partial", "parameters", "curves", "places", "cells", "n_panels",
    "first_panel", "n_nodes", "columns", "table_nodes", "edge_stages", "message_stages", "channels", "combine", "width", "carrier_width", "steps", "matrices_copied",
    "n_constants", "spread", "low", "high", "need_parameters", "need_nodes", "need_raw", "need_table", "n_slots", "n_gradients", "n_sums", "message_buffer",
    "free_0", "free_1", "inputs_buffer",
)  # fmt: skip
PLACES = ("features", "stash", "carry", "statistics", "sources", "sums", "waiting", "copied", "constants_copied", "staged", "gradients")  # args.h
SHARED_FIRST = ("constants_copied", "features", "staged", "carry", "statistics", "stash", "sources", "waiting", "sums", "copied", "gradients")
STATISTIC_PLANES, MESSAGE_PLANES, HERMITE, LANES = 6, 7, 16, 32
NO_VALUES = (0,) * 6


class Call:
    """One aggregate of an expression, over its packed parameters [n_params].

    Args:
        low, tf32: whether matrix products may round their operands to bfloat16, to tf32. grads: gradients of e's tensors, empty where not
            wanted; None: forward. values: of evaluate, by block, what it writes or the gradients of that; empty where not wanted.

    Raises:
        Unsupported: what the kernels do not run.
    """

    def __init__(self, e: prog.Expression, low: bool, tf32: bool, grads: Sequence[torch.Tensor] | None = None, values: Sequence[torch.Tensor] = ()):
        self.params, self.table = e.params.contiguous(), e.table.contiguous()
        if self.params.dtype != torch.float32:
            raise Unsupported(f"{self.params.dtype} parameters")
        wrong = [t.dtype for t in (*e.weights, *values) if t.dtype not in DTYPES]
        if wrong:
            raise Unsupported(f"{wrong[0]} edge values")
        self.device = self.params.device
        self.xs = [x.contiguous() for x in e.xs]
        self.backward = grads is not None
        self.low = lower(tuple(e.program), tuple(x.shape[1] for x in e.xs), len(e.weights), self.backward)
        self.values, self.plan = values, plan_of(e.topology, self.device)
        self.plan.check()
        emits = self.low.combine == prog.EMIT
        self.work = self.plan.work(tuple(k for k in self.plan.active if self.owned(values, self.plan.rows[k]) is not None) if emits else None)
        self.precision = launch.precision(low, tf32)
        self.n_nodes = self.xs[0].shape[0] if self.xs else 0
        self.weights, w, x = e.weights, len(e.weights), len(e.xs)
        grads = grads or []
        self.grad_weights, self.grad_xs = grads[:w], grads[w : w + x]
        self.grad_params, self.grad_table = (grads[w + x], grads[w + x + 1]) if self.backward else (None, None)
        self.grad_carriers = grads[w + x + 2 :]
        self.tables = tables_of(self.low, self.device)
        self.blocks = torch.tensor([v for k in self.work.active for v in self._block(k)], dtype=torch.int64).to(self.device)
        self.kernel = launch.aggregate_kernel(self.low.d, self.precision, self.backward)

    # ---- tables ----
    def _block(self, k: int) -> list[int]:
        r, low = self.plan.rows[k], self.low
        affine = -1 if low.affine < 0 or r.weight < 0 else low.affine + 2 * r.weight
        head = [r.n_src, r.n_dst, r.src, r.dst, r.node_stride, r.out, r.out_stride, r.variant if low.directions > 1 else 0, affine, int(self.work.turns[k] > 0)]
        head += [t.data_ptr() for t in self.plan.lists[k]] if k in self.plan.lists else [0, 0]
        raw = (values_of(r, tensors[r.weight] if len(tensors) and r.weight >= 0 else None, r.src_axis == 2, r.offset, r.edge_stride) for tensors in (self.weights, self.grad_weights))
        own = (values_of(r, self.owned(tensors, r), False, r.emit_offset, r.emit_stride) for tensors in (self.values, self.grad_carriers))
        return [*head, *(v for view in (*raw, *own) for v in view)]

    @staticmethod
    def owned(tensors: Sequence[torch.Tensor], r: Row) -> torch.Tensor | None:
        """What a block has of tensors by block; a packed graph has one of all."""
        found = tensors[0 if r.emit_offset >= 0 else r.block] if len(tensors) else None
        return found if found is not None and found.numel() else None

    def packed(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(matrices as fragments, constants)."""
        _, matrices, constants, *_ = self.tables
        bf16 = self.precision == "bf16"
        out = self.params.new_empty(matrices.numel(), dtype=torch.bfloat16 if bf16 else torch.float32), self.params.new_empty(constants.numel())
        for to, where, rounded in zip(out, (matrices, constants), (bf16, False), strict=True):
            simple("gather", where.numel(), self.params, where, to, where.numel(), int(rounded))
        return out

    def project(self) -> torch.Tensor:
        """[2, N, columns]: the node terms of all nodes as destinations and as sources."""
        out = self.params.new_empty(2, self.n_nodes, self.low.columns)
        addresses = torch.tensor([x.data_ptr() for x in self.xs], dtype=torch.int64).to(self.device)
        simple("project", out.numel(), out, addresses, self.tables[4], self.tables[3], self.params, self.n_nodes, self.low.columns)
        return out

    # ---- launches ----
    def fields(self, nodes: torch.Tensor) -> dict[str, int | torch.Tensor | None]:
        """The arguments that do not change from launch to launch."""
        low = self.low
        matrices, constants = self.packed()
        names = prog.reductions(low.mask)
        found = dict.fromkeys(FIELDS, 0)
        found |= {"stages": self.tables[0], "blocks": self.blocks, "matrices": matrices, "constants": constants, "nodes": nodes}
        found |= {"table": self.table if low.steps >= 0 else None, "n_nodes": self.n_nodes, "columns": low.columns}
        found |= {"table_nodes": self.table.shape[1] if low.steps >= 0 else 0, "edge_stages": low.edge_stages}
        found |= {"message_stages": len(low.stages) - low.edge_stages, "channels": low.channels, "combine": low.combine, "width": low.width, "carrier_width": low.carrier_width}
        found |= {"steps": max(low.steps, 0), "n_constants": constants.numel(), "spread": int("std" in names or "var" in names)}
        found |= {"low": int("min" in names), "high": int("max" in names), "n_slots": low.slots, "n_gradients": low.n_gradients, "n_sums": low.n_sums}
        return found | dict(zip(("message_buffer", "free_0", "free_1", "inputs_buffer"), low.buffers, strict=True))

    def run(self, fields: dict, work: Launch) -> None:
        """Launches the panels of `work`, in as many launches as memory that does not fit into shared memory asks for."""
        blocks = -(-work.n // WARPS)
        inside, outside, copied = self.memory()
        each = sum(outside.values())
        most = max(1, launch.BUDGET // each) if each else blocks
        room = self.params.new_empty(min(blocks, most) * each, dtype=torch.uint8) if each else None
        places, begin = {name: (0, offset, 0) for name, (offset, _) in inside.items()}, 0
        for name, size in outside.items():
            places[name] = (room.data_ptr() + begin, 0, size)
            begin += size * min(blocks, most)
        shared = max([0, *(offset + size for offset, size in inside.values())])
        parameters = fields["parameters"]
        for first in range(0, blocks, most):
            now = fields | {"panels": work.panels, "n_panels": work.n, "first_panel": first * WARPS, "matrices_copied": copied}
            if isinstance(parameters, torch.Tensor):
                now["parameters"] = parameters[first:]
            args = [launch.address(now[name]) for name in FIELDS] + [v for name in PLACES for v in places.get(name, (0, 0, 0))]
            launch.run(self.kernel, args, min(most, blocks - first), shared, self.device)

    def sizes(self) -> dict[str, int]:
        """Bytes of each kind of working memory of a block of threads."""
        low, kb, warp = self.low, self.low.d // 16, 4 * WARPS
        element = 2 if self.precision == "bf16" else 4
        found = {
            "features": warp * 16 * (2 * low.channels + (HERMITE if low.steps >= 0 else 0)),
            "stash": warp * low.slots * kb * 256,
            "carry": WARPS * kb * LANES * 8 * element,
            "copied": low.matrices.size * element,
            "constants_copied": 4 * low.constants.size,
        }
        if not self.backward:
            return found | {"statistics": warp * (STATISTIC_PLANES + 1) * -(-low.width // 16) * LANES * 4}
        held = any(s.held for s in low.stages)
        return found | {
            "sources": warp * low.columns * 16,
            "sums": warp * low.n_sums * LANES * 4,
            "waiting": warp * kb * 256 if held else 0,
            "staged": (low.buffers[3] + 1) * WARPS * 16 * (low.d + 8) * element,
            "gradients": 4 * low.n_gradients * kb * kb * 256,
        }

    def memory(self) -> tuple[dict[str, tuple[int, int]], dict[str, int], int]:
        """(offset and size of what lies in shared memory, bytes of what a block has in global memory, elements of the matrices copied)."""
        limit, used = launch.shared_limit(self.device), 0
        inside, outside, sizes, copied = {}, {}, self.sizes(), 0
        for name in SHARED_FIRST:
            size = -(-sizes.get(name, 0) // 128) * 128
            if not size:
                continue
            if used + size <= limit:
                inside[name] = (used, size)
                used += size
                copied = self.low.matrices.size if name == "copied" else copied
            elif name in ("constants_copied", "features", "staged"):
                raise Unsupported(f"{name} of {size} bytes beside {used} in {limit} bytes of shared memory: registers this wide, rounded to {self.precision},")
            elif name != "copied":
                outside[name] = size
        return inside, outside, copied


def values_of(r: Row, t: torch.Tensor | None, flip: bool, offset: int, stride: int) -> tuple[int, ...]:
    """A block's view of edge values (args.h Values), zeros where there are none.

    Args:
        flip: the tensor's first axis runs over destinations. offset, stride: of a packed graph, the block's first edge and edges from one
            copy to the next; else offset is -1.
    """
    if t is None or not t.numel():
        return NO_VALUES
    listed = KINDS[r.kind] != DENSE  # by number
    if offset >= 0:  # rows of one tensor [E, C]
        e = t.stride(0)
        source, destination = (e, 0) if listed else (e, r.n_src * e) if flip else (r.n_dst * e, e)
        start, copy, channel = offset * e, stride * e, t.stride(1)
    elif listed:
        start, copy, source, destination, channel = 0, t.stride(0), t.stride(1), 0, t.stride(2)
    else:
        start, copy, source, destination, channel = 0, t.stride(0), t.stride(2 if flip else 1), t.stride(1 if flip else 2), t.stride(3)
    return t.data_ptr() + start * t.element_size(), DTYPES.index(t.dtype), copy, source, destination, channel


_tables: dict = {}


def tables_of(low: Lowered, device: torch.device) -> tuple[torch.Tensor, ...]:
    """(stages, maps of matrices and constants, node terms, term of each of their columns, places of the parameters' gradients) on a device."""
    key = (id(low), device)
    if key not in _tables:
        owners = [-1] * low.columns
        for k, t in enumerate(low.terms):
            owners[t.column : t.column + t.n_out] = [k] * t.n_out
        stages = torch.tensor(low.stages, dtype=torch.int32)
        terms = torch.tensor(low.terms, dtype=torch.int64)
        maps = (torch.from_numpy(m) for m in (low.matrices, low.constants))
        tables = (stages, *maps, terms, torch.tensor(owners, dtype=torch.int64), torch.from_numpy(low.gradients))
        _tables[key] = (low, tuple(t.to(device) for t in tables))  # low: as long as it is kept, its id is its own
        while len(_tables) > 1024:
            _tables.pop(next(iter(_tables)))
    return _tables[key][1]


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

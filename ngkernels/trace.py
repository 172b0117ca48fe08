"""What a computation allocates and how much it works, found by running it on tensors without values (device "meta")."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from . import backends
from .encoders import grid_values
from .topology import rows_of
from .work import Work, program_flops

_SPACES = ("ngkernels", "ngkernels_C")
_OPS = {f"{space}.{name}{back}.default" for space in _SPACES for name in ("aggregate", "attend", "evaluate") for back in ("", "_backward")}
_NODE_MAPS = {f"{space}.node_map{back}.default" for space in _SPACES for back in ("", "_backward")}
_KERNELS = _OPS | _NODE_MAPS
_TABLES = {"ngkernels.tabulate.default", "ngkernels.tabulate_backward.default"}
_FREE = {"aten.detach.default", "aten.lift_fresh.default", "ngkernels.carry.default"}


@dataclass
class Scratch:
    """Bytes of memory that kernels keep from call to call: once, and for each worker."""

    shared: int = 0
    workers: int = 0


class Trace(TorchDispatchMode):
    """Follows the tensors of device "meta" that are alive, and counts the work of every op.

    Args:
        threads: workers of the kernels, each with memory of its own.
        mapped: tensors that are views of files and take no memory.
        gpu: they stand for tensors of a GPU: the host side of its kernels runs, so that what it allocates is followed too.

    Attributes: live, peak: bytes of tensors alive now and at most, what kernels need beside them included. work: Work so far.
    """

    def __init__(self, threads: int = 1, mapped: Sequence[torch.Tensor] = (), gpu: bool = False):
        super().__init__()
        self.threads, self.live, self.peak, self.work = threads, 0, 0, Work()
        self.gpu, self.scratch = gpu, Scratch()
        self.mapped = bool(mapped)
        self._seen: set[int] = set()
        self._planning: list = []
        self._grids: set[tuple] = set()
        for t in mapped:
            self._register(t, 0)

    def __enter__(self):
        if self.gpu:
            self._planning.append(backends.planning(self.hold))
            self._planning[-1].__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        if self.gpu:
            self._planning.pop().__exit__(*error)
        return super().__exit__(*error)

    def hold(self, *values) -> None:
        """Counts the tensors among the values, which were made elsewhere, as alive."""
        for t in values:
            if isinstance(t, torch.Tensor):
                self._register(t)
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # The engine adds gradients that meet in place, where nobody else holds the first; it would not here, because this class looks at it.
        meets = func is torch.ops.aten.add.Tensor and _called_by_engine()
        implementation = backends.implementations.get(func) if self.gpu and str(func) in _KERNELS else None
        if implementation is not None:
            out = self._implemented(implementation, args)
        else:
            out = args[0] if meets and args[0].shape == args[1].shape else func(*args, **(kwargs or {}))
        found = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.is_meta]
        if not found:
            return out
        name, call = str(func), 0
        in_files = self._gradients_in_files(name, args, out)
        for t in found:
            self._register(t, 0 if any(t is g for g in in_files) else None)
        if name in _OPS:
            call = self._kernel(name, args, found)
        else:
            self._plain(func, name, args, kwargs or {}, out, found)
        self.peak = max(self.peak, self.live + self.scratch.shared + self.scratch.workers + call)
        return out

    def _implemented(self, implementation: Callable, args):
        """What an op does on a GPU; its work is counted as a whole."""
        work = self.work
        with self:
            out = implementation(*args)
        self.work = work
        return out

    def _gradients_in_files(self, name: str, args, out) -> list[torch.Tensor]:
        """The gradients of weights among the results of an op, where weights are mapped: their gradients are too."""
        if not self.mapped or name not in _OPS or not name.endswith("_backward.default"):
            return []
        return out[: len(_Call(name, args).weights)]

    def _register(self, t: torch.Tensor, size: int | None = None) -> None:
        storage = t.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        size = storage.nbytes() if size is None else size
        self._seen.add(key)
        self.live += size
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size

    def _plain(self, func, name: str, args, kwargs, out, found) -> None:
        """An op of PyTorch: what it reads and writes once, unless it only looks at a tensor in another way."""
        formula = flop_registry.get(getattr(func, "overloadpacket", None))
        flops = int(formula(*args, **kwargs, out_val=out)) if formula else 0
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.is_meta]
        own = {t.untyped_storage()._cdata for t in inputs}
        view = not func._schema.is_mutable and all(t.untyped_storage()._cdata in own for t in found)
        moved = 0 if view or name in _FREE else sum(map(_bytes, inputs)) + sum(map(_bytes, found))
        if name in _TABLES:
            flops = self._grid(args, found[0])
        if name in _NODE_MAPS:
            flops = _node_map_flops(args, name.endswith("_backward.default"))
        self.work = self.work + Work(0, flops, moved)

    def _grid(self, args, out: torch.Tensor) -> int:
        """Operations of the product with a grid, whose factors are kept from the first one on."""
        values, frequencies, direction, k, half = args
        size, products = grid_values(k, half, 2 * frequencies.shape[0])
        key = (frequencies.untyped_storage()._cdata, direction, k, half)
        if key not in self._grids:
            self._grids.add(key)
            self.live += size * values.element_size()
        width = out.shape[2] if out.dim() == 3 else values.shape[2]
        return 2 * products * width

    def _kernel(self, name: str, args, found) -> int:
        """One of the engine's ops; returns the bytes that it takes while it runs, and notes those that it keeps."""
        call = _Call(name, args)
        backward = name.endswith("_backward.default")
        flops = program_flops(call.program, call.rows, call.heads, call.summed, backward, call.need_weights)
        inputs = [t for t in tree_leaves(args) if isinstance(t, torch.Tensor) and t.is_meta]
        self.work = self.work + Work(flops, 0, sum(map(_bytes, inputs)) + sum(map(_bytes, found)) * (2 if backward else 1))
        shared, worker, during, most = (0, 0, 0, 1) if self.gpu else call.workspace(backward)
        self.scratch.shared = max(self.scratch.shared, shared)
        self.scratch.workers = max(self.scratch.workers, worker * max(1, min(self.threads, most)))
        return during


class _Call:
    """The arguments of one of the engine's ops."""

    def __init__(self, name: str, args):
        first = {"aggregate": 4, "evaluate": 1, "attend": 5}[name.split(".")[1].removesuffix("_backward")] if "_backward" in name else 0
        self.weights, self.xs, self.params, self.table, self.carriers, self.topology, self.program = args[first : first + 7]
        rest = args[first + 7 :]
        self.shape, self.heads, self.summed, self.compute = [], 0, False, args[-1]
        if name.split(".")[1].startswith("attend"):
            q, _, v, shape = rest[:4]
            self.shape, self.heads, self.summed = [*shape, q.shape[1], v.shape[1]], shape[0], bool(shape[2])
            self.nodes = q.shape[0]
        if "_backward" in name:
            need, self.compute = args[-1], args[-2]
            self.need_weights = any(need[: len(self.weights)])
            self.out_rows = args[0].shape[0] if first > 1 else 0
        else:
            self.need_weights = False
            self.out_rows = int(rest[-2]) if first == 0 and "evaluate" not in name else 0
        self.rows = rows_of(self.topology).tolist()

    def workspace(self, backward: bool) -> tuple[int, int, int, int]:
        """(shared, for each worker, of the call, most workers) in bytes; nothing where there are no compiled kernels."""
        if backends.why_not("cpp") is not None:
            return 0, 0, 0, 1

        def stand_in(t: torch.Tensor) -> torch.Tensor:  # memory that nobody touches
            return torch.empty(t.shape, dtype=t.dtype, device="cpu")

        weights = [torch.empty((), dtype=t.dtype, device="cpu").expand(t.shape) for t in self.weights]
        tensors = (
            weights,
            [stand_in(x) for x in self.xs],
            [torch.zeros(p.shape, dtype=p.dtype, device="cpu") for p in self.params],
            stand_in(self.table),
            self.topology,
        )
        with torch._C._DisableTorchDispatch():
            return tuple(
                torch.ops.ngkernels_C.workspace(*tensors, list(self.program), self.compute & 1, self.shape, self.out_rows, backward)
            )


def _node_map_flops(args, backward: bool) -> int:
    """Products of a row with [W_x | W_s ..]; a backward pass makes them again, and two more for each."""
    x, maps = args[2 * backward], args[2 * backward + 2]
    return 2 * x.shape[0] * maps[0].numel() * (3 if backward else 1)


def _bytes(t: torch.Tensor) -> int:
    """Bytes of a tensor; what is repeated (stride 0) is there once."""
    count = t.element_size()
    for size, stride in zip(t.shape, t.stride()):
        count *= 1 if stride == 0 and size > 1 else size
    return count


def _called_by_engine() -> bool:
    """Whether the op that is being traced was called by autograd's engine itself, and not by a backward function written in Python."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_name in ("__torch_dispatch__", "_fn", "inner"):  # PyTorch's wrappers of a mode
        frame = frame.f_back
    return frame is not None and frame.f_code.co_name == "_engine_run_backward"

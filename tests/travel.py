"""Ops on a GPU of tensors that a test has left on the CPU: the tensors of each call travel to the device, and what was written travels back.

So every test of a backend's values runs on the device, wherever it makes its tensors; what is on the device already stays there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.utils._pytree import tree_map

from ngkernels import backends
from ngkernels.ops import _cuda, _triton
from ngkernels.program import Expression

OPS = ("aggregate", "aggregate_backward", "evaluate", "evaluate_backward", "attend", "attend_backward")
NODES = ("node_map", "node_map_backward")  # of Triton alone


class Twins:
    """Copies on `device` of the memory of CPU tensors: views of one memory are views of one copy, with the same strides."""

    def __init__(self, device: torch.device):
        self.device = device
        self.memory: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def of(self, t: object) -> object:
        if not isinstance(t, torch.Tensor) or t.device.type != "cpu":
            return t
        here = t.untyped_storage()
        if here._cdata not in self.memory:
            self.memory[here._cdata] = here, torch.UntypedStorage(here.nbytes(), device=self.device).copy_(here)
        there = self.memory[here._cdata][1]
        return torch.empty(0, dtype=t.dtype, device=self.device).set_(there, t.storage_offset(), t.shape, t.stride())

    def argument(self, a: object) -> object:
        """Tensors of an argument. An expression's table of its graph is the host's: plans are found by it."""
        there = tree_map(self.of, a)
        return there._replace(topology=a.topology) if isinstance(a, Expression) else there

    def bring_back(self) -> None:
        """What was written. What was only read may be a file that nobody can write to."""
        for here, there in self.memory.values():
            now = there.cpu()
            if not torch.equal(_bytes(now), _bytes(here)):
                here.copy_(now)


def _bytes(memory: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(memory)


def travelling(function: Callable[..., None], device: torch.device) -> Callable[..., None]:
    """`function`, which writes its results into its arguments, on `device`."""

    @functools.wraps(function)
    def there_and_back(*arguments) -> None:
        twins = Twins(device)
        function(*map(twins.argument, arguments))
        twins.bring_back()

    return there_and_back


@contextmanager
def to(device: torch.device) -> Iterator[None]:
    """Inside, the Triton and CUDA kernels take CPU tensors as well."""
    replaced = [(module, name, getattr(module, name)) for module, names in ((_triton, OPS + NODES), (_cuda, OPS)) for name in names]
    reasons = [(backends, name, getattr(backends, name)) for name in ("_triton", "_cuda")]
    for module, name, function in replaced:
        setattr(module, name, travelling(function, device))
    for module, name, why_not in reasons:
        setattr(module, name, lambda of, why_not=why_not: why_not(device if of is not None and of.type == "cpu" else of))
    try:
        yield
    finally:
        for module, name, was in replaced + reasons:
            setattr(module, name, was)

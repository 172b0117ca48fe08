"""What is made once and kept."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary


def kept(cache: dict, key, make: Callable):
    """cache[key], made now if it is not there: never of inference tensors, which a later training step could not use."""
    if key not in cache:
        if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
            cache[key] = make()
        else:
            with torch.inference_mode(False):
                cache[key] = make()
    return cache[key]


def capturing() -> bool:
    """Whether what is launched is recorded as a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


_captured: dict[int, Any] = {}


class Recent:
    """What GPU kernels read beside tensors: up to `most` values, those asked for last; each is made where it is not there.

    They may be made on one stream and read on another, so that the device is waited for when one is made or dropped. A CUDA graph reads again in every replay what it was captured with, so that is kept for good; and what is made waits for the device, which
    cannot be captured.

    Raises:
        RuntimeError: from `get`, of what would have to be made in a capture.
    """

    def __init__(self, most: int):
        self.most = most
        self._values: dict = {}
        self._lock = threading.RLock()

    def get(self, key, make: Callable[[], Any]):
        with self._lock:
            if (value := self._values.pop(key, None)) is None:
                value = self._made(make)
            self._values[key] = value
        return hold(value)

    def _made(self, make: Callable[[], Any]):
        if capturing():
            raise RuntimeError(
                "ngkernels: expected a step that has run before it is captured as a CUDA graph, with tensors of the same sizes, strides and dtypes "
                "(its tables go to the device in the first run), got one that has not; run it once, then capture it"
            )
        value = make()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        while len(self._values) >= self.most:
            self._values.pop(next(iter(self._values)))
        return value


def hold(value):
    """The value, kept for good if a CUDA graph is being captured."""
    if capturing():
        _captured[id(value)] = value
    return value


class OfTopology:
    """What is made of topology tables on a device, `make(topology, device)`: found by the tensor itself, else by its content."""

    def __init__(self, make: Callable[[torch.Tensor, torch.device], Any]):
        self._make, self._by_content = make, Recent(64)
        self._by_identity: dict[torch.device, WeakIdKeyDictionary] = {}

    def __call__(self, topology: torch.Tensor, device: torch.device):
        known = self._by_identity.setdefault(device, WeakIdKeyDictionary())
        if (found := known.get(topology)) is None:
            key = (device, topology.cpu().numpy().tobytes())
            found = known[topology] = self._by_content.get(key, lambda: self._make(topology, device))
        return hold(found)

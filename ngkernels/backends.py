"""Which implementation of an op runs: chosen by what is there, or forced. Never a silent fallback."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves

from . import measured

OPS = ("aggregate", "attend", "readout", "checkpoint", "node_map")
BACKENDS = ("reference", "cpp", "triton", "cuda")

_forced: list[str] = []
_emulated: list[ctypes.CDLL] = []
_planned: list[Callable[..., None]] = []
implementations: dict[torch._ops.OpOverload, Callable] = {}  # by op: what it does where no C++ kernel does it
_load_error: str | None = None
_loaded = False
_warned = False


def _library() -> str | None:
    """None when the C++ library is loaded, else the reason why not."""
    global _loaded, _load_error
    if not _loaded:
        _loaded = True
        try:
            importlib.import_module("ngkernels._C")
        except ImportError as error:
            _load_error = f"the C++ library is not there ({error}); install with a C++ compiler and without NGKERNELS_BUILD=none"
    return _load_error


def _triton(device: torch.device | None) -> str | None:
    """None when the Triton kernels run on `device` (None: on some device of this machine), else the reason why not."""
    try:
        import triton  # noqa: F401  a statement, and the variable below instead of triton.knobs: torch.compile comes through here
    except ImportError as error:
        return f"Triton is not there ({error}); install with: pip install triton"
    if _planned:
        return None if device is None or device.type == "cuda" else f"plans are made for cuda tensors, got {device}"
    if os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y"):
        return None if device is None or device.type == "cpu" else f"TRITON_INTERPRET=1 is set: its interpreter runs on cpu tensors, got {device}"
    if device is not None and device.type != "cuda":
        return f"it runs on cuda tensors (on cpu tensors in a process with TRITON_INTERPRET=1 only), got {device}"
    if not torch.cuda.is_available():
        return "no CUDA device is there; a process with TRITON_INTERPRET=1 runs its kernels on cpu tensors, slowly"
    capability = torch.cuda.get_device_capability(device)
    return None if capability >= (8, 0) else f"it needs compute capability 8.0 or newer, the device has {capability[0]}.{capability[1]}"


def tf32() -> bool:
    """Whether PyTorch's own matrix products on a GPU may round their operands to tf32."""
    matmul = torch.backends.cuda.matmul
    # torch.compile reads the older setting alone, which PyTorch refuses to tell once the newer one was set
    return matmul.allow_tf32 if torch.compiler.is_compiling() else matmul.fp32_precision == "tf32"


def emulated() -> ctypes.CDLL | None:
    """The library in which the CUDA kernels run on the CPU, inside `emulate_cuda`."""
    return _emulated[-1] if _emulated else None


@contextlib.contextmanager
def emulate_cuda(path: Path) -> Iterator[None]:
    """The CUDA kernels run on CPU tensors inside the context, from a library of csrc/cuda/emulated.cpp: for tests, slowly."""
    _emulated.append(ctypes.CDLL(str(path)))
    try:
        yield
    finally:
        _emulated.pop()


@contextlib.contextmanager
def planning(note: Callable[..., None]) -> Iterator[None]:
    """Tensors of device "meta" stand for those of a GPU inside the context; kernels are not launched, and `note` is given their arguments."""
    _planned.append(note)
    try:
        yield
    finally:
        _planned.pop()


def planned(*arguments) -> Callable[..., None] | None:
    """What takes note of the arguments of kernels, inside `planning`. None outside, and for tensors of a GPU, which another thread may have."""
    if not _planned or any(isinstance(t, torch.Tensor) and t.is_cuda for t in tree_leaves(arguments)):
        return None
    return _planned[-1]


@lru_cache
def _no_code(device: int) -> int:
    """0: the library has code for this GPU, else an error of CUDA."""
    return torch.ops.ngkernels_C.cuda_runs(device)


def _cuda(device: torch.device | None) -> str | None:
    """None when the CUDA kernels (node_map: plain PyTorch) run on `device`, else the reason why not."""
    if _emulated and not _planned:
        return None if device is None or device.type == "cpu" else f"its emulation runs on cpu tensors, got {device}"
    there = torch.cuda.is_available()
    if there or not _planned:  # a plan for another machine is one for a library that was built there
        if reason := _library():
            return reason
        if not torch.ops.ngkernels_C.cuda_built():
            return "the library was built without nvcc; install with a CUDA toolkit and NGKERNELS_CUDA=1"
    if device is not None and device.type != "cuda":
        return f"it runs on cuda tensors, got {device}"
    if not there:
        return None if _planned else "no CUDA device is there"
    if error := _no_code(torch.cuda.current_device() if device is None or device.index is None else device.index):
        name = ".".join(map(str, torch.cuda.get_device_capability(device)))
        return f"the library has no code for compute capability {name} (CUDA error {error}); install again with TORCH_CUDA_ARCH_LIST={name}, of 8.0 or newer"
    return None


def why_not(backend: str, device: torch.device | None = None) -> str | None:
    """None when `backend` runs on `device` (None: on some device of this machine), else the reason why not."""
    if backend == "reference":
        return None
    if backend == "cpp":
        if device is not None and device.type != "cpu":
            return f"it runs on cpu tensors, got {device}"
        return _library()
    if backend == "cuda":
        return _cuda(device)
    return _triton(device)


def availability() -> dict[str, dict[str, str | None]]:
    """For each op and backend: None when it runs on this machine, else the reason why not."""
    return {op: {b: why_not(b) for b in BACKENDS} for op in OPS}


def tiles_path() -> Path:
    """The file of measured tile sizes (python -m ngkernels.tune): NGKERNELS_TILES, else in the user's cache folder."""
    return measured.path("NGKERNELS_TILES", "tiles.json")


def isa() -> str:
    """Instruction set the C++ kernels use: avx512_bf16, avx512, avx2 or scalar; "none" without the library."""
    return "none" if _library() else torch.ops.ngkernels_C.isa()


def _check_name(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"use_backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force a backend inside the context, in every thread (a backward pass may run in another one).

    The environment variable NGKERNELS_BACKEND does the same for a process.

    Raises:
        ValueError: an unknown name. NotImplementedError: from the first op, when it cannot run there.
    """
    _forced.append(_check_name(name))
    try:
        yield
    finally:
        _forced.pop()


def forced() -> str | None:
    """The name that `use_backend` or the environment forces."""
    return _forced[-1] if _forced else os.environ.get("NGKERNELS_BACKEND") or None


def kind_of(device: torch.device) -> str:
    """The type of a device; of "meta", whose tensors stand for others while a plan is made, that of theirs."""
    if device.type != "meta":
        return device.type
    return "cuda" if _planned else "cpu"


def choose(op: str, device: torch.device) -> int:
    """The backend for `op` on `device`, as an index into BACKENDS: it is part of the op's arguments, so that a
    backward pass runs where its forward ran.

    Raises:
        NotImplementedError: the forced backend cannot run; lists every backend with its reason.
    """
    global _warned
    device = torch.device(kind_of(device)) if device.type == "meta" else device
    name = forced()
    if name:
        reason = why_not(_check_name(name), device)
        if reason:
            table = "; ".join(f"{b}: {why_not(b, device) or 'runs'}" for b in BACKENDS)
            raise NotImplementedError(f"{op}: backend {name!r} was forced but {reason} ({table})")
        return BACKENDS.index(name)
    best = {"cpu": "cpp", "cuda": "triton"}.get(device.type)
    if best is None:
        return BACKENDS.index("reference")
    reason = why_not(best, device)
    if reason is None:
        return BACKENDS.index(best)
    if not _warned:
        _warned = True
        warnings.warn(f"ngkernels runs on its reference backend, slowly and with [E, d] tensors: {reason}", RuntimeWarning, stacklevel=3)
    return BACKENDS.index("reference")

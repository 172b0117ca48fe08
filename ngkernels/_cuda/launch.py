"""Kernels by number, on a device or on the emulated one of the tests."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .. import backends
from .lower import WIDTHS

KERNELS = ("gather", "project", "node_gradient", "fold", "sum_blocks", "merge", "coefficients", "sum_cells", "softmax", "delta", "store", "merge_cells", "arrange")  # csrc/cuda/launcher.h
PURPOSES = ("messages", "options", "attend")
PRECISIONS = ("bf16", "tf32", "exact")
STORED = 254  # numbers that a launch of store takes: csrc/cuda/second_stage.h
THREADS = 256  # of a block, where threads work on their own
PIECE = 256  # edges that a thread of sum_cells takes: csrc/cuda/second_stage.h
BUDGET = 256 << 20  # bytes of partial results in memory at a time
EMULATED_SHARED = 232448  # bytes of shared memory of an emulated block, and of one that is planned
EMULATED_WAVE = 132  # multiprocessors, likewise: those of an H100 or H200


def precision(low: bool, tf32: bool) -> str:
    """How matrix products round their operands; sums are in float32."""
    return "bf16" if low else "tf32" if tf32 else "exact"


def edge_kernel(purpose: str, d: int, precision: str, backward: bool) -> int:
    wide = PURPOSES.index(purpose) * len(WIDTHS) + WIDTHS.index(d)
    return 16 + (wide * len(PRECISIONS) + PRECISIONS.index(precision)) * 2 + backward


def shared_limit(device: torch.device) -> int:
    """Bytes of shared memory that a block of threads can have."""
    if device.type != "cuda":
        return EMULATED_SHARED
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def multiprocessors(device: torch.device) -> int:
    """How many blocks run side by side at least."""
    if device.type != "cuda":
        return EMULATED_WAVE
    return torch.cuda.get_device_properties(device).multi_processor_count


def numbers(values: Sequence[int], device: torch.device) -> torch.Tensor:
    """int64 on a device: as arguments of kernels, which wait for nothing and are part of a captured CUDA graph."""
    out = torch.empty(len(values), dtype=torch.int64, device=device)
    for first in range(0, len(values), STORED):
        some = values[first : first + STORED]
        simple("store", len(some), out[first:], len(some), *some, *[0] * (STORED - len(some)))
    return out


def run(kernel: int, args: Sequence[int], blocks: int, shared: int, device: torch.device) -> None:
    """Launches `blocks` blocks of a kernel; none on tensors without values.

    Raises:
        RuntimeError: CUDA refused the launch, with its error code.
    """
    if blocks <= 0 or device.type == "meta":
        return
    if device.type != "cpu":
        torch.ops.ngkernels_C.cuda_launch(kernel, list(args), blocks, shared, device.index)
        return
    numbers = (ctypes.c_int64 * len(args))(*args)
    error = backends.emulated().ngk_cuda_launch(kernel, numbers, ctypes.c_int64(len(args)), ctypes.c_int64(blocks), ctypes.c_int64(shared), None)
    if error:
        raise RuntimeError(f"ngkernels: emulated kernel {kernel} could not be launched, error {error}")


def simple(name: str, threads: int, *args: int | torch.Tensor | None) -> None:
    """Launches a kernel with so many threads; tensors stand for their addresses, None for none. One of them at least is a tensor."""
    if (note := backends.planned(args)) is not None:
        return note(*args)
    device = next(a.device for a in args if isinstance(a, torch.Tensor))
    run(KERNELS.index(name), [address(a) for a in args], -(-threads // THREADS), 0, device)


class Some(NamedTuple):
    """Rows [.., rows, columns] from number `first` on of something that kernels count from its first row."""

    rows: torch.Tensor
    first: int


def address(a: int | torch.Tensor | Some | None) -> int:
    if isinstance(a, Some):
        return a.rows.data_ptr() - a.first * a.rows.stride(-2) * a.rows.element_size()
    return 0 if a is None else a.data_ptr() if isinstance(a, torch.Tensor) else int(a)


def arranged(x: torch.Tensor, columns: int) -> torch.Tensor:
    """Rows [*, width] as kernels read them by column: [rows, columns] in lanes' order."""
    width = x.shape[-1]
    out = x.new_empty(x.numel() // width if width else 0, columns)
    simple("arrange", out.numel(), out, x, len(out), width, columns)
    return out


def padded(width: int) -> int:
    return -(-width // 16) * 16

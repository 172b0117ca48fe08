"""What the CUDA kernels on an emulated GPU are asked of expressions (`of`: samples) and of pairs (`of`: pair_samples) alike."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from types import ModuleType

import torch
from compare import assert_bitwise, assert_close
from emulation import AHEAD, BACKWARDS, order
from pytest import MonkeyPatch
from samples import Sample, cast
from torch.utils._python_dispatch import TorchDispatchMode

from ngkernels import kept
from ngkernels._cuda import launch
from ngkernels.ops import autograd

FLOAT32_FLOOR, TF32_FLOOR, BFLOAT16_FLOOR = 8e-6, 2**-10, 2**-8  # of the largest entry


def float32(of: ModuleType, sample: Sample) -> dict[str, torch.Tensor]:
    return cast(of.leaves(sample), torch.float32)


def exact(of: ModuleType, sample: Sample, within: Callable) -> None:
    """`within` a budget (assert_budget or the like): twice the error of plain PyTorch."""
    wanted, plain = of.float32_oracle(sample)
    within(of.run_engine(sample, float32(of, sample), "cuda"), wanted, plain, FLOAT32_FLOOR)


def rounded(of: ModuleType, sample: Sample, tf32: bool, within: Callable) -> None:
    t = float32(of, sample)
    wanted, plain = of.run_oracle(sample, cast(t, torch.float64)), of.run_oracle(sample, t, low=True)
    if not tf32:
        return within(of.run_engine(sample, t, "cuda", autocast=torch.bfloat16), wanted, plain, BFLOAT16_FLOOR)
    plain = {n: (v + (plain[n].double() - v) / 8).to(plain[n].dtype) for n, v in wanted.items()}  # tf32 has three bits more
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        within(of.run_engine(sample, t, "cuda"), wanted, plain, TF32_FLOOR)
    finally:
        torch.set_float32_matmul_precision(before)


def any_order_of_threads(of: ModuleType, sample: Sample, autocast: torch.dtype | None) -> None:
    """Where a barrier is missing, it matters."""
    t = float32(of, sample)
    wanted = of.run_engine(sample, t, "cuda", autocast=autocast)
    for which in (BACKWARDS, AHEAD, AHEAD + BACKWARDS):
        with order(which):
            assert_bitwise(of.run_engine(sample, t, "cuda", autocast=autocast), wanted)


def outside_of_shared_memory(of: ModuleType, sample: Sample, shared: int, monkeypatch: MonkeyPatch) -> None:
    t = float32(of, sample)
    wanted = of.run_engine(sample, t, "cuda", autocast=torch.bfloat16)
    monkeypatch.setattr(launch, "EMULATED_SHARED", shared)
    assert_bitwise(of.run_engine(sample, t, "cuda", autocast=torch.bfloat16), wanted)


def in_many_launches(of: ModuleType, sample: Sample, monkeypatch: MonkeyPatch) -> None:
    """Sums over the blocks of a launch end at other places: the rest is the same."""
    t = float32(of, sample)
    wanted = of.run_engine(sample, t, "cuda")
    monkeypatch.setattr(launch, "BUDGET", 1)
    monkeypatch.setattr(launch, "EMULATED_WAVE", 1)
    found = of.run_engine(sample, t, "cuda")
    local = [n for n in wanted if n.startswith(("out", "grad.weights", "grad.x"))]
    assert_bitwise({n: found[n] for n in local}, {n: wanted[n] for n in local})
    assert_close(found, wanted, 2e-6)


def gradients_that_are_asked_for(of: ModuleType, sample: Sample, wanted: set[str]) -> None:
    t = float32(of, sample)
    wanted = wanted & set(t)
    every = of.run_engine(sample, t, "cuda")
    assert_bitwise(of.run_engine(sample, t, "cuda", wanted), {n: v for n, v in every.items() if not n.startswith("grad.") or n[5:] in wanted})


# What makes the host wait for a device, or takes numbers to it.
WAITING = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "repeat_interleave", "equal", "is_nonzero", "lift_fresh", "from_numpy", "pin_memory")


class Waiting(TorchDispatchMode):
    """Collects what the host side of the CUDA kernels does that a CUDA graph cannot capture."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        here = [f for f in traceback.extract_stack() if "/ngkernels/_cuda/" in f.filename]
        if here and any(name in str(op) for name in WAITING):
            self.found.append(f"{op} at {here[-1].filename.rpartition('/')[2]}:{here[-1].lineno}")
        return op(*args, **(kwargs or {}))


def captured(of: ModuleType, sample: Sample, monkeypatch: MonkeyPatch) -> None:
    """A step that has run makes no more tables, waits for nothing, and leaves the same bits."""
    t = float32(of, sample)
    wanted = of.run_engine(sample, t, "cuda")
    monkeypatch.setattr(autograd, "_eager", lambda tensors: True)  # ops do what they do, although somebody looks
    monkeypatch.setattr(kept, "capturing", lambda: True)
    launches: list[int] = []
    run = launch.run
    monkeypatch.setattr(launch, "run", lambda *args: launches.append(args[0]) or run(*args))
    with Waiting() as waiting:
        assert_bitwise(of.run_engine(sample, t, "cuda"), wanted)
    assert not waiting.found
    assert launches.count(launch.KERNELS.index("store")) > 1

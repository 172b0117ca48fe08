"""What a GPU reaches of each of the four things that bound the kernels, measured; and how much of each a training step needs.

    mma      products of 16 x 32 by 32 x 32, as the kernels make them, in FLOP/s
    fp32     single-precision instructions of a lane, a second
    special  exponentials of a lane, a second
    memory   bytes copied (read and written), a second
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from benchmarks import work
from benchmarks.cases import Case
from ngkernels.tune import event_seconds

CEILINGS = ("mma", "fp32", "special", "memory")
STEPS, CHAINS = tl.constexpr(4096), tl.constexpr(4)


@triton.jit
def mma_kernel(out, a, TF32: tl.constexpr):
    """Chains of products, none waiting for another; what is stored keeps them from being left out."""
    i, k = tl.arange(0, 16), tl.arange(0, 32)
    x, w = tl.load(a + i[:, None] * 32 + k[None, :]), tl.load(a + k[:, None] * 32 + k[None, :])
    if not TF32:
        x, w = x.to(tl.bfloat16), w.to(tl.bfloat16)
    p = tl.zeros((16, 32), tl.float32)
    q, r, s = p, p, p
    for _ in range(STEPS):
        p = tl.dot(x, w, p, input_precision="tf32")
        q = tl.dot(x, w, q, input_precision="tf32")
        r = tl.dot(x, w, r, input_precision="tf32")
        s = tl.dot(x, w, s, input_precision="tf32")
    tl.store(out + tl.program_id(0) * 512 + i[:, None] * 32 + k[None, :], p + q + r + s)


@triton.jit
def lane_kernel(out, a, SPECIAL: tl.constexpr):
    """Chains of fused multiply-adds, or of exponentials."""
    k = tl.arange(0, 128)
    x = tl.load(a + k)
    p, q, r, s = x, x + 1, x + 2, x + 3
    for _ in range(STEPS):
        if SPECIAL:
            p, q, r, s = tl.exp2(p), tl.exp2(q), tl.exp2(r), tl.exp2(s)
        else:
            p, q, r, s = tl.fma(p, x, x), tl.fma(q, x, x), tl.fma(r, x, x), tl.fma(s, x, x)
    tl.store(out + tl.program_id(0) * 128 + k, p + q + r + s)


def _quickest(step: Callable[[], object]) -> float:
    for _ in range(2):
        step()
    return min(event_seconds(step, 5))


def measured(device: torch.device) -> dict[str, dict[str, float]]:
    """Rates by precision of matrix products ("bf16", "tf32"; "fp32": exact ones are instructions of lanes)."""
    programs = 64 * torch.cuda.get_device_properties(device).multi_processor_count
    out, a = torch.empty(programs * 512, device=device), torch.rand(4096, device=device)
    count = programs * STEPS.value * CHAINS.value
    mma = {name: count * 2 * 16 * 32 * 32 / _quickest(lambda tf32=tf32: mma_kernel[(programs,)](out, a, tf32, num_warps=1)) for name, tf32 in (("bf16", False), ("tf32", True))}
    fp32, special = (count * 128 / _quickest(lambda special=special: lane_kernel[(programs,)](out, a, special, num_warps=4)) for special in (False, True))
    source = torch.empty(1 << 28, device=device)
    target = torch.empty_like(source)
    memory = 2 * 4 * source.numel() / _quickest(lambda: target.copy_(source))
    common = {"fp32": fp32, "special": special, "memory": memory}
    return {name: {"mma": mma.get(name, 2 * fp32), **common} for name in ("bf16", "tf32", "fp32")}


def needed_by_nggnn(case: Case, width: int = 32, layers: int = 4) -> dict[str, float]:
    """The least that a training step of NG-GNN, weight gradients included, needs of each: products and bytes as in benchmarks.work.

    Instructions of lanes for each edge, convolution and column, for a chain of c updates. Forward: the encoder 1; an update 5 (two node terms,
    SiLU's scale, sum and product) and 2 special (exponential, reciprocal); the message 2, four statistics 4. Backward: the chain again, then
    for an update 6 (slope 3, product, two sums at neurons), for the message and its statistics 9.
    """
    counted = work.train_step(case, True, width, layers)
    lanes = special = 0
    for c in range(layers):
        edges = case.edges if c < layers - 1 else case.last_edges
        chain = 1 + 5 * c
        lanes += edges * width * (chain + 6 + chain + 6 * c + 9)
        special += edges * width * 2 * (2 * c)
    return {"mma": counted.flops, "fp32": lanes, "special": special, "memory": counted.bytes}


def share(needed: dict[str, float], rates: dict[str, float], seconds: float) -> tuple[str, float]:
    """(the ceiling that binds, what fraction of the time it alone would take)."""
    least = {name: needed[name] / rates[name] for name in needed}
    binding = max(least, key=least.get)
    return binding, least[binding] / seconds

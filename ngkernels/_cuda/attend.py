"""attend in CUDA C++."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .backward import Backward
from .call import Call
from .launch import Some, arranged, padded, simple
from .memory import sides
from .plan import Chunk


class Attending(NamedTuple):
    """What attention reads beside the pairs: q, k [N, H Dk], v [N, H Dv]; scale, dropout and its seed."""

    nodes: tuple[torch.Tensor, ...]
    scale: float
    dropout: float
    seed: int

    @property
    def node_bytes(self) -> int:
        return sum(4 * padded(t.shape[1]) for t in self.nodes)

    def between(self, first: int, end: int | None = None) -> dict[str, Some]:
        """q, k and v of the nodes `first` to `end`."""
        return {name: Some(arranged(t[first:end].contiguous(), padded(t.shape[1])), first) for name, t in zip("qkv", self.nodes, strict=True)}

    def of(self, chunk: Chunk) -> dict[str, Some]:
        return self.between(*chunk.nodes)

    def fields(self, call: Call) -> dict[str, int]:
        a, low = call.low.attention, call.low
        found = {"heads": a.heads, "dk": a.d // a.heads, "dv": a.d_v // a.heads, "de": low.de, "multiply": a.multiply, "summed": a.summed}
        found |= {"scale": bits(self.scale), "keep": bits(1 / (1 - self.dropout)), "dropped_below": int(self.dropout * 2**32), "seed": self.seed}
        return found | {"attention_columns": low.columns * sides(call.low)}


def bits(x: float) -> int:
    """Of a float32."""
    return struct.unpack("<i", struct.pack("<f", x))[0]


def states(call: Call) -> int:
    """Columns of a head's sums of states."""
    return call.low.de * call.low.attention.summed


def forward(call: Call, attending: Attending, out: torch.Tensor, sums: torch.Tensor, lse: torch.Tensor) -> None:
    """Writes out [rows, H Dv], sums [rows, H, De or 0] and the log-sum-exp [rows, H]; zeros for rows that read nothing."""
    for t in (out, sums, lse):
        t.zero_()
    work = call.work.reduce()
    if not work.launches or not out.numel():
        return
    a = call.low.attention
    width = 2 * a.heads + a.d_v + a.heads * states(call)
    partial = call.params.new_empty(work.partials, width)
    call.run(call.fields() | call.project() | attending.between(0) | attending.fields(call) | {"partial": partial, "width": width}, *work.launches)
    for keys, starts, order in work.sums:
        merged, n = None if keys is work.sums[-1].keys else call.params.new_empty(len(keys), width), keys.numel()
        simple("softmax", n * (width - a.heads), out, sums, lse, merged, partial, keys, starts, order, n, a.heads, a.d_v // a.heads, states(call))
        partial = merged


def backward(call: Call, attending: Attending, saved: Sequence[torch.Tensor], grads: Sequence[torch.Tensor]) -> None:
    """Writes the wanted gradients of the call and `grads`, those of q, k, v (empty where not wanted).

    Args:
        saved: gradients of out and sums; out, sums, lse.
    """
    back = Backward(call, grads)
    back.clear()
    grad, grad_sums, out, sums, lse = (t.contiguous() for t in saved)
    if not out.numel() or not back.wanted:
        return
    a = call.low.attention
    delta = torch.empty_like(lse)
    simple("delta", delta.numel(), delta, out, grad, sums, grad_sums, delta.numel(), a.d_v // a.heads, states(call))
    back.run(attending, **attending.fields(call), lse=lse, delta=delta, grad_out=grad, grad_sums=grad_sums)

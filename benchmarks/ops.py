"""The registry of op benchmarks: for each op, how to call it on edge states that are `depth` updates old."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases import Case

WIDTH, ATTENTION, HEADS = 32, 128, 8
REDUCE = ("mean", "min", "max", "std")


@dataclass
class Sample:
    """Inputs of an op on one case: raw weights, node states, small matrices; all leaves that want gradients."""

    case: Case
    depth: int
    dtype: torch.dtype = torch.float32

    def __post_init__(self):
        generator = torch.Generator().manual_seed(1)

        def leaf(*shape: int, scale: float = 1.0) -> Tensor:
            value = torch.randn(*shape, generator=generator) * scale
            return value.to(self.dtype).requires_grad_()

        self.weights = [w.to(self.dtype).requires_grad_() for w in self.case.inputs()[0]]
        self.frequencies = (3 * torch.randn(128, 1, generator=generator)).to(self.dtype)
        self.encoder = leaf(WIDTH, 256, scale=0.1), leaf(WIDTH)
        self.states = [leaf(self.case.nodes, WIDTH) for _ in range(self.depth + 1)]
        self.updates = [[leaf(WIDTH, WIDTH, scale=0.2) for _ in range(4)] + [leaf(WIDTH)] for _ in range(self.depth)]
        self.film = leaf(2 * WIDTH, WIDTH, scale=0.2), leaf(2 * WIDTH)
        self.message = [leaf(WIDTH, WIDTH, scale=0.2) for _ in range(2)]
        self.head = leaf(1, WIDTH, scale=0.2), leaf(1)
        self.qkv = [leaf(self.case.nodes, ATTENTION) for _ in range(3)]
        self.pair_maps = [leaf(ATTENTION, WIDTH, scale=0.1) for _ in range(4)]

    def edges(self):
        """The edge state as an expression."""
        import ngkernels as ngk

        graph = ngk.NeuralGraph.mlp(self.case.layout, self.case.batch)
        state = ngk.EdgeState(graph, self.weights, ngk.encoders.Fourier(self.frequencies, *self.encoder))
        for x, (edge, target, source, out, bias) in zip(self.states, self.updates):
            state = state.update(x, edge, target, source, None, out, bias)
        return state

    @property
    def leaves(self) -> list[Tensor]:
        return [
            *self.weights, *self.encoder, *self.states, *(m for u in self.updates for m in u), *self.film, *self.message, *self.head,
            *self.qkv, *self.pair_maps,
        ]  # fmt: skip


def aggregate(sample: Sample) -> list[Tensor]:
    import ngkernels as ngk

    return [ngk.aggregate(sample.edges(), ngk.Message.film(sample.states[-1], *sample.film, *sample.message), REDUCE)]


def attend(sample: Sample) -> list[Tensor]:
    """Over the edges into a neuron, and itself."""
    import ngkernels as ngk

    return [ngk.attend(sample.edges(), *sample.qkv, *sample.pair_maps, heads=HEADS, over="in")]


def readout(sample: Sample) -> list[Tensor]:
    import ngkernels as ngk

    return ngk.readout(sample.edges(), [sample.head])


def checkpoint(sample: Sample) -> list[Tensor]:
    import ngkernels as ngk

    return list(ngk.checkpoint(sample.edges(), sample.dtype).weights)


OPS: dict[str, Callable[[Sample], list[Tensor]]] = {"aggregate": aggregate, "attend": attend, "readout": readout, "checkpoint": checkpoint}


def forward(op: str, sample: Sample) -> list[Tensor]:
    with torch.no_grad():
        return OPS[op](sample)


def forward_backward(op: str, sample: Sample) -> list[Tensor | None]:
    """Gradients of the sum of the result, for all leaves."""
    total = sum(out.sum() for out in OPS[op](sample))
    return list(torch.autograd.grad(total, sample.leaves, allow_unused=True))


def flops(op: str, depth: int, backward: bool) -> int:
    """Matrix-product FLOPs per edge, folded: depth - 1 products of width x width, then the consumer's own; see work.py."""
    if depth == 0:
        return 0
    last = {"aggregate": 2 * WIDTH, "attend": 3 * ATTENTION, "readout": 1, "checkpoint": WIDTH}[op]
    chain = 2 * WIDTH * WIDTH * (depth - 1) + 2 * WIDTH * last
    return chain * (4 if backward else 1)

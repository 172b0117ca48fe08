"""What FlexAttention can express of `attend`: over all neurons, edge states linear in one raw weight, values of the sources alone.

With e_ij = w_ij a + b the logits are those of (q + W_q b) and (k + W_k b), and in the weight, which is 0 where there is no edge, a
polynomial of second degree whose coefficients belong to neurons. FlexAttention reads the weights as a matrix of all pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

import ngkernels as ngk


class Problem(NamedTuple):
    """q, k, v [N, H D]; raw weights (1, d_l, d_l+1, 1); the encoder's matrix and bias; the maps of edge states to queries and keys."""

    graph: ngk.NeuralGraph
    layout: Sequence[int]
    heads: int
    nodes: tuple[Tensor, Tensor, Tensor]
    weights: list[Tensor]
    encoder: tuple[Tensor, Tensor]
    maps: tuple[Tensor, Tensor]

    @classmethod
    def random(cls, layout: Sequence[int], heads: int = 8, width: int = 128, states: int = 64, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Problem:
        g = torch.Generator().manual_seed(0)

        def leaf(*shape: int) -> Tensor:
            return (torch.randn(*shape, generator=g, dtype=dtype) / shape[-1] ** 0.5).to(device).requires_grad_()

        n = sum(layout)
        weights = [leaf(1, a, b, 1).detach() for a, b in zip(layout, layout[1:])]
        nodes = leaf(n, width), leaf(n, width), leaf(n, width)
        return cls(ngk.NeuralGraph.mlp(layout), layout, heads, nodes, weights, (leaf(states, 1), leaf(states)), (leaf(width, states), leaf(width, states)))

    @property
    def leaves(self) -> list[Tensor]:
        return [*self.nodes, *self.encoder, *self.maps]


def ours(p: Problem) -> Tensor:
    """[N, H D] by ngkernels."""
    edges = ngk.EdgeState(p.graph, p.weights, ngk.encoders.Linear(*p.encoder))
    return ngk.attend(edges, *p.nodes, *p.maps, heads=p.heads, over="all")


def pair_matrix(p: Problem) -> Tensor:
    """[N, N]: the raw weight of the edge from column to row, 0 where there is none."""
    n, first = sum(p.layout), 0
    w = p.weights[0].new_zeros(n, n)
    for (a, b), block in zip(zip(p.layout, p.layout[1:]), p.weights, strict=True):
        w[first + a : first + a + b, first : first + a] = block[0, :, :, 0].T
        first += a
    return w


def flex(p: Problem, attention: Callable = flex_attention) -> Tensor:
    """The same by FlexAttention."""
    (a, b), (to_q, to_k) = p.encoder, p.maps

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (p.heads, -1))

    q, k, v = heads(p.nodes[0] + to_q @ b), heads(p.nodes[1] + to_k @ b), heads(p.nodes[2])  # [N, H, D]
    slope_q, slope_k, scale = heads(to_q @ a[:, 0]), heads(to_k @ a[:, 0]), q.shape[-1] ** -0.5
    of_row, of_column, square = (q * slope_k).sum(-1) * scale, (k * slope_q).sum(-1) * scale, (slope_q * slope_k).sum(-1) * scale
    w = pair_matrix(p)

    def score(s: Tensor, _batch: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return s + w[i, j] * (of_row[i, h] + of_column[j, h] + w[i, j] * square[h])

    out = attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), score_mod=score, scale=scale)
    return out[0].transpose(0, 1).flatten(1)


def step_of(function: Callable[[Problem], Tensor], p: Problem) -> Callable[[], Tensor]:
    """Forward, and the gradients of neurons, encoder and maps."""

    def step() -> Tensor:
        out = function(p)
        torch.autograd.grad(out.square().sum(), p.leaves)
        return out.detach()

    return step

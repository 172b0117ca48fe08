"""FlexAttention computes what `attend` does, where it can express it."""

from __future__ import annotations

import torch

import ngkernels as ngk
from benchmarks import flex


def plain(q, k, v, score_mod, scale: float) -> torch.Tensor:
    """What FlexAttention is defined to compute; its own code has no backward pass on CPUs."""
    heads, n = q.shape[1:3]
    h, i, j = torch.arange(heads)[:, None, None], torch.arange(n)[:, None], torch.arange(n)
    return score_mod(q @ k.transpose(-1, -2) * scale, None, h, i, j).softmax(-1) @ v


def test_flex_attention_is_attend_over_all_neurons():
    p = flex.Problem.random([2, 5, 3], heads=2, width=8, states=4, dtype=torch.float64)
    with ngk.use_backend("reference"):
        wanted = flex.ours(p)
        grads = torch.autograd.grad(wanted.square().sum(), p.leaves)
    with torch.no_grad():
        torch.testing.assert_close(flex.flex(p._replace(nodes=tuple(t.detach() for t in p.nodes))), wanted, rtol=1e-9, atol=1e-12)
    found = flex.flex(p, plain)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    for g, w in zip(torch.autograd.grad(found.square().sum(), p.leaves), grads, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-7, atol=1e-10)

"""Second derivatives of the ops, through the plain-PyTorch reference: there is no kernel for them."""

from __future__ import annotations

import torch

from ..reference import evaluate as reference
from . import expression as ex

# shapes: of evaluate's outputs. rows: of aggregate's output; -1: the op is evaluate
ex.library.define(f"double_backward(Tensor[] second, Tensor[] grads, {ex.SCHEMA}, int[] shapes, SymInt rows, int compute, bool[] first_need, bool[] need) -> Tensor[]")


def _leaves(grads, e: ex.E) -> list[torch.Tensor]:
    return [*grads, *e.differentiable]


@torch.library.register_fake("ngkernels::double_backward", lib=ex.library)
def _fake(second, grads, weights, xs, params, table, carriers, topology, program, shapes, rows, compute, first_need, need):
    leaves = _leaves(grads, ex.E(weights, xs, params, table, carriers, topology, program))
    return [torch.empty_like(t) if n else t.new_empty(0) for t, n in zip(leaves, need, strict=True)]


@torch.library.impl("ngkernels::double_backward", "CompositeExplicitAutograd", lib=ex.library)
def _run(second, grads, weights, xs, params, table, carriers, topology, program, shapes, rows, compute, first_need, need):
    """Gradients of <second, gradients of the op> with respect to (grads, the expression's tensors)."""
    e = ex.E(weights, xs, params, table, carriers, topology, program)

    def forward(f):
        return reference.emit(*f, compute & 1, ex.split_shapes(shapes)) if rows < 0 else [reference.aggregate(*f, rows, compute & 1)[0]]

    with ex.autograd_enabled():
        n = len(grads)
        leaves = [t.detach().requires_grad_(True) for t in _leaves(grads, e)]
        inner = ex.reference_gradients(forward, e.with_tensors(leaves[n:]), leaves[:n], first_need, create_graph=True)
        pairs = [(g, s) for g, s, f in zip(inner, second, first_need, strict=True) if f and s.numel() and g.requires_grad]
        wanted = [t for t, k in zip(leaves, need, strict=True) if k]
        found = [None] * len(wanted)
        if pairs and wanted:
            found = torch.autograd.grad([g for g, _ in pairs], wanted, [s for _, s in pairs], allow_unused=True)
    found = iter(found)
    out = _fake(second, grads, *e, shapes, rows, compute, first_need, need)  # of the strides that the op promises
    for to, k in zip(out, need, strict=True):
        g = next(found) if k else None
        if k:
            to.zero_() if g is None else to.copy_(g)
    return out


def second_derivatives(op: str, e: ex.E, grads: list[torch.Tensor], second, shapes: list[int], rows: int, compute: int, first_need: list[bool], need: list[bool]) -> list[torch.Tensor]:
    """Gradients for (grads, weights, xs, params, table, carriers), from the gradients `second` of an op's backward.

    Raises:
        NotImplementedError: the expression stops at a virtual checkpoint, whose carrier hides a dependence.
    """
    if e.carriers:
        raise NotImplementedError(f"{op}: second derivatives through a virtual checkpoint are not available; use recompute or checkpoint(dtype)")
    second = [e.table.new_empty(0) if s is None else s for s in second]
    return torch.ops.ngkernels.double_backward(second, grads, *e, shapes, rows, compute, first_need, need)

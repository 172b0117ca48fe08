"""evaluate: the edge expression itself (or a small MLP of it), written out for every edge. Behind readout and checkpoint."""

from __future__ import annotations

import torch

from ..graph import NeuralGraph
from ..reference import evaluate as reference
from ..topology import DENSE
from . import expression as ex
from . import faster
from .autograd import register
from .double_backward import second_derivatives

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# shapes: rank and sizes of each output, one after the other (fakes cannot read the topology table)
ex.define(f"evaluate({ex.SCHEMA}, int[] shapes, int dtype, int compute) -> Tensor[]")
ex.define(f"evaluate_backward(Tensor[] grads, {ex.SCHEMA}, int[] shapes, int compute, bool[] need) -> Tensor[]")
ex.library.define(f"carry({ex.SCHEMA}, int[] shapes, int compute) -> Tensor[]")


def output_shapes(graph: NeuralGraph, width: int) -> list[int]:
    """The `shapes` argument: (copies, n_src, n_dst, width) or (copies, edges, width) by block; (E, width) when packed."""
    if graph.packed:
        return [2, graph.num_edges, width]
    shapes: list[int] = []
    for p in graph.parts:  # not from the topology tensor: torch.compile could not read it
        rows = None if graph.rows is None else graph.rows % len(p.layers)
        for b in p.blocks:
            if rows is None or b.dst == rows:
                n_src, n_dst = p.layers[b.src], p.layers[b.dst]
                shapes += [4, p.copies, n_src, n_dst, width] if b.kind == DENSE else [3, p.copies, p.edges_of(b), width]
    return shapes


@ex.fake("evaluate")
def _fake(weights, xs, params, table, carriers, topology, program, shapes, dtype, compute):
    return [table.new_empty(s, dtype=DTYPES[dtype]) for s in ex.split_shapes(shapes)]


@torch.library.register_fake("ngkernels::carry", lib=ex.library)
def _fake_carry(weights, xs, params, table, carriers, topology, program, shapes, compute):
    return [table.new_zeros(1).expand(s) for s in ex.split_shapes(shapes)]


def _carry(weights, xs, params, table, carriers, topology, program, shapes, compute):
    return [table.new_zeros(1).expand(s) for s in ex.split_shapes(shapes)]


@ex.fake("evaluate_backward")
def _fake_backward(grads, weights, xs, params, table, carriers, topology, program, shapes, compute, need):
    return ex.empty_gradients(ex.E(weights, xs, params, table, carriers, topology, program), need)


def _forward(weights, xs, params, table, carriers, topology, program, shapes, dtype, compute):
    e = ex.E(weights, xs, params, table, carriers, topology, program)
    kernels = faster.kernels(e, compute)
    if kernels is not None:
        out = _fake(*e, shapes, dtype, compute)
        if shapes and shapes[0] == 2:  # packed: a restricted graph leaves rows out
            out[0].zero_()
        kernels.evaluate(e, compute, out)
        return out
    with torch.no_grad():
        return [t.to(DTYPES[dtype], copy=True) for t in reference.emit(*e, compute & 1, ex.split_shapes(shapes))]


def _backward(grads, weights, xs, params, table, carriers, topology, program, shapes, compute, need):
    e = ex.E(weights, xs, params, table, carriers, topology, program)
    kernels = faster.kernels(e, compute)
    if kernels is not None:
        out = ex.empty_gradients(e, need)
        kernels.evaluate_backward([g.contiguous() for g in grads], e, compute, out)
        return out
    return ex.reference_gradients(lambda f: reference.emit(*f, compute & 1, ex.split_shapes(shapes)), e, [g.to(table.dtype) for g in grads], need)


def _setup(ctx, inputs, output):
    ex.save(ctx, ex.E(*inputs[:7]))
    ctx.shapes, ctx.compute = inputs[7], inputs[-1]
    ctx.set_materialize_grads(False)  # no zeros for blocks that nothing reads


def _autograd(ctx, need, *grads):
    if all(g is None for g in grads):
        return [None] * len(need)
    e, _ = ex.load(ctx)
    need = need[:-1]  # all but the topology
    # a block that nothing read has no gradient: an empty tensor, and the kernels skip it
    grads = [e.table.new_empty(0) if g is None else g for g in grads]
    return [*ex.gradients(e, _run_backward(grads, *e, ctx.shapes, ctx.compute, need), need), None]


run = register("evaluate", _forward, _autograd, _setup)
run_carry = register("carry", _carry, _autograd, _setup)


def _setup_double(ctx, inputs, output):
    grads = inputs[0]
    ex.save(ctx, ex.E(*inputs[1:8]), *grads)
    ctx.shapes, ctx.compute, ctx.need = inputs[8], inputs[9], inputs[10]


def _autograd_double(ctx, need, *second):
    e, grads = ex.load(ctx)
    need = need[:-1]  # all but the topology
    return [*ex.wanted(second_derivatives("evaluate", e, grads, second, ctx.shapes, -1, ctx.compute, ctx.need, need), need), None]


_run_backward = register("evaluate_backward", _backward, _autograd_double, _setup_double)

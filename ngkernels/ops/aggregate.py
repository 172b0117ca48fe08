"""aggregate: messages of all edges, reduced at their destinations, without a tensor of the edges' size."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import panels
from ..edges import EdgeState, Message
from ..program import REDUCE, aux_slots, build_message, reductions
from ..reference import evaluate as reference
from . import expression as ex
from . import faster, in_panels
from .autograd import register
from .double_backward import second_derivatives

ex.define(f"aggregate({ex.SCHEMA}, SymInt rows, int compute) -> (Tensor, Tensor, Tensor)")
ex.define(f"aggregate_backward(Tensor grad, Tensor out, Tensor aux, Tensor ties, {ex.SCHEMA}, int compute, bool[] need) -> Tensor[]")


def _outputs(table: torch.Tensor, program: list[int], rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    width, mask = program[3], program[4]
    mean, ties = aux_slots(mask)
    count = torch.int16 if program[9] == 2 else torch.int32
    return table.new_empty(rows, len(reductions(mask)), width), table.new_empty(rows, mean, width), table.new_empty(rows, ties, width, dtype=count)


@ex.fake("aggregate")
def _fake(weights, xs, params, table, carriers, topology, program, rows, compute):
    return _outputs(table, program, rows)


@ex.fake("aggregate_backward")
def _fake_backward(grad, out, aux, ties, weights, xs, params, table, carriers, topology, program, compute, need):
    return ex.empty_gradients(ex.E(weights, xs, params, table, carriers, topology, program), need)


def _forward(weights, xs, params, table, carriers, topology, program, rows, compute):
    e = ex.E(weights, xs, params, table, carriers, topology, program)
    outputs = _outputs(table, program, rows)
    kernels = faster.kernels(e, compute)
    if kernels is not None:
        kernels.aggregate(e, compute, *outputs)
        return outputs
    with torch.no_grad():
        out, aux, ties = reference.aggregate(*e, rows, compute & 1)
    return out, aux, ties.to(outputs[2].dtype)


def _backward(grad, out, aux, ties, weights, xs, params, table, carriers, topology, program, compute, need):
    e = ex.E(weights, xs, params, table, carriers, topology, program)
    kernels = faster.kernels(e, compute)
    if kernels is not None:
        grads = ex.empty_gradients(e, need)
        kernels.aggregate_backward(grad.contiguous(), out, aux, ties, e, compute, grads)
        return grads
    return ex.reference_gradients(lambda f: [reference.aggregate(*f, out.shape[0], compute & 1)[0]], e, [grad], need)


def _setup(ctx, inputs, output):
    e = ex.E(*inputs[:7])
    ex.save(ctx, e, *output)
    ctx.compute = inputs[8]
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.set_materialize_grads(False)  # no zeros for them


def _autograd(ctx, need, grad, _aux, _ties):
    if grad is None:
        return [None] * len(need)
    e, (out, aux, ties) = ex.load(ctx)
    need = need[:-1]  # all but the topology
    return [*ex.gradients(e, _run_backward(grad, out, aux, ties, *e, ctx.compute, need), need), None]


_run = register("aggregate", _forward, _autograd, _setup)


def _setup_double(ctx, inputs, output):
    e = ex.E(*inputs[4:11])
    ex.save(ctx, e, inputs[0])
    ctx.rows, ctx.compute, ctx.need = inputs[1].shape[0], inputs[11], inputs[12]


def _autograd_double(ctx, need, *second):
    e, (grad,) = ex.load(ctx)
    need = [need[0], *need[4:-1]]  # of the gradient and of the expression's tensors
    found = ex.wanted(second_derivatives("aggregate", e, [grad], second, [], ctx.rows, ctx.compute, ctx.need, need), need)
    return [found[0], None, None, None, *found[1:], None]


_run_backward = register("aggregate_backward", _backward, _autograd_double, _setup_double)


def aggregate(edges: EdgeState, message: Message, reduce: Sequence[str] = ("sum",), over: str = "edges") -> torch.Tensor:
    """Reductions of the messages at every destination node, in one pass over the edges.

        out[i, k] = reduce_k over edges (j -> i) of m_ij,   m_ij = message(e_ij, x_i, x_j)

    Args:
        edges: the edge states; restrict them (`edges.restrict(-1)`) for the rows of one node layer only.
        message: Message.film, .gate, .product or .concat, F wide.
        reduce: any of sum, mean, min, max, std, var; each at most once.
        over: "edges", or "pairs": every pair of a closed state (EdgeState.closure), edge or not.

    Returns:
        Tensor [N, K, F], in the order of `reduce`; float32, or float64 for float64 weights. Nodes without
        incoming edges are 0. std is 0 (gradient 0) where the biased variance is at most 1e-5.

    Raises:
        ValueError: unknown or repeated reductions, shapes that do not fit, pairs of a state that is not closed.
        NotImplementedError: a forced backend that cannot run.

    Note: float32 accumulation, Chan's method for variances; bitwise the same for any number of threads. Kept
        for backward: raw weights, node states, the result and one small integer for each extreme.
        min and max share their gradient among ties. Under bfloat16 autocast, matrix products may round
        their operands to bfloat16.

    Reference: Corso et al., NeurIPS 2020 (PNA); Kofinas et al., ICLR 2024.
    """
    reduce = tuple(reduce)
    unknown = [r for r in reduce if r not in REDUCE]
    if unknown or not reduce or len(set(reduce)) != len(reduce):
        raise ValueError(f"aggregate: expected reduce to be different names of {', '.join(REDUCE)}, got {reduce}")
    if over not in ("edges", "pairs") or (over == "pairs" and not edges.graph.closed):
        raise ValueError(f"aggregate: expected over to be edges, or pairs of a closed state (EdgeState.closure), got {over!r} of {edges.graph}")
    message.check("aggregate", edges)
    if panels.needed(edges):
        return in_panels.evaluate("aggregate", edges, (), message, (len(reduce), message.width), lambda e, _, m: aggregate(e, m, reduce, over))
    compute = ex.mode_for("aggregate", edges, message.width)
    e = build_message(edges, message, reduce, ex.backend_of(compute) != "reference", over == "pairs")
    out = _run(*e, edges.graph.num_rows, compute)[0]
    natural = tuple(r for r in REDUCE if r in reduce)
    return out if natural == reduce else out[:, [natural.index(r) for r in reduce]]

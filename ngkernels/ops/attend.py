"""attend: relational attention over the pairs of a neural graph, without a tensor of the pairs' size."""

from __future__ import annotations

import math

import torch

from .. import panels
from ..checks import check_matrix, check_tensor
from ..edges import EdgeState
from ..program import HEADER, RECORD, build_attention, full_precision
from ..reference import attend as reference
from ..topology import OVER
from . import expression as ex
from . import faster, in_panels
from .autograd import register
from .node_map import node_map

_NODES = "Tensor q, Tensor k, Tensor v, int[] shape, float scale, float dropout, int seed"
# shape: heads, values multiplied (0 or 1), edge states summed (0 or 1)
ex.define(f"attend({ex.SCHEMA}, {_NODES}, SymInt rows, int compute) -> (Tensor, Tensor, Tensor)")
ex.define(
    f"attend_backward(Tensor grad, Tensor grad_sums, Tensor out, Tensor sums, Tensor lse, {ex.SCHEMA}, {_NODES}, int compute, bool[] need) -> Tensor[]"
)


def _edge_width(program: list[int]) -> int:
    """De: width of the instruction before the last one's share."""
    return program[HEADER + RECORD * (program[5] - 1) + 2]


def _outputs(table, program, v, shape, rows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    sums = table.new_empty(rows, shape[0], _edge_width(program) if shape[2] else 0)
    return table.new_empty(rows, v.shape[1]), sums, table.new_empty(rows, shape[0])


@ex.fake("attend")
def _fake(weights, xs, params, table, carriers, topology, program, q, k, v, shape, scale, dropout, seed, rows, compute):
    return _outputs(table, program, v, shape, rows)


def _empty_gradients(e: ex.E, q, k, v, need: list[bool]) -> list[torch.Tensor]:
    return [*ex.empty_gradients(e, need[:-3]), *ex.room((q, k, v), need[-3:])]


@ex.fake("attend_backward")
def _fake_backward(
    grad, grad_sums, out, sums, lse, weights, xs, params, table, carriers, topology, program, q, k, v, shape, scale, dropout, seed, compute, need
):
    return _empty_gradients(ex.E(weights, xs, params, table, carriers, topology, program), q, k, v, need)


def _forward(weights, xs, params, table, carriers, topology, program, q, k, v, shape, scale, dropout, seed, rows, compute):
    e = ex.E(weights, xs, params, table, carriers, topology, program)
    kernels = faster.kernels(e, compute, (shape[0], q.shape[1], v.shape[1], shape[1], shape[2]))
    if kernels is not None:
        outputs = _outputs(table, program, v, shape, rows)
        kernels.attend(e, compute, (q, k, v), shape, scale, dropout, seed, outputs)
        return outputs
    with torch.no_grad():
        return reference.attend(*e, q, k, v, shape, scale, dropout, seed, rows, compute & 1)


def _backward(
    grad, grad_sums, out, sums, lse, weights, xs, params, table, carriers, topology, program, q, k, v, shape, scale, dropout, seed, compute, need
):
    e = ex.E(weights, xs, params, table, carriers, topology, program)
    kernels = faster.kernels(e, compute, (shape[0], q.shape[1], v.shape[1], shape[1], shape[2]))
    if kernels is not None:
        grads = _empty_gradients(e, q, k, v, need)
        kernels.attend_backward((grad, grad_sums, out, sums, lse), e, compute, (q, k, v), shape, scale, dropout, seed, grads)
        return grads

    def forward(f, *nodes):
        return list(reference.attend(*f, *nodes, shape, scale, dropout, seed, out.shape[0], compute & 1)[:2])

    return ex.reference_gradients(forward, e, [grad, grad_sums], need, (q, k, v))


def _setup(ctx, inputs, output):
    ex.save(ctx, ex.E(*inputs[:7]), *inputs[7:10], *output)
    ctx.constants, ctx.compute = inputs[10:14], inputs[15]
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _autograd(ctx, need, grad, grad_sums, _lse):
    if grad is None and grad_sums is None:
        return [None] * len(need)
    e, (q, k, v, out, sums, lse) = ex.load(ctx)
    need = [*need[:-4], *need[-3:]]  # all but the topology
    grad = torch.zeros_like(out) if grad is None else grad
    grad_sums = torch.zeros_like(sums) if grad_sums is None else grad_sums
    found = _run_backward(grad, grad_sums, out, sums, lse, *e, q, k, v, *ctx.constants, ctx.compute, need)
    found = ex.gradients(e, found, need)
    return [*found[:-3], None, *found[-3:]]


_run = register("attend", _forward, _autograd, _setup)


def _no_second(ctx, _need, *_second):
    raise NotImplementedError("attend: second derivatives are not available; differentiate it once")


_run_backward = register("attend_backward", _backward, _no_second)


def attend(
    edges: EdgeState,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    weight_q: torch.Tensor,
    weight_k: torch.Tensor,
    weight_add: torch.Tensor | None = None,
    weight_mul: torch.Tensor | None = None,
    heads: int = 8,
    scale: float | None = None,
    over: str = "all",
    dropout: float = 0.0,
    seed: int = 0,
    include_self: bool = True,
) -> torch.Tensor:
    """Relational attention: queries, keys and values of a pair of neurons depend on the state of the pair.

        logit_ij = scale <q_i + weight_q e_ij, k_j + weight_k e_ij>        head by head
        out_i = sum_j softmax_j(logit_ij) (v_j * (weight_mul e_ij) + weight_add e_ij)

    Args:
        edges: the pair states, D wide; i is the destination of the edge, j its source. A pair that is no edge starts from the
            encoding of 0. Restrict them (`edges.restrict(-1)`) for the rows of one node layer only.
        q, k: [N, H Dk], v: [N, H Dv]; head h owns the columns from h Dk on.
        weight_q, weight_k: [H Dk, D]. weight_add, weight_mul: [H Dv, D]; without weight_mul values are v_j + weight_add e_ij.
        heads: H.
        scale: None for 1 / sqrt(Dk).
        over: which j a neuron i reads, of its own network. "all": every one, itself included. "edges": those joined to it by an edge
            in either direction, and itself. "in", "out": those with an edge j -> i, i -> j, and itself.
        include_self: whether a neuron reads itself where that is no edge; False not with over="all".
        dropout: probability with which an attention weight is dropped, in [0, 1). seed: of the mask, a hash of (seed, i, j, head).

    Returns:
        Tensor [N, H Dv], or the rows of the restricted layer; float32, or float64 for float64 weights. Rows that read nothing are 0.

    Raises:
        ValueError: shapes that do not fit, an unknown `over`, two blocks between the same node layers.
        NotImplementedError: a forced backend that cannot run.

    Note: online softmax; kept for backward are the raw weights, the node states, the result and one log-sum-exp a row and head. Memory
        does not grow with the number of pairs. Bitwise the same for any number of threads. First derivatives only.

    Reference: Diao and Loynd, ICLR 2023 (relational attention); Kofinas et al., ICLR 2024 (NG-T).
    """
    _check_numbers(heads, scale, dropout, seed)
    _check(edges, q, k, v, weight_q, weight_k, weight_add, weight_mul, heads, over)
    if over == "all" and not include_self:
        raise ValueError("attend: expected include_self=True with over='all', got False; use over='edges', 'in' or 'out'")
    if panels.needed(edges):
        if dropout and len(edges.graph.parts) > 1:
            raise NotImplementedError("attend: dropout for weights on the CPU under states on a GPU is built for equal networks; move the weights with .to()")

        def of_panel(e: EdgeState, nodes, matrices) -> torch.Tensor:
            return attend(e, *nodes, *matrices, heads=heads, scale=scale, over=over, include_self=include_self, dropout=dropout, seed=seed)

        matrices = (weight_q, weight_k, weight_add, weight_mul)
        return in_panels.evaluate("attend", edges, (q, k, v), matrices, (v.shape[1],), of_panel, True, over != "all")
    if over == "all" and edges.graph.has_sparse:
        edges = edges.dense()
    closed = edges.closure("all" if over == "all" else "edges")
    compute = ex.mode_for("attend", edges, max(q.shape[1], v.shape[1]), over)
    maps = [weight_q, weight_k] if weight_mul is None else [weight_q, weight_k, weight_mul]
    e = build_attention(closed, maps, over, include_self, ex.backend_of(compute) != "reference")
    shape = [heads, int(weight_mul is not None), int(weight_add is not None)]
    scale = (q.shape[1] / heads) ** -0.5 if scale is None else float(scale)
    nodes = [t.to(e.table.dtype).contiguous() for t in (q, k, v)]
    out, sums, _ = _run(*e, *nodes, shape, scale, float(dropout), int(seed), closed.graph.num_rows, compute)
    if weight_add is None:
        return out
    with full_precision(out.device):  # sum_j a_ij (W e_ij) = W sum_j a_ij e_ij, row by row: batch mates do not matter
        matrix = torch.block_diag(*weight_add.to(sums.dtype).unflatten(0, (heads, -1)))
        return out + node_map(sums.flatten(1), sums.new_empty(len(sums), 0), (matrix, matrix.new_zeros(len(matrix))), ())


def _check_numbers(heads, scale, dropout, seed) -> None:
    op, scale = "attend", 1.0 if scale is None else scale
    for name, value in (("heads", heads), ("seed", seed)):
        if not isinstance(value, int):
            raise TypeError(f"{op}: expected {name} to be an integer, got {value!r}")
    for name, value in (("scale", scale), ("dropout", dropout)):
        if not isinstance(value, (int, float)):
            raise TypeError(f"{op}: expected {name} to be a number, got {value!r}")
    if not abs(scale) < math.inf:
        raise ValueError(f"{op}: expected a finite scale, got {scale}")
    if not 0 <= dropout < 1:
        raise ValueError(f"{op}: expected dropout of at least 0 and below 1, got {dropout}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"{op}: expected a seed of 64 bits, got {seed}")


def _check(edges, q, k, v, weight_q, weight_k, weight_add, weight_mul, heads, over) -> None:
    op, device, n = "attend", edges.device, edges.graph.num_nodes
    if over not in OVER:
        raise ValueError(f"{op}: expected over to be one of {', '.join(OVER)}, got {over!r}")
    for name, t in (("q", q), ("k", k), ("v", v)):
        check_tensor(op, name, t, device)
        if t.dim() != 2 or t.shape[0] != n:
            raise ValueError(f"{op}: expected {name} of shape ({n}, columns) (the graph's nodes), got {tuple(t.shape)}")
        if heads < 1 or t.shape[1] % heads or not t.shape[1]:
            raise ValueError(f"{op}: expected heads to divide the columns of {name}, got {heads} heads and {t.shape[1]} columns")
    if q.shape[1] != k.shape[1]:
        raise ValueError(f"{op}: expected q and k with the same number of columns, got {q.shape[1]} and {k.shape[1]}")
    for name, w, columns in (("weight_q", weight_q, q), ("weight_k", weight_k, q), ("weight_add", weight_add, v), ("weight_mul", weight_mul, v)):
        if w is None and name in ("weight_add", "weight_mul"):
            continue
        check_matrix(op, name, w, edges.width, device)
        if w.shape[0] != columns.shape[1]:
            raise ValueError(f"{op}: expected {name} with {columns.shape[1]} rows, got {w.shape[0]}")

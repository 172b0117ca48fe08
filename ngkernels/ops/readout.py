"""readout: a small MLP of every edge's state and its two neurons, down to a few numbers an edge."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import backends
from ..edges import Affine, EdgeState, NodeTerm, _check_activation, _check_matrix
from ..program import build_state
from . import evaluate as ev
from . import expression as ex


def readout(
    edges: EdgeState,
    mlp: Sequence[Affine],
    x: torch.Tensor | None = None,
    weight_dst: torch.Tensor | None = None,
    weight_src: torch.Tensor | None = None,
    activation: str = "relu",
    dtype: torch.dtype | None = None,
) -> list[torch.Tensor]:
    """W_k act(.. act(W_0 e_ij + weight_dst x_i + weight_src x_j + b_0) ..) + b_k for every edge.

    Args:
        edges: the edge states, D wide.
        mlp: pairs (weight [out, in], bias [out] or None), at least one; the first takes D, the last gives C_out.
        x: node states [N, d_x], or None for an MLP of the edge alone.
        weight_dst, weight_src: [H, d_x], H the first layer's width; with x only.
        activation: between the layers.
        dtype: of the result; None for float32 (float64 for float64 weights).

    Returns:
        One tensor for each block: (copies, n_src, n_dst, C_out) dense, (copies, n, C_out) diagonal; a packed graph
        gives one tensor [E, C_out]. Reversed blocks come after the forward ones, in their own (src, dst) order.

    Raises:
        ValueError: shapes that do not fit, an unknown activation, an empty mlp.

    Note: memory is the result. Backward evaluates the state again.

    Reference: Kofinas et al., ICLR 2024, section 3 (edge outputs of the equivariant networks).
    """
    op = "readout"
    if not mlp:
        raise ValueError(f"{op}: expected mlp of at least one (weight, bias), got none")
    _check_activation(op, activation)
    width = edges.width
    for k, (w, b) in enumerate(mlp):
        _check_matrix(op, f"mlp[{k}] weight", w, width)
        width = w.shape[0]
        if b is not None and tuple(b.shape) != (width,):
            raise ValueError(f"{op}: expected mlp[{k}] bias of shape ({width},), got {tuple(b.shape)}")
    node = None
    if x is not None:
        if weight_dst is None or weight_src is None:
            raise ValueError(f"{op}: expected weight_dst and weight_src with x, got None")
        node = NodeTerm(x, weight_dst, weight_src)
        node.check(op, edges.graph, mlp[0][0].shape[0])
    return run(edges, mlp, node, activation, dtype, op)


def run(edges: EdgeState, mlp: Sequence[Affine], node: NodeTerm | None, activation: str, dtype: torch.dtype | None, op: str) -> list[torch.Tensor]:
    """The op behind `readout` and a stored checkpoint (an empty mlp)."""
    tabulate = backends.choose(op, edges.weights[0].device) != "reference"
    e = build_state(edges, tabulate, mlp, node, activation)
    dtype = e.params.dtype if dtype is None else dtype
    if dtype not in ev.DTYPES:
        raise TypeError(f"{op}: expected dtype float32, bfloat16, float16 or float64, got {dtype}")
    shapes = ev.output_shapes(edges.graph, e.program[3])
    return torch.ops.ngkernels.evaluate(e.weights, e.xs, e.params, e.table, e.carriers, e.topology, e.program, shapes, ev.DTYPES.index(dtype), ex.compute_mode())


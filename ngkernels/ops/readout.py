"""readout: a small MLP of every edge's state and its two neurons, down to a few numbers an edge."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..checks import check_activation, check_bias, check_matrix
from ..edges import Affine, EdgeState, NodeTerm
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
        gives one tensor [E, C_out], with 0 for edges that it is restricted from. Reversed blocks come after the forward ones, in their own (src, dst) order.

    Raises:
        ValueError: shapes that do not fit, an unknown activation, an empty mlp.

    Note: memory is the result. Backward evaluates the state again.

    Reference: Kofinas et al., ICLR 2024, section 3 (edge outputs of the equivariant networks).
    """
    op = "readout"
    if not mlp:
        raise ValueError(f"{op}: expected mlp of at least one (weight, bias), got none")
    check_activation(op, activation)
    width = edges.width
    for k, (w, b) in enumerate(mlp):
        check_matrix(op, f"mlp[{k}] weight", w, width)
        width = w.shape[0]
        check_bias(op, f"mlp[{k}] bias", b, width)
    given = [t is not None for t in (x, weight_dst, weight_src)]
    if any(given) and not all(given):
        raise ValueError(f"{op}: expected x, weight_dst and weight_src together or none of them, got {sum(given)} of 3")
    node = NodeTerm(x, weight_dst, weight_src) if x is not None else None
    if node is not None:
        node.check(op, edges.graph, mlp[0][0].shape[0], edges.device)
    return run(edges, mlp, node, activation, dtype, op)


def run(
    edges: EdgeState, mlp: Sequence[Affine], node: NodeTerm | None, activation: str, dtype: torch.dtype | None, op: str, over: str | None = None
) -> list[torch.Tensor]:
    """The op behind `readout` and a stored checkpoint (an empty mlp; `over`: both directions of a closed graph together)."""
    compute = ex.mode_for(op, edges, max([0, *(w.shape[0] for w, _ in mlp)]))
    e = build_state(edges, ex.backend_of(compute) != "reference", mlp, node, activation, over)
    dtype = e.table.dtype if dtype is None else dtype
    if dtype not in ev.DTYPES:
        raise TypeError(f"{op}: expected dtype float32, bfloat16, float16 or float64, got {dtype}")
    shapes = ev.output_shapes(edges.graph, e.program[3])
    return ev.run(*e, shapes, ev.DTYPES.index(dtype), compute)


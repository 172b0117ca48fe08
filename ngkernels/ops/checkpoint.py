"""checkpoint: restart an edge state from stored values, or stop gradients at a virtual one and hand them on once."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..edges import EdgeState, Mark, map_tensors
from ..encoders import Identity
from ..program import build_state
from . import evaluate as ev
from . import expression as ex
from .readout import run


def checkpoint(edges: EdgeState, store: torch.dtype | None = None) -> EdgeState:
    """`edges`, restarted here. See EdgeState.checkpoint.

    Args:
        edges: an unrestricted state.
        store: dtype of the stored values ([E, D], by block), or None for a virtual checkpoint: nothing is stored.

    Returns:
        EdgeState with the same values (rounded to `store`) and the same gradients. Of a state with pair updates, on the closed
        graph (EdgeState.closure), so that the reversed edges have theirs too.

    Raises:
        ValueError: a restricted state, or one closed over all pairs: its checkpoint would be N x N x D.
    """
    if edges.graph.rows is not None:
        raise ValueError("checkpoint: expected an unrestricted state, got one restricted to a node layer; checkpoint first")
    if edges.graph.closed == "all":
        raise ValueError("checkpoint: expected a state that is not closed over all pairs (N x N x D values), got one; use recompute")
    if edges.paired:
        edges = edges.closure("edges")
    over = edges.graph.closed
    if store is not None:
        values = run(edges, (), None, "identity", store, "checkpoint", over)
        return EdgeState(edges.graph.without_sharing(), tuple(values), Identity())
    compute = ex.mode_for("checkpoint", edges)
    e = build_state(edges, ex.backend_of(compute) != "reference", over=over)
    shapes = ev.output_shapes(edges.graph, edges.width)
    detached = _detached(edges)
    carriers = ev.run_carry(*e, shapes, compute)
    return replace(detached, steps=(*detached.steps, Mark(tuple(carriers))))


def _detached(edges: EdgeState) -> EdgeState:
    steps = tuple(s for s in edges.steps if not isinstance(s, Mark))  # the new mark stops gradients before any earlier one
    parts = {"weights": edges.weights, "encoder": edges.encoder, "steps": steps, "table": edges.table}
    return replace(edges, **{name: map_tensors(torch.Tensor.detach, part) for name, part in parts.items()})

"""What a size would cost whose step takes too long to be run: the planner's peak, the time of smaller sizes carried on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .methods import METHODS

STEPS = 3  # a measurement that fits the time limit runs so many at least: one to warm up, one to time, and some room


def seconds_at(rows: Sequence[dict[str, Any]], edges: int) -> float | None:
    """Seconds of a step over so many edges: the power law through the two largest networks that were run, at least linear.

    None for fewer than two.
    """
    done = sorted((row["edges"], row["seconds"]) for row in rows if row["outcome"] == "ok")[-2:]
    if len(done) < 2 or done[0][0] == done[1][0]:
        return None
    (x0, y0), (x1, y1) = done
    exponent = max(1.0, math.log(y1 / y0) / math.log(x1 / x0))
    return y1 * (edges / x1) ** exponent


def project(request: dict[str, Any], rows: Sequence[dict[str, Any]], edges: int, max_seconds: float) -> dict[str, Any] | None:
    """The projected result of a measurement that would not end in time; None for one that should be run.

    Returns:
        dict with outcome "projected": seconds from `rows` (measured sizes of the same method), peak_bytes as the planner predicts it.
    """
    method = METHODS[request["method"]]
    seconds = seconds_at(rows, edges)
    if method.policy is None or request["device"] != "cpu" or seconds is None or seconds * STEPS <= max_seconds:
        return None
    import ngkernels as ngk

    model = method.model(request["layout"], request["width"])
    graph = ngk.NeuralGraph.mlp(request["layout"])
    options = {"weight_grads": request["weight_grads"], "threads": request["threads"], "policies": [method.policy], "optimizer_states": 3}
    peak = ngk.plan(model, graph, **options).peak_bytes
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"outcome": "projected", "peak_bytes": peak, "seconds": seconds, "all_seconds": [], "parameters": count}

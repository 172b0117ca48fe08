"""What a step of a model would cost on a checkpoint or a layout, for the command `ngk plan`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ngkernels import NeuralGraph, Plan, plan

from ..build import describe_safetensors
from ..models import NGGNN, NGT

MODELS = {"ng-gnn": "NG-GNN", "ng-t": "NG-T, all pairs of neurons", "ng-t-edges": "NG-T along edges"}


@dataclass(frozen=True)
class Subject:
    """What is planned for: the graph, numbers on an edge, the dtype of the weights, their bytes, whether they lie in a file."""

    name: str
    graph: NeuralGraph
    channels: int
    dtype: torch.dtype
    in_file: bool


def subject_of(text: str, num_heads: int | None = None) -> Subject:
    """From a path to a checkpoint (its headers alone are read), or from widths such as "2,1024,2048,3".

    Raises:
        ValueError, FileNotFoundError: neither. CheckpointError, NotImplementedError: see build.describe_safetensors.
    """
    parts = text.replace("x", ",").split(",")
    if not Path(text).exists() and all(part.strip().isdecimal() for part in parts):
        return Subject(text, NeuralGraph.mlp([int(part) for part in parts]), 1, torch.float32, False)
    network = describe_safetensors(text, num_heads, "parallel")
    dtypes = {w.dtype for w in network.weights}
    widest = max(dtypes, key=lambda d: d.itemsize)
    return Subject(text, network.graph, network.channels, widest, True)


def model_for(name: str, subject: Subject, width: int, layers: int):
    """A model of published proportions that reads the subject: no learned positions, the mean over all neurons."""
    degrees = torch.bincount(subject.graph.in_degree)
    layout = subject.graph.parts[0].layers
    options = {"positional": False, "pooling": ("mean", "all"), "edge_channels": subject.channels, "num_layers": layers}
    if name == "ng-gnn":
        return NGGNN(layout, d_hid=width, degree_histogram=degrees, **options)
    sizes = {"d_node": 2 * width, "d_edge": width, "d_attn_hid": 4 * width, "d_node_hid": 4 * width, "d_edge_hid": 2 * width}
    return NGT(layout, attention="edges" if name == "ng-t-edges" else "all", **sizes, **options)


def make_plan(subject: Subject, name: str = "ng-gnn", width: int = 32, layers: int = 4, budget: str | None = None, **options) -> Plan:
    """The plan of a step of model `name`; options as of ngkernels.plan.

    Raises:
        ValueError: an unknown model. BudgetError: nothing fits the budget.
    """
    if name not in MODELS:
        raise ValueError(f"--model: expected {', '.join(MODELS)}, got {name!r}")
    return plan_of(model_for(name, subject, width, layers), subject, budget, **options)


def plan_of(model, subject: Subject, budget: str | None = None, **options) -> Plan:
    """The plan of a step of a model that `model_for` made."""
    return plan(model, subject.graph, budget, weight_dtype=subject.dtype, **options)


def facts(found: Plan) -> dict[str, Any]:
    """The plan as numbers and texts, for JSON."""
    return {
        "policy": found.policy, "peak_bytes": found.peak_bytes, "edges": found.graph.num_edges, "nodes": found.graph.num_nodes, "budget": found.budget,
        "training": found.training, "weight_grads": found.weight_grads, "device": found.device, "threads": found.threads,
        "policies": [
            {"policy": c.policy, "peak_bytes": c.peak_bytes, "edge_flops": c.work.edge_flops, "node_flops": c.work.node_flops, "bytes": c.work.bytes}
            for c in found.candidates
        ],
        "refused": dict(found.refused),
    }  # fmt: skip

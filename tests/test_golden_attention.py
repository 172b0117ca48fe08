"""Recorded cases of the reference's relational transformer: outputs and every gradient to 1e-10 relative, on every backend."""

from __future__ import annotations

import pytest
import torch
from golden_cases import Case, loaded

import ngkernels as ngk
from neural_graphs.models import NGT
from ngkernels import nn
from ngkernels.blocks import DENSE


def test_ngt(backend: str):
    case = Case("b_ngt_2_6_10_3")
    model, inputs = NGT.from_reference(case.group("param"), case.config), case.inputs()
    with ngk.use_backend(backend):
        logits = model([inputs[f"weights.{k}"] for k in range(3)], [inputs[f"biases.{k}"] for k in range(3)])
        case.check({"logits": logits}, inputs, model)


def pairs_of(case: Case, e: torch.Tensor) -> ngk.EdgeState:
    """e [B, n, n, d] as edges of a complete graph: e[:, i, j] belongs to the edge from j to i."""
    graph = ngk.NeuralGraph.from_blocks((case.config["n"],), [ngk.Block(DENSE, 0, 0, 0)], case.config["B"])
    return ngk.EdgeState(graph, [e.transpose(1, 2)], ngk.encoders.Identity())


def values(edges: ngk.EdgeState) -> torch.Tensor:
    """[B, n, n, d] again."""
    return ngk.readout(edges, [(torch.eye(edges.width, dtype=torch.float64), None)])[0].transpose(1, 2)


@pytest.mark.parametrize("name", ["e3_rtattention_modv", "e3b_rtattention_nomodv"])
@pytest.mark.parametrize("over", ["all", "edges", "in", "out"])
def test_attention(backend: str, name: str, over: str):
    """On a complete graph all neighbourhoods are the same."""
    case = Case(name)
    c, inputs = case.config, case.inputs()
    layer = loaded(nn.RelationalAttention(c["d_node"], c["d_edge"], c["d_hid"], c["n_heads"], c["modulate_v"]), case)
    with ngk.use_backend(backend):
        y = layer(inputs["node"].flatten(0, 1), pairs_of(case, inputs["edge"]), over)
        case.check({"y": y.view_as(inputs["node"])}, inputs, layer)


def test_pair_update(backend: str):
    case = Case("e4_rt_edge_layer")
    c, inputs = case.config, case.inputs()
    update = loaded(nn.PairUpdate(c["d_node"], c["d_edge"], c["d_edge_hid"]), case)
    with ngk.use_backend(backend):
        edges = update(pairs_of(case, inputs["edge"]), inputs["node"].flatten(0, 1))
        case.check({"e": values(edges)}, inputs, update)


def test_relational_layer(backend: str):
    case = Case("e5_rt_layer")
    c, inputs = case.config, case.inputs()
    layer = loaded(nn.RelationalLayer(c["d_node"], c["d_edge"], c["d_attn_hid"], c["d_node_hid"], c["d_edge_hid"], c["n_heads"]), case)
    with ngk.use_backend(backend):
        x, edges = layer(inputs["node"].flatten(0, 1), pairs_of(case, inputs["edge"]))
        case.check({"node": x.view_as(inputs["node"]), "edge": values(edges)}, inputs, layer)

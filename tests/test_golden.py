"""Recorded cases of the reference code, float64: outputs and every gradient to 1e-10 relative, on every backend."""

from __future__ import annotations

import golden_cases
import pytest
import torch
from golden_cases import Case, close, loaded

import ngkernels as ngk
from neural_graphs.build import pad_kernel
from neural_graphs.models import NGGNN
from neural_graphs.models.probe import ProbeFeatures
from ngkernels import nn
from ngkernels.blocks import DENSE, DIAGONAL

MODELS = tuple(name for name in golden_cases.MODELS if "nggnn" in name)


# ---- NG-GNN ----
def model_of(case: Case, **options) -> tuple[NGGNN, dict, list, list]:
    model = NGGNN.from_reference(case.group("param", "buffer"), case.config, **options)
    inputs = case.inputs()
    layers = range(len(case.config["layout"]) - 1)
    return model, inputs, [inputs[f"weights.{k}"] for k in layers], [inputs[f"biases.{k}"] for k in layers]


@pytest.mark.parametrize("name", MODELS)
def test_nggnn(backend: str, name: str):
    case = Case(name)
    model, inputs, weights, biases = model_of(case)
    with ngk.use_backend(backend):
        case.check({"logits": model(weights, biases)}, inputs, model)


@pytest.mark.parametrize("edge_memory", ["store", "hybrid", "every:2"])
def test_nggnn_with_every_edge_memory(backend: str, edge_memory: str):
    case = Case(MODELS[0])
    model, inputs, weights, biases = model_of(case, edge_memory=edge_memory)
    with ngk.use_backend(backend):
        case.check({"logits": model(weights, biases)}, inputs, model)


def test_norm_by_graph_is_the_reference_run_one_by_one(backend: str):
    case = Case(MODELS[0])
    model, _, weights, biases = model_of(case, norm="graph")
    with ngk.use_backend(backend):
        close(model(weights, biases), case.tensors["out_separate/logits"], "out_separate/logits")


# ---- PNA layers on blocks of raw features ----
def blocks_of(case: Case, edge_attr: torch.Tensor) -> ngk.EdgeState:
    """The rows of edge_attr as blocks, each with weights of its own; flipped edges as blocks from target to source."""
    layout = case.config["layout"]
    pairs = [(k, k + 1) for k in range(len(layout) - 1)]
    sizes = [layout[s] * layout[t] for s, t in pairs]
    flipped = edge_attr.shape[0] == 2 * sum(sizes)
    blocks = [ngk.Block(DENSE, s, t, k) for k, (s, t) in enumerate(pairs)]
    weights = [
        w.view(1, layout[s], layout[t], -1) for w, (s, t) in zip(edge_attr.split(sizes * (1 + flipped)), pairs * (1 + flipped), strict=True)
    ]
    if flipped:
        blocks += [ngk.Block(DENSE, t, s, len(pairs) + k) for k, (s, t) in enumerate(pairs)]
        weights[len(pairs) :] = [w.transpose(1, 2) for w in weights[len(pairs) :]]
    return ngk.EdgeState(ngk.NeuralGraph.from_blocks(layout, blocks), weights, ngk.encoders.Identity())


@pytest.mark.parametrize(
    ("name", "modulate"), [("e1_pnaconv_modulate", "film"), ("e1c_pnaconv_rev", "film"), ("e1d_pnaconv_concat", "concat")]
)
def test_pna_layer(backend: str, name: str, modulate: str):
    case = Case(name)
    c, inputs = case.config, case.inputs()
    layer = nn.PNALayer(
        c["in_channels"],
        c["out_channels"],
        c["edge_dim"],
        c["aggregators"],
        c["scalers"],
        torch.tensor(c["deg_histogram"]),
        modulate=modulate,
    )
    # the reference computes the averages in float32; the recorded buffers are those
    wanted = case.group("buffer")
    for key, t in layer.state_dict().items():
        if key in wanted:
            torch.testing.assert_close(t.double(), wanted[key], rtol=1e-6, atol=0)
    loaded(layer, case)
    edges = blocks_of(case, inputs["edge_attr"])
    with ngk.use_backend(backend):
        reduced = ngk.aggregate(edges, layer.message(inputs["x"]), c["aggregators"]).flatten(1)
        close(reduced, case.tensors["inter/aggr"][:, 0, : reduced.shape[1]], "inter/aggr")
        case.check({"y": layer(inputs["x"], edges)}, inputs, layer)


def test_edge_update(backend: str):
    case = Case("e2_gnn_edge_mlp")
    inputs = case.inputs()
    update = loaded(nn.EdgeUpdate(case.config["edge_dim"], case.config["node_dim"], case.config["act"]), case)
    edges = update(blocks_of(case, inputs["edge_attr"]), inputs["x"])
    with ngk.use_backend(backend):
        blocks = ngk.readout(edges, [(torch.eye(edges.width, dtype=torch.float64), None)])
        case.check({"e": torch.cat([t.flatten(0, 2) for t in blocks])}, inputs, update)


def test_reductions_on_ties_and_empty_neighbourhoods(backend: str):
    case = Case("e10_aggr_edge_cases")
    inputs, index, rows = case.inputs(), case.tensors["index"], case.tensors["out/y"].shape[0]
    layers, blocks, weights, targets = [], [], [], []
    for row in range(rows):  # each row is a layer of one node, its messages come from a layer of as many nodes
        sources = (index == row).nonzero().flatten()
        if len(sources):
            blocks.append(ngk.Block(DENSE, len(layers), len(layers) + 1, len(blocks)))
            weights.append(inputs["x"][sources].view(1, len(sources), 1, -1))
            layers.append(len(sources))
        layers.append(1)
        targets.append(sum(layers) - 1)
    graph = ngk.NeuralGraph.from_blocks(layers, blocks)
    width = inputs["x"].shape[-1]
    nothing = torch.zeros(width, 1, dtype=torch.float64)
    message = ngk.Message.concat(nothing.new_zeros(graph.num_nodes, 1), torch.eye(width, dtype=torch.float64), None, nothing, nothing)
    scalers = loaded(nn.DegreeScalers(("identity", "amplification"), torch.tensor(case.config["deg_histogram"])), case)
    with ngk.use_backend(backend):
        reduced = ngk.aggregate(ngk.EdgeState(graph, weights, ngk.encoders.Identity()), message, ("mean", "min", "max", "std"))[targets]
        identity, amplified = scalers(graph.in_degree[targets, None].double())
        assert identity is None
        reduced = reduced.flatten(1)
        case.check({"y": torch.cat([reduced, amplified * reduced], 1).view(rows, 1, -1)}, inputs)


# ---- smaller pieces ----
def test_whole_batch_norm():
    case = Case("e6_graph_layernorm")
    inputs = case.inputs()
    norm = loaded(nn.NodeNorm(inputs["x"].shape[1], "batch_graph", case.config["eps"]), case)
    case.check({"y": norm(inputs["x"])}, inputs, norm)


def test_gaussian_encoding():
    case = Case("e7_gaussian_encoding")
    inputs = case.inputs()
    encoding = loaded(nn.GaussianEncoding(case.config["input_size"], case.config["encoded_size"]), case)
    assert not encoding.b.requires_grad
    case.check({"y": encoding(inputs["x"])}, inputs, encoding)


def test_gaussian_encoding_in_the_engine(backend: str):
    case = Case("e7_gaussian_encoding")
    inputs = case.inputs()
    n, eye = len(inputs["x"]), torch.eye(2 * case.config["encoded_size"], dtype=torch.float64)
    graph = ngk.NeuralGraph.from_blocks((n, n), [ngk.Block(DIAGONAL, 0, 1, 0)])
    edges = ngk.EdgeState(graph, [inputs["x"][None]], ngk.encoders.Fourier(case.tensors["param/b"], eye, eye.new_zeros(len(eye))))
    with ngk.use_backend(backend):
        case.check({"y": ngk.readout(edges, [(eye, None)])[0][0]}, inputs)


def test_probe_features():
    case = Case("e8_probe_features")
    inputs, c = case.inputs(), case.config
    probe = loaded(ProbeFeatures(c["layout"], c["num_inputs"], c["proj_dim"], c["w0"], c["output_offset"]), case)
    layers = range(len(c["layout"]) - 1)
    case.check({"y": probe([inputs[f"weights.{k}"] for k in layers], [inputs[f"biases.{k}"] for k in layers])}, inputs, probe)


def test_pad_kernel():
    case = Case("e9b_padkernel_1_in_3x3")
    inputs = case.inputs()
    case.check({"y": pad_kernel(inputs["kernel"], case.config["max_kernel"])}, inputs)


@pytest.mark.parametrize("name", ["e9_padkernel_3_in_4x4", "e9c_padkernel_2_in_5x5"])
def test_pad_kernel_does_not_mix_up_rows_and_columns(name: str):
    """The recorded cases pad the height by the width's amount and the other way round; their length is wrong too."""
    case = Case(name)
    kernel, (rows, columns) = case.inputs()["kernel"], case.config["max_kernel"]
    down, right = rows - kernel.shape[2], columns - kernel.shape[3]
    mixed_up = torch.nn.functional.pad(kernel, (down // 2, down - down // 2, right // 2, right - right // 2)).flatten(-2)
    close(mixed_up, case.tensors["out/y"], "out/y")
    found = pad_kernel(kernel, (rows, columns)).view(*kernel.shape[:2], rows, columns)
    inside = found[:, :, down // 2 : rows - (down - down // 2), right // 2 : columns - (right - right // 2)]
    assert torch.equal(inside, kernel)
    assert found.count_nonzero() == kernel.count_nonzero()

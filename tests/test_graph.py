"""NeuralGraph: sizes, numbering, batches, packing, restriction, and the text of every error."""

from __future__ import annotations

import math

import oracle as plain
import pytest
import torch
from compare import assert_bitwise, assert_close
from oracle import Network, mlp
from sample_list import LOOPS, PLAIN, RESIDUAL, SPARSE_UNEQUAL, UNEQUAL, UNEQUAL_REVERSED
from samples import cast, edge_state, engine, graph_of, leaves, run, run_engine

import ngkernels as ngk
from ngkernels.blocks import Part
from ngkernels.topology import COLUMNS

pytestmark = pytest.mark.usefixtures("one_thread")
GROUPS = {
    "mlp": (mlp(2, 5, 3, copies=2),),
    "reversed": (mlp(2, 5, 3, copies=2, reverse=True),),
    "residual": (RESIDUAL,),
    "loops": (LOOPS, Network(LOOPS.layers, LOOPS.blocks, 2, True)),
    "unequal": UNEQUAL,
    "unequal-reversed": UNEQUAL_REVERSED,
}
groups = pytest.mark.parametrize("networks", GROUPS.values(), ids=GROUPS.keys())


def edges_of(networks, channels: int = 2) -> tuple[ngk.NeuralGraph, list[torch.Tensor], plain.Edges]:
    sample = PLAIN.but("graph", networks=networks, channels=channels)
    weights = [t for name, t in leaves(sample).items() if name.startswith("weights.")]
    return graph_of(sample), weights, plain.list_edges(networks, weights)


# ---- sizes and numbering, against edges listed by loops ----
@groups
def test_counts_and_degrees(networks):
    graph, weights, edges = edges_of(networks)
    degrees = torch.bincount(edges.dst, minlength=edges.num_nodes)
    assert (graph.num_nodes, graph.num_edges) == (edges.num_nodes, len(edges.src))
    assert torch.equal(graph.in_degree, degrees) and graph.in_degree.dtype == torch.int64
    assert graph.max_in_degree == degrees.max()
    assert graph.num_graphs == sum(net.copies for net in networks)
    assert graph.num_weights == len(weights) and graph.weight_shapes(2) == [tuple(w.shape) for w in weights]
    assert graph.has_reverse == any(net.reverse for net in networks)
    assert graph.num_rows == graph.num_nodes
    assert graph.edges_as().rows.shape == (sum(len(net.blocks) * (2 if net.reverse else 1) for net in networks), len(COLUMNS))
    assert graph.edges_as().table.dtype == torch.int64


@groups
def test_node_layers_and_owners(networks):
    graph, _, edges = edges_of(networks)
    for layer in (0, -1, 1):
        assert torch.equal(graph.node_layer(layer), plain.node_rows(networks, layer))
    owner = [n for n, net in enumerate(net for net in networks for _ in range(net.copies)) for _ in range(net.num_nodes)]
    assert graph.graph_of_node().tolist() == owner


@groups
@pytest.mark.parametrize("layer", [0, 1, -1])
def test_restriction_keeps_the_blocks_into_its_layer(networks, layer: int):
    graph, _, edges = edges_of(networks)
    rows = plain.node_rows(networks, layer)
    small = graph.restrict(layer)
    assert small.num_rows == len(rows) and small.num_nodes == graph.num_nodes
    kept = [into == layer % len(networks[n].layers) for into, n in zip(edges.into, edges.networks, strict=True)]
    assert len(small.edges_as().rows) == sum(kept) and list(small.edges_as().used_blocks) == [k for k, keep in enumerate(kept) if keep]
    assert small is graph.restrict(layer) and small.rows == layer


@groups
def test_sources_and_destinations_of_every_edge(networks, backend: str):
    """The sum of x_j, and of x_i, over the edges of each node; x one-hot, so every edge is seen."""
    graph, weights, edges = edges_of(networks)
    n = graph.num_nodes
    eye, none = torch.eye(n, dtype=torch.float64), torch.zeros(n, n, dtype=torch.float64)
    e = ngk.EdgeState(graph, weights, ngk.encoders.Identity())
    with ngk.use_backend(backend):
        from_src = ngk.aggregate(e, ngk.Message.concat(eye, none[:, :2], None, none, eye))[:, 0]
        from_dst = ngk.aggregate(e, ngk.Message.concat(eye, none[:, :2], None, eye, none))[:, 0]
    adjacency = torch.zeros(n, n, dtype=torch.float64).index_put(
        (edges.dst, edges.src), torch.ones(len(edges.src), dtype=torch.float64), accumulate=True
    )
    assert torch.equal(from_src, adjacency)
    assert torch.equal(from_dst, torch.diag(adjacency.sum(1)))


# ---- constructors ----
def test_mlp_from_blocks_and_batch_say_the_same():
    first = ngk.NeuralGraph.mlp([2, 5, 3], batch_size=2, reverse=True)
    blocks = [ngk.Block("dense", 0, 1, 0), ngk.Block("dense", 1, 2, 1)]
    second = ngk.NeuralGraph.from_blocks([2, 5, 3], blocks, batch_size=2, reverse=True)
    third = ngk.NeuralGraph.batch([second])
    assert torch.equal(first.edges_as().table, second.edges_as().table) and torch.equal(first.edges_as().table, third.edges_as().table)
    assert repr(first) == "NeuralGraph(2 x [2, 5, 3]; 20 nodes, 100 edges)"
    assert repr(ngk.NeuralGraph.batch([first] * 5)).startswith("NeuralGraph(2 x [2, 5, 3], 2 x [2, 5, 3],") and "..." in repr(
        ngk.NeuralGraph.batch([first] * 5)
    )


def test_packing_joins_neighbours_of_one_architecture():
    small = ngk.NeuralGraph.mlp([2, 3])
    other = ngk.NeuralGraph.mlp([3, 2])
    packed = ngk.NeuralGraph.batch([small, small, other, small], packed=True)
    assert [(p.layers, p.copies) for p in packed.parts] == [((2, 3), 2), ((3, 2), 1), ((2, 3), 1)]
    assert packed.num_weights == 1 and packed.weight_shapes(3) == [(24, 3)]


def test_pack_writes_network_by_network_block_by_block_source_by_source():
    graph = ngk.NeuralGraph.batch(
        [ngk.NeuralGraph.mlp([2, 1, 2], batch_size=2), ngk.NeuralGraph.from_blocks([2, 3], [ngk.Block("diagonal", 0, 1, 0)])], packed=True
    )
    parts = [torch.arange(4.0).reshape(2, 2, 1, 1), 10 + torch.arange(4.0).reshape(2, 1, 2, 1), 20 + torch.arange(2.0).reshape(1, 2, 1)]
    assert graph.pack(parts).flatten().tolist() == [0, 1, 10, 11, 2, 3, 12, 13, 20, 21]
    assert math.prod(graph.weight_shapes(1)[0]) == graph.num_edges == 10


# ---- batches ----
@pytest.mark.parametrize("networks", [UNEQUAL, UNEQUAL_REVERSED], ids=["unequal", "unequal-reversed"])
@pytest.mark.parametrize("encoder", ["linear", "fourier"])
def test_packed_weights_give_the_list_batch_bitwise(networks, encoder: str, backend: str):
    sample = PLAIN.but("list", networks=networks, encoder=encoder, reciprocal=networks is UNEQUAL_REVERSED)
    t = cast(leaves(sample), torch.float32)
    found, wanted = (run_engine(s.but(s.name, head=0), t, backend) for s in (sample.but("packed", packed=True), sample))
    whole = {name for name in wanted if name == "out.0" or name.startswith(("grad.weights", "grad.x"))}
    assert_bitwise({name: found[name] for name in whole}, {name: wanted[name] for name in whole})
    assert_close(found, wanted, 1e-5)


def test_copies_are_that_many_networks(backend: str):
    """A batch of equal networks against the union of as many single ones."""
    many = PLAIN.but("copies", networks=(mlp(2, 5, 3, copies=3),), head=0)
    single = PLAIN.but("singles", networks=(mlp(2, 5, 3),) * 3, head=0)
    t = leaves(many)
    split = {name: v for name, v in t.items() if not name.startswith("weights.")}
    split.update({f"weights.{2 * c + k}": t[f"weights.{k}"][c : c + 1] for c in range(3) for k in range(2)})
    found, wanted = run_engine(many, t, backend), run_engine(single, split, backend)
    for k in range(2):
        wanted[f"grad.weights.{k}"] = torch.cat([wanted[f"grad.weights.{2 * c + k}"] for c in range(3)])
    assert_close(found, {name: wanted[name] for name in found}, 1e-12)


def test_a_graph_is_reused_between_calls(backend: str):
    """Restricted and unshared graphs are kept with it, and a second call finds the same numbers."""
    sample = PLAIN.but("again", memory=("same", None), restrict=-1, head=0)
    t, graph = leaves(sample), graph_of(sample)
    with ngk.use_backend(backend):
        first, second = (run(lambda live: engine(sample, live, graph), t) for _ in range(2))
        assert_bitwise(first, second)
        assert edge_state(sample, t, graph).graph.without_sharing() is not graph


def test_the_default_device_is_not_where_a_graph_lies(backend: str):
    """Users set it to their GPU. Whatever takes it meets tensors of another device here."""
    samples = [PLAIN.but("elsewhere", networks=of, restrict=-1) for of in ((mlp(2, 5, 3, copies=2),), UNEQUAL_REVERSED, SPARSE_UNEQUAL)]
    given = [(sample, graph_of(sample), leaves(sample)) for sample in samples]
    with torch.device("meta"), ngk.use_backend(backend):
        for sample, graph, t in given:
            host = [graph.in_degree, graph.graph_of_node(), graph.node_bounds, graph.node_layer(-1), graph.edges_as().table]
            assert all(found.device.type == "cpu" for found in host)
            live = {name: v.requires_grad_() for name, v in t.items()}
            out = sum(o.square().sum() for o in engine(sample, live, graph))
            assert all(g is None or g.isfinite().all() for g in torch.autograd.grad(out, list(live.values()), allow_unused=True))


# ---- errors ----
ERRORS = {
    "one-layer": (lambda: ngk.NeuralGraph.mlp([3]), ValueError, r"NeuralGraph.mlp: expected a layout of at least 2 layers, got \(3,\)"),
    "width-0": (lambda: ngk.NeuralGraph.mlp([3, 0, 2]), ValueError, r"NeuralGraph: expected layer widths to be integers of at least 1, got 0 in \(3, 0, 2\)"),
    "width-fraction": (lambda: ngk.NeuralGraph.mlp([3, 2.5]), ValueError, "NeuralGraph.*: expected .* integers of at least 1, got 2.5"),
    "width-text": (lambda: ngk.NeuralGraph([Part(("3", 2), ())]), ValueError, "NeuralGraph: expected layer widths to be integers of at least 1, got '3'"),
    "copies-0": (lambda: ngk.NeuralGraph.mlp([3, 2], batch_size=0), ValueError, "NeuralGraph: expected copies of at least 1, got 0"),
    "kind": (
        lambda: ngk.NeuralGraph.from_blocks([3, 2], [ngk.Block("lowrank", 0, 1, 0)]),
        NotImplementedError,
        "NeuralGraph: block kind 'lowrank' is not built; available: dense, diagonal, sparse",
    ),
    "block-dst": (lambda: ngk.NeuralGraph.from_blocks([3, 2], [ngk.Block("dense", 0, 2, 0)]), ValueError, r"NeuralGraph: expected block dst below 2 \(number of layers\), got 2"),
    "block-src": (lambda: ngk.NeuralGraph.from_blocks([3, 2], [ngk.Block("dense", -1, 1, 0)]), ValueError, r"NeuralGraph: expected block src .*2.*, got -1"),
    "weight-twice": (
        lambda: ngk.NeuralGraph.from_blocks([3, 2], [ngk.Block("dense", 0, 1, 0), ngk.Block("dense", 0, 1, 0)]),
        ValueError,
        "NeuralGraph: expected one forward block for each weight, got two for weight 0",
    ),
    "weight-gap": (
        lambda: ngk.NeuralGraph.from_blocks([3, 2], [ngk.Block("dense", 0, 1, 1)]),
        ValueError,
        r"NeuralGraph: expected weights 0..1 to have a forward block each, got \[1\]",
    ),
    "weight-reversed-only": (
        lambda: ngk.NeuralGraph([Part((3, 2), (ngk.Block("dense", 1, 0, 0, True),))]),
        ValueError,
        r"NeuralGraph: expected weights 0..0 to have a forward block each, got \[\]",
    ),
    "no-parts": (lambda: ngk.NeuralGraph([]), ValueError, "NeuralGraph: expected at least one part, got none"),
    "batch-of-none": (lambda: ngk.NeuralGraph.batch([]), ValueError, "NeuralGraph.batch: expected at least one graph, got none"),
    "batch-of-restricted": (
        lambda: ngk.NeuralGraph.batch([ngk.NeuralGraph.mlp([3, 2]).restrict()]),
        ValueError,
        "NeuralGraph.batch: expected unrestricted graphs; batch first, then restrict",
    ),
    "restrict-beyond": (lambda: ngk.NeuralGraph.mlp([3, 2]).restrict(2), ValueError, r"NeuralGraph.restrict: expected layer between -2 and 1 \(2 node layers\), got 2"),
    "restrict-before": (lambda: ngk.NeuralGraph.mlp([3, 2]).restrict(-3), ValueError, r"NeuralGraph.restrict: expected layer between -2 and 1 \(2 node layers\), got -3"),
    "node-layer": (lambda: ngk.NeuralGraph.mlp([3, 2]).node_layer(2), ValueError, r"NeuralGraph.node_layer: expected layer between -2 and 1 \(2 node layers\), got 2"),
    "pack-too-many": (
        lambda: ngk.NeuralGraph.batch([ngk.NeuralGraph.mlp([3, 2])] * 2, packed=True).pack([torch.zeros(1, 3, 2, 1)] * 3),
        ValueError,
        "NeuralGraph.pack: expected 2 weight tensors.*, got 3",
    ),
    "pack-shape": (
        lambda: ngk.NeuralGraph.batch([ngk.NeuralGraph.mlp([3, 2])], packed=True).pack([torch.zeros(1, 2, 3, 1)]),
        ValueError,
        r"NeuralGraph.pack: expected .*\(1, 3, 2, .*got \[\(1, 2, 3, 1\)\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "text"), ERRORS.values(), ids=ERRORS.keys())
def test_errors_name_the_rule_and_the_value(call, kind: type, text: str):
    with pytest.raises(kind, match=text):
        call()

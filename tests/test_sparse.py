"""Sparse blocks: the dense block of the same edges, hubs, edges in any number and order, pairs and attention, lists, memory, errors."""

from __future__ import annotations

import copy
import gc
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from compare import assert_bitwise, assert_close
from oracle import Network, mlp
from sample_list import PLAIN, SPARSE_UNEQUAL, WEB
from samples import block_of, cast, engine, graph_of, leaves, run, run_engine

import ngkernels as ngk
from ngkernels import encoders, topology
from ngkernels.edge_index import EdgeIndex, Pairs, make_lists, read_lists

pytestmark = pytest.mark.usefixtures("one_thread")
FLOAT = torch.float64


def all_edges(n_src: int, n_dst: int, seed: int = 0) -> torch.Tensor:
    """Every pair, in a random order."""
    order = torch.randperm(n_src * n_dst, generator=torch.Generator().manual_seed(seed))
    return torch.stack([order // n_dst, order % n_dst])


# ---- the dense block of the same edges ----
DENSE = (
    PLAIN.but("plain", networks=(mlp(4, 7, 3, copies=2),), channels=2),
    PLAIN.but("pieces", networks=(mlp(70, 110, 3),), mlp=1),
    PLAIN.but("reversed", networks=(mlp(4, 7, 3, copies=3, reverse=True),), reciprocal=True, encoder="fourier"),
    PLAIN.but("inside-a-layer", networks=(Network((9, 4), (("dense", 0, 0), ("dense", 0, 1)), 2),)),
    PLAIN.but("stored", networks=(mlp(4, 7, 3, copies=2, reverse=True),), memory=("same", None)),
    PLAIN.but("virtual", networks=(mlp(4, 7, 3, copies=2, reverse=True),), memory=("virtual", "virtual")),
)


@pytest.mark.parametrize("sample", DENSE, ids=[s.name for s in DENSE])
def test_a_sparse_block_of_all_edges_is_the_dense_one(sample, backend: str):
    """Reductions with every gradient, then readouts, whose values stand in the order of the edges."""
    net = sample.networks[0]
    indices = [all_edges(net.layers[src], net.layers[dst], k) for k, (_, src, dst) in enumerate(net.blocks)]
    blocks = tuple(("sparse", src, dst, tuple(map(tuple, e.T.tolist()))) for (_, src, dst), e in zip(net.blocks, indices, strict=True))
    sparse = sample.but(sample.name, networks=(Network(net.layers, blocks, net.copies, net.reverse),))

    def listed(t):
        return {n: v[(slice(None), *indices[int(n.split(".")[-1])])] if "weights." in n else v for n, v in t.items()}

    t = leaves(sample)
    without = (s.but(s.name, head=0) for s in (sparse, sample))
    found, wanted = (run_engine(s, {n: v for n, v in leaf.items() if "head" not in n}, backend) for s, leaf in zip(without, (listed(t), t)))
    assert_close(found, listed(wanted), 1e-11)
    with ngk.use_backend(backend):
        found, wanted = engine(sparse, listed(t))[1:], engine(sample, t)[1:]
    for k, (values, by_pair) in enumerate(zip(found, wanted, strict=True)):
        j, i = indices[k % len(indices)]
        assert_close({"out": values}, {"out": by_pair[:, j, i] if k < len(indices) else by_pair[:, i, j]}, 1e-11)


def linear_state(graph: ngk.NeuralGraph, w: torch.Tensor, width: int = 3) -> ngk.EdgeState:
    g = torch.Generator().manual_seed(4)
    weight, bias = torch.randn(width, w.shape[-1] if w.dim() > 1 else 1, generator=g).to(w), torch.randn(width, generator=g).to(w)
    return ngk.EdgeState(graph, w, encoders.Linear(weight, bias))


def total(e: ngk.EdgeState, x: torch.Tensor, reduce=("sum",)) -> torch.Tensor:
    """The sums over j of x_j + the edge's state."""
    eye = torch.eye(x.shape[1], dtype=x.dtype)
    return ngk.aggregate(e, ngk.Message.concat(x, torch.eye(e.width, dtype=x.dtype), None, 0 * eye, eye), reduce)


# ---- any number and order of edges ----
@pytest.mark.parametrize("n", [1, 4095, 4096, 4097, 30000])
def test_a_hub_and_isolated_neurons(n: int, backend: str):
    """Every edge goes into neuron 2; its pieces are merged."""
    g = torch.Generator().manual_seed(1)
    index = torch.stack([torch.randint(0, 50, (n,), generator=g), torch.full((n,), 2)])
    graph = ngk.NeuralGraph.from_edge_index(index, 50)
    w, x = torch.randn(n, generator=g, dtype=FLOAT), torch.randn(50, 3, generator=g, dtype=FLOAT)
    with ngk.use_backend(backend):
        e = linear_state(graph, w)
        out = total(e, x, ("sum", "max", "std"))
        (state,) = ngk.readout(e, [(torch.eye(3, dtype=FLOAT), None)])
    m = x[index[0]] + state[0]
    assert graph.max_in_degree == graph.in_degree.max() == n and graph.num_edges == n
    assert_close({"out": out[2]}, {"out": torch.stack([m.sum(0), m.amax(0), m.std(0, correction=0)])}, 1e-11)
    assert not out[torch.arange(50) != 2].any()


def test_the_order_of_edges_is_the_users(backend: str):
    """Edges in another order, with their weights: the same by neuron, and by edge in that order."""
    edges = tuple(dict.fromkeys(WEB.blocks[0][3]))  # once each: of duplicates, which one comes first is no matter of neurons
    order = torch.randperm(len(edges))
    first = PLAIN.but("first", networks=(Network((9,), (("sparse", 0, 0, edges),), 2),), head=0)
    second = first.but("second", networks=(Network((9,), (("sparse", 0, 0, tuple(edges[k] for k in order)),), 2),))
    t = cast(leaves(first), torch.float32)
    a, b = (run_engine(s, {**t, "weights.0": w}, backend) for s, w in ((first, t["weights.0"]), (second, t["weights.0"][:, order])))
    names = ("out.0", "grad.x", "grad.weights.0")
    a["grad.weights.0"] = a["grad.weights.0"][:, order]
    compare = assert_bitwise if backend == "cpp" else assert_close
    compare(*({n: r[n] for n in names} for r in (b, a)))


def test_no_edges_at_all(backend: str):
    graph = ngk.NeuralGraph.from_edge_index(torch.zeros(2, 0, dtype=torch.int64), 5)
    w, x = torch.zeros(0, 2, dtype=FLOAT, requires_grad=True), torch.randn(5, 3, dtype=FLOAT, requires_grad=True)
    with ngk.use_backend(backend):
        e = linear_state(graph, w)
        out, (state,) = total(e, x, ("mean", "max")), ngk.readout(e, [(torch.eye(3, dtype=FLOAT), None)])
        grads = torch.autograd.grad(out.sum() + state.sum(), (w, x))
    assert graph.num_edges == graph.max_in_degree == 0 and state.shape == (1, 0, 3)
    assert out.shape == (5, 2, 3) and not out.any() and not grads[1].any() and grads[0].shape == (0, 2)


def test_weights_come_with_or_without_copies_and_channels():
    graph = ngk.NeuralGraph.from_edge_index(torch.tensor([[0, 1, 2], [1, 1, 0]]), 3)
    shapes = [linear_state(graph, torch.zeros(s)).weights[0].shape for s in ((3,), (3, 1), (1, 3, 1))]
    assert shapes == [(1, 3, 1)] * 3 and linear_state(graph, torch.zeros(3, 2)).weights[0].shape == (1, 3, 2)
    assert graph.weight_shapes(4) == [(1, 3, 4)] and graph.num_nodes == 3


def test_a_batch_of_sparse_graphs_is_each_alone(backend: str):
    sample = PLAIN.but("batch", networks=SPARSE_UNEQUAL)
    t = leaves(sample)
    batch = run_engine(sample, t, backend)["out.0"]
    first = 0
    for k, net in enumerate(SPARSE_UNEQUAL):
        nodes = slice(first, first + net.copies * net.num_nodes)
        first += net.copies * net.num_nodes
        before = sum(len(n.blocks) for n in SPARSE_UNEQUAL[:k])
        own = {n: v[nodes] if n.startswith("x") else v for n, v in t.items() if not n.startswith("weights.")}
        own.update({f"weights.{b}": t[f"weights.{before + b}"] for b in range(len(net.blocks))})
        with ngk.use_backend(backend):
            alone = engine(sample.but("alone", networks=(net,)), own)[0]
        assert_close({"out": alone}, {"out": batch[nodes]}, 1e-12)


# ---- pairs: one state for each two neurons, in both directions ----
WEB_EDGES = ((3, 1), (0, 1), (5, 5), (8, 1), (1, 0), (2, 7), (5, 4), (4, 5), (0, 8), (6, 6))
DOWN, UP, ON = ((2, 0), (0, 0), (1, 4), (2, 3)), ((0, 2), (3, 1), (4, 1), (2, 2)), ((4, 2), (0, 0), (4, 1))
PAIRS = {
    "web": ((9,), (("sparse", 0, 0, WEB_EDGES),)),
    "layers": ((3, 5, 3), (("sparse", 0, 1, DOWN), ("sparse", 1, 2, ON))),
    "both-directions": ((3, 5, 3), (("sparse", 0, 1, DOWN), ("sparse", 1, 2, ON), ("sparse", 1, 0, UP))),
    "beside-dense": ((3, 5, 3), (("sparse", 0, 1, DOWN), ("dense", 1, 2))),
    "web-beside-dense": ((5, 9), (("dense", 0, 1), ("sparse", 1, 1, WEB_EDGES), ("sparse", 0, 0, ((1, 0), (3, 3), (0, 4))))),
}  # fmt: skip


class Relations:
    """Two pair updates and attention, by the engine and over dense [n, n, d] tensors of the same numbers. Row i reads column j."""

    def __init__(self, layers, blocks, reciprocal: bool, affine=None):
        self.layers, self.blocks, self.reciprocal, self.affine = layers, blocks, reciprocal, affine
        self.n, self.g = sum(layers), torch.Generator().manual_seed(2)
        self.sizes = [len(b[3]) if b[0] == "sparse" else layers[b[1]] * layers[b[2]] for b in blocks]
        d, h = 6, 7
        self.leaves = {"w": self.draw(sum(self.sizes), 1), "weight": self.draw(d, 3 if reciprocal else 1), "bias": self.draw(d), "x": self.draw(self.n, 4)}
        for k in range(2):
            shapes = {"edge": (h, d), "back": (h, d), "dst": (h, 4), "src": (h, 4), "b": (h,), "out": (d, h), "bo": (d,)}
            self.leaves.update({f"{name}{k}": self.draw(*s) for name, s in shapes.items()})
        self.leaves.update({name: self.draw(self.n, c) for name, c in (("q", 6), ("k", 6), ("v", 10))})
        self.leaves.update({name: self.draw(c, d) for name, c in (("wq", 6), ("wk", 6), ("add", 10), ("mul", 10))})

    def draw(self, *shape: int) -> torch.Tensor:
        return 0.5 * torch.randn(*shape, generator=self.g, dtype=FLOAT)

    def state(self, t: dict, memory: str | None = None) -> ngk.EdgeState:
        graph = ngk.NeuralGraph.from_blocks(self.layers, [block_of(k, *b) for k, b in enumerate(self.blocks)])
        weights = [w[None] if b[0] == "sparse" else w.reshape(1, self.layers[b[1]], self.layers[b[2]], 1) for w, b in zip(t["w"].split(self.sizes), self.blocks)]
        if self.affine:
            weights = [(w - shift) / scale for w, scale, shift in zip(weights, *self.affine)]
        e = ngk.EdgeState(graph, weights, encoders.Linear(t["weight"], t["bias"], self.reciprocal), self.affine)
        e = e.closure("edges") if memory else e
        for k in range(2):
            e = e.update(t["x"], t[f"edge{k}"], t[f"dst{k}"], t[f"src{k}"], t[f"b{k}"], t[f"out{k}"], t[f"bo{k}"], "gelu", True, t[f"back{k}"])
            e = e.checkpoint(None if memory == "virtual" else FLOAT) if memory else e
        return e

    def attended(self, t: dict, over: str, include_self: bool = True, memory: str | None = None) -> torch.Tensor:
        matrices = (t[name] for name in ("wq", "wk", "add", "mul"))
        return ngk.attend(self.state(t, memory), t["q"], t["k"], t["v"], *matrices, heads=2, scale=0.3, over=over, include_self=include_self)

    def dense(self, t: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """(states [n, n, d], joined [n, n])."""
        n, starts = self.n, [sum(self.layers[:k]) for k in range(len(self.layers))]
        raw, joined = t["w"].new_zeros(n, n, 1), torch.zeros(n, n, dtype=torch.bool)
        for w, (_, src, dst, *edges) in zip(t["w"].split(self.sizes), self.blocks):
            pairs = torch.tensor(edges[0]) if edges else torch.cartesian_prod(torch.arange(self.layers[src]), torch.arange(self.layers[dst]))
            j, i = pairs.T + torch.tensor([[starts[src]], [starts[dst]]])
            raw, joined[i, j] = raw.index_put((i, j), w), True
        if self.reciprocal:  # an edge is [w, 0, w]; a pair that is none reverses an edge, [0, w, w], or nothing
            back = torch.where(joined[..., None], 0.0, raw.transpose(0, 1))
            raw = torch.cat([raw, back, raw + back], -1)
        e = raw @ t["weight"].T + t["bias"]
        for k in range(2):
            z = e @ t[f"edge{k}"].T + e.transpose(0, 1) @ t[f"back{k}"].T + (t["x"] @ t[f"dst{k}"].T)[:, None] + t["x"] @ t[f"src{k}"].T + t[f"b{k}"]
            e = e + F.gelu(z) @ t[f"out{k}"].T + t[f"bo{k}"]
        return e, joined

    def masked(self, t: dict, over: str, include_self: bool = True) -> torch.Tensor:
        e, joined = self.dense(t)
        own = torch.eye(self.n, dtype=torch.bool) & include_self
        allowed = {"all": torch.ones_like(joined), "edges": joined | joined.T, "in": joined, "out": joined.T}[over] | own
        q, k = ((t[a][:, None] if a == "q" else t[a][None]) + e @ t[f"w{a}"].T for a in ("q", "k"))
        logits = 0.3 * (q * k).unflatten(-1, (2, -1)).sum(-1)
        weights = logits.masked_fill(~allowed[..., None], -math.inf).masked_fill(~allowed.any(1)[:, None, None], 0).softmax(1) * allowed[..., None]
        values = t["v"] * (e @ t["mul"].T) + e @ t["add"].T
        return (weights[..., None] * values.unflatten(-1, (2, -1))).sum(1).flatten(1)


@pytest.mark.parametrize("reciprocal", [False, True], ids=["one-way", "reciprocal"])
@pytest.mark.parametrize(("over", "include_self"), [("edges", True), ("in", True), ("out", True), ("edges", False), ("in", False)])
@pytest.mark.parametrize("name", PAIRS)
def test_attention_over_sparse_pairs_is_the_masked_dense_formula(name: str, over: str, include_self: bool, reciprocal: bool, backend: str):
    r = Relations(*PAIRS[name], reciprocal)
    wanted = run(lambda t: [r.masked(t, over, include_self)], r.leaves)
    with ngk.use_backend(backend):
        assert_close(run(lambda t: [r.attended(t, over, include_self)], r.leaves), wanted, 1e-9)


@pytest.mark.parametrize("reciprocal", [False, True], ids=["one-way", "reciprocal"])
@pytest.mark.parametrize("affine", [False, True], ids=["raw", "affine"])
@pytest.mark.parametrize("name", PAIRS)
def test_attention_over_all_pairs_of_a_sparse_graph_is_the_dense_formula(name: str, affine: bool, reciprocal: bool, backend: str):
    """With `affine`, the engine reads weights that the map takes back to the formula's."""
    r = Relations(*PAIRS[name], reciprocal, (tuple(2.0 + k for k in range(len(PAIRS[name][1]))), (0.3,) * len(PAIRS[name][1])) if affine else None)
    with ngk.use_backend(backend):
        assert_close(run(lambda t: [r.attended(t, "all")], r.leaves), run(lambda t: [r.masked(t, "all")], r.leaves), 1e-9)


@pytest.mark.parametrize("reciprocal", [False, True], ids=["one-way", "reciprocal"])
def test_packed_sparse_graphs_over_all_pairs(reciprocal: bool, backend: str):
    """One tensor of raw features gives what a tensor for each block gives; two copies of the first network are one part."""
    both, web, beside = (
        ngk.NeuralGraph.from_blocks(layers, [block_of(k, *b) for k, b in enumerate(blocks)])
        for layers, blocks in (PAIRS[name] for name in ("both-directions", "web", "beside-dense"))
    )
    packed = ngk.NeuralGraph.batch([both, both, web, beside], packed=True)
    listed = ngk.NeuralGraph(packed.parts)
    shapes = {"weight": (6, 3 if reciprocal else 1), "bias": (6,), **dict.fromkeys("qkv", (listed.num_nodes, 4)), **dict.fromkeys(("wq", "wk", "add"), (4, 6))}
    shapes |= {f"w{k}": shape for k, shape in enumerate(listed.weight_shapes(1))}
    g = torch.Generator().manual_seed(4)
    leaves = {name: torch.randn(shape, generator=g, dtype=FLOAT) for name, shape in shapes.items()}

    def attended(t: dict, graph: ngk.NeuralGraph) -> list[torch.Tensor]:
        weights = [t[f"w{k}"] for k in range(listed.num_weights)]
        affine = ((0.5,) * graph.num_weights, (0.2,) * graph.num_weights)
        e = ngk.EdgeState(graph, graph.pack(weights) if graph.packed else weights, encoders.Linear(t["weight"], t["bias"], reciprocal), affine)
        return [ngk.attend(e.restrict(0), t["q"], t["k"], t["v"], t["wq"], t["wk"], t["add"], heads=2, over="all")]

    with ngk.use_backend(backend):
        assert_close(run(lambda t: attended(t, packed), leaves), run(lambda t: attended(t, listed), leaves), 1e-12)


@pytest.mark.parametrize("over", ["edges", "in"])
@pytest.mark.parametrize("memory", ["virtual", "stored"])
@pytest.mark.parametrize("reciprocal", [False, True], ids=["one-way", "reciprocal"])
@pytest.mark.parametrize("name", PAIRS)
def test_checkpoints_of_sparse_pairs(name: str, reciprocal: bool, memory: str, over: str, backend: str):
    r = Relations(*PAIRS[name], reciprocal)
    with ngk.use_backend(backend):
        assert_close(run(lambda t: [r.attended(t, over, True, memory)], r.leaves), run(lambda t: [r.masked(t, over)], r.leaves), 1e-9)


@pytest.mark.parametrize("memory", [None, "stored"])
@pytest.mark.parametrize("reciprocal", [False, True], ids=["one-way", "reciprocal"])
@pytest.mark.parametrize("name", PAIRS)
def test_pair_updates_under_messages(name: str, reciprocal: bool, memory: str | None, backend: str):
    """The sums and largest of x_j + e_ij over the edges; checkpointed pairs that are no edges send none."""
    r = Relations(*PAIRS[name], reciprocal)

    def formula(t):
        e, joined = r.dense(t)
        m = t["x"] @ t["src0"].T @ torch.ones(7, 6, dtype=FLOAT) + e
        largest = m.masked_fill(~joined[..., None], -math.inf).amax(1)
        return [torch.stack([(m * joined[..., None]).sum(1), torch.where(joined.any(1)[:, None], largest, 0.0)], 1)]

    def messages(t):
        weight = torch.ones(6, 7, dtype=FLOAT) @ t["src0"]
        return [ngk.aggregate(r.state(t, memory), ngk.Message.concat(t["x"], torch.eye(6, dtype=FLOAT), None, 0 * weight, weight), ("sum", "max"))]

    with ngk.use_backend(backend):
        assert_close(run(messages, r.leaves), run(formula, r.leaves), 1e-9)


# ---- lists ----
def test_lists_hold_every_entry_once_in_the_order_of_destinations():
    g = torch.Generator().manual_seed(0)
    n, src, dst = 20000, torch.randint(0, 300, (20000,), generator=g), torch.randint(0, 7, (20000,), generator=g)
    for partner in (None, torch.randperm(n, generator=g)):
        lists = make_lists(Pairs(src, dst, torch.arange(n), partner), 300)
        i, j, number, other = read_lists(torch.cat([lists, torch.full((9,), -5)]), n)
        assert torch.equal(number.sort().values, torch.arange(n)) and (i.diff() >= 0).all()
        assert torch.equal(i, dst[number]) and torch.equal(j, src[number]) and torch.equal(other, number if partner is None else partner[number])


def test_lists_take_at_most_24_bytes_an_edge_and_are_made_once():
    g = torch.Generator().manual_seed(0)
    graphs = {
        24.1: torch.stack([torch.randperm(50000, generator=g), torch.randperm(50000, generator=g)]),  # one edge a neuron: the most
        17: torch.randint(0, 5000, (2, 100000), generator=g),
        10: all_edges(300, 300),
    }
    for most, index in graphs.items():
        graph = ngk.NeuralGraph.from_edge_index(index, 50000)
        table = graph.edges_as().table
        assert table.numel() * 8 / index.shape[1] < most
        e = linear_state(graph, torch.zeros(index.shape[1]))
        assert e.graph.edges_as(messages=True).table is table and graph.edges_as(False, True).table is table


# ---- errors ----
def edges(*pairs) -> torch.Tensor:
    return torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T


def closed(index: torch.Tensor, over: str = "edges"):
    return ngk.NeuralGraph.from_edge_index(index, 4).closure(over)


ERRORS = {
    "dtype": (lambda: ngk.NeuralGraph.from_edge_index(torch.zeros(2, 3, dtype=torch.int32), 4), TypeError, "Block.sparse: expected edge_index to be an int64 tensor, got torch.int32"),
    "list": (lambda: ngk.NeuralGraph.from_edge_index([[0], [1]], 4), TypeError, "Block.sparse: expected edge_index to be an int64 tensor, got list"),
    "transposed": (lambda: ngk.NeuralGraph.from_edge_index(torch.zeros(3, 2, dtype=torch.int64), 4), ValueError, r"Block.sparse: expected edge_index of shape \(2, E\), sources in row 0, got \(3, 2\)"),
    "device": (lambda: ngk.NeuralGraph.from_edge_index(torch.zeros(2, 3, dtype=torch.int64, device="meta"), 4), TypeError, "Block.sparse: expected edge_index with values, got one on meta"),
    "source": (lambda: ngk.NeuralGraph.from_edge_index(edges((4, 0)), 4), ValueError, "NeuralGraph: expected source indices of edge_index between 0 and 3, got 4 to 4"),
    "destination": (lambda: ngk.NeuralGraph.from_edge_index(edges((0, 1), (2, -1)), 4), ValueError, "NeuralGraph: expected destination indices of edge_index between 0 and 3, got -1 to 1"),
    "layer": (lambda: ngk.NeuralGraph.from_blocks([2, 3], [ngk.Block.sparse(0, 1, 0, edges((2, 2)))]), ValueError, "expected source indices of edge_index between 0 and 1, got 2 to 2"),
    "without-index": (lambda: ngk.NeuralGraph.from_blocks([2, 3], [ngk.Block("sparse", 0, 1, 0)]), ValueError, "expected an edge index for sparse blocks and for no others, got a sparse block; use Block.sparse"),
    "index-of-dense": (lambda: ngk.NeuralGraph.from_blocks([2, 3], [ngk.Block("dense", 0, 1, 0, index=EdgeIndex.of(edges((0, 0)), "test"))]), ValueError, "expected an edge index .*, got a dense block"),
    "duplicates": (lambda: closed(edges((0, 1), (2, 1), (0, 1))), ValueError, "NeuralGraph.closure: expected one edge from a neuron to another, got duplicates in edge_index; a pair of neurons has one state"),
    "all": (lambda: closed(edges((0, 1)), "all"), ValueError, "NeuralGraph.closure: expected over edges for a graph with sparse blocks, got all; make the state dense first"),
    "dense-duplicates": (lambda: linear_state(ngk.NeuralGraph.from_edge_index(edges((0, 1), (0, 1)), 4), torch.zeros(2)).dense(), ValueError, "EdgeState.dense: expected one edge from a neuron to another"),
    "dense-closed": (lambda: linear_state(ngk.NeuralGraph.from_edge_index(edges((0, 1)), 4), torch.zeros(1)).closure().dense(), ValueError, "EdgeState.dense: expected a state that is neither checkpointed nor closed"),
    "stored-one-way": (lambda: linear_state(ngk.NeuralGraph.from_edge_index(edges((0, 1)), 4).without_sharing(), torch.zeros(1)).update(None, torch.eye(3), None, None, None, torch.eye(3), None, weight_reverse=torch.eye(3)), ValueError, "NeuralGraph.closure: expected a graph whose states were not checkpointed"),
    "weights": (lambda: linear_state(ngk.NeuralGraph.from_edge_index(edges((0, 1)), 4), torch.zeros(2)), ValueError, r"EdgeState: expected weights\[0\] of shape \(1, 1, 1\) .*, got \(1, 2, 1\)"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "text"), ERRORS.values(), ids=ERRORS.keys())
def test_errors_name_the_rule_and_the_value(call, kind: type, text: str):
    with pytest.raises(kind, match=text):
        call()


def test_lists_are_made_where_the_edge_index_lies():
    """Whatever takes the default device instead meets tensors of another one here."""
    index = edges((0, 1), (2, 1), (3, 3), (1, 0), (3, 1))
    with torch.device("meta"):
        found = EdgeIndex.of(index, "test")
        found.check_unique("test")
        closed = found.closed(found.flipped(), 4, True)
        for pairs in (Pairs.of(found), Pairs.of(closed, closed.numbers_in(closed.flipped())), Pairs.of(found).first(0)):
            assert make_lists(pairs, 4).device.type == "cpu"


LISTED = [PLAIN.but(name, networks=networks, packed=packed, head=0) for name, networks, packed in (("web", (WEB,), False), ("unequal", SPARSE_UNEQUAL, False), ("packed", SPARSE_UNEQUAL, True))]


@pytest.mark.parametrize("sample", LISTED, ids=[s.name for s in LISTED])
def test_lists_of_a_gpu_stay_there(sample, backend: str, monkeypatch):
    """Tables name them by a number; ops for the CPU take them there. The same bits, also of copies of the graph that outlive it."""
    t, graph = cast(leaves(sample), torch.float32), graph_of(sample)
    monkeypatch.setattr(topology, "stays", lambda device: True)  # as if this device were a GPU
    apart = graph_of(sample)
    names = (False, True), (False, False), (False, True)
    tables = [(graph.edges_as(*n).table, apart.edges_as(*n).table) for n in names]
    assert all(len(short) == len(topology.rows_of(short)) * len(topology.COLUMNS) + 2 < len(whole) for whole, short in tables)
    monkeypatch.setattr(topology, "stays", lambda device: backend in GPU)
    if backend not in GPU:
        assert all(torch.equal(apart.edges_as(*n).on(torch.device("cpu")), graph.edges_as(*n).table) for n in names)
    copies = apart, copy.deepcopy(apart), pickle.loads(pickle.dumps(apart))
    del apart, tables
    with ngk.use_backend(backend):
        wanted = [o.detach() for o in engine(sample, t, graph)]
        for found in copies:
            assert all(torch.equal(o, w) for o, w in zip(engine(sample, t, found), wanted, strict=True))
    assert_bitwise(run_engine(sample, t, backend), run(lambda live: engine_on_graph(backend, sample, live, graph), t))


def engine_on_graph(backend: str, sample, live, graph) -> list[torch.Tensor]:
    with ngk.use_backend(backend):
        return engine(sample, live, graph)


GPU = ("reference", "triton", "cuda")  # backends that take tensors of a GPU


def test_lists_live_as_long_as_their_table(monkeypatch):
    monkeypatch.setattr(topology, "stays", lambda device: True)
    graph = graph_of(LISTED[0])
    table = graph.edges_as().table
    lists, clone = topology.lists_of(table, 0), table.clone()
    del graph
    assert torch.equal(topology.lists_of(clone, 0), lists) and torch.equal(topology.lists_of(table, 2), lists[2:])
    del table
    gc.collect()
    with pytest.raises(RuntimeError, match="found that graph gone; keep it while its results are in use"):
        topology.lists_of(clone, 0)


def test_malformed_lists_are_refused():
    """What kernels read is checked: a table whose lists lead out of it does not run."""
    graph = graph_of(PLAIN.but("web", networks=(WEB,)))
    t = cast(leaves(PLAIN.but("web", networks=(WEB,))), torch.float32)
    table = graph.edges_as().table
    lists = int(graph.edges_as().rows[0, -2])
    for place, value in ((0, 10**9), (lists, 10**6), (lists + 2, 10**6), (lists + 7, 10**6)):
        kept = int(table[place])
        table[place] = value
        with ngk.use_backend("cpp"), pytest.raises(RuntimeError, match="ngkernels: malformed"):
            engine(PLAIN.but("web", networks=(WEB,)), t, graph)
        table[place] = kept

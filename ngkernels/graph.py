"""The input network as a graph: layers of neurons and blocks of weights between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from .edge_index import EdgeIndex
from .topology import DENSE, DIAGONAL, OVER, SPARSE, Topology, edge_topology, num_rows, pair_topology

BLOCK_KINDS = (DENSE, DIAGONAL, SPARSE)
CLOSE_FIRST = (
    "NeuralGraph.closure: expected a graph whose states were not checkpointed, got one whose other pairs have no state; "
    "checkpoint the closed state: edges.closure().checkpoint()"
)


@dataclass(frozen=True)
class Block:
    """Weights between node layer `src` and node layer `dst` of one network.

    `kind` is "dense" (every pair; weights (n_src, n_dst, C)), "diagonal" (neuron c to neuron c, c below
    the smaller width; weights (n, C)) or "sparse" (the pairs of `index`; weights (E, C); see `sparse`). `weight` is the position in the graph's weight list and `reverse`
    marks a block that reads another block's weights against their direction. A block of pairs that are no edges
    (`edge` False, see NeuralGraph.closure) may have no weights at all: weight -1, raw features 0.
    """

    kind: str
    src: int
    dst: int
    weight: int
    reverse: bool = False
    edge: bool = True
    index: EdgeIndex | None = None

    @classmethod
    def sparse(cls, src: int, dst: int, weight: int, edge_index: torch.Tensor) -> Block:
        """The edges of `edge_index`, int64 [2, E] on the CPU: row 0 neurons of layer `src`, row 1 of layer `dst`, both counted
        within their layer. Weights, readouts and stored states keep its order. It is kept, not copied: do not change it.

        Raises:
            TypeError, ValueError: another dtype, device or shape; indices beyond a layer, when the graph is built.
        """
        return cls(SPARSE, src, dst, weight, index=EdgeIndex.of(edge_index, "Block.sparse"))

    @property
    def owns(self) -> bool:
        """Whether a weight tensor has this block's shape."""
        return self.weight >= 0 and not self.reverse

    def reversed(self) -> Block:
        """The block that reads the same weights against their direction."""
        return Block(self.kind, self.dst, self.src, self.weight, not self.reverse, index=None if self.index is None else self.index.flipped())


@dataclass(frozen=True)
class Part:
    """`copies` networks of one architecture: layer widths and blocks. `token`: the first layer is no neuron but a
    token, whose pairs start from a state of 0 (see NeuralGraph.with_token)."""

    layers: tuple[int, ...]
    blocks: tuple[Block, ...]
    copies: int = 1
    token: bool = False

    @property
    def num_nodes(self) -> int:
        return sum(self.layers)

    def edges_of(self, block: Block) -> int:
        if block.kind == SPARSE:
            return len(block.index)
        n_src, n_dst = self.layers[block.src], self.layers[block.dst]
        return min(n_src, n_dst) if block.kind == DIAGONAL else n_src * n_dst

    def features_of(self, block: Block) -> int:
        """How many of a block's edges have raw features."""
        return self.edges_of(block) if block.index is None else block.index.raw

    @property
    def num_weights(self) -> int:
        return sum(b.owns for b in self.blocks)

    @property
    def weight_sizes(self) -> tuple[tuple[int, ...], ...]:
        """(copies, n_src, n_dst), (copies, n) or (copies, E) of each weight, without channels."""
        sizes = {}
        for b in self.blocks:
            if b.owns:
                n_src, n_dst = self.layers[b.src], self.layers[b.dst]
                shape = {DENSE: (n_src, n_dst), DIAGONAL: (min(n_src, n_dst),)}
                sizes[b.weight] = (self.copies, *(shape[b.kind] if b.index is None else (b.index.raw,)))
        return tuple(sizes[k] for k in range(len(sizes)))

    def opposite(self, k: int) -> int | None:
        """Number of the block that joins the layers of block k in the other direction (k itself inside a layer)."""
        b = self.blocks[k]
        return next((n for n, c in enumerate(self.blocks) if (c.src, c.dst, c.kind) == (b.dst, b.src, b.kind)), None)

    def has_reversals(self, k: int) -> bool:
        """Whether each edge of block k has its reversal."""
        other, index = self.opposite(k), self.blocks[k].index
        return other is not None and (index is None or bool((index.numbers_in(self.blocks[other].index) >= 0).all()))

    @property
    def in_degree(self) -> torch.Tensor:
        """Of the nodes of one copy, int64."""
        degree = [torch.zeros(d, dtype=torch.int64) for d in self.layers]
        for b in self.blocks:
            if b.kind == SPARSE:
                degree[b.dst] += torch.bincount(b.index.dst, minlength=self.layers[b.dst])
            elif b.kind == DIAGONAL:
                degree[b.dst][: min(self.layers[b.src], self.layers[b.dst])] += 1
            else:
                degree[b.dst] += self.layers[b.src]
        return torch.cat(degree)

    @property
    def max_in_degree(self) -> int:
        if any(b.kind == SPARSE for b in self.blocks):
            return int(self.in_degree.max())
        degree = [0] * len(self.layers)  # reached by the first neurons of a layer
        for b in self.blocks:
            degree[b.dst] += 1 if b.kind == DIAGONAL else self.layers[b.src]
        return max(degree)


def _layer_index(op: str, part: Part, layer: int) -> int:
    n = len(part.layers)
    if not -n <= layer < n:
        raise ValueError(f"{op}: expected layer between {-n} and {n - 1} ({n} node layers), got {layer}")
    return layer % n


def _check_part(part: Part) -> None:
    for width in part.layers:
        if not isinstance(width, int) or width < 1:
            raise ValueError(f"NeuralGraph: expected layer widths to be integers of at least 1, got {width!r} in {part.layers}")
    if part.copies < 1:
        raise ValueError(f"NeuralGraph: expected copies of at least 1, got {part.copies}")
    owners: set[int] = set()
    for b in part.blocks:
        if b.kind not in BLOCK_KINDS:
            raise NotImplementedError(f"NeuralGraph: block kind {b.kind!r} is not built; available: {', '.join(BLOCK_KINDS)}")
        for name, layer in (("src", b.src), ("dst", b.dst)):
            if not 0 <= layer < len(part.layers):
                raise ValueError(f"NeuralGraph: expected block {name} below {len(part.layers)} (number of layers), got {layer}")
        if (b.kind == SPARSE) != (b.index is not None):
            raise ValueError(f"NeuralGraph: expected an edge index for sparse blocks and for no others, got a {b.kind} block; use Block.sparse")
        if b.index is not None:
            b.index.check("NeuralGraph", part.layers[b.src], part.layers[b.dst])
        if b.weight < 0 and b.edge:
            raise ValueError(f"NeuralGraph: expected the weight of a block of edges to be at least 0, got {b.weight}")
        if b.owns:
            if b.weight in owners:
                raise ValueError(f"NeuralGraph: expected one forward block for each weight, got two for weight {b.weight}")
            owners.add(b.weight)
    named = 1 + max([-1, *[b.weight for b in part.blocks]])
    if owners != set(range(named)):
        raise ValueError(f"NeuralGraph: expected weights 0..{named - 1} to have a forward block each, got {sorted(owners)}")


def _closed(part: Part, over: str, reciprocal: bool) -> Part:
    """See NeuralGraph.closure."""
    blocks = list(part.blocks)
    joined: dict[tuple[int, int], Block] = {}
    for b in blocks:
        if (b.src, b.dst) in joined or joined.get((b.dst, b.src), b).kind != b.kind:
            raise ValueError(
                f"NeuralGraph.closure: expected at most one block between two node layers, got several between {b.src} and {b.dst}; "
                "a pair of neurons has one state (attention and pair updates)"
            )
        joined[b.src, b.dst] = b

    def add(block: Block) -> None:
        if (block.src, block.dst) not in joined:
            joined[block.src, block.dst] = block
            blocks.append(block)

    if over == "all" and any(b.kind == SPARSE for b in part.blocks):
        raise NotImplementedError("NeuralGraph.closure: expected over edges, in or out for a graph with sparse blocks, got all; give the block as a dense one")
    layers = range(len(part.layers))
    blocks = [_closed_index(b, joined, part.layers, reciprocal) for b in blocks]
    for b in part.blocks:
        if b.kind == SPARSE and (b.dst, b.src) not in joined:
            index = b.index.flipped().but(edges=0, raw=len(b.index) if reciprocal else 0)
            add(replace(b.reversed(), edge=False, index=index) if reciprocal else Block(SPARSE, b.dst, b.src, -1, False, False, index))
        add(replace(b.reversed(), edge=False) if reciprocal and b.weight >= 0 else Block(b.kind, b.dst, b.src, -1, False, False))
    for a in layers:
        add(Block(DENSE if over == "all" else DIAGONAL, a, a, -1, False, False))
    for a in layers:
        for b in layers if over == "all" or (part.token and a == 0) else ():
            add(Block(DENSE, a, b, -1, False, False))
            add(Block(DENSE, b, a, -1, False, False))
    return Part(part.layers, tuple(blocks), part.copies, part.token)


def _closed_index(block: Block, joined: dict[tuple[int, int], Block], layers: tuple[int, ...], reciprocal: bool) -> Block:
    """A sparse block with the reversals of the edges of its opposite; those that one of the two has not are no edges."""
    opposite = joined.get((block.dst, block.src))
    if block.kind != SPARSE or opposite is None or opposite.index is block.index.flipped():
        return block
    return replace(block, index=block.index.closed(opposite.index, layers[block.dst] if block.src == block.dst else None, reciprocal))


class NeuralGraph:
    """A disjoint union of networks: node layers and blocks of weights. Immutable; holds no weights.

    Nodes are numbered network by network, layer by layer, inputs first. Messages flow from `src` (j) to
    `dst` (i). A batch of equal networks is one part with `copies` > 1 and weights of leading size `copies`.

    Args:
        parts: the architectures of the union.
        rows: None, or the node layer (negative counts from the end) that outputs are restricted to: only
            edges into that layer are then computed and outputs have its nodes' rows only.
        packed: weights come as one tensor [forward edges, C] in edge order instead of one tensor a block.

    Raises:
        ValueError, NotImplementedError: a width below 1, a block that names no layer, an unknown kind.
    """

    def __init__(self, parts: Sequence[Part], rows: int | None = None, packed: bool = False):
        self.parts = tuple(parts)
        if not self.parts:
            raise ValueError("NeuralGraph: expected at least one part, got none")
        if rows is not None:
            for p in self.parts:
                _layer_index("NeuralGraph.restrict", p, rows)
        self.rows = rows
        self.packed = packed
        for part in self.parts:
            _check_part(part)
        self.num_nodes = sum(p.copies * p.num_nodes for p in self.parts)
        self.num_edges = sum(p.copies * sum(p.edges_of(b) for b in p.blocks) for p in self.parts)
        self.num_weights = 1 if packed else sum(p.num_weights for p in self.parts)
        self.num_graphs = sum(p.copies for p in self.parts)
        self.has_reverse = any(b.reverse for p in self.parts for b in p.blocks)
        self.closed: str | None = None  # "all" or "edges": every pair that such attention reads has a block
        self.stored = False  # weights are the states of a checkpoint: pairs without a block have none
        self._weight_sizes = [size for p in self.parts for size in p.weight_sizes]
        self._cache: dict = {}
        self.max_in_degree = max(p.max_in_degree for p in self.parts)
        self.num_rows = num_rows(self)
        if not any(b.index and (not b.edge or b.index.edges < len(b.index)) for p in self.parts for b in p.blocks):
            self.edges_as()  # now, so that torch.compile finds it; of a closed graph, the pairs may be all that is read

    # ---- constructors ----
    @classmethod
    def mlp(cls, layout: Sequence[int], batch_size: int = 1, reverse: bool = False) -> NeuralGraph:
        """The graph of `batch_size` MLPs of widths `layout`: block l joins layer l to layer l + 1.

        With `reverse`, every block is followed (after all forward blocks) by its reversal. Weights are
        `len(layout) - 1` tensors (batch_size, d_l, d_(l+1), C).

        Raises:
            ValueError: fewer than two layers, or a width below 1.
        """
        layout = tuple(d if isinstance(d, float) else int(d) for d in layout)
        if len(layout) < 2:
            raise ValueError(f"NeuralGraph.mlp: expected a layout of at least 2 layers, got {layout}")
        blocks = [Block(DENSE, k, k + 1, k) for k in range(len(layout) - 1)]
        return cls.from_blocks(layout, blocks, batch_size, reverse)

    @classmethod
    def from_blocks(cls, layers: Sequence[int], blocks: Sequence[Block], batch_size: int = 1, reverse: bool = False) -> NeuralGraph:
        """A graph from its node layers' widths and its blocks; `reverse` adds every block's reversal."""
        blocks = list(blocks)
        if reverse:
            blocks += [b.reversed() for b in blocks if not b.reverse]
        return cls([Part(tuple(layers), tuple(blocks), batch_size)])

    @classmethod
    def from_edge_index(cls, edge_index: torch.Tensor, num_nodes: int) -> NeuralGraph:
        """The graph of any edges: one node layer of `num_nodes` neurons, one sparse block (see Block.sparse).

        `edge_index` is int64 [2, E] on the CPU: sources j in row 0, destinations i in row 1; duplicates and self-loops are edges like
        any others. Weights are one tensor (1, E, C), [E, C] or [E], in the order of `edge_index`.

        Raises:
            TypeError, ValueError: another dtype, device or shape, indices that are no nodes.

        Note: kernels read lists that are made with the graph, once: 8 bytes an edge, and 8 for each neuron of each piece of about 4096
            edges (ngkernels/edge_index.py). Node terms of all neurons exist during a call: 8 d bytes a neuron and term, twice that in
            backward. Graphs derived from this one (restricted, closed, of a checkpoint) have lists of their own; torch.compile needs them
            made, by one call without it.
        """
        return cls.from_blocks([num_nodes], [Block.sparse(0, 0, 0, edge_index)])

    @classmethod
    def batch(cls, graphs: Sequence[NeuralGraph], packed: bool = False) -> NeuralGraph:
        """The disjoint union of `graphs`, unequal ones too; nodes and weights follow one another.

        With `packed` the weights are one tensor [forward edges, C] (see `pack`): for thousands of small
        networks, where a list of tensors would cost more than the work.

        Raises:
            ValueError: no graphs, or restricted ones.
        """
        graphs = list(graphs)
        if not graphs:
            raise ValueError("NeuralGraph.batch: expected at least one graph, got none")
        if any(g.rows is not None for g in graphs):
            raise ValueError("NeuralGraph.batch: expected unrestricted graphs; batch first, then restrict")
        if any(g.closed for g in graphs):
            raise ValueError("NeuralGraph.batch: expected graphs that are not closed; batch first, then close")
        parts: list[Part] = []
        for p in (p for g in graphs for p in g.parts):
            if packed and parts and (parts[-1].layers, parts[-1].blocks, parts[-1].token) == (p.layers, p.blocks, p.token):
                parts[-1] = replace(parts[-1], copies=parts[-1].copies + p.copies)
            else:
                parts.append(p)
        return cls(parts, packed=packed)

    # ---- derived graphs ----
    def _derived(self, key: tuple, parts: Sequence[Part], rows: int | None, closed: str | None, stored: bool | None = None) -> NeuralGraph:
        if key not in self._cache:
            self._cache[key] = NeuralGraph(parts, rows, self.packed)
            self._cache[key].closed = closed
            self._cache[key].stored = self.stored if stored is None else stored
        return self._cache[key]

    def restrict(self, layer: int = -1) -> NeuralGraph:
        """The same graph with outputs only for node layer `layer` of every network (dead edges dropped)."""
        return self._derived(("restrict", layer), self.parts, layer, self.closed)

    def without_sharing(self) -> NeuralGraph:
        """The same edges with a weight tensor for each block: the graph of a stored edge state."""
        parts = [
            Part(p.layers, tuple(Block(b.kind, b.src, b.dst, k, False, b.edge, b.index and b.index.owned()) for k, b in enumerate(p.blocks)), p.copies, p.token)
            for p in self.parts
        ]
        return self._derived(("without_sharing",), parts, self.rows, self.closed, True)

    def with_token(self) -> NeuralGraph:
        """The same networks with one more node in front of each: a token, joined to every neuron by pairs that are no
        edges and whose state is exactly 0 before the first update.

        Raises:
            ValueError: a graph that has tokens, or is restricted or closed already.
        """
        if any(p.token for p in self.parts) or self.rows is not None or self.closed:
            raise ValueError("NeuralGraph.with_token: expected an unrestricted graph without tokens; add the token first, then restrict")
        parts = [
            Part((1, *p.layers), tuple(replace(b, src=b.src + 1, dst=b.dst + 1) for b in p.blocks), p.copies, True) for p in self.parts
        ]
        return self._derived(("with_token",), parts, None, None)

    def closure(self, over: str = "edges", reciprocal: bool = False) -> NeuralGraph:
        """The graph with a block for every pair (i, j) that attention over `over` reads, edges or not.

        "edges" adds the reversal of every block and each neuron's pair with itself; "all" adds every other pair of neurons of
        the same network as well. What is added are no edges: their raw features are 0, or with `reciprocal` (an encoder that
        reads both directions) those of the edge they reverse. Weights stay as they are.

        Raises:
            ValueError: two blocks from one node layer to another, a graph that is closed over less, or that of a checkpoint.
        """
        if over not in ("all", "edges"):
            raise ValueError(f"NeuralGraph.closure: expected over to be all or edges, got {over!r}")
        if self.closed:
            if self.closed != over:
                raise ValueError(f"NeuralGraph.closure: expected a graph that is not closed, or over {over!r}, got one closed over {self.closed!r}")
            return self
        if self.stored:
            raise ValueError(CLOSE_FIRST)
        key = ("closure", over, reciprocal)
        return self._cache[key] if key in self._cache else self._derived(key, [_closed(p, over, reciprocal) for p in self.parts], self.rows, over)

    def check_pairs(self, reciprocal: bool = False) -> None:
        """Raises ValueError where the reversal of an edge has no single state."""
        if not self.stored:
            self.closure(self.closed or "edges", reciprocal)
        elif not all(p.has_reversals(k) for p in self.parts for k in range(len(p.blocks))):
            raise ValueError(CLOSE_FIRST)

    # ---- tables ----
    def edges_as(self, paired: bool = False, reciprocal: bool = False, messages: bool = False) -> Topology:
        """The table of every block; `paired`: with the edges' partners (ngkernels/topology.py). `messages`: without the pairs that
        are no edges."""
        key = ("edges", paired, reciprocal and paired, bool(messages and self.closed))
        if key not in self._cache:
            self._cache[key] = edge_topology(self, paired, reciprocal, messages)
        return self._cache[key]

    def pairs_as(self, over: str, include_self: bool = True) -> Topology:
        """The table of the pairs of a closed graph that attention over `over` reads, both directions in one row.

        `include_self`: a neuron's pair with itself as well, where it is no edge.
        """
        if over not in OVER:
            raise ValueError(f"NeuralGraph.pairs_as: expected over to be one of {', '.join(OVER)}, got {over!r}")
        key = ("pairs", over, include_self)
        if key not in self._cache:
            self._cache[key] = pair_topology(self, over, include_self)
        return self._cache[key]

    @property
    def in_degree(self) -> torch.Tensor:
        """In-degree of every node, int64 [num_nodes]."""
        if "in_degree" not in self._cache:
            self._cache["in_degree"] = torch.cat([p.in_degree.repeat(p.copies) for p in self.parts])
        return self._cache["in_degree"]

    @property
    def sparse_weights(self) -> list[bool]:
        """Whether each weight tensor is of a sparse block."""
        kinds = [{b.weight: b.kind for b in p.blocks if b.owns} for p in self.parts]
        return [False] if self.packed else [owned[k] == SPARSE for owned in kinds for k in range(len(owned))]

    def weight_shapes(self, channels: int) -> list[tuple[int, ...]]:
        """Expected shape of each weight tensor: (copies, d0, d1, C) dense, (copies, n, C) diagonal, (copies, E, C) sparse, [E, C] packed."""
        if self.packed:
            return [(sum(math.prod(size) for size in self._weight_sizes), channels)]
        return [(*size, channels) for size in self._weight_sizes]

    def pack(self, weights: Sequence[torch.Tensor]) -> torch.Tensor:
        """One tensor [forward edges, C] from weight tensors in the order of `batch`, a tensor (copies, ..., C) for each
        weight of each part; equal networks that `batch` joined to one part may also come one by one (1, ..., C).

        Raises:
            ValueError: too many or too few tensors, or shapes that do not fit.
        """
        rest, flat = list(weights), []

        def fits(tensors, p: Part, copies: int) -> bool:
            return len(tensors) == p.num_weights and all(tuple(t.shape[:-1]) == (copies, *size[1:]) for t, size in zip(tensors, p.weight_sizes))

        for p in self.parts:
            n = p.num_weights
            groups = [rest[:n]] if fits(rest[:n], p, p.copies) else [rest[k * n : (k + 1) * n] for k in range(p.copies)]
            rest = rest[n * len(groups) :]
            for group in groups:
                if not fits(group, p, p.copies // len(groups)):
                    sizes = ", ".join(f"({', '.join(map(str, size))}, C)" for size in p.weight_sizes)
                    raise ValueError(f"NeuralGraph.pack: expected weights {sizes} for a network of widths {p.layers}, got {[tuple(t.shape) for t in group]}")
                flat.append(torch.cat([w.reshape(w.shape[0], -1, w.shape[-1]) for w in group], 1).flatten(0, 1))
        if rest:
            raise ValueError(f"NeuralGraph.pack: expected {len(list(weights)) - len(rest)} weight tensors for {self}, got {len(list(weights))}")
        return torch.cat(flat)

    def node_layer(self, layer: int) -> torch.Tensor:
        """Indices of the nodes of node layer `layer` (negative counts from the end), int64, network by network."""
        pieces, node = [], 0
        for p in self.parts:
            k = _layer_index("NeuralGraph.node_layer", p, layer)
            first = node + sum(p.layers[:k])
            pieces.append((first + torch.arange(p.copies)[:, None] * p.num_nodes + torch.arange(p.layers[k])).flatten())
            node += p.copies * p.num_nodes
        return torch.cat(pieces)

    def graph_of_node(self) -> torch.Tensor:
        """Index of the network every node belongs to, int64 [num_nodes]."""
        sizes = torch.tensor([p.num_nodes for p in self.parts for _ in range(p.copies)])
        return torch.repeat_interleave(torch.arange(self.num_graphs), sizes)

    def __repr__(self) -> str:
        kinds = ", ".join(f"{p.copies} x {list(p.layers)}" for p in self.parts[:4])
        return f"NeuralGraph({kinds}{', ...' if len(self.parts) > 4 else ''}; {self.num_nodes} nodes, {self.num_edges} edges)"

"""The input network as a graph: layers of neurons and blocks of weights between them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from .blocks import Block, Part, check_part, closed_part, layer_index
from .kept import kept
from .topology import DENSE, OVER, SPARSE, Topology, edge_topology, num_rows, pair_topology

CLOSE_FIRST = (
    "NeuralGraph.closure: expected a graph whose states were not checkpointed, got one whose other pairs have no state; "
    "checkpoint the closed state: edges.closure().checkpoint()"
)


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
                layer_index("NeuralGraph.restrict", p, rows)
        self.rows = rows
        self.packed = packed
        for part in self.parts:
            check_part(part)
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
        self._begin()

    def _begin(self) -> None:
        if not any(b.index and (not b.edge or b.index.edges < len(b.index)) for p in self.parts for b in p.blocks):
            self.edges_as()  # now, so that torch.compile finds it; of a closed graph, the pairs may be all that is read

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_cache": {}}  # tables are made anew: they may name lists of this process

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._begin()

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

        `edge_index` is int64 [2, E], sources j in row 0, destinations i in row 1; duplicates and self-loops are edges like any others. It
        is sorted on the device where it lies. Weights are one tensor (1, E, C), [E, C] or [E], in the order of `edge_index`.

        Raises:
            TypeError, ValueError: another dtype or shape, indices that are no nodes.

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
    def derived(self, key: tuple, parts: Sequence[Part], rows: int | None, closed: str | None, stored: bool | None = None, packed: bool | None = None) -> NeuralGraph:
        """A graph that follows from this one by `key`: made once. Stored and packed as this one, unless given."""

        def make() -> NeuralGraph:
            graph = NeuralGraph(parts, rows, self.packed if packed is None else packed)
            graph.closed, graph.stored = closed, self.stored if stored is None else stored
            return graph

        return kept(self._cache, key, make)

    def restrict(self, layer: int = -1) -> NeuralGraph:
        """The same graph with outputs only for node layer `layer` of every network (dead edges dropped)."""
        return self.derived(("restrict", layer), self.parts, layer, self.closed)

    def without_sharing(self) -> NeuralGraph:
        """The same edges with a weight tensor for each block: the graph of a stored edge state."""
        parts = [
            Part(p.layers, tuple(Block(b.kind, b.src, b.dst, k, False, b.edge, b.index and b.index.owned()) for k, b in enumerate(p.blocks)), p.copies, p.token)
            for p in self.parts
        ]
        return self.derived(("without_sharing",), parts, self.rows, self.closed, True)

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
        return self.derived(("with_token",), parts, None, None)

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
        return self._cache[key] if key in self._cache else self.derived(key, [closed_part(p, over, reciprocal) for p in self.parts], self.rows, over)

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
        return kept(self._cache, key, lambda: edge_topology(self, paired, reciprocal, messages))

    def pairs_as(self, over: str, include_self: bool = True) -> Topology:
        """The table of the pairs of a closed graph that attention over `over` reads, both directions in one row.

        `include_self`: a neuron's pair with itself as well, where it is no edge.
        """
        if over not in OVER:
            raise ValueError(f"NeuralGraph.pairs_as: expected over to be one of {', '.join(OVER)}, got {over!r}")
        key = ("pairs", over, include_self)
        return kept(self._cache, key, lambda: pair_topology(self, over, include_self))

    @property
    def in_degree(self) -> torch.Tensor:
        """In-degree of every node, int64 [num_nodes]."""
        return kept(self._cache, "in_degree", lambda: torch.cat([p.in_degree.repeat(p.copies) for p in self.parts]))

    @property
    def has_sparse(self) -> bool:
        return any(b.kind == SPARSE for p in self.parts for b in p.blocks)

    @property
    def sparse_weights(self) -> list[bool]:
        """Whether each weight tensor is of a sparse block."""
        kinds = [{b.weight: b.kind for b in p.blocks if b.owns} for p in self.parts]
        return [False] if self.packed else [owned[k] == SPARSE for owned in kinds for k in range(len(owned))]

    @property
    def node_bounds(self) -> torch.Tensor:
        """The first node of every network, and the number of nodes: int64 [num_graphs + 1]."""
        sizes = [0, *(p.num_nodes for p in self.parts for _ in range(p.copies))]
        return kept(self._cache, "node_bounds", lambda: torch.tensor(sizes, device="cpu").cumsum(0))

    def weight_shapes(self, channels: int) -> list[tuple[int, ...]]:
        """Expected shape of each weight tensor: (copies, d0, d1, C) dense, (copies, n, C) diagonal, (copies, E, C) sparse, [E, C] packed."""
        if self.packed:
            return [(sum(math.prod(size) for size in self._weight_sizes), channels)]
        return [(*size, channels) for size in self._weight_sizes]

    def pack(self, weights: Sequence[torch.Tensor]) -> torch.Tensor:
        """One tensor [forward edges, C] from weight tensors in the order of `batch`, a tensor (copies, ..., C) for each
        weight of each part; equal networks that `batch` joined to one part may also come in groups (1, ..., C) of fewer.

        Raises:
            ValueError: too many or too few tensors, or shapes that do not fit.
        """
        rest, flat = list(weights), []
        for p in self.parts:
            copies = 0
            while copies < p.copies:
                group, rest = rest[: p.num_weights], rest[p.num_weights :]
                more = group[0].shape[0] if group and group[0].dim() else 0
                fits = [tuple(t.shape[:-1]) for t in group] == [(more, *size[1:]) for size in p.weight_sizes]
                if not fits or not 0 < more <= p.copies - copies:
                    sizes = ", ".join(f"({', '.join(map(str, size))}, C)" for size in p.weight_sizes)
                    raise ValueError(f"NeuralGraph.pack: expected weights {sizes} for a network of widths {p.layers}, got {[tuple(t.shape) for t in group]}")
                copies += more
                flat.append(torch.cat([w.reshape(more, -1, w.shape[-1]) for w in group], 1).flatten(0, 1))
        if rest:
            raise ValueError(f"NeuralGraph.pack: expected {len(list(weights)) - len(rest)} weight tensors for {self}, got {len(list(weights))}")
        return torch.cat(flat)

    def node_layer(self, layer: int) -> torch.Tensor:
        """Indices of the nodes of node layer `layer` (negative counts from the end), int64, network by network."""
        pieces, node = [], 0
        for p in self.parts:
            k = layer_index("NeuralGraph.node_layer", p, layer)
            first = node + sum(p.layers[:k])
            pieces.append((first + torch.arange(p.copies, device="cpu")[:, None] * p.num_nodes + torch.arange(p.layers[k], device="cpu")).flatten())
            node += p.copies * p.num_nodes
        return torch.cat(pieces)

    def graph_of_node(self) -> torch.Tensor:
        """Index of the network every node belongs to, int64 [num_nodes]."""
        sizes = torch.tensor([p.num_nodes for p in self.parts for _ in range(p.copies)], device="cpu")
        return torch.repeat_interleave(torch.arange(self.num_graphs, device="cpu"), sizes)

    def on(self, device: torch.device, name, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What `make` says of this graph, on a device. Kept, so that later calls copy nothing from the host and wait for nothing."""
        cache = {} if torch.compiler.is_compiling() and (name, device) not in self._cache else self._cache
        return kept(cache, (name, device), lambda: make().to(device))

    def __repr__(self) -> str:
        kinds = ", ".join(f"{p.copies} x {list(p.layers)}" for p in self.parts[:4])
        return f"NeuralGraph({kinds}{', ...' if len(self.parts) > 4 else ''}; {self.num_nodes} nodes, {self.num_edges} edges)"

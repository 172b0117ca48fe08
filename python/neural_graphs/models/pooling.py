"""Node and edge states of each network to one vector."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ngkernels import EdgeState, Message, NeuralGraph, aggregate, attend
from ngkernels.blocks import DENSE, Part

SHORT = {"cat": ("cat", "last"), "mean": ("mean", "all"), "max": ("max", "all"), "cat_mean": ("cat_mean", "all")}
NODE_METHODS, EDGE_METHODS = ("cat", "mean", "max", "cat_mean"), ("mean_edge", "max_edge")


@dataclass(frozen=True)
class Pooling:
    """`method` over `where`: "all" nodes, those of the "last" layer, or those of layer number `where`.

    cat: the layer's nodes one after the other. mean, max: over nodes. cat_mean: the mean of every layer, one after
    the other. mean_edge, max_edge: over all ordered pairs of nodes (or all pairs into the last layer), where a pair
    without an edge counts as 0. cls_token: the state of a node added in front of every network, which is layer 0.
    """

    method: str
    where: str | int
    op: str = "Pooling"  # who asks, for messages

    @classmethod
    def parse(cls, op: str, pooling, layers: int, token: bool = False) -> Pooling:
        """From "cat", "mean", "max", "cat_mean", "cls_token" (if there may be a `token`) or a pair (method, where).

        Raises:
            ValueError: anything else.
        """
        if pooling == "cls_token" and token:
            return cls(pooling, 0, op)
        pair = SHORT.get(pooling) if isinstance(pooling, str) else tuple(pooling)
        if pair is not None and len(pair) == 2:
            method, where = pair
            at_layer = where == "last" or (isinstance(where, int) and -layers <= where < layers)
            if (method in ("mean", "max") and (where == "all" or at_layer)) or (method == "cat" and at_layer):
                return cls(method, where, op)
            if pair in (("cat_mean", "all"), ("mean_edge", "all"), ("max_edge", "all"), ("mean_edge", "last")):
                return cls(method, where, op)
        raise ValueError(
            f"{op}: expected pooling cat, mean, max, cat_mean{', cls_token' if token else ''} or a pair: (cat | mean | max, last or a layer number below {layers}), "
            f"(mean | max | cat_mean | mean_edge | max_edge, all), (mean_edge, last); got {pooling!r}"
        )

    @property
    def of_edges(self) -> bool:
        return self.method in EDGE_METHODS

    @property
    def rows(self) -> int | None:
        """The only node layer whose states are read, or None."""
        if self.of_edges or self.where == "all":
            return None
        return -1 if self.where == "last" else int(self.where)

    def features(self, layout, d_node: int, d_edge: int) -> int:
        """Length of the vector."""
        if self.method == "cat_mean":
            return len(layout) * d_node
        if self.of_edges:
            return d_edge
        return layout[self.rows] * d_node if self.method == "cat" else d_node

    def nodes(self, graph: NeuralGraph, x: torch.Tensor) -> torch.Tensor:
        """[num_graphs, features] from node states: all rows, or those of layer `rows`.

        Raises:
            ValueError: cat over networks of unequal width.
        """
        if self.method == "cls_token":
            return x
        sizes = [(p.copies, p.num_nodes if self.rows is None else p.layers[self.rows]) for p in graph.parts]
        if self.method == "cat":
            if len({n for _, n in sizes}) > 1:
                raise ValueError(
                    f"{self.op}: expected equal widths of the pooled layer for pooling cat, got {sorted({n for _, n in sizes})}; use mean or max"
                )
            return x.reshape(graph.num_graphs, -1)
        if self.method == "cat_mean":
            pieces = zip(x.split([c * n for c, n in sizes]), graph.parts, strict=True)
            return torch.cat([torch.cat([y.mean(1) for y in v.view(p.copies, p.num_nodes, -1).split(p.layers, 1)], 1) for v, p in pieces])
        if len(sizes) == 1:
            x = x.view(graph.num_graphs, -1, x.shape[1])
            return x.mean(1) if self.method == "mean" else x.amax(1)
        return reduce_segments(x, *_segments(graph, self.rows, x.device), self.method)

    def edges(self, graph: NeuralGraph, edges: EdgeState, x: torch.Tensor) -> torch.Tensor:
        """[num_graphs, width] from edge states; x: any node states, not read."""
        last = self.where == "last"
        reduced = aggregate(edges.restrict(-1) if last else edges, _states(edges, x), ("sum" if self.method == "mean_edge" else "max",))[:, 0]
        index, sizes = _segments(graph, -1 if last else None, x.device)
        if self.method == "max_edge":
            return reduce_segments(reduced, index, sizes, "max").clamp(min=0)  # a pair without an edge is always there
        return reduce_segments(reduced, index, sizes, "mean") / graph.on(x.device, "nodes of graphs", graph.node_bounds.diff)[:, None]


def _states(edges: EdgeState, x: torch.Tensor) -> Message:
    """The message that is e_ij itself; x: any node states, not read."""
    nothing = x.new_zeros(edges.width, x.shape[1])
    return Message.concat(x.detach(), torch.eye(edges.width, dtype=x.dtype, device=x.device), None, nothing, nothing)


def _segments(graph: NeuralGraph, layer: int | None, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(which network each node of node layer `layer`, None: of all, belongs to; how many nodes each network has there), int64."""

    def sizes() -> torch.Tensor:
        return torch.tensor([p.num_nodes if layer is None else p.layers[layer] for p in graph.parts for _ in range(p.copies)])

    index = graph.on(device, ("networks of nodes", layer), lambda: torch.repeat_interleave(torch.arange(graph.num_graphs), sizes()))
    return index, graph.on(device, ("nodes of networks", layer), sizes)


def reduce_segments(x: torch.Tensor, index: torch.Tensor, sizes: torch.Tensor, method: str) -> torch.Tensor:
    """Mean or max [segments, F] of rows of x; index: segment of each; sizes: rows of each segment."""
    zeros = x.new_zeros(len(sizes), x.shape[1])
    if method == "mean":
        return zeros.index_add(0, index, x) / sizes[:, None]
    return zeros.scatter_reduce(0, index[:, None].expand_as(x), x, "amax", include_self=False)


HIDDEN = -1e4  # a logit whose exponential is 0 in every dtype


def mean_of_pairs(edges: EdgeState, x: torch.Tensor, over: str, last: bool) -> torch.Tensor:
    """[num_graphs, D]: the mean of e_ij over all pairs (i, j) that `ngkernels.attend` looks at; `last`: j in the last layer.

    An attention whose weights are all equal. x: any node states, not read.
    """
    graph, width = edges.graph, edges.width
    ones, key = x.new_ones(graph.num_nodes, 1), x.new_zeros(graph.num_nodes, 1)
    if last:
        key = (key + HIDDEN).index_fill(0, graph.on(x.device, ("node layer", -1), lambda: graph.node_layer(-1)), 0)
    nothing, eye = x.new_zeros(1, width), torch.eye(width, dtype=x.dtype, device=x.device)
    means = attend(edges, ones, key, x.new_zeros(graph.num_nodes, width), nothing, nothing, eye, heads=1, scale=1.0, over=over)
    counts = graph.on(x.device, ("pairs", over, last), lambda: _pairs(graph, over, last)).to(x.dtype)[:, None]
    index = graph.on(x.device, "graph of node", graph.graph_of_node)
    total = x.new_zeros(graph.num_graphs, width).index_add(0, index, counts * means)
    return total / x.new_zeros(graph.num_graphs, 1).index_add(0, index, counts)


def largest_of_pairs(edges: EdgeState, x: torch.Tensor) -> torch.Tensor:
    """[num_graphs, D]: the largest e_ij, number by number, over all pairs of a closed state. x: any node states, not read."""
    rows = aggregate(edges, _states(edges, x), ("max",), over="pairs")[:, 0]
    return reduce_segments(rows, *_segments(edges.graph, None, x.device), "max")


def _pairs(graph: NeuralGraph, over: str, last: bool) -> torch.Tensor:
    """Number of pairs in the row of each node, int64 [num_nodes]. Kept."""
    key = ("pairs of rows", over, last)
    if key not in graph._cache:
        graph._cache[key] = torch.cat([_pairs_of(p, over, last).repeat(p.copies) for p in graph.parts])
    return graph._cache[key]


def _pairs_of(part: Part, over: str, last: bool) -> torch.Tensor:
    """Number of pairs in the row of each node of one network, int64 [num_nodes]."""
    layers, rows = part.layers, []
    for a, width in enumerate(layers):
        count = torch.zeros(width, dtype=torch.int64)
        for b in range(len(layers) - 1 if last else 0, len(layers)):
            kinds = {block.kind for block in part.blocks if (block.src, block.dst) in ((a, b), (b, a))}
            if over == "all" or DENSE in kinds:
                count += layers[b]
            elif kinds or a == b:  # diagonal blocks, or each neuron to itself
                count[: layers[b]] += 1
        rows.append(count)
    return torch.cat(rows)

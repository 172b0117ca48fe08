"""What the models over neural graphs share: checks, first states, kept graphs, heads."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import nn

from ngkernels import EdgeState, NeuralGraph, readout
from ngkernels.nn import diagonal_graph

from .checks import CHECK_FINITE, check_batch, check_finite, check_graph, check_known, check_layout, check_tensors, check_weights
from .embedding import GraphEmbedding
from .planning import Planned
from .pooling import Pooling
from .statistics import Statistics

HEADS = ("classification", "regression", "equivariant")


class NeuralGraphModel(Planned, nn.Module):
    """Encoder, layers, head: a subclass brings the layers (`layers_of`) and calls `_make_head` when it has made them.

    Args:
        layout: widths of the networks. d_node, d_edge: widths of node and edge states.
        encoding: arguments of ngkernels.nn.Encoder beside channels and width.
        reverse_blocks: the graphs it reads carry reversed blocks.
        token: the pooling "cls_token" exists. The others: see NGGNN.

    Raises:
        ValueError, TypeError: options that are unknown or do not fit.
    """

    def __init__(
        self, layout: Sequence[int], d_node: int, d_edge: int, *, encoding: dict, edge_channels: int, node_channels: int, pooling, head: str,
        reverse_edges: bool, positional: bool, activation_embedding: bool, num_probe_features: int, zero_out_weights: bool,
        zero_out_biases: bool, stats: dict | None, denormalize: bool, check_finite: str | None, reverse_blocks: bool = False, token: bool = False,
    ):  # fmt: skip
        super().__init__()
        op = self.op = type(self).__name__
        self.layout = check_layout(op, layout)
        check_known(op, head=(head, HEADS), check_finite=(check_finite, CHECK_FINITE))
        if num_probe_features and (edge_channels, node_channels) != (1, 1):
            raise ValueError(f"{op}: expected one channel with probe features, got {edge_channels} and {node_channels}")
        self.d_node, self.d_edge, self.head = d_node, d_edge, head
        self.reverse_edges, self.reverse_blocks, self.check_finite = reverse_edges, reverse_blocks, check_finite
        self.edge_channels, self.node_channels = edge_channels, node_channels
        self.pooling = Pooling.parse(op, pooling, len(self.layout), token)
        self.statistics = Statistics.parse(op, stats, len(self.layout) - 1, denormalize)
        self.construct_graph = GraphEmbedding(
            op, self.layout, d_node, d_edge, node_channels, edge_channels, encoding, reverse_edges, zero_out_weights, zero_out_biases, positional,
            activation_embedding, num_probe_features,
        )  # fmt: skip
        self._graphs: dict[int, NeuralGraph] = {}
        self.budget: int | None = None  # of edge_memory="auto:SIZE"
        self._policies = weakref.WeakKeyDictionary()  # what was chosen for it, by graph

    def _make_head(self, width: int, hidden_layers: int, out_features: int | None) -> None:
        """`hidden_layers` times (Linear, ReLU), `width` wide, then Linear; the equivariant head has its own small MLPs."""
        if self.head != "equivariant":
            out_features = (1 if self.head == "regression" else 10) if out_features is None else out_features
            inputs, parts = self.pooling.features(self.layout, self.d_node, self.d_edge), []
            for _ in range(hidden_layers):
                parts += [nn.Linear(inputs, width), nn.ReLU()]
                inputs = width
            self.proj_out = nn.Sequential(*parts, nn.Linear(inputs, out_features))
            return
        layers = len(self.layout) - 1
        self.proj_edge = nn.Sequential(nn.Linear(self.d_edge, self.d_edge), nn.ReLU(), nn.Linear(self.d_edge, self.edge_channels))
        self.proj_node = nn.Sequential(nn.Linear(self.d_node, self.d_node), nn.ReLU(), nn.Linear(self.d_node, self.node_channels))
        self.weight_scale = nn.ParameterList(nn.Parameter(torch.tensor(0.01)) for _ in range(layers))
        self.bias_scale = nn.ParameterList(nn.Parameter(torch.tensor(0.01)) for _ in range(layers))

    def extra_repr(self) -> str:
        reads = f"pooling=({self.pooling.method}, {self.pooling.where})" if self.head != "equivariant" else "updates of weights and biases"
        return f"layout={list(self.layout)}, d_node={self.d_node}, d_edge={self.d_edge}, head={self.head}, {reads}"

    # ---- what a subclass brings ----
    def layers_of(
        self, x: torch.Tensor, edges: EdgeState, rows: int | None = None, read_nodes: bool = True, read_edges: bool = False
    ) -> tuple[torch.Tensor | None, EdgeState]:
        """Node states [rows, d_node] and the edge state after the layers.

        Args:
            rows: the node layer whose states are wanted, or None for all of them.
            read_nodes: False when nobody reads the node states. read_edges: the edge state after the last layer is read.
        """
        raise NotImplementedError

    def first_states(self, graph: NeuralGraph, x: torch.Tensor, weights) -> tuple[torch.Tensor, EdgeState]:
        """Node and edge states before the first layer, from the encoded nodes x [N, d_node] and the raw weights."""
        return x, self.construct_graph.edges(graph, weights, self.statistics.affine(graph))

    def pool_edges(self, graph: NeuralGraph, edges: EdgeState, x: torch.Tensor) -> torch.Tensor:
        """[num_graphs, d_edge] from the last edge state."""
        return self.pooling.edges(graph, edges, x)

    def read_edges(self, edges: EdgeState, maps) -> list[torch.Tensor]:
        """A small MLP of every edge, a tensor (copies, n_src, n_dst, C) for each block in the caller's direction."""
        return readout(edges, maps)

    # ---- graphs of equal networks ----
    def graph(self, batch_size: int) -> NeuralGraph:
        """The neural graph of `batch_size` networks of the layout. Kept: call it once before torch.compile(fullgraph=True)."""
        if batch_size in self._graphs:
            return self._graphs[batch_size]
        return self._new_graph(batch_size)

    @torch.compiler.disable
    def _new_graph(self, batch_size: int) -> NeuralGraph:
        graph = NeuralGraph.mlp(self.layout, batch_size, self.reverse_blocks)
        self.prepare(graph)
        if len(self._graphs) >= 8:
            self._graphs.pop(next(iter(self._graphs)))
        self._graphs[batch_size] = graph
        return graph

    def prepare(self, graph: NeuralGraph) -> None:
        """Makes what is derived from `graph` now, not while compiling."""
        graph.in_degree, graph.restrict(-1).in_degree, graph.node_bounds, diagonal_graph(graph.num_nodes)  # noqa: B018

    # ---- results ----
    def forward(self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor], activations=None):
        """Result for a batch of networks of one layout.

        Args:
            weights: weights[l] (B, d_l, d_(l+1), C), floating, any strides: transposed torch.nn.Linear weights.
            biases: biases[l] (B, d_(l+1), C).
            activations: with activation_embedding: a name for each hidden layer, or such a list for each network.

        Returns:
            Tensor [B, out_features]; equivariant head: (updates of the weights, of the biases), lists in the input's
            shapes.

        Raises:
            ValueError, TypeError: shapes, dtypes, devices that do not fit the layout and the model.
        """
        batch = check_batch(self.op, self.layout, weights, biases, self.edge_channels, self.node_channels)
        return self.forward_graph(self.graph(batch), weights, biases, activations)

    def forward_graph(self, graph: NeuralGraph, weights, biases, activations=None):
        """Result for the networks of `graph`, which may be unequal.

        Args:
            graph: NeuralGraph; reversed blocks as the model's `reverse_blocks` says. weights: in its order, as for
                ngkernels.EdgeState: on the CPU too, under a model on a GPU that is too small for them.
            biases: a list, network part by part, layer by layer from the second: (copies, width, C); or one tensor
                [N, C] of all nodes, 0 for inputs. For many small networks the one tensor is much faster.
            activations: see forward.

        Returns:
            As forward; a row for each network. Equivariant head: updates in the order and shapes of weights and biases.

        Raises:
            ValueError, TypeError: shapes, dtypes, devices that do not fit; networks beyond the model's layout.
        """
        op, embed = self.op, self.construct_graph
        check_graph(op, graph, self.reverse_blocks, None if self.head == "equivariant" else self.pooling.rows)
        weights = [weights] if isinstance(weights, torch.Tensor) else list(weights)
        listed = [biases] if isinstance(biases, torch.Tensor) else list(biases)
        check_weights(op, graph, weights, self.edge_channels)
        check_tensors(op, weights, listed, embed.proj_node_in.weight, panels=True)
        if not torch.compiler.is_compiling():
            check_finite(op, weights, listed, self.check_finite)
        if self.budget is not None:
            self.choose_memory(graph, weights)
        values = self.statistics.node_values(graph, biases, self.node_channels, embed.proj_node_in.weight.dtype)
        x = embed.nodes(graph, values, self._probe(graph, weights, biases), activations)
        x, edges = self.first_states(graph, x, weights)
        if self.head == "equivariant":
            x, edges = self.layers_of(x, edges, read_edges=True)
            return self._updates(graph, x, edges, isinstance(biases, torch.Tensor))
        if self.pooling.of_edges:
            _, edges = self.layers_of(x, edges, read_nodes=False, read_edges=True)
            return self.proj_out(self.pool_edges(graph, edges, x))
        x, _ = self.layers_of(x, edges, rows=self.pooling.rows)
        return self.proj_out(self.pooling.nodes(graph, x))

    def _probe(self, graph: NeuralGraph, weights, biases) -> torch.Tensor | None:
        if self.construct_graph.gpf is None:
            return None
        if isinstance(biases, torch.Tensor) or len(graph.parts) != 1 or graph.parts[0].layers != self.layout or graph.packed:
            raise NotImplementedError(
                f"{self.op}: probe features are built for batches of equal networks of layout {self.layout}; call model(weights, biases)"
            )
        if weights[0].device != biases[0].device:
            raise NotImplementedError(f"{self.op}: probe features read weights where the model is; move them with .to({str(biases[0].device)!r})")
        return self.construct_graph.gpf(weights, biases).flatten(0, 1)

    def _updates(self, graph: NeuralGraph, x: torch.Tensor, edges: EdgeState, flat_biases: bool):
        """(weight updates, bias updates), scaled by layer."""
        if graph.packed:
            raise NotImplementedError(f"{self.op}: the equivariant head of a packed graph is not built; batch the graphs with packed=False")
        if any(p.num_weights > len(self.weight_scale) or len(p.layers) > len(self.layout) for p in graph.parts):
            raise ValueError(
                f"{self.op}: expected networks of at most {len(self.weight_scale)} weights (the head has a scale for each), got {graph}"
            )
        maps = [(m.weight, m.bias) for m in self.proj_edge if isinstance(m, nn.Linear)]
        found, weights = iter(self.read_edges(edges, maps)), []
        for p in graph.parts:
            forward = sorted(((b.weight, t) for b, t in zip(p.blocks, found) if not b.reverse), key=lambda pair: pair[0])
            weights += [self.statistics.weight_update(k, t, self.weight_scale[k]) for k, t in forward]
        values, biases, at = self.proj_node(x), [], 0
        for p in graph.parts:
            inputs, *rows = values[at : at + p.copies * p.num_nodes].view(p.copies, p.num_nodes, -1).split(p.layers, 1)
            at += p.copies * p.num_nodes
            scaled = [self.statistics.bias_update(k, t, self.bias_scale[k]) for k, t in enumerate(rows)]
            biases += [torch.cat([torch.zeros_like(inputs), *scaled], 1).flatten(0, 1)] if flat_biases else scaled
        return weights, torch.cat(biases) if flat_biases else biases

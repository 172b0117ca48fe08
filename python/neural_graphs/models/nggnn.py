"""NG-GNN: a graph neural network that reads the weights of other networks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ngkernels import EdgeState, NeuralGraph, readout
from ngkernels.nn import diagonal_graph

from .backbone import ACTIVATIONS, Backbone, in_degree_histogram
from .checks import CHECK_FINITE, check_batch, check_finite, check_graph, check_layout, check_tensors
from .embedding import GraphEmbedding
from .from_reference import load as load_reference
from .memory import EdgeMemory
from .norms import NORMS
from .pooling import Pooling
from .statistics import Statistics

HEADS = ("classification", "regression", "equivariant")
_OP = "NGGNN"


class NGGNN(nn.Module):
    """Logits, scores or weight updates of neural networks, from their weights.

    Every layer: x <- PNA(x, e), norm, activation; e <- update(x, e). Edge states are expressions (ngkernels.EdgeState):
    nothing with one row for each edge is kept, unless `edge_memory` asks for it.

    Args:
        layout: widths of the networks, inputs first. For batches of unequal networks, the largest: at most so many
            inputs, hidden layers and outputs.
        d_hid: width of node and edge states. num_layers: PNA layers.
        out_features: of the result; None: 10, or 1 for regression. Not used by the equivariant head.
        edge_memory: "recompute" (nothing stored), "hybrid" (nothing stored; one transient gradient buffer),
            "store", "every:k" or k (a stored state after every k-th update). All give the same values and gradients.
        encoder: "fourier" (fourier_features frequencies ~ N(0, fourier_sigma^2)) or "linear"; input_layers Linears.
        edge_channels, node_channels: C, numbers for each weight and each bias.
        norm: "layer", "graph", "batch_graph" or None, see NodeNorm. act, act_first, dropout: between the layers.
        pooling: see Pooling. head: "classification", "regression" or "equivariant" (updates of weights and biases).
        modulate, aggregators, scalers, towers, pre_layers, post_layers: see ngkernels.nn.PNALayer.
        degree_histogram: of in-degrees, for the scalers; None: that of `layout`.
        update_edges: False keeps the first edge state in all layers.
        reverse_edges: messages flow against the weights too, and edges read [e, e_reversed, e + e_reversed].
        positional: learned vectors: one for each input and output neuron, one for each hidden layer.
        activation_embedding: a learned vector for each activation; pass `activations` to forward then.
        num_probe_features: see ProbeFeatures; batches of equal SIRENs only.
        zero_out_weights, zero_out_biases: ablations that hide them.
        stats: None, or a dict of weights_mean, weights_std, biases_mean, biases_std, one number for each layer.
        denormalize: the equivariant head's updates are in units of `stats`.
        check_finite: None, "warn" or "error" on NaN and infinity in the input; not looked at under torch.compile.

    Raises:
        ValueError, TypeError: options that are unknown or do not fit.

    Reference: Kofinas et al., "Graph Neural Networks for Learning Equivariant Representations of Neural Networks",
        ICLR 2024. Parameters carry the names of its public code; `from_reference` loads its checkpoints.
    """

    def __init__(
        self, layout: Sequence[int], d_hid: int = 32, num_layers: int = 4, out_features: int | None = None, edge_memory: str | int = "recompute", *,
        encoder: str = "fourier", fourier_features: int = 128, fourier_sigma: float = 3.0, input_layers: int = 1, edge_channels: int = 1,
        node_channels: int = 1, norm: str | None = "layer", act: str = "silu", act_first: bool = False, dropout: float = 0.0, pooling=("cat", "last"),
        head: str = "classification", modulate: str = "film", aggregators: Sequence[str] = ("mean", "min", "max", "std"),
        scalers: Sequence[str] = ("identity", "amplification"), towers: int = 1, pre_layers: int = 1, post_layers: int = 1,
        degree_histogram: torch.Tensor | None = None, update_edges: bool = True, reverse_edges: bool = False, positional: bool = True,
        activation_embedding: bool = False, num_probe_features: int = 0, zero_out_weights: bool = False, zero_out_biases: bool = False,
        stats: dict | None = None, denormalize: bool = False, check_finite: str | None = None,
    ):  # fmt: skip
        super().__init__()
        self.layout = check_layout(_OP, layout)
        for name, value, known in (
            ("norm", norm, NORMS),
            ("act", act, ACTIVATIONS),
            ("head", head, HEADS),
            ("check_finite", check_finite, CHECK_FINITE),
        ):
            if value not in known:
                raise ValueError(f"{_OP}: expected {name} in {', '.join(map(str, known))}, got {value!r}")
        if min(d_hid, num_layers) < 1:
            raise ValueError(f"{_OP}: expected d_hid and num_layers of at least 1, got {d_hid} and {num_layers}")
        if num_probe_features and (edge_channels, node_channels) != (1, 1):
            raise ValueError(f"{_OP}: expected one channel with probe features, got {edge_channels} and {node_channels}")
        self.d_hid, self.head, self.reverse_edges, self.check_finite = d_hid, head, reverse_edges, check_finite
        self.edge_channels, self.node_channels = edge_channels, node_channels
        self.pooling = Pooling.parse(pooling, len(self.layout))
        self.statistics = Statistics.parse(stats, len(self.layout) - 1, denormalize)
        encoding = {"kind": encoder, "layers": input_layers, "features": fourier_features, "sigma": fourier_sigma}
        self.construct_graph = GraphEmbedding(
            self.layout, d_hid, node_channels, edge_channels, encoding, reverse_edges, zero_out_weights, zero_out_biases, positional,
            activation_embedding, num_probe_features,
        )  # fmt: skip
        histogram = in_degree_histogram(self.layout) if degree_histogram is None else torch.as_tensor(degree_histogram)
        conv = {
            "aggregators": aggregators, "scalers": scalers, "histogram": histogram, "modulate": modulate, "towers": towers,
            "pre_layers": pre_layers, "post_layers": post_layers,
        }  # fmt: skip
        self.gnn = Backbone(d_hid, num_layers, norm, act, act_first, dropout, update_edges, EdgeMemory.parse(edge_memory), conv)
        self._graphs: dict[int, NeuralGraph] = {}
        self._make_head((1 if head == "regression" else 10) if out_features is None else out_features)

    def _make_head(self, out_features: int) -> None:
        d = self.d_hid
        if self.head != "equivariant":
            inputs = self.pooling.features(self.layout, d)
            self.proj_out = nn.Sequential(nn.Linear(inputs, d), nn.ReLU(), nn.Linear(d, d), nn.ReLU(), nn.Linear(d, out_features))
            return
        layers = len(self.layout) - 1
        self.proj_edge = nn.Sequential(nn.Linear(d, d), nn.ReLU(), nn.Linear(d, self.edge_channels))
        self.proj_node = nn.Sequential(nn.Linear(d, d), nn.ReLU(), nn.Linear(d, self.node_channels))
        self.weight_scale = nn.ParameterList(nn.Parameter(torch.tensor(0.01)) for _ in range(layers))
        self.bias_scale = nn.ParameterList(nn.Parameter(torch.tensor(0.01)) for _ in range(layers))

    @classmethod
    def from_reference(cls, state_dict: dict[str, torch.Tensor], config: dict, **options) -> NGGNN:
        """The model of a checkpoint of the reference code: same parameters, same function, whole-batch norm included.

        Args:
            state_dict: parameters and buffers under the reference's names.
            config: layout, d_hid, d_out, pooling, rev_edge_features, pna, graph_constructor as in its configuration.
            options: further arguments of the constructor, edge_memory say.

        Raises:
            ValueError: tensors missing, left over or of the wrong shape. NotImplementedError: an option this model lacks.
        """
        return load_reference(cls, state_dict, config, options)

    def graph(self, batch_size: int) -> NeuralGraph:
        """The neural graph of `batch_size` networks of the layout. Kept: call it once before torch.compile(fullgraph=True)."""
        if batch_size in self._graphs:
            return self._graphs[batch_size]
        return self._new_graph(batch_size)

    @torch.compiler.disable
    def _new_graph(self, batch_size: int) -> NeuralGraph:
        graph = NeuralGraph.mlp(self.layout, batch_size, self.reverse_edges)
        graph.in_degree, graph.restrict(-1).in_degree, diagonal_graph(graph.num_nodes)  # noqa: B018  made here, not while compiling
        if len(self._graphs) >= 8:
            self._graphs.pop(next(iter(self._graphs)))
        self._graphs[batch_size] = graph
        return graph

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
        batch = check_batch(_OP, self.layout, weights, biases, self.edge_channels, self.node_channels)
        return self.forward_graph(self.graph(batch), weights, biases, activations)

    def forward_graph(self, graph: NeuralGraph, weights, biases, activations=None):
        """Result for the networks of `graph`, which may be unequal.

        Args:
            graph: NeuralGraph, built with reverse=reverse_edges. weights: in its order, as for ngkernels.EdgeState.
            biases: a list, network part by part, layer by layer from the second: (copies, width, C); or one tensor
                [N, C] of all nodes, 0 for inputs. For many small networks the one tensor is much faster.
            activations: see forward.

        Returns:
            As forward; a row for each network. Equivariant head: updates in the order and shapes of weights and biases.

        Raises:
            ValueError, TypeError: shapes, dtypes, devices that do not fit; networks beyond the model's layout.
        """
        check_graph(_OP, graph, self.reverse_edges, None if self.head == "equivariant" else self.pooling.rows)
        weights = [weights] if isinstance(weights, torch.Tensor) else list(weights)
        listed = [biases] if isinstance(biases, torch.Tensor) else list(biases)
        check_tensors(_OP, weights, listed, self.construct_graph.proj_node_in.weight)
        if not torch.compiler.is_compiling():
            check_finite(_OP, weights, listed, self.check_finite)
        values = self.statistics.node_values(graph, biases, self.node_channels, self.construct_graph.proj_node_in.weight.dtype)
        embed = self.construct_graph
        edges = embed.edges(graph, weights, self.statistics.affine(graph))
        x = embed.nodes(graph, values, self._probe(graph, weights, biases), activations)
        if self.head == "equivariant":
            x, edges = self.gnn(x, edges, read_edges=True)
            return self._updates(graph, x, edges, isinstance(biases, torch.Tensor))
        if self.pooling.of_edges:
            _, edges = self.gnn(x, edges, read_nodes=False, read_edges=False)
            return self.proj_out(self.pooling.edges(graph, edges, x))
        x, _ = self.gnn(x, edges, rows=self.pooling.rows)
        return self.proj_out(self.pooling.nodes(graph, x))

    def _probe(self, graph: NeuralGraph, weights, biases) -> torch.Tensor | None:
        if self.construct_graph.gpf is None:
            return None
        if isinstance(biases, torch.Tensor) or len(graph.parts) != 1 or graph.parts[0].layers != self.layout or graph.packed:
            raise NotImplementedError(
                f"{_OP}: probe features are built for batches of equal networks of layout {self.layout}; call model(weights, biases)"
            )
        return self.construct_graph.gpf(weights, biases).flatten(0, 1)

    def _updates(self, graph: NeuralGraph, x: torch.Tensor, edges: EdgeState, flat_biases: bool):
        """(weight updates, bias updates), scaled by layer."""
        if graph.packed:
            raise NotImplementedError(f"{_OP}: the equivariant head of a packed graph is not built; batch the graphs with packed=False")
        if any(p.num_weights > len(self.weight_scale) or len(p.layers) > len(self.layout) for p in graph.parts):
            raise ValueError(
                f"{_OP}: expected networks of at most {len(self.weight_scale)} weights (the head has a scale for each), got {graph}"
            )
        maps = [(m.weight, m.bias) for m in self.proj_edge if isinstance(m, nn.Linear)]
        found, weights = iter(readout(edges, maps)), []
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

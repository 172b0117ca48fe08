"""From raw weights and biases to the first edge and node states of a neural graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ngkernels import EdgeState, NeuralGraph, encoders
from ngkernels.kept import kept
from ngkernels.nn import Encoder

from .probe import ProbeFeatures

ACTIVATION_NAMES = ("none", "relu", "gelu", "silu", "tanh", "sigmoid", "leaky_relu")


class ActivationEmbedding(nn.Module):
    """One learned vector for each activation, added to the nodes of hidden layers. op: who asks, for messages."""

    def __init__(self, op: str, width: int):
        super().__init__()
        self.op = op
        self.embedding = nn.Embedding(len(ACTIVATION_NAMES), width)
        self._rows: dict[tuple, torch.Tensor] = {}  # of the last call: the next one mostly asks for the same

    def forward(self, graph: NeuralGraph, activations: Sequence) -> torch.Tensor:
        """[N, width]; input and output nodes get 0.

        Args:
            activations: one name for each hidden layer, or such a list for each network of the batch.

        Raises:
            ValueError: unknown names, a number of names that does not fit the layers.
        """
        each = [activations] * graph.num_graphs if all(isinstance(a, str) for a in activations) else list(activations)
        if len(each) != graph.num_graphs:
            raise ValueError(f"{self.op}: expected activations for {graph.num_graphs} networks, got {len(each)}")
        layers = [p.layers for p in graph.parts for _ in range(p.copies)]
        for names, widths in zip(each, layers, strict=True):
            if len(names) != len(widths) - 2 or any(n not in ACTIVATION_NAMES for n in names):
                raise ValueError(
                    f"{self.op}: expected {len(widths) - 2} activations (one for each hidden layer) of {', '.join(ACTIVATION_NAMES)}, got {list(names)}"
                )
        table = torch.cat([self.embedding.weight, self.embedding.weight.new_zeros(1, self.embedding.embedding_dim)])
        return table[self._rows_of(tuple(layers), tuple(map(tuple, each)), table.device)]

    def _rows_of(self, layers: tuple[tuple[int, ...], ...], each: tuple[tuple[str, ...], ...], device: torch.device) -> torch.Tensor:
        """Row of the table for each node, on the device."""

        def make() -> torch.Tensor:
            nothing = len(ACTIVATION_NAMES)
            ids = [(nothing, *map(ACTIVATION_NAMES.index, names), nothing) for names in each]
            return torch.tensor([i for row, widths in zip(ids, layers, strict=True) for i, w in zip(row, widths, strict=True) for _ in range(w)], device=device)

        if torch.compiler.is_compiling():
            return make()
        key = (layers, each, device)
        if key not in self._rows:
            self._rows.clear()
        return kept(self._rows, key, make)


class GraphEmbedding(nn.Module):
    """First states: e0 = proj_edge_in(proj_weight(w)), x0 = proj_node_in(proj_bias(b) [+ probes]) [+ position] [+ activation].

    Args: op, the model that asks, for messages; those of NGGNN and NGT.
    """

    def __init__(
        self,
        op,
        layout,
        d_node,
        d_edge,
        node_channels,
        edge_channels,
        encoder,
        reverse,
        zero_out_weights,
        zero_out_bias,
        positional,
        activations,
        probes,
    ):
        super().__init__()
        self.op, self.layout, self.d_node, self.reverse = op, tuple(layout), d_node, reverse
        if positional:
            self.pos_embed = nn.Parameter(torch.randn(layout[0] + len(layout) - 2 + layout[-1], d_node))
        else:
            self.register_parameter("pos_embed", None)
        self.proj_weight = None if zero_out_weights else Encoder(edge_channels, d_edge, reciprocal=reverse, **encoder)
        self.proj_bias = None if zero_out_bias else Encoder(node_channels, d_node, **encoder)
        self.proj_node_in = nn.Linear(d_node, d_node)
        self.proj_edge_in = nn.Linear(d_edge, d_edge)
        self.gpf = ProbeFeatures(layout, probes, d_node) if probes else None
        self.act_emb = ActivationEmbedding(op, d_node) if activations else None
        self._rows: dict[tuple[int, ...], torch.Tensor] = {}

    def edges(self, graph: NeuralGraph, weights, affine) -> EdgeState:
        """The first edge state."""
        if self.proj_weight is not None:
            return self.proj_weight.edges(graph, weights, self.proj_edge_in, affine)
        channels = weights[0].shape[-1] * (3 if self.reverse else 1)
        zero = self.proj_edge_in.weight.new_zeros(self.proj_edge_in.out_features, channels)
        return EdgeState(graph, weights, encoders.Linear(zero, self.proj_edge_in.bias, self.reverse))

    def nodes(self, graph: NeuralGraph, values: torch.Tensor, probed: torch.Tensor | None = None, activations=None) -> torch.Tensor:
        """The first node states [N, d_node].

        Args:
            values: normalised biases of all nodes [N, C]; 0 for input nodes.
            probed: probe features [N, d_node], or None. activations: see ActivationEmbedding.
        """
        out = self.proj_node_in
        x = out.bias.repeat(graph.num_nodes, 1) if self.proj_bias is None else self.proj_bias.values(values, out)
        if probed is not None:
            x = x + F.linear(probed, out.weight)  # proj_node_in(a + b) = proj_node_in(a) + W b
        if self.pos_embed is not None:
            x = self._add_position(graph, x)
        if self.act_emb is not None:
            if activations is None:
                raise ValueError(f"{self.op}: expected activations (activation_embedding is on), got None")
            x = x + self.act_emb(graph, activations)
        return x

    def _add_position(self, graph: NeuralGraph, x: torch.Tensor) -> torch.Tensor:
        device = self.pos_embed.device
        rows = [graph.on(device, ("position rows", tuple(self.layout), p.layers), lambda p=p: self._position_rows(p.layers)) for p in graph.parts]
        if len(rows) == 1:
            return (x.view(graph.num_graphs, -1, self.d_node) + self.pos_embed[rows[0]]).flatten(0, 1)
        return x + self.pos_embed[torch.cat([r.repeat(p.copies) for r, p in zip(rows, graph.parts, strict=True)])]

    def _position_rows(self, layers: tuple[int, ...]) -> torch.Tensor:
        """Row of pos_embed for each node: an input node's own, its hidden layer's, an output node's own."""
        if layers not in self._rows:
            inputs, hidden, outputs = self.layout[0], len(self.layout) - 2, self.layout[-1]
            if layers[0] > inputs or len(layers) - 2 > hidden or layers[-1] > outputs:
                raise ValueError(
                    f"{self.op}: expected networks of at most {inputs} inputs, {hidden} hidden layers and {outputs} outputs (the positional embedding of "
                    f"layout {self.layout}), got {layers}; build the model with a larger layout, or with positional=False"
                )
            middle = [inputs + k for k, w in enumerate(layers[1:-1]) for _ in range(w)]
            self._rows[layers] = torch.tensor([*range(layers[0]), *middle, *range(inputs + hidden, inputs + hidden + layers[-1])])
        return self._rows[layers]

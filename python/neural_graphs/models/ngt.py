"""NG-T: a relational transformer that reads the weights of other networks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from ngkernels import EdgeState, NeuralGraph, readout
from ngkernels.blocks import DENSE
from ngkernels.nn import NORMS, RelationalLayer
from ngkernels.nn.pna import rows_of

from .base import NeuralGraphModel
from .checks import check_known
from .flip import flip, flip_weights
from .from_reference import load as load_reference
from .from_reference import ngt_options, own_names
from .memory import EdgeMemory
from .pooling import largest_of_pairs, mean_of_pairs

ATTENTION = ("all", "edges")


class NGT(NeuralGraphModel):
    """Logits, scores or weight updates of neural networks, from their weights, by attention among their neurons.

    Every layer: x <- LN(x + attention(x, e)), x <- LN(x + MLP(x)); e <- LN(e + MLP(e, e_reversed, x)), e <- LN(e + MLP(e)).
    Edge states are expressions (ngkernels.EdgeState): nothing with a row for each pair of neurons is kept. A neuron
    attends along its outgoing pairs, as in the reference: its row of e holds the weights that leave it.

    Args:
        layout: widths of the networks, inputs first. For batches of unequal networks, the largest: at most so many
            inputs, hidden layers and outputs.
        d_node, d_edge: widths of node and edge states. d_attn_hid: of queries, keys and values, all num_heads heads
            together. d_node_hid, d_edge_hid: of the MLPs. num_layers: of attention.
        out_features: of the result; None: 10, or 1 for regression. Not used by the equivariant head.
        attention: "all" (every pair of neurons of a network, joined or not: the reference's function) or "edges" (along
            and against the weights, and each neuron to itself: sparse graph attention).
        edge_memory: see NGGNN; with attention="all" "recompute" and "auto" alone: there is no room for a state of every pair.
        modulate_v: edge states multiply the values too.
        encoder: "fourier" (fourier_features frequencies ~ N(0, fourier_sigma^2)) or "linear"; input_layers Linears.
        edge_channels, node_channels: C, numbers for each weight and each bias.
        norm: of node states, see NodeNorm; None leaves out those of edge states too. dropout: see RelationalLayer.
        pooling: see Pooling; "cls_token" adds a learned node to every network and reads it.
        head: "classification", "regression" or "equivariant" (updates of weights and biases).
        d_out_hid, out_layers: hidden width and number of Linears of the head.
        update_edges: False keeps the first edge state in all layers.
        reverse_edges: edges read [e, e_reversed, e + e_reversed].
        positional, activation_embedding, num_probe_features, zero_out_weights, zero_out_biases, stats, denormalize,
            check_finite: see NGGNN.

    Raises:
        ValueError, TypeError: options that are unknown or do not fit.

    Reference: Kofinas et al., "Graph Neural Networks for Learning Equivariant Representations of Neural Networks",
        ICLR 2024. Parameters carry the names of its public code; `from_reference` loads its checkpoints.
    """

    def __init__(
        self, layout: Sequence[int], d_node: int = 64, d_edge: int = 32, d_attn_hid: int = 128, d_node_hid: int = 128, d_edge_hid: int = 64,
        num_heads: int = 8, num_layers: int = 4, out_features: int | None = None, attention: str = "all", edge_memory: str | int = "auto", *,
        modulate_v: bool = True, encoder: str = "fourier", fourier_features: int = 128, fourier_sigma: float = 1.0, input_layers: int = 1,
        edge_channels: int = 1, node_channels: int = 1, norm: str | None = "layer", dropout: float = 0.0, pooling=("cat", "last"),
        head: str = "classification", d_out_hid: int = 128, out_layers: int = 2, update_edges: bool = True, reverse_edges: bool = False,
        positional: bool = True, activation_embedding: bool = False, num_probe_features: int = 0, zero_out_weights: bool = False,
        zero_out_biases: bool = False, stats: dict | None = None, denormalize: bool = False, check_finite: str | None = None,
    ):  # fmt: skip
        check_known("NGT", norm=(norm, NORMS), attention=(attention, ATTENTION))
        sizes = {
            "d_node": d_node, "d_edge": d_edge, "d_attn_hid": d_attn_hid, "d_node_hid": d_node_hid, "d_edge_hid": d_edge_hid,
            "num_layers": num_layers, "d_out_hid": d_out_hid, "out_layers": out_layers,
        }  # fmt: skip
        if min(sizes.values()) < 1:
            raise ValueError(f"NGT: expected {', '.join(sizes)} of at least 1, got {', '.join(map(str, sizes.values()))}")
        super().__init__(
            layout, d_node, d_edge, edge_channels=edge_channels, node_channels=node_channels, pooling=pooling, head=head,
            encoding={"kind": encoder, "layers": input_layers, "features": fourier_features, "sigma": fourier_sigma}, positional=positional,
            reverse_edges=reverse_edges, activation_embedding=activation_embedding, num_probe_features=num_probe_features,
            zero_out_weights=zero_out_weights, zero_out_biases=zero_out_biases, stats=stats, denormalize=denormalize, check_finite=check_finite,
            token=head != "equivariant",
        )  # fmt: skip
        self.attention, self.norm, self.memory = attention, norm, self._memory(attention, edge_memory)
        self.budget, self.num_updates = self.memory.budget, num_layers - 1 if update_edges else 0
        reads_edges = head == "equivariant" or self.pooling.of_edges
        if self._has_token:
            self.cls_token = nn.Parameter(torch.randn(d_node))
        self.layers = nn.ModuleList(
            RelationalLayer(
                d_node, d_edge, d_attn_hid, d_node_hid, d_edge_hid, num_heads, modulate_v, update_edges and (k + 1 < num_layers or reads_edges),
                norm, dropout,
            )
            for k in range(num_layers)
        )  # fmt: skip
        self._make_head(d_out_hid, out_layers - 1, out_features)

    @staticmethod
    def _memory(attention: str, edge_memory: str | int) -> EdgeMemory:
        memory = EdgeMemory.parse(edge_memory)
        if attention == "all" and (memory.every or memory.virtual):
            raise ValueError(
                f"NGT: expected edge_memory='recompute' with attention='all' (others hold a state for every pair of neurons), got {edge_memory!r}; "
                "use attention='edges'"
            )
        return replace(memory, restart=memory.restart and attention == "edges")

    def policies(self) -> tuple[str, ...]:
        """As Planned.policies."""
        return ("recompute",) if self.attention == "all" else super().policies()

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, attention={self.attention}, num_heads={self.layers[0].self_attn.heads}, num_layers={len(self.layers)}"
        )

    @property
    def _has_token(self) -> bool:
        return self.head != "equivariant" and self.pooling.method == "cls_token"

    @classmethod
    def from_reference(cls, state_dict: dict[str, torch.Tensor], config: dict, **options) -> NGT:
        """The model of a checkpoint of the reference code: same parameters, same function.

        Args:
            state_dict: parameters and buffers under the reference's names.
            config: layout, the widths d_*, n_layers, n_heads and what else its configuration says, flat or with a
                graph_constructor; what the tensors show need not be there.
            options: further arguments of the constructor, attention say.

        Raises:
            ValueError: tensors missing, left over or of the wrong shape. NotImplementedError: an option this model lacks.

        Note: biases of the equivariant head are read from their own neurons. The reference drops entries of edge updates
            too while training with dropout; this model does not.
        """
        return load_reference(cls(**{**ngt_options(own_names(state_dict), config), **options}), state_dict)

    def never_read(self, name: str) -> bool:
        """Whether `name` is a parameter that the reference creates and never reads."""
        return name.startswith(f"layers.{len(self.layers) - 1}.edge_updates.")

    def first_states(self, graph: NeuralGraph, x: torch.Tensor, weights) -> tuple[torch.Tensor, EdgeState]:
        """As NeuralGraphModel.first_states, on the flipped graph: row i of the attention is the source of its edges."""
        flipped, weights = flip(graph), flip_weights(graph, weights)
        if not self._has_token:
            return super().first_states(flipped, x, weights)
        pieces = zip(x.split([p.copies * p.num_nodes for p in graph.parts]), graph.parts, strict=True)
        joined = [
            torch.cat([self.cls_token.expand(p.copies, 1, -1), v.view(p.copies, p.num_nodes, -1)], 1).flatten(0, 1) for v, p in pieces
        ]
        return super().first_states(flipped.with_token(), torch.cat(joined), weights)

    def layers_of(
        self, x: torch.Tensor, edges: EdgeState, rows: int | None = None, read_nodes: bool = True, read_edges: bool = False
    ) -> tuple[torch.Tensor, EdgeState]:
        """As NeuralGraphModel.layers_of."""
        last = len(self.layers) - 1
        alone = self.norm in ("layer", None)  # else the norm of the wanted rows needs all the others
        for k, layer in enumerate(self.layers):
            if k == last and not read_nodes and layer.edge_updates is None:
                return x, edges
            x = layer.nodes(x, edges.restrict(rows) if rows is not None and k == last and alone else edges, self.attention)
            if layer.edge_updates is not None:
                edges = layer.edge_updates(edges, x)
                more = k + 1 < last or (k < last and read_edges)  # else one consumer only
                if more or (read_edges and self.memory.virtual):  # a readout does not look through a virtual state and an update
                    edges = self.memory.after(k + 1, edges, layer.self_attn.hidden)
        return x if rows is None or alone else rows_of(edges.graph.restrict(rows), x), edges

    def pool_edges(self, graph: NeuralGraph, edges: EdgeState, x: torch.Tensor) -> torch.Tensor:
        """[num_graphs, d_edge]: the mean or the largest over the pairs that the attention looks at."""
        if self.pooling.method == "max_edge":
            return largest_of_pairs(edges.closure(self.attention), x)
        return mean_of_pairs(edges, x, self.attention, self.pooling.where == "last")

    def read_edges(self, edges: EdgeState, maps) -> list[torch.Tensor]:
        """As NeuralGraphModel.read_edges."""
        blocks = [b for p in edges.graph.parts for b in p.blocks]  # a stored state has those of its pairs' other directions too
        found = zip(blocks, readout(edges, maps), strict=True)
        return [t.transpose(1, 2) if b.kind == DENSE else t for b, t in found if b.edge]

    def prepare(self, graph: NeuralGraph) -> None:
        """As NeuralGraphModel.prepare."""
        super().prepare(graph)
        flipped = flip(graph).with_token() if self._has_token else flip(graph)
        for rows in {None, None if self.head == "equivariant" else self.pooling.rows}:
            read = flipped if rows is None else flipped.restrict(rows)
            read.closure(self.attention, self.reverse_edges).pairs_as(self.attention)

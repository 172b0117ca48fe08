"""NG-GNN: a graph neural network that reads the weights of other networks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ngkernels import EdgeState
from ngkernels.nn import ACTIVATIONS, NORMS

from .backbone import Backbone, in_degree_histogram
from .base import NeuralGraphModel
from .checks import check_known
from .from_reference import load as load_reference
from .from_reference import nggnn_options
from .memory import EdgeMemory


class NGGNN(NeuralGraphModel):
    """Logits, scores or weight updates of neural networks, from their weights.

    Every layer: x <- PNA(x, e), norm, activation; e <- update(x, e). Edge states are expressions (ngkernels.EdgeState):
    nothing with one row for each edge is kept, unless `edge_memory` asks for it.

    Args:
        layout: widths of the networks, inputs first. For batches of unequal networks, the largest: at most so many
            inputs, hidden layers and outputs.
        d_hid: width of node and edge states. num_layers: PNA layers.
        out_features: of the result; None: 10, or 1 for regression. Not used by the equivariant head.
        edge_memory: "recompute" (nothing stored), "hybrid" (nothing stored; one transient gradient buffer),
            "store", "every:k" or k (a stored state after every k-th update). All give the same values and gradients, up to
            rounding. "auto": "recompute"; "auto:8GiB" and the like: the policy of least work that fits so many bytes
            (ngkernels.plan; BudgetError where none does).
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
        self, layout: Sequence[int], d_hid: int = 32, num_layers: int = 4, out_features: int | None = None, edge_memory: str | int = "auto", *,
        encoder: str = "fourier", fourier_features: int = 128, fourier_sigma: float = 3.0, input_layers: int = 1, edge_channels: int = 1,
        node_channels: int = 1, norm: str | None = "layer", act: str = "silu", act_first: bool = False, dropout: float = 0.0, pooling=("cat", "last"),
        head: str = "classification", modulate: str = "film", aggregators: Sequence[str] = ("mean", "min", "max", "std"),
        scalers: Sequence[str] = ("identity", "amplification"), towers: int = 1, pre_layers: int = 1, post_layers: int = 1,
        degree_histogram: torch.Tensor | None = None, update_edges: bool = True, reverse_edges: bool = False, positional: bool = True,
        activation_embedding: bool = False, num_probe_features: int = 0, zero_out_weights: bool = False, zero_out_biases: bool = False,
        stats: dict | None = None, denormalize: bool = False, check_finite: str | None = None,
    ):  # fmt: skip
        check_known("NGGNN", norm=(norm, NORMS), act=(act, ACTIVATIONS))
        if min(d_hid, num_layers) < 1:
            raise ValueError(f"NGGNN: expected d_hid and num_layers of at least 1, got {d_hid} and {num_layers}")
        super().__init__(
            layout, d_hid, d_hid, edge_channels=edge_channels, node_channels=node_channels, pooling=pooling, head=head, reverse_edges=reverse_edges,
            encoding={"kind": encoder, "layers": input_layers, "features": fourier_features, "sigma": fourier_sigma}, positional=positional,
            activation_embedding=activation_embedding, num_probe_features=num_probe_features, zero_out_weights=zero_out_weights,
            zero_out_biases=zero_out_biases, stats=stats, denormalize=denormalize, check_finite=check_finite, reverse_blocks=reverse_edges,
        )  # fmt: skip
        histogram = in_degree_histogram(self.layout) if degree_histogram is None else torch.as_tensor(degree_histogram)
        conv = {
            "aggregators": aggregators, "scalers": scalers, "histogram": histogram, "modulate": modulate, "towers": towers,
            "pre_layers": pre_layers, "post_layers": post_layers,
        }  # fmt: skip
        memory = EdgeMemory.parse(edge_memory)
        self.gnn = Backbone(d_hid, num_layers, norm, act, act_first, dropout, update_edges, memory, conv)
        self.budget, self.num_updates = memory.budget, num_layers - 1 if update_edges else 0
        self._make_head(d_hid, 2, out_features)

    @property
    def memory(self) -> EdgeMemory:
        """What becomes of edge states."""
        return self.gnn.memory

    @memory.setter
    def memory(self, memory: EdgeMemory) -> None:
        self.gnn.memory = memory

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
        return load_reference(cls(**{**nggnn_options(config), **options}), state_dict)

    def never_read(self, name: str) -> bool:
        """Whether `name` is a parameter that the reference creates and never reads."""
        return name.startswith(f"gnn.edge_update.{len(self.gnn.convs) - 1}.")

    def layers_of(
        self, x: torch.Tensor, edges: EdgeState, rows: int | None = None, read_nodes: bool = True, read_edges: bool = False
    ) -> tuple[torch.Tensor | None, EdgeState]:
        """As NeuralGraphModel.layers_of."""
        return self.gnn(x, edges, rows, read_nodes, read_edges)

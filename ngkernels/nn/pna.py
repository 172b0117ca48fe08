"""The PNA message layer: messages modulated by edge states, several reductions, degree scalers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ..checks import ACTIVATIONS
from ..edges import Affine, EdgeState, Message
from ..graph import NeuralGraph
from ..ops.aggregate import aggregate
from ..ops.node_map import node_map
from ..program import REDUCE
from .norm_act import ACTIVATIONS as _ACT
from .norm_act import NormAct
from .recompute import recompute

SCALERS = ("identity", "amplification", "attenuation", "linear", "inverse_linear")
MODULATIONS = ("film", "gate", "concat")


class DegreeScalers(nn.Module):
    """Factors a_s(d) of a node's in-degree d.

    identity 1, amplification log(d+1) / avg_log, attenuation avg_log / log(max(d,1)+1), linear d / avg_lin,
    inverse_linear avg_lin / max(d,1); the averages come from a histogram of in-degrees and are buffers.

    Args:
        scalers: any of those names.
        histogram: number of nodes of each in-degree, [max degree + 1].

    Raises:
        ValueError: an unknown name, an empty histogram.
    """

    def __init__(self, scalers: Sequence[str], histogram: torch.Tensor):
        super().__init__()
        unknown = [s for s in scalers if s not in SCALERS]
        if unknown or not scalers:
            raise ValueError(f"DegreeScalers: expected scalers of {', '.join(SCALERS)}, got {tuple(scalers)}")
        if histogram.dim() != 1 or not histogram.sum() > 0:
            raise ValueError(f"DegreeScalers: expected a histogram of in-degrees with at least one node, got {histogram}")
        self.scalers = tuple(scalers)
        degree = torch.arange(histogram.numel(), dtype=torch.float32, device=histogram.device)
        count = histogram.float()
        self.register_buffer("avg_deg_lin", ((degree * count).sum() / count.sum()).reshape(1))
        self.register_buffer("avg_deg_log", (((degree + 1).log() * count).sum() / count.sum()).reshape(1))

    def forward(self, degree: torch.Tensor) -> list[torch.Tensor | None]:
        """One factor [rows, 1] for each scaler, None for 1, from in-degrees [rows, 1] of a floating dtype."""
        return [self.one(name, degree) for name in self.scalers]

    def one(self, name: str, degree: torch.Tensor) -> torch.Tensor | None:
        if name == "identity":
            return None
        if name == "amplification":
            return (degree + 1).log() / self.avg_deg_log
        if name == "attenuation":
            return self.avg_deg_log / (degree.clamp(min=1) + 1).log()
        if name == "linear":
            return degree / self.avg_deg_lin
        return self.avg_deg_lin / degree.clamp(min=1)


def row_degrees(graph: NeuralGraph, like: torch.Tensor) -> torch.Tensor:
    """In-degree of each of the graph's output rows [rows, 1], in the dtype and on the device of `like`."""
    return graph.on(like.device, ("row degrees", like.dtype), lambda: rows_of(graph, graph.in_degree[:, None]).to(like.dtype))


def rows_of(graph: NeuralGraph, x: torch.Tensor) -> torch.Tensor:
    """The rows of x [N, d] that `graph` is restricted to; all of them if it is not."""
    if graph.rows is None:
        return x
    if len(graph.parts) == 1:
        layers = graph.parts[0].layers
        k = graph.rows % len(layers)
        start = sum(layers[:k])
        return x.view(graph.num_graphs, -1, x.shape[1])[:, start : start + layers[k]].reshape(-1, x.shape[1])
    return x[graph.on(x.device, ("node layer", graph.rows), lambda: graph.node_layer(graph.rows))]


def _tower_diagonal(blocks: Sequence[torch.Tensor]) -> torch.Tensor:
    return blocks[0] if len(blocks) == 1 else torch.block_diag(*blocks)


class PNALayer(nn.Module):
    """y_i = lin(post([x_i ; a_s(deg_i) reduce_k over j of m_ij, for every scaler s and reduction k])).

    m_ij = s q + t (film), sigmoid(s) q (gate) with q = pre([x_i ; x_j]) and [s ; t] = edge_encoder(e_ij), or
    pre([x_i ; x_j ; edge_encoder(e_ij)]) (concat). With `towers` T the message and `post` exist T times, on the
    same x and e; their outputs, out_channels / T wide, are concatenated.

    Args:
        in_channels: F, width of node states and messages. out_channels: of the result. edge_dim: D.
        aggregators: any of the engine's reductions. scalers, histogram: see DegreeScalers.
        modulate: "film", "gate" or "concat".
        towers, pre_layers, post_layers: as above; layers beyond the first follow `activation`.

    Raises:
        ValueError: unknown names, towers that do not divide out_channels.

    Note: the products with `lin` are made on the small matrices, and the scaled columns are never formed: rows
        keep x, the reductions and no more.

    Reference: Corso et al., NeurIPS 2020; Kofinas et al., ICLR 2024. Parameters are named as in PyTorch Geometric.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        edge_dim: int,
        aggregators: Sequence[str] = ("mean", "min", "max", "std"),
        scalers: Sequence[str] = ("identity", "amplification"),
        histogram: torch.Tensor | None = None,
        modulate: str = "film",
        towers: int = 1,
        pre_layers: int = 1,
        post_layers: int = 1,
        activation: str = "relu",
    ):
        super().__init__()
        self._check(aggregators, modulate, towers, out_channels, activation, min(pre_layers, post_layers))
        self.in_channels, self.out_channels, self.towers = in_channels, out_channels, towers
        self.aggregators, self.scalers = tuple(aggregators), tuple(scalers)
        self.modulate, self.activation = modulate, activation
        self.natural = tuple(r for r in REDUCE if r in aggregators)  # the engine's order; weights are permuted to it
        self.aggr_module = DegreeScalers(scalers, torch.ones(2) if histogram is None else histogram)
        self.edge_encoder = nn.Linear(edge_dim, in_channels if modulate == "concat" else 2 * in_channels)
        width, columns = out_channels // towers, (1 + len(scalers) * len(aggregators)) * in_channels
        self.pre_nns = nn.ModuleList(
            self._mlp((3 if modulate == "concat" else 2) * in_channels, in_channels, pre_layers) for _ in range(towers)
        )
        self.post_nns = nn.ModuleList(self._mlp(columns, width, post_layers) for _ in range(towers))
        self.lin = nn.Linear(out_channels, out_channels)

    @staticmethod
    def _check(aggregators, modulate, towers, out_channels, activation, layers) -> None:
        if not aggregators or len(set(aggregators)) != len(aggregators) or any(a not in REDUCE for a in aggregators):
            raise ValueError(f"PNALayer: expected aggregators to be different names of {', '.join(REDUCE)}, got {tuple(aggregators)}")
        if modulate not in MODULATIONS:
            raise ValueError(f"PNALayer: expected modulate in {', '.join(MODULATIONS)}, got {modulate!r}")
        if towers < 1 or out_channels % towers:
            raise ValueError(f"PNALayer: expected towers to divide out_channels, got towers={towers}, out_channels={out_channels}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"PNALayer: expected activation in {', '.join(ACTIVATIONS)}, got {activation!r}")
        if layers < 1:
            raise ValueError(f"PNALayer: expected pre_layers and post_layers of at least 1, got {layers}")

    @staticmethod
    def _mlp(inputs: int, width: int, layers: int) -> nn.Sequential:
        """Linear, then (activation, Linear) times layers - 1; the activation's place is empty, to keep PyG's names."""
        return nn.Sequential(nn.Linear(inputs, width), *(m for _ in range(layers - 1) for m in (nn.Identity(), nn.Linear(width, width))))

    def message(self, x: torch.Tensor) -> Message:
        """The engine's message, towers side by side: (T F) wide."""
        f, towers, enc = self.in_channels, self.towers, self.edge_encoder
        first = [nn[0] for nn in self.pre_nns]
        pre = first[0].weight if towers == 1 else torch.cat([m.weight for m in first])  # [T F, 2F or 3F]
        bias = first[0].bias if towers == 1 else torch.cat([m.bias for m in first])
        more: list[Affine] = []
        for k in range(2, len(self.pre_nns[0]), 2):
            more.append((_tower_diagonal([nn[k].weight for nn in self.pre_nns]), torch.cat([nn[k].bias for nn in self.pre_nns])))
        to_dst, to_src, *edge = pre.split(f, 1)
        args = (to_dst, to_src, bias, more, self.activation)
        if self.modulate == "concat":
            (edge,) = edge
            return Message.concat(x, edge @ enc.weight, edge @ enc.bias, *args)
        if self.modulate == "gate":
            return Message.gate(x, enc.weight[:f].repeat(towers, 1), enc.bias[:f].repeat(towers), *args)
        w, b = enc.weight, enc.bias
        if towers > 1:
            w = torch.cat([w[:f].repeat(towers, 1), w[f:].repeat(towers, 1)])
            b = torch.cat([b[:f].repeat(towers), b[f:].repeat(towers)])
        return Message.film(x, w, b, *args)

    def first_maps(self) -> tuple[torch.Tensor, torch.Tensor]:
        """([W_x | W_s for each scaler s], bias) of the first layer of `post`: [O, F + S K T F] and [O]."""
        first = [nn[0] for nn in self.post_nns]
        f, towers, width = self.in_channels, self.towers, self.out_channels // self.towers
        natural = self.natural == self.aggregators
        if towers == 1 and natural:
            return first[0].weight, first[0].bias
        order = range(len(self.aggregators)) if natural else [self.aggregators.index(r) for r in self.natural]
        parts = [m.weight.split([f, m.weight.shape[1] - f], 1) for m in first]
        # [tower, width, S, K, F], then each tower's rows beside zeros in the other towers' columns
        scaled = torch.stack([s.view(width, len(self.scalers), -1, f)[:, :, list(order)] for _, s in parts])
        eye = torch.eye(towers, dtype=scaled.dtype, device=scaled.device)
        scaled = torch.einsum("twskf,tu->twskuf", scaled, eye).reshape(self.out_channels, -1)
        return torch.cat([torch.cat([x for x, _ in parts]), scaled], 1), torch.cat([m.bias for m in first])

    def forward(self, x: torch.Tensor, edges: EdgeState, after: NormAct | None = None) -> torch.Tensor:
        """Node states after this layer.

        Args:
            x: [N, in_channels]. edges: their width is edge_dim; a restricted state gives that node layer's rows only.
            after: what follows on the result. Backward evaluates it again, and the result itself is not kept.

        Returns:
            Tensor [rows, out_channels].
        """
        graph = edges.graph
        reduced = aggregate(edges, self.message(x), self.natural).flatten(1)  # [rows, K T F]
        factors = self.aggr_module(row_degrees(graph, x))
        x = rows_of(graph, x)
        if len(self.post_nns[0]) == 1:
            form = None if after is None else after.after(x.shape[0], x.device)
            return node_map(x, reduced, [*self.first_maps(), self.lin.weight, self.lin.bias], factors, form)
        y = node_map(x, reduced, self.first_maps(), factors)
        for k in range(2, len(self.post_nns[0]), 2):
            weight = _tower_diagonal([nn[k].weight for nn in self.post_nns])
            y = F.linear(_ACT[self.activation](y), weight, torch.cat([nn[k].bias for nn in self.post_nns]))
        return self.lin(y) if after is None else recompute(after, self.lin(y), *after.tensors)

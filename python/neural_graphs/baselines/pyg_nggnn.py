"""NG-GNN on PyTorch Geometric: the baseline every NG-GNN timing is compared with.

The reference configuration, on an edge list: raw weights go in as [E, 1], no dense n x n tensor exists. Messages run through
PyG's `MessagePassing` and PyG's own fused aggregators; everything compiles with `torch.compile(fullgraph=True)`.

Two styles, same function and same parameters:

* ``published``: operations in the order of the reference code (concatenate x_i and x_j per edge, then a linear);
* ``hoisted``: linears of node features are applied at the nodes, before the gather. What a careful PyG user would write.

Both may list edges source-major (reference order) or target-major (better locality when aggregating per target).
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch_geometric.nn import LayerNorm, MessagePassing
from torch_geometric.nn.aggr import DegreeScalerAggregation

from .front_end import GraphConstructor

AGGREGATORS = ["mean", "min", "max", "std"]
SCALERS = ["identity", "amplification"]
STYLES = ("published", "hoisted")
ORDERS = ("source", "target")


class FiLMPNAConv(MessagePassing):
    """PNA convolution whose messages s * pre([x_i ; x_j]) + t are modulated by [s | t] = Linear(edge state)."""

    def __init__(self, d_hid: int, degree_histogram: Tensor, hoist: bool):
        super().__init__(aggr=DegreeScalerAggregation(AGGREGATORS, SCALERS, degree_histogram))
        self.hoist = hoist
        columns = (1 + len(AGGREGATORS) * len(SCALERS)) * d_hid
        self.edge_encoder = nn.Linear(d_hid, 2 * d_hid)
        self.pre_nns = nn.ModuleList([nn.Sequential(nn.Linear(2 * d_hid, d_hid))])
        self.post_nns = nn.ModuleList([nn.Sequential(nn.Linear(columns, d_hid))])
        self.lin = nn.Linear(d_hid, d_hid)

    def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor) -> Tensor:
        target = source = x
        if self.hoist:
            pre = self.pre_nns[0][0]
            w_target, w_source = pre.weight.chunk(2, dim=1)
            target = nn.functional.linear(x, w_target, pre.bias)
            source = nn.functional.linear(x, w_source)
        out = self.propagate(edge_index, x=(source, target), edge_attr=edge_attr, size=None)
        return self.lin(self.post_nns[0](torch.cat([x, out], dim=-1)))

    def message(self, x_i: Tensor, x_j: Tensor, edge_attr: Tensor) -> Tensor:
        scale, shift = self.edge_encoder(edge_attr).chunk(2, dim=-1)
        if self.hoist:
            return single(scale) * (single(x_i) + single(x_j)) + single(shift)
        return single(scale) * single(self.pre_nns[0](torch.cat([x_i, x_j], dim=-1))) + single(shift)


def single(value: Tensor) -> Tensor:
    """bfloat16 to float32, others as they are.

    Under autocast messages are formed and reduced in float32: in bfloat16 the variance E[m^2] - E[m]^2 is lost, and a compiled backward
    that evaluates a message again with other roundings finds no edge equal to the minimum and divides by zero (PyTorch 2.13).
    """
    return value.float() if value.dtype == torch.bfloat16 else value


class EdgeMLP(nn.Module):
    """e' = W1 silu(W_e e + W_s x_src + W_t x_dst + biases) + b1."""

    def __init__(self, d_hid: int):
        super().__init__()
        self.lin_e = nn.Linear(d_hid, d_hid)
        self.lin_s = nn.Linear(d_hid, d_hid)
        self.lin_t = nn.Linear(d_hid, d_hid)
        self.lin1 = nn.Linear(d_hid, d_hid)
        self.act = nn.SiLU()

    def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor) -> Tensor:
        source, target = edge_index
        hidden = self.lin_e(edge_attr) + self.lin_s(x)[source] + self.lin_t(x)[target]
        return self.lin1(self.act(hidden))


class Backbone(nn.Module):
    """PNA layers with graph norm, SiLU and an edge update between them."""

    def __init__(self, layout: list[int], d_hid: int, num_layers: int, hoist: bool):
        super().__init__()
        histogram = torch.zeros(max(layout) + 1, dtype=torch.long)
        histogram[0] += layout[0]
        for fan_in, width in zip(layout, layout[1:]):
            histogram[fan_in] += width
        self.convs = nn.ModuleList(FiLMPNAConv(d_hid, histogram, hoist) for _ in range(num_layers))
        self.norms = nn.ModuleList(LayerNorm(d_hid, mode="graph") for _ in range(num_layers - 1))
        self.edge_update = nn.ModuleList(EdgeMLP(d_hid) for _ in range(num_layers - 1))
        self.act = nn.SiLU()
        self.checkpointed = False  # True: layers are evaluated again in backward, torch.utils.checkpoint

    def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor) -> tuple[Tensor, Tensor]:
        """Node states and the last edge states."""
        for conv, norm, update in zip(self.convs, self.norms, self.edge_update):

            def layer(x, edge_attr, conv=conv, norm=norm, update=update):
                x = self.act(norm(conv(x, edge_index, edge_attr)))
                return x, update(x, edge_index, edge_attr)

            x, edge_attr = checkpoint(layer, x, edge_attr, use_reentrant=False) if self.checkpointed else layer(x, edge_attr)
        return self.convs[-1](x, edge_index, edge_attr), edge_attr


class PyGNGGNN(nn.Module):
    """NG-GNN classifier of networks with one layout.

    Args:
        layout: neurons per layer, inputs first.
        d_hid: width of node and edge states.
        num_layers: number of PNA convolutions.
        out_features: number of logits.
        fourier_features: frequencies of the Gaussian encoder (its output is twice as wide).
        sigma: standard deviation of the frequencies.
        style: "published" or "hoisted", see the module text; same values, same parameters.
        order: "source" (reference order) or "target": order of the edge list; same values up to rounding.
    """

    def __init__(
        self,
        layout: list[int],
        d_hid: int = 32,
        num_layers: int = 4,
        out_features: int = 10,
        fourier_features: int = 128,
        sigma: float = 3.0,
        style: str = "hoisted",
        order: str = "target",
    ):
        super().__init__()
        if style not in STYLES:
            raise ValueError(f"PyGNGGNN: expected style in {STYLES}, got {style!r}")
        if order not in ORDERS:
            raise ValueError(f"PyGNGGNN: expected order in {ORDERS}, got {order!r}")
        self.layout, self.d_hid, self.num_layers, self.out_features = list(layout), d_hid, num_layers, out_features
        self.fourier_features, self.sigma, self.order = fourier_features, sigma, order
        self.construct_graph = GraphConstructor(layout, d_hid, d_hid, fourier_features, sigma)
        self.gnn = Backbone(layout, d_hid, num_layers, style == "hoisted")
        self.proj_out = nn.Sequential(
            nn.Linear(layout[-1] * d_hid, d_hid), nn.ReLU(), nn.Linear(d_hid, d_hid), nn.ReLU(), nn.Linear(d_hid, out_features)
        )
        self.edge_index_cache: dict[int, Tensor] = {}

    def edge_index(self, batch: int) -> Tensor:
        """Edge list [2, batch * E] of `batch` disjoint copies of the layout; row 0 source, row 1 target. Cached."""
        if batch not in self.edge_index_cache:
            blocks, first = [], 0
            for fan_in, width in zip(self.layout, self.layout[1:]):
                source = torch.arange(first, first + fan_in)
                target = torch.arange(first + fan_in, first + fan_in + width)
                if self.order == "source":
                    blocks.append(torch.cartesian_prod(source, target).T)
                else:
                    blocks.append(torch.cartesian_prod(target, source).T.flip(0))
                first += fan_in
            one = torch.cat(blocks, dim=1)
            offset = torch.arange(batch).view(1, -1, 1) * sum(self.layout)
            self.edge_index_cache[batch] = (one.unsqueeze(1) + offset).flatten(1).contiguous()
        return self.edge_index_cache[batch]

    def forward(self, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
        """Logits [B, out_features] from weights[l] [B, d_l, d_(l+1), 1] and biases[l] [B, d_(l+1), 1]."""
        batch = weights[0].shape[0]
        if self.order == "target":
            weights = [weight.transpose(1, 2) for weight in weights]
        edge_value = torch.cat([weight.flatten(1, 2) for weight in weights], dim=1).flatten(0, 1)  # [B*E, 1]
        inputs = biases[0].new_zeros(batch, self.layout[0], 1)
        node_value = torch.cat([inputs, *biases], dim=1).flatten(0, 1)  # [B*N, 1]
        edge_attr, x = self.construct_graph(edge_value, node_value, batch)
        x, _ = self.gnn(x, self.edge_index(batch), edge_attr)
        outputs = x.view(batch, -1, self.d_hid)[:, -self.layout[-1] :]
        return self.proj_out(outputs.flatten(1))

    def reference_state_dict(self) -> dict[str, Tensor]:
        """Parameters and buffers under the reference's names, detached copies."""
        return {name: value.detach().clone() for name, value in self.state_dict().items()}

    def load_reference(self, state_dict: dict[str, Tensor]) -> "PyGNGGNN":
        """Loads tensors under the reference's names (without "param/" or "buffer/"); all must be there. Returns self."""
        self.load_state_dict(state_dict, strict=True)
        return self

    def reference_config(self) -> dict:
        """The `config` object that describes this model in the vocabulary of the reference."""
        return {
            "layout": list(self.layout),
            "rev_edge_features": False,
            "d_hid": self.d_hid,
            "pooling": ["cat", "last"],
            "pna": {
                "in_channels": self.d_hid,
                "hidden_channels": self.d_hid,
                "out_channels": self.d_hid,
                "num_layers": self.num_layers,
                "aggregators": AGGREGATORS,
                "scalers": SCALERS,
                "edge_dim": self.d_hid,
                "dropout": 0.0,
                "norm": "layernorm",
                "act": "silu",
                "deg": None,
                "update_edge_attr": True,
                "modulate_edges": True,
                "gating_edges": False,
                "final_edge_update": False,
            },
            "graph_constructor": {
                "d_in": 1,
                "d_edge_in": 1,
                "zero_out_bias": False,
                "zero_out_weights": False,
                "sin_emb": True,
                "sin_emb_dim": self.fourier_features,
                "use_pos_embed": True,
                "input_layers": 1,
                "inp_factor": self.sigma,
                "num_probe_features": 0,
                "inr_model": None,
                "stats": None,
            },
            "d_out": self.out_features,
        }

"""NG-T as published: a state for every ordered pair of neurons, joined or not, in plain PyTorch.

The baseline that NG-T timings are compared with, written from the formulas of the published model with the operations in its order:
all pairs are encoded with Fourier features, queries, keys and values of pairs are tensors [B, heads, n, n, d], the pair update
concatenates every state with its reverse, and no pair is left out. About 22 kB are kept for each pair in a training step.
Everything compiles with `torch.compile(fullgraph=True)`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ngkernels.nn import xavier_linear as linear

from .front_end import GraphConstructor, dense_values


class Attention(nn.Module):
    """Softmax over all j of <q_i + q_ij, k_j + k_ij> / sqrt(hidden), times v_j * m_ij + a_ij (v_j + a_ij without modulate_v).

    Heads are split first, then each head's columns are cut into q, k, v (node) and q, k, a, m (pair). i is the row of the pair tensor.
    """

    def __init__(self, d_node: int, d_edge: int, hidden: int, heads: int, modulate_v: bool = True):
        super().__init__()
        self.heads, self.scale, self.pair_parts = heads, hidden**-0.5, 4 if modulate_v else 3
        self.qkv_node = linear(d_node, 3 * hidden, bias=False)
        self.qkv_edge = linear(d_edge, self.pair_parts * hidden, bias=False)
        self.proj_out = linear(hidden, d_node)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """[B, n, d_node] from node states x [B, n, d_node] and pair states e [B, n, n, d_edge]."""
        node = self.qkv_node(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, n, 3 d]
        pair = self.qkv_edge(e).unflatten(-1, (self.heads, -1)).permute(0, 3, 1, 2, 4)  # [B, heads, n, n, 4 d]
        q_node, k_node, v_node = node.chunk(3, dim=-1)
        q_pair, k_pair, add, *mul = pair.chunk(self.pair_parts, dim=-1)
        q = q_node.unsqueeze(-2) + q_pair
        k = k_node.unsqueeze(-3) + k_pair
        v = v_node.unsqueeze(-3) * mul[0] + add if mul else v_node.unsqueeze(-3) + add
        weights = torch.softmax(self.scale * torch.einsum("bhijd,bhijd->bhij", q, k), dim=-1)
        found = torch.einsum("bhij,bhijd->bhid", weights, v)
        return self.proj_out(found.transpose(1, 2).flatten(2))


class PairMLP(nn.Module):
    """lin1(gelu(lin0_e [e_ij ; e_ji] + lin0_s x_i + lin0_t x_j))."""

    def __init__(self, d_node: int, d_edge: int, hidden: int):
        super().__init__()
        self.lin0_e = linear(2 * d_edge, hidden)
        self.lin0_s = linear(d_node, hidden)
        self.lin0_t = linear(d_node, hidden)
        self.lin1 = linear(hidden, d_edge)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        both = torch.cat([e, e.transpose(1, 2)], dim=-1)
        hidden = self.lin0_e(both) + self.lin0_s(x).unsqueeze(-2) + self.lin0_t(x).unsqueeze(-3)
        return self.lin1(nn.functional.gelu(hidden))


class PairUpdate(nn.Module):
    """e <- LN(e + PairMLP(x, e)), then e <- LN(e + MLP(e))."""

    def __init__(self, d_node: int, d_edge: int, hidden: int):
        super().__init__()
        self.edge_mlp0 = PairMLP(d_node, d_edge, hidden)
        self.edge_mlp1 = nn.Sequential(linear(d_edge, hidden, bias=False), nn.GELU(), linear(hidden, d_edge))
        self.eln0, self.eln1 = nn.LayerNorm(d_edge), nn.LayerNorm(d_edge)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        e = self.eln0(e + self.edge_mlp0(x, e))
        return self.eln1(e + self.edge_mlp1(e))


class Layer(nn.Module):
    """x <- LN(x + lin0(attention)), x <- LN(x + MLP(x)), then the pair update with the new x, unless it is the last layer."""

    def __init__(self, d_node: int, d_edge: int, d_attn_hid: int, d_node_hid: int, d_edge_hid: int, heads: int, last: bool = False):
        super().__init__()
        self.self_attn = Attention(d_node, d_edge, d_attn_hid, heads)
        self.lin0 = linear(d_node, d_node)
        self.node_ln0, self.node_ln1 = nn.LayerNorm(d_node), nn.LayerNorm(d_node)
        self.node_mlp = nn.Sequential(linear(d_node, d_node_hid, bias=False), nn.GELU(), linear(d_node_hid, d_node))
        self.edge_updates = None if last else PairUpdate(d_node, d_edge, d_edge_hid)

    def forward(self, x: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        x = self.node_ln0(x + self.lin0(self.self_attn(x, e)))
        x = self.node_ln1(x + self.node_mlp(x))
        return x, e if self.edge_updates is None else self.edge_updates(x, e)


class DenseNGT(nn.Module):
    """NG-T classifier of networks with one layout.

    Args:
        layout: neurons per layer, inputs first.
        d_node, d_edge: widths of node and pair states. d_attn_hid: of queries, keys and values, all heads together.
        d_node_hid, d_edge_hid, d_out_hid: of the MLPs. n_layers, n_heads: of attention.
        out_features: number of logits.
        fourier_features, sigma: of the Gaussian encoders.

    Reference: Kofinas et al., ICLR 2024. Parameters carry the names of the public code, so those of neural_graphs.models.NGT fit.
    """

    def __init__(
        self, layout: list[int], d_node: int = 64, d_edge: int = 32, d_attn_hid: int = 128, d_node_hid: int = 128, d_edge_hid: int = 64,
        d_out_hid: int = 128, n_layers: int = 4, n_heads: int = 8, out_features: int = 10, fourier_features: int = 128, sigma: float = 1.0,
    ):  # fmt: skip
        super().__init__()
        self.layout, self.sigma = list(layout), sigma
        self.sizes = {
            "d_node": d_node, "d_edge": d_edge, "d_attn_hid": d_attn_hid, "d_node_hid": d_node_hid, "d_edge_hid": d_edge_hid,
            "d_out_hid": d_out_hid, "n_layers": n_layers, "n_heads": n_heads,
        }  # fmt: skip
        self.construct_graph = GraphConstructor(layout, d_node, d_edge, fourier_features, sigma)
        self.layers = nn.ModuleList(
            Layer(d_node, d_edge, d_attn_hid, d_node_hid, d_edge_hid, n_heads, last=k + 1 == n_layers) for k in range(n_layers)
        )
        self.proj_out = nn.Sequential(nn.Linear(layout[-1] * d_node, d_out_hid), nn.ReLU(), nn.Linear(d_out_hid, out_features))

    def forward(self, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
        """Logits [B, out_features] from weights[l] [B, d_l, d_(l+1), 1] and biases[l] [B, d_(l+1), 1]."""
        batch, n = weights[0].shape[0], sum(self.layout)
        e, x = self.construct_graph(*dense_values(self.layout, weights, biases), batch)
        x = x.view(batch, n, -1)
        for layer in self.layers:
            x, e = layer(x, e)
        return self.proj_out(x[:, -self.layout[-1] :].flatten(1))

    def reference_state_dict(self) -> dict[str, Tensor]:
        """Parameters under the reference's names, detached copies."""
        return {name: value.detach().clone() for name, value in self.state_dict().items()}

    def load_reference(self, state_dict: dict[str, Tensor]) -> DenseNGT:
        """Loads tensors under the reference's names (without "param/" or "buffer/"); all must be there. Returns self."""
        self.load_state_dict(state_dict, strict=True)
        return self

    def reference_config(self) -> dict:
        """The `config` object that describes this model in the vocabulary of the reference."""
        return {"layout": list(self.layout), "rev_edge_features": False, **self.sizes, "inp_factor": self.sigma}

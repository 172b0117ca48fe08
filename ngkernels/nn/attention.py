"""The relational transformer's layer: attention over pairs of neurons whose queries, keys and values the edge modulates."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..edges import EdgeState, Norm
from ..graph import NeuralGraph
from ..ops.attend import attend
from .norm import NodeNorm
from .pna import rows_of
from .recompute import recompute


def xavier_linear(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    """A Linear as the published NG-T draws it: Xavier-uniform weight, zero bias."""
    m = nn.Linear(inputs, outputs, bias)
    nn.init.xavier_uniform_(m.weight)
    if bias:
        nn.init.zeros_(m.bias)
    return m


class RelationalAttention(nn.Module):
    """y_i = proj_out(sum_j softmax_j(<q_i + q_ij, k_j + k_ij> / sqrt(hidden)) (v_j * m_ij + a_ij)), head by head.

    q_i, k_j, v_j are linear in the node states (qkv_node), q_ij, k_ij, a_ij and m_ij in the edge states (qkv_edge).

    Args:
        node_dim, edge_dim: widths of node and edge states. hidden: of queries, keys and values, all heads together.
        heads: H, divides `hidden`.
        modulate_v: False leaves m_ij out.

    Raises:
        ValueError: heads that do not divide `hidden`.

    Note: the rows of both weights lie head by head, and within a head q, k, v (or q, k, a, m), as in the reference.

    Reference: Diao and Loynd, "Relational Attention", ICLR 2023; Kofinas et al., ICLR 2024.
    """

    def __init__(self, node_dim: int, edge_dim: int, hidden: int, heads: int = 8, modulate_v: bool = True):
        super().__init__()
        if heads < 1 or hidden % heads:
            raise ValueError(f"RelationalAttention: expected heads to divide hidden, got heads={heads}, hidden={hidden}")
        self.hidden, self.heads, self.modulate_v = hidden, heads, modulate_v
        self.qkv_node = xavier_linear(node_dim, 3 * hidden, bias=False)
        self.qkv_edge = xavier_linear(edge_dim, (4 if modulate_v else 3) * hidden, bias=False)
        self.proj_out = xavier_linear(hidden, node_dim)

    def extra_repr(self) -> str:
        return f"hidden={self.hidden}, heads={self.heads}, modulate_v={self.modulate_v}"

    def _parts(self, weight: torch.Tensor) -> list[torch.Tensor]:
        """The matrices [hidden, d] of `weight`, heads one after the other in each."""
        return [w.flatten(0, 1) for w in weight.view(self.heads, -1, self.hidden // self.heads, weight.shape[1]).unbind(1)]

    def attend(self, x: torch.Tensor, edges: EdgeState, over: str = "all") -> torch.Tensor:
        """What the heads found, [rows, hidden], before proj_out."""
        q, k, v = (F.linear(x, w) for w in self._parts(self.qkv_node.weight))
        weight_q, weight_k, weight_add, *weight_mul = self._parts(self.qkv_edge.weight)
        mul = weight_mul[0] if weight_mul else None
        return attend(edges, q, k, v, weight_q, weight_k, weight_add, mul, heads=self.heads, scale=self.hidden**-0.5, over=over)

    def forward(self, x: torch.Tensor, edges: EdgeState, over: str = "all") -> torch.Tensor:
        """Node states after this attention.

        Args:
            x: [N, node_dim]. edges: their width is edge_dim; a restricted state gives that node layer's rows only.
            over: see ngkernels.attend.

        Returns:
            Tensor [rows, node_dim].
        """
        return self.proj_out(self.attend(x, edges, over))


class PairMLP(nn.Module):
    """Parameters of lin1(act(lin0_e [e_ij ; e_ji] + lin0_s x_i + lin0_t x_j)). The reference calls the row i the source."""

    def __init__(self, node_dim: int, edge_dim: int, hidden: int):
        super().__init__()
        self.lin0_e = xavier_linear(2 * edge_dim, hidden)
        self.lin0_s = xavier_linear(node_dim, hidden)
        self.lin0_t = xavier_linear(node_dim, hidden)
        self.lin1 = xavier_linear(hidden, edge_dim)


class PairUpdate(nn.Module):
    """e <- eln0(e_ij + edge_mlp0(e_ij, e_ji, x_i, x_j)), then e <- eln1(e + edge_mlp1(e)); i is the row of the attention.

    Args:
        node_dim, edge_dim: widths of node and edge states. hidden: of both MLPs.
        norm: False leaves eln0 and eln1 out.

    Note: calling the module computes nothing; it returns a longer EdgeState.

    Reference: Diao and Loynd, ICLR 2023; Kofinas et al., ICLR 2024.
    """

    def __init__(self, node_dim: int, edge_dim: int, hidden: int, norm: bool = True):
        super().__init__()
        self.edge_mlp0 = PairMLP(node_dim, edge_dim, hidden)
        self.edge_mlp1 = nn.Sequential(xavier_linear(edge_dim, hidden, bias=False), nn.GELU(), xavier_linear(hidden, edge_dim))
        self.eln0, self.eln1 = (nn.LayerNorm(edge_dim) if norm else None for _ in range(2))

    @staticmethod
    def _norm(layer: nn.LayerNorm | None) -> Norm | None:
        return None if layer is None else Norm(layer.weight, layer.bias, layer.eps)

    def forward(self, edges: EdgeState, x: torch.Tensor) -> EdgeState:
        """`edges` after this update. x: node states [N, node_dim]."""
        first, (inner, _, outer) = self.edge_mlp0, self.edge_mlp1
        forward, reverse = first.lin0_e.weight.chunk(2, 1)
        bias = first.lin0_e.bias + first.lin0_s.bias + first.lin0_t.bias
        edges = edges.update(
            x, forward, first.lin0_s.weight, first.lin0_t.weight, bias, first.lin1.weight, first.lin1.bias, "gelu", True,
            weight_reverse=reverse, norm=self._norm(self.eln0),
        )  # fmt: skip
        return edges.update(None, inner.weight, None, None, None, outer.weight, outer.bias, "gelu", True, norm=self._norm(self.eln1))


class RelationalLayer(nn.Module):
    """x <- node_ln0(x + lin0(attention(x, e))); x <- node_ln1(x + node_mlp(x)); e <- update(e, x).

    Args:
        node_dim, edge_dim: widths of the states. attn_hidden, node_hidden, edge_hidden: of what is between.
        heads, modulate_v: see RelationalAttention.
        update_edges: False leaves the edge states as they are.
        norm: of node states, see NodeNorm; None also leaves out the norms of edge states.
        dropout: of the attention's result and of node_mlp's, while training.

    Note: lin0 and proj_out are multiplied on the small matrices. Kept for backward, for each neuron: x, q, k, v and the
        heads' result; the rest of the node's side is evaluated again (not with dropout).

    Reference: Diao and Loynd, "Relational Attention", ICLR 2023; Kofinas et al., ICLR 2024. Parameters carry the names
        of its public code.
    """

    def __init__(
        self, node_dim: int, edge_dim: int, attn_hidden: int, node_hidden: int, edge_hidden: int, heads: int = 8, modulate_v: bool = True,
        update_edges: bool = True, norm: str | None = "layer", dropout: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        self.self_attn = RelationalAttention(node_dim, edge_dim, attn_hidden, heads, modulate_v)
        self.lin0 = xavier_linear(node_dim, node_dim)
        self.node_ln0, self.node_ln1 = (None if norm is None else NodeNorm(node_dim, norm) for _ in range(2))
        self.node_mlp = nn.Sequential(xavier_linear(node_dim, node_hidden, bias=False), nn.GELU(), xavier_linear(node_hidden, node_dim))
        self.edge_updates = PairUpdate(node_dim, edge_dim, edge_hidden, norm is not None) if update_edges else None
        self.dropout = dropout

    def nodes(self, x: torch.Tensor, edges: EdgeState, over: str = "all") -> torch.Tensor:
        """Node states after this layer, [rows, node_dim]. Arguments: see RelationalAttention.forward."""
        found, proj = self.self_attn.attend(x, edges, over), self.self_attn.proj_out
        weight, bias = self.lin0.weight @ proj.weight, torch.addmv(self.lin0.bias, self.lin0.weight, proj.bias)
        inner, _, outer = self.node_mlp
        norms = [t for m in (self.node_ln0, self.node_ln1) if m is not None for t in (m.weight, m.bias)]
        function = self._node_function(edges.graph)
        arguments = (rows_of(edges.graph, x), found, weight, bias, inner.weight, outer.weight, outer.bias, *norms)
        return function(*arguments) if self.training and self.dropout else recompute(function, *arguments)

    def _node_function(self, graph: NeuralGraph):
        """What follows the attention, as a function of tensors."""
        rate = self.dropout if self.training else 0.0
        if self.node_ln0 is None:
            first = second = lambda y, *_: y
        else:
            first, second = self.node_ln0.function(graph), self.node_ln1.function(graph)

        def function(x, found, weight, bias, inner, outer, outer_bias, *norms):
            y = first(x + _dropped(F.linear(found, weight, bias), rate), *norms[:2])
            return second(y + _dropped(F.linear(F.gelu(F.linear(y, inner)), outer, outer_bias), rate), *norms[2:])

        return function

    def forward(self, x: torch.Tensor, edges: EdgeState, over: str = "all") -> tuple[torch.Tensor, EdgeState]:
        """(node states, edge states) after this layer. Arguments: see RelationalAttention.forward."""
        x = self.nodes(x, edges, over)
        return x, edges if self.edge_updates is None else self.edge_updates(edges, x)


def _dropped(y: torch.Tensor, rate: float) -> torch.Tensor:
    return F.dropout(y, rate) if rate else y

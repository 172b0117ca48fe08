"""What `benchmarks.attention` compares: `ngkernels.attend` and the attention ops of PyTorch and PyG, where they can express it.

Three problems; i reads, j is read, h is the head, e_ij a pair state 32 wide:

* additive: logits <q_i, k_j> / sqrt(d) + <b_h, e_ij>, values v_j, all pairs of a network. All that a bias can say: for `attend` the
  special case of weight_k = 0 and a weight_q that is b_h in one more column of the head, where q is 0 and k is 1.
  `scaled_dot_product_attention` and `flex_attention` read the bias as a tensor [B, H, n, n]: made from the raw weights within the call
  (`sdpa`, `flex`), or given, with neither its time, its memory nor its gradient counted (`sdpa-given`).
* relational: what NG-T's first layer does, <q_i + Q e_ij, k_j + K e_ij> and v_j * (M e_ij) + A e_ij over all pairs. No bias can say it:
  the logit mixes q_i with e_ij, so a precomputed one would depend on the queries, and values differ from pair to pair. Beside it
  stands the published dense formula.
* sparse: keys k_j + K e_ij and values v_j + K e_ij over the edges j -> i, edge features [E, 32] given: PyG's TransformerConv
  with `edge_dim`, which has no share of the edge in the query, no multiplied value, and one matrix for keys and values.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import ngkernels as ngk
from benchmarks.cases import Case
from neural_graphs.baselines.front_end import dense_values

HEADS, HEAD, WIDTH = 8, 16, 32
HIDDEN = HEADS * HEAD


class Inputs:
    """Leaves of a problem: queries, keys, values [N, H d], raw features of edges [B, n_src, n_dst, C], small matrices."""

    def __init__(self, case: Case, channels: int, dtype: torch.dtype = torch.float32):
        generator = torch.Generator().manual_seed(1)

        def leaf(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator) * scale).to(dtype).requires_grad_()

        self.case = case
        self.q, self.k, self.v = (leaf(case.nodes, HIDDEN) for _ in range(3))
        self.weights = [leaf(case.batch, a, b, channels, scale=0.3) for a, b in zip(case.layout, case.layout[1:])]
        self.frequencies = torch.randn(128, 1, generator=generator).to(dtype)
        self.encoder = leaf(WIDTH, 256, scale=0.1), leaf(WIDTH)
        self.bias = leaf(HEADS, WIDTH, scale=0.2)
        self.maps = [leaf(HIDDEN, WIDTH, scale=0.2) for _ in range(4)]  # query, key, added to and multiplied with the value
        self.graph = ngk.NeuralGraph.mlp(case.layout, case.batch)

    @property
    def leaves(self) -> list[Tensor]:
        return [self.q, self.k, self.v, *self.weights, *self.encoder, self.bias, *self.maps]

    def encoded(self) -> ngk.EdgeState:
        return ngk.EdgeState(self.graph, self.weights, ngk.encoders.Fourier(self.frequencies, *self.encoder))

    def dense(self) -> Tensor:
        """Pair states [B, n, n, 32], as published: row i, column j."""
        pairs, _ = dense_values(self.case.layout, self.weights, [w.new_zeros(w.shape[0], w.shape[2], 1) for w in self.weights])
        phase = 2 * torch.pi * pairs.transpose(1, 2) @ self.frequencies.T
        return F.linear(torch.cat([phase.cos(), phase.sin()], -1), *self.encoder)

    def heads(self, x: Tensor) -> Tensor:
        """[N, H d] as [B, H, n, d]."""
        return x.view(self.case.batch, -1, HEADS, HEAD).transpose(1, 2)


def nodes(x: Tensor) -> Tensor:
    """[B, H, n, d] as [N, H d]."""
    return x.transpose(1, 2).flatten(2).flatten(0, 1)


# ---- additive ----
def additive_ngk(data: Inputs) -> Tensor:
    def columns(x: Tensor, value: float) -> Tensor:  # one more column for each head
        x = x.view(-1, HEADS, HEAD)
        return torch.cat([x, x.new_full((*x.shape[:2], 1), value)], -1).flatten(1)

    bias = data.bias * HEAD**0.5  # the logits are scaled, the bias is not
    weight_q = torch.cat([bias.new_zeros(HEADS, HEAD, WIDTH), bias[:, None]], 1).flatten(0, 1)
    q, k = columns(data.q, 0.0), columns(data.k, 1.0)
    return ngk.attend(data.encoded(), q, k, data.v, weight_q, torch.zeros_like(weight_q), heads=HEADS, scale=HEAD**-0.5)


def made_bias(data: Inputs) -> Tensor:
    return F.linear(data.dense(), data.bias).permute(0, 3, 1, 2).contiguous()  # [B, H, n, n]


def sdpa(data: Inputs, bias: Tensor) -> Tensor:
    return nodes(F.scaled_dot_product_attention(data.heads(data.q), data.heads(data.k), data.heads(data.v), attn_mask=bias))


def flex() -> Callable[[Inputs], Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    @torch.compile(fullgraph=True, dynamic=False)
    def attention(q, k, v, bias):
        return flex_attention(q, k, v, score_mod=lambda score, b, h, i, j: score + bias[b, h, i, j])

    def call(data: Inputs) -> Tensor:
        q, k, v = (data.heads(t).contiguous() for t in (data.q, data.k, data.v))
        return nodes(attention(q, k, v, made_bias(data)))

    return call


# ---- relational ----
def relational_ngk(data: Inputs) -> Tensor:
    query, key, add, mul = data.maps
    return ngk.attend(data.encoded(), data.q, data.k, data.v, query, key, add, mul, heads=HEADS, scale=HIDDEN**-0.5)


def relational_dense(data: Inputs) -> Tensor:
    e = data.dense()
    query, key, add, mul = (F.linear(e, w).unflatten(-1, (HEADS, HEAD)).permute(0, 3, 1, 2, 4) for w in data.maps)  # [B, H, n, n, d]
    q, k = data.heads(data.q).unsqueeze(-2) + query, data.heads(data.k).unsqueeze(-3) + key
    v = data.heads(data.v).unsqueeze(-3) * mul + add
    weights = torch.softmax(HIDDEN**-0.5 * torch.einsum("bhijd,bhijd->bhij", q, k), -1)
    return nodes(torch.einsum("bhij,bhijd->bhid", weights, v))


# ---- sparse ----
def sparse_ngk(data: Inputs) -> Tensor:
    edges, key = ngk.EdgeState(data.graph, data.weights, ngk.encoders.Identity()), data.maps[1]
    return ngk.attend(edges, data.q, data.k, data.v, torch.zeros_like(key), key, key, heads=HEADS, over="in", include_self=False)


def transformer_conv(case: Case, dtype: torch.dtype) -> Callable[[Inputs], Tensor]:
    """PyG's layer on edges sorted by target, without its skip connection; its node linears pass on the q, k, v that it is given."""
    from torch_geometric.nn import TransformerConv

    sources, targets, first = [], [], 0
    for fan_in, width in zip(case.layout, case.layout[1:]):
        sources.append(torch.arange(first, first + fan_in).repeat(width))
        targets.append(torch.arange(first + fan_in, first + fan_in + width).repeat_interleave(fan_in))
        first += fan_in
    one, n = torch.stack([torch.cat(sources), torch.cat(targets)]), sum(case.layout)
    index = (one[:, None] + n * torch.arange(case.batch).view(1, -1, 1)).flatten(1)
    layer = TransformerConv(HIDDEN, HEAD, HEADS, edge_dim=WIDTH, bias=False, root_weight=False).to(dtype)
    for name in ("lin_query", "lin_key", "lin_value", "lin_edge"):
        delattr(layer, name)  # they are functions of the inputs here
    layer.lin_query, layer.lin_key, layer.lin_value = (lambda x, part=part: x[part] for part in range(3))

    def call(data: Inputs) -> Tensor:
        features = torch.cat([w.transpose(1, 2).flatten(1, 2) for w in data.weights], 1).flatten(0, 1)  # target-major
        layer.lin_edge = lambda e: F.linear(e, data.maps[1])
        both = (data.q, data.k, data.v)
        return layer((both, both), index, features)

    return call


def contenders(problem: str, case: Case, dtype: torch.dtype = torch.float32) -> dict[str, Callable[[Inputs], Tensor]]:
    """By name, who computes a problem; the second is the plain formula."""
    if problem == "additive":
        given = made_bias(Inputs(case, 1, dtype)).detach()
        found = {"ngk-cpp": additive_ngk, "sdpa": lambda d: sdpa(d, made_bias(d)), "sdpa-given": lambda d: sdpa(d, given), "flex": flex()}
    elif problem == "relational":
        compiled = torch.compile(relational_dense, dynamic=False)
        found = {"ngk-cpp": relational_ngk, "dense": relational_dense, "dense-compile": compiled}
    else:
        found = {"ngk-cpp": sparse_ngk, "pyg": transformer_conv(case, dtype)}
    return found

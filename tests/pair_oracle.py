"""Pair states and relational attention written out: every pair of neurons of a batch in dense [N, N, ...] tensors.

Row i, column j stand for the edge j -> i, as in the engine: i is the destination and reads, j is the source. Independent of ngkernels;
single formulas are those of oracle.py and attention_oracle.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from oracle import ACTIVATIONS, Edges, Network, linear, list_edges, node_rows, reciprocal


@dataclass
class Pairs:
    """What is known of all N^2 pairs before anything is computed."""

    raw: torch.Tensor  # [N, N, C], or with `reciprocal` 3 C; 0 where there is no edge
    joined: torch.Tensor  # [N, N] bool: j -> i is an edge
    same: torch.Tensor  # [N, N] bool: i and j are nodes of the same network
    token: torch.Tensor  # [N] bool: tokens
    edges: Edges  # the edges, with the nodes' numbers as they are with tokens
    networks: tuple[Network, ...]  # with the tokens as layers of their own


def with_token(network: Network) -> Network:
    """One more layer of one node in front."""
    return replace(network, layers=(1, *network.layers), blocks=tuple((kind, src + 1, dst + 1) for kind, src, dst in network.blocks))


def list_pairs(networks: Sequence[Network], weights: Sequence[torch.Tensor], affine=None, both: bool = False, token: bool = False) -> Pairs:
    """`both`: a pair's raw features are those of its two directions and their sum; one of the first two is 0."""
    networks = tuple(with_token(n) if token else n for n in networks)
    edges = list_edges(networks, weights, affine)
    features = reciprocal(edges) if both else edges.raw
    n = edges.num_nodes
    raw, joined = features.new_zeros(n, n, features.shape[1]), torch.zeros(n, n, dtype=torch.bool)
    joined[edges.dst, edges.src] = True
    if both:  # the pair against an edge's direction reads that edge as well, be it an edge itself or not
        turned = reciprocal(replace(edges, backward=~edges.backward))
        raw = raw.index_put((edges.src, edges.dst), turned)
    raw = raw.index_put((edges.dst, edges.src), features)
    of, first = [], []
    for net in networks:
        for _ in range(net.copies):
            first += [True] + [False] * (net.num_nodes - 1)
            of += [len(of)] * net.num_nodes
    network = torch.tensor(of)
    return Pairs(raw, joined, network[:, None] == network, torch.tensor(first) & token, edges, networks)


def mask_token(e: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    """The pairs of a token start from a state of 0."""
    return e.masked_fill((pairs.token[:, None] | pairs.token)[..., None], 0.0)


def norm(e: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    centred = e - e.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def update(e, x, weight_edge, weight_reverse, weight_dst, weight_src, bias, weight_out, bias_out, activation, residual, low=False):
    """One linear map of [e_ij | e_ji | x_i | x_j] (what is None is left out), an activation, another linear map."""
    parts, maps = [e], [weight_edge]
    if weight_reverse is not None:
        parts.append(e.transpose(0, 1))
        maps.append(weight_reverse)
    if x is not None:
        parts += [x[:, None].expand(-1, len(x), -1), x[None].expand(len(x), -1, -1)]
        maps += [weight_dst, weight_src]
    out = linear(ACTIVATIONS[activation](linear(torch.cat(parts, -1), torch.cat(maps, 1), bias, low)), weight_out, bias_out, low)
    return e + out if residual else out


def readers(pairs: Pairs, over: str, include_self: bool = True) -> torch.Tensor:
    """[N, N] bool: whether i reads j."""
    there, back = pairs.joined, pairs.joined.T
    read = {"all": pairs.same, "edges": there | back, "in": there, "out": back}[over]
    read = read | (torch.eye(len(read), dtype=torch.bool) & include_self)
    return read | (pairs.same & (pairs.token[:, None] | pairs.token) & ~torch.eye(len(read), dtype=torch.bool))


def attend(e, q, k, v, weight_q, weight_k, weight_add, weight_mul, heads: int, scale: float, read: torch.Tensor, kept=None, low=False):
    """[N, heads * Dv]; a row that reads nothing is 0. kept [N, N, heads]: what dropout multiplies the weights with."""
    n = len(q)

    def by_head(t):
        return t.unflatten(-1, (heads, -1))

    query, key = by_head(q[:, None] + linear(e, weight_q, None, low)), by_head(k[None] + linear(e, weight_k, None, low))
    logits = ((query * key).sum(-1) * scale).masked_fill(~read[..., None], -math.inf)
    logits = logits.masked_fill(~read.any(1)[:, None, None], 0.0)
    weights = torch.softmax(logits, 1) * read[..., None]
    if kept is not None:
        weights = weights * kept
    value = v[None].expand(n, -1, -1)
    if weight_mul is not None:
        value = value * linear(e, weight_mul, None, low)
    if weight_add is not None:
        value = value + linear(e, weight_add)
    return (weights[..., None] * by_head(value)).sum(1).flatten(1)


def rows_of(pairs: Pairs, out: torch.Tensor, layer: int | None) -> torch.Tensor:
    """The rows of one node layer of every network."""
    return out if layer is None else out[node_rows(pairs.networks, layer)]


def of_edges(pairs: Pairs, e: torch.Tensor) -> torch.Tensor:
    """[E, d]: the states of the edges alone."""
    return e[pairs.edges.dst, pairs.edges.src]

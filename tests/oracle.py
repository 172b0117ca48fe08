"""What the engine must compute, written out: gathered [E, d] tensors, one formula after the other, nothing folded.

Independent of ngkernels: edges are listed here from the layer widths and the blocks, by loops. Works in float64 (the truth) and
float32 (what plain PyTorch makes of the same formulas); `low` rounds every matrix product as bfloat16 autocast does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

ACTIVATIONS = {
    "silu": lambda z: z * torch.sigmoid(z),
    "relu": torch.relu,
    "gelu": lambda z: 0.5 * z * (1 + torch.erf(z / math.sqrt(2))),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky_relu": lambda z: F.leaky_relu(z, 0.01),
    "identity": lambda z: z,
}


@dataclass(frozen=True)
class Network:
    """Layer widths and blocks (kind, source layer, destination layer), one weight tensor each; `copies` of it. A sparse block
    names its edges too: ("sparse", source layer, destination layer, pairs of a source and a destination)."""

    layers: tuple[int, ...]
    blocks: tuple[tuple, ...]
    copies: int = 1
    reverse: bool = False

    @property
    def num_nodes(self) -> int:
        return sum(self.layers)

    def shape(self, block: tuple) -> tuple[int, ...]:
        """Sizes of a block without copies: (n_src, n_dst), (n,) of a diagonal one, (edges,) of a sparse one."""
        kind, src, dst, *edges = block
        if kind == "sparse":
            return (len(edges[0]),)
        n_src, n_dst = self.layers[src], self.layers[dst]
        return (min(n_src, n_dst),) if kind == "diagonal" else (n_src, n_dst)


def mlp(*layers: int, copies: int = 1, reverse: bool = False) -> Network:
    return Network(layers, tuple(("dense", k, k + 1) for k in range(len(layers) - 1)), copies, reverse)


@dataclass
class Edges:
    """All edges: block by block, in it copy by copy, in it source by source."""

    src: torch.Tensor  # [E]
    dst: torch.Tensor  # [E]
    raw: torch.Tensor  # [E, C]
    backward: torch.Tensor  # [E] bool: an edge of a reversed block
    shapes: list[tuple[int, ...]]  # of each block: (copies, n_src, n_dst), (copies, n) or (copies, edges)
    into: list[int]  # destination layer of each block
    networks: list[int]  # network of each block
    num_nodes: int


def list_edges(networks: Sequence[Network], weights: Sequence[torch.Tensor], affine=None) -> Edges:
    src, dst, raw, backward, shapes, into, owner = [], [], [], [], [], [], []
    first_node, first_weight = 0, 0
    for number, net in enumerate(networks):
        starts = [sum(net.layers[:k]) for k in range(len(net.layers))]
        for flipped in (False, True) if net.reverse else (False,):
            for k, block in enumerate(net.blocks):
                w = weights[first_weight + k]
                if affine is not None:
                    w = w * affine[0][first_weight + k] + affine[1][first_weight + k]
                size = net.shape(block)
                for copy in range(net.copies):
                    base = first_node + copy * net.num_nodes
                    low, high = base + starts[block[1]], base + starts[block[2]]
                    if block[0] == "sparse":
                        i, j = torch.tensor(block[3], dtype=torch.int64).reshape(-1, 2).T
                    elif block[0] == "diagonal":
                        i = j = torch.arange(size[0])
                    elif flipped:  # source-major of the reversed block: its sources are the block's destinations
                        j, i = torch.cartesian_prod(torch.arange(size[1]), torch.arange(size[0])).T
                    else:
                        i, j = torch.cartesian_prod(torch.arange(size[0]), torch.arange(size[1])).T
                    raw.append(w[copy] if block[0] == "sparse" else w[copy, i] if block[0] == "diagonal" else w[copy, i, j])
                    src.append(high + j if flipped else low + i)
                    dst.append(low + i if flipped else high + j)
                    backward.append(torch.full((len(i),), flipped))
                shapes.append((net.copies, *(reversed(size) if flipped else size)))
                into.append(block[1] if flipped else block[2])
                owner.append(number)
        first_node += net.copies * net.num_nodes
        first_weight += len(net.blocks)
    return Edges(torch.cat(src), torch.cat(dst), torch.cat(raw), torch.cat(backward), shapes, into, owner, first_node)


def linear(x, weight, bias=None, low: bool = False):
    """x W^T + b; `low`: operands and product in bfloat16, as under autocast."""
    y = F.linear(x.bfloat16(), weight.bfloat16()).to(x.dtype) if low else F.linear(x, weight)
    return y if bias is None else y + bias


def reciprocal(edges: Edges) -> torch.Tensor:
    """[e, e of the reverse, both]: in a layered network only one of the two carries the weight."""
    zero = torch.zeros_like(edges.raw)
    w, back = edges.raw, edges.backward[:, None]
    return torch.cat([torch.where(back, zero, w), torch.where(back, w, zero), w], 1)


def fourier(w, frequencies):
    turns = w @ frequencies.T
    return torch.cat([torch.cos(2 * math.pi * turns), torch.sin(2 * math.pi * turns)], 1)


def update(e, x, edges, weight_edge, weight_dst, weight_src, bias, weight_out, bias_out, activation, residual, low):
    """One linear map of [e_ij | x_i | x_j], an activation, another linear map, as the edge MLP of NG-GNN."""
    gathered = torch.cat([e, x[edges.dst], x[edges.src]], 1)
    z = linear(gathered, torch.cat([weight_edge, weight_dst, weight_src], 1), bias, low)
    out = linear(ACTIVATIONS[activation](z), weight_out, bias_out, low)
    return e + out if residual else out


def message(kind, e, x, edges, weight_edge, bias_edge, weight_dst, weight_src, bias, mlp_layers, activation, low):
    """FiLM, gate and product modulate pre([x_i | x_j]); concat feeds pre with the edge as well."""
    st = linear(e, weight_edge, bias_edge, low)
    q = linear(torch.cat([x[edges.dst], x[edges.src]], 1), torch.cat([weight_dst, weight_src], 1), bias, low)
    if kind == "concat":
        q = q + st
    for w, b in mlp_layers:
        q = linear(ACTIVATIONS[activation](q), w, b, low)
    width = q.shape[1]
    if kind == "film":
        return st[:, :width] * q + st[:, width:]
    if kind == "gate":
        return torch.sigmoid(st) * q
    return st * q if kind == "product" else q


def _reduce_group(m: torch.Tensor, name: str) -> torch.Tensor:
    """One node's messages [n, F]. amin and amax share their gradient among ties; std is cut at a variance of 1e-5."""
    if name in ("sum", "mean"):
        return m.sum(0) if name == "sum" else m.mean(0)
    if name in ("min", "max"):
        return m.amin(0) if name == "min" else m.amax(0)
    var = ((m - m.mean(0)) ** 2).mean(0)
    if name == "var":
        return var
    live = var > 1e-5
    return torch.where(live, torch.where(live, var, torch.ones_like(var)).sqrt(), torch.zeros_like(var))


def aggregate(m: torch.Tensor, dst: torch.Tensor, num_nodes: int, names: Sequence[str]) -> torch.Tensor:
    """[N, K, F], node by node; a node without messages gets zeros."""
    order = dst.argsort(stable=True)
    groups = m[order].split(torch.bincount(dst, minlength=num_nodes).tolist())
    empty = m.new_zeros(len(names), m.shape[1])
    return torch.stack([torch.stack([_reduce_group(g, name) for name in names]) if len(g) else empty for g in groups])


def node_rows(networks: Sequence[Network], layer: int) -> torch.Tensor:
    """Nodes of one layer of every network, copy by copy."""
    rows, node = [], 0
    for net in networks:
        k = layer % len(net.layers)
        for copy in range(net.copies):
            first = node + copy * net.num_nodes + sum(net.layers[:k])
            rows += range(first, first + net.layers[k])
        node += net.copies * net.num_nodes
    return torch.tensor(rows)


def by_block(
    values: torch.Tensor, edges: Edges, packed: bool, layer: int | None = None, networks: Sequence[Network] = ()
) -> list[torch.Tensor]:
    """Values [E, n] as one tensor a block into `layer`; packed: as one tensor, network by network and copy by copy, 0 for the others."""
    pieces = values.split([math.prod(s) for s in edges.shapes])
    kept = [layer is None or dst == layer % len(networks[k].layers) for dst, k in zip(edges.into, edges.networks)]
    if packed:
        rows = []
        for number in sorted(set(edges.networks)):
            own = [
                (p * keep).reshape(s[0], -1, p.shape[1]) for p, s, k, keep in zip(pieces, edges.shapes, edges.networks, kept) if k == number
            ]
            rows.append(torch.cat(own, 1).flatten(0, 1))
        return [torch.cat(rows)]
    return [p.reshape(*s, p.shape[1]) for p, s, keep in zip(pieces, edges.shapes, kept) if keep]

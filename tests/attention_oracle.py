"""NG-T written out: every pair of neurons in a dense [n, n, d] tensor, one network at a time, one formula after the other.

Independent of ngkernels; reads a state dict under the reference's names. Row i of e is the source of the edge i -> j.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

State = dict[str, torch.Tensor]


def gelu(z):
    return 0.5 * z * (1 + torch.erf(z / math.sqrt(2)))


def linear(state: State, name: str, x):
    y = x @ state[f"{name}.weight"].T
    return y + state[f"{name}.bias"] if f"{name}.bias" in state else y


def mlp(state: State, name: str, x):
    """Linear, ReLU, Linear, ...: numbered 0, 2, 4."""
    count = sum(key.startswith(f"{name}.") and key.endswith(".weight") for key in state)
    for k in range(count):
        x = linear(state, f"{name}.{2 * k}", torch.relu(x) if k else x)
    return x


def layer_norm(state: State, name: str, x):
    if f"{name}.weight" not in state:
        return x
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]


def part(state: State, name: str) -> State:
    """The tensors under `name`, without it."""
    return {key[len(name) + 1 :]: t for key, t in state.items() if key.startswith(f"{name}.")}


# ---- one layer ----
def attention(state: State, x, e, heads: int, allowed=None):
    """x [n, d], e [n, n, d_e]; allowed [n, n]: pairs that the softmax sees, all if None. Heads are split first, then q, k, v."""
    hidden = state["proj_out.weight"].shape[1]
    width = hidden // heads
    node = (x @ state["qkv_node.weight"].T).view(len(x), heads, -1)
    edge = (e @ state["qkv_edge.weight"].T).view(*e.shape[:2], heads, -1)
    q = node[:, None, :, :width] + edge[..., :width]
    k = node[None, :, :, width : 2 * width] + edge[..., width : 2 * width]
    v, add, mul = node[None, :, :, 2 * width :], edge[..., 2 * width : 3 * width], edge[..., 3 * width :]
    v = v * mul + add if mul.shape[-1] else v + add
    logits = (q * k).sum(-1) / math.sqrt(hidden)
    if allowed is not None:
        logits = logits.masked_fill(~allowed[..., None], -math.inf)
    weights = torch.softmax(logits, 1)
    return linear(state, "proj_out", (weights[..., None] * v).sum(1).flatten(1))


def edge_layer(state: State, x, e):
    both = torch.cat([e, e.transpose(0, 1)], -1)
    z = linear(state, "edge_mlp0.lin0_e", both) + linear(state, "edge_mlp0.lin0_s", x)[:, None] + linear(state, "edge_mlp0.lin0_t", x)[None]
    e = layer_norm(state, "eln0", e + linear(state, "edge_mlp0.lin1", gelu(z)))
    return layer_norm(state, "eln1", e + linear(state, "edge_mlp1.2", gelu(linear(state, "edge_mlp1.0", e))))


def layer(state: State, x, e, heads: int, allowed=None):
    x = layer_norm(state, "node_ln0", x + linear(state, "lin0", attention(part(state, "self_attn"), x, e, heads, allowed)))
    x = layer_norm(state, "node_ln1", x + linear(state, "node_mlp.2", gelu(linear(state, "node_mlp.0", x))))
    updates = part(state, "edge_updates")
    return x, edge_layer(updates, x, e) if updates else e


# ---- first states ----
def encode(state: State, name: str, v):
    """[Gaussian Fourier features,] Linear, then SiLU and Linear as often as the names say."""
    place = 0
    if f"{name}.0.b" in state:
        phase = 2 * math.pi * v @ state[f"{name}.0.b"].T
        v, place = torch.cat([phase.cos(), phase.sin()], -1), 1
    v = linear(state, f"{name}.{place}", v)
    while f"{name}.{place + 2}.weight" in state:
        place += 2
        v = linear(state, f"{name}.{place}", v * torch.sigmoid(v))
    return v


@dataclass
class Dense:
    """One network: biases [n, C] (0 for inputs), weights [n, n, C] (0 where there is no edge), joined [n, n]."""

    biases: torch.Tensor
    weights: torch.Tensor
    joined: torch.Tensor

    def neighbours(self, over: str) -> torch.Tensor:
        """Pairs that attention over "all" or "edges" looks at, [n, n]."""
        return (
            torch.ones_like(self.joined) if over == "all" else self.joined | self.joined.T | torch.eye(len(self.joined), dtype=torch.bool)
        )


def dense(layers: Sequence[int], blocks, weights, biases, stats: dict | None = None) -> Dense:
    """weights[k] of blocks[k] = (source layer, destination layer), (n_src, n_dst, C), or (n, C) from neuron to neuron."""
    n, starts = sum(layers), [sum(layers[:k]) for k in range(len(layers))]
    w_all, joined = weights[0].new_zeros(n, n, weights[0].shape[-1]), torch.zeros(n, n, dtype=torch.bool)
    for k, ((src, dst), w) in enumerate(zip(blocks, weights, strict=True)):
        if stats:
            w = (w - stats["weights_mean"][k]) / stats["weights_std"][k]
        if w.dim() == 2:
            row, column = (starts[layer] + torch.arange(len(w)) for layer in (src, dst))
        else:
            row, column = torch.cartesian_prod(starts[src] + torch.arange(w.shape[0]), starts[dst] + torch.arange(w.shape[1])).T
        w_all = w_all.index_put((row, column), w.reshape(-1, w.shape[-1]))
        joined[row, column] = True
    rows = [biases[0].new_zeros(layers[0], biases[0].shape[-1])]
    for k, b in enumerate(biases):
        rows.append((b - stats["biases_mean"][k]) / stats["biases_std"][k] if stats else b)
    return Dense(torch.cat(rows), w_all, joined)


def first_states(state: State, layers: Sequence[int], network: Dense, reverse: bool, probed=None):
    """(x [n, d_node], e [n, n, d_edge])."""
    state = part(state, "construct_graph")
    w = network.weights
    if reverse:
        w = torch.cat([w, w.transpose(0, 1), w + w.transpose(0, 1)], -1)
    d_edge, d_node = len(state["proj_edge_in.weight"]), len(state["proj_node_in.weight"])
    e = encode(state, "proj_weight", w) if part(state, "proj_weight") else w.new_zeros(*w.shape[:2], d_edge)
    x = encode(state, "proj_bias", network.biases) if part(state, "proj_bias") else w.new_zeros(len(w), d_node)
    x = linear(state, "proj_node_in", x if probed is None else x + probed)
    if "pos_embed" in state:
        hidden = [state["pos_embed"][layers[0] + k].expand(width, -1) for k, width in enumerate(layers[1:-1])]
        x = x + torch.cat([state["pos_embed"][: layers[0]], *hidden, state["pos_embed"][len(state["pos_embed"]) - layers[-1] :]])
    return x, linear(state, "proj_edge_in", e)


# ---- the model ----
def final_states(state: State, layers: Sequence[int], network: Dense, heads: int, reverse: bool = False, over: str = "all", probed=None):
    """(x, e) after all layers; with a token in front if the state has one."""
    x, e = first_states(state, layers, network, reverse, probed)
    allowed = network.neighbours(over)
    if "cls_token" in state:
        x = torch.cat([state["cls_token"][None], x])
        e = torch.nn.functional.pad(e, (0, 0, 1, 0, 1, 0))
        allowed = torch.nn.functional.pad(allowed, (1, 0, 1, 0), value=True)
    k = 0
    while part(state, f"layers.{k}"):
        x, e = layer(part(state, f"layers.{k}"), x, e, heads, allowed)
        k += 1
    return x, e


def logits(state: State, layers: Sequence[int], network: Dense, heads: int, pooling, **options):
    """[out_features] of one network."""
    x, e = final_states(state, layers, network, heads, **options)
    method, where = pooling
    last = slice(len(x) - layers[-1], None)
    if method == "cls_token":
        pooled = x[0]
    elif method == "cat":
        pooled = x[last].flatten()
    elif method == "mean_edge":
        pairs = network.neighbours(options.get("over", "all"))
        pooled = (e[:, last][pairs[:, last]] if where == "last" else e[pairs]).mean(0)
    elif method == "max_edge":
        pooled = e[network.neighbours(options.get("over", "all"))].amax(0)
    else:
        rows = x[last] if where == "last" else x
        pooled = rows.mean(0) if method == "mean" else rows.amax(0)
    return mlp(state, "proj_out", pooled)


def updates(state: State, layers: Sequence[int], blocks, network: Dense, heads: int, **options):
    """(weight updates by block [n_src, n_dst, C], bias updates by layer [n, C]) of one network."""
    x, e = final_states(state, layers, network, heads, **options)
    x, e = mlp(state, "proj_node", x), mlp(state, "proj_edge", e)
    starts = [sum(layers[:k]) for k in range(len(layers))]
    rows = [slice(start, start + width) for start, width in zip(starts, layers)]
    weights = [e[rows[src], rows[dst]] * state[f"weight_scale.{k}"] for k, (src, dst) in enumerate(blocks)]
    return weights, [x[row] * state[f"bias_scale.{k}"] for k, row in enumerate(rows[1:])]

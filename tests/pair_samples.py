"""Sample expressions of pair states and attention, run by the engine and by the dense formulas on the same leaves."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import oracle as plain
import pair_oracle as dense
import torch
from oracle import Network, mlp
from sample import Sample, Tensors, frequencies, pairs, weights_of
from sample import leaves as leaves_of_edges
from samples import cast, device_of, edge_state, graph_of, head, message_of, remember, run

import ngkernels as ngk


@dataclass(frozen=True)
class PairSample(Sample):
    """`reduce` and `head` ask for messages and a readout of the same state beside the attention (`over` None: without it)."""

    name: str = "plain"
    networks: tuple[Network, ...] = (mlp(2, 5, 3, copies=2),)
    reduce: tuple[str, ...] = ()
    head: int = 0
    residual: tuple[bool, ...] = (True, False)
    activation: str = "gelu"
    reverse: tuple[bool, ...] = (True, True)  # which updates read the reversed pair
    nodes: tuple[bool, ...] = (True, False)  # which updates read the nodes
    norm: tuple[bool, ...] = (True, True)
    token: bool = False
    closed: bool = False  # EdgeState.closure first
    over: str | None = "all"
    include_self: bool = True
    heads: int = 2
    dk: int = 3
    dv: int = 5
    attention_scale: float | None = 0.3
    multiply: bool = True
    add: bool = True
    dropout: float = 0.0

    @property
    def encoded_alone(self) -> Sample:
        """The encoder, without updates."""
        return self.but(self.name, residual=(), restrict=None)


_UNUSED = ("update", *(f"x{k}" for k in range(8)))  # leaves of updates are made here


def leaves(s: PairSample, seed: int = 0) -> Tensors:
    """Every tensor of the sample that can have a gradient, float64."""
    t = {name: v for name, v in leaves_of_edges(s, seed).items() if not name.startswith(_UNUSED)}
    if not s.reduce:
        t = {name: v for name, v in t.items() if not name.startswith("message.")}
    if not (s.reduce or (s.head and s.head_nodes)):
        del t["x"]
    g = torch.Generator().manual_seed(seed + 1)
    n = sum(net.copies * (net.num_nodes + s.token) for net in s.networks)

    def put(name: str, *shape: int) -> None:
        t[name] = s.scale * torch.randn(*shape, generator=g, dtype=torch.float64)

    if "x" in t:
        put("x", n, s.node_width)
    width = s.width if s.layers else s.first_width
    for k, residual in enumerate(s.residual):
        new = width if residual else s.width
        shapes = {
            "in.weight": (s.hidden, width),
            "reverse": (s.hidden, width),
            "out.weight": (new, s.hidden),
            "norm.weight": (new,),
            "norm.bias": (new,),
        }
        shapes |= {"dst": (s.hidden, s.node_width), "src": (s.hidden, s.node_width), "in.bias": (s.hidden,), "out.bias": (new,)}
        left_out = {"reverse": s.reverse, "norm.weight": s.norm, "norm.bias": s.norm, "dst": s.nodes, "src": s.nodes}
        for name, shape in shapes.items():
            if left_out.get(name, s.residual)[k] or name not in left_out and (s.bias or not name.endswith(".bias")):
                put(f"update{k}.{name}", *shape)
        if s.nodes[k]:
            put(f"x{k}", n, s.node_width)
        width = new
    if s.over is None:
        return t
    shapes = {"q": (n, s.dk), "k": (n, s.dk), "v": (n, s.dv), "weight_q": (s.dk, width), "weight_k": (s.dk, width)}
    shapes |= {"weight_add": (s.dv, width)} if s.add else {}
    shapes |= {"weight_mul": (s.dv, width)} if s.multiply else {}
    for name, shape in shapes.items():  # q, k, v: the heads' columns side by side; matrices: their rows one below the other
        put(f"attend.{name}", *((shape[0], s.heads * shape[1]) if name in "qkv" else (s.heads * shape[0], shape[1])))
    return t


def update_of(t: Tensors, k: int) -> tuple:
    """(x, weight_edge, weight_reverse, weight_dst, weight_src, bias, weight_out, bias_out) of update k."""
    names = ("in.weight", "reverse", "dst", "src", "in.bias", "out.weight", "out.bias")
    return (t.get(f"x{k}"), *(t.get(f"update{k}.{name}") for name in names))


# ---- the engine ----
def pair_graph(s: PairSample) -> ngk.NeuralGraph:
    graph = graph_of(s)
    return graph.with_token() if s.token else graph


def pair_state(s: PairSample, t: Tensors, graph: ngk.NeuralGraph | None = None) -> ngk.EdgeState:
    e = edge_state(s.encoded_alone, t, pair_graph(s) if graph is None else graph)
    if s.closed:
        e = e.closure("edges")
    for k, residual in enumerate(s.residual):
        x, weight_edge, reverse, dst, src, bias, out, bias_out = update_of(t, k)
        norm = ngk.Norm(t[f"update{k}.norm.weight"], t[f"update{k}.norm.bias"]) if s.norm[k] else None
        e = e.update(x, weight_edge, dst, src, bias, out, bias_out, s.activation, residual, reverse, norm)
        e = remember(e, s.memory[k] if k < len(s.memory) else None)
    return e if s.restrict is None else e.restrict(s.restrict)


def attend(s: PairSample, t: Tensors, e: ngk.EdgeState, **options) -> torch.Tensor:
    names = ("q", "k", "v", "weight_q", "weight_k", "weight_add", "weight_mul")
    options = {"dropout": s.dropout, **options}
    return ngk.attend(e, *(t.get(f"attend.{n}") for n in names), s.heads, s.attention_scale, s.over, include_self=s.include_self, **options)


def engine(s: PairSample, t: Tensors, graph: ngk.NeuralGraph | None = None) -> list[torch.Tensor]:
    """Attention, then messages, then readouts of the edges by block."""
    e = pair_state(s, t, graph)
    out = [attend(s, t, e)] if s.over else []
    out += [ngk.aggregate(e, message_of(s, t), s.reduce)] if s.reduce else []
    if s.head:
        nodes = (t["x"], t["head.dst"], t["head.src"]) if s.head_nodes else ()
        out += ngk.readout(e, pairs(t, "head", s.head), *nodes, activation=s.activation)
    return out


# ---- the dense formulas ----
def dense_state(s: PairSample, t: Tensors, low: bool = False) -> tuple[dense.Pairs, torch.Tensor]:
    """(pairs, e [N, N, d])."""
    p = dense.list_pairs(s.networks, weights_of(t), s.scales, s.reciprocal, s.token)
    e = p.raw
    if s.encoder == "fourier":
        e = plain.fourier(e.flatten(0, 1), frequencies(s, e.dtype)).unflatten(0, e.shape[:2])
    if s.encoder != "identity":
        e = plain.linear(e, t["encoder.weight"], t["encoder.bias"], low)
    for w, b in pairs(t, "then", s.layers):
        e = plain.linear(plain.ACTIVATIONS[s.activation](e), w, b, low)
    e = dense.mask_token(e, p)
    for k, residual in enumerate(s.residual):
        x, weight_edge, reverse, dst, src, bias, out, bias_out = update_of(t, k)
        e = dense.update(e, x, weight_edge, reverse, dst, src, bias, out, bias_out, s.activation, residual, low)
        if s.norm[k]:
            e = dense.norm(e, t[f"update{k}.norm.weight"], t[f"update{k}.norm.bias"], 1e-5)
        for stored in (s.memory[k] or "").split("+") if k < len(s.memory) else ():
            e = e.to(getattr(torch, stored)).to(e.dtype) if stored not in ("", "virtual", "same") else e
    return p, e


def oracle(s: PairSample, t: Tensors, low: bool = False) -> list[torch.Tensor]:
    p, e = dense_state(s, t, low)
    out = []
    if s.over:
        a = {name.removeprefix("attend."): v for name, v in t.items() if name.startswith("attend.")}
        scale = s.dk**-0.5 if s.attention_scale is None else s.attention_scale
        read = dense.readers(p, s.over, s.include_self)
        rows = dense.attend(
            e,
            a["q"],
            a["k"],
            a["v"],
            a["weight_q"],
            a["weight_k"],
            a.get("weight_add"),
            a.get("weight_mul"),
            s.heads,
            scale,
            read,
            None,
            low,
        )
        out.append(dense.rows_of(p, rows, s.restrict))
    edges = dense.of_edges(p, e)
    if s.reduce:
        m = plain.message(
            s.kind, edges, t["x"], p.edges, t["message.edge.weight"], t.get("message.edge.bias"), t["message.dst"], t["message.src"],
            t.get("message.bias"), pairs(t, "message.mlp", s.mlp), s.activation, low,
        )  # fmt: skip
        out.append(dense.rows_of(p, plain.aggregate(m, p.edges.dst, p.edges.num_nodes, s.reduce), s.restrict))
    if s.head:
        out += plain.by_block(head(s, t, edges, p.edges, low), p.edges, s.packed, s.restrict, p.networks)
    return out


# ---- outputs and gradients ----
def run_engine(s: PairSample, t: Tensors, backend: str, wanted: set[str] | None = None, autocast: torch.dtype | None = None) -> Tensors:
    """On the backend's device. With `autocast`, the forward alone runs under it, as PyTorch asks."""
    device = device_of(backend)

    def forward(live: Tensors) -> list[torch.Tensor]:
        with torch.autocast(device, autocast, enabled=autocast is not None):
            return [o.cpu() for o in engine(s, {name: v.to(device) for name, v in live.items()})]

    with ngk.use_backend(backend):
        return run(forward, t, wanted)


def run_oracle(s: PairSample, t: Tensors, low: bool = False) -> Tensors:
    return run(lambda live: oracle(s, live, low), t)


@lru_cache
def float64_oracle(s: PairSample) -> Tensors:
    return run_oracle(s, leaves(s))


@lru_cache
def float32_oracle(s: PairSample) -> tuple[Tensors, Tensors]:
    """Of the leaves rounded to float32: the truth in float64, and what plain PyTorch makes of it in float32."""
    t = cast(leaves(s), torch.float32)
    return run_oracle(s, cast(t, torch.float64)), run_oracle(s, t)

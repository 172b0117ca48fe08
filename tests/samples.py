"""Sample expressions: one description, run by the engine and by the oracle on the same leaves.

A `Sample` names the networks, the encoder, the updates, the message and the policy; `leaves` makes its tensors in float64;
`engine` and `oracle` give the same list of outputs: reductions of messages, then readouts by block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

import oracle as plain
import torch
from oracle import Network, mlp

import ngkernels as ngk
from ngkernels import encoders

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Sample:
    name: str
    networks: tuple[Network, ...] = (mlp(2, 5, 3, copies=2),)
    channels: int = 1
    width: int = 5  # D
    hidden: int = 7  # H
    features: int = 4  # F
    node_width: int = 6
    encoder: str = "linear"
    reciprocal: bool = False
    frequencies: int = 3
    table: str = "never"  # or "auto"
    table_range: float | None = None
    step: int | None = None
    layers: int = 0  # of the encoder after its first
    residual: tuple[bool, ...] = (False, True)  # one entry an update
    activation: str = "silu"
    kind: str = "film"
    mlp: int = 0  # layers of the message after its first
    reduce: tuple[str, ...] = ("mean", "min", "max", "std")
    head: int = 2  # layers of the readout; 0: no readout
    head_nodes: bool = True
    memory: tuple[str | None, ...] = (None, None)  # after each update: None, "virtual", a dtype's name, or several with +
    restrict: int | None = None
    affine: bool = False
    packed: bool = False
    bias: bool = True
    scale: float = 0.5

    def but(self, name: str, **changes) -> Sample:
        return replace(self, name=name, **changes)

    @property
    def message_width(self) -> int:
        return {"film": 2 * self.features}.get(self.kind, self.features)

    @property
    def encoded(self) -> int:
        """Inputs of the encoder."""
        return self.channels * (3 if self.reciprocal else 1)

    @property
    def first_width(self) -> int:
        return self.encoded if self.encoder == "identity" else self.width

    @property
    def scales(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        count = sum(len(n.blocks) for n in self.networks)
        return (tuple(1.5 - 0.25 * k for k in range(count)), tuple(0.125 * k - 0.25 for k in range(count))) if self.affine else None


def leaves(s: Sample, seed: int = 0) -> Tensors:
    """Every tensor of the sample that can have a gradient, float64."""
    g = torch.Generator().manual_seed(seed)
    t: Tensors = {}

    def put(name: str, *shape: int) -> None:
        t[name] = s.scale * torch.randn(*shape, generator=g, dtype=torch.float64)

    def linear(name: str, n_out: int, n_in: int) -> None:
        put(f"{name}.weight", n_out, n_in)
        if s.bias:
            put(f"{name}.bias", n_out)

    number = 0
    for net in s.networks:
        for block in net.blocks:
            put(f"weights.{number}", net.copies, *net.shape(block), s.channels)
            number += 1
    nodes = sum(n.copies * n.num_nodes for n in s.networks)
    if s.encoder != "identity":
        inputs = 2 * s.frequencies if s.encoder == "fourier" else s.encoded
        put("encoder.weight", s.width, inputs)
        put("encoder.bias", s.width)
    width = s.first_width
    for k in range(s.layers):
        linear(f"then{k}", s.width, width)
        width = s.width
    for k, residual in enumerate(s.residual):
        put(f"x{k}", nodes, s.node_width)
        linear(f"update{k}.in", s.hidden, width)
        put(f"update{k}.dst", s.hidden, s.node_width)
        put(f"update{k}.src", s.hidden, s.node_width)
        width = width if residual else s.width
        linear(f"update{k}.out", width, s.hidden)
    put("x", nodes, s.node_width)
    linear("message.edge", s.message_width, width)
    put("message.dst", s.features, s.node_width)
    put("message.src", s.features, s.node_width)
    if s.bias:
        put("message.bias", s.features)
    for k in range(s.mlp):
        linear(f"message.mlp{k}", s.features, s.features)
    for k in range(s.head):
        linear(f"head{k}", s.hidden if k + 1 < s.head else 2, s.hidden if k else width)
    if s.head and s.head_nodes:
        put("head.dst", t["head0.weight"].shape[0], s.node_width)
        put("head.src", t["head0.weight"].shape[0], s.node_width)
    return t


_FREQUENCIES: dict[tuple, torch.Tensor] = {}


def frequencies(s: Sample, dtype: torch.dtype) -> torch.Tensor:
    """The same tensor each time, so that torch.compile sees a constant."""
    key = (s.frequencies, s.encoded, dtype)
    if key not in _FREQUENCIES:
        g = torch.Generator().manual_seed(7)
        _FREQUENCIES[key] = torch.randn(s.frequencies, s.encoded, generator=g, dtype=torch.float64).to(dtype)
    return _FREQUENCIES[key]


def weights_of(t: Tensors) -> list[torch.Tensor]:
    return [t[f"weights.{k}"] for k in range(sum(name.startswith("weights.") for name in t))]


def pairs(t: Tensors, prefix: str, count: int) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    return [(t[f"{prefix}{k}.weight"], t.get(f"{prefix}{k}.bias")) for k in range(count)]


# ---- the engine ----
def graph_of(s: Sample) -> ngk.NeuralGraph:
    graphs = []
    for net in s.networks:
        blocks = [ngk.Block(kind, src, dst, k) for k, (kind, src, dst) in enumerate(net.blocks)]
        graphs.append(ngk.NeuralGraph.from_blocks(net.layers, blocks, net.copies, net.reverse))
    return graphs[0] if len(graphs) == 1 and not s.packed else ngk.NeuralGraph.batch(graphs, packed=s.packed)


def remember(e: ngk.EdgeState, policy: str | None) -> ngk.EdgeState:
    for one in policy.split("+") if policy else ():
        if one == "same":
            e = e.checkpoint(torch.float64 if e.weights[0].dtype == torch.float64 else torch.float32)
        else:
            e = e.checkpoint(None if one == "virtual" else getattr(torch, one))
    return e


def edge_state(s: Sample, t: Tensors, graph: ngk.NeuralGraph | None = None) -> ngk.EdgeState:
    graph = graph_of(s) if graph is None else graph
    weights = graph.pack(weights_of(t)) if s.packed else weights_of(t)
    if s.encoder == "identity":
        encoder = encoders.Identity(s.reciprocal)
    elif s.encoder == "linear":
        encoder = encoders.Linear(t["encoder.weight"], t["encoder.bias"], s.reciprocal)
    else:
        encoder = encoders.Fourier(frequencies(s, t["encoder.weight"].dtype), t["encoder.weight"], t["encoder.bias"], s.reciprocal, s.table_range, s.table, s.step)
    e = ngk.EdgeState(graph, weights, encoder, s.scales)
    for w, b in pairs(t, "then", s.layers):
        e = e.then(s.activation, w, b)
    for k, residual in enumerate(s.residual):
        u = f"update{k}"
        e = e.update(t[f"x{k}"], t[f"{u}.in.weight"], t[f"{u}.dst"], t[f"{u}.src"], t.get(f"{u}.in.bias"), t[f"{u}.out.weight"], t.get(f"{u}.out.bias"), s.activation, residual)
        e = remember(e, s.memory[k] if k < len(s.memory) else None)
    return e if s.restrict is None else e.restrict(s.restrict)


def message_of(s: Sample, t: Tensors) -> ngk.Message:
    make = getattr(ngk.Message, s.kind)
    more = pairs(t, "message.mlp", s.mlp)
    return make(t["x"], t["message.edge.weight"], t.get("message.edge.bias"), t["message.dst"], t["message.src"], t.get("message.bias"), more, s.activation)


def engine(s: Sample, t: Tensors, graph: ngk.NeuralGraph | None = None) -> list[torch.Tensor]:
    e = edge_state(s, t, graph)
    out = [ngk.aggregate(e, message_of(s, t), s.reduce)] if s.reduce else []
    if s.head:
        nodes = (t["x"], t["head.dst"], t["head.src"]) if s.head_nodes else ()
        out += ngk.readout(e, pairs(t, "head", s.head), *nodes, activation=s.activation)
    return out


# ---- the oracle ----
def oracle(s: Sample, t: Tensors, low: bool = False) -> list[torch.Tensor]:
    edges = plain.list_edges(s.networks, weights_of(t), s.scales)
    e = plain.reciprocal(edges) if s.reciprocal else edges.raw
    if s.encoder == "fourier":
        e = plain.fourier(e, frequencies(s, e.dtype))
    if s.encoder != "identity":
        e = plain.linear(e, t["encoder.weight"], t["encoder.bias"], low)
    for w, b in pairs(t, "then", s.layers):
        e = plain.linear(plain.ACTIVATIONS[s.activation](e), w, b, low)
    for k, residual in enumerate(s.residual):
        u = f"update{k}"
        e = plain.update(
            e, t[f"x{k}"], edges, t[f"{u}.in.weight"], t[f"{u}.dst"], t[f"{u}.src"], t.get(f"{u}.in.bias"),
            t[f"{u}.out.weight"], t.get(f"{u}.out.bias"), s.activation, residual, low,
        )  # fmt: skip
        for stored in (s.memory[k] or "").split("+") if k < len(s.memory) else ():
            e = e.to(getattr(torch, stored)).to(e.dtype) if stored not in ("", "virtual", "same") else e
    out = []
    if s.reduce:
        more = pairs(t, "message.mlp", s.mlp)
        m = plain.message(
            s.kind, e, t["x"], edges, t["message.edge.weight"], t.get("message.edge.bias"), t["message.dst"], t["message.src"],
            t.get("message.bias"), more, s.activation, low,
        )  # fmt: skip
        rows = plain.aggregate(m, edges.dst, edges.num_nodes, s.reduce)
        out.append(rows if s.restrict is None else rows[plain.node_rows(s.networks, s.restrict)])
    if s.head:
        out += plain.by_block(head(s, t, e, edges, low), edges, s.packed, s.restrict, s.networks)
    return out


def head(s: Sample, t: Tensors, e: torch.Tensor, edges: plain.Edges, low: bool) -> torch.Tensor:
    """The readout's MLP of [e_ij | x_i | x_j]."""
    first, *rest = pairs(t, "head", s.head)
    weight = first[0]
    if s.head_nodes:
        e = torch.cat([e, t["x"][edges.dst], t["x"][edges.src]], 1)
        weight = torch.cat([weight, t["head.dst"], t["head.src"]], 1)
    e = plain.linear(e, weight, first[1], low)
    for w, b in rest:
        e = plain.linear(plain.ACTIVATIONS[s.activation](e), w, b, low)
    return e


# ---- outputs and gradients ----
def coefficients(outputs: list[torch.Tensor], seed: int = 1) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(o.shape, generator=g, dtype=torch.float64).to(o.dtype) for o in outputs]


def cast(t: Tensors, dtype: torch.dtype, weight_dtype: torch.dtype | None = None) -> Tensors:
    return {name: v.to(weight_dtype if weight_dtype and name.startswith("weights.") else dtype) for name, v in t.items()}


def run(f: Callable[[Tensors], list[torch.Tensor]], t: Tensors, wanted: set[str] | None = None) -> Tensors:
    """Outputs "out.k" and gradients "grad.<leaf>" of sum(coefficient * output); zeros where there is no path."""
    live = {name: v.detach().clone().requires_grad_(wanted is None or name in wanted) for name, v in t.items()}
    outputs = f(live)
    names = [name for name, v in live.items() if v.requires_grad]
    found: list[torch.Tensor | None] = [None] * len(names)
    if any(o.requires_grad for o in outputs):
        total = sum((o * c).sum() for o, c in zip(outputs, coefficients(outputs), strict=True))
        found = list(torch.autograd.grad(total, [live[n] for n in names], allow_unused=True))
    result = {f"out.{k}": o.detach() for k, o in enumerate(outputs)}
    for n, g in zip(names, found, strict=True):
        result[f"grad.{n}"] = torch.zeros_like(live[n]) if g is None else g.detach()
    return result


def run_engine(s: Sample, t: Tensors, backend: str, wanted: set[str] | None = None, autocast: torch.dtype | None = None) -> Tensors:
    """With `autocast`, the forward alone runs under it, as PyTorch asks."""

    def forward(live: Tensors) -> list[torch.Tensor]:
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            return engine(s, live)

    with ngk.use_backend(backend):
        return run(forward, t, wanted)


def run_oracle(s: Sample, t: Tensors, low: bool = False) -> Tensors:
    return run(lambda live: oracle(s, live, low), t)


@lru_cache
def float64_oracle(s: Sample) -> Tensors:
    return run_oracle(s, leaves(s))


@lru_cache
def float32_oracle(s: Sample) -> tuple[Tensors, Tensors]:
    """Of the leaves rounded to float32: the truth in float64, and what plain PyTorch makes of it in float32."""
    t = cast(leaves(s), torch.float32)
    return run_oracle(s, cast(t, torch.float64)), run_oracle(s, t)


def named(samples: Iterable[Sample]) -> dict:
    """Arguments of pytest.mark.parametrize."""
    samples = tuple(samples)
    return {"argvalues": samples, "ids": [s.name for s in samples]}

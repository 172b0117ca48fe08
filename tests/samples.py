"""Sample expressions, run by the engine and by the oracle on the same leaves.

`engine` and `oracle` give the same list of outputs: reductions of messages, then readouts by block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache

import oracle as plain
import torch
from sample import Sample, Tensors, frequencies, leaves, pairs, weights_of

import ngkernels as ngk
from ngkernels import encoders


# ---- the engine ----
def block_of(weight: int, kind: str, src: int, dst: int, edges: tuple[tuple[int, int], ...] | None = None) -> ngk.Block:
    if kind != "sparse":
        return ngk.Block(kind, src, dst, weight)
    return ngk.Block.sparse(src, dst, weight, torch.tensor(edges, dtype=torch.int64).reshape(-1, 2).T)


def graph_of(s: Sample) -> ngk.NeuralGraph:
    graphs = []
    for net in s.networks:
        blocks = [block_of(k, *block) for k, block in enumerate(net.blocks)]
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
        encoder = encoders.Fourier(
            frequencies(s, t["encoder.weight"].dtype).to(t["encoder.weight"].device),
            t["encoder.weight"],
            t["encoder.bias"],
            s.reciprocal,
            s.table_range,
            s.table.replace("shared", "auto"),
            s.step,
        )
    e = ngk.EdgeState(graph, weights, encoder, s.scales)
    e = e.tabulate() if s.table == "shared" else e
    for w, b in pairs(t, "then", s.layers):
        e = e.then(s.activation, w, b)
    for k, residual in enumerate(s.residual):
        u = f"update{k}"
        e = e.update(
            t[f"x{k}"],
            t[f"{u}.in.weight"],
            t[f"{u}.dst"],
            t[f"{u}.src"],
            t.get(f"{u}.in.bias"),
            t[f"{u}.out.weight"],
            t.get(f"{u}.out.bias"),
            s.activation,
            residual,
        )
        e = remember(e, s.memory[k] if k < len(s.memory) else None)
    return e if s.restrict is None else e.restrict(s.restrict)


def message_of(s: Sample, t: Tensors) -> ngk.Message:
    make = getattr(ngk.Message, s.kind)
    more = pairs(t, "message.mlp", s.mlp)
    return make(
        t["x"],
        t["message.edge.weight"],
        t.get("message.edge.bias"),
        t["message.dst"],
        t["message.src"],
        t.get("message.bias"),
        more,
        s.activation,
    )


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


def device_of(backend: str) -> str:
    return "cuda" if backend in ("triton", "cuda") and torch.cuda.is_available() else "cpu"


def engine_on(backend: str, s: Sample, t: Tensors, autocast: torch.dtype | None = None) -> list[torch.Tensor]:
    """`engine` on the backend's device, there and back."""
    device = device_of(backend)
    with ngk.use_backend(backend), torch.autocast(device, autocast, enabled=autocast is not None):
        return [o.cpu() for o in engine(s, {name: v.to(device) for name, v in t.items()})]


def run_engine(s: Sample, t: Tensors, backend: str, wanted: set[str] | None = None, autocast: torch.dtype | None = None) -> Tensors:
    """With `autocast`, the forward alone runs under it, as PyTorch asks."""
    return run(lambda live: engine_on(backend, s, live, autocast), t, wanted)


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

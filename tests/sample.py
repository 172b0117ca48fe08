"""What a sample expression is: its description, and the tensors that go into it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from oracle import Network, mlp

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Sample:
    """Networks, encoder, updates, message, readout and edge-memory policy of one expression."""

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
    table: str = "never"  # or "auto", or "shared": made once for the readout and the reductions
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

"""Encoders of raw weights and biases as modules."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from .. import encoders
from ..blocks import DIAGONAL, Block
from ..edges import EdgeState
from ..graph import NeuralGraph
from ..ops.readout import readout

FEW = 512  # values that are encoded one by one: below that, a table costs more than it saves
_diagonal_graphs: dict[int, NeuralGraph] = {}


def diagonal_graph(n: int) -> NeuralGraph:
    """n neurons, each joined to one of its own: values [n, C] are its weights. Kept, also for torch.compile."""
    return _diagonal_graphs[n] if n in _diagonal_graphs else _new_diagonal_graph(n)


@torch.compiler.disable
def _new_diagonal_graph(n: int) -> NeuralGraph:
    if len(_diagonal_graphs) >= 64:
        _diagonal_graphs.pop(next(iter(_diagonal_graphs)))
    _diagonal_graphs[n] = NeuralGraph.from_blocks((n, n), [Block(DIAGONAL, 0, 1, 0)])
    return _diagonal_graphs[n]


class GaussianEncoding(nn.Module):
    """gamma(v) = [cos(2 pi v b^T), sin(2 pi v b^T)] with frozen frequencies b [features, channels] ~ N(0, sigma^2).

    Reference: Tancik et al., NeurIPS 2020.
    """

    def __init__(self, channels: int, features: int = 128, sigma: float = 3.0):
        super().__init__()
        self.b = nn.Parameter(torch.randn(features, channels) * sigma, requires_grad=False)
        self._step = self._measured()
        self.register_load_state_dict_post_hook(GaussianEncoding._loaded)

    @staticmethod
    def _loaded(module: GaussianEncoding, _incompatible) -> None:
        module.step  # noqa: B018  read now: compiled code cannot

    def _measured(self) -> tuple[nn.Parameter, int, int]:
        return self.b, self.b._version, encoders.table_step(self.b)

    @property
    def step(self) -> int:
        """Grid step of the tabulated encoder (encoders.Fourier): read from the frequencies once for each change of them."""
        if not torch.compiler.is_compiling() and not self.b.is_meta and (self._step[0] is not self.b or self._step[1] != self.b._version):
            self._step = self._measured()
        return self._step[2]

    def forward(self, v: torch.Tensor) -> torch.Tensor:
        """gamma(v), [..., 2 features], of v [..., channels]: plain PyTorch, for values that are few."""
        phase = F.linear(2 * math.pi * v, self.b)
        return torch.cat([phase.cos(), phase.sin()], -1)


class Encoder(nn.Sequential):
    """Raw features to hidden states: [Gaussian Fourier features,] Linear, then (layers - 1) times SiLU, Linear.

    Args:
        channels: C, raw features; three times as many enter when `reciprocal` (see encoders.expansion).
        width: D, of the hidden state.
        kind: "fourier" or "linear".
        features, sigma: number and standard deviation of the frequencies.
        layers: number of Linears.
        reciprocal: for graphs with reversed edges: an edge reads [e, e_reversed, e + e_reversed].

    Raises:
        ValueError: an unknown kind, fewer than one layer.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        kind: str = "fourier",
        features: int = 128,
        sigma: float = 3.0,
        layers: int = 1,
        reciprocal: bool = False,
    ):
        if kind not in ("fourier", "linear"):
            raise ValueError(f"Encoder: expected kind fourier or linear, got {kind!r}")
        if layers < 1:
            raise ValueError(f"Encoder: expected at least 1 layer, got {layers}")
        inputs = 3 * channels if reciprocal else channels
        first = (
            [GaussianEncoding(inputs, features, sigma), nn.Linear(2 * features, width)] if kind == "fourier" else [nn.Linear(inputs, width)]
        )
        more = [m for _ in range(layers - 1) for m in (nn.SiLU(), nn.Linear(width, width))]
        super().__init__(*first, *more)
        self.kind, self.channels, self.reciprocal = kind, channels, reciprocal

    def edges(self, graph: NeuralGraph, weights, out: nn.Linear | None = None, affine=None) -> EdgeState:
        """The state out(encoder(scale w + shift)) of every edge of `graph`: an expression; its table is all that is computed.

        Args:
            weights: as for EdgeState. out: a last linear map, folded in. affine: (scale, shift) as for EdgeState.
        """
        maps = self._maps()
        if out is not None:
            w, b = maps[-1]
            maps[-1] = (out.weight @ w, torch.addmv(out.bias, out.weight, b))
        return self._layers(EdgeState(graph, weights, self._first(*maps[0]), affine).tabulate(), maps)

    def _maps(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(m.weight, m.bias) for m in self if isinstance(m, nn.Linear)]

    def _first(self, weight: torch.Tensor, bias: torch.Tensor, table: str = "auto") -> encoders.Fourier | encoders.Linear:
        if self.kind == "linear":
            return encoders.Linear(weight, bias, reciprocal=self.reciprocal)
        return encoders.Fourier(self[0].b, weight, bias, reciprocal=self.reciprocal, table=table, step=self[0].step)

    @staticmethod
    def _layers(state: EdgeState, maps) -> EdgeState:
        for weight, bias in maps[1:]:
            state = state.then("silu", weight, bias)
        return state

    def values(self, v: torch.Tensor, out: nn.Linear) -> torch.Tensor:
        """out(encoder(v)), [n, width], of values v [n, C]: biases, say. No Fourier feature is kept for backward."""
        maps, n = self._maps(), v.shape[0]
        state = EdgeState(diagonal_graph(n), (v[None],), self._first(*maps[0], table="never" if n < FEW else "auto"))
        return readout(self._layers(state, maps), [(out.weight, out.bias)])[0][0]

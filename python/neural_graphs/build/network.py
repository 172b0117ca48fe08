"""What builders return: a neural graph, its weights and its biases."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ngkernels import NeuralGraph


@dataclass(frozen=True)
class Channels:
    """Weights of a block whose edges carry several numbers, each number in a tensor of its own.

    Args:
        planes: a tensor (n_src, ...) for each number; what follows the first axis flattens to n_dst.
    """

    planes: tuple[torch.Tensor, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """(1, n_src, n_dst, C), the shape of `stacked`."""
        return 1, self.planes[0].shape[0], math.prod(self.planes[0].shape[1:]), len(self.planes)

    @property
    def dtype(self) -> torch.dtype:
        return self.planes[0].dtype

    def stacked(self) -> torch.Tensor:
        """One tensor (1, n_src, n_dst, C): a copy."""
        return torch.stack([plane.flatten(1) for plane in self.planes], -1)[None]


@dataclass(frozen=True)
class Origin:
    """Where a network comes from: names for people.

    Args:
        architecture: "mlp" or "llama". layers: a name for each node layer.
        blocks: a name for each block. tensors: for each block the names of the tensors whose values it has.
        biases: for each node layer the name of its bias, or "". ignored: names of tensors that are no weights.
        not_modelled: what the network does that the graph does not show.
    """

    architecture: str
    layers: tuple[str, ...]
    blocks: tuple[str, ...]
    tensors: tuple[tuple[str, ...], ...]
    biases: tuple[str, ...]
    ignored: tuple[str, ...] = ()
    not_modelled: tuple[str, ...] = ()


class _Triple(NamedTuple):
    graph: NeuralGraph
    weights: list[torch.Tensor | Channels]  # (1, in, out, 1) views of the parameters; diagonal blocks (1, n, 1)
    biases: list[torch.Tensor]  # (1, out, 1)


class Network(_Triple):
    """(graph, weights, biases) of one network; `activations` holds a name for each hidden layer, `origin` names of parts."""

    activations: tuple[str, ...]
    origin: Origin | None

    def __new__(cls, graph, weights, biases, activations=(), origin=None):
        self = super().__new__(cls, graph, weights, biases)
        self.activations = tuple(activations)
        self.origin = origin
        return self

    @property
    def layout(self) -> tuple[int, ...]:
        """Widths of the node layers, inputs first."""
        return self.graph.parts[0].layers

    @property
    def channels(self) -> int:
        """The largest number of numbers on one edge."""
        return max((w.shape[-1] for w in self.weights), default=1)

    def tensors(self) -> list[torch.Tensor]:
        """The weights as ngkernels.EdgeState takes them, all with `channels` numbers.

        Weights that have as many are the views that they are. Others are copied: `Channels` stacked, single numbers
        followed by zeros.
        """
        whole = [w.stacked() if isinstance(w, Channels) else w for w in self.weights]
        return [w if w.shape[-1] == self.channels else F.pad(w, (0, self.channels - w.shape[-1])) for w in whole]


def from_layers(
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    activations: Sequence[str] = (),
    reverse: bool = False,
    op: str = "from_layers",
    names: Sequence[str] = (),
) -> Network:
    """The neural graph of an MLP from its matrices.

    Args:
        weights: (out, in) each, as in torch.nn.Linear. biases: (out,) each, or None for zeros.
        activations: names of the hidden layers' activations, kept with the result.
        reverse: add the reversed edges. op: named in errors.
        names: of the layers, kept with the result; numbers by default.

    Returns:
        Network: weights (1, in, out, 1), transposed views without a copy; biases (1, out, 1).

    Raises:
        ValueError: no layers, shapes that do not follow one another. TypeError: weights that are no floating numbers.
    """
    if not weights or len(weights) != len(biases):
        raise ValueError(f"{op}: expected at least one weight and as many biases, got {len(weights)} and {len(biases)}")
    for k, (w, b) in enumerate(zip(weights, biases, strict=True)):
        if not w.is_floating_point():
            raise TypeError(f"{op}: expected weight {k} of a floating dtype, got {w.dtype}; convert it first")
        if w.dim() != 2 or (k and w.shape[1] != weights[k - 1].shape[0]):
            before = f"(out, {weights[k - 1].shape[0]})" if k else "(out, in)"
            raise ValueError(f"{op}: expected weight {k} of shape {before}, got {tuple(w.shape)}")
        if b is not None and tuple(b.shape) != (w.shape[0],):
            raise ValueError(f"{op}: expected bias {k} of shape ({w.shape[0]},), got {tuple(b.shape)}")
    layout = [weights[0].shape[1], *(w.shape[0] for w in weights)]
    given = [w.new_zeros(w.shape[0]) if b is None else b for w, b in zip(weights, biases, strict=True)]
    graph = NeuralGraph.mlp(layout, reverse=reverse)
    names = [str(k) for k in range(len(weights))] if not names else list(names)
    origin = Origin(
        "mlp", ("input", *names), tuple(names), tuple((f"{n}.weight",) for n in names),
        ("", *("" if b is None else f"{n}.bias" for n, b in zip(names, biases, strict=True))),
    )  # fmt: skip
    return Network(graph, [w.T[None, :, :, None] for w in weights], [b[None, :, None] for b in given], activations, origin)

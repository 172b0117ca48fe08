"""The maps of DWS layers: from one weight or bias of a network to another, commuting with permutations of hidden neurons."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

REDUCTIONS, SET_LAYERS = ("max", "mean", "sum"), ("sab", "ds")


def reduce(x: torch.Tensor, dim: int, how: str, keepdim: bool = False) -> torch.Tensor:
    """Max, mean or sum over one axis; the maximum's gradient goes to one of equal entries."""
    if how == "max":
        return x.max(dim, keepdim).values
    return x.mean(dim, keepdim) if how == "mean" else x.sum(dim, keepdim)


def mlp(inputs: int, outputs: int, layers: int, bias: bool = True) -> nn.Sequential:
    """`layers` Linears with ReLU between them, all but the first outputs x outputs."""
    parts: list[nn.Module] = [nn.Linear(inputs, outputs, bias)]
    for _ in range(layers - 1):
        parts += [nn.ReLU(), nn.Linear(outputs, outputs, bias)]
    return nn.Sequential(*parts)


class SetAttention(nn.Module):
    """O = Q + softmax(Q K^T / sqrt(outputs)) V by heads; O + relu(fc_o O). Q, K, V: linear maps of the set.

    The whole width stands under the root, as in the published code. The n x n scores of each head are kept for backward.

    Reference: Lee et al., "Set Transformer", ICML 2019 (SAB, without norms).
    """

    def __init__(self, inputs: int, outputs: int, heads: int):
        super().__init__()
        if outputs % heads:
            raise ValueError(f"DWS: expected widths that num_heads divides, got {outputs} channels and {heads} heads; change hidden_dim")
        self.heads, self.scale = heads, 1 / math.sqrt(outputs)
        self.mab = nn.ModuleDict({f"fc_{name}": nn.Linear(outputs if name == "o" else inputs, outputs) for name in "qkvo"})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, n, inputs] to [B, n, outputs]."""
        q, k, v = (torch.cat(self.mab[f"fc_{name}"](x).chunk(self.heads, -1)) for name in "qkv")  # [heads B, n, outputs / heads]
        attention = torch.softmax(q @ k.mT * self.scale, -1)
        out = torch.cat((q + attention @ v).chunk(self.heads), -1)
        return out + torch.relu(self.mab["fc_o"](out))


class DeepSet(nn.Module):
    """Gamma(x) - Lambda(reduction of the set).

    Reference: Zaheer et al., "Deep Sets", NeurIPS 2017.
    """

    def __init__(self, inputs: int, outputs: int, layers: int, reduction: str):
        super().__init__()
        self.reduction = reduction
        self.Gamma = mlp(inputs, outputs, layers)
        self.Lambda = mlp(inputs, outputs, layers, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, n, inputs] to [B, n, outputs]."""
        return self.Gamma(x) - self.Lambda(reduce(x, 1, self.reduction, keepdim=True))


@dataclass(frozen=True)
class MapOptions:
    """What all maps of a layer share. `layers`: Linears of an MLP."""

    reduction: str = "max"
    set_layer: str = "sab"
    heads: int = 8
    layers: int = 1

    def over_set(self, inputs: int, outputs: int) -> nn.Module:
        if self.set_layer == "sab":
            inner: nn.Module = SetAttention(inputs, outputs, self.heads)
        else:
            inner = DeepSet(inputs, outputs, self.layers, self.reduction)
        return nn.Sequential(OrderedDict(set_layer=inner))


class SameWeightMap(nn.Module):
    """A weight between hidden layers to itself: the mean of Linears of the entry, its row's, its column's and all entries' reduction."""

    def __init__(self, inputs: int, outputs: int, options: MapOptions):
        super().__init__()
        self.reduction = options.reduction
        self.lin_all, self.lin_n, self.lin_m, self.lin_both = (mlp(inputs, outputs, options.layers) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, n, m, inputs] to [B, n, m, outputs]."""
        over_rows, over_columns = (reduce(x, dim, self.reduction, keepdim=True) for dim in (1, 2))
        over_all = reduce(x.flatten(1, 2), 1, self.reduction)[:, None, None]
        return (self.lin_all(x) + self.lin_n(over_rows) + self.lin_m(over_columns) + self.lin_both(over_all)) / 4


class NeighbourMap(nn.Module):
    """Any weight or bias to any other, through the node layer that both touch, if they do.

    Axes of a tensor are numbers of node layers: weight l has (l, l + 1), bias l has (l + 1,). Input and output
    neurons are not permuted, so they count as channels. The hidden axis that source and target share stays, with a
    layer for sets over it; the source's other hidden axes are reduced, the target's broadcast.

    Args:
        source, target: their axes. layout: widths of the node layers. inputs, outputs: channels.
        name: of the module inside. layers: of the MLP that stands where no axis is shared.

    Note: to the last weight, from the weight before it and from biases that it does not touch, the published code gives
        all output neurons the same values, although it could tell them apart; so does this one.
    """

    def __init__(
        self, source: tuple[int, ...], target: tuple[int, ...], layout: Sequence[int], inputs: int, outputs: int,
        options: MapOptions, name: str, layers: int,
    ):  # fmt: skip
        super().__init__()
        ends = (0, len(layout) - 1)
        shared = [axis for axis in source if axis in target and axis not in ends]
        last = ends[1]
        alike = target == (last - 1, last) and (source == (last - 2, last - 1) or (len(source) == 1 and source[0] < last - 1))
        own = [axis for axis in target if axis in ends and not alike]
        self.target, self.made, self.outputs, self.reduction, self.name = target, [*shared, *own], outputs, options.reduction, name
        self.sizes = [-1] * len(shared) + [layout[axis] for axis in own]
        self.reduced = [1 + k for k, axis in enumerate(source) if axis not in ends and axis not in shared]
        self.set_axis = [axis for axis in source if axis in ends or axis in shared].index(shared[0]) + 1 if shared else None
        inputs *= math.prod(layout[axis] for axis in source if axis in ends)
        outputs *= math.prod(layout[axis] for axis in own)
        self.add_module(name, options.over_set(inputs, outputs) if shared else mlp(inputs, outputs, layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, *source, inputs] to [B, *target, outputs], of size 1 along axes that are broadcast."""
        if len(self.reduced) == 2:
            x = reduce(x.flatten(1, 2), 1, self.reduction)
        elif self.reduced:
            x = reduce(x, self.reduced[0], self.reduction)
        if self.set_axis is None:
            x = x.flatten(1)
        else:
            x = x.transpose(1, self.set_axis).flatten(2)
        x = self.get_submodule(self.name)(x)
        x = x.view(x.shape[0], *self.sizes, self.outputs)
        if len(self.made) == 2 and self.made != list(self.target):
            x = x.transpose(1, 2)
        for k, axis in enumerate(self.target):
            if axis not in self.made:
                x = x.unsqueeze(1 + k)
        return x


class MapBlock(nn.Module):
    """The sum of the maps from all weights (or biases) to each weight (or bias).

    Args:
        kind: "weight_to_weight", "bias_to_bias", "bias_to_weight" or "weight_to_bias".
        diagonal: only between tensors that touch.
    """

    def __init__(self, kind: str, layout: Sequence[int], inputs: int, outputs: int, options: MapOptions, diagonal: bool):
        super().__init__()
        source, _, target = kind.split("_")
        self.depth = len(layout) - 1
        near = {"weight_to_weight": (-1, 0, 1), "bias_to_bias": (0,), "bias_to_weight": (0, 1), "weight_to_bias": (-1, 0)}[kind]
        self.layers = nn.ModuleDict()
        for i in range(self.depth):
            for j in range(self.depth):
                if diagonal and j - i not in near:
                    continue
                if source == target == "weight" and i == j and 0 < i < self.depth - 1:
                    self.layers[f"{i}_{j}"] = SameWeightMap(inputs, outputs, options)
                    continue
                axes = [(k, k + 1) if of == "weight" else (k + 1,) for of, k in ((source, i), (target, j))]
                over_set = source == target == "weight" and abs(i - j) <= 1
                layers = options.layers if source == target or j - i in near else 1  # as published
                name = "set_layer" if over_set else "layer"
                self.layers[f"{i}_{j}"] = NeighbourMap(*axes, layout, inputs, outputs, options, name, layers)

    def forward(self, features: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [sum(self.layers[f"{i}_{j}"](x) for i, x in enumerate(features) if f"{i}_{j}" in self.layers) for j in range(self.depth)]

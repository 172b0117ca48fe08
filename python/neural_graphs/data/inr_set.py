"""A set of networks of one layout, packed with a leading network dimension, and its splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .storage import DataError


@dataclass(frozen=True)
class InrSet:
    """M networks of the same layout with a class label each.

    Attributes:
        weights: per layer [M, d_l, d_{l+1}] (input, output: the order of the neural graph).
        biases: per layer [M, d_{l+1}].
        labels: class of the picture, [M] int64.
        images: which picture a network was fitted to, [M] int64; splits keep all networks of one picture together.
        psnr: quality of the fit in dB, [M]; NaN where unknown.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    labels: Tensor
    images: Tensor
    psnr: Tensor

    def __len__(self) -> int:
        return self.labels.shape[0]

    @property
    def layout(self) -> tuple[int, ...]:
        return (self.weights[0].shape[1], *(weight.shape[2] for weight in self.weights))

    @property
    def num_edges(self) -> int:
        """Weights of one network."""
        return sum(weight.shape[1] * weight.shape[2] for weight in self.weights)

    def select(self, index: Tensor) -> InrSet:
        """Returns the networks at `index` (positions [K] int64, or a mask [M] bool)."""
        return self._map(lambda tensor: tensor[index])

    def to(self, device: torch.device | str) -> InrSet:
        return self._map(lambda tensor: tensor.to(device))

    def _map(self, function) -> InrSet:
        return InrSet(
            tuple(function(weight) for weight in self.weights),
            tuple(function(bias) for bias in self.biases),
            function(self.labels),
            function(self.images),
            function(self.psnr),
        )


def concat(sets: Sequence[InrSet]) -> InrSet:
    """Returns one set with the networks of all, in order; the layouts must be equal."""
    if not sets:
        raise ValueError("concat: expected at least one set, got none")
    layouts = {s.layout for s in sets}
    if len(layouts) > 1:
        raise ValueError(f"concat: expected equal layouts, got {sorted(map(list, layouts))}")
    return InrSet(
        tuple(torch.cat(parts) for parts in zip(*(s.weights for s in sets))),
        tuple(torch.cat(parts) for parts in zip(*(s.biases for s in sets))),
        torch.cat([s.labels for s in sets]),
        torch.cat([s.images for s in sets]),
        torch.cat([s.psnr for s in sets]),
    )


def pack(networks: InrSet) -> dict[str, Tensor]:
    """Returns the tensors under the public MNIST-INR names with a leading network dimension: `seq.l.weight` is [M, out, in]."""
    tensors = {"label": networks.labels, "image": networks.images, "psnr": networks.psnr}
    for layer, (weight, bias) in enumerate(zip(networks.weights, networks.biases)):
        tensors[f"seq.{layer}.weight"] = weight.transpose(1, 2)
        tensors[f"seq.{layer}.bias"] = bias
    return tensors


def unpack(tensors: Mapping[str, Tensor], source: str) -> InrSet:
    """The inverse of `pack`; `source` names the file in errors."""
    depth = sum(name.endswith(".weight") for name in tensors)
    try:
        networks = InrSet(
            tuple(tensors[f"seq.{layer}.weight"].transpose(1, 2) for layer in range(depth)),
            tuple(tensors[f"seq.{layer}.bias"] for layer in range(depth)),
            tensors["label"],
            tensors["image"],
            tensors["psnr"],
        )
    except (KeyError, IndexError) as error:
        raise DataError(f"unpack: {source} has no valid tensor {error}; it is not a packed set of networks, delete it") from error
    count = len(networks)
    rows = [*networks.weights, *networks.biases, networks.images, networks.psnr]
    if depth == 0 or any(tensor.shape[:1] != (count,) for tensor in rows):
        raise DataError(f"unpack: {source} holds tensors of unequal length; it is not a packed set of networks, delete it")
    return networks


def split_by_image(images: Tensor, sizes: Mapping[str, int], seed: int = 0) -> dict[str, Tensor]:
    """Returns, per split, the positions of its networks; every picture is on one side only.

    Args:
        images: picture of each network, [M] int64.
        sizes: number of pictures per split, in order; scaled down in proportion if there are fewer pictures.
        seed: of the permutation of the pictures.

    Raises:
        ValueError: there are too few pictures to give every split one.
    """
    unique = images.unique()
    total = sum(sizes.values())
    if len(unique) < len(sizes):
        raise ValueError(f"split_by_image: expected at least {len(sizes)} pictures, got {len(unique)}")
    scale = min(1.0, len(unique) / total)
    counts = {name: max(1, int(size * scale)) for name, size in sizes.items()}
    order = unique[torch.randperm(len(unique), generator=torch.Generator().manual_seed(seed))]
    splits, start = {}, 0
    for name, count in counts.items():
        splits[name] = torch.isin(images, order[start : start + count]).nonzero().flatten()
        start += count
    return splits

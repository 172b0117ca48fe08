"""Parameters in dicts and files to neural graphs."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

import torch

from .network import Network, from_layers

_KEY = re.compile(r"(?:(?P<prefix>.+)\.)?(?P<layer>\d+)\.(?P<kind>weight|bias)")


class CheckpointError(ValueError):
    """A file that cannot be read, or does not hold a network that is understood."""


def from_state_dict(state: Mapping[str, torch.Tensor], reverse: bool = False, op: str = "from_state_dict") -> Network:
    """The neural graph of an MLP whose parameters are named k.weight, k.bias, or prefix.k.weight, prefix.k.bias.

    Args:
        state: weights (out, in), biases (out,) or none; layers follow one another by number k, gaps allowed: the
            keys of torch.nn.Sequential, and seq.k.weight of the published implicit neural representations.
        reverse: add the reversed edges. op: named in errors.

    Returns:
        Network, without activations: a state dict does not say them.

    Raises:
        CheckpointError: other keys, missing weights, shapes that do not follow one another.
    """
    layers: dict[int, dict[str, torch.Tensor]] = {}
    prefixes = set()
    for key, tensor in state.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise CheckpointError(
                f"{op}: expected keys [prefix.]k.weight and [prefix.]k.bias of an MLP, got {key!r}; pass its matrices to from_layers"
            )
        prefixes.add(match["prefix"])
        layers.setdefault(int(match["layer"]), {})[match["kind"]] = tensor
    if len(prefixes) != 1:
        found = ", ".join(sorted(str(p) for p in prefixes)) or "no tensors"
        raise CheckpointError(f"{op}: expected one chain of layers, got {found}; pass one of them")
    order = [layers[k] for k in sorted(layers)]
    bare = [k for k in sorted(layers) if "weight" not in layers[k]]
    if bare:
        raise CheckpointError(f"{op}: expected a weight for each bias, got layer {bare[0]} without one")
    try:
        return from_layers([layer["weight"] for layer in order], [layer.get("bias") for layer in order], reverse=reverse, op=op)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def from_safetensors(path: str | os.PathLike, reverse: bool = False) -> Network:
    """The neural graph of an MLP in a safetensors file; see from_state_dict for its keys.

    Args:
        path: the file. It is memory-mapped: weights are views of it.
        reverse: add the reversed edges.

    Returns:
        Network, without activations.

    Raises:
        FileNotFoundError: no such file. CheckpointError: a truncated or corrupt file, keys that are not understood.
        ImportError: safetensors is not installed.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError("from_safetensors: the package safetensors is not installed; pip install safetensors") from error
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"from_safetensors: expected a file, got {path!r}, which does not exist")
    try:
        with safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"from_safetensors: expected a complete safetensors file, got {path!r}: {error}; copy or download it again"
        ) from error
    return from_state_dict(state, reverse, f"from_safetensors: {path!r}")

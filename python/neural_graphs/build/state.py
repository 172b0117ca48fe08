"""Parameters in dicts and files to neural graphs."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from .files import CheckpointError, map_tensors, read_headers, read_json
from .llama import from_llama, is_llama
from .network import Network, from_layers

_KEY = re.compile(r"(?P<before>(?:.*\D)?)(?P<layer>\d+)(?P<after>(?:\.\D[^.]*)*)\.(?P<kind>weight|bias)")


def from_state_dict(
    state: Mapping[str, torch.Tensor],
    reverse: bool = False,
    num_heads: int | None = None,
    attention: str = "vector",
    op: str = "from_state_dict",
) -> Network:
    """The neural graph of a network from its parameters by name: a stack of linear layers, or a LLaMA-shaped decoder.

    Linear layers follow one another by a number in their names, gaps allowed; the rest of the names is the same:
    k.weight and k.bias of torch.nn.Sequential, seq.k.weight of the published implicit neural representations,
    net.k.linear.weight, fck.weight. Decoders have the names of Hugging Face's LlamaForCausalLM, see from_llama.

    Args:
        state: weights (out, in), biases (out,) or none. They stay where they are: the result holds views.
        reverse: add the reversed edges. num_heads, attention: of decoders, see from_llama. op: named in errors.

    Returns:
        Network. Of linear layers without activations: a state dict does not say them.

    Raises:
        CheckpointError: names that are not understood, missing weights, shapes that do not follow one another.
        NotImplementedError: convolutions, norms, decoders with parts that are not built. TypeError: weights that are no
            floating numbers.
    """
    if is_llama(state):
        return from_llama(state, reverse, num_heads, attention, op)
    layers: dict[int, dict[str, str]] = {}
    chains = set()
    for key in state:
        match = _KEY.fullmatch(key)
        if match is None:
            raise CheckpointError(
                f"{op}: expected numbered linear layers ([prefix.]k.weight, [prefix.]k.bias) or a LLaMA-shaped decoder (...layers.k.self_attn.q_proj.weight, "
                f"...), got {key!r}; convolutions, norms and other architectures are not built: pass the matrices of an MLP to from_layers"
            )
        chains.add(match["before"] + "k" + match["after"])
        layers.setdefault(int(match["layer"]), {})[match["kind"]] = key
    if len(chains) != 1:
        raise CheckpointError(f"{op}: expected one chain of layers, got {', '.join(sorted(chains)) or 'no tensors'}; pass one of them")
    order = [layers[k] for k in sorted(layers)]
    bare = [k for k in sorted(layers) if "weight" not in layers[k]]
    if bare:
        raise CheckpointError(f"{op}: expected a weight for each bias, got layer {bare[0]} without one")
    names = [layer["weight"].removesuffix(".weight") for layer in order]
    odd = [name for name in names if state[f"{name}.weight"].dim() != 2]
    if odd:
        raise NotImplementedError(
            f"{op}: expected linear layers with weights (out, in), got {odd[0]}.weight of shape {tuple(state[f'{odd[0]}.weight'].shape)}; convolutions and norms "
            "in a state dict are not built"
        )
    weights, biases = [state[layer["weight"]] for layer in order], [state[layer["bias"]] if "bias" in layer else None for layer in order]
    try:
        return from_layers(weights, biases, reverse=reverse, op=op, names=names)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def from_safetensors(path: str | os.PathLike, reverse: bool = False, num_heads: int | None = None, attention: str = "vector") -> Network:
    """The neural graph of a network in a safetensors file; see from_state_dict for what is understood.

    Args:
        path: the file, the index of a sharded checkpoint (model.safetensors.index.json), or a folder with one of them.
            Files are memory-mapped: weights are views of them, read when used, and may be larger than memory.
        reverse: add the reversed edges.
        num_heads, attention: of decoders, see from_llama; without num_heads, that of config.json beside the file.

    Returns:
        Network, as from_state_dict.

    Raises:
        FileNotFoundError: no such file. CheckpointError: a truncated or corrupt file, a missing shard, names that are not
            understood. NotImplementedError: parts of decoders that are not built. ImportError: safetensors is not installed.
    """
    op = f"from_safetensors: {os.fspath(path)!r}"
    state = map_tensors(read_headers(path, "from_safetensors"))
    return from_state_dict(state, reverse, _heads(path, state, num_heads, op), attention, op)


def describe_safetensors(path: str | os.PathLike, num_heads: int | None = None, attention: str = "vector") -> Network:
    """As from_safetensors, from the headers alone: the tensors are on the device "meta" and have no values."""
    op = f"describe_safetensors: {os.fspath(path)!r}"
    state = {name: place.described() for name, place in read_headers(path, "describe_safetensors").items()}
    return from_state_dict(state, False, _heads(path, state, num_heads, op), attention, op)


def _heads(path: str | os.PathLike, state: Mapping[str, torch.Tensor], num_heads: int | None, op: str) -> int | None:
    """num_heads, or that of config.json beside the file."""
    config = (Path(path) if os.path.isdir(path) else Path(path).parent) / "config.json"
    if num_heads is not None or not is_llama(state) or not config.is_file():
        return num_heads
    entries = read_json(config, op)
    found = entries.get("num_attention_heads") if isinstance(entries, dict) else None
    return found if isinstance(found, int) else None

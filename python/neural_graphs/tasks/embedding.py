"""A model over one checkpoint whose weights stay in their files: its result, and gradients of the weights in other files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch

import ngkernels
from ngkernels.journal import Journal

from ..build import stream_safetensors
from ..build.files import read_headers


@dataclass(frozen=True)
class Embedding:
    """`values`: what the model says [out_features]. replayed: ops whose results an earlier, interrupted run had written down."""

    values: torch.Tensor
    replayed: int


def fingerprint(path: str | os.PathLike, model: torch.nn.Module) -> dict:
    """What a result depends on: names, sizes and times of the files, parameters and form of the model, the library."""
    files = sorted({place.file for place in read_headers(path, "embed").values()})
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    stats = [[name, os.stat(name).st_size, os.stat(name).st_mtime_ns] for name in files]
    versions = [ngkernels.__version__, torch.__version__, ngkernels.backends.isa()]
    return {"files": stats, "model": repr(model), "parameters": digest.hexdigest(), "versions": versions}


def embed(
    path: str | os.PathLike,
    model: torch.nn.Module,
    gradients: str | os.PathLike | None = None,
    state: str | os.PathLike | None = None,
    num_heads: int | None = None,
) -> Embedding:
    """The result of `model` for the network of a checkpoint of any size.

    Args:
        path: a safetensors file, the index of a sharded one, or a folder. model: NGGNN, or NGT along edges; if it is on a GPU, the weights
            pass through it in panels (ngkernels.panels).
        gradients: where d(sum of the result) / d(weights) goes, see build.stream_safetensors; the model's parameters get theirs too.
        state: None; or a folder for the results of finished ops: a run that is ended, by kill -9 too, continues with the op it was at.
            It is removed in the end.
        num_heads: see build.from_safetensors.

    Returns:
        Embedding: bit by bit what the model gives for weights in memory, however often it was interrupted.

    Raises:
        CheckpointError, OSError, NotImplementedError: see build.stream_safetensors; `state` with a model on a GPU. ValueError: `state` is
            of another computation.
    """
    device = next(model.parameters()).device
    if state is not None and device.type != "cpu":
        raise NotImplementedError(f"embed: continuing an interrupted run is built for models on the CPU, got one on {device}; pass state=None or move it with .cpu()")
    identity = {**fingerprint(path, model), "gradients": None if gradients is None else os.fspath(gradients)}
    journal = None if state is None else Journal(state, identity)
    with journal or contextlib.nullcontext(), stream_safetensors(path, gradients, model.reverse_blocks, num_heads) as network:
        with torch.set_grad_enabled(gradients is not None):
            found = model.forward_graph(network.graph, network.weights, [b.float().to(device) for b in network.biases])
            if gradients is not None:
                found.sum().backward()
    if journal is not None:
        journal.remove()
    return Embedding(found.detach()[0], 0 if journal is None else journal.replayed)


def write(found: Embedding, path: Path) -> None:
    """The result as JSON."""
    path.write_text(json.dumps({"values": found.values.tolist()}) + "\n")

"""Networks larger than memory: weights that stay in their safetensors files, gradients that go to others."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from ngkernels.mapped import MappedFile

from .files import CheckpointError, Stored, read_headers
from .network import Channels, Network
from .state import _heads, from_state_dict


@contextlib.contextmanager
def stream_safetensors(
    path: str | os.PathLike, gradients: str | os.PathLike | None = None, reverse: bool = False, num_heads: int | None = None
) -> Iterator[Network]:
    """The neural graph of a network in safetensors files, whose weights take memory only while a kernel reads them.

    Inside the context, models read the weights from the files piece by piece and give their pages back (ngkernels.mapped): the result is
    bit by bit that of `from_safetensors`. Attention of decoders is read with an edge each for queries, keys and values.

    Args:
        path, reverse, num_heads: as for from_safetensors. The files must not change meanwhile.
        gradients: None; or where the gradients of the weights go: a safetensors file of the same names and shapes, a folder of them
            for a sharded checkpoint. Tensors that are no weights (biases, tokens left out) hold 0 there.

    Yields:
        Network: its weights are views of the files; with `gradients` they require grad, and their `.grad` stays None.

    Raises:
        CheckpointError: as from_safetensors; a weight that is NaN or infinite. FileNotFoundError: no such file. OSError: no room on the disk.
        NotImplementedError: without the C++ kernels; gradients of a tensor that is used twice or does not lie on a multiple of its element size.
    """
    op = "stream_safetensors"
    stored = read_headers(path, op)
    files = {name: MappedFile(name) for name in sorted({place.file for place in stored.values() if place.end > place.begin})}
    finished = False
    try:
        state = {name: _view(files, place, op, name) for name, place in stored.items()}
        network = from_state_dict(state, reverse, _heads(path, state, num_heads, op), "parallel", op)
        if gradients is not None:
            _open_gradients(network, stored, files, Path(gradients), op)
        check_values(network, files, op)
        yield network
        finished = True
    finally:
        for file in files.values():
            file.close(finished)


def _view(files: dict[str, MappedFile], place: Stored, op: str, name: str) -> torch.Tensor:
    if place.end == place.begin:
        return torch.empty(place.shape, dtype=place.dtype)
    if place.begin % place.dtype.itemsize:
        raise NotImplementedError(
            f"{op}: expected {name!r} on a multiple of its element size in {place.file!r}, got byte {place.begin}; write the file again with safetensors"
        )
    return files[place.file].view(place.begin, place.dtype, place.shape)


def check_values(network: Network, files: dict[str, MappedFile], op: str) -> None:
    """Reads every weight once. Raises CheckpointError where one is NaN or infinite."""
    for weight, names in zip(network.weights, network.origin.tensors, strict=True):
        for file in files.values():
            inside = file.begin <= weight.data_ptr() < file.begin + file.bytes.numel()
            if inside and not all(map(math.isfinite, file.extremes(weight))):
                raise CheckpointError(
                    f"{op}: expected finite values of {', '.join(map(repr, names))} in {str(file.path)!r}, got NaN or infinity; copy or download it again"
                )


def _open_gradients(network: Network, stored: dict[str, Stored], files: dict[str, MappedFile], path: Path, op: str) -> None:
    """A file beside each file, with its header; weights then require grad."""
    used = [name for names in network.origin.tensors for name in names]
    twice = sorted({name for name in used if used.count(name) > 1})
    if twice:
        raise NotImplementedError(
            f"{op}: expected every tensor to be the weights of one block, got {twice[0]!r} twice; pass gradients=None"
        )
    if len(files) > 1:
        path.mkdir(parents=True, exist_ok=True)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
    for name, file in files.items():
        to = path / Path(name).name if len(files) > 1 else path
        if to.exists() and to.samefile(name):
            raise ValueError(f"{op}: expected gradients in another file than the weights, got {str(to)!r}")
        sums = file.open_gradients(to).sums
        header = min(place.begin for place in stored.values() if place.file == name)
        sums.bytes[:header] = file.bytes[:header]
    index = next(iter(Path(next(iter(files))).parent.glob("*.safetensors.index.json")), None) if len(files) > 1 else None
    if index is not None:
        shutil.copyfile(index, path / index.name)
    for weight in network.weights:
        if not isinstance(weight, Channels) and weight.is_floating_point():
            weight.requires_grad_()

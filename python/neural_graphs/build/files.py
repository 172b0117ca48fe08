"""Safetensors files, single or in shards: what their headers say, and tensors that stay in the file."""

from __future__ import annotations

import json
import math
import mmap
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
INDEX = ".safetensors.index.json"


class CheckpointError(ValueError):
    """A file that cannot be read, or does not hold a network that is understood."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: bytes `begin` to `end`."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    def described(self) -> torch.Tensor:
        """A tensor of this shape and dtype without values."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


def read_headers(path: str | os.PathLike, op: str) -> dict[str, Stored]:
    """The tensors of a checkpoint by name, from the headers alone.

    Args:
        path: a safetensors file, the index of a sharded one (model.safetensors.index.json), or a folder that holds
            one of them. op: named in errors.

    Raises:
        FileNotFoundError: nothing there. CheckpointError: a truncated or corrupt file, a shard that is missing.
        ImportError: safetensors is not installed.
    """
    found = _locate(Path(path), op)
    if not found.name.endswith(".json"):
        return _read_header(found, op)
    index = read_json(found, op)
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{op}: expected an index with a weight_map from tensors to files, got {str(found)!r} without one")
    stored: dict[str, Stored] = {}
    for shard in sorted(set(places.values())):
        file = found.parent / shard
        if not file.is_file():
            raise CheckpointError(f"{op}: expected the shard {shard!r} beside {str(found)!r}, got no such file; download it")
        header = _read_header(file, op)
        for name in (name for name, place in places.items() if place == shard):
            if name not in header:
                raise CheckpointError(f"{op}: expected {name!r} in the shard {str(file)!r}, as the index says, got none; download it again")
            stored[name] = header[name]
    return stored


def map_tensors(stored: dict[str, Stored]) -> dict[str, torch.Tensor]:
    """The tensors as views of their memory-mapped files: read when used; what is written to them stays in memory.

    A tensor that does not lie on a multiple of its element size is copied.
    """
    files = {place.file: _map_file(place.file) for place in stored.values() if place.end > place.begin}
    tensors = {}
    for name, place in stored.items():
        if place.end == place.begin:
            tensors[name] = torch.empty(place.shape, dtype=place.dtype)
            continue
        raw = files[place.file][place.begin : place.end]
        aligned = place.begin % place.dtype.itemsize == 0
        tensors[name] = (raw if aligned else raw.clone()).view(place.dtype).view(place.shape)
    return tensors


def read_json(path: Path, op: str):
    """The content of a JSON file.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{op}: expected a JSON file, got {str(path)!r}: {error}") from error


def _locate(path: Path, op: str) -> Path:
    if path.is_file():
        return path
    if path.is_dir():
        found = sorted(path.glob("*" + INDEX)) or sorted(path.glob("*.safetensors"))
        if len(found) == 1:
            return found[0]
        what = "none" if not found else ", ".join(p.name for p in found[:3])
        raise CheckpointError(f"{op}: expected a folder with one index or one safetensors file, got {what} in {str(path)!r}; name the file")
    raise FileNotFoundError(f"{op}: expected a file, got {str(path)!r}, which does not exist")


def _read_header(path: Path, op: str) -> dict[str, Stored]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError(f"{op}: the package safetensors is not installed; pip install safetensors") from error
    try:
        with safe_open(path, "np"):  # checks the header, its offsets and the file's size; reads no values
            pass
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{op}: expected a complete safetensors file, got {str(path)!r}: {error}; copy or download it again"
        ) from error
    header.pop("__metadata__", None)
    stored = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(
                f"{op}: expected dtypes {', '.join(DTYPES)}, got {entry['dtype']} of {name!r} in {str(path)!r}; convert the file"
            )
        begin, end = (8 + size + offset for offset in entry["data_offsets"])
        dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise CheckpointError(
                f"{op}: expected {math.prod(shape) * dtype.itemsize} bytes of {name!r}, got {end - begin} in {str(path)!r}"
            )
        stored[name] = Stored(str(path), dtype, shape, begin, end)
    return stored


def _map_file(path: str) -> torch.Tensor:
    """The bytes of a file. Private and without a reservation of memory, so that it may be larger than what there is."""
    with open(path, "rb") as file:
        if sys.platform == "linux":
            flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000)  # named since Python 3.13
            mapped = mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        else:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return torch.frombuffer(mapped, dtype=torch.uint8)

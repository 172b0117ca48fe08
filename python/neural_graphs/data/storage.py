"""Files that are either whole or absent: atomic writes, checked reads, configuration hashes.

Every file this library writes goes through `write_bytes`: the bytes are written to a temporary file in the same folder, flushed to
the disk, and renamed over the target. A reader, a crash or a Ctrl-C therefore sees the old file or the new one, never a part of it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

CACHE_VARIABLE = "NGK_CACHE"


class DataError(RuntimeError):
    """A file that cannot be read or written as asked; the message names the file and the remedy."""


def default_cache() -> Path:
    """Returns the folder for generated data: $NGK_CACHE, else $XDG_CACHE_HOME/ngkernels, else ~/.cache/ngkernels."""
    own = os.environ.get(CACHE_VARIABLE)
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "ngkernels"


def config_hash(config: Mapping[str, Any]) -> str:
    """Returns 12 hexadecimal digits that identify a JSON-serialisable configuration (key order does not matter)."""
    text = json.dumps(config, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


# ---------------------------------------------------------------------------------------------------------------- writing


def write_bytes(path: Path | str, data: bytes) -> None:
    """Writes `data` to `path` atomically and durably, making parent folders.

    Raises:
        DataError: the disk is full, or the place cannot be written. Nothing is left behind, and an older file stays as it was.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        temporary = None
        _sync_folder(path.parent)
    except OSError as error:
        raise DataError(_write_message(path, len(data), error)) from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


def write_json(path: Path | str, value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    write_bytes(path, (json.dumps(value, indent=1) + "\n").encode())


def write_tensors(path: Path | str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes tensors as one safetensors file, atomically."""
    from safetensors.torch import save

    packed = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(path, save(packed, metadata=dict(metadata or {})))


def _write_message(path: Path, size: int, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"write: the disk is full, {path} ({size / 2**20:.1f} MiB) was not written; free some space or choose another folder. "
            "What was finished before is kept"
        )
    return f"write: cannot write {path} ({error.strerror or error}); choose a folder that can be written"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Makes a rename durable; some file systems do not allow it, which costs only durability across a power cut."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


# ---------------------------------------------------------------------------------------------------------------- reading


def read_json(path: Path | str) -> Any:
    """Returns the content of a JSON file.

    Raises:
        DataError: the file is missing or not JSON.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise DataError(f"read: {path} does not exist") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"read: cannot read {path} ({error}); check that it is a text file with read permission") from error
    except json.JSONDecodeError as error:
        raise DataError(f"read: {path} is not valid JSON (line {error.lineno}: {error.msg}); delete it or restore it") from error


def read_tensors(
    path: Path | str, remedy: str = "restore it from its source, or delete it"
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Returns (tensors by name, metadata) of a safetensors file.

    Raises:
        DataError: the file is missing, truncated or corrupt; the message ends with `remedy`.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise DataError(f"read: {path} does not exist")
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise DataError(f"read: {path} is corrupt or truncated ({error}); {remedy}") from error


def read_torch(path: Path | str, remedy: str = "restore it from its source, or delete it") -> Any:
    """Returns the content of a torch.save file, refusing to unpickle anything but tensors and plain containers.

    Raises:
        DataError: the file is missing, truncated, corrupt, or contains other objects.
    """
    import pickle

    path = Path(path)
    if not path.is_file():
        raise DataError(f"read: {path} does not exist")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        first = str(error).strip().splitlines()[0]
        raise DataError(f"read: {path} is corrupt, or holds objects other than tensors ({first}); {remedy}") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"read: {path} is corrupt or truncated ({first}); {remedy}") from error

"""Files of what `python -m ngkernels.tune` measured on GPUs: a list of records, each of one compute capability."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch


def path(variable: str, name: str) -> Path:
    """What an environment variable says, else a file of that name in the user's cache folder."""
    return Path(os.environ.get(variable) or Path.home() / ".cache" / "ngkernels" / name)


def capability_of(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def read(file: Path, fields: Sequence[str], entry: Callable) -> dict[tuple[int, int], dict]:
    """By compute capability, the (key, value) that `entry` makes of each record's other `fields`; none where there is no file.

    Raises:
        ValueError: a file that does not hold such records.
    """
    found: dict[tuple[int, int], dict] = {}
    if not file.exists():
        return found
    try:
        for record in json.loads(file.read_text()):
            (major, minor), *rest = (record[name] for name in fields)
            key, value = entry(*rest)
            found.setdefault((major, minor), {})[key] = value
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"ngkernels: expected records of {', '.join(fields)} in {file}, got {error}; write it with python -m ngkernels.tune") from error
    return found


def write(file: Path, fields: Sequence[str], capability: tuple[int, int], entries: Iterable[Sequence]) -> None:
    """Puts what was measured on one architecture, the values of all but the first of the `fields`, beside what was on others."""
    records = [] if not file.exists() else [r for r in json.loads(file.read_text()) if tuple(r["capability"]) != capability]
    records += [dict(zip(fields, (list(capability), *entry), strict=True)) for entry in entries]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("[\n" + ",\n".join(json.dumps(r) for r in records) + "\n]\n")

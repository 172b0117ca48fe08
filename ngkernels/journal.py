"""Journals: a step that is ended half way, by kill -9 too, goes on with the op it was at.

While a journal is open, the result of every op over edges is written down. The same computation, started again with the same journal, is
given those results instead of computing them; everything else is cheap and done again. A record is there whole or not at all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

KEPT = ("aggregate", "attend", "evaluate", "aggregate_backward", "attend_backward", "evaluate_backward")
_open: list[Journal] = []


class Journal:
    """The records of one step, in a folder.

    Args:
        folder: made if it is not there. identity: what the computation depends on, as JSON; a journal of another one is refused.

    Raises:
        ValueError: the folder holds the journal of another computation.

    Note: one at a time; calls must come in the same order in each run, as those of one thread do.
    """

    def __init__(self, folder: str | os.PathLike, identity: dict):
        self.folder, self.identity = Path(folder), json.dumps(identity, sort_keys=True)
        self.number, self.stage, self.replayed = -1, -1, 0
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "identity.json"
        if path.exists() and path.read_text() != self.identity:
            raise ValueError(
                f"journal: expected one of this computation in {str(self.folder)!r}, got that of another; choose another folder or remove it"
            )
        if not path.exists():
            self._write(path, lambda p: p.write_text(self.identity))

    def __enter__(self) -> Journal:
        self.number, self.stage, self.replayed = -1, -1, 0
        self.continued = any(self.folder.glob("*.pt"))
        _open.append(self)
        return self

    def __exit__(self, *_) -> None:
        _open.remove(self)

    def remove(self) -> None:
        """Deletes the journal: the step is done."""
        for path in self.folder.iterdir():
            path.unlink()
        self.folder.rmdir()

    def call(self, name: str, implementation: Callable, arguments: tuple):
        """The op's results, from the journal or computed now."""
        from .mapped import find  # which imports this module

        self.number += 1
        path = self.folder / f"{self.number}.{name}.pt"
        if path.exists():
            kept = torch.load(path, weights_only=True)
            self.replayed += 1
            return self._restored(kept, name, arguments)
        found = implementation(*arguments)
        kept = [None if find(t) is not None else t for t in found]  # gradients in files are there already
        self._write(path, lambda p: torch.save(kept, p))
        return found

    @staticmethod
    def _restored(kept, name: str, arguments: tuple):
        from .mapped import gradient_like

        weights = next(a for a in arguments if isinstance(a, list)) if name != "evaluate_backward" else arguments[1]
        return [gradient_like(weights[k]) if t is None else t for k, t in enumerate(kept)]

    def once(self, new: Sequence[Callable], write: Sequence[Callable], after: Callable[[int], object]) -> None:
        """As the function of this name; each value is kept beside the files until the next one is."""
        self.stage += 1
        redo, begin = self.folder / "redo.pt", 0
        if redo.exists():
            stage, k, values = torch.load(redo, weights_only=True)
            if stage > self.stage:
                return
            if stage == self.stage:  # perhaps half of it was written
                write[k](values)
                begin = k + 1
        for k in range(begin, len(new)):
            values = new[k]()
            self._write(redo, lambda p, kept=(self.stage, k, values): torch.save(kept, p))
            write[k](values)
            after(k)

    @staticmethod
    def _write(path: Path, write: Callable[[Path], object]) -> None:
        part = path.with_name(path.name + ".part")
        write(part)
        os.replace(part, path)


def is_open() -> bool:
    """Whether what is done now may be continued by another run."""
    return bool(_open)


def is_continued() -> bool:
    """Whether this run continues another."""
    return bool(_open) and _open[-1].continued


def kept(name: str, implementation: Callable) -> Callable:
    """`implementation` of an op; while a journal is open, with its results written down or taken from there."""
    if not _open or name not in KEPT:
        return implementation
    return lambda *arguments: _open[-1].call(name, implementation, arguments)


def once(new: Sequence[Callable], write: Sequence[Callable], after: Callable[[int], object]) -> None:
    """write[k](new[k]()), then after(k), for each k; with a journal exactly once over all runs, although writing changes what `new` reads."""
    if _open:
        _open[-1].once(new, write, after)
        return
    for k in range(len(new)):
        write[k](new[k]())
        after(k)

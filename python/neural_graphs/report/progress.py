"""Progress of long work: a bar on a terminal, a line now and then where the output is a file or a pipe."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

QUIET_SECONDS = 15.0  # between two lines when the output is not a terminal


class ProgressLine:
    """One piece of work with a known total; use as a context manager and call `update(done, text)`."""

    def __init__(self, console: Console, title: str, total: int):
        self.console, self.title, self.total = console, title, total
        self._bar: Progress | None = None
        self._begin = self._last = time.monotonic()
        self._first: int | None = None

    def __enter__(self) -> ProgressLine:
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}"),
            )
            self._bar = Progress(*columns, console=self.console)
            self._task = self._bar.add_task(self.title, total=self.total, text="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, text: str = "") -> None:
        """Shows that `done` of the total is finished, and a short text (loss, speed)."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, text=text)
            return
        now = time.monotonic()
        if self._first is None:
            self._first, self._begin = done, now
        if now - self._last < QUIET_SECONDS and done < self.total:
            return
        self._last = now
        rate = (done - self._first) / max(now - self._begin, 1e-9)
        left = f"about {_duration((self.total - done) / rate)} left" if rate > 0 and done < self.total else ""
        percent = 100 * done // max(self.total, 1)
        parts = [f"{self.title}: {done}/{self.total} ({percent} %)", text, left]
        self.console.print(", ".join(part for part in parts if part), highlight=False, soft_wrap=True)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"

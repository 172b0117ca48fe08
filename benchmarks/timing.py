"""Interleaved timing that knows whether the machine was quiet.

Candidates are timed in turn, A B C A B C, so that a slow minute hits all of them. Beside each wall time stands `foreign`: how many
cores other processes used meanwhile. A sample counts as quiet below `QUIET` cores; medians are taken over quiet samples, and a
result with fewer than two of them is marked noisy.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

QUIET = 0.15


@dataclass
class Samples:
    """Wall and processor seconds per call and foreign load of each sample; `calls` calls make one sample."""

    calls: int
    seconds: list[float] = field(default_factory=list)
    foreign: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)

    def add(self, seconds: float, foreign: float, cpu_seconds: float) -> None:
        self.seconds.append(seconds)
        self.foreign.append(foreign)
        self.cpu_seconds.append(cpu_seconds)

    @property
    def quiet(self) -> list[float]:
        return [s for s, f in zip(self.seconds, self.foreign) if f < QUIET]

    @property
    def noisy(self) -> bool:
        return len(self.quiet) < 2

    @property
    def median(self) -> float:
        """Median of the quiet samples; of all samples where fewer than two were quiet."""
        return statistics.median(self.seconds if self.noisy else self.quiet)


def busy_seconds() -> float | None:
    """Core-seconds that this machine has spent computing since it started; None where the system does not say."""
    try:
        fields = [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    except OSError:
        return None
    return sum(fields[i] for i in (0, 1, 2, 5, 6, 7)) / os.sysconf("SC_CLK_TCK")


def sample(call: Callable[[], object], calls: int) -> tuple[float, float, float]:
    """(seconds per call, cores that other processes used, processor seconds per call)."""
    busy, own, start = busy_seconds(), time.process_time(), time.perf_counter()
    for _ in range(calls):
        call()
    wall = time.perf_counter() - start
    own = time.process_time() - own
    foreign = 0.0 if busy is None else max(0.0, (busy_seconds() - busy - own) / wall)
    return wall / calls, round(foreign, 3), own / calls


def interleave(
    candidates: dict[str, Callable[[], object]],
    want: int = 5,
    rounds: int = 15,
    sample_seconds: float = 0.3,
    budget_seconds: float = 300.0,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Samples]:
    """Times every candidate once per round, until each has `want` quiet samples.

    Args:
        candidates: what to call, by name; already warm (compiled, buffers allocated).
        want: quiet samples that are enough. rounds: give up after so many rounds.
        sample_seconds: a sample repeats its call until it lasts about so long; the clock of foreign load ticks in 10 ms.
        budget_seconds: start no further round after so long, once each candidate has three samples.
        tick: called after each round.
    """
    results = {}
    for name, call in candidates.items():
        seconds = sample(call, 1)[0]
        results[name] = Samples(max(1, min(10_000, round(sample_seconds / max(seconds, 1e-7)))))
    start = time.perf_counter()
    for done in range(rounds):
        enough = all(len(s.quiet) >= want for s in results.values())
        late = done >= 3 and time.perf_counter() - start > budget_seconds
        if enough or late:
            break
        for name, call in candidates.items():
            results[name].add(*sample(call, results[name].calls))
        tick()
    return results

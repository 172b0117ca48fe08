"""`python -m benchmarks`: the whole study, of each model train_step and memory, with the default cases."""

from __future__ import annotations

from typing import Annotated

import typer

from benchmarks import memory, train_step
from benchmarks.models import MODELS, TIMED


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Small networks, short samples: does everything run?")] = False,
    threads: Annotated[str, typer.Option(help="Numbers of threads for the timings, e.g. 1,2.")] = "1,2",
) -> None:
    """Measures training steps (fp32 and bf16) and memory, and appends the results; `python -m benchmarks.report` renews the tables."""
    for model in TIMED:
        train_step.main(model, threads="1" if quick else threads, dtype="fp32" if quick else "fp32,bf16", quick=quick)
    for model in MODELS:
        memory.main(model, quick=quick)


if __name__ == "__main__":
    typer.run(main)

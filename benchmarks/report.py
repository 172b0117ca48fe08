"""Writes the recorded results into the READMEs, or checks that they are there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import records
from benchmarks.machine import ROOT
from benchmarks.tables import TABLES

BLOCK = re.compile(r"(<!-- results:(\w+) -->\n)(.*?)(<!-- /results -->)", re.DOTALL)
READMES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md")


def render(text: str, results: Path = records.RESULTS) -> str:
    """`text` with every block `<!-- results:NAME -->` ... `<!-- /results -->` filled from the records.

    Raises:
        ValueError: a NAME without a table, or a block that does not end.
    """

    def fill(match: re.Match) -> str:
        name = match[2]
        if name not in TABLES:
            raise ValueError(f"report: expected results:NAME with NAME in {', '.join(TABLES)}, got {name!r}")
        return f"{match[1]}{TABLES[name](results)}\n{match[4]}"

    opened, closed = text.count("<!-- results:"), text.count("<!-- /results -->")
    if not opened == closed == len(BLOCK.findall(text)):
        raise ValueError(f"report: expected each results marker to be closed once, got {opened} opened and {closed} closed")
    return BLOCK.sub(fill, text)


def stale(paths: list[Path], results: Path = records.RESULTS) -> list[Path]:
    """Files whose tables are not those of the records."""
    return [path for path in paths if path.exists() and render(path.read_text(), results) != path.read_text()]


def main(
    check: Annotated[bool, typer.Option("--check", help="Change nothing; fail if a table is not the one of the records.")] = False,
    plots: Annotated[bool, typer.Option(help="Also draw results/<device>/*.png.")] = True,
) -> None:
    """Fills the tables between `<!-- results:NAME -->` and `<!-- /results -->` in README.md and benchmarks/README.md.

    NAME is train_step or memory (NG-GNN), train_step_ngt or memory_ngt (NG-T), attention (the op), scale (the memory study)
    or large. The numbers come from benchmarks/results/<device>/*.jsonl: of each setting the last run that
    measured this project, and the baselines of that same run. Nothing is left out where a baseline is faster.
    """
    paths = stale(list(READMES))
    if check:
        if paths:
            raise SystemExit("stale results in " + ", ".join(str(p.relative_to(ROOT)) for p in paths) + "; run python -m benchmarks.report")
        return
    for path in paths:
        path.write_text(render(path.read_text()))
        print(f"renewed {path.relative_to(ROOT)}")
    if plots:
        from benchmarks.plots import draw

        for path in draw():
            print(f"drew {path.relative_to(ROOT)}")


if __name__ == "__main__":
    typer.run(main)

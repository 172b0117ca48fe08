"""Commands of `ngk` about checkpoints; cli.py lists them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

# fmt: off
Checkpoint = Annotated[Path, typer.Argument(metavar="FILE", help="A safetensors file, the index of a sharded one (model.safetensors.index.json), or a folder with one of them.")]
Heads = Annotated[int | None, typer.Option("--num-heads", min=1, help="Query heads of a decoder whose queries share keys. [default: that of config.json beside the file]", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="All facts as JSON, every block by itself.")]
# fmt: on


def inspect(file: Checkpoint, num_heads: Heads = None, as_json: AsJson = False) -> None:
    """Show the neural graph of a checkpoint: node layers, blocks, nodes, edges, bytes.

    Reads the headers only, so a file of any size takes a moment. Stacks of linear layers and LLaMA-shaped decoders are understood.
    """
    from .report import inspect as report

    facts = report.inspect(file, num_heads)
    console = Console()
    if as_json:
        console.print_json(json.dumps(facts))
        return
    for table in report.tables(facts):
        console.print(table)
    for line in report.summary(facts):
        console.print(line, highlight=False, markup=False, soft_wrap=True)

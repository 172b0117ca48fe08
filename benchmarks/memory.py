"""Peak memory of a training step, per edge and per neuron, each point measured in a fresh process.

Everything counts: raw weights, their gradients, parameters' gradients, index lists, what the allocator keeps. What the process held
before the model was built (interpreter, libraries, a warm-up on a tiny network) does not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import records
from benchmarks.cases import Case
from benchmarks.machine import ROOT
from benchmarks.providers import PROVIDERS, Provider, usable
from neural_graphs.report.process import held_bytes, reset_peak, trim

# Layouts with the same number of neurons: the slope of the peak over edges is the cost of an edge. The layout with few edges is there in
# both orientations, because what a wide layer holds while it is computed depends on which side is wide.
EQUAL_NODES = ("2x3072x3072x3", "2x1024x5120x3", "2x5120x1024x3")
EQUAL_NODES_SMALL = ("2x512x512x3", "2x64x960x3", "2x960x64x3")
HIDDEN, HIDDEN_QUICK = (128, 256, 512, 1024, 1536), (128, 512)
WARM = "2x8x8x3"
# glibc raises its threshold for separate mappings with every large block freed, and then keeps freed blocks: peaks jump by tens of percent
# with the order of sizes. A fixed threshold makes the peak that of live memory, for every provider alike; --malloc default leaves it.
MALLOC = {"fixed": {"MALLOC_MMAP_THRESHOLD_": str(2**20)}, "default": {}}
console = Console() if sys.stdout.isatty() else Console(width=120)


def step_on(case: Case, provider: Provider, dtype: str, weight_grads: bool, steps: int, runner=None):
    """Builds model and inputs and runs some steps; returns the runner."""
    from benchmarks.providers import Runner, new_oracle

    if runner is None:
        oracle = new_oracle(case)
        runner = Runner(provider, case, oracle)
        del oracle
    weights, biases, labels = case.inputs()
    for weight in weights:
        weight.requires_grad_(weight_grads)
    for _ in range(steps):
        runner.step(weights, biases, labels, dtype)
    runner.model.zero_grad(set_to_none=True)
    return runner


def child(request: dict) -> dict:
    """One measurement, in the process that was started for it.

    A compiled model is compiled on the case itself first and kept; its index list is counted again when the measured steps rebuild it.
    """
    from benchmarks.train_step import set_threads

    set_threads(request["threads"])
    provider, case = PROVIDERS[request["provider"]], Case(tuple(request["layout"]), request["batch"])
    args = (provider, request["dtype"], request["weight_grads"])
    kept = step_on(case if provider.compiled else Case.parse(WARM), *args, steps=2)
    if provider.compiled and not provider.ours:
        kept.model.edge_index_cache.clear()
    if not provider.compiled:
        kept = None
    trim()
    before, exact = held_bytes("VmRSS"), reset_peak()
    start = time.perf_counter()
    step_on(case, *args, steps=2, runner=kept)
    seconds = (time.perf_counter() - start) / 2
    peak = held_bytes("VmHWM")
    return {
        "before_bytes": before,
        "peak_bytes": peak - before,
        "method": "VmHWM" if exact else "ru_maxrss",
        "seconds": seconds,
    }


def measure(
    run: str, provider: Provider, case: Case, weight_grads: bool, threads: int, dtype: str, series: str, malloc: str, name: str = "memory"
) -> dict:
    """Starts a fresh process for one point and records what it found."""
    request = {
        "provider": provider.name, "layout": list(case.layout), "batch": case.batch,
        "threads": threads, "dtype": dtype, "weight_grads": weight_grads, "malloc": malloc,
    }  # fmt: skip
    command = [sys.executable, "-m", "benchmarks.memory", "--child", json.dumps(request)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, **MALLOC[malloc]}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        tail = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise RuntimeError(f"memory: {provider.name} at {case.label} failed: {tail[0]}")
    result = json.loads(done.stdout.splitlines()[-1])
    return records.append(name, run, {**request, "series": series, "edges": case.edges, "nodes": case.nodes, **result})


def slope(points: list[tuple[float, float]]) -> float:
    """Least-squares slope of y over x."""
    mean_x, mean_y = (sum(p[i] for p in points) / len(points) for i in (0, 1))
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)


def summary(rows: list[dict]) -> list[dict]:
    """Bytes per edge and per neuron of one run, by (provider, threads, dtype, weight gradients).

    Per edge: the slope between layouts with equal neurons. Per neuron: the slope over [2, h, 2h, 3] of what is left after that; None
    where edges cost kilobytes, because the remainder is then the difference of two large numbers.
    """
    groups: dict[tuple, dict[str, list[dict]]] = {}
    for row in rows:
        key = (row["provider"], row["threads"], row["dtype"], row["weight_grads"])
        groups.setdefault(key, {"edges": [], "nodes": []})[row["series"]].append(row)
    found = []
    for (provider, threads, dtype, weight_grads), series in groups.items():
        if len(series["edges"]) < 2:
            continue
        per_edge = slope([(r["edges"], r["peak_bytes"]) for r in series["edges"]])
        rest = [(r["nodes"], r["peak_bytes"] - per_edge * r["edges"]) for r in series["nodes"] if per_edge < 1000]
        largest = max(series["edges"] + series["nodes"], key=lambda r: r["edges"])
        found.append({
            "provider": provider, "threads": threads, "dtype": dtype, "weight_grads": weight_grads,
            "bytes_per_edge": per_edge, "bytes_per_node": slope(rest) if len(rest) > 1 else None,
            "largest": largest["layout"], "largest_edges": largest["edges"], "largest_peak_bytes": largest["peak_bytes"],
        })  # fmt: skip
    return found


def points(provider: Provider, quick: bool) -> list[tuple[str, Case]]:
    """(series, case) of a provider. Those that keep kilobytes per edge get smaller networks, and no series for neurons."""
    kilobytes = provider.backend in (None, "reference")
    equal = EQUAL_NODES_SMALL if quick or kilobytes else EQUAL_NODES
    hidden = () if kilobytes else HIDDEN_QUICK if quick else HIDDEN
    return [("edges", Case.parse(text)) for text in equal] + [("nodes", Case((2, h, 2 * h, 3))) for h in hidden]


def show(rows: list[dict]) -> None:
    table = Table(title="Peak memory of a training step", title_justify="left")
    for column in ("provider", "dtype", "weight grads", "bytes / edge", "bytes / neuron", "largest network", "its peak"):
        table.add_column(column, justify="left" if column in ("provider", "dtype") else "right")
    for row in summary(rows):
        nodes = "" if row["bytes_per_node"] is None else f"{row['bytes_per_node']:,.0f}"
        table.add_row(
            row["provider"], row["dtype"], "on" if row["weight_grads"] else "off", f"{row['bytes_per_edge']:,.1f}", nodes,
            f"{row['largest']} ({row['largest_edges']:,} edges)", f"{row['largest_peak_bytes'] / 2**20:,.0f} MiB",
        )  # fmt: skip
    console.print(table)


def main(
    providers: Annotated[str, typer.Option(help=f"Who is measured: default, or some of {', '.join(PROVIDERS)}.")] = "default",
    weight_grads: Annotated[str, typer.Option(help="Gradients of the input weights: on, off or both.")] = "off,on",
    threads: Annotated[int, typer.Option(help="Number of threads; memory in flight may grow with it.")] = 1,
    dtype: Annotated[str, typer.Option(help="fp32, or bf16 for torch.autocast.")] = "fp32",
    malloc: Annotated[
        str, typer.Option(help="fixed: freed blocks of 1 MiB go back at once (glibc). default: as the system does.")
    ] = "fixed",
    quick: Annotated[bool, typer.Option("--quick", help="Small networks, few of them, recorded apart: does everything run?")] = False,
    request: Annotated[str, typer.Option("--child", hidden=True)] = "",
) -> None:
    """Measures peak bytes of a training step of NG-GNN and their slope in edges and in neurons; appends one JSON line per point.

    Bytes per edge come from two networks with the same number of neurons and a different number of edges; bytes per neuron from
    [2, h, 2h, 3] for several h, with the edges' bytes subtracted. Every point is a fresh process, two steps long.
    """
    if request:
        print(json.dumps(child(json.loads(request))))
        return
    from benchmarks.train_step import choices

    grads = choices(weight_grads, ("off", "on"), "--weight-grads")
    choices(malloc, tuple(MALLOC), "--malloc")
    chosen, missing = usable(providers)
    for name, reason in missing.items():
        console.print(f"left out: {name}: {reason}", style="yellow", markup=False)
    run = records.new_run()
    todo = [(p, g, s, c) for p in chosen for g in grads for s, c in points(p, quick)]
    rows, failures = [], []
    for provider, grad, series, case in track(todo, "measuring", console=console, transient=True):
        try:
            rows.append(measure(run, provider, case, grad == "on", threads, dtype, series, malloc, "memory-quick" if quick else "memory"))
        except RuntimeError as failure:  # shown, and the exit status tells
            failures.append(str(failure))
    show(rows)
    for failure in failures:
        console.print(f"not measured: {failure}", style="red", markup=False, highlight=False, soft_wrap=True)
    if failures:
        raise SystemExit(f"{len(failures)} not measured, reasons above")


if __name__ == "__main__":
    typer.run(main)

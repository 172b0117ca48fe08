"""Peak memory of a training step, per edge, per neuron and per pair of neurons, each point measured in a fresh process.

Everything counts: raw weights, their gradients, parameters' gradients, index lists, what the allocator keeps. What the process held
before the model was built (interpreter, libraries, a warm-up on a tiny network) does not.
"""

from __future__ import annotations

import json
import math
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
from benchmarks.models import MODELS, Model
from benchmarks.providers import PROVIDERS, Provider, usable
from neural_graphs.report.process import held_bytes, reset_peak, trim

# Layouts with the same number of neurons: the slope of the peak over edges is the cost of an edge. The layout with few edges is there in
# both orientations, because what a wide layer holds while it is computed depends on which side is wide.
EQUAL_NODES = ("2x3072x3072x3", "2x1024x5120x3", "2x5120x1024x3")
EQUAL_NODES_SMALL = ("2x512x512x3", "2x64x960x3", "2x960x64x3")
HIDDEN, HIDDEN_QUICK = (128, 256, 512, 1024, 1536), (128, 512)
# NG-T among all neurons: the pairs grow with the square of the neurons, and no layout has few of them.
PAIRS, PAIRS_SMALL = ("2x256x512x3", "2x512x1024x3", "2x1024x2048x3"), ("2x32x64x3", "2x64x128x3", "2x128x256x3")
WARM = "2x8x8x3"
# glibc raises its threshold for separate mappings with every large block freed, and then keeps freed blocks: peaks jump by tens of percent
# with the order of sizes. A fixed threshold makes the peak that of live memory, for every provider alike; --malloc default leaves it.
# It is the one that glibc starts with: with one of 1 MiB, node states (0.8 MB for 6,149 neurons) came from the heap, and the holes that
# a first step left there raised the peak of the second by up to 9 MB, at random: 2 bytes per edge.
MALLOC = {"fixed": {"MALLOC_MMAP_THRESHOLD_": str(2**17)}, "default": {}}
console = Console() if sys.stdout.isatty() else Console(width=120)


def limit(model: Model, case: Case) -> int | None:
    """Bytes that a step of this project may take: NG-T over all pairs has to do with what its edges and neurons need."""
    return 16 * case.edges + 30_000 * case.nodes + 40 * 2**20 if model.name == "ng-t" else None


def step_on(case: Case, model: Model, provider: Provider, dtype: str, weight_grads: bool, steps: int, runner=None):
    """Builds model and inputs and runs some steps; returns the runner."""
    from benchmarks.providers import Runner

    if runner is None:
        oracle = model.new_oracle(case)
        runner = Runner(model, provider, case, oracle)
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
    args = (MODELS[request["model"]], provider, request["dtype"], request["weight_grads"])
    kept = step_on(case if provider.compiled else Case.parse(WARM), *args, steps=2)
    if provider.compiled and hasattr(kept.model, "edge_index_cache"):
        kept.model.edge_index_cache.clear()
    if not provider.compiled:
        kept = None
    trim()
    before, exact = held_bytes("VmRSS"), reset_peak()
    start, own = time.perf_counter(), time.process_time()
    step_on(case, *args, steps=2, runner=kept)
    seconds, own = (time.perf_counter() - start) / 2, (time.process_time() - own) / 2
    peak = held_bytes("VmHWM")
    return {
        "before_bytes": before,
        "peak_bytes": peak - before,
        "method": "VmHWM" if exact else "ru_maxrss",
        "seconds": seconds,
        "cpu_seconds": own,
    }


def measure(
    run: str, model: Model, provider: Provider, case: Case, weight_grads: bool, threads: int, dtype: str, series: str, malloc: str,
    name: str = "memory",
) -> dict:  # fmt: skip
    """Starts a fresh process for one point and records what it found."""
    request = {
        "model": model.name, "provider": provider.name, "layout": list(case.layout), "batch": case.batch,
        "threads": threads, "dtype": dtype, "weight_grads": weight_grads, "malloc": malloc,
    }  # fmt: skip
    command = [sys.executable, "-m", "benchmarks.memory", "--child", json.dumps(request)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, **MALLOC[malloc]}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        tail = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise RuntimeError(f"memory: {model.name} {provider.name} at {case.label} failed: {tail[0]}")
    result = json.loads(done.stdout.splitlines()[-1])
    sizes = {"edges": case.edges, "nodes": case.nodes, "pairs": case.pairs, "limit_bytes": limit(model, case) if provider.ours else None}
    return records.append(name, run, {**request, "series": series, **sizes, **result})


def slope(points: list[tuple[float, float]]) -> float:
    """Least-squares slope of y over x."""
    mean_x, mean_y = (sum(p[i] for p in points) / len(points) for i in (0, 1))
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)


def exponent(points: list[tuple[float, float]]) -> float:
    """b of y = a x^b, by least squares over the logarithms."""
    return slope([(math.log(x), math.log(y)) for x, y in points])


def summary(rows: list[dict]) -> list[dict]:
    """Bytes per edge, per neuron and per pair of one run, by (model, provider, threads, dtype, weight gradients).

    Per edge: the slope between layouts with equal neurons. Per neuron: the slope over [2, h, 2h, 3] of what is left after that; None
    where edges cost kilobytes, because the remainder is then the difference of two large numbers. Per pair: the slope over [2, h, 2h, 3]
    for NG-T over all pairs, edges and neurons included; None for others. `time_exponent`: of processor
    seconds over edges, or of seconds where they are not recorded.
    """
    groups: dict[tuple, dict[str, list[dict]]] = {}
    for row in rows:
        key = (row["model"], row["provider"], row["threads"], row["dtype"], row["weight_grads"])
        groups.setdefault(key, {"edges": [], "nodes": [], "pairs": []})[row["series"]].append(row)
    found = []
    for (model, provider, threads, dtype, weight_grads), series in groups.items():
        if len(series["edges"]) < 2 and len(series["pairs"]) < 2:
            continue
        per_edge = slope([(r["edges"], r["peak_bytes"]) for r in series["edges"]]) if series["edges"] else None
        rest = [(r["nodes"], r["peak_bytes"] - per_edge * r["edges"]) for r in series["nodes"] if per_edge is not None and per_edge < 1000]
        every = series["edges"] + series["nodes"] + series["pairs"]
        largest = max(every, key=lambda r: r["edges"])
        found.append({
            "model": model, "provider": provider, "threads": threads, "dtype": dtype, "weight_grads": weight_grads,
            "bytes_per_edge": per_edge, "bytes_per_node": slope(rest) if len(rest) > 1 else None,
            "bytes_per_pair": slope([(r["pairs"], r["peak_bytes"]) for r in series["pairs"]]) if series["pairs"] else None,
            "time_exponent": exponent([(r["edges"], r.get("cpu_seconds", r["seconds"])) for r in every]),
            "largest": largest["layout"], "largest_edges": largest["edges"], "largest_peak_bytes": largest["peak_bytes"],
            "largest_seconds": largest["seconds"], "largest_limit_bytes": largest.get("limit_bytes"),
        })  # fmt: skip
    return found


def points(model: Model, provider: Provider, quick: bool) -> list[tuple[str, Case]]:
    """(series, case) of a provider. Those that keep kilobytes per edge get smaller networks, and no series for neurons."""
    kilobytes = provider.backend in (None, "reference")
    if model.name == "ng-t":
        return [("pairs", Case.parse(text)) for text in (PAIRS_SMALL if quick or kilobytes else PAIRS)]
    equal = EQUAL_NODES_SMALL if quick or kilobytes else EQUAL_NODES
    hidden = () if kilobytes else HIDDEN_QUICK if quick else HIDDEN
    return [("edges", Case.parse(text)) for text in equal] + [("nodes", Case((2, h, 2 * h, 3))) for h in hidden]


def number(value: float | None) -> str:
    """Three significant digits below 100, else an integer; - for nothing."""
    return "-" if value is None else f"{value:,.3g}" if abs(value) < 100 else f"{value:,.0f}"


def mebibytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**20:,.0f} MiB"


def show(model: Model, rows: list[dict]) -> None:
    table = Table(title=f"Peak memory of a training step of {model.text}", title_justify="left")
    names = (
        "provider",
        "dtype",
        "weight grads",
        "bytes / edge",
        "/ neuron",
        "/ pair",
        "largest network",
        "its peak",
        "limit",
        "s / step",
        "time ~ edges^",
    )
    for column in names:
        table.add_column(column, justify="left" if column in ("provider", "dtype") else "right")
    for row in summary(rows):
        table.add_row(
            row["provider"], row["dtype"], "on" if row["weight_grads"] else "off", number(row["bytes_per_edge"]), number(row["bytes_per_node"]),
            number(row["bytes_per_pair"]), f"{row['largest']} ({row['largest_edges']:,} edges)", mebibytes(row["largest_peak_bytes"]),
            mebibytes(row["largest_limit_bytes"]), number(row["largest_seconds"]), number(row["time_exponent"]),
        )  # fmt: skip
    console.print(table)


def main(
    model: Annotated[str, typer.Option(help=f"One of {', '.join(MODELS)}.")] = "ng-gnn",
    providers: Annotated[str, typer.Option(help=f"Who is measured: default, or some of {', '.join(PROVIDERS)}.")] = "default",
    weight_grads: Annotated[str, typer.Option(help="Gradients of the input weights: on, off or both.")] = "off,on",
    threads: Annotated[int, typer.Option(help="Number of threads; memory in flight may grow with it.")] = 1,
    dtype: Annotated[str, typer.Option(help="fp32, or bf16 for torch.autocast.")] = "fp32",
    malloc: Annotated[
        str, typer.Option(help="fixed: freed blocks of 128 KiB go back at once (glibc). default: as the system does.")
    ] = "fixed",
    quick: Annotated[bool, typer.Option("--quick", help="Small networks, few of them, recorded apart: does everything run?")] = False,
    request: Annotated[str, typer.Option("--child", hidden=True)] = "",
) -> None:
    """Measures peak bytes of a training step and their slope in edges, neurons and pairs of neurons; appends one JSON line per point.

    Bytes per edge come from networks with the same number of neurons and a different number of edges; bytes per neuron from
    [2, h, 2h, 3] for several h, with the edges' bytes subtracted; bytes per pair (ng-t) from [2, h, 2h, 3]. Every point is a fresh
    process, two steps long. A peak above its limit (ng-t: 16 bytes an edge, 30 kB a neuron, 40 MiB) is a failure.
    """
    if request:
        print(json.dumps(child(json.loads(request))))
        return
    from benchmarks.train_step import choices

    if model not in MODELS:
        raise typer.BadParameter(f"--model: expected one of {', '.join(MODELS)}, got {model!r}")
    subject = MODELS[model]
    grads = choices(weight_grads, ("off", "on"), "--weight-grads")
    choices(malloc, tuple(MALLOC), "--malloc")
    chosen, missing = usable(subject, providers)
    for name, reason in missing.items():
        console.print(f"left out: {name}: {reason}", style="yellow", markup=False)
    run = records.new_run()
    todo = [(p, g, s, c) for p in chosen for g in grads for s, c in points(subject, p, quick)]
    rows, failures = [], []
    for provider, grad, series, case in track(todo, "measuring", console=console, transient=True):
        try:
            name = "memory-quick" if quick else "memory"
            row = measure(run, subject, provider, case, grad == "on", threads, dtype, series, malloc, name)
        except RuntimeError as failure:  # shown, and the exit status tells
            failures.append(f"not measured: {failure}")
            continue
        rows.append(row)
        if row["limit_bytes"] is not None and row["peak_bytes"] > row["limit_bytes"]:
            failures.append(f"{case.label}: expected a peak of at most {mebibytes(row['limit_bytes'])}, got {mebibytes(row['peak_bytes'])}")
    show(subject, rows)
    for failure in failures:
        console.print(failure, style="red", markup=False, highlight=False, soft_wrap=True)
    if failures:
        raise SystemExit(f"{len(failures)} failed, reasons above")


if __name__ == "__main__":
    typer.run(main)

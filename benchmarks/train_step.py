"""Seconds per training step, this project and the baselines in one run, interleaved."""

from __future__ import annotations

import gc
import statistics
import sys
from collections.abc import Callable
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks import machine, records
from benchmarks.cases import Case
from benchmarks.gate import Gate
from benchmarks.models import MODELS, TIMED, Model
from benchmarks.providers import DTYPES, PROVIDERS, Provider, Runner, usable
from benchmarks.timing import Samples, interleave

console = Console() if sys.stdout.isatty() else Console(width=120)


def set_threads(threads: int) -> None:
    """Threads of PyTorch and of the code that torch.compile writes."""
    import torch._inductor.config as inductor

    torch.set_num_threads(threads)
    inductor.cpp.threads = threads
    torch._dynamo.reset()


def choices(text: str, allowed: tuple[str, ...], option: str) -> list[str]:
    """Values of a comma-separated option."""
    values = [v.strip() for v in text.split(",") if v.strip()]
    wrong = [v for v in values if v not in allowed]
    if wrong or not values:
        raise typer.BadParameter(f"{option}: expected some of {', '.join(allowed)}, got {text!r}")
    return values


def parse_cases(layouts: str, batch: int) -> list[Case]:
    try:
        return [Case.parse(text, batch) for text in layouts.split(",")]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


class Candidates:
    """The warm steps of one case: `steps` by (provider, dtype, weight gradients), the gate's `errors` by (provider, dtype).

    A provider that fails the gate, or fails at all, is left out; `failures` says why.
    """

    def __init__(
        self, model: Model, case: Case, providers: list[Provider], dtypes: list[str], grads: list[str], status: Callable[[str], None]
    ):
        self.steps, self.errors, self.failures = {}, {}, []
        oracle = model.new_oracle(case)
        gate = Gate(model, case, oracle)
        for provider in providers:
            for dtype in dtypes:
                status(f"{case.label}: {provider.name} {dtype}")
                try:
                    runner = Runner(model, provider, case, oracle)
                    error = gate.check(runner, dtype)
                    found = {(provider.name, dtype, grad): self.warm(runner, dtype, grad) for grad in grads}
                except Exception as reason:  # shown, and the exit status tells
                    lines = str(reason).strip().splitlines() or ["no message"]
                    self.failures.append(f"{provider.name} {dtype} at {case.label}: {type(reason).__name__}: {lines[0]}")
                    continue
                self.errors[provider.name, dtype] = error
                self.steps |= found

    @staticmethod
    def warm(runner: Runner, dtype: str, grad: str) -> Callable[[], None]:
        """A step that has run twice: compiled, allocated."""
        weights, biases, labels = runner.case.inputs()
        for weight in weights:
            weight.requires_grad_(grad == "on")

        def step():
            runner.step(weights, biases, labels, dtype)

        step()
        step()
        return step


def record(name: str, run: str, model: Model, case: Case, key: tuple, samples: Samples, threads: int, rates: dict, error) -> dict:
    """One measurement as it is stored."""
    provider, dtype, grad = key
    todo = model.work(case, grad == "on")
    peak = rates["gemm_bf16" if dtype == "bf16" else "gemm_fp32"]
    bound = todo.bound_seconds(peak, rates["copy"])
    measurement = {
        "model": model.name,
        "provider": provider,
        "layout": list(case.layout),
        "batch": case.batch,
        "edges": case.edges,
        "nodes": case.nodes,
        "pairs": case.pairs,
        "threads": threads,
        "dtype": dtype,
        "weight_grads": grad == "on",
        "seconds": samples.seconds,
        "cpu_seconds": samples.cpu_seconds,
        "foreign_cores": samples.foreign,
        "calls_per_sample": samples.calls,
        "median": samples.median,
        "cpu_median": statistics.median(samples.cpu_seconds),
        "noisy": samples.noisy,
        "flops": todo.flops,
        "bytes": todo.bytes,
        "rates": rates,
        "bound_seconds": bound,
        "share": bound / samples.median,
        "errors": error,
    }
    return records.append(name, run, measurement)


def show(model: Model, case: Case, threads: int, rows: list[dict]) -> None:
    """The table of one case: seconds, roofline share, and how many times faster than the fastest baseline."""
    count, unit = model.unit
    sizes = f"{case.edges:,} edges" + (f", {case.pairs:,} pairs" if count == "pairs" else "")
    table = Table(title=f"{model.text}, {case.label}: {sizes}, {threads} thread{'s' * (threads > 1)}", title_justify="left")
    for column in ("provider", "dtype", "weight grads", "s / step", unit, "roofline", "x best baseline", "samples"):
        table.add_column(column, justify="left" if column in ("provider", "dtype") else "right")
    for row in rows:
        same = [r for r in rows if r["weight_grads"] == row["weight_grads"] and r["dtype"] in ("fp32", row["dtype"])]
        rivals = [r["median"] for r in same if not PROVIDERS[r["provider"]].ours]
        ratio = f"{min(rivals) / row['median']:.2f}" if rivals and PROVIDERS[row["provider"]].ours else ""
        table.add_row(
            row["provider"], row["dtype"], "on" if row["weight_grads"] else "off", f"{row['median']:.4g}",
            f"{row['median'] / row[count] * 1e6:.3f}", f"{row['share']:.1%}", ratio, f"{len(row['seconds'])}{' noisy' if row['noisy'] else ''}",
        )  # fmt: skip
    console.print(table)


def measure(run, model, case, providers, dtypes, grads, threads, rates, samples, quick) -> list[str]:
    """Gate, warm-up, timing, records and table of one case; returns what failed."""
    want, rounds, length = (2, 5, 0.05) if quick else (samples, 4 * samples, 0.3)
    bar = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn())
    with Progress(*bar, console=console, transient=True) as progress:
        task = progress.add_task(case.label, total=rounds)
        ready = Candidates(model, case, providers, dtypes, grads, lambda text: progress.update(task, description=text))
        progress.update(task, description=f"{case.label}: timing")
        found = interleave(ready.steps, want, rounds, length, tick=lambda: progress.advance(task))
    for failure in ready.failures:
        console.print(f"not measured: {failure}", style="red", markup=False, highlight=False, soft_wrap=True)
    name = "train_step-quick" if quick else "train_step"
    rows = [record(name, run, model, case, key, s, threads, rates, ready.errors[key[:2]]) for key, s in found.items()]
    show(model, case, threads, rows)
    failures = ready.failures
    del ready, found
    gc.collect()
    torch._dynamo.reset()
    return failures


def main(
    model: Annotated[str, typer.Option(help=f"{' or '.join(TIMED)}.")] = "ng-gnn",
    layouts: Annotated[
        str, typer.Option(help="Layouts, e.g. 2x64x128x3; @64 sets that layout's own batch size; default: the model's.")
    ] = "",
    batch: Annotated[int, typer.Option(help="Batch size of layouts that have none of their own.")] = 1,
    threads: Annotated[str, typer.Option(help="Numbers of threads to measure with, e.g. 1,2.")] = "1",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or both; bf16 is torch.autocast on the CPU.")] = "fp32",
    weight_grads: Annotated[str, typer.Option(help="Gradients of the input weights: on, off or both.")] = "off,on",
    providers: Annotated[str, typer.Option(help=f"Who is timed: default, or some of {', '.join(PROVIDERS)}.")] = "default",
    samples: Annotated[int, typer.Option(help="Quiet samples wanted of each; a sample lasts 0.3 s or one step.")] = 5,
    quick: Annotated[bool, typer.Option("--quick", help="Two small layouts, short samples, recorded apart: does everything run?")] = False,
) -> None:
    """Times forward + cross-entropy + backward of a model and appends one JSON line per measurement.

    Before a provider is timed, its logits, its gradients of the input weights and of the parameters must agree with the published
    baseline in float64. Compile time is not counted. Read `x best baseline` as: so many times faster than the fastest baseline of the
    same run; in bf16 rows a baseline may use fp32 or autocast, whichever is faster. Below 1 the baseline wins.
    """
    if model not in TIMED:
        raise typer.BadParameter(f"--model: expected {' or '.join(TIMED)}, got {model!r}")
    subject = MODELS[model]
    grads, dtypes = choices(weight_grads, ("off", "on"), "--weight-grads"), choices(dtype, DTYPES, "--dtype")
    cases = parse_cases(layouts or (subject.quick if quick else subject.layouts), batch)
    counts = [int(n) for n in choices(threads, tuple(map(str, range(1, 1025))), "--threads")]
    chosen, missing = usable(subject, providers)
    for name, reason in missing.items():
        console.print(f"left out: {name}: {reason}", style="yellow", markup=False)
    run, failures = records.new_run(), []
    for count in counts:
        set_threads(count)
        rates = machine.rates(dtypes, quick)
        console.print(f"{count} threads: " + ", ".join(f"{k} {v / 1e9:.0f} G{'B' if k == 'copy' else 'FLOP'}/s" for k, v in rates.items()))
        for case in cases:
            failures += measure(run, subject, case, chosen, dtypes, grads, count, rates, samples, quick)
    if failures:
        raise SystemExit(f"{len(failures)} not measured, reasons above")


if __name__ == "__main__":
    typer.run(main)

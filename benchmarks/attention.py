"""Seconds of one attention, `ngkernels.attend` beside the attention ops of PyTorch and PyG, where they can express it.

The problems, and what each op can say of them, stand in benchmarks/attention_problems.py. Each is timed forward, and forward with
backward. Nothing is timed whose result and gradients differ from the plain formula (sdpa, dense, pyg) in float64.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

import ngkernels as ngk
from benchmarks import machine, records
from benchmarks.attention_problems import HEADS, HIDDEN, WIDTH, Inputs, contenders
from benchmarks.cases import Case
from benchmarks.timing import Samples, interleave

LAYOUTS, QUICK = "2x32x32x1@16,2x64x128x3,2x128x256x3", "2x8x16x3"
TOLERANCE = 1e-4  # in the 2-norm, float32 against float64
DIRECTIONS = ("forward", "forward_backward")
FLOPS = {  # per pair or edge, forward: logits, weighted values, for each head the weighted sum of states; and what is no table
    "additive": 4 * HIDDEN,
    "relational": 4 * HIDDEN + 2 * HEADS * WIDTH,
    "sparse": 4 * HIDDEN + 2 * HEADS * WIDTH + 2 * WIDTH * HIDDEN,
}
console = Console() if sys.stdout.isatty() else Console(width=120)


def run(call: Callable[[Inputs], Tensor], data: Inputs, direction: str) -> list[Tensor | None]:
    """The result, and with backward the gradients of a weighted sum of it for all leaves."""
    with torch.set_grad_enabled(direction != "forward"):
        out = call(data)
        if direction == "forward":
            return [out]
        coefficients = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        return [out, *torch.autograd.grad(out, data.leaves, coefficients, allow_unused=True)]


def check(name: str, found: list[Tensor | None], true: list[Tensor | None]) -> float:
    """The larger relative error in the 2-norm, of the result and of all its gradients together (some are 0, and have none alone).

    Raises:
        RuntimeError: it is above TOLERANCE.
    """
    errors = []
    for part in (slice(0, 1), slice(1, None)):
        pairs = [
            (f.double().flatten(), t.flatten()) for f, t in zip(found[part], true[part], strict=True) if f is not None and t is not None
        ]
        if pairs:
            mine, exact = (torch.cat(side) for side in zip(*pairs))
            errors.append(((mine - exact).norm() / exact.norm()).item())
    if not max(errors) <= TOLERANCE:
        raise RuntimeError(f"gate: {name}: expected a relative error of at most {TOLERANCE}, got {max(errors):.2g}; not timed")
    return max(errors)


def reason_of(error: Exception) -> str:
    """One line; of what torch.compile wraps, the inner one."""
    inner = re.search(r"raised exception (\w+)\('(.*?)'\)", str(error))
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{inner[1]}: {inner[2]}" if inner else f"{type(error).__name__}: {lines[0]}"


def measure(problem: str, case: Case, threads: int, rates: dict, run_name: str, quick: bool) -> tuple[list[dict], list[tuple[str, bool]]]:
    """Gate, timing and records of one problem on one case; what could not be measured, and whether that is because it is not built."""
    channels = WIDTH if problem == "sparse" else 1
    plain = list(contenders(problem, case, torch.float64).values())[1]
    data, exact = Inputs(case, channels), Inputs(case, channels, torch.float64)
    true = run(plain, exact, "forward_backward")
    ready, errors, failures = {}, {}, []
    for name, call in contenders(problem, case).items():
        for direction in DIRECTIONS:
            try:
                errors[name, direction] = check(
                    f"{problem} {name}", run(call, data, direction), true[: 1 if direction == "forward" else None]
                )
            except Exception as error:  # shown; unless the op is not built there, the exit status tells
                failures.append((f"{problem} {name} {direction} at {case.label}: {reason_of(error)}", "NotImplementedError" in str(error)))
                continue
            ready[name, direction] = lambda call=call, direction=direction: run(call, data, direction)
    want, rounds, length = (2, 5, 0.05) if quick else (5, 20, 0.3)
    timed = interleave(ready, want, rounds, length)
    return [record(problem, case, threads, rates, run_name, quick, key, s, errors[key]) for key, s in timed.items()], failures


def record(problem, case: Case, threads: int, rates: dict, run_name: str, quick: bool, key: tuple, samples: Samples, error: float) -> dict:
    """One measurement as it is stored."""
    name, direction = key
    count = case.edges if problem == "sparse" else case.pairs
    flops = count * FLOPS[problem] * (1 if direction == "forward" else 4)
    measurement = {
        "problem": problem, "provider": name, "direction": direction, "layout": list(case.layout), "batch": case.batch, "edges": case.edges,
        "nodes": case.nodes, "pairs": case.pairs, "read_pairs": count, "threads": threads, "dtype": "fp32", "seconds": samples.seconds,
        "cpu_seconds": samples.cpu_seconds, "foreign_cores": samples.foreign, "calls_per_sample": samples.calls, "median": samples.median,
        "noisy": samples.noisy, "flops": flops, "rates": rates, "share": flops / rates["gemm_fp32"] / samples.median, "error": error,
    }  # fmt: skip
    return records.append("attention-quick" if quick else "attention", run_name, measurement)


def show(case: Case, rows: list[dict]) -> None:
    table = Table(title=f"attention, {case.label}: {case.edges:,} edges, {case.pairs:,} pairs", title_justify="left")
    for column in ("problem", "provider", "direction", "s", "us / pair read", "x ngk-cpp", "samples"):
        table.add_column(column, justify="left" if column in ("problem", "provider", "direction") else "right")
    for row in rows:
        same = (r["median"] for r in rows if all(r[k] == row[k] for k in ("problem", "direction")) and r["provider"] == "ngk-cpp")
        ours = next(same, None)
        table.add_row(
            row["problem"], row["provider"], row["direction"], f"{row['median']:.4g}", f"{row['median'] / row['read_pairs'] * 1e6:.3f}",
            "-" if ours is None else f"{row['median'] / ours:.2f}", f"{len(row['seconds'])}{' noisy' if row['noisy'] else ''}",
        )  # fmt: skip
    console.print(table)


def compare(problems: list[str], cases: list[Case], threads: int, quick: bool) -> None:
    """Measures, records and shows."""
    from benchmarks.train_step import set_threads

    set_threads(threads)
    rates, run_name, wrong = machine.rates(["fp32"], quick), records.new_run(), 0
    for case in cases:
        rows = []
        for problem in problems:
            found, failures = measure(problem, case, threads, rates, run_name, quick)
            rows += found
            for failure, missing in failures:
                wrong += not missing
                console.print(
                    f"not measured: {failure}", style="yellow" if missing else "red", markup=False, highlight=False, soft_wrap=True
                )
        show(case, rows)
    if wrong:
        raise SystemExit(f"{wrong} not measured, reasons above")


def main(
    layouts: Annotated[str, typer.Option(help="Layouts, e.g. 2x64x128x3; @16 sets that layout's own batch size.")] = "",
    problems: Annotated[str, typer.Option(help=f"Some of {', '.join(FLOPS)}.")] = ",".join(FLOPS),
    threads: Annotated[int, typer.Option(help="Number of threads.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="A small layout, short samples, recorded apart: does everything run?")] = False,
) -> None:
    """Times one attention of this project, PyTorch and PyG, and appends one JSON line per measurement.

    What each can express stands in benchmarks/attention_problems.py. `x ngk-cpp`: so many times the seconds of this project. What cannot run is named
    (flex_attention has no backward on CPUs).
    """
    from benchmarks.train_step import choices, parse_cases

    wanted = choices(problems, tuple(FLOPS), "--problems")
    with ngk.use_backend("cpp"):
        compare(wanted, parse_cases(layouts or (QUICK if quick else LAYOUTS), 1), threads, quick)


if __name__ == "__main__":
    typer.run(main)

"""Training steps on a GPU: our kernels, eager and captured as a CUDA graph, beside the published baselines, eager and compiled, and
FlexAttention, in one run.

`python -m benchmarks.gpu` appends one record for each measurement to results/<device>/gpu.jsonl: raw times of single steps by CUDA
events, peak bytes of the allocator, what was measured and on what. Before anything is timed its logits must agree with the oracle's in
float64, where that has the memory. Ceilings are measured first (benchmarks.gpu_rates); of NG-GNN, the share of the one that binds is written
down with each time. Steps over a billion edges (benchmarks.gpu_large) come before the models that compile for longest. Nothing is estimated; a provider that fails is written down
with its error.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

import ngkernels as ngk
from benchmarks import flex, gpu_large, machine, records
from benchmarks.cases import Case
from benchmarks.models import MODELS, Model, nggnn_of
from benchmarks.providers import PROVIDERS, Provider, Runner
from ngkernels.tune import event_seconds

LIMITS = {"fp32": 1e-4, "tf32": 1e-2, "bf16": 5e-2}  # relative error of logits against float64


@dataclass(frozen=True)
class Plan:
    """What is measured of a model: layouts, a few of them for a first look, and its rivals. columns: of NG-GNN's states, 0: another model.
    slow: whether Triton takes minutes to compile it."""

    model: Model
    layouts: str
    quick: str
    rivals: tuple[str, ...]
    columns: int = 0
    slow: bool = False


ATTENTION = (("2x256x512x3", 128), ("2x1024x2048x3", 128))  # layouts for attend beside FlexAttention, columns of queries
PLANS = (
    Plan(
        MODELS["ng-gnn"], "2x32x32x3@64,2x32x32x3@4096,2x256x512x3,2x1024x2048x3,2x2048x4096x3,2x4096x8192x3", "2x32x32x3@64,2x256x512x3,2x2048x4096x3",
        ("pyg-tuned", "pyg-tuned-compile"), 32,
    ),
    Plan(nggnn_of(64), "2x256x512x3,2x1024x2048x3,2x2048x4096x3", "2x256x512x3", ("pyg-tuned",), 64),
    Plan(MODELS["ng-t"], "2x32x32x1@16,2x64x128x3,2x256x512x3", "2x32x32x1@16", ("dense", "dense-compile"), slow=True),
)  # fmt: skip


@dataclass(frozen=True)
class Contender:
    """captured: as a CUDA graph, which the host launches at once."""

    provider: Provider
    precision: str
    captured: bool = False

    @property
    def name(self) -> str:
        return f"{self.provider.name}-{self.precision}{'-captured' * self.captured}"


OURS = (Provider("ngk-triton", "ngkernels, Triton kernels", backend="triton"), Provider("ngk-cuda", "ngkernels, CUDA kernels", backend="cuda"))


def contenders(plan: Plan, quick: bool) -> list[Contender]:
    """Every provider in every precision. A first look: rivals in tf32, Triton in bf16 and last, as its kernels have to be compiled."""
    ours = {p.name: [Contender(p, precision, captured) for precision in LIMITS for captured in (False, True)] for p in OURS}
    rivals = [Contender(PROVIDERS[name], precision) for precision in (["tf32"] if quick else LIMITS) for name in plan.rivals]
    triton = [c for c in ours.pop("ngk-triton", []) if not quick or (c.precision == "bf16" and not plan.slow)]
    return [*itertools.chain(*ours.values()), *rivals, *triton]


def step_of(model: Model, contender: Contender, case: Case, oracle: nn.Module, device: torch.device) -> Callable[[], Tensor]:
    """A training step (forward, cross-entropy, backward, weight gradients included) that gives the logits."""
    runner = Runner(model, contender.provider, case, oracle)
    runner.model.to(device)
    weights, biases, labels = case.inputs()
    weights = [w.to(device).requires_grad_() for w in weights]
    biases, labels = [b.to(device) for b in biases], labels.to(device)
    low = contender.precision == "bf16"

    def step() -> Tensor:
        torch.set_float32_matmul_precision("high" if contender.precision == "tf32" else "highest")
        runner.model.zero_grad(set_to_none=True)
        for w in weights:
            w.grad = None
        with torch.autocast(device.type, torch.bfloat16, enabled=low):
            logits = runner.call(weights, biases)
            loss = nn.functional.cross_entropy(logits.float(), labels)
        loss.backward()
        return logits.detach()

    def forced() -> Tensor:
        with ngk.use_backend(contender.provider.backend) if contender.provider.ours else contextlib.nullcontext():
            return step()

    return forced


def captured(step: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """The step as a CUDA graph: replayed, on the same weights, with the same gradients."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step()

    def replay() -> Tensor:
        graph.replay()
        return logits

    return replay


def truth(model: Model, case: Case, oracle: nn.Module, device: torch.device) -> Tensor:
    """Logits of the oracle in float64."""
    name = PLANS[[p.model for p in PLANS].index(model)].rivals[0]
    baseline = Runner(model, replace(PROVIDERS[name], compiled=False), case, oracle).model.double().to(device)
    weights, biases, _ = case.inputs()
    with torch.no_grad():
        return baseline([w.double().to(device) for w in weights], [b.double().to(device) for b in biases])


def timed(step: Callable[[], Tensor], device: torch.device, samples: int) -> tuple[list[float], int]:
    """Seconds of single steps after three to warm up, and the peak of allocated bytes in one."""
    for _ in range(3):
        step()
    torch.cuda.reset_peak_memory_stats(device)
    seconds = event_seconds(step, samples)
    return seconds, torch.cuda.max_memory_allocated(device)


def measure(model: Model, contender: Contender, case: Case, oracle: nn.Module, true: Tensor | None, device: torch.device, samples: int) -> dict:
    """One measurement, or the error that prevented it."""
    found = {"model": model.name, "contender": contender.name, "precision": contender.precision, "layout": list(case.layout), "batch": case.batch, "edges": case.edges}
    try:
        step = step_of(model, contender, case, oracle, device)
        if contender.captured:
            step = captured(step, device)
        logits = step()
        if true is not None:
            error = ((logits.double() - true).norm() / true.norm()).item()
            found["error"] = error
            if not error <= LIMITS[contender.precision]:
                raise RuntimeError(f"gate: expected a relative error of at most {LIMITS[contender.precision]}, got {error}")
        seconds, peak = timed(step, device, samples)
        found |= {"seconds": seconds, "median": statistics.median(seconds), "peak_bytes": peak}
    except Exception as reason:  # written down, so that nothing is missing without a word
        found["failed"] = f"{type(reason).__name__}: {(str(reason).splitlines() or [''])[0][:300]}"
    finally:
        torch._dynamo.reset()
        torch.cuda.empty_cache()
    return found


def measure_attention(text: str, width: int, device: torch.device, samples: int) -> list[dict]:
    """Attention over all neurons, forward and backward, where FlexAttention can express it, in the precisions that PyTorch's products have."""
    case, found = Case.parse(text), []
    p = flex.Problem.random(case.layout, width=width, device=device.type)
    with ngk.use_backend("triton"):
        torch.set_float32_matmul_precision("highest")
        true = flex.ours(p).detach().double()
    compiled = torch.compile(flex.flex_attention)
    functions = {provider.name: (flex.ours, provider.backend) for provider in OURS} | {"flex": (lambda p: flex.flex(p, compiled), "triton")}
    for precision in ("fp32", "tf32"):
        for name, (function, backend) in functions.items():
            entry = {"model": "attend", "contender": f"{name}-{precision}", "precision": precision, "layout": list(case.layout), "batch": 1, "edges": case.edges}
            torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
            try:
                with ngk.use_backend(backend):
                    step = flex.step_of(function, p)
                    entry["error"] = ((step().double() - true).norm() / true.norm()).item()
                    if not entry["error"] <= LIMITS[precision]:
                        raise RuntimeError(f"gate: expected a relative error of at most {LIMITS[precision]}, got {entry['error']}")
                    seconds, peak = timed(step, device, samples)
                entry |= {"seconds": seconds, "median": statistics.median(seconds), "peak_bytes": peak}
            except Exception as reason:  # written down, so that nothing is missing without a word
                entry["failed"] = f"{type(reason).__name__}: {(str(reason).splitlines() or [''])[0][:300]}"
            torch.cuda.empty_cache()
            found.append(entry)
    return found


def measure_large(device: torch.device, quick: bool, samples: int) -> Iterator[dict]:
    """Steps over a billion edges; one is timed for a first look."""
    torch.set_float32_matmul_precision("highest")
    for subject in gpu_large.SUBJECTS:
        torch.cuda.empty_cache()
        layout = subject.quick if quick else gpu_large.LAYOUT
        yield gpu_large.measure(subject, layout, device, torch.cuda.mem_get_info(device)[0], 1 if quick else samples)


def line_of(found: dict) -> str:
    """One measurement in one line."""
    share = f" {found['share']:6.1%} of {found['binding']}" if "share" in found else ""
    result = found.get("failed") or found.get("skipped") or f"{found['median'] * 1e3:10.3f} ms {found['peak_bytes'] / 2**20:8.0f} MiB{share}"
    return f"{found['model']:10} {'x'.join(map(str, found['layout']))}@{found['batch']:<6} {found['contender']:24} {result}"


def is_wrong(found: dict) -> bool:
    """Whether a measurement failed that should not: that a rival runs out of memory is a result."""
    return "failed" in found and (found["contender"].startswith("ngk") or not found["failed"].startswith("OutOfMemoryError"))


def measure_models(rates: dict[str, dict[str, float]], device: torch.device, quick: bool, samples: int) -> Iterator[dict]:
    """Every contender on every layout, with the share of the ceiling that binds where that is known."""
    from benchmarks import gpu_rates  # needs Triton

    for plan in PLANS:
        for text in (plan.quick if quick else plan.layouts).split(","):
            case = Case.parse(text)
            oracle = plan.model.new_oracle(case)
            true = truth(plan.model, case, oracle, device) if plan.model.oracle_bytes(case) < 8 << 30 else None
            for contender in contenders(plan, quick):
                found = measure(plan.model, contender, case, oracle, true, device, samples)
                if plan.columns and "median" in found:
                    needed = gpu_rates.needed_by_nggnn(case, plan.columns)
                    found["binding"], found["share"] = gpu_rates.share(needed, rates[contender.precision], found["median"])
                yield found


def main(
    samples: Annotated[int, typer.Option(help="Steps timed of each.")] = 20,
    quick: Annotated[bool, typer.Option("--quick", help="A few layouts, rivals in one precision.")] = False,
) -> None:
    """Measures every contender on every layout, one after the other, and appends the results."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("a CUDA device is needed, and there is none")
    from benchmarks import gpu_rates  # needs Triton

    device, run = torch.device("cuda"), records.new_run()
    properties = torch.cuda.get_device_properties(device)
    place = {"slug": machine.slug(properties.name), "model": properties.name, "capability": [properties.major, properties.minor], "memory_bytes": properties.total_memory}
    rates = gpu_rates.measured(device)
    records.append("gpu", run, {"model": "ceilings", "rates": rates, "device": place})
    for precision, ceilings in rates.items():
        typer.echo(f"ceilings {precision:5} " + " ".join(f"{name} {value:.4g}/s" for name, value in ceilings.items()))
    models = measure_models(rates, device, quick, samples)
    attention = (found for text, width in ATTENTION[: 1 if quick else None] for found in measure_attention(text, width, device, samples))
    wrong = 0
    for found in itertools.chain(measure_large(device, quick, 3), models, attention):
        records.append("gpu", run, {**found, "device": place})
        typer.echo(line_of(found))
        wrong += is_wrong(found)
    if wrong:
        raise SystemExit(f"{wrong} not measured, reasons above and in benchmarks/results/{place['slug']}/gpu.jsonl")


if __name__ == "__main__":
    typer.run(main)

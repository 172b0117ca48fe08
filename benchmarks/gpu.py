"""Training steps on a GPU: the Triton kernels beside the published baselines, eager and compiled, and FlexAttention, in one run.

`python -m benchmarks.gpu` appends one record for each measurement to results/<device>/gpu.jsonl: raw times of single steps by CUDA
events, peak bytes of the allocator, what was measured and on what. Before anything is timed its logits must agree with the oracle's in
float64. Ceilings are measured first (benchmarks.gpu_rates); of NG-GNN, the share of the one that binds is written down with each time.
Nothing is estimated; a provider that fails is written down with its error.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

import ngkernels as ngk
from benchmarks import flex, machine, records
from benchmarks.cases import CLASSES, Case
from benchmarks.models import MODELS, Model, pyg
from benchmarks.providers import PROVIDERS, Provider, Runner
from neural_graphs.models import NGGNN, NGT
from ngkernels.tune import event_seconds

LIMITS = {"fp32": 1e-4, "tf32": 1e-2, "bf16": 5e-2}  # relative error of logits against float64


@dataclass(frozen=True)
class Plan:
    """What is measured of a model: layouts, a few of them for a first look, its rivals, and of NG-GNN the columns of its states."""

    model: Model
    layouts: str
    quick: str
    rivals: tuple[str, ...]
    width: int | None = None


ATTENTION = (("2x256x512x3", 128), ("2x1024x2048x3", 128))  # layouts for attend beside FlexAttention, columns of queries
SPARSE = ("pyg-tuned", "pyg-tuned-compile")
PLANS = (
    Plan(MODELS["ng-gnn"], "2x32x32x3@64,2x32x32x3@4096,2x256x512x3,2x1024x2048x3,2x2048x4096x3,2x4096x8192x3", "2x32x32x3@64,2x2048x4096x3", SPARSE, 32),
    Plan(replace(MODELS["ng-gnn"], name="ng-gnn-64", oracle=partial(pyg, width=64)), "2x256x512x3,2x1024x2048x3", "2x1024x2048x3", SPARSE, 64),
    Plan(MODELS["ng-t"], "2x32x32x1@16,2x64x128x3,2x256x512x3", "2x32x32x1@16", ("dense", "dense-compile")),
)


@dataclass(frozen=True)
class Contender:
    provider: Provider
    precision: str

    @property
    def name(self) -> str:
        return f"{self.provider.name}-{self.precision}"


OURS = (Provider("ngk-triton", "ngkernels, Triton kernels", backend="triton"), Provider("ngk-cuda", "ngkernels, CUDA kernels", backend="cuda"))


def contenders(plan: Plan, quick: bool) -> list[Contender]:
    """Every provider in every precision; for a first look our kernels in each, rivals in one."""
    found = [Contender(provider, precision) for provider in OURS for precision in LIMITS]
    return found + [Contender(PROVIDERS[name], precision) for precision in (["tf32"] if quick else LIMITS) for name in plan.rivals]


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


def truth(model: Model, case: Case, oracle: nn.Module, device: torch.device) -> Tensor:
    """Logits of the oracle in float64."""
    name = next(p.rivals[0] for p in PLANS if p.model is model)
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


@dataclass(frozen=True)
class Large:
    """A step over a billion edges: bfloat16 weights, which have no gradients; nothing of the size of the edges is stored beside them."""

    name: str
    backend: str
    model: Callable[[list[int]], nn.Module]
    layout: tuple[int, ...] = (2, 31_620, 31_620, 3)


SPREAD = {"out_features": CLASSES, "positional": False, "pooling": ("mean", "all"), "edge_memory": "recompute"}
LARGE = (
    Large("ng-gnn", "cuda", lambda layout: NGGNN(layout, **SPREAD)),
    Large("ng-gnn", "triton", lambda layout: NGGNN(layout, **SPREAD)),
    Large("ng-t-edges", "cuda", lambda layout: NGT(layout, attention="edges", **SPREAD)),
)


def measure_large(large: Large, device: torch.device) -> dict:
    """One step after one to warm up, and what was planned for it; the error that prevented it, too little memory say."""
    graph, model = ngk.NeuralGraph.mlp(large.layout), large.model(list(large.layout))
    found = {"model": large.name, "contender": f"ngk-{large.backend}-bf16", "precision": "bf16", "layout": list(large.layout), "batch": 1, "edges": graph.num_edges}
    try:
        with ngk.use_backend(large.backend), torch.autocast(device.type, torch.bfloat16):
            options = {"device": "cuda", "weight_dtype": torch.bfloat16, "optimizer_states": 0}
            found["planned_bytes"] = ngk.plan(model, graph, policies=["recompute"], **options).peak_bytes
            room = torch.cuda.mem_get_info(device)[0]
            if found["planned_bytes"] > room:
                raise MemoryError(f"planned {found['planned_bytes']} bytes, free are {room}")
            model = model.to(device)
            weights = [torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(std=shape[1] ** -0.5) for shape in graph.weight_shapes(1)]
            biases = [torch.zeros(1, n, 1, device=device) for n in large.layout[1:]]

            def step() -> Tensor:
                model.zero_grad(set_to_none=True)
                logits = model(weights, biases)
                logits.float().square().sum().backward()
                return logits.detach()

            if not step().isfinite().all():
                raise RuntimeError("gate: expected finite logits")
            torch.cuda.reset_peak_memory_stats(device)
            seconds = event_seconds(step, 1)
        found |= {"seconds": seconds, "median": seconds[0], "peak_bytes": torch.cuda.max_memory_allocated(device)}
    except Exception as reason:  # written down, so that nothing is missing without a word
        found["failed"] = f"{type(reason).__name__}: {(str(reason).splitlines() or [''])[0][:300]}"
    finally:
        torch.cuda.empty_cache()
    return found


def line_of(found: dict) -> str:
    """One measurement in one line."""
    share = f" {found['share']:6.1%} of {found['binding']}" if "share" in found else ""
    result = found.get("failed") or f"{found['median'] * 1e3:10.3f} ms {found['peak_bytes'] / 2**20:8.0f} MiB{share}"
    return f"{found['model']:10} {'x'.join(map(str, found['layout']))}@{found['batch']:<6} {found['contender']:24} {result}"


def main(
    samples: Annotated[int, typer.Option(help="Steps timed of each.")] = 20,
    quick: Annotated[bool, typer.Option("--quick", help="A few layouts, rivals in one precision.")] = False,
) -> None:
    """Measures every contender on every layout, one after the other, and appends the results."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("a CUDA device is needed, and there is none")
    from benchmarks import gpu_rates  # needs Triton

    device, run, lines = torch.device("cuda"), records.new_run(), []
    properties = torch.cuda.get_device_properties(device)
    place = {"slug": machine.slug(properties.name), "model": properties.name, "capability": [properties.major, properties.minor], "memory_bytes": properties.total_memory}
    rates = gpu_rates.measured(device)
    records.append("gpu", run, {"model": "ceilings", "rates": rates, "device": place})
    for precision, ceilings in rates.items():
        typer.echo(f"ceilings {precision:5} " + " ".join(f"{name} {value:.4g}/s" for name, value in ceilings.items()))

    def note(found: dict) -> None:
        records.append("gpu", run, {**found, "device": place})
        lines.append(line_of(found))
        typer.echo(lines[-1])

    for plan in PLANS:
        for text in (plan.quick if quick else plan.layouts).split(","):
            case = Case.parse(text)
            oracle = plan.model.new_oracle(case)
            true = truth(plan.model, case, oracle, device) if plan.model.oracle_bytes(case) < 8 << 30 else None
            for contender in contenders(plan, quick):
                found = measure(plan.model, contender, case, oracle, true, device, samples)
                if plan.width and "median" in found:
                    found["binding"], found["share"] = gpu_rates.share(gpu_rates.needed_by_nggnn(case, plan.width), rates[contender.precision], found["median"])
                note(found)
    for text, width in ATTENTION[: 1 if quick else None]:
        for found in measure_attention(text, width, device, samples):
            note(found)
    for large in LARGE[: 1 if quick else None]:
        note(measure_large(large, device))
    failures = sum("failed" in line or "Error" in line for line in lines)
    if failures:
        raise SystemExit(f"{failures} not measured, reasons above and in benchmarks/results/{place['slug']}/gpu.jsonl")


if __name__ == "__main__":
    typer.run(main)

"""A training step over a billion edges on a GPU, its weights in bfloat16: bytes and seconds, where the device has the memory that a plan asks for."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import ngkernels as ngk
from benchmarks.cases import CLASSES, Case
from ngkernels.planner import size_text
from ngkernels.tune import event_seconds

LAYOUT, FEWER, TINY = (2, 22360, 44720, 3), (2, 7072, 14144, 3), (2, 8, 16, 3)  # 1e9 edges, 1e8, and what compiles the kernels
SHARE = 0.95  # of the free memory that a plan may ask for


@dataclass(frozen=True)
class Subject:
    """A model and the kernels that run it. quick: the layout of a first look."""

    model: str
    backend: str
    quick: tuple[int, ...] = LAYOUT

    def make(self, layout: tuple[int, ...]) -> nn.Module:
        from neural_graphs.models import NGGNN, NGT

        torch.manual_seed(0)
        options = {"out_features": CLASSES, "edge_memory": "recompute"}
        return NGGNN(layout, **options) if self.model == "ng-gnn" else NGT(layout, attention="edges", **options)


SUBJECTS = (Subject("ng-gnn", "triton"), Subject("ng-gnn", "cuda"), Subject("ng-t-edges", "cuda", FEWER))


def low(kind: str) -> torch.autocast:
    """Operands of products in bfloat16; on a GPU that is not there: nothing."""
    return torch.autocast(kind, torch.bfloat16, enabled=kind != "cuda" or torch.cuda.is_available())


def needed(subject: Subject, layout: tuple[int, ...]) -> int:
    """Bytes of tensors of a step with gradients of the weights, as planned."""
    model = subject.make(layout)
    with ngk.use_backend(subject.backend), low("cuda"):
        found = ngk.plan(model, model.graph(1), device="cuda", weight_grads=True, weight_dtype=torch.bfloat16, optimizer_states=0, policies=["recompute"])
    return found.peak_bytes


def step_of(subject: Subject, layout: tuple[int, ...], device: torch.device) -> Callable[[], Tensor]:
    """Forward, cross-entropy, backward, on weights that are made there; gives the loss and norms of the last gradients."""
    model, generator = subject.make(layout).to(device), torch.Generator(device).manual_seed(0)
    weights = [torch.empty(1, i, o, 1, dtype=torch.bfloat16, device=device).normal_(std=i**-0.5, generator=generator) for i, o in zip(layout, layout[1:])]
    biases = [torch.empty(1, o, 1, device=device).normal_(std=0.1, generator=generator) for o in layout[1:]]
    weights, label = [w.requires_grad_() for w in weights], torch.zeros(1, dtype=torch.int64, device=device)

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        for w in weights:
            w.grad = None
        with ngk.use_backend(subject.backend):
            with low(device.type):
                logits = model(weights, biases)
            loss = nn.functional.cross_entropy(logits.float(), label)
            loss.backward()
        return torch.stack([loss.detach(), *(w.grad[..., -1, :].float().norm() for w in weights)])

    return step


def timed(step: Callable[[], object], device: torch.device, samples: int) -> tuple[list[float], int]:
    """Seconds of single steps, and the peak of allocated bytes in one."""
    torch.cuda.reset_peak_memory_stats(device)
    seconds = event_seconds(step, samples)
    return seconds, torch.cuda.max_memory_allocated(device)


def measure(subject: Subject, layout: tuple[int, ...], device: torch.device, free: int, samples: int, clock: Callable = timed) -> dict:
    """One measurement: "failed" with the error that prevented it, "skipped" where `free` bytes are too few.

    Args:
        clock: as `timed`.
    """
    case = Case(layout)
    found = {"model": subject.model, "contender": f"ngk-{subject.backend}-bf16", "precision": "bf16", "layout": list(layout), "batch": 1, "edges": case.edges, "weight_dtype": "bf16"}
    try:
        found["planned_bytes"] = needed(subject, layout)
        if found["planned_bytes"] > SHARE * free:
            return found | {"skipped": f"a step over {case.edges:,} edges needs {size_text(found['planned_bytes'])}, and {size_text(free)} are free"}
        step_of(subject, TINY, device)()
        step = step_of(subject, layout, device)
        if not step().isfinite().all():
            raise RuntimeError("gate: expected a finite loss and finite gradients of the weights")
        seconds, peak = clock(step, device, samples)
        found |= {"seconds": seconds, "median": statistics.median(seconds), "peak_bytes": peak}
    except Exception as reason:  # written down, so that nothing is missing without a word
        found["failed"] = f"{type(reason).__name__}: {(str(reason).splitlines() or [''])[0][:300]}"
    return found

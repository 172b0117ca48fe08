"""What a step allocates, by PyTorch's own account."""

from __future__ import annotations

from collections.abc import Callable

import torch

import ngkernels as ngk


def peak_of(step: Callable[[], None], device: str = "cpu") -> int:
    """Most bytes of tensors alive at a time in `step`, above what was there before it."""
    if device != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def planned_and_allocated(model, graph: ngk.NeuralGraph, backend: str, policy: str, weight_grads: bool, device: str = "cpu") -> tuple[int, int]:
    """Peaks of two steps without optimiser on a GPU: as planned, and as allocated there, or by the same kernels on CPU tensors, whatever makes
    them run on those."""
    dry = model.dry_run(graph, policy, torch.float32, weight_grads)
    held = sum(t.untyped_storage().nbytes() for t in dry.held)
    model = model.to(device)
    weights = [(4 * torch.rand(shape, device=device) - 2).requires_grad_(weight_grads) for shape in graph.weight_shapes(1)]  # as far as tables reach on a GPU
    biases = [torch.randn(p.copies, n, 1, device=device) for p in graph.parts for n in p.layers[1:]]

    def steps() -> None:
        for _ in range(2):
            model.forward_graph(graph, weights, biases, None).sum().backward()
            for t in (*model.parameters(), *weights):
                t.grad = None

    with ngk.use_backend(backend):
        allocated = peak_of(steps, device)  # first: a plan makes tables too, and what is there is not allocated again
        planned = ngk.plan(model.to("cpu"), graph, policies=[policy], weight_grads=weight_grads, device="cuda", optimizer_states=0).peak_bytes
    return planned, held + allocated

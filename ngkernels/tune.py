"""Measures sizes of tiles for the Triton kernels: `python -m ngkernels.tune` writes the best of each kind for the GPU at hand, and for each
class of expressions which of the Triton and the CUDA kernels are faster.

Ops read the files, never write them: nothing is measured behind anybody's back. They lie at NGKERNELS_TILES and NGKERNELS_FASTER, else in
the user's cache folder, and can be copied to other machines with the same architecture.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

import ngkernels as ngk
from ngkernels import backends
from ngkernels.ops import faster

EDGES, WARPS = (16, 32, 64), (2, 4, 8)
# What is measured of each class of registers (sizes.Kind): columns of states. Attention's registers hold queries, keys and values beside one another.
STATES = {(32, False): 32, (64, False): 64, (128, False): 128, (64, True): 16, (128, True): 32, (1 << 30, True): 64}
PURPOSES = {"messages": False, "options": True, "attend": True}  # faster.Shape, and whether its steps have a pair update


def step_of(width: int, paired: bool, device: torch.device, attention: bool = True) -> Callable[[], None]:
    """A training step over about a million edges with states of so many columns: messages after one update, or attention along edges, or
    messages, after a pair update."""
    g = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=g) / shape[-1] ** 0.5).to(device).requires_grad_()

    graph = ngk.NeuralGraph.mlp([64, 512, 256] if paired else [64, 1024, 1024])
    weights, n = [leaf(1, a, b, 1) for a, b in zip(graph.parts[0].layers, graph.parts[0].layers[1:])], graph.num_nodes
    x, square = leaf(n, width), [leaf(width, width) for _ in range(6)]
    edges = ngk.EdgeState(graph, weights, ngk.encoders.Linear(leaf(width, 1), leaf(width)))
    more = {"weight_reverse": square[4], "residual": True} if paired else {}
    edges = edges.update(x, square[0], square[1], square[2], None, square[3], None, activation="silu", **more)

    def step() -> None:
        if paired and attention:
            out = ngk.attend(edges, x, x, x, square[0], square[1], square[2], square[5], heads=8, over="edges")
        else:
            out = ngk.aggregate(edges, ngk.Message.gate(x, square[4], None, square[1], square[2]), ("mean", "max"))
        torch.autograd.grad(out.sum(), [*weights, x, *square], allow_unused=True)

    return step


def event_seconds(step: Callable[[], object], repeat: int) -> list[float]:
    """Seconds of each of some runs on the current GPU, between two events."""
    found = []
    for _ in range(repeat):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / 1e3)
    return found


def seconds(step: Callable[[], None], repeat: int = 5) -> float:
    """The quickest of some runs, after two to warm up; infinite where the kernels do not compile, or do not run."""
    try:
        for _ in range(2):
            step()
        return min(event_seconds(step, repeat))
    except NotImplementedError:  # what the CUDA kernels do not run here
        return float("inf")
    except Exception as error:
        if "resources" not in str(error).lower():  # what a tile of this size does not have
            raise
        return float("inf")


def best(candidates: Iterable, measure: Callable[[object], float]):
    """The candidate of least time; the first among equals."""
    return min(candidates, key=measure)


def measured(device: torch.device, capability: tuple[int, int], clock: Callable[[Callable[[], None]], float] = seconds) -> Iterator[tuple]:
    """(kind, its quickest size) of every kind, one after the other: what the table says is tried first, so that it wins among equals.

    Args:
        clock: seconds that a step takes.
    """
    from ngkernels._triton import sizes

    for (width, paired), columns in STATES.items():
        step = step_of(columns, paired, device)
        for exact in (False, True):
            kind = sizes.Kind(width, exact, paired)

            def measure(size, step=step, exact=exact) -> float:
                torch.set_float32_matmul_precision("highest")
                with ngk.use_backend("triton"), sizes.forced(size), torch.autocast(device.type, torch.bfloat16, enabled=not exact):
                    return clock(step)

            yield kind, best([sizes.usual(kind, capability), *map(sizes.Size._make, itertools.product(EDGES, WARPS))], measure)


def compared(device: torch.device, clock: Callable[[Callable[[], None]], float] = seconds) -> Iterator[tuple[faster.Shape, str]]:
    """(class of expressions, the backend that runs it faster) of every class; Triton's sizes of tiles should be measured first."""
    for (purpose, paired), columns, exact in itertools.product(PURPOSES.items(), faster.COLUMNS, (False, True)):
        step = step_of(columns, paired, device, purpose == "attend")

        def measure(backend, step=step, exact=exact) -> float:
            torch.set_float32_matmul_precision("highest")
            with ngk.use_backend(backend), torch.autocast(device.type, torch.bfloat16, enabled=not exact):
                return clock(step)

        yield faster.Shape(purpose, columns, exact), best(("triton", "cuda"), measure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=backends.tiles_path())
    out = parser.parse_args().out
    device = torch.device("cuda")
    reason = backends.why_not("triton", device)
    if reason:
        parser.error(f"the Triton kernels do not run on a GPU here: {reason}")
    from ngkernels._triton import sizes

    found, capability = {}, torch.cuda.get_device_capability(device)
    for kind, size in measured(device, capability):
        found[kind] = size
        print(f"{kind}: {size}", flush=True)
    sizes.write(out, capability, found)
    print(f"written to {out}")
    if reason := backends.why_not("cuda", device):
        return print(f"not compared with the CUDA kernels: {reason}")
    shapes = {}
    for shape, backend in compared(device):
        shapes[shape] = backend
        print(f"{shape}: {backend}", flush=True)
    faster.write(faster.path(), capability, shapes)
    print(f"written to {faster.path()}")


if __name__ == "__main__":
    main()

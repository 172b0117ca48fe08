"""What the host does in a training step on a GPU, without one: `python tests/capture.py [CASE...]` runs it on tensors without values.

Launches of kernels are noted and not made. Once a first step has made plans and tables, a step may not read a tensor's values nor copy
between devices: either makes the host wait, and neither can be captured as a CUDA graph. Needs a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence

import torch
from aot import pretended, recorded
from aot_list import VARIANTS
from pair_samples import PairSample
from pair_samples import engine as pair_engine
from pair_samples import leaves as pair_leaves
from samples import cast, engine, leaves
from torch.utils._python_dispatch import TorchDispatchMode

import ngkernels as ngk
from ngkernels import backends
from ngkernels.encoders import Grid, inner_half
from ngkernels.ops import autograd, tabulate

DEVICE = torch.device("meta")  # stands for a GPU: whoever reads a value fails
SAMPLES = ("layer-3", "table", "virtual", "packed", "readout", "sparse", "all-reductions", "attend-edges-table", "attend-dropout", "messages-of-pairs")
OPTIONS = {"": {}, "graph-norm": {"norm": "batch_graph"}, "unequal": {"norm": "graph", "post_layers": 2, "pooling": ("mean", "last")}, "activations": {"activation_embedding": True}, "many": {}}
MODELS = (*(f"NGGNN-{kind}" for kind in OPTIONS), "NGT-all", "NGT-edges")


def step_of_sample(name: str) -> Callable[[], None]:
    s = VARIANTS[name].sample
    s = s.but(name, step=7)  # else the first step of all reads the frequencies, once
    paired = isinstance(s, PairSample)
    t = {n: v.to(DEVICE).requires_grad_() for n, v in cast((pair_leaves if paired else leaves)(s), torch.float32).items()}

    def step() -> None:
        out = (pair_engine if paired else engine)(s, t)
        torch.autograd.grad(sum(o.sum() for o in out), list(t.values()), allow_unused=True)

    return step


def step_of_model(name: str) -> Callable[[], None]:
    from neural_graphs.models import NGGNN, NGT

    layouts, kind = [[2, 6, 6, 3]], name.partition("-")[2]
    if name.startswith("NGT"):
        model = NGT(layout=layouts[0], out_features=5, attention=kind)
    else:
        model = NGGNN(layout=layouts[0], d_hid=16, out_features=5, **OPTIONS[kind])
    if kind == "unequal":
        layouts.append([2, 4, 5, 3])
    if kind == "many":  # more launches than fit into small caches
        layouts = [[2, 8 + k % 3, 8, 3] for k in range(200)]
    model, graph = model.to(DEVICE), ngk.NeuralGraph.batch([ngk.NeuralGraph.mlp(layout, batch_size=2) for layout in layouts])
    weights = [torch.empty(2, a, b, 1, device=DEVICE, requires_grad=True) for layout in layouts for a, b in zip(layout, layout[1:])]
    biases = [torch.empty(2, b, 1, device=DEVICE) for layout in layouts for b in layout[1:]]
    names = (["relu", "gelu"],) * graph.num_graphs if kind == "activations" else None
    return lambda: model.forward_graph(graph, weights, biases, activations=names).sum().backward()


class Watched(TorchDispatchMode):
    """Collects the operations between devices. Those that read values fail by themselves."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        tensors = [a for a in torch.utils._pytree.tree_leaves((args, kwargs, out)) if isinstance(a, torch.Tensor)]
        if len({t.device for t in tensors}) > 1:
            here = [f"{f.filename.rpartition('/')[2]}:{f.lineno}" for f in traceback.extract_stack() if "/ngkernels/" in f.filename or "/neural_graphs/" in f.filename]
            if here:  # else it is the sample's own
                self.found.append(f"{op} at {' < '.join(reversed(here[-3:]))}")
        return out


def grid_of_no_values(frequencies: torch.Tensor, direction: int | None, k: int, half: int, dtype: torch.dtype) -> Grid:
    """As ngkernels.encoders.grid_basis, whose rank depends on values. It is made once for the frequencies of a model."""
    inner, waves, rank = inner_half(k), 2 * frequencies.shape[0], 4
    outer = frequencies.new_empty(2 * (half - inner), 3, waves, dtype=dtype) if half > inner else None
    return Grid(frequencies.new_empty(2 * min(half, inner) + 1, 3, rank, dtype=dtype), frequencies.new_empty(rank, waves, dtype=dtype), outer)


def check(name: str) -> None:
    """Raises where the case's step would stop a capture."""
    step = step_of_sample(name) if name in SAMPLES else step_of_model(name)
    with recorded() as launches, ngk.use_backend("triton"), pretended(2 * backends.BACKENDS.index("triton")):
        for _ in range(2):
            step()
        before = len(launches)
        with Watched() as watched:
            step()
    if len(launches) == before:
        raise RuntimeError("no kernel was launched")
    if watched.found:
        raise RuntimeError("; ".join(dict.fromkeys(watched.found)))


def main(names: Sequence[str]) -> None:
    """A line for each case: ok, or what went wrong."""
    autograd._eager = lambda tensors: True  # ops do what they do, although somebody looks
    tabulate.grid_basis = grid_of_no_values
    for name in names or (*SAMPLES, *MODELS):
        try:
            check(name)
            print(f"{name}: ok", flush=True)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {error}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

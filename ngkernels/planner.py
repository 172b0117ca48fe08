"""plan: what a step would cost, before it runs: peak bytes and work, by policy; which policy fits a budget."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from .graph import NeuralGraph
from .trace import Trace
from .work import Work

# Floating-point operations in the time that a byte of a tensor takes: stored edge states are written and read far apart.
FLOPS_PER_BYTE = 100


class BudgetError(MemoryError):
    """No policy fits the budget. `needed`: bytes of the one that needs least."""

    def __init__(self, message: str, needed: int):
        super().__init__(message)
        self.needed = needed


class DryRun(NamedTuple):
    """A step on tensors without values (device "meta"). held: tensors that are there before it. run: (forward) -> results."""

    held: Sequence[torch.Tensor]
    parameters: Sequence[torch.Tensor]
    weights: Sequence[torch.Tensor]
    run: Callable[[], Sequence[torch.Tensor]]


class Spec(Protocol):
    """What a model says of itself."""

    def policies(self) -> Sequence[str]:
        """Names of its edge-memory policies, the one that stores least first."""

    def dry_run(self, graph: NeuralGraph, policy: str, weight_dtype: torch.dtype, weight_grads: bool) -> DryRun:
        """A step on `graph` with `policy`."""


@dataclass(frozen=True)
class Candidate:
    """One policy: most bytes alive during a step, and its work."""

    policy: str
    peak_bytes: int
    work: Work

    @property
    def cost(self) -> float:
        """What candidates are compared by: FLOPs and bytes moved, in FLOPs."""
        return self.work.flops + FLOPS_PER_BYTE * self.work.bytes


@dataclass(frozen=True)
class Plan:
    """The policy of least work that fits. `candidates`: every policy that was looked at and runs; `refused`: the others, with the reasons; the
    rest are arguments of `plan`."""

    policy: str
    peak_bytes: int
    work: Work
    budget: int | None
    candidates: tuple[Candidate, ...]
    graph: NeuralGraph
    training: bool
    weight_grads: bool
    threads: int
    device: str
    refused: tuple[tuple[str, str], ...]

    def describe(self) -> str:
        """The plan in sentences, a line for each policy."""
        what = "a training step" if self.training else "a forward pass"
        wanted = ", gradients of the weights too" if self.training and self.weight_grads else ""
        where = f"{self.threads} thread{'s' * (self.threads > 1)}" if self.device == "cpu" else "on a GPU"
        lines = [f"{what} over {self.graph.num_edges:,} edges and {self.graph.num_nodes:,} neurons, {where}{wanted}"]
        if self.budget is not None:
            lines.append(f"budget {size_text(self.budget)}")
        for c in self.candidates:
            note = (
                " (chosen)"
                if c.policy == self.policy
                else " (over the budget)"
                if self.budget is not None and c.peak_bytes > self.budget
                else ""
            )
            lines.append(
                f"{c.policy}: peak {size_text(c.peak_bytes)}, {c.work.flops / 1e9:,.4g} GFLOP, {c.work.bytes / 1e9:,.4g} GB moved{note}"
            )
        return "\n".join([*lines, *(f"{policy}: not there: {reason}" for policy, reason in self.refused)])


def plan(
    spec: Spec,
    graph: NeuralGraph,
    budget: int | str | None = None,
    *,
    training: bool = True,
    weight_grads: bool = False,
    weight_dtype: torch.dtype = torch.float32,
    weights_mapped: bool = False,
    threads: int | None = None,
    device: str = "cpu",
    optimizer_states: int = 2,
    policies: Sequence[str] | None = None,
) -> Plan:
    """What a step of a model on a graph would cost, found by running it on tensors without values: seconds; for a GPU up to a minute or two at a
    billion edges, as its tables are made.

    Args:
        spec: what a model says of itself; every model of neural_graphs.models does.
        graph: the networks it reads.
        budget: bytes, or a text such as "8GiB"; None: none.
        training: forward and backward with parameters' gradients and the optimiser's state, or a forward pass.
        weight_grads: gradients of the networks' weights too. weight_dtype: of the networks' weights.
        weights_mapped: the weights are views of files whose pages are given back (ngkernels.stream): they take no memory, nor do
            their gradients.
        threads: of the CPU; None: as torch.get_num_threads().
        device: "cpu", or "cuda" for a GPU, which need not be there: with the kernels that use_backend forces, else with Triton's, or the CUDA
            kernels for chains that are too long for those.
        optimizer_states: tensors that the optimiser keeps for each parameter (Adam: 2).
        policies: those to look at; None: all that the model has, if there is a budget, else the one that stores least.

    Returns:
        Plan: the policy of least work (FLOPs, and bytes times FLOPS_PER_BYTE) among those whose peak is within the budget; the
        one that stores least where nothing is gained. The peak is of one step, above a process that has run a tiny one.

    Raises:
        BudgetError: no policy fits; says how many bytes the most frugal one needs. ValueError: a budget that is no size, another device.
        NotImplementedError: no policy runs there.

    Note: the work is counted op by op (ngkernels/work.py). Peaks of a CPU are those of the C++ kernels; without them, the reference
        backend needs more than a plan says. Those of a GPU are of PyTorch's tensors there: its context and libraries come on top. Weights
        are taken to lie within 2 in absolute value.
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(f"plan: expected device 'cpu' or 'cuda', got {device!r}")
    budget = parse_size(budget) if isinstance(budget, str) else budget
    threads = torch.get_num_threads() if threads is None else threads
    found, refused = [], []
    for name in policies or spec.policies():
        dry = spec.dry_run(graph, name, weight_dtype, training and weight_grads)
        trace = Trace(threads, dry.weights if weights_mapped else (), device == "cuda")
        try:
            found.append(Candidate(name, *_cost(dry, training, trace, optimizer_states)))
        except NotImplementedError as error:  # a chain that the kernels of a GPU do not take
            refused.append((name, error))
        if found and budget is None and not policies:
            break
    if not found:
        raise refused[0][1]
    fits = [c for c in found if budget is None or c.peak_bytes <= budget]
    if not fits:
        least = min(found, key=lambda c: c.peak_bytes)
        raise BudgetError(
            f"plan: expected a budget of at least {least.peak_bytes} bytes ({size_text(least.peak_bytes)}, with {least.policy!r}) for {graph}, "
            f"got {size_text(budget)}; give more memory, or stream the weights from a file",
            least.peak_bytes,
        )
    best = min(fits, key=lambda c: c.cost)
    wanted = training and weight_grads
    return Plan(best.policy, best.peak_bytes, best.work, budget, tuple(found), graph, training, wanted, threads, device, tuple((name, str(error)) for name, error in refused))


def _cost(dry: DryRun, training: bool, trace: Trace, optimizer_states: int) -> tuple[int, Work]:
    """(peak bytes, work) of a step; the second of two, for training, which has the optimiser's state beside it."""
    trace.hold(*dry.held)
    trained = [p for p in dry.parameters if p.requires_grad]
    if not training:
        with torch.no_grad(), trace:
            dry.run()
        return trace.peak, trace.work
    for first in (True, False):
        trace.work = Work()
        with trace:
            _step(dry.run())
        for t in (*trained, *dry.weights):
            t.grad = None
        if first:
            trace.live += optimizer_states * sum(t.numel() * t.element_size() for t in trained)
    return trace.peak, trace.work


def _step(results: Sequence[torch.Tensor]) -> None:
    wanted = [t for t in results if t.requires_grad]
    torch.autograd.backward([t.sum() for t in wanted])


def parse_size(text: str) -> int:
    """8GiB, 512MiB, 1.5GB or plain bytes as a number of bytes.

    Raises:
        ValueError: anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B|B)?\s*", text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"expected a size such as 8GiB or 512MiB, got {text!r}")
    power = "KMGT".index(match[2].upper()) + 1 if match[2] else 0
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def size_text(count: int) -> str:
    """1536 as `1.5 KiB`."""
    value, units = float(count), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:,.0f} {units[0]}" if units[0] == "bytes" else f"{value:,.1f} {units[0]}"

"""Ops for weights on the CPU, in memory or in files, under states on a GPU: panel by panel (ngkernels/panels.py).

Panels follow one another; while one is evaluated, the weights of the next are copied. Kept for backward are the raw weights where they are,
node states and parameters; backward evaluates each panel again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch.autograd.function import once_differentiable

from .. import backends, limits, mapped
from ..edges import EdgeState, NodeTerm, Update, map_tensors
from ..panels import Panel, Piece, cut


@torch.compiler.disable
def evaluate(
    op: str,
    edges: EdgeState,
    nodes: Sequence[torch.Tensor],
    more,
    shape: Sequence[int],
    function: Callable[..., torch.Tensor],
    attention: bool = False,
    restart: bool = True,
) -> torch.Tensor:
    """function(edges, nodes, more) -> [rows, *shape], with the weights in panels.

    Args:
        nodes: tensors with a row for each neuron. more: what else holds tensors, a Message or a tuple; neurons' states in NodeTerms.
        attention: rows depend on the edges in both directions. restart: where a chain of updates is too long for the kernels, store a state
            of each panel.

    Returns:
        Tensor where the node states are. Gradients of the weights are on the CPU, or in a file (ngkernels.mapped).

    Raises:
        NotImplementedError: see panels.cut.

    Note: without attention bit by bit what `function` gives for weights beside the states; gradients of node states and parameters are added
        up panel by panel. First derivatives only.
    """
    given = (replace(edges, weights=()), tuple(nodes), more)
    leaves: list[torch.Tensor] = []
    map_tensors(lambda t: leaves.append(t) or t, given)
    backend = backends.BACKENDS[backends.choose(op, edges.device)]
    job = _Job(edges.graph.num_rows, tuple(shape), given, function, restart, cut(edges, op, attention), edges.device, backend)
    return _InPanels.apply(job, len(edges.weights), *edges.weights, *leaves)


@dataclass(frozen=True)
class _Job:
    num_rows: int
    shape: tuple[int, ...]
    given: tuple  # edges without weights, nodes, more
    function: Callable[..., torch.Tensor]
    restart: bool
    panels: list[Panel]
    device: torch.device
    backend: str

    def run(self, panel: Panel, weights: Sequence[torch.Tensor], leaves: Sequence[torch.Tensor]) -> torch.Tensor:
        """The rows of a panel [copies, rows, *shape]."""
        it = iter(leaves)
        edges, nodes, more = map_tensors(lambda _: next(it), self.given)
        edges, more = _of_nodes(edges, panel.nodes), _of_nodes(more, panel.nodes)
        affine = edges.affine and tuple(tuple(values[p.weight] for p in panel.pieces) for values in edges.affine)
        edges = replace(edges, graph=panel.graph, weights=tuple(weights), affine=affine)
        edges = _restarting(edges) if self.restart else edges
        edges = edges if panel.layer is None else edges.restrict(panel.layer)
        _, copies, _, begin, end = panel.rows
        return self.function(edges, [t[panel.nodes] for t in nodes], more).view(copies, end - begin, *self.shape)


def _of_nodes(value, nodes: slice):
    """The same description of the neurons `nodes` alone."""
    if isinstance(value, NodeTerm):
        return replace(value, x=value.x[nodes])
    if isinstance(value, tuple):
        return tuple(_of_nodes(v, nodes) for v in value)
    if hasattr(value, "__dataclass_fields__"):
        return replace(value, **{name: _of_nodes(getattr(value, name), nodes) for name in value.__dataclass_fields__})
    return value


def _restarting(edges: EdgeState) -> EdgeState:
    """The same state, stored on the way wherever one more update would make the chain too long for the kernels."""
    state = replace(EdgeState(edges.graph, edges.weights, edges.encoder, edges.affine), table=edges.table)
    for step in edges.steps:
        if state.steps and limits.full(state):
            state = state.checkpoint(torch.float64 if edges.weights[0].dtype == torch.float64 else torch.float32)
        matrix = step.weight_out if isinstance(step, Update) else step.weight
        state = replace(state, steps=(*state.steps, step), width=matrix.shape[0])
    return state


class _InPanels(torch.autograd.Function):
    @staticmethod
    def forward(ctx, job: _Job, count: int, *tensors):
        ctx.job, ctx.count, kind = job, count, backends.kind_of(job.device)
        ctx.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        ctx.save_for_backward(*tensors)
        double = tensors[0].dtype == torch.float64
        result = torch.zeros(job.num_rows, *job.shape, dtype=torch.float64 if double else torch.float32, device=job.device)
        for panel, weights in _Feed(job, tensors[:count]):
            panel.rows_of(result).copy_(job.run(panel, weights, tensors[count:]))
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        job, count, need = ctx.job, ctx.count, ctx.needs_input_grad[2:]
        weights, given = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        of_weights = [_zeros_like(w) if n else None for w, n in zip(weights, need)]
        of_given = [torch.zeros_like(t) if n else None for t, n in zip(given, need[count:], strict=True)]
        feed = _Feed(job, weights)
        for panel, parts in feed:
            parts = [t.requires_grad_(of_weights[p.weight] is not None) for t, p in zip(parts, panel.pieces, strict=True)]
            leaves = [t.detach().requires_grad_(g is not None) for t, g in zip(given, of_given, strict=True)]
            with torch.enable_grad(), torch.autocast(*ctx.autocast), backends.use_backend(job.backend):
                rows = job.run(panel, parts, leaves)
            totals = [of_weights[p.weight] for p in panel.pieces] + of_given
            inputs = [t for t, g in zip([*parts, *leaves], totals, strict=True) if g is not None]
            it = iter(torch.autograd.grad(rows, inputs, panel.rows_of(grad), allow_unused=True))
            found = [None if g is None else next(it) for g in totals]
            for total, g in zip(of_given, found[len(parts) :], strict=True):
                if g is not None:
                    total.add_(g)
            feed.send_back(found[: len(parts)], lambda k, g, panel=panel: _add(panel.pieces[k], g, of_weights))
        feed.finish()
        return (None, None, *map(mapped.take, weights, of_weights), *of_given)


def _add(piece: Piece, grad: torch.Tensor, totals: Sequence[torch.Tensor]) -> None:
    piece.add(grad, totals[piece.weight])
    _give_back(piece.of(totals[piece.weight]))


def _zeros_like(weight: torch.Tensor) -> torch.Tensor:
    total = mapped.gradient_like(weight)
    if total is None:
        return torch.zeros_like(weight)
    for chunk in mapped.pieces(total):
        chunk.zero_()
        mapped.drop(chunk)
    return total


def _give_back(t: torch.Tensor) -> None:
    """The pages of a tensor that lies in a file, if it has no gaps."""
    if mapped.extent(t) == t.numel() and mapped.find(t) is not None:
        for chunk in mapped.pieces(t):
            mapped.drop(chunk)


class _Feed:
    """The panels of a job with their weights on its device. While one is evaluated, the next one's weights are copied there, and the
    gradients of the one before come back, through pinned memory."""

    def __init__(self, job: _Job, weights: Sequence[torch.Tensor]):
        self.panels, self.weights, self.device = job.panels, weights, job.device
        self.side = torch.cuda.Stream(job.device) if job.device.type == "cuda" else None
        self.waiting: Callable[[], None] | None = None  # takes the last panel's gradients

    def __iter__(self) -> Iterator[tuple[Panel, list[torch.Tensor]]]:
        finished, coming = [], self._load(self.panels[0]) if self.panels else []
        for k, panel in enumerate(self.panels):
            here, coming = coming, []
            if self.side is not None:
                current = torch.cuda.current_stream(self.device)
                current.wait_stream(self.side)
                for t in here:
                    t.record_stream(current)
            yield panel, here
            del here
            if self.side is not None:
                finished.append(current.record_event())
                if k:
                    finished[k - 1].synchronize()  # so that no third panel comes
            coming = self._load(self.panels[k + 1]) if k + 1 < len(self.panels) else []
        for w in self.weights:
            _give_back(w)

    def _load(self, panel: Panel) -> list[torch.Tensor]:
        found = []
        for piece in panel.pieces:
            source = piece.of(self.weights[piece.weight]).detach()
            if self.side is None:
                found.append(source.to(self.device, copy=True))
            else:
                pinned = torch.empty(source.shape, dtype=source.dtype, device="cpu", pin_memory=True).copy_(source)
                with torch.cuda.stream(self.side):
                    found.append(pinned.to(self.device, non_blocking=True))
            _give_back(source)
        return found

    def send_back(self, grads: Sequence[torch.Tensor | None], receive: Callable[[int, torch.Tensor], None]) -> None:
        """Gives the gradients to `receive`, on the CPU, when those of the next panel are under way."""
        ready = torch.cuda.current_stream(self.device).record_event() if self.side is not None else None

        def take() -> None:
            for k, g in enumerate(grads):
                if g is not None:
                    receive(k, self._down(g, ready))

        self.finish()
        self.waiting = take

    def finish(self) -> None:
        if self.waiting is not None:
            self.waiting()
        self.waiting = None

    def _down(self, grad: torch.Tensor, ready) -> torch.Tensor:
        if self.side is None:
            return grad
        with torch.cuda.stream(self.side):
            self.side.wait_event(ready)
            pinned = torch.empty(grad.shape, dtype=grad.dtype, device="cpu", pin_memory=True).copy_(grad, non_blocking=True)
        grad.record_stream(self.side)
        self.side.synchronize()
        return pinned

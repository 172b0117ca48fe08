"""What the ops share: the schema of an edge expression, autograd over its tensors, double backward.

Every op takes E = (weights, xs, params, table, carriers, topology, program); its gradients come as one list in
that order (weights, xs, params, table, carriers), with an empty tensor where none is needed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch

from .. import backends, limits, mapped, panels
from ..edges import EdgeState
from ..program import Expression as E
from ..program import cut

SCHEMA = "Tensor[] weights, Tensor[] xs, Tensor[] params, Tensor table, Tensor[] carriers, Tensor topology, int[] program"
library = torch.library.Library("ngkernels", "DEF")
# The C++ kernels are ops too, of the same schemas: they allocate what they return, and nothing of Python lies between their caller and them.
compiled = torch.library.Library("ngkernels_C", "FRAGMENT") if backends.why_not("cpp") is None else None


def define(signature: str) -> None:
    """An op that has C++ kernels."""
    for namespace in (library, compiled):
        if namespace is not None:
            namespace.define(signature)


def fake(name: str) -> Callable:
    """Registers what an op that has C++ kernels returns, without values."""

    def register(function: Callable) -> Callable:
        for namespace in (library, compiled):
            if namespace is not None:
                torch.library.register_fake(f"{namespace.ns}::{name}", function, lib=namespace)
        return function

    return register


LOW, TF32, FREE = 1, 8, 16  # bits of the `compute` argument; between the first two the backend, which FREE says nobody forced


def compute_mode(backend: int) -> int:
    """The `compute` argument: the backend, and whether matrix products may round their operands to bfloat16 (autocast
    to it) or to tf32 (on GPUs, where PyTorch's own products may); on GPUs, whether another backend may run that measured faster."""
    low = any(torch.is_autocast_enabled(d) and torch.get_autocast_dtype(d) is torch.bfloat16 for d in ("cpu", "cuda"))
    gpu = backends.BACKENDS[backend] in ("triton", "cuda")
    free = gpu and backends.forced() is None
    return LOW * low + 2 * backend + TF32 * (gpu and backends.tf32()) + FREE * free


def mode_for(op: str, edges: EdgeState, columns: int = 0, over: str | None = None) -> int:
    """`compute_mode` of the backend that runs `op` on these edge states, read in up to `columns` columns; over: what attention looks at. Where none
    is forced, chains that Triton's kernels would spill go to the CUDA kernels.

    Raises:
        NotImplementedError: a forced backend that cannot run; a chain of updates that the Triton kernels do not take (ngkernels.limits);
            weights on the CPU under states on a GPU.
    """
    if panels.needed(edges):
        raise NotImplementedError(f"{op}: weights on the CPU under states on a GPU are built for aggregate and attend; move the weights with .to({str(edges.device)!r})")
    backend = backends.choose(op, edges.weights[0].device)
    if limits.heavy(edges, backends.BACKENDS[backend]) and limits.taken_by_cuda(edges, columns):
        return compute_mode(backends.BACKENDS.index("cuda"))
    reason = None if over == "all" else limits.why_not(edges, backends.BACKENDS[backend])
    if reason is not None:
        raise NotImplementedError(f"{op}: {reason}")
    return compute_mode(backend)


def backend_of(compute: int) -> str:
    return backends.BACKENDS[compute >> 1 & 3]


def split_shapes(shapes: list[int]) -> list[list[int]]:
    """The shapes in a flat list of rank and sizes, one after the other."""
    out, at = [], 0
    while at < len(shapes):
        out.append(list(shapes[at + 1 : at + 1 + shapes[at]]))
        at += 1 + shapes[at]
    return out


def room(tensors: Sequence[torch.Tensor], need: Sequence[bool]) -> list[torch.Tensor]:
    """Uninitialised contiguous gradients; an empty tensor where none is needed."""
    pairs = zip(tensors, need, strict=True)
    return [t.new_empty(0) if not n else torch.empty_like(t) if t.is_contiguous() else t.new_empty(t.shape) for t, n in pairs]


def empty_gradients(e: E, need: list[bool]) -> list[torch.Tensor]:
    """Uninitialised gradients: of weights with their strides (a transposed view gets a transposed gradient); else contiguous."""
    w, tensors = len(e.weights), e.differentiable
    like = [torch.empty_like(t) if n else t.new_empty(0) for t, n in zip(tensors[:w], need[:w], strict=True)]
    return like + room(tensors[w:], need[w:])


library.define("gradient_like(Tensor weight) -> Tensor")


@torch.library.impl("ngkernels::gradient_like", "CompositeExplicitAutograd", lib=library)
def _gradient_like(weight: torch.Tensor) -> torch.Tensor:
    """Where C++ kernels write the gradient of a weight that lies in a file."""
    in_file = mapped.gradient_like(weight)
    return torch.empty_like(weight) if in_file is None else in_file


@contextlib.contextmanager
def autograd_enabled() -> Iterator[None]:
    """Autograd inside an op's implementation, where the dispatcher has already left it."""
    key = torch._C.DispatchKey.AutogradFunctionality
    with torch._C._SetExcludeDispatchKeyGuard(key, False), torch.enable_grad():
        yield


def reference_gradients(forward: Callable, e: E, grads: list[torch.Tensor], need: list[bool], more: tuple[torch.Tensor, ...] = (), create_graph: bool = False) -> list[torch.Tensor]:
    """Gradients of `forward(e, *more)`, a list of tensors, by autograd through the plain-PyTorch op."""
    with autograd_enabled():
        leaves = tensors = [*e.differentiable, *more]
        if not create_graph:
            tensors = [t.detach().requires_grad_(n) for t, n in zip(tensors, need, strict=True)]
        outputs = forward(e.with_tensors(tensors[: len(tensors) - len(more)]), *tensors[len(tensors) - len(more) :])
        wanted = [t for t, n in zip(tensors, need, strict=True) if n]
        # an empty gradient: of a block that nothing reads, or that has no edges
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad and g.numel()]
        found = torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], create_graph=create_graph, allow_unused=True) if pairs and wanted else [None] * len(wanted)
    it = iter(zip(wanted, found, strict=True))
    found = [next(it) if n else (None, None) for n in need]
    if create_graph:
        return [t.new_empty(0) if w is None else torch.zeros_like(w) if g is None else g for t, (w, g) in zip(leaves, found, strict=True)]
    n = len(need) - len(more)
    out = [*empty_gradients(e, need[:n]), *room(more, need[n:])]
    for to, (w, g) in zip(out, found, strict=True):
        if w is not None:
            to.zero_() if g is None else to.copy_(g)
    return out


def wanted(grads: list[torch.Tensor], need: list[bool]) -> list[torch.Tensor | None]:
    """None for those that are not needed."""
    return [g if n else None for g, n in zip(grads, need, strict=True)]


def gradients(e: E, found: list[torch.Tensor], need: list[bool]) -> list[torch.Tensor | None]:
    """What autograd gets of an op's gradients: None for those that are not needed, and for weights whose gradients go to files."""
    found = wanted(found, need)
    return [*map(mapped.take, e.weights, found), *found[len(e.weights) :]]


def save(ctx, e: E, *extra: torch.Tensor) -> None:
    """Keep the expression for backward. Carriers hold nothing: only their number is kept."""
    ctx.sizes = (len(e.weights), len(e.xs), len(e.params))
    ctx.carrier_shapes = [tuple(c.shape) for c in e.carriers]
    ctx.program = e.program
    ctx.save_for_backward(*e.weights, *e.xs, *e.params, e.table, e.topology, *extra)


def load(ctx) -> tuple[E, list[torch.Tensor]]:
    saved = ctx.saved_tensors
    (table, topology, *extra), lists = saved[sum(ctx.sizes) :], cut(saved, ctx.sizes)
    carriers = [table.new_zeros(1).expand(shape) for shape in ctx.carrier_shapes]
    return E(*lists, table, carriers, topology, ctx.program), extra


"""node_map: the node side of PNA with the norm and the activation after it, in one pass over the nodes each way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .. import backends
from ..checks import ACTIVATIONS, check_activation, check_bias, check_matrix
from ..reference import node_map as reference
from . import _triton
from . import expression as ex
from .autograd import register

FUNCTIONS = reference.ACTIVATIONS  # of torch, by name
# unit: 1 for each factor that is 1, and that `factors` leaves out; affine: weight and bias of the norm; bounds: of segments, see After
_ARGUMENTS = "Tensor x, Tensor reduced, Tensor[] maps, Tensor[] factors, int[] unit, Tensor[] affine, Tensor bounds, int[] form, float eps, int compute"
ROWS = 1 << 16  # that plain operations take at a time
ex.define(f"node_map({_ARGUMENTS}) -> (Tensor, Tensor)")
ex.define(f"node_map_backward(Tensor grad, Tensor stats, {_ARGUMENTS}, bool[] need) -> Tensor[]")


@dataclass(frozen=True)
class After:
    """act(norm(y)), or norm(act(y)) where `act_first`.

    norm: None, "layer" (each row: s = sqrt(var + eps)) or "graph" (rows bounds[k] .. bounds[k + 1] - 1 together: s = std + eps), with
    weight and bias [O]; bounds: int64 [segments + 1].
    """

    act: str = "identity"
    norm: str | None = None
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    bounds: torch.Tensor | None = None
    eps: float = 1e-5
    act_first: bool = False


def _outputs(x, maps, bounds, form) -> tuple[torch.Tensor, torch.Tensor]:
    segments = bounds.shape[0] - 1 if reference.NORMS[form[0]] == "graph" else 0
    return x.new_empty(x.shape[0], maps[-1].shape[0]), x.new_empty(segments, 2)


@ex.fake("node_map")
def _fake(x, reduced, maps, factors, unit, affine, bounds, form, eps, compute):
    return _outputs(x, maps, bounds, form)


def _empty_gradients(x, reduced, maps, affine, need) -> list[torch.Tensor]:
    return ex.room([x, reduced, *maps, *affine], need)


@ex.fake("node_map_backward")
def _fake_backward(grad, stats, x, reduced, maps, factors, unit, affine, bounds, form, eps, compute, need):
    return _empty_gradients(x, reduced, maps, affine, need)


def _forward(x, reduced, maps, factors, unit, affine, bounds, form, eps, compute):
    out, stats = _outputs(x, maps, bounds, form)
    if ex.backend_of(compute) == "triton":
        _triton.node_map(x, reduced, maps, factors, unit, affine, bounds, form, eps, out, stats)
        return out, stats
    with torch.no_grad():
        return reference.node_map(x, reduced, maps, factors, unit, affine, bounds, form, eps), stats.zero_()


def _differentiate(grads, leaves, need, factors, unit, bounds, form, eps, create_graph=False) -> list[torch.Tensor | None]:
    """Gradients of x, reduced, the maps, weight and bias of the norm, through the plain operations."""
    affine = leaves[len(leaves) - 2 :] if reference.NORMS[form[0]] else []
    z = reference.node_map(*leaves[:2], leaves[2 : len(leaves) - len(affine)], factors, unit, affine, bounds, form, eps)
    found = iter(
        torch.autograd.grad(z, [t for t, n in zip(leaves, need, strict=True) if n], grads, create_graph=create_graph, allow_unused=True)
    )
    return [next(found) if n else None for n in need]


def _backward(grad, stats, x, reduced, maps, factors, unit, affine, bounds, form, eps, compute, need):
    grads = _empty_gradients(x, reduced, maps, affine, need)
    if ex.backend_of(compute) == "triton":
        _triton.node_map_backward(grad, stats, x, reduced, maps, factors, unit, affine, bounds, form, eps, grads)
        return grads
    for to in grads[2:]:
        to.zero_()
    for rows in _pieces(x.shape[0], form) if any(need) else ():
        with ex.autograd_enabled():
            leaves = [t.detach().requires_grad_(n) for t, n in zip([x[rows], reduced[rows], *maps, *affine], need, strict=True)]
            found = _differentiate(grad[rows], leaves, need, [f[rows] for f in factors], unit, bounds, form, eps)
        for k, (to, g) in enumerate(zip(grads, found, strict=True)):
            if k < 2 and need[k]:
                to[rows].zero_() if g is None else to[rows].copy_(g)
            elif g is not None:
                to += g
        del leaves, found
    return grads


def _pieces(rows: int, form) -> list[slice]:
    """Rows that the plain operations take at a time: they keep several tensors of [rows, C]. All, where a norm joins them."""
    step = max(1, rows) if reference.NORMS[form[0]] == "graph" else ROWS
    return [slice(first, first + step) for first in range(0, max(1, rows), step)]


def _setup(ctx, inputs, output):
    x, reduced, maps, factors, unit, affine, bounds, form, eps, compute = inputs
    ctx.save_for_backward(x, reduced, *maps, *factors, *affine, bounds, output[1])
    ctx.sizes, ctx.constants = (len(maps), len(factors), len(affine)), (unit, form, eps, compute)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _take(tensors, sizes) -> tuple:
    """x, reduced, maps, factors, affine and the rest, from a flat list."""
    m, f, a = sizes
    rest = list(tensors[2:])
    return tensors[0], tensors[1], rest[:m], rest[m : m + f], rest[m + f : m + f + a], *rest[m + f + a :]


def _spread(found, sizes) -> list[torch.Tensor | None]:
    """Gradients of x, reduced, maps and affine among None for factors and bounds."""
    m, f, _ = sizes
    return [*found[: 2 + m], *[None] * f, *found[2 + m :], None]


def _autograd(ctx, need, grad, _stats):
    if grad is None:
        return [None] * len(need)
    x, reduced, maps, factors, affine, bounds, stats = _take(ctx.saved_tensors, ctx.sizes)
    unit, form, eps, compute = ctx.constants
    m, f, _ = ctx.sizes
    need = [*need[: 2 + m], *need[2 + m + f : -1]]
    found = _run_backward(grad, stats, x, reduced, maps, factors, unit, affine, bounds, form, eps, compute, need)
    return _spread(ex.wanted(found, need), ctx.sizes)


_run = register("node_map", _forward, _autograd, _setup)


def _setup_double(ctx, inputs, output):
    grad, _, x, reduced, maps, factors, unit, affine, bounds, form, eps, _, need = inputs
    ctx.save_for_backward(x, reduced, *maps, *factors, *affine, bounds, grad)
    ctx.sizes, ctx.constants, ctx.need = (len(maps), len(factors), len(affine)), (unit, form, eps), need
    ctx.set_materialize_grads(False)


def _autograd_double(ctx, need, *second):
    """Through the plain operations: they are small matrices' or nodes', and there is no kernel."""
    x, reduced, maps, factors, affine, bounds, grad = _take(ctx.saved_tensors, ctx.sizes)
    m, f, _ = ctx.sizes
    need = [need[0], *need[2 : 4 + m], *need[4 + m + f : -1]]  # of grad, x, reduced, maps, affine
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (grad, x, reduced, *maps, *affine)]
        inner = _differentiate(leaves[0], leaves[1:], ctx.need, factors, ctx.constants[0], bounds, *ctx.constants[1:], create_graph=True)
        pairs = [(g, s) for g, s in zip(inner, second, strict=True) if g is not None and s is not None]
        wanted = [t for t, n in zip(leaves, need, strict=True) if n]
        found = [None] * len(wanted)
        if pairs and wanted:
            found = torch.autograd.grad([g for g, _ in pairs], wanted, [s for _, s in pairs], allow_unused=True)
    it = iter(found)
    found = [next(it) if n else None for n in need]
    return [found[0], None, *_spread(found[1:], ctx.sizes)]


_run_backward = register("node_map_backward", _backward, _autograd_double, _setup_double)


def node_map(
    x: torch.Tensor, reduced: torch.Tensor, maps: Sequence[torch.Tensor], factors: Sequence[torch.Tensor | None], after: After | None = None
) -> torch.Tensor:
    """after(x W_x^T + sum over s of a_s * (reduced W_s^T) + b) for every row.

    Args:
        x: [R, F]. reduced: [R, C]; its dtype is that of the result.
        maps: (matrix [O, F + S C] = [W_x | W_0 | W_1 ..], bias [O]); or (matrix, bias, lin, lin_bias), where [W_x | ..] = lin matrix and
            b = lin bias + lin_bias.
        factors: S of them, [R] or [R, 1] without gradient, or None for 1.
        after: see After.

    Returns:
        Tensor [R, O].

    Raises:
        ValueError: shapes that do not fit, an unknown activation or norm. TypeError: bounds on another device.
        NotImplementedError: a forced backend that cannot run.

    Note: kept for backward: the arguments, and two numbers a segment; y is computed again (on GPUs all rows at once: [R, O] twice while
        backward runs). Sums over rows have one order: bitwise the same from run to run and for any number of threads. Never rounded to
        bfloat16 or tf32. Double backward, and transforms of torch.func, go through the plain operations.

    Reference: Corso et al., NeurIPS 2020 (PNA).
    """
    after = After() if after is None else after
    _check(x, reduced, maps, factors, after)
    dtype = reduced.dtype
    given = [_as(f.detach(), dtype).contiguous() for f in factors if f is not None]
    unit = [int(f is None) for f in factors]
    affine = [_as(after.weight, dtype), _as(after.bias, dtype)] if after.norm else []
    bounds = reduced.new_empty(0, dtype=torch.int64) if after.bounds is None else after.bounds
    form = [reference.NORMS.index(after.norm), ACTIVATIONS.index(after.act), int(after.act_first)]
    arguments = (_as(x, dtype), reduced, [_as(m, dtype) for m in maps], given, unit, affine, bounds, form, after.eps)
    if torch._C._are_functorch_transforms_active():
        return reference.node_map(*arguments)
    backend = backends.choose("node_map", reduced.device)
    return _run(*arguments, 2 * backend)[0]


def _as(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return t if t.dtype == dtype else t.to(dtype)


def _check(x, reduced, maps, factors, after: After) -> None:
    op = "node_map"
    if x.dim() != 2 or reduced.dim() != 2 or x.shape[0] != reduced.shape[0]:
        raise ValueError(f"{op}: expected x [R, F] and reduced [R, C] of as many rows, got {tuple(x.shape)} and {tuple(reduced.shape)}")
    if len(maps) not in (2, 4):
        raise ValueError(f"{op}: expected maps (matrix, bias) or (matrix, bias, lin, lin_bias), got {len(maps)} tensors")
    inputs = x.shape[1] + len(factors) * reduced.shape[1]
    for name, weight, bias in zip(("matrix", "lin"), maps[::2], maps[1::2], strict=False):
        check_matrix(op, name, weight, inputs, x.device)
        inputs = weight.shape[0]
        check_bias(op, f"bias of {name}", bias, inputs)
    for k, f in enumerate(factors):
        if f is not None and f.numel() != x.shape[0]:
            raise ValueError(f"{op}: expected factors[{k}] with {x.shape[0]} entries (the rows of x), got {tuple(f.shape)}")
    check_activation(op, after.act)
    if after.norm not in reference.NORMS:
        raise ValueError(f"{op}: expected norm None, layer or graph, got {after.norm!r}")
    if after.norm is not None:
        check_bias(op, "weight of the norm", after.weight, inputs)
        check_bias(op, "bias of the norm", after.bias, inputs)
    if after.norm == "graph" and (after.bounds is None or after.bounds.dim() != 1 or after.bounds.dtype != torch.int64):
        raise ValueError(f"{op}: expected bounds, int64 [segments + 1], for a norm over segments, got {after.bounds}")
    if after.norm == "graph" and after.bounds.device != x.device:
        raise TypeError(f"{op}: expected bounds on {x.device}, got {after.bounds.device}; move them with .to({str(x.device)!r})")

"""Node states in Triton: every node term projected once a node, and the gradients of node states from those of the terms.

One row of a result depends on one row of its input alone, whatever the number of nodes: torch's own products do not promise that. What
there is to do comes as a table, so that one compiled kernel serves all expressions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..kept import Recent
from .edge_math import dot
from .launch import interpreted, run
from .lower import Lowered, Term
from .tiles import pick

BLOCK = tl.constexpr(32)  # columns at a time
NODES = 32  # of a program


@triton.jit
def times(x, row_stride, rows, live, first, last, w, k_stride, n_stride, columns, acc, PRECISION: tl.constexpr):
    """acc [nodes, BLOCK] + x[rows, first:last] w, for the first `columns` columns; w's element (k, n) lies at k * k_stride + n * n_stride."""
    n = tl.arange(0, BLOCK)
    k = first
    while k < last:
        here = k + tl.arange(0, BLOCK)
        a = tl.load(x + (rows * row_stride)[:, None] + here[None, :], mask=live[:, None] & (here < last)[None, :], other=0)
        b = tl.load(w + (here * k_stride)[:, None] + (n * n_stride)[None, :], mask=(here < last)[:, None] & (n < columns)[None, :], other=0)
        acc = dot(a, b, acc, PRECISION)
        k += BLOCK
    return acc


@triton.jit(do_not_specialize=["n_nodes", "columns"])
def project_kernel(out, xs, params, jobs, n_nodes, columns, POINTERS: tl.constexpr, PRECISION: tl.constexpr, SIZE: tl.constexpr):
    """out [2, N, columns]: node terms of destinations (with their biases), then of sources; a job is BLOCK columns of one of them."""
    rows = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    live, n = rows < n_nodes, tl.arange(0, BLOCK)
    job = jobs + tl.program_id(1) * 7
    x, width, w, b, side, column, count = tl.load(job), tl.load(job + 1), tl.load(job + 2), tl.load(job + 3), tl.load(job + 4), tl.load(job + 5), tl.load(job + 6)
    acc = tl.zeros((SIZE, BLOCK), params.dtype.element_ty)
    acc += tl.load(params + b + n, mask=n < tl.where(b >= 0, count, 0), other=0)[None, :]
    acc = times(pick(xs, x, POINTERS), width, rows, live, 0, width, params + w, 1, width, count, acc, PRECISION)
    here = (side * n_nodes + rows)[:, None] * columns + (column + n)[None, :]
    tl.store(out + here, acc, mask=live[:, None] & (n < count)[None, :])


@triton.jit(do_not_specialize=["n_nodes", "columns", "width", "parts"])
def node_gradient_kernel(grad_x, grad, params, jobs, n_nodes, columns, width, parts, PRECISION: tl.constexpr, SIZE: tl.constexpr):
    """grad_x [N, width]: over all terms of one node state, their gradients in grad [2, N, columns] times their matrices."""
    rows = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    live = rows < n_nodes
    first = tl.program_id(1) * BLOCK
    acc = tl.zeros((SIZE, BLOCK), grad_x.dtype.element_ty)
    part, job = 0, jobs
    while part < parts:
        w, side, column, count = tl.load(job), tl.load(job + 1), tl.load(job + 2), tl.load(job + 3)
        acc = times(grad + side * n_nodes * columns, columns, rows, live, column, column + count, params + w + first - column * width, width, 1, width - first, acc, PRECISION)
        part += 1
        job += 4
    n = first + tl.arange(0, BLOCK)
    tl.store(grad_x + (rows * width)[:, None] + n[None, :], acc, mask=live[:, None] & (n < width)[None, :])


def _projections(terms: tuple[Term, ...], device: torch.device) -> torch.Tensor:
    """Jobs of project_kernel: node state, its width, matrix, bias (-1: none), side, column, number of columns."""
    jobs = []
    for t in terms:
        for side, w in enumerate((t.wd, t.ws)):
            for n in range(0, t.n_out, BLOCK.value):
                bias = t.b + n if side == 0 and t.b >= 0 else -1
                jobs.append([t.x, t.width, w + n * t.width, bias, side, t.column + n, min(BLOCK.value, t.n_out - n)])
    return torch.tensor(jobs, dtype=torch.int64).to(device)


def _parts(terms: tuple[Term, ...], device: torch.device) -> torch.Tensor:
    """Jobs of node_gradient_kernel: matrix, side, first column and number of columns of each term and side."""
    jobs = [[w, side, t.column, t.n_out] for t in terms for side, w in enumerate((t.wd, t.ws))]
    return torch.tensor(jobs, dtype=torch.int64).to(device)


_jobs = Recent(1024)


def _size() -> int:
    return 512 if interpreted() else NODES


def project(low: Lowered, xs: Sequence[torch.Tensor], params: torch.Tensor, precision: str) -> torch.Tensor:
    """[2, N, columns]: the node terms of all nodes as destinations and as sources."""
    if not low.terms:
        return params
    n = xs[0].shape[0]
    out = params.new_empty(2, n, low.columns)
    if n:
        jobs = _jobs.get((_projections, low.terms, params.device), lambda: _projections(low.terms, params.device))
        pointers = (*xs, *[xs[-1]] * ((1 << (len(xs) - 1).bit_length()) - len(xs)))
        run(project_kernel, (triton.cdiv(n, _size()), jobs.shape[0]), out, pointers, params, jobs, n, low.columns, len(pointers), precision, _size(), num_warps=4)
    return out


def node_gradients(grad: torch.Tensor, low: Lowered, params: torch.Tensor, grad_xs: Sequence[torch.Tensor], precision: str) -> None:
    """Writes the gradients of node states from those of the node terms, the first columns of grad [2, N, *]."""
    for k, grad_x in enumerate(grad_xs):
        terms = tuple(t for t in low.terms if t.x == k)
        if not grad_x.numel() or not terms:
            continue
        n, width = grad_x.shape
        parts = _jobs.get((_parts, terms, params.device), lambda terms=terms: _parts(terms, params.device))
        grid = (triton.cdiv(n, _size()), triton.cdiv(width, BLOCK.value))
        run(node_gradient_kernel, grid, grad_x, grad, params, parts, n, grad.shape[2], width, parts.shape[0], precision, _size(), num_warps=4)


def parameter_gradients(grad: torch.Tensor, terms: Sequence[Term], xs: Sequence[torch.Tensor], grad_params: torch.Tensor) -> None:
    """Adds the gradients of the projections to those of all parameters."""
    for t in terms:
        columns = slice(t.column, t.column + t.n_out)
        for side, w in ((grad[0, :, columns], t.wd), (grad[1, :, columns], t.ws)):
            grad_params[w : w + t.n_out * t.width].view(t.n_out, t.width).addmm_(side.T, xs[t.x])
        if t.b >= 0:
            grad_params[t.b : t.b + t.n_out] += grad[0, :, columns].sum(0)

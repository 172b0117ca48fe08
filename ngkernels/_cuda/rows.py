"""What kernels are told of the blocks of a graph (csrc/cuda/args.h Rows): where their neurons and edges are, and their edge values."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..topology import DENSE, KINDS, SAME, SPARSE, SPARSE_RAW, TOKEN
from . import launch
from .plan import TILE, Plan, Row, Work, log_rows, turned

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NO_VALUES = (0,) * 6
ROWS_INTS, VIEWS = 63, 7  # of a block, which ends with its views of edge values
NUMBERED = 40  # bits of a number of bytes; a tensor's number is above them


def table_of(plan: Plan, work: Work, affine: int, directed: bool, lists: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
    """int64 [blocks of the work, ROWS_INTS], on the device of the plan. It is made once for a layout of the tensors; where these lie is added
    in each call.

    Args:
        affine: place of the weights' scales and shifts among the constants, -1: none. directed: whether encoders know directions.
        lists: weights, their gradients, values, gradients of carriers, and what partners add to gradients of weights and of carriers.
    """
    tensors = [t for found in lists for t in found]
    layout = tuple((t.dtype, t.stride(), t.numel() > 0) for t in tensors)
    key = (affine, directed, tuple(map(len, lists)), layout)
    table = work.tables.get(key, lambda: _numbered(plan, work, affine, directed, lists)).clone()
    address = table[:, -VIEWS * len(NO_VALUES) :: len(NO_VALUES)]
    bases = launch.numbers([0, *(t.data_ptr() for t in tensors)], plan.device)
    address.copy_((address & (1 << NUMBERED) - 1) + bases[address >> NUMBERED])
    return table


def _numbered(plan: Plan, work: Work, affine: int, directed: bool, lists: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
    number = iter(range(1, 1 + sum(map(len, lists))))
    numbered = [[(next(number), t) for t in found] for found in lists]
    rows = [_row(plan, work, k, affine, directed, *numbered) for k in work.active]
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, ROWS_INTS).to(plan.device)


def _row(plan: Plan, work: Work, k: int, affine: int, directed: bool, weights, grad_weights, values, grad_carriers, other_weights, other_carriers) -> list[int]:
    """Of one block, and of tensors with their numbers, which stand for their addresses."""
    r, partner, listed = plan.rows[k], turned(plan.rows[k]), plan.listed.get(k)
    own_affine, partner_affine = (-1 if affine < 0 or end.weight < 0 else affine + 2 * end.weight for end in (r, partner))
    direction, partner_direction = (end.variant if directed else 0 for end in (r, partner))
    sparse = KINDS[r.kind] == SPARSE
    head = [r.n_src, r.n_dst, r.src, r.dst, r.node_stride, r.out, r.out_stride, direction, own_affine, int(work.added[k])]
    if listed:
        head += [listed.edges.data_ptr(), len(listed.edges), listed.runs.data_ptr(), TILE.bit_length() - 1]
    else:
        head += [0, 0, sum(1 << first for first in range(0, TILE, 1 << log_rows(r))), log_rows(r)]
    head += [int(sparse and r.src_axis == 2), partner_direction, partner_affine, int(sparse and r.partner_axis == 2)]
    head += [int(bool(r.flags & flag)) for flag in (TOKEN, SPARSE_RAW, SAME)]
    raw = (_raw(tensors, r) for tensors in (weights, grad_weights))
    own = (values_of(r, of_block(tensors, r), False, r.emit_offset, r.emit_stride) for tensors in (values, grad_carriers))
    theirs = [across(_raw(tensors, partner), bool(listed) or r.flags & SPARSE_RAW) for tensors in (weights, other_weights)]
    theirs.append(across(values_of(partner, of_block(other_carriers, partner), False, partner.emit_offset, partner.emit_stride), bool(listed)))
    return [*head, *(v for view in (*raw, *own, *theirs) for v in view)]


def _raw(tensors: Sequence[tuple[int, torch.Tensor]], r: Row) -> tuple[int, ...]:
    found = tensors[r.weight] if len(tensors) and r.weight >= 0 else None
    return values_of(r, found, r.src_axis == 2, r.offset, r.edge_stride, bool(r.flags & SPARSE_RAW))


def of_block(tensors: Sequence, r: Row):
    """What a block has of tensors by block; a packed graph has one of all."""
    return tensors[0 if r.emit_offset >= 0 else r.block] if len(tensors) and (r.block >= 0 or r.emit_offset >= 0) else None


def across(view: tuple[int, ...], listed: int) -> tuple[int, ...]:
    """The view of partners by their own source and destination, as edges see it; `listed`: by number, the same for both."""
    address, dtype, copy, source, destination, channel = view
    return view if listed else (address, dtype, copy, destination, source, channel)


def values_of(r: Row, found: tuple[int, torch.Tensor] | None, flip: bool, offset: int, stride: int, diagonal: bool = False) -> tuple[int, ...]:
    """A block's view of edge values (args.h Values), zeros where there are none; for the address, the tensor's number and bytes from its start.

    Args:
        flip: the tensor's first axis runs over destinations. offset, stride: of a packed graph, the block's first edge and edges from one
            copy to the next; else offset is -1. diagonal: only pairs of equal index have values.
    """
    if found is None or not found[1].numel():
        return NO_VALUES
    number, t = found
    listed = KINDS[r.kind] != DENSE or diagonal  # by number
    if offset >= 0:  # rows of one tensor [E, C]
        e = t.stride(0)
        source, destination = (e, 0) if listed else (e, r.n_src * e) if flip else (r.n_dst * e, e)
        start, copy, channel = offset * e, stride * e, t.stride(1)
    elif listed:
        start, copy, source, destination, channel = 0, t.stride(0), t.stride(1), 0, t.stride(2)
    else:
        start, copy, source, destination, channel = 0, t.stride(0), t.stride(2 if flip else 1), t.stride(1 if flip else 2), t.stride(3)
    return (number << NUMBERED) + start * t.element_size(), DTYPES.index(t.dtype), copy, source, destination, channel

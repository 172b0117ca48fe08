"""attend over all pairs at once: logits, softmax and weighted sums as [pairs, ...] tensors."""

from __future__ import annotations

import torch

from .evaluate import run_program


def kept(seed: int, i: torch.Tensor, j: torch.Tensor, heads: int, dropout: float) -> torch.Tensor:
    """Dropout's mask [P, H] times 1 / (1 - dropout): a hash of (seed, i, j, head), the same on every backend."""
    low = 0xFFFFFFFF
    head = torch.arange(heads, device=i.device)
    h = (i[:, None] * 0x9E3779B1 + j[:, None] * 0x85EBCA77 + head * 0xC2B2AE3D + (seed & low)) & low
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        h = ((h ^ (h >> shift)) * factor + (seed >> 32 & low)) & low
    h = h ^ (h >> 16)
    return (h >= int(dropout * 2**32)).double() / (1 - dropout)


def attend(
    weights, xs, params, table, carriers, topology, program, q, k, v, shape, scale, dropout, seed, rows, compute
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(sum_j a_ij v_j * (V e_ij) [rows, H Dv], sum_j a_ij e_ij [rows, H, De or 0], log-sum-exp [rows, H]).

    `shape`: heads, 1 when values are multiplied by the edge's share, 1 when the sums of edge states are wanted. A row without
    pairs is 0.
    """
    heads, multiply, sums = shape
    edges, e, shares = run_program(weights, xs, params, table, carriers, topology, program, compute)
    used = torch.cat([edges.used, edges.partner_used])
    i, j, out = edges.dst[used], edges.src[used], torch.cat([edges.out, edges.partner_out])[used]
    e, shares, d = e[used], shares[used], q.shape[1]
    logits = ((q[i] + shares[:, :d]) * (k[j] + shares[:, d : 2 * d])).unflatten(1, (heads, -1)).sum(-1) * scale
    index = out[:, None].expand_as(logits)
    top = logits.new_zeros(rows, heads).scatter_reduce(0, index, logits.detach(), "amax", include_self=False)
    p = (logits - top[out]).exp()
    total = p.new_zeros(rows, heads).index_add(0, out, p)
    empty = total == 0
    a = p / torch.where(empty, 1.0, total)[out]
    if dropout:
        a = a * kept(seed, i, j, heads, dropout).to(a.dtype)
    values = v[j] * shares[:, 2 * d :] if multiply else v[j]
    values = (a[:, :, None] * values.unflatten(1, (heads, -1))).flatten(1)
    summed = a.new_zeros(rows, heads, e.shape[1] if sums else 0)
    if sums:
        summed = summed.index_add(0, out, a[:, :, None] * e[:, None])
    lse = torch.where(empty, 0.0, top + torch.where(empty, 1.0, total).log())
    return values.new_zeros(rows, v.shape[1]).index_add(0, out, values), summed, lse

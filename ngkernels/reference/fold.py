"""Products and sums of small matrices in plain PyTorch."""

from __future__ import annotations

import torch

from ..fold import ADD, COPY, LEAF, RECORD


def fold(leaves: list[torch.Tensor], recipe: list[int], like: torch.Tensor) -> torch.Tensor:
    """The stored matrices of ngkernels.fold.Fold, one after the other: a vector in the dtype and on the device of `like`."""
    values, stored = [], []
    for k in range(0, len(recipe), RECORD):
        op, a, b, offset = recipe[k : k + RECORD]
        if op == LEAF:
            value = leaves[a] if leaves[a].dim() == 2 else leaves[a][:, None]
        elif op == COPY:
            value = values[a]
        else:
            value = values[a] + values[b] if op == ADD else values[a] @ values[b]
        values.append(value)
        if offset >= 0:
            stored.append((offset, value.reshape(-1)))
    stored.sort(key=lambda pair: pair[0])
    return torch.cat([like.new_zeros(0), *[value for _, value in stored]])

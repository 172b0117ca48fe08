"""The node side of PNA in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..checks import ACTIVATIONS as NAMES
from .evaluate import _ACT as ACTIVATIONS

NORMS = (None, "layer", "graph")


def linear(x, reduced, maps, factors, unit) -> torch.Tensor:
    """x W_x^T + sum over s of a_s (reduced W_s^T) + b, for [W_x | W_0 | W_1 ..] and b of `maps` = (matrix, bias[, lin, lin_bias])."""
    matrix, bias, *lin = maps
    if lin:
        matrix, bias = lin[0] @ matrix, torch.addmv(lin[1], lin[0], bias)
    w_x, *w_s = matrix.split([x.shape[1], *[reduced.shape[1]] * len(unit)], 1)
    y, given = torch.addmm(bias, x, w_x.T), iter(factors)
    for one, w in zip(unit, w_s, strict=True):
        y = y + (reduced @ w.T if one else next(given) * (reduced @ w.T))
    return y


def normalise(y, kind: int, affine, bounds, eps: float) -> torch.Tensor:
    """Over each row ("layer"), or over the rows bounds[k] .. bounds[k + 1] - 1 together, with s = std + eps ("graph")."""
    if NORMS[kind] is None:
        return y
    if NORMS[kind] == "layer":
        return F.layer_norm(y, y.shape[1:], *affine, eps)
    count = bounds.diff()
    index = torch.repeat_interleave(torch.arange(len(count), device=y.device), count)

    def mean(v: torch.Tensor) -> torch.Tensor:
        return (v.new_zeros(len(count)).index_add(0, index, v.mean(1)) / count)[index, None]

    centred = y - mean(y)
    return centred / (mean(centred.square()).sqrt() + eps) * affine[0] + affine[1]


def node_map(x, reduced, maps, factors, unit, affine, bounds, form, eps) -> torch.Tensor:
    """act(norm(linear)), or norm(act(linear)); form: index into NORMS, activation, whether it comes first."""
    y = linear(x, reduced, maps, factors, unit)
    act = ACTIVATIONS[NAMES[form[1]]]
    return normalise(act(y), form[0], affine, bounds, eps) if form[2] else act(normalise(y, form[0], affine, bounds, eps))

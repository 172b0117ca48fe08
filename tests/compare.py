"""How results are compared: relative to the largest entry of each tensor, against a tolerance or against plain PyTorch's own error."""

from __future__ import annotations

import torch

Tensors = dict[str, torch.Tensor]


def _matching(found: Tensors, wanted: Tensors) -> None:
    assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
    for name, w in wanted.items():
        assert found[name].shape == w.shape, f"{name}: shape {tuple(found[name].shape)}, wanted {tuple(w.shape)}"


def largest(t: torch.Tensor) -> float:
    return t.abs().max().double().item() if t.numel() else 0.0


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return largest(a.double() - b.double())


def assert_close(found: Tensors, wanted: Tensors, tolerance: float = 1e-10, least: float = 1e-4) -> None:
    """Every tensor to `tolerance` of its largest entry plus `least`."""
    _matching(found, wanted)
    wrong = {}
    for name, w in wanted.items():
        error, allowed = distance(found[name], w), tolerance * (largest(w) + least)
        if not error <= allowed:
            wrong[name] = f"{error:.2e} > {allowed:.2e}"
    assert not wrong, wrong


def assert_budget(found: Tensors, wanted: Tensors, plain: Tensors, floor: float) -> None:
    """Error against float64 within twice that of plain PyTorch in the same precision, plus `floor` of the largest entry."""
    _matching(found, wanted)
    wrong = {}
    for name, w in wanted.items():
        assert found[name].dtype == plain[name].dtype, f"{name}: {found[name].dtype}, plain PyTorch has {plain[name].dtype}"
        error, allowed = distance(found[name], w), 2 * distance(plain[name], w) + floor * largest(w)
        if not error <= allowed:
            wrong[name] = f"{error:.2e} > {allowed:.2e}, plain {distance(plain[name], w):.2e}"
    assert not wrong, wrong


def assert_bitwise(found: Tensors, wanted: Tensors) -> None:
    _matching(found, wanted)
    wrong = {name: distance(found[name], w) for name, w in wanted.items() if not torch.equal(found[name], w)}
    assert not wrong, wrong

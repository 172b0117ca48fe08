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
    """Error against float64 within twice that of plain PyTorch in the same precision, plus `floor` of the largest entry.

    The gradients of the weights, a tensor for each block, are one; so are those of parameters that are one number: how near plain PyTorch comes
    to a single number is luck, which depends on the processor."""
    _matching(found, wanted)
    groups: dict[str, list[str]] = {}
    for name, w in wanted.items():
        assert found[name].dtype == plain[name].dtype, f"{name}: {found[name].dtype}, plain PyTorch has {plain[name].dtype}"
        number = name.startswith("grad.") and w.numel() == 1
        groups.setdefault("weights" if name.startswith("grad.weights.") else "numbers" if number else name, []).append(name)
    wrong = {}
    for names in groups.values():
        error, by_plain = (max(distance(r[n], wanted[n]) for n in names) for r in (found, plain))
        allowed = 2 * by_plain + floor * max(largest(wanted[n]) for n in names)
        if not error <= allowed:
            wrong[", ".join(names)] = f"{error:.2e} > {allowed:.2e}, plain {by_plain:.2e}"
    assert not wrong, wrong


def assert_bitwise(found: Tensors, wanted: Tensors) -> None:
    _matching(found, wanted)
    wrong = {name: distance(found[name], w) for name, w in wanted.items() if not torch.equal(found[name], w)}
    assert not wrong, wrong

"""Checks of arguments that several ops share; messages name op, rule, value and remedy."""

from __future__ import annotations

import torch

ACTIVATIONS = ("silu", "relu", "gelu", "tanh", "sigmoid", "leaky_relu", "identity")


def check_activation(op: str, name: str) -> None:
    if name not in ACTIVATIONS:
        raise ValueError(f"{op}: expected activation in {', '.join(ACTIVATIONS)}, got {name!r}")


def check_tensor(op: str, name: str, t: torch.Tensor, device: torch.device | None = None) -> None:
    if not isinstance(t, torch.Tensor) or not t.is_floating_point():
        raise TypeError(f"{op}: expected {name} to be a tensor of a floating dtype, got {t.dtype if isinstance(t, torch.Tensor) else type(t).__name__}")
    if device is not None and t.device != device:
        raise TypeError(f"{op}: expected {name} on {device}, got {t.device}; move it with .to({str(device)!r})")


def check_bias(op: str, name: str, b: torch.Tensor | None, width: int) -> None:
    if b is None:
        return
    check_tensor(op, name, b)
    if tuple(b.shape) != (width,):
        raise ValueError(f"{op}: expected {name} of shape ({width},), got {tuple(b.shape)}")


def check_matrix(op: str, name: str, w: torch.Tensor, columns: int | None, device: torch.device | None = None) -> None:
    check_tensor(op, name, w, device)
    if w.dim() != 2 or (columns is not None and w.shape[1] != columns):
        raise ValueError(f"{op}: expected {name} of shape (*, {'*' if columns is None else columns}), got {tuple(w.shape)}")

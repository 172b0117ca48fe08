"""Checks of what enters a model; every message names the rule, the value and what to do."""

from __future__ import annotations

import warnings

import torch

from ngkernels import NeuralGraph

CHECK_FINITE = (None, "warn", "error")


def check_known(op: str, **options: tuple) -> None:
    """Each option a pair (value, known values).

    Raises:
        ValueError: a value that is not known.
    """
    for name, (value, known) in options.items():
        if value not in known:
            raise ValueError(f"{op}: expected {name} in {', '.join(map(str, known))}, got {value!r}")


def check_layout(op: str, layout) -> tuple[int, ...]:
    """`layout` as a tuple of widths.

    Raises:
        ValueError: fewer than two layers, a width below 1. TypeError: widths that are no integers.
    """
    layout = tuple(layout)
    if any(isinstance(d, bool) or not isinstance(d, int) for d in layout):
        raise TypeError(f"{op}: expected layout of integers, got {layout}")
    if len(layout) < 2 or min(layout) < 1:
        raise ValueError(f"{op}: expected layout of at least 2 layers of at least 1 neuron, got {layout}")
    return layout


def check_batch(op: str, layout, weights, biases, edge_channels: int, node_channels: int) -> int:
    """B, after a check that weights and biases are those of B networks of `layout`.

    Raises:
        TypeError: no lists of tensors. ValueError: their number or shapes.
    """
    for name, tensors in (("weights", weights), ("biases", biases)):
        if isinstance(tensors, torch.Tensor) or not all(isinstance(t, torch.Tensor) for t in tensors):
            raise TypeError(f"{op}: expected {name} to be a list of tensors, one for each layer, got {type(tensors).__name__}")
        if len(tensors) != len(layout) - 1:
            raise ValueError(f"{op}: expected {len(layout) - 1} {name} (layout {layout}), got {len(tensors)}")
    batch = weights[0].shape[0] if weights[0].dim() else 0
    if batch < 1:
        raise ValueError(f"{op}: expected weights[0] of at least one network, got shape {tuple(weights[0].shape)}")
    for k, (w, b) in enumerate(zip(weights, biases, strict=True)):
        if tuple(w.shape) != (batch, layout[k], layout[k + 1], edge_channels):
            hint = "; a weight of torch.nn.Linear is (out, in): pass weight.T[None, :, :, None]" if w.dim() == 2 else ""
            raise ValueError(
                f"{op}: expected weights[{k}] of shape {(batch, layout[k], layout[k + 1], edge_channels)} (B, in, out, channels), got {tuple(w.shape)}{hint}"
            )
        if tuple(b.shape) != (batch, layout[k + 1], node_channels):
            raise ValueError(
                f"{op}: expected biases[{k}] of shape {(batch, layout[k + 1], node_channels)} (B, out, channels), got {tuple(b.shape)}"
            )
    return batch


def check_weights(op: str, graph: NeuralGraph, weights, channels: int) -> None:
    """As many weight tensors as `graph` has, of its shapes.

    Raises:
        ValueError: others.
    """
    wanted = graph.weight_shapes(channels)
    if len(weights) != len(wanted):
        raise ValueError(f"{op}: expected {len(wanted)} weight tensors (one for each forward block), got {len(weights)}")
    for k, (w, shape) in enumerate(zip(weights, wanted, strict=True)):
        short = channels == 1 and len(shape) == 4 and shape[0] == 1 and tuple(w.shape) == shape[1:3]
        if tuple(w.shape) != shape and not short:
            raise ValueError(f"{op}: expected weights[{k}] of shape {shape} (copies, n_src, n_dst, channels), got {tuple(w.shape)}")


def check_tensors(op: str, weights, biases, parameter: torch.Tensor, panels: bool = False) -> None:
    """Dtypes and devices that fit the model's parameters. panels: weights may be on the CPU under a model on a GPU (ngkernels.panels).

    Raises:
        TypeError: no floating dtype, float64 weights with a model that is not (or the other way), another device, a
            model of low precision.
    """
    if parameter.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{op}: expected a model of torch.float32 or torch.float64, got {parameter.dtype}; convert it with .float() and use torch.autocast"
        )
    double = parameter.dtype is torch.float64
    for name, tensors in (("weights", weights), ("biases", biases)):
        for k, t in enumerate(tensors):
            if not t.is_floating_point():
                raise TypeError(f"{op}: expected {name}[{k}] of a floating dtype, got {t.dtype}")
            if t.device != parameter.device and not (panels and name == "weights" and parameter.is_cuda and t.device.type == "cpu"):
                raise TypeError(
                    f"{op}: expected {name}[{k}] on {parameter.device} (the model's device), got {t.device}; move one of them with .to()"
                )
            if (t.dtype is torch.float64) != double:
                remedy = (
                    f"convert the {name} with .{'double' if double else 'float'}() or the model with .{'float' if double else 'double'}()"
                )
                raise TypeError(f"{op}: expected {name}[{k}] of a dtype that fits the model's {parameter.dtype}, got {t.dtype}; {remedy}")


def check_finite(op: str, weights, biases, how: str | None) -> None:
    """Warn or raise where an input holds NaN or infinity; None: do not look.

    Raises:
        ValueError: with "error".
    """
    if how is None:
        return
    for name, tensors in (("weights", weights), ("biases", biases)):
        for k, t in enumerate(tensors):
            if t.numel() and not all(torch.isfinite(v) for v in t.detach().aminmax()):
                message = f"{op}: expected finite {name}[{k}], got NaN or infinity; leave that network out, or pass check_finite=None"
                if how == "error":
                    raise ValueError(message)
                warnings.warn(message, RuntimeWarning, stacklevel=3)


def check_graph(op: str, graph: NeuralGraph, reverse: bool, layer: int | None) -> None:
    """A graph that a model with (without) reversed edges can read; node layer `layer` of each network is pooled.

    Raises:
        TypeError: no NeuralGraph. ValueError: a restricted or closed graph, reversed edges here but not there, no such layer.
    """
    if not isinstance(graph, NeuralGraph):
        raise TypeError(f"{op}: expected graph to be a NeuralGraph, got {type(graph).__name__}")
    if graph.rows is not None:
        raise ValueError(f"{op}: expected an unrestricted graph, got one restricted to node layer {graph.rows}")
    if graph.closed or any(p.token for p in graph.parts):
        raise ValueError(f"{op}: expected a graph of edges alone, got one with tokens or a closure; the model adds what it needs")
    if graph.has_reverse != reverse:
        raise ValueError(
            f"{op}: expected a graph with reverse={reverse} (the edges that the model reads), got {graph.has_reverse}; build it with reverse={reverse}"
        )
    depth = min(len(p.layers) for p in graph.parts)
    if layer is not None and not -depth <= layer < depth:
        raise ValueError(f"{op}: expected networks with a node layer {layer} (the model's pooling), got one of {depth} layers")

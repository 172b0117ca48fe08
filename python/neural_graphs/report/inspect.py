"""What is in a checkpoint, as a neural graph: node layers, blocks, nodes, edges, bytes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Any

from rich.table import Table

from ngkernels.planner import size_text

from ..build import Channels, Network, describe_safetensors

FOLD_ABOVE = 24  # more rows than this are folded: decoder blocks that are alike become one line


def inspect(path: str | os.PathLike, num_heads: int | None = None) -> dict[str, Any]:
    """The facts of a safetensors file, of the index of a sharded one or of a folder, from the headers alone.

    Returns:
        dict of file, architecture, nodes, edges, bytes (weights and biases in the file), layers (name, width, activation,
        bias), blocks (name, kind, src, dst, sizes, edges, channels, dtype, bytes, tensors), ignored (tensors that are no
        weights), not_modelled: numbers and texts only, for JSON.

    Raises:
        FileNotFoundError, CheckpointError, NotImplementedError: see neural_graphs.build.from_safetensors.
    """
    network = describe_safetensors(path, num_heads)
    origin, graph = network.origin, network.graph
    blocks = list(_blocks(network))
    stored = sum(b.numel() * b.element_size() for b, name in zip(network.biases, origin.biases[1:], strict=True) if name)
    activations = ("", *(network.activations or [""] * (len(origin.layers) - 2)), "")
    return {
        "file": os.fspath(path),
        "architecture": origin.architecture,
        "nodes": graph.num_nodes,
        "edges": graph.num_edges,
        "bytes": stored + sum(b["bytes"] for b in blocks),
        "layers": [
            {"name": name, "width": width, "activation": act, "bias": bias}
            for name, width, act, bias in zip(origin.layers, network.layout, activations, origin.biases, strict=True)
        ],
        "blocks": blocks,
        "ignored": list(origin.ignored),
        "not_modelled": list(origin.not_modelled),
    }


def _blocks(network: Network) -> Iterable[dict[str, Any]]:
    """Facts of each block; the bytes of a tensor that several blocks have are counted with the first."""
    part, origin = network.graph.parts[0], network.origin
    counted: set[str] = set()
    for block, weight, name, tensors in zip(part.blocks, network.weights, origin.blocks, origin.tensors, strict=True):
        planes = weight.planes if isinstance(weight, Channels) else (weight,)
        yield {
            "name": name,
            "kind": block.kind,
            "src": origin.layers[block.src],
            "dst": origin.layers[block.dst],
            "sizes": [part.layers[block.src], part.layers[block.dst]],
            "edges": part.edges_of(block),
            "channels": weight.shape[-1],
            "dtype": str(weight.dtype).removeprefix("torch."),
            "bytes": sum(_stored_bytes(p) for p, tensor in zip(planes, tensors) if tensor not in counted),
            "tensors": list(tensors),
        }
        counted.update(tensors)


def _stored_bytes(t) -> int:
    """Bytes in the file: what is repeated (stride 0) is there once."""
    count = 1
    for size, stride in zip(t.shape, t.stride()):
        count *= 1 if stride == 0 and size > 1 else size
    return count * t.element_size()


def tables(facts: dict[str, Any]) -> list[Table]:
    """The facts for people: node layers, blocks."""
    layers = Table(title="node layers", title_justify="left")
    for column in ("name", "width", "activation", "bias"):
        layers.add_column(column, justify="right" if column == "width" else "left", overflow="fold")
    for name, rows in _folded(facts["layers"], ("width", "activation")):
        row = rows[0]
        layers.add_row(name, f"{row['width']:,}" + _times(rows), row["activation"], "stored" if row["bias"] else "-")
    blocks = Table(title="blocks", title_justify="left")
    for column in ("name", "kind", "sources x destinations", "edges", "numbers", "dtype", "bytes"):
        right = column not in ("name", "kind", "dtype")
        blocks.add_column(column, justify="right" if right else "left", overflow="fold")
    for name, rows in _folded(facts["blocks"], ("kind", "sizes", "channels", "dtype")):
        row = rows[0]
        sizes = " x ".join(f"{n:,}" for n in row["sizes"]) + _times(rows)
        edges, size = (sum(r[key] for r in rows) for key in ("edges", "bytes"))
        blocks.add_row(name, row["kind"], sizes, f"{edges:,}", str(row["channels"]), row["dtype"], size_text(size) if size else "-")
    return [layers, blocks]


def summary(facts: dict[str, Any]) -> list[str]:
    """The facts in sentences."""
    lines = [
        f"{facts['architecture']}: {facts['nodes']:,} nodes in {len(facts['layers']):,} layers, {facts['edges']:,} edges in "
        f"{len(facts['blocks']):,} blocks, {size_text(facts['bytes'])} of weights and biases"
    ]
    if facts["not_modelled"]:
        lines.append("not modelled: " + "; ".join(facts["not_modelled"]))
    if facts["ignored"]:
        lines.append(
            "left out: " + ", ".join(facts["ignored"][:3]) + (f" and {len(facts['ignored']) - 3} more" * (len(facts["ignored"]) > 3))
        )
    return lines


def _folded(rows: list[dict], alike: tuple[str, ...]) -> list[tuple[str, list[dict]]]:
    """(name, rows): where there are many, rows whose names differ in their number only, and that are `alike`, in one."""
    if len(rows) <= FOLD_ABOVE:
        return [(row["name"], [row]) for row in rows]
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((re.sub(r"\d+", "*", row["name"], count=1), *(str(row[key]) for key in alike)), []).append(row)
    return [(key[0] if len(found) > 1 else found[0]["name"], found) for key, found in groups.items()]


def _times(rows: list[dict]) -> str:
    return f" ({len(rows)} times)" if len(rows) > 1 else ""

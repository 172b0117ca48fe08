"""Plots of the recorded measurements: seconds and bytes over edges, both axes logarithmic."""

from __future__ import annotations

from pathlib import Path

from benchmarks import records
from benchmarks.providers import PROVIDERS

COLOURS = dict(zip(PROVIDERS, ("#0b6e4f", "#3aa17e", "#8bbf9f", "#c1666b", "#8c2f39", "#d4a373", "#9c6644", "#5f4bb6", "#8e7dbe")))


def _axes(plt, title: str, ylabel: str):
    figure, axes = plt.subplots(figsize=(6.4, 4.2), dpi=150, layout="constrained")
    axes.set(xscale="log", yscale="log", xlabel="edges (weights of the networks read)", ylabel=ylabel, title=title)
    axes.grid(True, which="both", linewidth=0.3, alpha=0.5)
    return figure, axes


def _lines(axes, lines: list[dict], value: str) -> None:
    """One line per provider, of the latest record at each size."""
    for name, provider in PROVIDERS.items():
        points = {r["edges"]: r[value] for r in lines if r["provider"] == name}
        if points:
            edges = sorted(points)
            axes.plot(edges, [points[e] for e in edges], "o-", color=COLOURS[name], label=provider.text, markersize=3.5, linewidth=1.2)


def train_step(plt, lines: list[dict], path: Path) -> None:
    """Seconds per step: one thread, fp32, weight gradients on, batch 1, and the bound that the measured rates set."""
    chosen = [r for r in lines if r["threads"] == 1 and r["dtype"] == "fp32" and r["weight_grads"] and r["batch"] == 1]
    if not chosen:
        return
    figure, axes = _axes(plt, "Training step of NG-GNN, 1 thread, fp32, weight gradients on", "seconds")
    _lines(axes, chosen, "median")
    bound = {r["edges"]: r["bound_seconds"] for r in chosen}
    axes.plot(sorted(bound), [bound[e] for e in sorted(bound)], "--", color="grey", linewidth=1, label="roofline of the strict scheme")
    axes.legend(fontsize=7)
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def memory(plt, lines: list[dict], path: Path) -> None:
    """Peak bytes of a step: fp32, weight gradients on, with the weights' own size for comparison."""
    chosen = [r for r in lines if r["dtype"] == "fp32" and r["weight_grads"] and r["batch"] == 1 and r["threads"] == 1]
    if not chosen:
        return
    figure, axes = _axes(plt, "Peak memory of a training step of NG-GNN, fp32, weight gradients on", "bytes")
    _lines(axes, chosen, "peak_bytes")
    edges = sorted({r["edges"] for r in chosen})
    axes.plot(edges, [8 * e for e in edges], "--", color="grey", linewidth=1, label="the weights and their gradients")
    axes.legend(fontsize=7)
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def draw(results: Path = records.RESULTS) -> list[Path]:
    """Writes <device>/train_step.png and <device>/memory.png, of NG-GNN; returns what was written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    written = []
    for name, plot in (("train_step", train_step), ("memory", memory)):
        for slug, lines in records.load(name, results).items():
            path = results / slug / f"{name}.png"
            plot(plt, [r for r in lines if r["model"] == "ng-gnn"], path)
            written += [path] if path.exists() else []
    return written

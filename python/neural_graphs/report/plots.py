"""The demo's figures. Every function takes plain numbers or tensors and returns the bytes of a PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from torch import Tensor

INK, GREY, BLUE, ORANGE, GREEN, PURPLE = "#1f2933", "#7b8794", "#1d5fd1", "#d9730d", "#2f855a", "#8e4ec6"
STYLE = {
    "font.size": 11,
    "axes.edgecolor": "#9aa5b1",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
}


def accuracy_curve(trained: Sequence[dict[str, Any]], baselines: Sequence[dict[str, Any]], title: str) -> bytes:
    """Test accuracy over training steps with its standard error; baselines and bounds as lines, named at the right edge.

    Args:
        trained: {title, history} of each model that reads the weights, the report's own first.
        baselines: {title, reads, accuracy} each.
    """
    with _style():
        figure, axes = _figure(9.6, 5.4)
        lines = []
        for entry, colour in zip(trained, (BLUE, PURPLE)):
            steps, values, errors = ([point[key] for point in entry["history"]] for key in ("step", "test_accuracy", "test_standard_error"))
            low, high = ([v + sign * e for v, e in zip(values, errors)] for sign in (-1, 1))
            axes.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
            axes.plot(steps, values, color=colour, linewidth=2.4, marker="o", markersize=4)
            lines.append((values[-1], f"{entry['title']} on the weights  {values[-1]:.1f}", colour))
        for entry in baselines:
            colour = GREEN if entry["reads"] == "picture" else ORANGE
            axes.axhline(entry["accuracy"], color=colour, linewidth=1.1, linestyle=(0, (5, 3)), alpha=0.85)
            lines.append((entry["accuracy"], f"{entry['title']}  {entry['accuracy']:.1f}", colour))
        axes.set_ylim(0, 103)
        axes.set_xlim(0, max(entry["history"][-1]["step"] for entry in trained))
        for position, (_, text, colour) in zip(_spread([line[0] for line in lines], 4.6), lines):
            weight = "bold" if colour in (BLUE, PURPLE) else "normal"
            axes.annotate(
                text, (1.015, position), xycoords=("axes fraction", "data"), color=colour, va="center", fontsize=10, fontweight=weight
            )
        axes.set_xlabel("training steps")
        axes.set_ylabel("test accuracy, %")
        axes.set_title(title, pad=24)
        axes.text(0, 1.025, "with standard error: reads the weights as a graph   orange: MLPs on the weights   green: bounds, they see the picture",
                  transform=axes.transAxes, fontsize=9.5, color=GREY)  # fmt: skip
        figure.subplots_adjust(left=0.075, right=0.66, top=0.86, bottom=0.11)
        return _png(figure)


def reconstructions(pictures: Tensor, drawn: Tensor, fine: Tensor, labels: Sequence[int], psnr: Sequence[float]) -> bytes:
    """Pictures above what their networks draw, at the picture's own and at a finer resolution.

    Args:
        pictures: [K, 8, 8]. drawn: [K, 8, 8]. fine: [K, h, w]. labels, psnr: K each.
    """
    with _style():
        count = len(labels)
        figure = _empty_figure(1.0 * count + 1.5, 3.9)
        grid = figure.add_gridspec(3, count, left=1.35 / (count + 1.5), right=0.99, top=0.86, bottom=0.09, hspace=0.12, wspace=0.1)
        rows = (("picture", pictures), ("network,\nsame pixels", drawn), ("network,\nfine grid", fine))
        for row, (name, images) in enumerate(rows):
            for column in range(count):
                axes = figure.add_subplot(grid[row, column])
                axes.imshow(images[column].clamp(0, 1).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
                axes.set_xticks([])
                axes.set_yticks([])
                if column == 0:
                    axes.set_ylabel(name, rotation=0, ha="right", va="center", labelpad=8, fontsize=10)
                if row == 0:
                    axes.set_title(str(labels[column]), loc="center", fontsize=11, pad=3)
                if row == 2:
                    axes.set_xlabel(f"{psnr[column]:.1f} dB", fontsize=9.5, labelpad=3)
        figure.suptitle("Real pictures, and the networks that stand for them (test set)", x=0.01, ha="left", fontsize=12, fontweight="bold")
        return _png(figure)


def picture_comparison(picture: Tensor, drawn: Tensor, psnr: float, layout: Sequence[int]) -> bytes:
    """A photograph [h, w, 3], what the large network draws [h, w, 3], and the difference."""
    with _style():
        figure = _empty_figure(11, 2.85)
        grid = figure.add_gridspec(1, 3, left=0.01, right=0.99, top=0.9, bottom=0.02, wspace=0.04)
        error = ((picture - drawn).abs().mean(2, keepdim=True) * 10).clamp(0, 1).expand(-1, -1, 3)
        titles = (
            f"photograph, {picture.shape[1]} x {picture.shape[0]}",
            f"network [{', '.join(map(str, layout))}], {psnr:.1f} dB",
            "mean absolute error x 10",
        )
        for column, (title, image) in enumerate(zip(titles, (picture, drawn, error))):
            axes = figure.add_subplot(grid[0, column])
            axes.imshow(image.clamp(0, 1).numpy(), interpolation="nearest")
            axes.set_axis_off()
            axes.set_title(title, fontsize=11)
        return _png(figure)


def step_cost(measured: Sequence[dict[str, Any]]) -> bytes:
    """Bytes per edge and seconds per million edges of one training step, one bar for each measured backend.

    Args:
        measured: dicts with `title`, `bytes_per_edge`, `seconds_per_million_edges`.
    """
    with _style():
        height = 1.0 + 0.6 * len(measured)
        figure = _empty_figure(10, height)
        grid = figure.add_gridspec(1, 2, left=0.17, right=0.98, top=1 - 0.42 / height, bottom=0.42 / height, wspace=0.1)
        panels = (
            ("bytes_per_edge", "peak memory, bytes per edge", ",.0f"),
            ("seconds_per_million_edges", "seconds per million edges", ",.2f"),
        )
        for column, (key, title, form) in enumerate(panels):
            axes = figure.add_subplot(grid[0, column])
            values = [entry[key] for entry in measured]
            axes.barh(range(len(values)), values, color=[BLUE if index == 0 else GREY for index in range(len(values))], height=0.56)
            axes.set_xlim(0, max(values) * 1.2)
            axes.set_ylim(len(values) - 0.4, -0.6)
            axes.set_yticks(range(len(values)), [entry["title"] for entry in measured] if column == 0 else [""] * len(values))
            axes.tick_params(axis="y", length=0)
            axes.locator_params(axis="x", nbins=5)
            for index, value in enumerate(values):
                axes.text(value + max(values) * 0.015, index, format(value, form), va="center", fontsize=11, fontweight="bold")
            axes.set_title(title)
        return _png(figure)


# ---------------------------------------------------------------------------------------------------------------- helpers


def _style():
    import matplotlib

    return matplotlib.rc_context(STYLE)


def _empty_figure(width: float, height: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=140, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _figure(width: float, height: float):
    figure = _empty_figure(width, height)
    axes = figure.add_subplot()
    axes.grid(axis="y", color="#e4e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _spread(values: Sequence[float], gap: float, low: float = 1.5, high: float = 101.5) -> list[float]:
    """Moves label positions apart until they are `gap` apart, as little as a sweep up and a sweep down allow."""
    order = sorted(range(len(values)), key=lambda index: values[index])
    placed = [min(max(values[index], low), high) for index in order]
    for _ in range(100):
        for k in range(len(placed) - 1):
            overlap = gap - (placed[k + 1] - placed[k])
            if overlap > 1e-6:
                placed[k] -= overlap / 2
                placed[k + 1] += overlap / 2
        shift = max(0.0, low - placed[0]) - max(0.0, placed[-1] - high)
        placed = [value + shift for value in placed]
    result = [0.0] * len(values)
    for index, value in zip(order, placed):
        result[index] = value
    return result

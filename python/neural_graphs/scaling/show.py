"""The study for people: a Markdown table like the published one, plots of memory and time over edges."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ngkernels.planner import size_text

from ..report.plots import STYLE
from .methods import METHODS
from .study import OTHERS, Largest, Settings

PROJECTED = "fits, not run ‡"
TAIL = 4  # points that slopes are fitted to: the largest, where what does not grow with the network matters least
BOUND = {"memory": "", "time": ", stopped by time", "error": ", stopped by an error", "study": ", the largest tried"}


def slope(points: Sequence[tuple[float, float]]) -> float | None:
    """Exponent b of y = a x^b by least squares over the logarithms of the last TAIL points; None for fewer than two."""
    logs = [(math.log(x), math.log(y)) for x, y in sorted(points)[-TAIL:] if x > 0 and y > 0]
    if len(logs) < 2:
        return None
    mean_x, mean_y = (sum(p[i] for p in logs) / len(logs) for i in (0, 1))
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)


def per_edge(rows: Sequence[dict[str, Any]]) -> float | None:
    """Bytes for each further edge, between the two largest networks."""
    done = sorted((row["edges"], row["peak_bytes"]) for row in rows if row["outcome"] == "ok")[-2:]
    return None if len(done) < 2 else (done[1][1] - done[0][1]) / (done[1][0] - done[0][0])


def layout_text(layout: Sequence[int]) -> str:
    return "[" + ", ".join(map(str, layout)) + "]"


def row_text(row: dict[str, Any]) -> str:
    """A measurement in one line."""
    what = f"{row['outcome']}: {row['reason']}" if "reason" in row else f"{row['seconds']:.3g} s, {size_text(row['peak_bytes'])}"
    return f"{row['method']} {layout_text(row['layout'])} {row['edges']:,} edges: {what}" + (" (projected)" if row["outcome"] == "projected" else "")


def largest_run(rows: Sequence[dict[str, Any]], method: str | None, budget: int) -> dict[str, Any] | None:
    """The measurement of the largest network [2, h, 2h, 3] that a method trained within a budget."""
    fit = [r for r in rows if r["method"] == method and r["outcome"] == "ok" and isinstance(r["hidden"], int) and r["peak_bytes"] <= budget]
    return max(fit, key=lambda row: row["edges"], default=None)


def table(settings: Settings, results: Sequence[Largest], rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line for each method, for each budget the largest network that was run and the one that is projected, slopes."""
    projected = any(result.row is not None and result.row["outcome"] == "projected" for result in results)
    header = ["method", "parameters"]
    for budget in settings.budgets:
        header += [f"largest run at {size_text(budget)}", "edges", "times published", "peak", "s / step", *[PROJECTED] * projected]
    header += ["bytes / edge", "memory ~ edges^", "time ~ edges^", "published limit"]
    lines = []
    for name in dict.fromkeys(result.method for result in results):
        own = [row for row in rows if row["method"] == name and row["outcome"] == "ok" and isinstance(row["hidden"], int)]
        line = [METHODS[name].text, f"{own[0]['parameters']:,}" if own else "-"]
        for budget in settings.budgets:
            result = next(result for result in results if (result.method, result.budget) == (name, budget))
            line += _cells(result, largest_run(rows, name, budget), largest_run(rows, METHODS[name].peer, budget))
            line += [_projected(result.row)] * projected
        exponents = [slope([(row["edges"], row[value]) for row in own]) for value in ("peak_bytes", "seconds")]
        bytes_each = per_edge(own)
        line.append("-" if bytes_each is None else f"{bytes_each:,.0f}" if bytes_each >= 100 else f"{bytes_each:.3g}")
        line += ["-" if e is None else f"{e:.2f}" for e in exponents]
        line.append(layout_text(METHODS[name].published) if METHODS[name].published else "-")
        lines.append(line)
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *lines])


def _cells(result: Largest, run: dict[str, Any] | None, peer: dict[str, Any] | None) -> list[str]:
    ends = BOUND[result.bound] if result.row is None or result.row["outcome"] == "ok" else ""
    if run is None:
        return ["none" + ends, "-", "-", "-", "-"]
    ratio = "-" if peer is None else f"{run['edges'] / peer['edges']:,.0f}" if run["edges"] >= 10 * peer["edges"] else f"{run['edges'] / peer['edges']:.2g}"
    return [layout_text(run["layout"]) + ends, f"{run['edges']:,}", ratio, size_text(run["peak_bytes"]), f"{run['seconds']:.3g}"]


def _projected(row: dict[str, Any] | None) -> str:
    if row is None or row["outcome"] != "projected":
        return "-"
    return f"{row['edges']:,} edges: {size_text(row['peak_bytes'])}, {row['seconds']:,.0f} s"


def others(settings: Settings, rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: peak and time of the other networks, a line for each method; empty where none was measured."""
    named = {(row["method"], row["hidden"]): row for row in rows if isinstance(row["hidden"], str)}
    names = [name for name in settings.others if any(key[1] == name for key in named)]
    if not names:
        return ""
    text = {name: layout_text(OTHERS[name][0]) + (f" x {OTHERS[name][1]}" if OTHERS[name][1] > 1 else "") for name in names}
    lines = [["method", *text.values()], ["---"] + ["---:"] * len(names)]
    for method in (name for name in METHODS if any(key[0] == name for key in named)):
        found = [named.get((method, name)) for name in names]
        lines.append([METHODS[method].text, *("-" if r is None else _measured(r) for r in found)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n\n"


def _measured(row: dict[str, Any]) -> str:
    """A measurement in a cell."""
    if row["outcome"] in ("ok", "projected"):
        return f"{size_text(row['peak_bytes'])}, {row['seconds']:.3g} s" + " ‡" * (row["outcome"] == "projected")
    return f"not in {row['max_seconds']:,.0f} s" if row["outcome"] == "timeout" else row["outcome"]


def page(settings: Settings, results: Sequence[Largest], rows: Sequence[dict[str, Any]]) -> str:
    """The table, how it was measured, the plots."""
    last = max(rows, key=lambda row: row["time"])
    device, versions = last["machine"], last["versions"]
    commits = sorted({row["git"][:9] + ("+" if row["git"].endswith("+") else "") for row in rows})
    projected = any(result.row is not None and result.row["outcome"] == "projected" for result in results)
    note = (
        "\n‡: a step of so many seconds was not run; the peak is the planner's, the time that of smaller networks carried on."
        if projected
        else ""
    )
    sizes = "published sizes" if settings.parameters is None else f"widths for about {settings.parameters:,} parameters"
    return f"""# The largest input network that trains{", with gradients of its weights" if settings.weight_grads else ""}

{table(settings, results, rows)}

{others(settings, rows)}A training step is forward, cross-entropy, backward and AdamW (amsgrad) on one network [2, h, 2h, 3], batch 1, {settings.dtype}, gradients of the
input weights {"on" if settings.weight_grads else "off"}, {sizes}. Every size ran in a process of its own with a hard limit; the peak is what is resident above
the process after a warm-up on a tiny network: raw weights, parameters, gradients, optimiser state, activations. Widths were doubled until one
did not fit, then the gap was halved {settings.refine} time{"s" * (settings.refine != 1)}. Published limits are those of the paper's discussion, on one GPU of unnamed size.
Times published: edges, of the published implementation's largest. Exponents are fitted to the {TAIL} largest networks; bytes / edge is the difference of the two largest.{note}

{device["model"]}, {settings.device}, {settings.threads} thread{"s" * (settings.threads > 1)}; PyTorch {versions["torch"]}, PyG {versions["torch_geometric"]};
commit {", ".join(commits)}; {last["time"][:10]}.

![memory]({stem(settings)}-memory.png)
![time]({stem(settings)}-time.png)
"""


def plot(settings: Settings, rows: Sequence[dict[str, Any]], value: str, path: Path) -> None:
    """Peak bytes or seconds over edges, both axes logarithmic, with fitted slopes; budgets as lines."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 6.4), dpi=140, facecolor="white", layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        colours = matplotlib.colormaps["tab10"].colors
        for k, name in enumerate(METHODS):
            grid = [row for row in rows if row["method"] == name and isinstance(row["hidden"], int)]
            own = sorted((row["edges"], row[value]) for row in grid if row["outcome"] == "ok")
            if not own:
                continue
            exponent = slope(own)
            label = METHODS[name].text + ("" if exponent is None else f"   ~ edges^{exponent:.2f}")
            axes.plot(
                *zip(*own), "o-" if k < len(colours) else "s--", color=colours[k % len(colours)], markersize=4, linewidth=1.6, label=label
            )
        axes.set(xscale="log", xlabel="edges (weights of the network read)", ylabel="peak memory" if value == "peak_bytes" else "seconds")
        axes.set_yscale("log", base=2 if value == "peak_bytes" else 10)
        if value == "peak_bytes":
            axes.yaxis.set_major_formatter(lambda count, _: size_text(int(count)).replace(".0", ""))
            for budget in settings.budgets:
                axes.axhline(budget, color="#7b8794", linewidth=1, linestyle=(0, (5, 3)))
                axes.annotate(f"budget {size_text(budget)}", (0.99, budget), xycoords=("axes fraction", "data"), ha="right", va="bottom")
        axes.set_title(f"A training step, batch 1, {settings.dtype}, {settings.device}")
        axes.grid(True, color="#e4e7eb", linewidth=0.6)
        if axes.get_legend_handles_labels()[0]:
            figure.legend(loc="outside lower center", ncols=2, fontsize=9, frameon=False)
        figure.savefig(path, metadata={"Software": None})


def stem(settings: Settings) -> str:
    """What the names of a study's page and plots begin with."""
    return "scale" + "-weight-grads" * settings.weight_grads + f"-{settings.dtype}" * (settings.dtype != "fp32")


def publish(settings: Settings, results: Sequence[Largest], rows: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Writes the page and two plots, scale.md, scale-memory.png and scale-time.png (see `stem`); returns their paths."""
    methods = {result.method for result in results}
    rows = [row for row in rows if row["method"] in methods]
    paths = [folder / (stem(settings) + end) for end in (".md", "-memory.png", "-time.png")]
    plot(settings, rows, "peak_bytes", paths[1])
    plot(settings, rows, "seconds", paths[2])
    paths[0].write_text(page(settings, results, rows))
    return paths

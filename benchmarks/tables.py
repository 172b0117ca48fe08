"""The README's tables, made from the recorded measurements."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks import memory, records
from benchmarks.large import RUNS
from benchmarks.models import MODELS, Model
from benchmarks.providers import PROVIDERS

OURS = [name for name, p in PROVIDERS.items() if p.ours]
EMPTY = "Nothing measured yet."


def markdown(header: list[str], rows: list[list[str]], left: int = 1) -> str:
    """A Markdown table; the first `left` columns are aligned left, the others right."""
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *rows])


def seconds(value: float) -> str:
    """Three significant digits, in s or ms."""
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def label(layout: list[int], batch: int) -> str:
    return "[" + ", ".join(map(str, layout)) + "]" + (f" x {batch}" if batch > 1 else "")


def latest_runs(lines: list[dict], key: Callable[[dict], tuple]) -> dict[tuple, list[dict]]:
    """Records by `key`, for each key of one run only: the last that measured this project there, else the last."""
    runs: dict[tuple, dict[str, list[dict]]] = {}
    for line in lines:
        runs.setdefault(key(line), {}).setdefault(line["run"], []).append(line)
    found = {}
    for k, by_run in runs.items():
        with_ours = [run for run, group in by_run.items() if any(r["provider"] in OURS for r in group)]
        found[k] = by_run[(with_ours or list(by_run))[-1]]
    return found


def case_key(line: dict) -> tuple:
    """What a row of a table of training steps is about; sorts by size."""
    return line["edges"], tuple(line["layout"]), line["batch"], line["weight_grads"]


def fastest(rows: list[dict], names: list[str], dtypes: tuple[str, ...]) -> dict | None:
    return min((r for r in rows if r["provider"] in names and r["dtype"] in dtypes), key=lambda r: r["median"], default=None)


def cell(row: dict | None) -> str:
    """Seconds per step, with the sign for a noisy machine."""
    return "-" if row is None else seconds(row["median"]) + (" †" if row["noisy"] else "")


def ratio(ours: dict | None, rival: dict | None) -> str:
    """How many times faster; a loss is set in bold and named."""
    if ours is None or rival is None:
        return "-"
    value = rival["median"] / ours["median"]
    return f"{value:.1f}" if value >= 1 else f"**{value:.2f} (slower)**"


def train_step_row(model: Model, rows: list[dict], dtype: str) -> list[str]:
    """One line of the table: one case, precision and setting of weight gradients."""
    first, count = rows[0], model.unit[0]
    ours = fastest(rows, OURS, (dtype,))
    allowed = ("fp32",) if dtype == "fp32" else ("fp32", "bf16")
    rivals = [fastest(rows, names, allowed) for _, names in model.baselines]
    return [
        label(first["layout"], first["batch"]),
        f"{first[count]:,}",
        dtype,
        "on" if first["weight_grads"] else "off",
        cell(ours),
        "-" if ours is None else f"{ours['median'] / first[count] * 1e6:.3g}",
        "-" if ours is None else f"{ours['share']:.0%}",
        *map(cell, rivals),
        *(ratio(ours, rival) for rival in rivals),
    ]


def about(lines: list[dict]) -> str:
    """Where a table comes from."""
    last = max(lines, key=lambda r: r["time"])
    device, found = last["device"], last["versions"]
    family = f" (family {device['family']}, model {device['model_number']})" if device.get("family") else ""
    commits = sorted({r["git"][:9] + ("+" if r["git"].endswith("+") else "") for r in lines})
    return (
        f"{device['model']}{family}, {device['cores']} cores, {device['torch_isa']}; PyTorch {found['torch']}, PyG {found['torch_geometric']}; "
        f"commit {', '.join(commits)}; {last['time'][:10]}."
    )


def train_step(results: Path = records.RESULTS, model: str = "ng-gnn") -> str:
    """Seconds per training step, by device and number of threads."""
    subject = MODELS[model]
    count, unit = subject.unit
    columns = [name for name, _ in subject.baselines]
    header = ["networks", count, "precision", "weight grads", "ngkernels", unit, "of roofline", *columns]
    header += ["x " + name.removeprefix("PyG ").removeprefix("as ") for name in columns]
    parts = []
    for lines in records.load("train_step", results).values():
        lines = [r for r in lines if r["model"] == model]
        for threads in sorted({r["threads"] for r in lines}):
            groups = latest_runs([r for r in lines if r["threads"] == threads], case_key)
            used = [r for rows in groups.values() for r in rows]
            body = [
                train_step_row(subject, rows, dtype)
                for key, rows in sorted(groups.items(), key=lambda item: item[0])
                for dtype in ("fp32", "bf16")
                if any(r["dtype"] == dtype for r in rows)
            ]
            rates = max(used, key=lambda r: r["time"])["rates"]
            measured = ", ".join(f"{k.replace('_', ' ')} {v / 1e9:.0f} G{'B' if k == 'copy' else 'FLOP'}/s" for k, v in rates.items())
            parts.append(f"{threads} thread{'s' * (threads > 1)}. {about(used)} Measured ceilings: {measured}.\n\n{markdown(header, body)}")
    return "\n\n".join([*parts, NOTES[model]]) if parts else EMPTY


MARK = "† other processes used the machine."
NOTES = {
    "ng-gnn": (
        "Forward, cross-entropy and backward; medians, interleaved in one run; columns of ngkernels and of PyG: the faster of the eager and "
        "the compiled model, where both were run, and in bf16 "
        f"rows of fp32 and autocast. {MARK}"
    ),
    "ng-t": (
        "Forward, cross-entropy and backward; medians, interleaved in one run; pairs: ordered pairs of neurons of a network; as published: dense "
        f"pairs in plain PyTorch, eager, and the same through torch.compile; in bf16 rows the faster of fp32 and autocast. {MARK}"
    ),
}


def latest_memory(lines: list[dict], models: tuple[str, ...]) -> list[list[dict]]:
    """Records of the last run of each model, provider and setting, in the order of models and providers."""
    last: dict[tuple, list[dict]] = {}
    for line in lines:  # later runs replace earlier ones
        if line["model"] in models:
            key = (
                models.index(line["model"]),
                list(PROVIDERS).index(line["provider"]),
                line["threads"],
                line["dtype"],
                line["weight_grads"],
            )
            last[key] = [*(r for r in last.get(key, []) if r["run"] == line["run"]), line]
    return [last[key] for key in sorted(last)]


def setting(row: dict) -> list[str]:
    """Cells of who was measured and how."""
    name = PROVIDERS[row["provider"]].text + (f", {row['threads']} threads" if row["threads"] > 1 else "")
    return [name, row["dtype"], "on" if row["weight_grads"] else "off"]


def largest(row: dict) -> list[str]:
    """Cells of the largest network of a summary and of its peak."""
    return [label(row["largest"], 1) + f", {row['largest_edges']:,} edges", memory.mebibytes(row["largest_peak_bytes"])]


def memory_gnn(row: dict) -> list[str]:
    nodes = "-" if row["bytes_per_node"] is None else f"{row['bytes_per_node']:,.0f}"
    return [*setting(row), memory.number(row["bytes_per_edge"]), nodes, *largest(row)]


def memory_ngt(row: dict) -> list[str]:
    looks = {"ng-t": "all pairs", "ng-t-edges": "along edges"}[row["model"]]
    each = [memory.number(row[f"bytes_per_{what}"]) for what in ("edge", "node", "pair")]
    return [looks, *setting(row), *each, *largest(row), f"{row['time_exponent']:.2f}"]


def memory_table(
    results: Path = records.RESULTS, models: tuple[str, ...] = ("ng-gnn",), row_of: Callable[[dict], list[str]] = memory_gnn
) -> str:
    """Bytes per edge and per neuron (and per pair), by device."""
    header = ["provider", "precision", "weight grads", "bytes / edge", "bytes / neuron"]
    tail = ["largest network measured", "its peak"]
    if row_of is memory_ngt:
        header, tail = ["attention", *header, "bytes / pair"], [*tail, "time ~ edges^"]
    parts = []
    for lines in records.load("memory", results).values():
        groups = latest_memory(lines, models)
        body = [row_of(row) for rows in groups for row in memory.summary(rows)]
        if body:
            parts.append(f"{about([r for rows in groups for r in rows])}\n\n{markdown([*header, *tail], body)}")
    note = "Peak of the process in a training step, above what it held before model and inputs were made; each point in a fresh process."
    if row_of is memory_ngt:
        note += " Bytes per pair: the slope over [2, h, 2h, 3], whose edges and neurons are included."
    return "\n\n".join([*parts, note]) if parts else EMPTY


def attention(results: Path = records.RESULTS) -> str:
    """Seconds of one attention beside the ops of PyTorch and PyG, by device and number of threads."""
    header = ["networks", "problem", "pass", "ngkernels", "us / pair read", "others", "x ngkernels"]
    parts = []
    for lines in records.load("attention", results).values():
        for threads in sorted({r["threads"] for r in lines}):
            groups = latest_runs([r for r in lines if r["threads"] == threads], attention_key)
            body, used = [], []
            for key in sorted(groups):
                rows = {r["provider"]: r for r in groups[key]}
                ours = rows.pop("ngk-cpp", None)
                if ours is not None:
                    body += attention_rows(ours, rows)
                    used += groups[key]
            if body:
                parts.append(f"{threads} thread{'s' * (threads > 1)}. {about(used)}\n\n{markdown(header, body, left=3)}")
    note = (
        "Medians, interleaved in one run, fp32. relational: NG-T's first layer; additive: all that a bias on the logits can say; sparse: along "
        f"edges with given features, as TransformerConv has them. sdpa-given: the bias as an input, its making not counted. {MARK}"
    )
    return "\n\n".join([*parts, note]) if parts else EMPTY


def attention_key(line: dict) -> tuple:
    return line["pairs"], tuple(line["layout"]), line["batch"], line["problem"], line["direction"]


def attention_rows(ours: dict, others: dict[str, dict]) -> list[list[str]]:
    """A line for each other provider; the first names the problem."""
    first = [
        label(ours["layout"], ours["batch"]),
        ours["problem"],
        ours["direction"].replace("forward_backward", "forward, backward"),
        cell(ours),
        f"{ours['median'] / ours['read_pairs'] * 1e6:.3g}",
    ]
    rows = [[*first, f"{name} {cell(row)}", ratio(ours, row)] for name, row in sorted(others.items())] or [[*first, "-", "-"]]
    return [rows[0], *([""] * len(first) + row[len(first) :] for row in rows[1:])]


def scale(results: Path = records.RESULTS) -> str:
    """The tables of the memory-scaling study, by device: what `ngk scale` wrote beside its records."""
    parts = []
    for path in sorted(results.glob("*/scale*.md"), key=lambda p: (p.parent, p.stem)):
        text = path.read_text()
        title, body = text.split("\n", 1)
        parts.append(f"**{title[2:]}**\n\n" + body.split("\n![")[0].strip())  # without the plots
    return "\n\n".join(parts) if parts else EMPTY


def large(results: Path = records.RESULTS) -> str:
    """Peak of resident bytes of the large runs, the last of each."""
    parts = []
    for lines in records.load("large", results).values():
        last = {line["case"]: line for line in lines}
        body = [
            [
                RUNS[name].text, f"{r['edges']:,}" if "edges" in r else f"{sum(a * b for a, b in zip(r['layout'], r['layout'][1:])):,}",
                str(r["layers"]), memory.mebibytes(r["resident_bytes"]), memory.mebibytes(r["limit_bytes"]),
                "-" if "plans" not in r else ", ".join(f"{k} {memory.mebibytes(p['peak_bytes'])}" for k, p in r["plans"].items()),
            ]
            for name, r in last.items()
        ]  # fmt: skip
        header = ["run", "edges", "layers", "resident at its peak", "limit", "planned"]
        parts.append(f"{about(list(last.values()))}\n\n{markdown(header, body)}")
    note = "Everything resident in the process counts: interpreter, libraries, file pages. Plans: peak of tensors and kernels, above the process."
    return "\n\n".join([*parts, note]) if parts else EMPTY


TABLES: dict[str, Callable[[Path], str]] = {
    "train_step": train_step,
    "train_step_ngt": partial(train_step, model="ng-t"),
    "memory": memory_table,
    "attention": attention,
    "scale": scale,
    "large": large,
    "memory_ngt": partial(memory_table, models=("ng-t", "ng-t-edges"), row_of=memory_ngt),
}

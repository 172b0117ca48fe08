"""The README's tables, made from the recorded measurements."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks import memory, records
from benchmarks.providers import PROVIDERS

OURS = [name for name, p in PROVIDERS.items() if p.ours]
BASELINES = [name for name, p in PROVIDERS.items() if not p.ours]
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
    """What a row of the table of training steps is about; sorts by size."""
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


def train_step_row(rows: list[dict], dtype: str) -> list[str]:
    """One line of the table: one case, precision and setting of weight gradients."""
    first = rows[0]
    ours = fastest(rows, OURS, (dtype,))
    allowed = ("fp32",) if dtype == "fp32" else ("fp32", "bf16")
    published, tuned = (fastest(rows, [n for n in BASELINES if n.startswith("pyg-tuned") == t], allowed) for t in (False, True))
    return [
        label(first["layout"], first["batch"]),
        f"{first['edges']:,}",
        dtype,
        "on" if first["weight_grads"] else "off",
        cell(ours),
        "-" if ours is None else f"{ours['median'] / first['edges'] * 1e6:.3g}",
        "-" if ours is None else f"{ours['share']:.0%}",
        cell(published),
        cell(tuned),
        ratio(ours, published),
        ratio(ours, tuned),
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


def train_step(results: Path = records.RESULTS) -> str:
    """Seconds per training step, by device and number of threads."""
    header = ["networks", "edges", "precision", "weight grads", "ngkernels", "s / M edges", "of roofline"]
    header += ["PyG as published", "PyG tuned", "x published", "x tuned"]
    parts = []
    for lines in records.load("train_step", results).values():
        for threads in sorted({r["threads"] for r in lines}):
            groups = latest_runs([r for r in lines if r["threads"] == threads], case_key)
            used = [r for rows in groups.values() for r in rows]
            body = [
                train_step_row(rows, dtype)
                for key, rows in sorted(groups.items(), key=lambda item: item[0])
                for dtype in ("fp32", "bf16")
                if any(r["dtype"] == dtype for r in rows)
            ]
            rates = max(used, key=lambda r: r["time"])["rates"]
            measured = ", ".join(f"{k.replace('_', ' ')} {v / 1e9:.0f} G{'B' if k == 'copy' else 'FLOP'}/s" for k, v in rates.items())
            parts.append(f"{threads} thread{'s' * (threads > 1)}. {about(used)} Measured ceilings: {measured}.\n\n{markdown(header, body)}")
    note = (
        "Forward, cross-entropy and backward; medians, interleaved in one run; columns of PyG: the fastest of eager and compiled, and in bf16 "
        "rows of fp32 and autocast. † other processes used the machine."
    )
    return "\n\n".join([*parts, note]) if parts else EMPTY


def memory_table(results: Path = records.RESULTS) -> str:
    """Bytes per edge and per neuron, by device."""
    header = ["provider", "precision", "weight grads", "bytes / edge", "bytes / neuron", "largest network measured", "its peak"]
    parts = []
    for lines in records.load("memory", results).values():
        last: dict[tuple, list[dict]] = {}
        for line in lines:  # later runs replace earlier ones
            key = (line["provider"], line["threads"], line["dtype"], line["weight_grads"])
            same = [r for r in last.get(key, []) if r["run"] == line["run"]]
            last[key] = [*same, line]
        body = []
        order = list(PROVIDERS)
        for key in sorted(last, key=lambda k: (order.index(k[0]), k[1:])):
            for row in memory.summary(last[key]):
                body.append([
                    PROVIDERS[row["provider"]].text + (f", {row['threads']} threads" if row["threads"] > 1 else ""),
                    row["dtype"],
                    "on" if row["weight_grads"] else "off",
                    f"{row['bytes_per_edge']:,.3g}" if row["bytes_per_edge"] < 100 else f"{row['bytes_per_edge']:,.0f}",
                    "-" if row["bytes_per_node"] is None else f"{row['bytes_per_node']:,.0f}",
                    label(row["largest"], 1) + f", {row['largest_edges']:,} edges",
                    f"{row['largest_peak_bytes'] / 2**20:,.0f} MiB",
                ])  # fmt: skip
        used = [r for rows in last.values() for r in rows]
        if body:
            parts.append(f"{about(used)}\n\n{markdown(header, body)}")
    note = "Peak of the process in a training step, above what it held before model and inputs were made; each point in a fresh process."
    return "\n\n".join([*parts, note]) if parts else EMPTY


TABLES: dict[str, Callable[[Path], str]] = {"train_step": train_step, "memory": memory_table}

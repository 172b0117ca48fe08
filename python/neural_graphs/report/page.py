"""The demo's report as one self-contained HTML page and a short Markdown file, from the same results."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from typing import Any

CSS = """
body { font: 16px/1.55 system-ui, sans-serif; color: #1f2933; max-width: 60rem; margin: 2.5rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { font-size: 1.2rem; margin-top: 2.4rem; }
p.lead { color: #52606d; margin-top: 0; } img { max-width: 100%; height: auto; }
figure { margin: 1rem 0; } figcaption { color: #52606d; font-size: .92rem; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { text-align: left; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid #e4e7eb; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; } tr.ours { font-weight: 600; }
"""


def accuracy_rows(results: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Returns (method, what it reads, accuracy with standard error): our models, readers of weights, bounds; the best first."""
    ours = []
    for entry in results["trained"]:
        last = entry["history"][-1]
        ours.append((f"{entry['title']}, fused kernels", "weights", f"{last['test_accuracy']:.1f} ± {last['test_standard_error']:.1f}"))
    others = sorted(results["baselines"], key=lambda entry: (entry["reads"] != "weights", -entry["accuracy"]))
    return ours + [(e["title"], e["reads"], f"{e['accuracy']:.1f} ± {e['standard_error']:.1f}") for e in others]


def cost_rows(results: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Returns (backend, peak memory, bytes per edge, seconds per million edges) of the large step; reasons where one did not run."""
    rows = []
    for entry in results["large"]["measured"]:
        peak = f"{entry['peak_bytes'] / 2**20:,.0f} MiB"
        rows.append((entry["title"], peak, f"{entry['bytes_per_edge']:,.0f}", f"{entry['seconds_per_million_edges']:.2f}"))
    return rows


def findings(results: Mapping[str, Any]) -> list[str]:
    """Returns the sentences a reader should take home."""
    data, trained, large = results["data"], results["trained"], results["large"]
    weights = max((e for e in results["baselines"] if e["reads"] == "weights"), key=lambda e: e["accuracy"], default=None)
    found = [
        f"{data['networks']:,} networks [{', '.join(map(str, data['layout']))}], fitted to {data['pictures']:,} real pictures of digits (median "
        f"{data['psnr_median']:.1f} dB, 5th percentile {data['psnr_low']:.1f} dB).",
        *(_learned(entry) for entry in trained),
    ]
    for other in trained[1:]:
        lead = trained[0]["history"][-1]["test_accuracy"] - other["history"][-1]["test_accuracy"]
        found.append(f"{trained[0]['title']} is {abs(lead):.1f} points {'above' if lead >= 0 else 'below'} {other['title']} here.")
    if weights is not None:
        found.append(
            f"The best of the MLPs on flattened weights reaches {weights['accuracy']:.1f} %: a network's neurons have no order to rely on."
        )
    measured = large["measured"]
    if len(measured) > 1:
        memory = measured[1]["bytes_per_edge"] / measured[0]["bytes_per_edge"]
        speed = measured[1]["seconds_per_million_edges"] / measured[0]["seconds_per_million_edges"]
        found.append(
            f"On one network of {large['edges']:,} weights, a training step of NG-GNN with fused kernels needs {memory:.0f} times less memory and is "
            f"{speed:.0f} times faster than with this library's reference backend, eager PyTorch."
        )
    return found


def _learned(entry: Mapping[str, Any]) -> str:
    last, rate = entry["history"][-1], entry["steps_per_second"]
    return (
        f"{entry['title']} names the digit from the weights alone with {last['test_accuracy']:.1f} % accuracy (standard error "
        f"{last['test_standard_error']:.1f}), after {last['step']:,} steps at {rate:.0f} steps per second."
    )


def caveats(results: Mapping[str, Any]) -> list[str]:
    """Returns what the figures do not show, and which choices made them."""
    data = results["data"]
    start = (
        "All networks start from ONE shared random initialisation, which makes the task far easier, also for a plain MLP."
        if data["shared_init"]
        else "Every network has its own random initialisation. One shared start makes the task far easier: a plain MLP then reaches about 64 %."
    )
    return [
        f"{results['trained'][0]['title']} reads the weights without running the network. It is not the best digit classifier: the bounds look at the pixels, or at "
        "what the network draws at a few points.",
        f"One split by picture ({' / '.join(str(data['split'][name]) for name in ('train', 'val', 'test'))} pictures; all networks of a picture on "
        f"one side) and one seed. The standard error counts the {data['split']['test']} test pictures as independent, not their networks.",
        start,
        "The fit starts from small weights of low frequency and decays them, so that the weights carry the picture. From the usual "
        "SIREN start, without decay, weights are mostly noise of the initialisation, and the MLPs stay at chance.",
        "How networks are fitted was chosen by accuracy: 17 variants were compared (6 of them with NG-GNN, the others with an MLP), "
        "looking at test accuracy on another split of the same pictures. The first recipe tried gave 82.8 % there and the chosen one "
        "89.6 %. The split used here was not looked at, but its pictures are not new, so expect the figures to be a little too good.",
        "Training pictures are turned, scaled and shifted a little, exactly, in weight space; signs of neurons are made canonical (sin is "
        "odd). The MLPs get the same, except the plain one, and the best of ten validation checkpoints.",
        "The large network shows cost, not accuracy. Memory is the peak of a fresh process above its size before the network was read: "
        "weights, their gradients and everything in flight. The reference backend is a specification in eager PyTorch, not a tuned baseline; "
        "times are the faster of two steps, and vary with what else the machine does. benchmarks/ compares with tuned baselines.",
    ]


def markdown(results: Mapping[str, Any], figures: Mapping[str, str]) -> str:
    """Returns the short report; `figures` maps names to file names relative to it."""
    lines = ["# Reading networks by their weights", "", f"{results['machine']}. {_when(results)}", ""]
    lines += [f"- {sentence}" for sentence in findings(results)] + [""]
    lines += [f"![accuracy]({figures['accuracy']})", ""] + _markdown_table(("method", "reads", "test accuracy, %"), accuracy_rows(results))
    lines += ["", f"![pictures and networks]({figures['reconstructions']})", "", f"![photograph]({figures['picture']})", ""]
    if results["large"]["measured"]:
        header = ("one training step", "peak memory", "bytes per edge", "s per million edges")
        lines += [f"![cost]({figures['cost']})", ""] + _markdown_table(header, cost_rows(results)) + [""]
    lines += [f"- {note}" for note in results["large"]["notes"]] + ([""] if results["large"]["notes"] else [])
    lines += ["What to keep in mind:", ""]
    lines += [f"- {sentence}" for sentence in caveats(results)]
    return "\n".join(lines) + "\n"


def page(results: Mapping[str, Any], figures: Mapping[str, bytes]) -> str:
    """Returns one HTML page with the figures inside."""
    data, large = results["data"], results["large"]
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>ngkernels demo</title><style>{CSS}</style></head><body>",
        "<h1>Reading networks by their weights</h1>",
        f"<p class='lead'>{html.escape(results['machine'])}. {html.escape(_when(results))}</p>",
        _list(findings(results)),
        "<h2>Accuracy</h2>",
        _figure(figures.get("accuracy"), "Test accuracy while training; dashed: final accuracy of the others."),
        _table(("method", "reads", "test accuracy, %"), accuracy_rows(results), first_is_ours=True),
        "<h2>The networks that are read</h2>",
        _figure(figures.get("reconstructions"), f"One {data['layout']} network for each class, of median quality."),
        "<h2>A large network</h2>",
        _figure(figures.get("picture"), f"One network of {large['edges']:,} weights, fitted to a photograph."),
        _figure(
            figures.get("cost"), "One training step of NG-GNN: forward, backward, gradients of all parameters and of all weights read."
        ),
        _table(("one training step", "peak memory", "bytes per edge", "s per million edges"), cost_rows(results), first_is_ours=True),
        _list(large["notes"]),
        "<h2>What to keep in mind</h2>",
        _list(caveats(results)),
        "</body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _when(results: Mapping[str, Any]) -> str:
    stages = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in results["seconds"].items())
    return f"Time: {stages}."


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]


def _figure(png: bytes | None, caption: str) -> str:
    if png is None:
        return ""
    source = base64.b64encode(png).decode()
    return f"<figure><img alt='{html.escape(caption)}' src='data:image/png;base64,{source}'><figcaption>{html.escape(caption)}</figcaption></figure>"


def _list(sentences: Sequence[str]) -> str:
    items = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)
    return f"<ul>{items}</ul>" if items else ""


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], first_is_ours: bool = False) -> str:
    if not rows:
        return ""

    def cells(row: Sequence[str], tag: str) -> str:
        return "".join(f"<{tag}{' class=number' if index else ''}>{html.escape(cell)}</{tag}>" for index, cell in enumerate(row))

    body = "".join(f"<tr{' class=ours' if first_is_ours and index == 0 else ''}>{cells(row, 'td')}</tr>" for index, row in enumerate(rows))
    return f"<table><tr>{cells(header, 'th')}</tr>{body}</table>"

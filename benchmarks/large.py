"""Large networks on little memory: a training step over 1e8 edges, a checkpoint of 1e9 edges streamed from its file, a 7B decoder planned.

Each run is a process of its own; what counts is everything that is resident in it at its peak, interpreter, libraries and file pages
included.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks import records
from benchmarks.machine import ROOT
from benchmarks.memory import MALLOC
from neural_graphs.report.process import held_bytes

GIB = 1 << 30
FILES = Path(tempfile.gettempdir()) / "ngk-large"
CHUNK = 1 << 24  # numbers that are drawn at a time
STEP = (2, 7072, 14144, 3)  # 1e8 edges
CHECKPOINT = (4096, 17000, 17000, 17000, 17000, 4096)  # 1e9
LLAMA = {"vocabulary": 32000, "width": 4096, "hidden": 11008, "layers": 32}  # 7B


@dataclass(frozen=True)
class Run:
    """What is run, (folder for files, layers) -> what is recorded of it; resident bytes that it may take."""

    text: str
    measure: Callable[[Path, int], dict]
    limit_bytes: int


def reader(layout, layers: int, **options):
    from neural_graphs.models import NGGNN

    torch.manual_seed(0)
    return NGGNN(layout, d_hid=32, num_layers=layers, norm="layer", **options)


def train(folder: Path, layers: int, weight_grads: bool) -> dict:
    """Forward, cross-entropy, backward and a step of SGD on the model's parameters."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.empty(1, i, o, 1).normal_(std=i**-0.5, generator=generator) for i, o in zip(STEP, STEP[1:])]
    biases = [torch.empty(1, o, 1).normal_(std=0.1, generator=generator) for o in STEP[1:]]
    model = reader(STEP, layers)
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
    begin, own = time.perf_counter(), time.process_time()
    loss = torch.nn.functional.cross_entropy(
        model([w.requires_grad_(weight_grads) for w in weights], biases), torch.zeros(1, dtype=torch.int64)
    )
    loss.backward()
    optimiser.step()
    return {
        "layout": list(STEP), "loss": loss.item(), "weight_grads": weight_grads, "seconds": time.perf_counter() - begin,
        "cpu_seconds": time.process_time() - own,
    }  # fmt: skip


def write_header(path: Path, shapes: dict[str, tuple[int, ...]]) -> int:
    """The header of a safetensors file of bfloat16 tensors; the file is as long as it says, without taking room. Returns its own length."""
    entries, at = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    return 8 + len(text)


def generate(path: Path, layout=CHECKPOINT) -> None:
    """A checkpoint of an MLP, weights ~ N(0, 1 / inputs), written some numbers at a time."""
    shapes = {f"{k}.weight": (o, i) for k, (i, o) in enumerate(zip(layout, layout[1:]))}
    part, generator = path.with_suffix(".part"), torch.Generator().manual_seed(0)
    begin = write_header(part, shapes)
    with part.open("r+b") as file:
        file.seek(begin)
        for shape in shapes.values():
            left = torch.Size(shape).numel()
            while left:
                values = torch.empty(min(left, CHUNK)).normal_(std=shape[1] ** -0.5, generator=generator).bfloat16()
                file.write(values.view(torch.uint8).numpy())
                left -= len(values)
    os.replace(part, path)


def stream(folder: Path, layers: int) -> dict:
    """Forward over the generated checkpoint, its weights left in the file."""
    from neural_graphs.report import plan
    from neural_graphs.tasks.embedding import embed

    path = folder / "large.safetensors"
    subject = plan.subject_of(str(path))
    torch.manual_seed(0)
    model = plan.model_for("ng-gnn", subject, 32, layers)
    found = plan.plan_of(model, subject, training=False, weights_mapped=True)
    begin, own = time.perf_counter(), time.process_time()
    result = embed(path, model, state=folder / "large.state")
    return {
        "layout": list(CHECKPOINT), "edges": subject.graph.num_edges, "file_bytes": path.stat().st_size, "planned_bytes": found.peak_bytes,
        "replayed": result.replayed, "result": result.values.tolist(), "seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - own,
    }  # fmt: skip


def plan_7b(folder: Path, layers: int) -> dict:
    """The plan of a forward pass and of a training step over a 7B decoder whose weights stay in their file: from its header alone."""
    from neural_graphs.report import plan

    d, hidden, path = LLAMA["width"], LLAMA["hidden"], folder / "llama.safetensors"
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (LLAMA["vocabulary"], d)}
    for k in range(LLAMA["layers"]):
        name = f"model.layers.{k}."
        shapes |= {f"{name}self_attn.{n}_proj.weight": (d, d) for n in "qkvo"}
        shapes |= {
            f"{name}mlp.gate_proj.weight": (hidden, d),
            f"{name}mlp.up_proj.weight": (hidden, d),
            f"{name}mlp.down_proj.weight": (d, hidden),
        }
        shapes |= {f"{name}input_layernorm.weight": (d,), f"{name}post_attention_layernorm.weight": (d,)}
    write_header(path, {**shapes, "model.norm.weight": (d,), "lm_head.weight": (LLAMA["vocabulary"], d)})
    subject = plan.subject_of(str(path))
    begin = time.perf_counter()
    options = {"layers": layers, "weights_mapped": True}
    found = {
        name: plan.make_plan(subject, training=name == "train", weight_grads=name == "train", **options) for name in ("forward", "train")
    }
    size = path.stat().st_size
    path.unlink()
    return {
        "edges": subject.graph.num_edges, "nodes": subject.graph.num_nodes, "file_bytes": size, "plans": {k: plan.facts(p) for k, p in found.items()},
        "seconds": time.perf_counter() - begin,
    }  # fmt: skip


RUNS = {
    "train-1e8": Run("a training step of NG-GNN over 1e8 edges", lambda folder, layers: train(folder, layers, False), 2 * GIB),
    "train-1e8-weight-grads": Run("the same with gradients of the weights", lambda folder, layers: train(folder, layers, True), 2 * GIB),
    "stream-1e9": Run("forward over a bfloat16 checkpoint of 1e9 edges", stream, GIB),
    "plan-7b": Run("a 7B decoder planned", plan_7b, 2 * GIB),
}


def child(name: str, folder: Path, layers: int, threads: int) -> dict:
    """One run, in the process that was started for it."""
    torch.set_num_threads(threads)
    return {**RUNS[name].measure(folder, layers), "layers": layers, "threads": threads, "resident_bytes": held_bytes("VmHWM")}


def main(
    runs: Annotated[str, typer.Option(help=f"Some of {', '.join(RUNS)}.")] = "train-1e8,train-1e8-weight-grads,stream-1e9,plan-7b",
    folder: Annotated[
        Path, typer.Option(help="Where files go: 2 GB for stream-1e9. What is there already is used, and an interrupted run goes on.")
    ] = FILES,
    layers: Annotated[int, typer.Option(help="Layers of the model.")] = 4,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    request: Annotated[str, typer.Option("--child", hidden=True)] = "",
) -> None:
    """Runs what needs much memory elsewhere, each in a process of its own, and appends its peak of resident bytes to results/<device>/large.jsonl."""
    if request:
        print(json.dumps(child(request, folder, layers, threads)))
        return
    names = [name.strip() for name in runs.split(",")]
    if any(name not in RUNS for name in names):
        raise typer.BadParameter(f"--runs: expected some of {', '.join(RUNS)}, got {runs!r}")
    folder.mkdir(parents=True, exist_ok=True)
    if "stream-1e9" in names and not (folder / "large.safetensors").exists():
        generate(folder / "large.safetensors")
    run, over = records.new_run(), []
    path = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    for name in names:
        command = [
            sys.executable,
            "-m",
            "benchmarks.large",
            "--child",
            name,
            "--folder",
            str(folder),
            "--layers",
            str(layers),
            "--threads",
            str(threads),
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path, **MALLOC["fixed"]})
        if done.returncode != 0:
            raise SystemExit(f"large: {name} failed: {(done.stderr.strip().splitlines() or [f'exit status {done.returncode}'])[-1]}")
        found = {"case": name, "limit_bytes": RUNS[name].limit_bytes, **json.loads(done.stdout.splitlines()[-1])}
        records.append("large", run, found)
        print(f"{RUNS[name].text}: {found['resident_bytes'] / 2**20:,.0f} MiB resident, {found['seconds']:.3g} s")
        if found["resident_bytes"] > found["limit_bytes"]:
            over.append(name)
    if over:
        raise SystemExit(f"large: over the limit of resident memory: {', '.join(over)}")


if __name__ == "__main__":
    typer.run(main)

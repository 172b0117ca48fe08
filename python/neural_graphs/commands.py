"""Commands of `ngk` about checkpoints and measurements; cli.py lists them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ngkernels.planner import parse_size, size_text

# fmt: off
Checkpoint = Annotated[Path, typer.Argument(metavar="FILE", help="A safetensors file, the index of a sharded one (model.safetensors.index.json), or a folder with one of them.")]
Heads = Annotated[int | None, typer.Option("--num-heads", min=1, help="Query heads of a decoder whose queries share keys. [default: that of config.json beside the file]", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="All facts as JSON, every block by itself.")]
Methods = Annotated[str, typer.Option("--methods", help="all, or some of the methods that --list-methods names, by commas.")]
Budget = Annotated[str, typer.Option("--budget", help="Memory of a training step: 8GiB, or several, 2GiB,8GiB. What the bare process holds does not count.")]
ScaleOut = Annotated[Path | None, typer.Option("--out", help="Results go to OUT/<device>/. [default: benchmarks/results in a checkout, else ngk-scale]", show_default=False)]
Parameters = Annotated[int | None, typer.Option("--parameters", min=1, help="Choose every method's width for about so many parameters. [default: published sizes]", show_default=False)]
First = Annotated[int, typer.Option("--first", min=8, help="Smallest hidden width h of the networks [2, h, 2h, 3].")]
Last = Annotated[int, typer.Option("--last", min=8, help="Largest hidden width that is tried.")]
Refine = Annotated[int, typer.Option("--refine", min=0, help="How often the gap between fits and does not fit is halved.")]
Precision = Annotated[str, typer.Option("--dtype", help="fp32, or bf16 for autocast.")]
Gradients = Annotated[bool, typer.Option("--weight-grads", help="Gradients of the input network's weights too.")]
ScaleThreads = Annotated[int, typer.Option("--threads", min=1, help="CPU threads of a training step.")]
ScaleDevice = Annotated[str, typer.Option("--device", help="cpu, cuda or cuda:<number>.")]
Seconds = Annotated[float, typer.Option("--max-seconds", min=1.0, help="Time limit of one measurement.")]
Resume = Annotated[bool, typer.Option("--resume/--fresh", help="Use the measurements that are there, or measure all of them again.")]
Others = Annotated[str, typer.Option("--others", help="Other networks that are measured too: all, or some of mnist-inrs, nerf, siren-video, vit-blocks.")]
Project = Annotated[bool, typer.Option("--project", help="Where a step would outlast --max-seconds: the planner's peak and a projected time, marked, instead of an end by time.")]
ListMethods = Annotated[bool, typer.Option("--list-methods", help="Name the methods, and why one cannot run here.")]
PlanSubject = Annotated[str, typer.Argument(metavar="FILE|LAYOUT", help="A checkpoint as for ngk inspect, or the widths of an MLP: 2,1024,2048,3.")]
PlanModel = Annotated[str, typer.Option("--model", help="The model that reads it: ng-gnn, ng-t (all pairs of neurons) or ng-t-edges.")]
PlanBudget = Annotated[str | None, typer.Option("--budget", help="Memory of a step, such as 8GiB: names the policy to use, or what is needed. [default: none]", show_default=False)]
PlanWidth = Annotated[int, typer.Option("--width", min=1, help="Width of edge states; others in the published proportions.")]
PlanLayers = Annotated[int, typer.Option("--layers", min=1, help="Layers of message passing, or of attention.")]
Training = Annotated[bool, typer.Option("--training/--forward", help="A training step, or a forward pass.")]
Streamed = Annotated[bool, typer.Option("--stream", help="Weights stay in their file, as with ngk embed --stream.")]
PlanDevice = Annotated[str, typer.Option("--device", help="cpu, or cuda: a GPU, which need not be there.")]
PlanThreads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads. [default: torch's choice]", show_default=False)]
EmbedOut = Annotated[Path | None, typer.Option("--out", help="Write the result here, as JSON.", show_default=False)]
EmbedParameters = Annotated[Path | None, typer.Option("--parameters", help="A state dict of the model (torch.save). [default: random, by --seed]", show_default=False)]
EmbedGradients = Annotated[Path | None, typer.Option("--gradients", help="Also the gradients of the weights: a safetensors file of the same names, or a folder for shards.", show_default=False)]
EmbedState = Annotated[Path | None, typer.Option("--state", help="Folder for finished parts: the same command continues an interrupted run. Removed in the end.", show_default=False)]
EmbedModel = Annotated[str, typer.Option("--model", help="The model that reads it: ng-gnn or ng-t-edges.")]
EmbedDevice = Annotated[str, typer.Option("--device", help="cpu, or cuda or cuda:<number>: a GPU that reads the files panel by panel.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of random parameters.")]
# fmt: on


def prepare(device: str, threads: int | None) -> Console:
    """Checks the device, sets the threads; returns the console."""
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise ValueError(f'--device: expected cpu, cuda or cuda:<number>, got "{device}"') from None
    if kind not in ("cpu", "cuda"):
        raise ValueError(f'--device: expected cpu, cuda or cuda:<number>, got "{device}"')
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f'--device: "{device}" was asked for, but torch {torch.__version__} sees no GPU here; use --device cpu')
    if threads is not None:
        torch.set_num_threads(threads)
    return Console()


def embed(
    file: Checkpoint,
    model: EmbedModel = "ng-gnn",
    out: EmbedOut = None,
    parameters: EmbedParameters = None,
    gradients: EmbedGradients = None,
    state: EmbedState = None,
    budget: PlanBudget = None,
    width: PlanWidth = 32,
    layers: PlanLayers = 4,
    seed: Seed = 0,
    threads: PlanThreads = None,
    num_heads: Heads = None,
    device: EmbedDevice = "cpu",
) -> None:
    """Run a model over a checkpoint of any size: its weights stay in their files and take memory only while they are read.

    The result is bit by bit that of weights in memory. Ctrl-C or a kill at any time; with --state, the same command continues.
    """
    import torch

    from .report import plan as report
    from .report.process import held_bytes
    from .tasks import embedding

    console = prepare(device, threads)
    if model == "ng-t":
        raise ValueError("--model: expected ng-gnn or ng-t-edges, got 'ng-t': a checkpoint has too many pairs of neurons")
    subject = report.subject_of(str(file), num_heads)
    torch.manual_seed(seed)
    reader = report.model_for(model, subject, width, layers)
    found = report.plan_of(reader, subject, budget, training=gradients is not None, weight_grads=gradients is not None, weights_mapped=True)
    console.print(f"{report.MODELS[model]}: {found.describe()}", highlight=False, markup=False, soft_wrap=True)
    if parameters is not None:
        reader.load_state_dict(torch.load(parameters, weights_only=True))
    result = embedding.embed(file, reader.to(device), gradients, state, num_heads)
    if result.replayed:
        console.print(f"continued: {result.replayed} parts were finished already", highlight=False)
    if out is not None:
        embedding.write(result, out)
    shown = ", ".join(f"{v:.4g}" for v in result.values[:8].tolist()) + (", ..." if len(result.values) > 8 else "")
    console.print(f"result: {shown}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"peak of the process: {size_text(held_bytes('VmHWM'))}", highlight=False)


def plan(
    subject: PlanSubject,
    model: PlanModel = "ng-gnn",
    budget: PlanBudget = None,
    width: PlanWidth = 32,
    layers: PlanLayers = 4,
    training: Training = True,
    weight_grads: Gradients = False,
    stream: Streamed = False,
    device: PlanDevice = "cpu",
    threads: PlanThreads = None,
    num_heads: Heads = None,
    as_json: AsJson = False,
) -> None:
    """Say what a step would cost before it runs: peak memory and work, for each way to keep edge states.

    Nothing is computed and of a checkpoint only the headers are read. With a budget the cheapest way that fits is chosen; where none
    does, the error says how many bytes are needed.
    """
    from .report import plan as report

    found = report.make_plan(
        report.subject_of(subject, num_heads), model, width, layers, budget, training=training, weight_grads=weight_grads, weights_mapped=stream,
        device=device, threads=threads,
    )  # fmt: skip
    if as_json:
        Console().print_json(json.dumps(report.facts(found)))
        return
    Console().print(f"{report.MODELS[model]}: {found.describe()}", highlight=False, markup=False, soft_wrap=True)


def inspect(file: Checkpoint, num_heads: Heads = None, as_json: AsJson = False) -> None:
    """Show the neural graph of a checkpoint: node layers, blocks, nodes, edges, bytes.

    Reads the headers only, so a file of any size takes a moment. Stacks of linear layers and LLaMA-shaped decoders are understood.
    """
    from .report import inspect as report

    facts = report.inspect(file, num_heads)
    console = Console()
    if as_json:
        console.print_json(json.dumps(facts))
        return
    for table in report.tables(facts):
        console.print(table)
    for line in report.summary(facts):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def scale(
    methods: Methods = "all",
    budget: Budget = "4GiB",
    out: ScaleOut = None,
    parameters: Parameters = None,
    first: First = 16,
    last: Last = 1 << 20,
    refine: Refine = 2,
    dtype: Precision = "fp32",
    weight_grads: Gradients = False,
    threads: ScaleThreads = 1,
    device: ScaleDevice = "cpu",
    max_seconds: Seconds = 600.0,
    resume: Resume = True,
    others: Others = "",
    project: Project = False,
    list_methods: ListMethods = False,
) -> None:
    """Find the largest input network that each method trains within a memory budget.

    The published memory study: networks [2, h, 2h, 3], batch 1, forward, backward and optimiser step. Every size is measured in a
    process of its own with a hard limit; running out of memory is a result. Results: OUT/<device>/scale.jsonl (every measurement),
    scale.md (table), scale-memory.png, scale-time.png, with
    --weight-grads scale-weight-grads.md ... Ctrl-C at any time; the same command continues.
    """
    from .scaling.methods import METHODS, select
    from .scaling.study import OTHERS, Settings, Study, device_of

    console = Console()
    if list_methods:
        for method in METHODS.values():
            reason = method.why_not()
            console.print(f"{method.name}: {method.text}" + (f" (cannot run: {reason})" if reason else ""), highlight=False, soft_wrap=True)
        return
    chosen, missing = select(methods)
    for name, reason in missing.items():
        console.print(f"[yellow]left out:[/yellow] {name}: {reason}", highlight=False, soft_wrap=True)
    settings = Settings(
        budgets=tuple(sorted(parse_size(part) for part in budget.split(","))), first=first, last=last, refine=refine, parameters=parameters,
        dtype=dtype, weight_grads=weight_grads, threads=threads, device=device, max_seconds=max_seconds,
        others=tuple(OTHERS if others == "all" else (n.strip() for n in others.split(",") if n.strip())), project=project,
    )  # fmt: skip
    _check_room(settings)
    folder = (out or Path("benchmarks/results" if Path("benchmarks/results").is_dir() else "ngk-scale")) / device_of(device)["slug"]
    _run_study(console, Study(settings, folder / "scale.jsonl", fresh=not resume), chosen, folder)


def _check_room(settings) -> None:
    """A budget that the machine does not have would measure the machine, not the method."""
    from .report.process import available_memory
    from .scaling.measure import ROOM

    free = available_memory() if settings.device == "cpu" else None
    needed = max(settings.budgets) * ROOM[0] + ROOM[1]
    if free is not None and needed > free:
        raise ValueError(
            f"--budget: expected at most what is free, {size_text(int((free - ROOM[1]) / ROOM[0]))}, got {size_text(max(settings.budgets))}"
        )


def _run_study(console: Console, study, chosen, folder: Path) -> None:
    """Measures with a line for every point, then writes and shows the table."""
    from .scaling import show
    from .tasks.training import Interrupted

    def told(row: dict, known: bool) -> None:
        console.print(show.row_text(row) + (" (known)" if known else ""), highlight=False, markup=False, soft_wrap=True)

    with console.status("measuring") as status:
        study.told = told
        study.starting = lambda method, hidden: status.update(
            f"{method.name} {hidden if isinstance(hidden, str) else show.layout_text((2, hidden, 2 * hidden, 3))}"
        )
        try:
            results = [found for method in chosen for found in study.search(method)]
        except KeyboardInterrupt:
            raise Interrupted(f"stopped; the measurements so far are in {folder / 'scale.jsonl'}") from None
    paths = show.publish(study.settings, results, study.records.latest(), folder)
    for found in results:
        size = "none" if found.row is None else show.layout_text(found.row["layout"])
        text = f"{found.method} at {size_text(found.budget)}: {size}{show.BOUND[found.bound]}"
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    console.print("written: " + ", ".join(map(str, paths)), highlight=False, soft_wrap=True)

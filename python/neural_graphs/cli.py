"""`ngk`: the command line of neural_graphs.

Expected failures (bad options, missing or corrupt files, a full disk, a backend that cannot run) are shown as one sentence with exit status 1;
`ngk --debug ...` shows where they come from. Ctrl-C leaves a state that the same command continues, with exit status 130.
"""

from __future__ import annotations

import os
import sys
import warnings
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads make a busy machine many times slower

try:
    import typer
    from rich.console import Console
except ImportError as missing:
    sys.exit(f'error: ngk needs the package {missing.name}; pip install "ngkernels[demo]"')

from . import commands

EXPECTED = (ValueError, TypeError, NotImplementedError, RuntimeError, FloatingPointError, OSError, MemoryError)
STOPPED = 130

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Train and measure models that read the weights of other networks.\n\n"
    "Start with [bold]ngk demo[/bold]: real pictures -> one small network each -> a model that names the picture from the network's weights "
    "-> a report with plots. It takes about ten minutes on two cores and downloads nothing.",
)
train_app = typer.Typer(no_args_is_help=True, help="Train a model on one task.")
app.add_typer(train_app, name="train")
app.command()(commands.inspect)
app.command()(commands.plan)
app.command()(commands.embed)
app.command()(commands.scale)


class Model(str, Enum):
    ng_gnn = "ng-gnn"
    ng_t = "ng-t"


class Attention(str, Enum):
    all = "all"
    edges = "edges"


class Suffix(str, Enum):
    pth = "pth"
    safetensors = "safetensors"


class _State:
    debug = False


# fmt: off
Cache = Annotated[Path | None, typer.Option("--cache", help="Folder for generated networks. [default: $NGK_CACHE, or ~/.cache/ngkernels]", show_default=False)]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda or cuda:<number>.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of everything random: initial parameters, batches, augmentation.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads of a training step. [default: torch's choice]", show_default=False)]
Resume = Annotated[bool, typer.Option("--resume/--fresh", help="Continue what the output folder holds, or start anew and overwrite it.")]
Bf16 = Annotated[bool, typer.Option("--bf16", help="Train under bfloat16 autocast.")]
Steps = Annotated[int | None, typer.Option("--steps", min=1, help="Training steps. One long schedule is much better than a short one. [default: 8000; 5000 for ng-t]", show_default=False)]
Reader = Annotated[Model, typer.Option("--model", help="The model that reads the networks.")]
# fmt: on


@app.callback()
def _options(debug: Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")] = False) -> None:
    _State.debug = debug


@app.command()
def demo(
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Folder for the report, plots and checkpoint. [default: ngk-demo, or ngk-demo-smoke]", show_default=False
        ),
    ] = None,
    steps: Steps = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Every stage in miniature, under a minute; its accuracy means nothing.")] = False,
    model: Reader = Model.ng_gnn,
    device: Device = "cpu",
    seed: Seed = 0,
    threads: Threads = None,
    bf16: Bf16 = False,
    resume: Resume = True,
    cache: Cache = None,
) -> None:
    """Fit networks to real pictures, train a model on their weights, compare, measure, write a report.

    The report is OUT/report.html (one file, figures inside) and OUT/report.md. Ctrl-C at any time; the same command continues.
    """
    console = commands.prepare(device, threads)
    from .data.storage import default_cache
    from .report.demo import Demo, make_config

    out = out or Path("ngk-demo-smoke" if smoke else "ngk-demo")
    options = {"steps": steps, "seed": seed, "device": device, "model": model.value, "fresh": not resume, "bf16": bf16, "small": smoke}
    config = make_config(out, cache or default_cache(), **options)
    results = Demo(config, console).run()
    from .report.page import findings

    for sentence in findings(results):
        console.print("- " + sentence, highlight=False, soft_wrap=True)
    for note in results["large"]["notes"]:
        console.print("- " + note, highlight=False, soft_wrap=True)
    console.print(f"report: {out / 'report.html'}", highlight=False, soft_wrap=True)


@app.command("fit-inrs")
def fit_inrs(
    images: Annotated[int, typer.Option("--images", min=1, max=1797, help="How many of the 1,797 pictures.")] = 1797,
    per_image: Annotated[int, typer.Option("--per-image", min=1, help="Networks per picture, each from its own random start.")] = 16,
    layout: Annotated[str, typer.Option("--layout", help="Widths of the SIREN; 2 inputs and 1 output.")] = "2,8,8,1",
    steps: Annotated[int, typer.Option("--steps", min=1, help="Adam steps of the fit.")] = 250,
    shared_init: Annotated[
        bool, typer.Option("--shared-init", help="One random start for all networks. It trivialises the task: for comparisons only.")
    ] = False,
    seed: Seed = 0,
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="Cores. [default: all]", show_default=False)] = None,
    cache: Cache = None,
    export: Annotated[
        Path | None, typer.Option("--export", help="Also write one file per network here, in the public MNIST-INR layout.")
    ] = None,
    suffix: Annotated[Suffix, typer.Option("--format", help="File format of --export.")] = Suffix.pth,
) -> None:
    """Fit one small network (a SIREN) to each picture of scikit-learn's digits, several times over.

    Finished chunks are kept: Ctrl-C, and the same command continues.
    """
    console = commands.prepare("cpu", None)
    from .data import DigitConfig, SirenConfig, digit_inrs, digit_splits, export_mnist_layout
    from .data.storage import default_cache
    from .report.progress import ProgressLine

    siren = replace(SirenConfig(steps=steps), layout=_layout(layout))
    config = DigitConfig(images=images, per_image=per_image, seed=seed, shared_init=shared_init, siren=siren)
    cache = cache or default_cache()
    with ProgressLine(console, "fit networks", config.total) as line:
        networks = digit_inrs(config, cache, workers, lambda done, total: line.update(done))
    quality = f"median {networks.psnr.median():.1f} dB, 5th percentile {networks.psnr.quantile(0.05):.1f} dB"
    console.print(f"{len(networks):,} networks, {quality}, in {config.folder(cache)}", highlight=False, soft_wrap=True)
    if export is not None:
        with ProgressLine(console, "write files", len(networks)) as line:
            splits = export_mnist_layout(digit_splits(networks), export, f".{suffix.value}", lambda done, total: line.update(done))
        console.print(f"one file per network, listed in {splits}", highlight=False, soft_wrap=True)


@train_app.command("inr-classification")
def train_inr_classification(
    data: Annotated[
        str, typer.Option("--data", help='"digits" (made here), or a folder in a public layout (MNIST-INR, FMNIST-INR, NFN).')
    ] = "digits",
    splits: Annotated[
        Path | None, typer.Option("--splits", help="Splits JSON of a public layout. [default: the one in the folder]", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for the checkpoint and metrics.json.")] = Path("ngk-inr-classification"),
    steps: Steps = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Networks per step.")] = 64,
    lr: Annotated[float, typer.Option("--lr", help="Peak learning rate of AdamW.")] = 2e-3,
    weight_decay: Annotated[float, typer.Option("--weight-decay", min=0.0, help="Weight decay of AdamW.")] = 1e-2,
    d_hid: Annotated[int, typer.Option("--d-hid", min=1, help="Width of node states; of edge states too, or half of it (ng-t).")] = 32,
    num_layers: Annotated[int, typer.Option("--layers", min=1, help="Layers of message passing, or of attention.")] = 4,
    attention: Annotated[
        Attention, typer.Option("--attention", help="ng-t: along the edges of a network, or among all pairs of its neurons.")
    ] = Attention.edges,
    augment: Annotated[bool, typer.Option("--augment/--no-augment", help="Turn, scale, shift the pictures, in weight space.")] = True,
    eval_every: Annotated[int, typer.Option("--eval-every", min=1, help="Steps between two evaluations.")] = 500,
    model: Reader = Model.ng_gnn,
    device: Device = "cpu",
    seed: Seed = 0,
    threads: Threads = None,
    bf16: Bf16 = False,
    resume: Resume = True,
    cache: Cache = None,
) -> None:
    """Name the class of a picture from the weights of a network that draws it, without running the network.

    Ctrl-C saves; the same command continues and ends with the same model as an uninterrupted run.
    """
    console = commands.prepare(device, threads)
    from .data.storage import default_cache, write_json
    from .report.progress import ProgressLine
    from .tasks.inr_classification import STEPS, ClassifierConfig, train_classifier
    from .tasks.training import Interrupted, StopRequest, TrainConfig

    steps = steps or STEPS[model.value]
    train = TrainConfig(steps=steps, batch=batch, lr=lr, weight_decay=weight_decay, seed=seed, bf16=bf16, eval_every=eval_every)
    options = {"d_hid": d_hid, "num_layers": num_layers, "attention": attention.value, "augment": augment}
    config = ClassifierConfig(model=model.value, train=train, **options)
    sets, described = _read_sets(console, data, splits, cache or default_cache())
    with StopRequest() as stop, ProgressLine(console, f"train {config.model}", steps) as line:
        trainer, finished = train_classifier(
            sets,
            config,
            described,
            out / "checkpoint.pt",
            device,
            resume,
            lambda p: line.update(p.step, f"loss {p.loss:.3f}, accuracy {100 * p.accuracy:.0f} %, {p.steps_per_second:.0f} steps/s"),
            stop,
        )
    if not finished:
        raise Interrupted(f"stopped after step {trainer.step} of {steps}; the state is in {out / 'checkpoint.pt'}")
    write_json(out / "metrics.json", {"identity": trainer.identity, "history": trainer.history, "seconds": trainer.seconds})
    last = trainer.history[-1]
    console.print(f"test accuracy {last['test_accuracy']:.1f} % (standard error {last['test_standard_error']:.1f}); {out / 'metrics.json'}",
                  highlight=False, soft_wrap=True)  # fmt: skip


def _read_sets(console: Console, data: str, splits: Path | None, cache: Path):
    """Returns (sets by split, what describes them in a checkpoint)."""
    from .data import DigitConfig, digit_inrs, digit_splits, read_collection
    from .data.digits import SPLIT_SEED
    from .report.progress import ProgressLine

    if data == "digits":
        if splits is not None:
            raise ValueError("--splits goes with --data FOLDER; the digits have a fixed split")
        config = DigitConfig()
        with ProgressLine(console, "fit digit networks", config.total) as line:
            return digit_splits(digit_inrs(config, cache, progress=lambda done, total: line.update(done))), {
                **config.describe(),
                "split": SPLIT_SEED,
            }
    sets = read_collection(data, splits)
    sizes = {name: len(part) for name, part in sets.items()}
    console.print(f"{sum(sizes.values()):,} networks {list(sets['train'].layout)} from {data}: {sizes}", highlight=False, soft_wrap=True)
    return sets, {"data": str(Path(data).resolve()), "splits": None if splits is None else str(splits.resolve()), "sizes": sizes}


def _layout(text: str) -> tuple[int, ...]:
    try:
        layout = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        raise ValueError(f'--layout: expected widths like "2,8,8,1", got "{text}"') from None
    if len(layout) < 3 or layout[0] != 2 or layout[-1] != 1 or min(layout) < 1:
        raise ValueError(f'--layout: expected widths from 2 inputs to 1 output, like "2,8,8,1", got "{text}"')
    return layout


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the console script; `arguments` default to the command line. Ends with SystemExit."""
    errors, notes = Console(stderr=True), Console()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: notes.print(f"[yellow]note:[/yellow] {message}", highlight=False, soft_wrap=True)
            app(args=arguments)
    except KeyboardInterrupt:
        errors.print("interrupted; what was finished is kept, and the same command continues", highlight=False)
        sys.exit(STOPPED)
    except EXPECTED as error:
        if _State.debug:
            raise
        stopped = type(error).__name__ == "Interrupted"
        text = " ".join(str(error).split()) or type(error).__name__
        if stopped:
            errors.print(f"{text}. The same command continues (--fresh starts anew)", highlight=False, markup=False, soft_wrap=True)
        else:
            errors.print(f"error: {text}", highlight=False, markup=False, soft_wrap=True)
        sys.exit(STOPPED if stopped else 1)


if __name__ == "__main__":
    main()

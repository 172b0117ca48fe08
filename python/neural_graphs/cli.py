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
from typing import Optional

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads make a busy machine many times slower

import typer  # noqa: E402
from rich.console import Console  # noqa: E402

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


class Model(str, Enum):
    ng_gnn = "ng-gnn"


class Suffix(str, Enum):
    pth = "pth"
    safetensors = "safetensors"


class _State:
    debug = False


CACHE = typer.Option(None, "--cache", help="Folder for generated networks. [default: $NGK_CACHE, or ~/.cache/ngkernels]", show_default=False)
DEVICE = typer.Option("cpu", "--device", help="cpu, cuda or cuda:<number>.")
SEED = typer.Option(0, "--seed", min=0, help="Seed of everything random: initial parameters, batches, augmentation.")
THREADS = typer.Option(None, "--threads", min=1, help="CPU threads of a training step. [default: torch's choice]", show_default=False)
RESUME = typer.Option(True, "--resume/--fresh", help="Continue what the output folder holds, or start anew and overwrite it.")
BF16 = typer.Option(False, "--bf16", help="Train under bfloat16 autocast.")


@app.callback()
def _options(debug: bool = typer.Option(False, "--debug", help="Show the full traceback of an error.")) -> None:
    _State.debug = debug


@app.command()
def demo(
    out: Optional[Path] = typer.Option(
        None, "--out", help="Folder for the report, plots and checkpoint. [default: ngk-demo, or ngk-demo-smoke]", show_default=False
    ),
    steps: int = typer.Option(8000, "--steps", min=1, help="Training steps. One long schedule is much better than a shorter one."),
    smoke: bool = typer.Option(False, "--smoke", help="Every stage in miniature, in less than a minute; its accuracy means nothing."),
    model: Model = typer.Option(Model.ng_gnn, "--model", help="The model that reads the networks."),
    device: str = DEVICE,
    seed: int = SEED,
    threads: Optional[int] = THREADS,
    bf16: bool = BF16,
    resume: bool = RESUME,
    cache: Optional[Path] = CACHE,
) -> None:
    """Fit networks to real pictures, train a model on their weights, compare, measure, write a report.

    The report is OUT/report.html (one file, figures inside) and OUT/report.md. Ctrl-C at any time; the same command continues.
    """
    console = _prepare(device, threads)
    from .data.storage import default_cache
    from .report.demo import Demo, make_config

    out = out or Path("ngk-demo-smoke" if smoke else "ngk-demo")
    config = make_config(out, cache or default_cache(), steps, seed, device, model.value, not resume, bf16, smoke)
    results = Demo(config, console).run()
    from .report.page import findings

    for sentence in findings(results):
        console.print("- " + sentence, highlight=False)
    for note in results["large"]["notes"]:
        console.print("- " + note, highlight=False)
    console.print(f"report: {out / 'report.html'}", highlight=False, soft_wrap=True)


@app.command("fit-inrs")
def fit_inrs(
    images: int = typer.Option(1797, "--images", min=1, max=1797, help="How many of the 1,797 pictures."),
    per_image: int = typer.Option(16, "--per-image", min=1, help="Networks per picture, each from its own random start."),
    layout: str = typer.Option("2,8,8,1", "--layout", help="Widths of the SIREN; 2 inputs and 1 output."),
    steps: int = typer.Option(250, "--steps", min=1, help="Adam steps of the fit."),
    shared_init: bool = typer.Option(
        False, "--shared-init", help="Start all networks from one random initialisation. This makes the task trivial: for comparisons only."
    ),
    seed: int = SEED,
    workers: Optional[int] = typer.Option(None, "--workers", min=1, help="Cores. [default: all]", show_default=False),
    cache: Optional[Path] = CACHE,
    export: Optional[Path] = typer.Option(None, "--export", help="Also write one file per network, in the public MNIST-INR layout, here."),
    suffix: Suffix = typer.Option(Suffix.pth, "--format", help="File format of --export."),
) -> None:
    """Fit one small network (a SIREN) to each picture of scikit-learn's digits, several times over.

    Finished chunks are kept: Ctrl-C, and the same command continues.
    """
    console = _prepare("cpu", None)
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
    data: str = typer.Option("digits", "--data", help='"digits" (generated here), or a folder in a public layout (MNIST-INR, FMNIST-INR, NFN).'),
    splits: Optional[Path] = typer.Option(None, "--splits", help="Splits JSON of a public layout. [default: the one in the folder]", show_default=False),
    out: Path = typer.Option(Path("ngk-inr-classification"), "--out", help="Folder for the checkpoint and metrics.json."),
    steps: int = typer.Option(8000, "--steps", min=1, help="Training steps."),
    batch: int = typer.Option(64, "--batch", min=1, help="Networks per step."),
    lr: float = typer.Option(2e-3, "--lr", help="Peak learning rate of AdamW."),
    weight_decay: float = typer.Option(1e-2, "--weight-decay", min=0.0),
    d_hid: int = typer.Option(32, "--d-hid", min=1, help="Width of node and edge states."),
    num_layers: int = typer.Option(4, "--layers", min=1, help="Message-passing layers."),
    augment: bool = typer.Option(True, "--augment/--no-augment", help="Turn, scale and shift the pictures a little, in weight space."),
    model: Model = typer.Option(Model.ng_gnn, "--model"),
    eval_every: int = typer.Option(500, "--eval-every", min=1, help="Steps between two evaluations."),
    device: str = DEVICE,
    seed: int = SEED,
    threads: Optional[int] = THREADS,
    bf16: bool = BF16,
    resume: bool = RESUME,
    cache: Optional[Path] = CACHE,
) -> None:
    """Name the class of a picture from the weights of a network that draws it, without running the network.

    Ctrl-C saves; the same command continues and ends with the same model as an uninterrupted run.
    """
    console = _prepare(device, threads)
    from .data.storage import default_cache, write_json
    from .report.progress import ProgressLine
    from .tasks.inr_classification import ClassifierConfig, train_classifier
    from .tasks.training import Interrupted, StopRequest, TrainConfig

    train = TrainConfig(steps=steps, batch=batch, lr=lr, weight_decay=weight_decay, seed=seed, bf16=bf16, eval_every=eval_every)
    config = ClassifierConfig(model=model.value, d_hid=d_hid, num_layers=num_layers, augment=augment, train=train)
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
    from .report.progress import ProgressLine

    if data == "digits":
        if splits is not None:
            raise ValueError("--splits goes with --data FOLDER; the digits have a fixed split")
        config = DigitConfig()
        with ProgressLine(console, "fit digit networks", config.total) as line:
            return digit_splits(digit_inrs(config, cache, progress=lambda done, total: line.update(done))), config.describe()
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


def _prepare(device: str, threads: int | None) -> Console:
    """Checks the device, sets the threads, shows warnings as notes; returns the console."""
    import torch

    console = Console()
    warnings.showwarning = lambda message, *_: console.print(f"[yellow]note:[/yellow] {message}", highlight=False)
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
    return console


def main() -> None:
    """Entry point of the console script."""
    errors = Console(stderr=True)
    try:
        app()
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

"""The demo, stage by stage: fit networks to real pictures, train a model on their weights, compare, measure a large step, report.

Results of a finished stage are kept in `<out>/results.json` with the configuration that made them, and used again when a run with
the same configuration continues.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from ..data import (
    DigitConfig,
    InrSet,
    PictureConfig,
    digit_inrs,
    digit_splits,
    load_digit_pictures,
    picture_inr,
)
from ..data.digits import SPLIT_SEED
from ..data.storage import read_json, write_json
from ..tasks.baselines import MlpConfig, bounds, run_baseline, weight_baselines
from ..tasks.inr_classification import MODELS, STEPS, ClassifierConfig, train_classifier
from ..tasks.training import Interrupted, StopRequest, TrainConfig
from . import large_step, process, publish
from .progress import ProgressLine

FORMAT = 3  # raised when stages of an older run must not be used again
TITLES = {"cpp": "fused C++ kernels", "reference": "reference, eager"}


@dataclass(frozen=True)
class DemoConfig:
    """Everything that determines a demo run."""

    out: Path
    cache: Path
    device: str = "cpu"
    fresh: bool = False
    digits: DigitConfig = field(default_factory=DigitConfig)
    picture: PictureConfig = field(default_factory=PictureConfig)
    classifiers: tuple[ClassifierConfig, ...] = (ClassifierConfig(),)  # the first is what the report is about
    baselines: MlpConfig = field(default_factory=MlpConfig)
    repeats: int = 2


def smoke(config: DemoConfig) -> DemoConfig:
    """Returns the same demo in miniature: every stage runs, in less than a minute; its accuracy means nothing."""
    trains = [replace(c.train, steps=min(c.train.steps, 60), batch=32, eval_every=20, warmup=10) for c in config.classifiers]
    picture_siren = replace(config.picture.siren, layout=(2, 64, 128, 3), steps=40)
    return replace(
        config,
        digits=replace(config.digits, images=60, per_image=4, chunk=120, siren=replace(config.digits.siren, steps=60)),
        picture=replace(config.picture, siren=picture_siren),
        classifiers=tuple(replace(c, train=train) for c, train in zip(config.classifiers, trains, strict=True)),
        baselines=replace(config.baselines, steps=40, batch=64),
        repeats=1,
    )


class Demo:
    """Runs the stages in order; `results` collects plain numbers, `figures` the PNGs."""

    def __init__(self, config: DemoConfig, console: Console):
        self.config, self.console = config, console
        self.path = config.out / "results.json"
        self.results: dict[str, Any] = {"format": FORMAT, "machine": publish.machine(config.device), "stages": {}, "seconds": {}}
        if not config.fresh and self.path.exists():
            saved = read_json(self.path)
            if saved.get("format") == FORMAT:
                self.results = {**saved, "machine": self.results["machine"]}

    def run(self) -> dict[str, Any]:
        """Runs what is not done yet and writes the report.

        Returns:
            The results: data, training, baselines, large, seconds.

        Raises:
            Interrupted: after SIGINT or SIGTERM while training; everything is saved.
            DataError, ngkernels' errors: one clear sentence each.
        """
        networks, picture = self._networks(), self._picture()
        sets = digit_splits(networks)
        with StopRequest() as stop:
            trained = [
                self._stage(f"train {c.model}", self._training_identity(c), lambda c=c: self._train(c, sets, stop))
                for c in self.config.classifiers
            ]
            baselines = self._stage("baselines", self._baseline_identity(), lambda: self._baselines(sets, stop))
        large = self._stage("large step", self._large_identity(), self._large_step)
        results = {
            "machine": self.results["machine"],
            "data": publish.describe_data(self.config.digits, networks, sets),
            "trained": trained,
            "baselines": baselines,
            "large": large,
            "seconds": self.results["seconds"],
        }
        publish.write(self.config.out, results, publish.figures(results, sets["test"], self.config.picture, picture))
        return results

    # ------------------------------------------------------------------------------------------------------------ stages

    def _stage(self, name: str, identity: dict, work: Callable[[], Any]) -> Any:
        """Returns the saved result of a stage, or does the work and saves it."""
        identity = json.loads(json.dumps(identity))  # as it reads back: lists for tuples
        saved = self.results["stages"].get(name)
        if saved is not None and saved["identity"] == identity:
            return saved["result"]
        begin = time.monotonic()
        result = work()
        self.results["stages"][name] = {"identity": identity, "result": result}
        self.results["seconds"][name] = result["seconds"] if name.startswith("train ") else time.monotonic() - begin
        write_json(self.path, self.results)
        return result

    def _networks(self) -> InrSet:
        begin, config = time.monotonic(), self.config.digits
        with ProgressLine(self.console, "fit digit networks", config.total) as line:
            missing: list[int] = []

            def progress(done: int, total: int) -> None:
                missing.append(total - done)
                if missing[0]:
                    line.update(done)

            networks = digit_inrs(config, self.config.cache, progress=progress)
        if missing[0]:
            self.results["seconds"]["fit"] = time.monotonic() - begin
            write_json(self.path, self.results)
        else:
            self.console.print(f"{len(networks):,} digit networks from the cache {self.config.cache}", highlight=False, soft_wrap=True)
        return networks

    def _picture(self) -> InrSet:
        with ProgressLine(self.console, "fit the large network", self.config.picture.siren.steps) as line:
            return picture_inr(self.config.picture, self.config.cache, lambda done, total: line.update(done))

    def _train(self, config: ClassifierConfig, sets: dict[str, InrSet], stop: StopRequest) -> dict[str, Any]:
        checkpoint = self.config.out / f"checkpoint-{config.model}.pt"
        with ProgressLine(self.console, f"train {config.model}", config.train.steps) as line:
            trainer, finished = train_classifier(
                sets,
                config,
                self._data_identity(),
                checkpoint,
                self.config.device,
                resume=not self.config.fresh,
                on_step=lambda p: line.update(
                    p.step, f"loss {p.loss:.3f}, accuracy {100 * p.accuracy:.0f} %, {p.steps_per_second:.0f} steps/s"
                ),
                stop=stop,
            )
        if not finished:
            raise Interrupted(f"stopped after step {trainer.step} of {config.train.steps}; the state is in {checkpoint}")
        last = trainer.history[-1]
        self.console.print(
            f"{MODELS[config.model]}: test accuracy {last['test_accuracy']:.1f} % (standard error {last['test_standard_error']:.1f})",
            highlight=False,
            soft_wrap=True,
        )
        speed = trainer.step / max(trainer.seconds, 1e-9)
        return {"title": MODELS[config.model], "history": trainer.history, "seconds": trainer.seconds, "steps_per_second": speed}

    def _baselines(self, sets: dict[str, InrSet], stop: StopRequest) -> list[dict[str, Any]]:
        config, found = self.config.baselines, []
        pictures, _ = load_digit_pictures()
        quick = replace(config, steps=max(1, config.steps // 4))  # what sees the picture has learned it by then
        todo = [(b, config) for b in weight_baselines(self.config.classifiers[0].motion)] + [(b, quick) for b in bounds(pictures)]
        before = 0
        with ProgressLine(self.console, "train comparisons", sum(recipe.steps for _, recipe in todo)) as line:
            for baseline, recipe in todo:
                show = lambda done, _, before=before, title=baseline.title: line.update(before + done, title)  # noqa: E731
                result = run_baseline(baseline, sets, recipe, show, stop)
                before += recipe.steps
                if result is None:
                    raise Interrupted("stopped while training the comparisons; the trained model is saved")
                found.append(result)
        return found

    def _large_step(self) -> dict[str, Any]:
        """Measures one step with fused kernels and, where it fits in memory, with eager PyTorch."""
        path = self.config.picture.path(self.config.cache)
        layout = self.config.picture.siren.layout
        edges = sum(a * b for a, b in zip(layout[:-1], layout[1:]))
        measured, notes = [], []
        available, needed = process.available_memory(), edges * large_step.EAGER_BYTES_PER_EDGE + (1 << 29)
        with ProgressLine(self.console, "measure a large step", 2) as line:
            for done, backend in enumerate(("cpp", "reference")):
                line.update(done, TITLES[backend])
                if backend == "reference" and available is not None and available < needed:
                    notes.append(
                        f"The eager reference backend was not run: it may need {needed / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are free."
                    )
                    continue
                try:
                    entry = large_step.measure(path, backend, repeats=self.config.repeats)
                except large_step.MeasurementError as error:
                    notes.append(f"{TITLES[backend]} was not measured: {error}.")
                    continue
                entry["title"] = TITLES[backend]
                entry["bytes_per_edge"] = entry["peak_bytes"] / entry["edges"]
                entry["seconds_per_million_edges"] = entry["seconds"] / entry["edges"] * 1e6
                measured.append(entry)
            line.update(2)
        return {"layout": list(layout), "edges": edges, "measured": measured, "notes": notes}

    # -------------------------------------------------------------------------------------------------------- identities

    def _data_identity(self) -> dict:
        return {**self.config.digits.describe(), "split": SPLIT_SEED}

    def _training_identity(self, config: ClassifierConfig) -> dict:
        return {"data": self._data_identity(), "classifier": asdict(config), "device": self.config.device}

    def _baseline_identity(self) -> dict:
        motion = asdict(self.config.classifiers[0].motion)
        return {"data": self._data_identity(), "mlp": asdict(self.config.baselines), "motion": motion}

    def _large_identity(self) -> dict:
        return {"picture": self.config.picture.describe(), "repeats": self.config.repeats}


def make_config(
    out: Path, cache: Path, *, steps: int | None, seed: int, device: str, model: str, fresh: bool, bf16: bool, small: bool
) -> DemoConfig:
    """Returns the demo's configuration from the options of the command line; another model than NG-GNN is compared with it."""
    classifiers = []
    for name in dict.fromkeys((model, "ng-gnn")):
        count = steps or STEPS[name]
        train = TrainConfig(steps=count, seed=seed, bf16=bf16, eval_every=max(1, min(500, count // 16)))
        classifiers.append(ClassifierConfig(model=name, train=train))
    config = DemoConfig(
        out=out,
        cache=cache,
        device=device,
        fresh=fresh,
        classifiers=tuple(classifiers),
        baselines=MlpConfig(seed=seed),
    )
    return smoke(config) if small else config

"""A resumable training loop.

Everything random in a step is drawn from a generator that is seeded by (seed, step), and the global generators' states are part of the
checkpoint, so a run that was stopped and resumed gives bit for bit the result of one that was not.
"""

from __future__ import annotations

import io
import math
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.storage import DataError, read_torch, write_bytes

FORMAT = 1


@dataclass(frozen=True)
class TrainConfig:
    """AdamW with a linear warm-up and a cosine to zero."""

    steps: int = 8000
    batch: int = 64
    lr: float = 2e-3
    weight_decay: float = 1e-2
    warmup: int = 100
    clip: float = 1.0
    seed: int = 0
    bf16: bool = False
    eval_every: int = 500
    save_every_seconds: float = 30.0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "eval_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"TrainConfig: expected {name} >= 1, got {getattr(self, name)}")
        if not self.lr > 0:
            raise ValueError(f"TrainConfig: expected lr > 0, got {self.lr}")

    def lr_at(self, step: int) -> float:
        return self.lr * min(1.0, (step + 1) / max(1, self.warmup)) * 0.5 * (1 + math.cos(math.pi * step / self.steps))


@dataclass
class Progress:
    """Where a run stands, handed to `on_step`."""

    step: int
    steps: int
    loss: float
    accuracy: float
    steps_per_second: float


class Interrupted(RuntimeError):
    """Work was stopped on request after saving its state; the message says where it stands."""


class StopRequest:
    """Turns SIGINT and SIGTERM into a flag while it is entered, so that a step in hand can finish; a second signal interrupts at once."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


def step_generator(seed: int, step: int) -> torch.Generator:
    """Returns the generator of everything random in one step."""
    return torch.Generator().manual_seed(seed * 1_000_000_007 + step)


class Trainer:
    """Trains a model on `batch_loss(model, step, generator) -> (loss, accuracy)`, saving to and resuming from one checkpoint file.

    Args:
        identity: what must be equal for a checkpoint to be continued (JSON-serialisable): data, model, recipe.
        evaluate: called every `eval_every` steps and after the last; its result (plain numbers) goes into `history`.
    """

    def __init__(
        self,
        model: nn.Module,
        batch_loss: Callable[[nn.Module, int, torch.Generator], tuple[Tensor, Tensor]],
        evaluate: Callable[[nn.Module], dict[str, float]],
        config: TrainConfig,
        identity: dict[str, Any],
    ):
        self.model, self.batch_loss, self.evaluate, self.config = model, batch_loss, evaluate, config
        self.identity = {**identity, "train": {k: v for k, v in asdict(config).items() if k != "save_every_seconds"}}
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, foreach=True)
        self.step, self.seconds = 0, 0.0
        self.history: list[dict[str, float]] = []
        self.device = next(model.parameters()).device

    def run(self, checkpoint: Path, on_step: Callable[[Progress], None] | None = None, stop: StopRequest | None = None) -> bool:
        """Trains up to the last step; returns False if `stop` was requested first. The state is saved in both cases.

        Raises:
            FloatingPointError: the loss became infinite or NaN; the last saved checkpoint is from before.
            DataError: the checkpoint cannot be written.
        """
        saved, recent, mark = time.monotonic(), [], (self.step, time.monotonic())
        while self.step < self.config.steps:
            if stop is not None and stop.requested:
                self.save(checkpoint)
                return False
            begin = time.monotonic()
            recent.append(self._train_step())
            self.step += 1
            self.seconds += time.monotonic() - begin
            if self.step % 20 == 0 or self.step == self.config.steps:
                progress = self._report(recent, mark)
                recent, mark = [], (self.step, time.monotonic())
                if on_step is not None:
                    on_step(progress)
            if self.step % self.config.eval_every == 0 or self.step == self.config.steps:
                self.history.append({"step": self.step, **self.evaluate(self.model)})
                mark = (self.step, time.monotonic())
            if time.monotonic() - saved > self.config.save_every_seconds:
                self.save(checkpoint)
                saved = time.monotonic()
        self.save(checkpoint)
        return True

    def _train_step(self) -> tuple[Tensor, Tensor]:
        config = self.config
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr_at(self.step)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.bf16):
            loss, accuracy = self.batch_loss(self.model, self.step, step_generator(config.seed, self.step))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), config.clip, foreach=True)
        self.optimizer.step()
        return loss.detach(), accuracy.detach()

    def _report(self, recent: list[tuple[Tensor, Tensor]], mark: tuple[int, float]) -> Progress:
        loss, accuracy = (float(torch.stack(values).float().mean()) for values in zip(*recent))
        if not math.isfinite(loss):
            raise FloatingPointError(f"training: the loss is {loss} at step {self.step}; lower the learning rate, or train without bf16")
        elapsed = max(time.monotonic() - mark[1], 1e-9)
        return Progress(self.step, self.config.steps, loss, accuracy, (self.step - mark[0]) / elapsed)

    # ------------------------------------------------------------------------------------------------------- checkpoints

    def save(self, path: Path) -> None:
        """Writes the whole state of the run, atomically."""
        state = {
            "format": FORMAT,
            "identity": self.identity,
            "step": self.step,
            "seconds": self.seconds,
            "history": self.history,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "rng_cuda": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_bytes(path, buffer.getvalue())

    def load(self, path: Path) -> None:
        """Continues from a checkpoint.

        Raises:
            DataError: the file is corrupt, or belongs to a run with another configuration.
        """
        remedy = "start anew with --fresh"
        state = read_torch(path, remedy)
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise DataError(f"resume: {path} is not a checkpoint of this version; {remedy}")
        different = _differences(state["identity"], self.identity)
        if different:
            raise DataError(f"resume: {path} belongs to another run ({'; '.join(different)}); {remedy}, or choose another folder")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.history = state["step"], state["seconds"], state["history"]
        torch.set_rng_state(state["rng"])
        if state["rng_cuda"] and self.device.type == "cuda":
            torch.cuda.set_rng_state_all(state["rng_cuda"])


def _differences(saved: Any, wanted: Any, name: str = "") -> list[str]:
    """Lists the leaves in which two nested configurations differ."""
    if isinstance(saved, dict) and isinstance(wanted, dict):
        keys = sorted(saved.keys() | wanted.keys())
        return [line for key in keys for line in _differences(saved.get(key), wanted.get(key), f"{name}.{key}" if name else key)]
    if isinstance(saved, (list, tuple)) and isinstance(wanted, (list, tuple)):
        saved, wanted = list(saved), list(wanted)
    return [] if saved == wanted else [f"{name}: {saved} there, {wanted} now"]

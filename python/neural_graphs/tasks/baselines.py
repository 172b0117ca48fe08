"""What a neural-graph model is compared with: plain MLPs on flattened weights, and upper bounds that look at the picture itself.

All MLPs have three hidden layers of 512 and the same recipe. They are given the best of ten validation checkpoints, an advantage
the neural-graph model does not get.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..data.inr_set import InrSet
from ..data.siren import pixel_grid, siren_forward
from ..data.transforms import (
    PictureMotion,
    canonical_signs,
    flatten,
    move_picture,
    permute_hidden,
    random_orders,
    sorted_orders,
)
from .inr_classification import ShuffledBatches, score
from .training import StopRequest, step_generator


@dataclass(frozen=True)
class MlpConfig:
    """The recipe of all baselines: AdamW, warm-up over a twentieth of the steps, cosine."""

    steps: int = 2000
    batch: int = 256
    width: int = 512
    lr: float = 1e-3
    weight_decay: float = 1e-2
    dropout: float = 0.1
    seed: int = 0


@dataclass(frozen=True)
class Baseline:
    """One line of the comparison.

    Attributes:
        features: (networks, generator or None) -> [M, D]; with a generator, the training version, augmented.
        reads: "weights", or "picture" for bounds, which look at what the network draws.
        once_per_picture: train on one network of each picture (the features do not depend on the network).
    """

    name: str
    title: str
    reads: str
    features: Callable[[InrSet, torch.Generator | None], Tensor]
    once_per_picture: bool = False


def weight_baselines(motion: PictureMotion | None) -> list[Baseline]:
    """Returns the MLPs on flattened weights; all but the plain one get the neural-graph model's augmentation (`motion`)."""

    def moved(networks: InrSet, generator: torch.Generator | None) -> tuple[list[Tensor], list[Tensor]]:
        weights, biases = networks.weights, networks.biases
        if generator is not None and motion is not None and networks.layout[0] == 2:
            weights, biases = move_picture(weights, biases, motion, generator)
        return canonical_signs(weights, biases)

    def permuted(networks: InrSet, generator: torch.Generator | None) -> Tensor:
        weights, biases = moved(networks, generator)
        if generator is not None:
            weights, biases = permute_hidden(weights, biases, random_orders(biases, generator))
        return flatten(weights, biases)

    def ordered(networks: InrSet, generator: torch.Generator | None) -> Tensor:
        weights, biases = moved(networks, generator)
        return flatten(*permute_hidden(weights, biases, sorted_orders(biases)))

    return [
        Baseline("mlp-plain", "MLP on the weights", "weights", lambda networks, _: flatten(networks.weights, networks.biases)),
        Baseline("mlp-signs", "MLP, canonical signs", "weights", lambda networks, generator: flatten(*moved(networks, generator))),
        Baseline("mlp-permuted", "MLP, neurons shuffled in training", "weights", permuted),
        Baseline("mlp-sorted", "MLP, neurons sorted", "weights", ordered),
    ]


def bounds(pictures: Tensor | None) -> list[Baseline]:
    """Returns MLPs that see the picture: its pixels (if given, [images, h, w]), or what the network draws at 64 or at 4 points."""

    def drawn(side: int, reach: float) -> Callable[[InrSet, torch.Generator | None], Tensor]:
        points = pixel_grid(side, side) * reach
        return lambda networks, _: siren_forward(networks.weights, networks.biases, points.to(networks.labels.device)).flatten(1)

    found = [
        Baseline("probes-64", "MLP on 64 probe outputs", "picture", drawn(8, 1.0)),
        Baseline("probes-4", "MLP on 4 probe outputs", "picture", drawn(2, 0.5)),
    ]
    if pictures is not None:
        pixels = Baseline("pixels", "MLP on the pixels", "picture", lambda networks, _: pictures[networks.images].flatten(1), True)
        found.insert(0, pixels)
    return found


def run_baseline(
    baseline: Baseline,
    sets: Mapping[str, InrSet],
    config: MlpConfig,
    progress: Callable[[int, int], None] | None = None,
    stop: StopRequest | None = None,
) -> dict | None:
    """Trains one baseline and returns {name, title, reads, accuracy, standard_error} on the test set; None if `stop` was requested.

    The result depends on the configuration alone; the global random generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)  # initial parameters and dropout
        best = _train(baseline, sets, config, progress, stop)
    return None if best is None else {"name": baseline.name, "title": baseline.title, "reads": baseline.reads, **best}


def _train(baseline, sets, config: MlpConfig, progress, stop) -> dict[str, float] | None:
    """Returns the test score at the best validation checkpoint."""
    train = _first_of_each_picture(sets["train"]) if baseline.once_per_picture else sets["train"]
    classes = 1 + int(max(networks.labels.max() for networks in sets.values()))
    clean = baseline.features(train, None)
    mean, std = clean.mean(0), clean.std(0).clamp_min(1e-6)
    inputs = {name: (baseline.features(sets[name], None) - mean) / std for name in ("val", "test")}
    mlp = _mlp(clean.shape[1], classes, config)
    optimizer = torch.optim.AdamW(mlp.parameters(), lr=config.lr, weight_decay=config.weight_decay, foreach=True)
    batches = ShuffledBatches(len(train), config.batch, config.seed)
    best = (-1.0, {})
    for step in range(config.steps):
        if stop is not None and stop.requested:
            return None
        for group in optimizer.param_groups:
            group["lr"] = config.lr * min(1.0, (step + 1) * 20 / config.steps) * 0.5 * (1 + math.cos(math.pi * step / config.steps))
        part = train.select(batches(step))
        features = (baseline.features(part, step_generator(config.seed, step)) - mean) / std
        loss = nn.functional.cross_entropy(mlp(features), part.labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if (step + 1) % max(1, config.steps // 10) == 0:
            best = max(best, _evaluate(mlp, inputs, sets), key=lambda pair: pair[0])
            if progress is not None:
                progress(step + 1, config.steps)
    return best[1]


def _mlp(features: int, classes: int, config: MlpConfig) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(3):
        layers += [nn.Linear(features, config.width), nn.ReLU(), nn.Dropout(config.dropout)]
        features = config.width
    return nn.Sequential(*layers, nn.Linear(features, classes))


@torch.no_grad()
def _evaluate(mlp: nn.Module, inputs: Mapping[str, Tensor], sets: Mapping[str, InrSet]) -> tuple[float, dict[str, float]]:
    """Returns (validation accuracy, test score)."""
    mlp.eval()
    scores = {name: score(mlp(features).argmax(1), sets[name]) for name, features in inputs.items()}
    mlp.train()
    return scores["val"]["accuracy"], scores["test"]


def _first_of_each_picture(networks: InrSet) -> InrSet:
    order = networks.images.argsort(stable=True)
    fresh = networks.images[order].diff(prepend=networks.images.new_tensor([-1])) != 0
    return networks.select(order[fresh])

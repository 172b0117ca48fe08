"""INR classification: name the class of a picture from the weights of a network that draws it, without running that network.

Input: per network canonical signs (sin is odd), then one mean and standard deviation per layer. Training pictures are moved a little,
exactly, in weight space. The model sees weights and biases as a neural graph; no pixel and no probe.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.inr_set import InrSet
from ..data.transforms import Normalisation, PictureMotion, canonical_signs, move_picture
from .training import Progress, StopRequest, TrainConfig, Trainer

MODELS = {"ng-gnn": "NG-GNN", "ng-t": "NG-T"}
STEPS = {"ng-gnn": 8000, "ng-t": 5000}  # of a good schedule on the digits: NG-T needs fewer steps, and each takes longer


@dataclass(frozen=True)
class ClassifierConfig:
    """The model (by its command-line name) and how it is trained.

    NG-GNN: node and edge states are d_hid wide. NG-T: nodes d_hid, edges half of it, attention and the MLP of nodes twice, the
    MLP of edges once; the published one has d_hid = 64. `attention`: of NG-T, "all" pairs of neurons or "edges".
    """

    model: str = "ng-gnn"
    d_hid: int = 32
    num_layers: int = 4
    attention: str = "edges"
    fourier_features: int = 32
    fourier_sigma: float = 0.5
    pooling: str = "cat"
    augment: bool = True
    motion: PictureMotion = field(default_factory=PictureMotion)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise ValueError(f"inr-classification: expected model to be one of {', '.join(MODELS)}, got {self.model!r}")

    def describe(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "train"}


def build_model(config: ClassifierConfig, layout: tuple[int, ...], classes: int) -> nn.Module:
    """Returns the model with parameters drawn from the configuration's seed (the global generator is left as it was)."""
    from ..models import NGGNN, NGT

    d = config.d_hid
    common = {
        "layout": list(layout), "num_layers": config.num_layers, "out_features": classes, "encoder": "fourier",
        "fourier_features": config.fourier_features, "fourier_sigma": config.fourier_sigma, "norm": "layer", "pooling": config.pooling,
        "edge_memory": "recompute",
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        if config.model == "ng-gnn":
            return NGGNN(d_hid=d, **common)
        widths = {"d_node": d, "d_edge": d // 2, "d_attn_hid": 2 * d, "d_node_hid": 2 * d, "d_edge_hid": d, "d_out_hid": 2 * d}
        return NGT(attention=config.attention, **widths, **common)


class InrInputs:
    """Turns stored networks into model inputs: [motion,] canonical signs, normalisation, a trailing channel dimension."""

    def __init__(self, train: InrSet, motion: PictureMotion | None):
        self.motion = motion if train.layout[0] == 2 else None
        self.normalise = Normalisation.measure(*canonical_signs(train.weights, train.biases))

    def __call__(self, networks: InrSet, generator: torch.Generator | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """Returns weights[l] [B, d_l, d_{l+1}, 1], biases[l] [B, d_{l+1}, 1]; with a generator, pictures are moved."""
        weights, biases = networks.weights, networks.biases
        if generator is not None and self.motion is not None:
            weights, biases = move_picture(weights, biases, self.motion, generator)
        weights, biases = self.normalise(*canonical_signs(weights, biases))
        return [weight.unsqueeze(-1) for weight in weights], [bias.unsqueeze(-1) for bias in biases]


class ShuffledBatches:
    """Batch `step` of an endless sequence of shuffled epochs, computed from (seed, step) alone."""

    def __init__(self, count: int, batch: int, seed: int):
        self.count, self.batch, self.seed = count, min(batch, count), seed
        self.per_epoch = count // self.batch
        self._epoch, self._order = -1, torch.empty(0)

    def __call__(self, step: int) -> Tensor:
        """Returns the positions of the batch's members, [batch] int64."""
        epoch, place = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._order = torch.randperm(self.count, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + epoch))
            self._epoch = epoch
        return self._order[place * self.batch : (place + 1) * self.batch]


@torch.no_grad()
def predict(model: nn.Module, inputs: InrInputs, networks: InrSet, batch: int = 256, bf16: bool = False) -> Tensor:
    """Returns the predicted class of every network, [M] int64."""
    model.eval()
    device = next(model.parameters()).device
    found = []
    for start in range(0, len(networks), batch):
        part = networks.select(slice(start, start + batch)).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            found.append(model(*inputs(part)).argmax(1).cpu())
    return torch.cat(found)


def score(predicted: Tensor, networks: InrSet) -> dict[str, float]:
    """Returns accuracy and its standard error, both in percent; the error counts pictures, not networks, as independent."""
    correct = (predicted == networks.labels.cpu()).double()
    images, position = networks.images.cpu().unique(return_inverse=True)
    sums = torch.zeros(len(images), dtype=torch.float64).index_add_(0, position, correct)
    counts = torch.zeros(len(images), dtype=torch.float64).index_add_(0, position, torch.ones_like(correct))
    residual = sums - counts * correct.mean()
    error = residual.square().sum().sqrt() / len(correct)
    return {"accuracy": 100 * float(correct.mean()), "standard_error": 100 * float(error)}


def make_trainer(sets: Mapping[str, InrSet], config: ClassifierConfig, data: dict[str, Any], device: str = "cpu") -> Trainer:
    """Returns a trainer of the classifier; `data` describes where the networks come from, for the checkpoint."""
    train = sets["train"].to(device)
    classes = 1 + int(max(networks.labels.max() for networks in sets.values()))
    inputs = InrInputs(train, config.motion if config.augment else None)
    batches = ShuffledBatches(len(train), config.train.batch, config.train.seed)
    model = build_model(config, train.layout, classes).to(device)

    def batch_loss(model: nn.Module, step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        part = train.select(batches(step).to(device))
        logits = model(*inputs(part, generator)).float()
        return nn.functional.cross_entropy(logits, part.labels), (logits.argmax(1) == part.labels).float().mean()

    def evaluate(model: nn.Module) -> dict[str, float]:
        scores = {name: score(predict(model, inputs, sets[name], bf16=config.train.bf16), sets[name]) for name in ("val", "test")}
        return {f"{name}_{key}": value for name, result in scores.items() for key, value in result.items()}

    return Trainer(model, batch_loss, evaluate, config.train, {"data": data, "model": config.describe()})


def train_classifier(
    sets: Mapping[str, InrSet],
    config: ClassifierConfig,
    data: dict[str, Any],
    checkpoint: Path,
    device: str = "cpu",
    resume: bool = True,
    on_step: Callable[[Progress], None] | None = None,
    stop: StopRequest | None = None,
) -> tuple[Trainer, bool]:
    """Trains, or continues, a classifier; returns (trainer, whether the last step was reached).

    Raises:
        DataError: `resume` is on and the checkpoint is corrupt or of another run; or it cannot be written.
    """
    trainer = make_trainer(sets, config, data, device)
    if resume and checkpoint.exists():
        trainer.load(checkpoint)
    return trainer, trainer.run(checkpoint, on_step, stop)

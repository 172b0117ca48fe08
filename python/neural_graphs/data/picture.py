"""The large network: a SIREN fitted to a real photograph that comes with scikit-learn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from .inr_set import InrSet, pack, unpack
from .siren import SirenConfig, fit_sirens, pixel_grid, psnr
from .sources import sklearn_datasets
from .storage import DataError, config_hash, read_tensors, write_tensors

Progress = Callable[[int, int], None]
FORMAT = 1  # raised when the same configuration would give another network


@dataclass(frozen=True)
class PictureConfig:
    """The large network: a [2, 512, 1024, 3] SIREN fitted to a photograph, 96 x 64 pixels."""

    name: str = "china.jpg"
    height: int = 64
    width: int = 96
    seed: int = 0
    siren: SirenConfig = field(
        default_factory=lambda: SirenConfig(
            layout=(2, 512, 1024, 3), steps=100, lr=1e-3, decay=0.0, first_bound=None, bias_bound=None, points_per_step=2048
        )
    )

    def describe(self) -> dict:
        return {"data": "picture", "format": FORMAT, **asdict(self)}

    def path(self, cache: Path | str) -> Path:
        layout = "x".join(map(str, self.siren.layout))
        return Path(cache) / f"{Path(self.name).stem}-{layout}-{config_hash(self.describe())}.safetensors"


def load_picture(config: PictureConfig) -> Tensor:
    """Returns the photograph, scaled: [height, width, 3] in [0, 1]."""
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError("load_picture: needs Pillow; pip install pillow") from error
    picture = Image.fromarray(sklearn_datasets().load_sample_image(config.name))
    picture = picture.resize((config.width, config.height), Image.Resampling.LANCZOS)
    flat = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return flat.reshape(config.height, config.width, 3).float() / 255


def picture_inr(config: PictureConfig, cache: Path | str, progress: Progress | None = None) -> InrSet:
    """Returns the large network (a set of one), fitting it if the cache lacks it. Raises DataError as `digit_inrs` does."""
    path = config.path(cache)
    if not path.exists():
        target = load_picture(config).reshape(1, -1, 3)
        points = pixel_grid(config.height, config.width)
        weights, biases, error = fit_sirens(target, points, config.siren, torch.Generator().manual_seed(config.seed), progress=progress)
        write_tensors(path, pack(InrSet(tuple(weights), tuple(biases), torch.tensor([0]), torch.tensor([0]), psnr(error))))
    tensors, _ = read_tensors(path, "delete it and run again")
    return unpack(tensors, str(path))

"""Networks fitted to real pictures that need no download: scikit-learn's 1,797 digits, 8 x 8 pixels.

Fitting is cached in a folder named after a hash of the configuration, one file per chunk of networks. A chunk is written when it is
finished, atomically; an interrupted run continues with the first missing chunk and gives the same networks as an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from .inr_set import InrSet, concat, pack, split_by_image, unpack
from .siren import SirenConfig, fit_sirens, pixel_grid, psnr
from .sources import available_cores, sklearn_datasets
from .storage import DataError, config_hash, read_tensors, write_json, write_tensors

Progress = Callable[[int, int], None]
NUM_DIGITS = 1797
SPLIT_SIZES = {"train": 1257, "val": 180, "test": 360}
SPLIT_SEED = 1  # split 0 was used to choose how the networks are fitted; figures are reported on another one
FORMAT = 1  # raised when the same configuration would give other networks or another file layout


@dataclass(frozen=True)
class DigitConfig:
    """Which digit networks to fit: `images` pictures, `per_image` networks each.

    `shared_init=True` starts all networks from one random initialisation. That takes the point out of the task (a plain MLP on the
    flattened weights then reads them, 64 % instead of 24 %) and is here only to show it.
    """

    images: int = NUM_DIGITS
    per_image: int = 16
    seed: int = 0
    shared_init: bool = False
    chunk: int = 256
    siren: SirenConfig = field(default_factory=SirenConfig)

    def __post_init__(self) -> None:
        if not 1 <= self.images <= NUM_DIGITS:
            raise ValueError(f"DigitConfig: expected images in 1..{NUM_DIGITS}, got {self.images}")
        if self.per_image < 1 or self.chunk < 1:
            raise ValueError(f"DigitConfig: expected per_image and chunk >= 1, got {self.per_image} and {self.chunk}")

    @property
    def total(self) -> int:
        return self.images * self.per_image

    def describe(self) -> dict:
        return {"data": "digits", "format": FORMAT, **asdict(self)}

    def folder(self, cache: Path | str) -> Path:
        layout = "x".join(map(str, self.siren.layout))
        return Path(cache) / f"digits-{layout}-{config_hash(self.describe())}"


def load_digit_pictures() -> tuple[Tensor, Tensor]:
    """Returns (pictures [1797, 8, 8] in [0, 1], labels [1797] int64)."""
    digits = sklearn_datasets().load_digits()
    return torch.tensor(digits.images / 16.0, dtype=torch.float32), torch.tensor(digits.target, dtype=torch.int64)


def digit_inrs(config: DigitConfig, cache: Path | str, workers: int | None = None, progress: Progress | None = None) -> InrSet:
    """Returns the networks of `config`, fitting those chunks that the cache lacks.

    Args:
        cache: folder that holds one folder per configuration.
        workers: chunks fitted at the same time, each on one core; default all cores this process may use.
        progress: called with (networks ready, networks in all) after every chunk.

    Raises:
        DataError: a cached file is corrupt, or cannot be written; what was finished stays.
        KeyboardInterrupt: passed on; a later call continues.
    """
    folder = config.folder(cache)
    starts = range(0, config.total, config.chunk)
    paths = [folder / f"chunk_{index:05d}.safetensors" for index in range(len(starts))]
    missing = [index for index, path in enumerate(paths) if not path.exists()]
    done = config.total - sum(min(config.chunk, config.total - starts[index]) for index in missing)
    if progress is not None:
        progress(done, config.total)
    if missing:
        write_json(folder / "config.json", config.describe())
        pictures, labels = load_digit_pictures()
        _fit_chunks(config, paths, missing, pictures, labels, workers, progress)
    return concat([_read_chunk(path, config) for path in paths])


def digit_splits(networks: InrSet, seed: int = SPLIT_SEED) -> dict[str, InrSet]:
    """Returns {"train", "val", "test"}: 1,257 / 180 / 360 pictures with all their networks (in proportion if there are fewer)."""
    splits = split_by_image(networks.images, SPLIT_SIZES, seed)
    return {name: networks.select(index) for name, index in splits.items()}


def _fit_chunks(config, paths, missing, pictures, labels, workers, progress) -> None:
    """Fits and writes the missing chunks on several threads; a thread runs single-threaded torch (no barriers to wait at)."""
    threads_before = torch.get_num_threads()
    executor = ThreadPoolExecutor(workers or available_cores(), initializer=torch.set_num_threads, initargs=(1,))
    try:
        pending = {executor.submit(_fit_chunk, config, index, paths[index], pictures, labels) for index in missing}
        done = config.total - sum(min(config.chunk, config.total - index * config.chunk) for index in missing)
        while pending:
            finished, pending = wait(pending, return_when=FIRST_COMPLETED)
            done += sum(future.result() for future in finished)
            if progress is not None:
                progress(done, config.total)
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(threads_before)


def _fit_chunk(config: DigitConfig, index: int, path: Path, pictures: Tensor, labels: Tensor) -> int:
    """Fits networks index*chunk ... and writes them; returns how many."""
    start = index * config.chunk
    images = torch.arange(start, min(start + config.chunk, config.total)) // config.per_image
    height, width = pictures.shape[1:]
    stream = config.seed if config.shared_init else config.seed * 1_000_003 + index + 1
    weights, biases, error = fit_sirens(
        pictures[images].reshape(len(images), height * width, 1),
        pixel_grid(height, width),
        config.siren,
        torch.Generator().manual_seed(stream),
        shared_init=config.shared_init,
    )
    networks = InrSet(tuple(weights), tuple(biases), labels[images], images, psnr(error))
    write_tensors(path, pack(networks), {"config": config_hash(config.describe()), "chunk": str(index)})
    return len(images)


def _read_chunk(path: Path, config: DigitConfig) -> InrSet:
    remedy = "delete it and run again: only this chunk is fitted anew"
    tensors, metadata = read_tensors(path, remedy)
    networks = unpack(tensors, str(path))
    if metadata.get("config") != config_hash(config.describe()) or networks.layout != tuple(config.siren.layout):
        raise DataError(f"digit_inrs: {path} belongs to another configuration; {remedy}")
    return networks

"""The public file layouts of INR data sets: reading and writing them.

One file per network, a state_dict with weights [out, in] and biases in layer order (`seq.{0,1,2}.{weight,bias}` in MNIST-INR), as `.pth`
or `.safetensors`. What the label and the split are depends on the collection:

| collection | path | label | split |
|---|---|---|---|
| MNIST-INR | `mnist-inrs/mnist_png_{training,testing}_<label>_<image>/<run>/<file>` | folder name | splits JSON |
| FMNIST-INR | `fmnist_inrs/{train,test}/model_<image>.pth` | key `label` in the file | splits JSON |
| NFN | `<anything>_<label>s/net<index>.pth` | folder name | by index: 45/60, 5/60, 10/60 |

A splits JSON is `{"train" | "val" | "test": {"path": [...], "label": [...]}}` with paths relative to the data root.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .inr_set import InrSet
from .storage import DataError, read_json, read_tensors, read_torch, write_bytes, write_json

Progress = Callable[[int, int], None]
_MNIST_FOLDER = re.compile(r"(train|test)\w*_(\d+)_(\d+)$")
_NFN_FOLDER = re.compile(r"_(\d+)s$")
_NUMBER = re.compile(r"(\d+)$")


def read_network(path: Path | str) -> tuple[list[Tensor], list[Tensor], int | None]:
    """Returns (weights [d_l, d_{l+1}], biases [d_{l+1}], label or None) of one network file, `.pth` or `.safetensors`.

    Tensors whose name contains "weight" or "bias" are taken in file order (by layer number where names carry one).

    Raises:
        DataError: the file is corrupt, or is not a stack of linear layers.
    """
    path = Path(path)
    content = read_tensors(path)[0] if path.suffix == ".safetensors" else read_torch(path)
    if not isinstance(content, Mapping):
        raise DataError(f"read_network: expected {path} to hold a state_dict, got {type(content).__name__}")
    label = content.get("label")
    items = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if path.suffix == ".safetensors":  # these files keep no order: sort by the numbers in the names
        items = dict(sorted(items.items(), key=lambda item: [int(part) for part in re.findall(r"\d+", item[0])]))
    weights = [value.float().t() for name, value in items.items() if "weight" in name and value.dim() == 2]
    biases = [value.float() for name, value in items.items() if "bias" in name and value.dim() == 1]
    widths = [weight.shape[1] for weight in weights]
    if not weights or widths != [len(bias) for bias in biases] or widths[:-1] != [weight.shape[0] for weight in weights[1:]]:
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in items.items())
        raise DataError(f"read_network: expected {path} to be a stack of linear layers with biases, got {shapes or 'no tensors'}")
    return weights, biases, None if label is None else int(label)


def label_and_image(path: Path | str) -> tuple[int | None, int | None]:
    """Returns (label, picture number) as far as the path of a network tells them, None otherwise."""
    path = Path(path)
    for folder in path.parts[-3:-1]:
        if found := _MNIST_FOLDER.search(folder):
            offset = 0 if found[1] == "train" else 1_000_000  # picture numbers start anew in the test set
            return int(found[2]), int(found[3]) + offset
    number = _NUMBER.search(path.stem)
    image = int(number[1]) if number else None
    nfn = _NFN_FOLDER.search(path.parent.name)
    if nfn:
        return int(nfn[1]), image
    if path.parent.name == "test" and image is not None:
        image += 1_000_000
    return None, image


def read_networks(paths: Sequence[Path], labels: Sequence[int] | None = None, progress: Progress | None = None) -> InrSet:
    """Returns the networks of many files of equal layout as one packed set.

    Args:
        labels: one per path; None takes them from the files or their paths.

    Raises:
        DataError: a file is corrupt, has no label, or has another layout than the first one.
    """
    if not paths:
        raise DataError("read_networks: expected at least one network file, got none")
    rows, found_labels, images = [], [], []
    for position, path in enumerate(paths):
        weights, biases, own_label = read_network(path)
        path_label, image = label_and_image(path)
        label = labels[position] if labels is not None else own_label if own_label is not None else path_label
        if label is None:
            raise DataError(f"read_networks: no label for {path}; neither the file nor its path has one, give a splits JSON with labels")
        shapes = [tuple(weight.shape) for weight in weights]
        if rows and shapes != [tuple(weight.shape) for weight in rows[0][0]]:
            raise DataError(f"read_networks: expected all networks to have the layout of {paths[0]}, {path} has weights {shapes}")
        rows.append((weights, biases))
        found_labels.append(int(label))
        images.append(position if image is None else image)
        if progress is not None and (position + 1) % 256 == 0:
            progress(position + 1, len(paths))
    return InrSet(
        tuple(torch.stack(layer) for layer in zip(*(weights for weights, _ in rows))),
        tuple(torch.stack(layer) for layer in zip(*(biases for _, biases in rows))),
        torch.tensor(found_labels),
        torch.tensor(images),
        torch.full((len(rows),), float("nan")),
    )


def read_splits(splits: Path | str, root: Path | str | None = None, progress: Progress | None = None) -> dict[str, InrSet]:
    """Returns the sets of a splits JSON; paths in it are relative to `root` (default: the JSON's folder)."""
    splits = Path(splits)
    root = splits.parent if root is None else Path(root)
    content = read_json(splits)
    sets = {}
    for name in ("train", "val", "test"):
        part = content.get(name) if isinstance(content, dict) else None
        if not isinstance(part, dict) or len(part.get("path", [])) != len(part.get("label", [None])):
            raise DataError(f'read_splits: expected {splits} to have "{name}": {{"path": [...], "label": [...]}} of equal lengths')
        sets[name] = read_networks([root / path for path in part["path"]], [int(label) for label in part["label"]], progress)
    return sets


def read_nfn(root: Path | str, progress: Progress | None = None) -> dict[str, InrSet]:
    """Returns the sets of an NFN folder (`<label>s/net<index>.pth`), split by index: the first 45/60 train, 5/60 validate, 10/60 test."""
    root = Path(root)
    indexed = {}
    for path in root.glob("*/net*.pth"):
        number = _NUMBER.search(path.stem)
        if number and _NFN_FOLDER.search(path.parent.name):
            indexed[int(number[1])] = path
    if not indexed or sorted(indexed) != list(range(len(indexed))):
        raise DataError(
            f"read_nfn: expected {root} to hold *_<label>s/net<index>.pth with indices 0, 1, ... without gaps, got {len(indexed)} files"
        )
    paths = [indexed[index] for index in range(len(indexed))]
    first, second = len(paths) * 45 // 60, len(paths) * 50 // 60
    parts = {"train": paths[:first], "val": paths[first:second], "test": paths[second:]}
    return {name: read_networks(part, None, progress) for name, part in parts.items()}


def read_collection(root: Path | str, splits: Path | str | None = None, progress: Progress | None = None) -> dict[str, InrSet]:
    """Returns {"train", "val", "test"} of a folder in one of the public layouts: a splits JSON in it (or given), else NFN's."""
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"read_collection: {root} is not a folder; give the folder that holds the networks")
    candidates = [Path(splits)] if splits is not None else sorted(root.glob("*splits*.json"))
    if len(candidates) > 1:
        raise DataError(f"read_collection: {root} has several splits files ({', '.join(path.name for path in candidates)}); name one")
    if candidates:
        return read_splits(candidates[0], root, progress)
    return read_nfn(root, progress)


def export_mnist_layout(sets: Mapping[str, InrSet], root: Path | str, suffix: str = ".pth", progress: Progress | None = None) -> Path:
    """Writes sets in the MNIST-INR layout, one file per network, and returns the path of the splits JSON.

    Files: `<root>/mnist-inrs/mnist_png_{training|testing}_<label>_<image>/<run>/model_final<suffix>`, `<root>/mnist_splits.json`.
    The splits file is written last: an interrupted export has none.
    """
    if suffix not in (".pth", ".safetensors"):
        raise ValueError(f'export_mnist_layout: expected suffix ".pth" or ".safetensors", got "{suffix}"')
    root, splits, runs = Path(root), {}, Counter()
    total, done = sum(map(len, sets.values())), 0
    for name, networks in sets.items():
        paths, kind = [], "testing" if name == "test" else "training"
        for row in range(len(networks)):
            label, image = int(networks.labels[row]), int(networks.images[row])
            folder = f"mnist_png_{kind}_{label}_{image}"
            path = Path("mnist-inrs") / folder / f"run_{runs[folder]}" / f"model_final{suffix}"
            runs[folder] += 1
            write_bytes(root / path, _network_bytes(networks, row, suffix))
            paths.append(path.as_posix())
            done += 1
            if progress is not None and done % 256 == 0:
                progress(done, total)
        splits[name] = {"path": paths, "label": networks.labels.tolist()}
    write_json(root / "mnist_splits.json", splits)
    return root / "mnist_splits.json"


def _network_bytes(networks: InrSet, row: int, suffix: str) -> bytes:
    tensors = {}
    for layer, (weight, bias) in enumerate(zip(networks.weights, networks.biases)):
        tensors[f"seq.{layer}.weight"] = weight[row].t().contiguous().clone()
        tensors[f"seq.{layer}.bias"] = bias[row].clone()
    if suffix == ".safetensors":
        from safetensors.torch import save

        return save(tensors)
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getvalue()

"""From a demo's results to the files a reader opens: plots, one HTML page, a short Markdown file."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..data import DigitConfig, InrSet, PictureConfig, load_digit_pictures, load_picture, pixel_grid, siren_forward
from ..data.sources import available_cores
from ..data.storage import write_bytes
from . import page, plots


def machine(device: str) -> str:
    """Returns one line that says where the figures were measured."""
    from ngkernels import backends

    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    if device != "cpu":
        processor = torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{processor}, {available_cores()} cores, {threads} threads, torch {torch.__version__}, kernels: {backends.isa()}"


def describe_data(config: DigitConfig, networks: InrSet, sets: Mapping[str, InrSet]) -> dict[str, Any]:
    """Returns what the report says about the fitted networks."""
    return {
        "networks": len(networks),
        "layout": list(networks.layout),
        "pictures": config.images,
        "psnr_median": float(networks.psnr.median()),
        "psnr_low": float(networks.psnr.quantile(0.05)),
        "split": {name: len(part.images.unique()) for name, part in sets.items()},
        "shared_init": config.shared_init,
    }


def figures(results: Mapping[str, Any], test: InrSet, picture: PictureConfig, network: InrSet) -> dict[str, bytes]:
    """Returns the PNGs by name; `network` is the large one that draws `picture`."""
    title = "Naming a digit from the weights of its network"
    drawn = {
        "accuracy": plots.accuracy_curve(results["trained"], results["baselines"], title),
        "reconstructions": _digits(test),
        "picture": _picture(picture, network),
    }
    if results["large"]["measured"]:
        drawn["cost"] = plots.step_cost(results["large"]["measured"])
    return drawn


def write(out: Path, results: Mapping[str, Any], pngs: Mapping[str, bytes]) -> None:
    """Writes OUT/plots/*.png, OUT/report.html and OUT/report.md, each atomically."""
    names = {name: f"plots/{name}.png" for name in pngs}
    for name, png in pngs.items():
        write_bytes(out / names[name], png)
    write_bytes(out / "report.html", page.page(results, pngs).encode())
    write_bytes(out / "report.md", page.markdown(results, names).encode())


def _digits(test: InrSet) -> bytes:
    chosen = []
    for label in test.labels.unique().tolist():  # the network of median quality of each class
        members = (test.labels == label).nonzero().flatten()
        chosen.append(int(members[test.psnr[members].argsort()[len(members) // 2]]))
    shown = test.select(torch.tensor(chosen))
    drawn = siren_forward(shown.weights, shown.biases, pixel_grid(8, 8)).reshape(-1, 8, 8)
    fine = siren_forward(shown.weights, shown.biases, pixel_grid(64, 64)).reshape(-1, 64, 64)
    pictures = load_digit_pictures()[0][shown.images]
    return plots.reconstructions(pictures, drawn, fine, shown.labels.tolist(), shown.psnr.tolist())


def _picture(config: PictureConfig, network: InrSet) -> bytes:
    drawn = siren_forward(network.weights, network.biases, pixel_grid(config.height, config.width))
    drawn = drawn.reshape(config.height, config.width, 3)
    return plots.picture_comparison(load_picture(config), drawn, float(network.psnr[0]), network.layout)

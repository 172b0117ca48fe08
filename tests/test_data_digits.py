"""Fitted sets: cached, resumable chunk by chunk, split by picture."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from neural_graphs.data import (
    DataError,
    DigitConfig,
    PictureConfig,
    SirenConfig,
    concat,
    digit_inrs,
    digit_splits,
    load_picture,
    picture_inr,
    pixel_grid,
    psnr,
    siren_forward,
    split_by_image,
)
from neural_graphs.data import digits as module

SMALL = DigitConfig(images=20, per_image=3, chunk=16, siren=SirenConfig(steps=5))


def chunks(cache):
    return sorted(SMALL.folder(cache).glob("chunk_*.safetensors"))


def equal(a, b):
    return all(
        torch.equal(x, y)
        for x, y in zip([*a.weights, *a.biases, a.labels, a.images, a.psnr], [*b.weights, *b.biases, b.labels, b.images, b.psnr])
    )


def test_order_labels_and_quality(tmp_path):
    networks = digit_inrs(SMALL, tmp_path)
    pictures, labels = module.load_digit_pictures()
    assert len(networks) == 60 and networks.layout == (2, 8, 8, 1) and networks.num_edges == 88
    assert torch.equal(networks.images, torch.arange(20).repeat_interleave(3))
    assert torch.equal(networks.labels, labels[networks.images])
    drawn = siren_forward(networks.weights, networks.biases, pixel_grid(8, 8))
    error = (drawn - pictures[networks.images].reshape(60, 64, 1)).square().mean((1, 2))
    torch.testing.assert_close(psnr(error), networks.psnr)
    assert [len(chunk) for chunk in networks.weights[0].split(16)] == [16, 16, 16, 12] and len(chunks(tmp_path)) == 4


def test_cached_resumed_and_parallel_runs_give_the_same_networks(tmp_path, monkeypatch):
    networks = digit_inrs(SMALL, tmp_path, workers=2)
    assert equal(networks, digit_inrs(SMALL, tmp_path / "other", workers=1))
    os.unlink(chunks(tmp_path)[1])
    fitted, original = [], module._fit_chunk
    monkeypatch.setattr(module, "_fit_chunk", lambda config, index, *rest: fitted.append(index) or original(config, index, *rest))
    calls = []
    assert equal(networks, digit_inrs(SMALL, tmp_path, progress=lambda done, total: calls.append((done, total))))
    assert fitted == [1] and calls == [(44, 60), (60, 60)]


def test_another_configuration_has_another_folder(tmp_path):
    assert SMALL.folder(tmp_path) != DigitConfig(images=20, per_image=3, chunk=16, seed=1, siren=SirenConfig(steps=5)).folder(tmp_path)
    shared = DigitConfig(images=20, per_image=3, chunk=16, siren=SirenConfig(steps=1, lr=1e-9, decay=0), shared_init=True)
    networks = digit_inrs(shared, tmp_path)
    torch.testing.assert_close(networks.weights[1], networks.weights[1][:1].expand(60, -1, -1), atol=1e-6, rtol=0)


def test_a_corrupt_chunk_is_named_with_a_remedy(tmp_path):
    digit_inrs(SMALL, tmp_path)
    broken = chunks(tmp_path)[2]
    broken.write_bytes(broken.read_bytes()[:-10])
    with pytest.raises(DataError, match=f"{broken.name} is corrupt or truncated .*delete it and run again: only this chunk"):
        digit_inrs(SMALL, tmp_path)
    chunks(tmp_path)[0].replace(broken)
    other = DigitConfig(images=20, per_image=3, chunk=16, seed=9, siren=SirenConfig(steps=5))
    digit_inrs(other, tmp_path)
    os.replace(other.folder(tmp_path) / "chunk_00000.safetensors", chunks(tmp_path)[0].parent / "chunk_00000.safetensors")
    with pytest.raises(DataError, match="chunk_00000.safetensors belongs to another configuration"):
        digit_inrs(SMALL, tmp_path)


def test_a_full_disk_keeps_what_is_finished(tmp_path, monkeypatch):
    written, original = [], module.write_tensors

    def sometimes(path, *rest):
        if len(written) == 2:
            raise DataError(f"write: the disk is full, {path} was not written")
        written.append(path)
        original(path, *rest)

    monkeypatch.setattr(module, "write_tensors", sometimes)
    threads = torch.get_num_threads()
    with pytest.raises(DataError, match="the disk is full"):
        digit_inrs(SMALL, tmp_path, workers=1)
    assert len(chunks(tmp_path)) == 2 and torch.get_num_threads() == threads


def test_ctrl_c_leaves_a_state_that_continues(tmp_path):
    code = (
        "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"  # processes in the background begin without it
        "from neural_graphs.data import *\n"
        f"digit_inrs(DigitConfig(images=200, per_image=3, chunk=8, siren=SirenConfig(steps=30)), {str(tmp_path)!r}, workers=1)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.rglob("chunk_*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert b"KeyboardInterrupt" in process.communicate(timeout=60)[1]
    found = list(tmp_path.rglob("chunk_*"))
    assert 2 <= len(found) < 75 and not list(tmp_path.rglob("*.tmp"))
    networks = digit_inrs(DigitConfig(images=200, per_image=3, chunk=8, siren=SirenConfig(steps=30)), tmp_path)
    assert len(networks) == 600


def test_splits_keep_the_networks_of_a_picture_together(tmp_path):
    networks = digit_inrs(SMALL, tmp_path)
    splits = digit_splits(networks)
    images = {name: set(part.images.tolist()) for name, part in splits.items()}
    assert {name: len(found) for name, found in images.items()} == {"train": 13, "val": 2, "test": 4}
    assert not (images["train"] & images["val"] or images["train"] & images["test"] or images["val"] & images["test"])
    assert all(len(part) == 3 * len(images[name]) for name, part in splits.items())
    everything = split_by_image(torch.arange(1797), module.SPLIT_SIZES)
    assert [len(part) for part in everything.values()] == [1257, 180, 360]
    assert torch.equal(torch.cat(list(everything.values())).sort().values, torch.arange(1797))


def test_the_large_picture(tmp_path):
    config = PictureConfig(
        height=12, width=16, siren=SirenConfig(layout=(2, 32, 32, 3), steps=30, lr=3e-3, decay=0, first_bound=None, points_per_step=64)
    )
    network = picture_inr(config, tmp_path)
    assert equal(network, picture_inr(config, tmp_path))
    picture = load_picture(config)
    assert picture.shape == (12, 16, 3) and 0 <= picture.min() < picture.max() <= 1
    drawn = siren_forward(network.weights, network.biases, pixel_grid(12, 16)).reshape(12, 16, 3)
    assert float(-10 * (drawn - picture).square().mean().log10()) == pytest.approx(float(network.psnr), abs=1e-3)
    assert float(network.psnr) > 12


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="expected images in 1..1797, got 0"):
        DigitConfig(images=0)
    with pytest.raises(ValueError, match="expected per_image and chunk >= 1, got 0 and 256"):
        DigitConfig(per_image=0)
    with pytest.raises(ValueError, match="expected at least 3 pictures, got 2"):
        split_by_image(torch.tensor([0, 0, 1]), module.SPLIT_SIZES)
    one = digit_inrs(DigitConfig(images=1, per_image=1, siren=SirenConfig(steps=1)), tmp_path)
    two = digit_inrs(DigitConfig(images=1, per_image=1, siren=SirenConfig(layout=(2, 4, 1), steps=1)), tmp_path)
    with pytest.raises(ValueError, match=r"expected equal layouts, got \[\[2, 4, 1\], \[2, 8, 8, 1\]\]"):
        concat([one, two])
    with pytest.raises(ValueError, match="expected at least one set"):
        concat([])

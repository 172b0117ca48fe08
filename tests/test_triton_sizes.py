"""Sizes of tiles: the table, files of measured ones, and the program that measures them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import ngkernels as ngk
from ngkernels import backends, tune
from ngkernels._triton import sizes
from ngkernels._triton.lower import lower
from ngkernels.program import build_message

GPU = torch.device("cuda", 0)
NARROW = sizes.Kind(32, False, False)


def lowered(width: int):
    graph, x = ngk.NeuralGraph.mlp([2, 3]), torch.zeros(5, width)
    edges = ngk.EdgeState(graph, [torch.zeros(1, 2, 3, 1)], ngk.encoders.Linear(torch.zeros(width, 1), torch.zeros(width)))
    square = torch.zeros(width, width)
    e = build_message(edges, ngk.Message.gate(x, square, None, square, square), ("sum",), True)
    return lower(e.program, [t.shape[1] for t in e.xs])


@pytest.fixture
def on_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setenv("NGKERNELS_TILES", str(tmp_path / "tiles.json"))
    return tmp_path / "tiles.json"


@pytest.mark.parametrize(("width", "precision", "kind", "size"), [
    (17, "bf16", NARROW, (16, 2)), (32, "ieee", sizes.Kind(32, True, False), (16, 2)), (33, "tf32", sizes.Kind(64, False, False), (16, 4)),
    (64, "ieee", sizes.Kind(64, True, False), (16, 8)), (65, "bf16", sizes.Kind(128, False, False), (16, 8)), (300, "float64", sizes.Kind(1 << 30, True, False), (16, 8)),
])  # fmt: skip
def test_without_a_file_the_table_is_used(on_a_gpu, width, precision, kind, size):
    assert sizes.kind_of(lowered(width), precision) == kind and sizes.size_for(lowered(width), precision, GPU) == size


def test_measured_sizes_of_this_architecture_come_first(on_a_gpu):
    sizes.write(on_a_gpu, (8, 0), {NARROW: sizes.Size(128, 16)})
    sizes.write(on_a_gpu, (9, 0), {NARROW: sizes.Size(64, 4)})
    sizes.write(on_a_gpu, (9, 0), {NARROW: sizes.Size(32, 4)})
    assert sizes.size_for(lowered(8), "bf16", GPU) == (32, 4) and sizes.size_for(lowered(40), "bf16", GPU) == (16, 4)
    assert sizes.measured(on_a_gpu)[8, 0] == {NARROW: (128, 16)}
    with sizes.forced(sizes.Size(64, 8)):
        assert sizes.size_for(lowered(8), "bf16", GPU) == (64, 8)


@pytest.mark.parametrize("text", ["{", '[{"width": 32}]', json.dumps([dict(zip(sizes.FIELDS, ([9, 0], 32, False, False, 17, 4)))])], ids=["json", "fields", "edges"])
def test_a_broken_file_is_named(on_a_gpu, text: str):
    on_a_gpu.write_text(text)
    sizes.measured.cache_clear()
    with pytest.raises(ValueError, match=r"expected records of capability, width, .* in .*tiles.json, got .*; write it with python -m ngkernels.tune"):
        sizes.size_for(lowered(8), "bf16", GPU)


def test_the_file_lies_in_the_cache_folder_unless_named(monkeypatch):
    monkeypatch.delenv("NGKERNELS_TILES", raising=False)
    assert backends.tiles_path().parts[-3:] == (".cache", "ngkernels", "tiles.json")


@pytest.mark.parametrize("paired", [False, True], ids=["messages", "attention"])
def test_what_is_measured_is_a_training_step(paired: bool, monkeypatch):
    made, mlp = [], ngk.NeuralGraph.mlp
    monkeypatch.setattr(ngk.NeuralGraph, "mlp", staticmethod(lambda layers: made.append(layers) or mlp([n // 64 for n in layers])))
    with ngk.use_backend("reference"):
        tune.step_of(16, paired, torch.device("cpu"))()
    assert made


def test_the_quickest_size_is_kept():
    assert tune.best(["a", "b", "c", "d"], {"a": 2.0, "b": 1.0, "c": 1.0, "d": float("inf")}.get) == "b"


def test_without_a_gpu_it_says_so():
    if backends.why_not("triton", torch.device("cuda")) is None:
        pytest.skip("there is a GPU")
    done = subprocess.run([sys.executable, "-m", "ngkernels.tune"], capture_output=True, text=True)
    assert done.returncode == 2 and "the Triton kernels do not run on a GPU here: " in done.stderr

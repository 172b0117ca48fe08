"""The command line: help that teaches, errors in one sentence, Ctrl-C that resumes, the demo in miniature."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from neural_graphs.data import DigitConfig, SirenConfig, digit_inrs, digit_splits, export_mnist_layout

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
NGK = [sys.executable, "-m", "neural_graphs.cli"]


def ngk(*arguments, cwd=None):
    return subprocess.run([*NGK, *map(str, arguments)], capture_output=True, text=True, env=ENVIRONMENT, cwd=cwd, timeout=300)


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    root = tmp_path_factory.mktemp("collection")
    networks = digit_inrs(DigitConfig(images=30, per_image=2, siren=SirenConfig(steps=10)), root / "cache")
    export_mnist_layout(digit_splits(networks), root)
    return root


def test_help_teaches():
    text = ngk("--help").stdout
    assert all(word in text for word in ("demo", "fit-inrs", "train", "real pictures"))
    text = ngk("demo", "--help").stdout
    assert all(word in text for word in ("--out", "--steps", "--smoke", "--model", "--device", "--seed", "--resume", "--fresh", "report.html"))
    assert "inr-classification" in ngk("train", "--help").stdout


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["fit-inrs", "--layout", "2,x,1"], 'error: --layout: expected widths like "2,8,8,1", got "2,x,1"'),
        (["fit-inrs", "--layout", "3,8,1"], "error: --layout: expected widths from 2 inputs to 1 output"),
        (["train", "inr-classification", "--data", "no/such/folder"], "error: read_collection: no/such/folder is not a folder"),
        (["train", "inr-classification", "--device", "quantum"], "error: --device: expected cpu, cuda or cuda:<number>"),
        (["train", "inr-classification", "--lr", "-1"], "error: TrainConfig: expected lr > 0, got -1.0"),
        (["train", "inr-classification", "--splits", "x.json"], "error: --splits goes with --data FOLDER"),
    ],
)
def test_errors_are_one_sentence(arguments, words, tmp_path):
    done = ngk(*arguments, cwd=tmp_path)
    assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_usage_errors():
    assert ngk("no-such-command").returncode == 2
    assert ngk("demo", "--steps", "0").returncode == 2
    assert "ng-gnn" in ngk("demo", "--model", "x").stderr


def test_debug_shows_the_traceback(tmp_path):
    done = ngk("--debug", "train", "inr-classification", "--data", "none", cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" in done.stderr and "DataError" in done.stderr


def test_fit_and_export(tmp_path):
    done = ngk("fit-inrs", "--images", 6, "--per-image", 2, "--steps", 5, "--cache", tmp_path / "c", "--export", tmp_path / "x", "--format", "safetensors")
    assert done.returncode == 0, done.stderr
    assert "12 networks" in done.stdout and len(list((tmp_path / "x").rglob("*.safetensors"))) == 12


def test_train_on_a_public_layout_and_resume_after_ctrl_c(collection, tmp_path):
    options = ["train", "inr-classification", "--data", collection, "--d-hid", 8, "--layers", 2, "--batch", 8, "--eval-every", 1000]
    process = subprocess.Popen(
        [*NGK, *map(str, options), "--steps", "100000", "--out", str(tmp_path / "long")], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    while process.stdout.readline().find(b"networks [2, 8, 8, 1]") < 0:
        assert process.poll() is None
    time.sleep(2.0)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    text = " ".join(stderr.decode().split())
    assert process.returncode == 130 and "stopped after step" in text and "The same command continues" in text, text
    assert (tmp_path / "long" / "checkpoint.pt").exists()

    done = ngk(*options, "--steps", 20, "--out", tmp_path / "short")
    assert done.returncode == 0 and "test accuracy" in done.stdout, done.stderr
    metrics = json.loads((tmp_path / "short" / "metrics.json").read_text())
    assert metrics["history"][-1]["step"] == 20
    done = ngk(*options, "--steps", 21, "--out", tmp_path / "short")
    assert done.returncode == 1 and "belongs to another run (train.steps: 20 there, 21 now); start anew with --fresh" in done.stderr
    assert ngk(*options, "--steps", 21, "--out", tmp_path / "short", "--fresh").returncode == 0


def test_demo_in_miniature(tmp_path):
    begin = time.monotonic()
    done = ngk("demo", "--smoke", "--steps", 20, "--out", tmp_path / "out", "--cache", tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - begin < 200  # 20 s on an idle machine
    out = tmp_path / "out"
    assert sorted(p.name for p in (out / "plots").iterdir()) == ["accuracy.png", "cost.png", "picture.png", "reconstructions.png"]
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4 and "reads the weights without running the network" in page and "standard error" in page
    markdown = (out / "report.md").read_text()
    assert "plots/accuracy.png" in markdown and "MLP on the pixels" in markdown
    results = json.loads((out / "results.json").read_text())
    measured = results["stages"]["large step"]["result"]["measured"]
    assert [entry["backend"] for entry in measured] == ["cpp", "reference"] and all(entry["peak_bytes"] > 0 for entry in measured)
    assert not list(tmp_path.rglob("*.tmp"))

    done = ngk("demo", "--smoke", "--steps", 20, "--out", tmp_path / "out", "--cache", tmp_path / "cache")
    assert done.returncode == 0 and "train ng-gnn" not in done.stdout  # nothing was left to do
    done = ngk("demo", "--smoke", "--steps", 21, "--out", tmp_path / "out", "--cache", tmp_path / "cache")
    assert done.returncode == 1 and "belongs to another run" in done.stderr and "--fresh" in done.stderr

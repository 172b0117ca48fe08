"""The command line: help that teaches, errors in one sentence, Ctrl-C that resumes, the demo in miniature."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from neural_graphs import cli
from neural_graphs.data import DataError, DigitConfig, SirenConfig, digit_inrs, digit_splits, export_mnist_layout

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


def here(*arguments):
    """Runs a command in this process; returns its exit status."""
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    return ended.value.code or 0


def test_help_teaches(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert here("--help") == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("demo", "fit-inrs", "train", "real pictures"))
    assert here("demo", "--help") == 0
    text = capsys.readouterr().out
    assert all(
        word in text for word in ("--out", "--steps", "--smoke", "--model", "--device", "--seed", "--resume", "--fresh", "report.html")
    )
    assert here("train", "--help") == 0
    assert "inr-classification" in capsys.readouterr().out


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
def test_errors_are_one_sentence(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert here(*arguments) == 1
    shown = capsys.readouterr().err
    assert words in shown and len(shown.strip().splitlines()) == 1


def test_usage_errors(capsys):
    assert here("no-such-command") == 2
    assert here("demo", "--steps", "0") == 2
    assert here("demo", "--model", "x") == 2
    shown = capsys.readouterr().err
    assert "ng-gnn" in shown and "ng-t" in shown


def test_debug_lets_the_error_through(tmp_path, monkeypatch):
    monkeypatch.setattr(cli._State, "debug", False)
    with pytest.raises(DataError, match="none is not a folder"):
        here("--debug", "train", "inr-classification", "--data", tmp_path / "none")


def test_a_missing_package_is_named():
    code = "import sys; sys.modules['typer'] = None; import neural_graphs.cli"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 1 and done.stderr.strip() == 'error: ngk needs the package typer; pip install "ngkernels[demo]"'


def test_the_main_module_is_a_program(tmp_path):
    done = ngk("train", "inr-classification", "--data", "none", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr == "error: read_collection: none is not a folder; give the folder that holds the networks\n"


def test_fit_and_export(tmp_path, capsys):
    options = [
        "--images",
        6,
        "--per-image",
        2,
        "--steps",
        5,
        "--cache",
        tmp_path / "c",
        "--export",
        tmp_path / "x",
        "--format",
        "safetensors",
    ]
    assert here("fit-inrs", *options) == 0
    shown = capsys.readouterr().out
    assert "12 networks" in shown and "fit networks: 12/12 (100 %)" in shown
    assert len(list((tmp_path / "x").rglob("*.safetensors"))) == 12


def test_train_on_a_public_layout_and_resume_after_ctrl_c(collection, tmp_path, capsys):
    options = ["train", "inr-classification", "--data", collection, "--d-hid", 8, "--layers", 2, "--batch", 8, "--eval-every", 1000]
    process = subprocess.Popen(
        [*NGK, *map(str, options), "--steps", "100000", "--out", str(tmp_path / "long")],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    while process.stdout.readline().find(b"networks [2, 8, 8, 1]") < 0:
        assert process.poll() is None
    time.sleep(2.0)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    text = " ".join(stderr.decode().split())
    assert process.returncode == 130 and "stopped after step" in text and "The same command continues" in text, text
    assert (tmp_path / "long" / "checkpoint.pt").exists()

    assert here(*options, "--steps", 20, "--out", tmp_path / "short") == 0
    assert "test accuracy" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "short" / "metrics.json").read_text())
    assert metrics["history"][-1]["step"] == 20
    assert here(*options, "--steps", 21, "--out", tmp_path / "short") == 1
    assert "belongs to another run (train.steps: 20 there, 21 now); start anew with --fresh" in capsys.readouterr().err
    assert here(*options, "--steps", 21, "--out", tmp_path / "short", "--fresh") == 0


def test_demo_in_miniature(tmp_path, capsys):
    begin = time.monotonic()
    done = ngk("demo", "--smoke", "--steps", 20, "--out", tmp_path / "out", "--cache", tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - begin < 200  # 20 s on an idle machine
    out = tmp_path / "out"
    assert sorted(p.name for p in (out / "plots").iterdir()) == ["accuracy.png", "cost.png", "picture.png", "reconstructions.png"]
    page = (out / "report.html").read_text()
    assert (
        page.count("data:image/png;base64,") == 4 and "reads the weights without running the network" in page and "standard error" in page
    )
    markdown = (out / "report.md").read_text()
    assert "plots/accuracy.png" in markdown and "MLP on the pixels" in markdown
    results = json.loads((out / "results.json").read_text())
    measured = results["stages"]["large step"]["result"]["measured"]
    assert [entry["backend"] for entry in measured] == ["cpp", "reference"] and all(entry["peak_bytes"] > 0 for entry in measured)
    assert not list(tmp_path.rglob("*.tmp"))

    again = ["demo", "--smoke", "--out", tmp_path / "out", "--cache", tmp_path / "cache", "--steps"]
    assert here(*again, 20) == 0
    assert "train ng-gnn" not in capsys.readouterr().out  # nothing was left to do
    assert here(*again, 20, "--model", "ng-t") == 0
    shown = capsys.readouterr().out
    assert "train ng-t" in shown and "train ng-gnn" not in shown
    assert (
        "NG-T names the digit" in shown
        and "NG-GNN names the digit" in shown
        and re.search(r"NG-T is \d+\.\d points (above|below) NG-GNN", shown)
    )
    assert "| NG-T, fused kernels | weights |" in (out / "report.md").read_text()
    assert here(*again, 21) == 1
    shown = capsys.readouterr().err
    assert "belongs to another run" in shown and "--fresh" in shown

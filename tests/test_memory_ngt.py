"""Peak memory of a training step of NG-T, a fresh process each time: the weights and the neurons, never the pairs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import DECLARED

ROOT = Path(__file__).resolve().parent.parent
STEP = """
import sys, torch
from neural_graphs.models import NGT
layout, attention = eval(sys.argv[1]), sys.argv[2]

def status(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

def step(layout):
    model = NGT(layout, attention=attention)  # the published widths
    weights = [torch.empty(1, a, b, 1).normal_(0, 0.1).requires_grad_() for a, b in zip(layout, layout[1:])]
    biases = [torch.empty(1, b, 1).normal_(0, 0.1).requires_grad_() for b in layout[1:]]
    model(weights, biases).square().mean().backward()

step((2, 16, 16, 3))  # loads what is loaded at first use
open("/proc/self/clear_refs", "w").write("5")  # the peak starts again
before = status("VmRSS")
step(layout)
print(status("VmHWM") - before)
"""


def peak(layout: tuple[int, ...], attention: str) -> int:
    """Bytes above the process before the step."""
    paths = os.pathsep.join((str(ROOT), str(ROOT / "python")))
    env = {**os.environ, "PYTHONPATH": paths, "NGKERNELS_BACKEND": "cpp", "MALLOC_MMAP_THRESHOLD_": str(2**20), "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", STEP, repr(layout), attention], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout)


linux = pytest.mark.skipif(
    "cpp" not in DECLARED or not Path("/proc/self/clear_refs").exists(), reason="needs the cpp backend and Linux's /proc"
)


def check(layout: tuple[int, ...], attention: str) -> None:
    edges, neurons = sum(a * b for a, b in zip(layout, layout[1:])), sum(layout)
    found = peak(layout, attention)
    limit = 16 * edges + 30_000 * neurons + 40 * 2**20
    assert found <= limit, f"{found / 2**20:.0f} MiB, {(found - 16 * edges - 40 * 2**20) / neurons:.0f} bytes for each neuron"


@linux
def test_peak_of_a_training_step():
    """One tensor of 32 numbers for each pair would take all that is left; the reference keeps 20 kB for each pair."""
    check((2, 320, 320, 3), "all")


@linux
@pytest.mark.slow
@pytest.mark.parametrize("attention", ["all", "edges"])
def test_peak_of_a_larger_step(attention: str):
    check((2, 768, 768, 3), attention)


@linux
def test_bytes_for_each_neuron():
    """At a constant number of edges: 30 kB for the whole step, transient buffers included."""
    narrow, wide = (2, 1000, 2, 3), (2, 9000, 2, 3)
    slope = (peak(wide, "edges") - peak(narrow, "edges")) / (sum(wide) - sum(narrow))
    assert slope <= 30_000 + 4 * 16

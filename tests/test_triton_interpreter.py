"""The Triton kernels in Triton's interpreter, on the CPU: in processes of their own, as it must be asked for before the first import of triton."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from interpreted import FILES

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed, and this run does not declare its backend")


def started(tier: str, file: str) -> subprocess.Popen:
    env = {**os.environ, "TRITON_INTERPRET": "1", "NGKERNELS_TEST_BACKENDS": "triton", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", tier, file]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def processes():
    """Of the quick tier, side by side: each interprets on one core, and they are the longest of all tests."""
    running = {file: started("not slow and not big", file) for file in FILES}
    yield running
    for process in running.values():
        process.kill()
        process.wait()


def check(process: subprocess.Popen) -> None:
    out = process.communicate()[0]
    assert process.returncode == 0 and " passed" in out, out[-6000:]


@pytest.mark.parametrize("file", FILES)
def test_in_a_process_of_the_interpreter(file: str, processes):
    check(processes[file])


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_everything_in_a_process_of_the_interpreter(file: str):
    check(started("slow", file))

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


def in_a_process(tier: str, *tests: str) -> None:
    env = {**os.environ, "TRITON_INTERPRET": "1", "NGKERNELS_TEST_BACKENDS": "triton"}
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", tier, *tests], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.parametrize("file", FILES)
def test_in_a_process_of_the_interpreter(file: str):
    in_a_process("not slow and not big", file)


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_everything_in_a_process_of_the_interpreter(file: str):
    in_a_process("slow", file)

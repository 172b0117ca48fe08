"""Every edge kernel that is built, by purpose, width and precision, long chains of updates, random expressions and recorded models, on an
emulated GPU. Values and every gradient are held against the oracle in float64.
"""

from __future__ import annotations

import emulation
import pytest
import test_random_expressions as drawn
import torch
from emulation import emulated  # noqa: F401  a fixture
from golden_cases import MODELS, check_model
from instance_list import CHAINS, INSTANCES, NGT, check, sample_of, watched
from samples import Sample

from ngkernels._cuda import launch
from ngkernels._cuda.lower import WIDTHS

FIRST = 16  # number of the first edge kernel: csrc/cuda/launcher.h
pytestmark = [
    pytest.mark.usefixtures("one_thread", "emulated"),
    pytest.mark.skipif(not emulation.compiler(), reason="no C++ compiler"),
]


@pytest.mark.parametrize(("purpose", "d", "precision"), INSTANCES)
def test_an_instance(purpose: str, d: int, precision: str, monkeypatch):
    with watched(monkeypatch) as seen:
        check(sample_of(purpose, d, precision), precision)
    assert {k for k in seen if k >= FIRST} == {launch.edge_kernel(purpose, d, precision, backward) for backward in (False, True)}


def test_these_are_all_instances():
    numbers = [launch.edge_kernel(*i, backward) for i in INSTANCES for backward in (False, True)]
    assert numbers == list(range(FIRST, FIRST + 72)) and len(INSTANCES) == len(launch.PURPOSES) * len(WIDTHS) * len(launch.PRECISIONS)


QUICK = ((CHAINS[1], "exact"), (CHAINS[2], "bf16"), (NGT[0], "exact"), (NGT[1], "bf16"), (NGT[2], "tf32"))
LONG = [pytest.param(s, p, id=f"{s.name}-{p}", marks=() if (s, p) in QUICK else pytest.mark.slow) for s in (*CHAINS, *NGT) for p in launch.PRECISIONS]


@pytest.mark.parametrize(("sample", "precision"), LONG)
def test_long_chains_of_updates(sample: Sample, precision: str):
    check(sample, precision)


def few(values, quick) -> list:
    return [pytest.param(v, marks=() if v in quick else pytest.mark.slow) for v in values]


@pytest.mark.parametrize("seed", few(range(60), range(0, 60, 12)))
@pytest.mark.parametrize("of", [drawn.check, drawn.check_pairs], ids=["expressions", "pairs"])
def test_random_expressions(of, seed: int):
    of(seed, "cuda")


@pytest.mark.parametrize("name", few(MODELS, MODELS[:1]))
def test_recorded_models(name: str):
    check_model(name, "cuda", "cpu", torch.float32)

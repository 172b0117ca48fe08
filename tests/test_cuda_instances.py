"""Every edge kernel that is built, by purpose, width and precision, on an emulated GPU: values and every gradient against the oracle in float64."""

from __future__ import annotations

import emulation
import pytest
from emulation import emulated  # noqa: F401  a fixture
from instance_list import INSTANCES, check, watched

from ngkernels._cuda import launch
from ngkernels._cuda.lower import WIDTHS

FIRST = 16  # number of the first edge kernel: csrc/cuda/launcher.h


@pytest.mark.usefixtures("one_thread", "emulated")
@pytest.mark.skipif(not emulation.compiler(), reason="no C++ compiler")
@pytest.mark.parametrize(("purpose", "d", "precision"), INSTANCES)
def test_an_instance(purpose: str, d: int, precision: str, monkeypatch):
    with watched(monkeypatch) as seen:
        check(purpose, d, precision)
    assert {k for k in seen if k >= FIRST} == {launch.edge_kernel(purpose, d, precision, backward) for backward in (False, True)}


def test_these_are_all_instances():
    numbers = [launch.edge_kernel(*i, backward) for i in INSTANCES for backward in (False, True)]
    assert numbers == list(range(FIRST, FIRST + 72)) and len(INSTANCES) == len(launch.PURPOSES) * len(WIDTHS) * len(launch.PRECISIONS)

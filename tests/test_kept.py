"""What is made once and kept: how long, and what a CUDA graph needs of it."""

from __future__ import annotations

import gc

import pytest
import torch

from ngkernels import kept
from ngkernels.kept import OfTopology, Recent


class Made:
    """Something that takes memory."""


@pytest.fixture
def capturing(monkeypatch):
    """Sets whether a CUDA graph is being captured."""
    monkeypatch.setattr(kept, "_captured", {})
    return lambda value: monkeypatch.setattr(kept, "capturing", lambda: value)


def count_of_made() -> int:
    gc.collect()
    return sum(type(o) is Made for o in gc.get_objects())


def test_those_asked_for_last_are_kept():
    recent = Recent(2)
    first = recent.get("a", Made)
    recent.get("b", Made)
    assert recent.get("a", Made) is first
    recent.get("c", Made)
    assert recent.get("a", Made) is first
    assert count_of_made() == 2


def test_what_a_capture_read_is_kept_for_good(capturing):
    recent = Recent(1)
    first = recent.get("a", Made)
    capturing(True)
    assert recent.get("a", Made) is first
    capturing(False)
    recent.get("b", Made)
    assert count_of_made() == 2
    assert recent.get("a", Made) is not first  # its memory is; a call makes its own


def test_nothing_is_made_in_a_capture(capturing):
    capturing(True)
    with pytest.raises(RuntimeError, match="expected a step that has run before it is captured as a CUDA graph.*run it once, then capture it"):
        Recent(1).get("a", Made)


def test_of_a_topology_by_the_tensor_then_by_its_content(capturing):
    made: list[list[int]] = []
    of = OfTopology(lambda topology, device: made.append(topology.tolist()) or Made())
    cpu, a, same, other = torch.device("cpu"), torch.tensor([1, 2]), torch.tensor([1, 2]), torch.tensor([3])
    assert of(a, cpu) is of(a, cpu) is of(same, cpu)
    assert of(other, cpu) is not of(a, cpu)
    assert made == [[1, 2], [3]]
    capturing(True)
    of(other, cpu)
    del a, same, other
    capturing(False)
    for k in range(64):
        of(torch.tensor([4, k]), cpu)
    assert count_of_made() == 64 + 1  # the captured one, and those whose content was met last

"""The tests that run in Triton's interpreter, and what they share."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

FILES = ("tests/interpreted_values.py", "tests/interpreted_pairs.py", "tests/interpreted_tiles.py")
slow = pytest.mark.slow


def tiered(samples: Sequence, quick: tuple[str, ...]) -> list:
    """Parameters of a test: those named in the quick tier, the others in the slow one."""
    missing = set(quick) - {s.name for s in samples}
    assert not missing, missing
    return [pytest.param(s, id=s.name, marks=() if s.name in quick else slow) for s in samples]


def seeded(quick: int, most: int) -> list:
    """Numbers for what is drawn at random."""
    return [pytest.param(k, marks=() if k < quick else slow) for k in range(most)]

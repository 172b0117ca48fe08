"""Collects bench_*.py next to the tests, so that `pytest benchmarks --benchmark-only` finds them."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_collect_file(file_path: Path, parent: pytest.Collector):
    if file_path.suffix == ".py" and file_path.name.startswith("bench_"):
        return BenchFile.from_parent(parent, path=file_path)
    return None


class BenchFile(pytest.Module):
    """A module whose functions bench_* are collected."""

    def funcnamefilter(self, name: str) -> bool:
        return name.startswith("bench_")

"""A small expression for every purpose and width of the CUDA kernels' edge kernels (ngkernels/_cuda/launch.py): all of its columns, and tails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from types import ModuleType

import emulated_checks as checks
import pair_list
import pair_samples
import sample_list
import samples
from compare import assert_budget
from oracle import Network, mlp
from pytest import MonkeyPatch
from samples import Sample
from test_attend import assert_budget_of_pairs

from ngkernels._cuda import launch
from ngkernels._cuda.lower import WIDTHS

INSTANCES = tuple(product(launch.PURPOSES, WIDTHS, launch.PRECISIONS))
# Tails of tiles on both sides; edges of their own, several destinations in a tile of them.
NETWORKS = (mlp(3, 18, 2), Network((7, 4), (("sparse", 0, 1, tuple((k * 5 % 7, k * k % 4) for k in range(14)) + ((0, 2), (3, 3))),)))


def sample_of(purpose: str, d: int, precision: str) -> Sample:
    """Rounded operands with smooth reductions alone, as one rounding more or less moves a minimum's gradient to another edge."""
    reduce = ("mean", "std", "min", "max") if precision == "exact" else ("sum", "var")
    of = {"networks": NETWORKS, "width": d - 3, "hidden": d, "features": d - 9, "node_width": 5, "scale": 0.8 / d**0.5, "head": 0, "reduce": reduce}
    if purpose == "messages":
        return sample_list.PLAIN.but(f"{purpose}-{d}", residual=(False, True), **of)
    of |= {"residual": (True, False), "reverse": (True, False), "nodes": (True, True), "norm": (False, True)}
    if purpose == "options":
        return pair_list.PLAIN.but(f"{purpose}-{d}", over=None, **of)
    return pair_list.PLAIN.but(f"{purpose}-{d}", over="edges", heads=2, dk=d // 2 - 1, dv=d // 2, **{**of, "reduce": ()})


def module_of(purpose: str) -> tuple[ModuleType, Callable]:
    """Where samples of a purpose are run, and the budget they have."""
    return (samples, assert_budget) if purpose == "messages" else (pair_samples, assert_budget_of_pairs)


def check(purpose: str, d: int, precision: str) -> None:
    """Outputs and every gradient of one instance, forward and backward, against the oracle in float64."""
    (of, within), sample = module_of(purpose), sample_of(purpose, d, precision)
    if precision == "exact":
        checks.exact(of, sample, within)
    else:
        checks.rounded(of, sample, precision == "tf32", within)


@contextmanager
def watched(monkeypatch: MonkeyPatch) -> Iterator[set[int]]:
    """The numbers of all kernels that are launched meanwhile."""
    seen, run = set(), launch.run

    def note(kernel: int, *rest) -> None:
        seen.add(kernel)
        run(kernel, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(launch, "run", note)
        yield seen

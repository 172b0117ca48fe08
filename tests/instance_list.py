"""A small expression for every purpose and width of the CUDA kernels' edge kernels (ngkernels/_cuda/launch.py): all of its columns, and tails.

And chains of many updates, which the kernels evaluate again for every edge.
"""

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
from pair_samples import PairSample
from pytest import MonkeyPatch
from samples import Sample
from test_attend import assert_budget_of_pairs

from ngkernels._cuda import launch
from ngkernels._cuda.lower import WIDTHS

INSTANCES = tuple(product(launch.PURPOSES, WIDTHS, launch.PRECISIONS))
# Rows of three tiles, the last of them not full, and of less than one; edges of their own, several destinations in a tile of them.
NETWORKS = (mlp(2, 34, 1), Network((7, 4), (("sparse", 0, 1, tuple((k * 5 % 7, k * k % 4) for k in range(14)) + ((0, 2), (3, 3))),)))


def sample_of(purpose: str, d: int, precision: str) -> Sample:
    """Rounded operands with smooth reductions alone, as one rounding more or less moves a minimum's gradient to another edge."""
    reduce = ("mean", "std", "min", "max") if precision == "exact" else ("sum", "var")
    of = {"networks": NETWORKS, "width": d - 3, "hidden": d, "features": d - 9, "node_width": 5, "scale": 0.8 / d**0.5, "head": 0, "reduce": reduce}
    if purpose == "messages":
        return sample_list.PLAIN.but(f"{purpose}-{d}", residual=(False, True), **of)
    of |= {"residual": (True, False), "reverse": (True, False), "nodes": (True, True), "norm": (False, True)}
    if purpose == "options":
        return pair_list.PLAIN.but(f"{purpose}-{d}", over=None, **of)
    return pair_list.PLAIN.but(f"{purpose}-{d}", over="edges", heads=2, dk=d // 2 - 1, dv=d // 2, attention_scale=2 * d**0.5, **{**of, "reduce": ()})


def _chain(updates: int, d: int) -> Sample:
    residual = tuple(k % 3 == 1 for k in range(updates))
    of = {"networks": (mlp(3, 40, 16),), "width": d, "hidden": d - 3, "features": d - 5, "memory": (), "scale": 0.8 / d**0.5, "reduce": ("sum", "var"), "head": 0}
    return sample_list.PLAIN.but(f"{updates}-updates-d{d}", residual=residual, **of)


def _ngt(over: str, d: int, table: str) -> PairSample:
    """The state of two layers of NG-T, each a pair update and a plain one, residual and normalised."""
    of = {"networks": (mlp(3, 12, 5),), "encoder": "fourier", "residual": (True,) * 4, "reverse": (True, False) * 2, "nodes": (True, False) * 2, "norm": (True,) * 4}
    of |= {"width": d, "hidden": 32, "heads": 4, "dk": d // 4, "dv": d // 4, "node_width": 16, "scale": 0.9 / d**0.5}
    return pair_list.PLAIN.but(f"two-layers-of-ng-t-{over}-d{d}-table-{table}", over=over, table=table, **of)


CHAINS = tuple(_chain(updates, d) for updates in (5, 8) for d in (16, 32))
NGT = tuple(_ngt(over, d, table) for over in ("edges", "all") for d, table in ((16, "auto"), (32, "never")))


def module_of(sample: Sample) -> tuple[ModuleType, Callable]:
    """Where a sample is run, and the budget it has."""
    return (pair_samples, assert_budget_of_pairs) if isinstance(sample, PairSample) else (samples, assert_budget)


def check(sample: Sample, precision: str) -> None:
    """Outputs and every gradient against the oracle in float64."""
    of, within = module_of(sample)
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

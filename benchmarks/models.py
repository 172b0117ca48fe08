"""Which models are measured: how each is made with the parameters of its published baseline, and how its work is counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from benchmarks import work
from benchmarks.cases import CLASSES, Case


@dataclass(frozen=True)
class Model:
    """A model whose training step is measured.

    Attributes:
        oracle: (case) -> the published baseline with random parameters, which every provider takes over.
        ours: (oracle) -> this project's model. baseline: (provider, oracle) -> the provider's model.
        baselines: columns of the table, header and names of providers. providers: who is measured by default.
        work: (case, weight gradients) -> Work. unit: what seconds are divided by, an attribute of Case and its name in tables.
        oracle_bytes: (case) -> what a float64 step of the oracle keeps, about.
        layouts, quick: cases of the benchmark of training steps; none where there is nothing to compare with.
    """

    name: str
    text: str
    oracle: Callable[[Case], nn.Module]
    ours: Callable[[nn.Module], nn.Module]
    baseline: Callable[[object, nn.Module], nn.Module] | None
    baselines: tuple[tuple[str, tuple[str, ...]], ...]
    providers: tuple[str, ...]
    work: Callable[[Case, bool], work.Work] | None
    unit: tuple[str, str]
    oracle_bytes: Callable[[Case], int]
    layouts: str = ""
    quick: str = ""

    @property
    def rivals(self) -> tuple[str, ...]:
        """Names of all baselines."""
        return tuple(name for _, names in self.baselines for name in names)

    def new_oracle(self, case: Case, seed: int = 0) -> nn.Module:
        """The oracle with random parameters that depend on `seed` only."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.oracle(case)


def _pyg(case: Case, width: int = 32) -> nn.Module:
    from neural_graphs.baselines.pyg_nggnn import PyGNGGNN

    return PyGNGGNN(list(case.layout), width, out_features=CLASSES, style="published", order="source")


def _pyg_baseline(provider, oracle: nn.Module) -> nn.Module:
    from neural_graphs.baselines.pyg_nggnn import PyGNGGNN

    model = PyGNGGNN(oracle.layout, oracle.d_hid, out_features=CLASSES, style=provider.style, order=provider.order)
    return model.load_reference(oracle.reference_state_dict())


def _nggnn(oracle: nn.Module) -> nn.Module:
    from neural_graphs.models import NGGNN

    return NGGNN.from_reference(oracle.reference_state_dict(), oracle.reference_config(), edge_memory="recompute")


def _dense(case: Case) -> nn.Module:
    from neural_graphs.baselines.dense_ngt import DenseNGT

    return DenseNGT(list(case.layout), out_features=CLASSES)


def _dense_baseline(provider, oracle: nn.Module) -> nn.Module:
    from neural_graphs.baselines.dense_ngt import DenseNGT

    return DenseNGT(oracle.layout, out_features=CLASSES).load_reference(oracle.reference_state_dict())


def _ngt(attention: str) -> Callable[[nn.Module], nn.Module]:
    def make(oracle: nn.Module) -> nn.Module:
        from neural_graphs.models import NGT

        return NGT.from_reference(oracle.reference_state_dict(), oracle.reference_config(), attention=attention)

    return make


MODELS = {
    m.name: m
    for m in (
        Model(
            "ng-gnn",
            "NG-GNN",
            _pyg,
            _nggnn,
            _pyg_baseline,
            (("PyG as published", ("pyg", "pyg-compile")), ("PyG tuned", ("pyg-tuned", "pyg-tuned-compile"))),
            ("ngk-cpp", "pyg-compile", "pyg-tuned-compile", "pyg"),
            work.train_step,
            ("edges", "s / M edges"),
            lambda case: 13_000 * case.edges,
            layouts="2x16x32x3,2x64x128x3,2x32x32x1@64,2x256x512x3,2x512x1024x3",
            quick="2x16x32x3,2x32x32x1@8",
        ),
        Model(
            "ng-t",
            "NG-T",
            _dense,
            _ngt("all"),
            _dense_baseline,
            (("as published", ("dense",)), ("compiled", ("dense-compile",))),
            ("ngk-cpp", "ngk-cpp-compile", "dense-compile", "dense"),
            work.train_step_ngt,
            ("pairs", "us / pair"),
            lambda case: 45_000 * case.pairs,
            layouts="2x32x32x1@16,2x64x128x3,2x128x256x3",
            quick="2x8x16x3,2x8x8x1@4",
        ),
        Model(
            "ng-t-edges",
            "NG-T along edges",
            _dense,
            _ngt("edges"),
            None,
            (),
            ("ngk-cpp",),
            None,
            ("edges", "s / M edges"),
            lambda case: 45_000 * case.pairs,
        ),
    )
}


def nggnn_of(width: int) -> Model:
    """NG-GNN with node and edge states of so many columns."""
    base, per_edge = MODELS["ng-gnn"], 13_000 * width // 32
    text, oracle = f"NG-GNN, {width} columns", partial(_pyg, width=width)
    return replace(base, name=f"ng-gnn-{width}", text=text, oracle=oracle, work=partial(work.train_step, width=width), oracle_bytes=lambda case: per_edge * case.edges)


TIMED = tuple(name for name, m in MODELS.items() if m.layouts)

"""Who takes part: every method as a model of networks of one layout, with its published sizes."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..models import DWS, NFN, NGGNN, NGT

CLASSES = 10


@dataclass(frozen=True)
class Method:
    """One method of the study.

    Args:
        name: for the command line and the records. text: for people.
        make: (layout, width) -> model. width: the published one. step: widths are multiples of it.
        compiled: the model goes through torch.compile. needs: packages besides torch.
        policy: of a model on ngkernels, its edge memory: the planner knows such models. backend: one that is forced.
        published: the largest layout of the published study (batch 1, one GPU), if the method was in it.
    """

    name: str
    text: str
    make: Callable[[Sequence[int], int], nn.Module]
    width: int = 32
    step: int = 8
    compiled: bool = False
    policy: str | None = None
    backend: str | None = None
    needs: tuple[str, ...] = ()
    published: tuple[int, ...] | None = None

    @property
    def peer(self) -> str | None:
        """The method as published that this one computes too."""
        return next((f"{family}-published" for family in ("ng-gnn", "ng-t") if self.name.startswith(family)), None)

    def why_not(self) -> str | None:
        """Why the method cannot run here, or None."""
        missing = [name for name in self.needs if importlib.util.find_spec(name) is None]
        return f"the package {missing[0]} is not installed; pip install {missing[0]}" if missing else None

    def model(self, layout: Sequence[int], width: int, seed: int = 0) -> nn.Module:
        """The model, with random parameters that depend on `seed` only."""
        torch.manual_seed(seed)
        return self.make(list(layout), width)


def _ours(edge_memory: str) -> Callable[[Sequence[int], int], nn.Module]:
    return lambda layout, width: NGGNN(layout, d_hid=width, num_layers=4, out_features=CLASSES, edge_memory=edge_memory, norm="batch_graph")


def _edge_list(layout: Sequence[int], width: int) -> nn.Module:
    from ..baselines.pyg_nggnn import PyGNGGNN

    return PyGNGGNN(list(layout), d_hid=width, out_features=CLASSES, style="published", order="source")


def _checkpointed(layout: Sequence[int], width: int) -> nn.Module:
    model = _edge_list(layout, width)
    model.gnn.checkpointed = True
    return model


def _dense(layout: Sequence[int], width: int) -> nn.Module:
    from ..baselines.dense_nggnn import DenseNGGNN

    return DenseNGGNN(list(layout), d_hid=width, out_features=CLASSES)


def _ngt_sizes(width: int) -> dict[str, int]:
    """The published widths in the published proportions: 32 wide pair states."""
    return {
        "d_node": 2 * width,
        "d_edge": width,
        "d_attn_hid": 4 * width,
        "d_node_hid": 4 * width,
        "d_edge_hid": 2 * width,
        "d_out_hid": 4 * width,
    }


def _ngt(attention: str, edge_memory: str = "recompute") -> Callable[[Sequence[int], int], nn.Module]:
    return lambda layout, width: NGT(layout, out_features=CLASSES, attention=attention, edge_memory=edge_memory, **_ngt_sizes(width))


def _dense_ngt(layout: Sequence[int], width: int) -> nn.Module:
    from ..baselines.dense_ngt import DenseNGT

    return DenseNGT(list(layout), out_features=CLASSES, **_ngt_sizes(width))


_PYG = ("torch_geometric",)
_NG_GNN, _NG_T = (2, 1024, 2048, 3), (2, 512, 1024, 3)
METHODS = {
    m.name: m
    for m in (
        Method("ng-gnn", "NG-GNN, ngkernels, edge states recomputed", _ours("recompute"), policy="recompute", published=_NG_GNN),
        Method("ng-gnn-hybrid", "NG-GNN, ngkernels, one gradient buffer", _ours("hybrid"), policy="hybrid", published=_NG_GNN),
        Method("ng-gnn-every2", "NG-GNN, ngkernels, every second edge state stored", _ours("every:2"), policy="every:2", published=_NG_GNN),
        Method("ng-gnn-store", "NG-GNN, ngkernels, edge states stored", _ours("store"), policy="store", published=_NG_GNN),
        Method("ng-gnn-reference", "NG-GNN, ngkernels, plain PyTorch backend", _ours("recompute"), backend="reference", published=_NG_GNN),
        Method("ng-gnn-published", "NG-GNN as published: dense front end, PyG", _dense, needs=_PYG, published=_NG_GNN),
        Method("ng-gnn-pyg", "NG-GNN on PyG, edge list", _edge_list, needs=_PYG, published=_NG_GNN),
        Method("ng-gnn-pyg-checkpoint", "NG-GNN on PyG, edge list, layers checkpointed", _checkpointed, needs=_PYG, published=_NG_GNN),
        Method("ng-gnn-pyg-compile", "NG-GNN on PyG, edge list, compiled", _edge_list, compiled=True, needs=_PYG, published=_NG_GNN),
        Method("ng-t", "NG-T, ngkernels, all pairs of neurons", _ngt("all"), policy="recompute", published=_NG_T),
        Method("ng-t-edges", "NG-T along edges, ngkernels", _ngt("edges"), policy="recompute"),
        Method("ng-t-edges-hybrid", "NG-T along edges, ngkernels, one gradient buffer", _ngt("edges", "hybrid"), policy="hybrid"),
        Method("ng-t-edges-store", "NG-T along edges, ngkernels, edge states stored", _ngt("edges", "store"), policy="store"),
        Method("ng-t-published", "NG-T as published: dense pairs", _dense_ngt, published=_NG_T),
        Method("nfn", "NFN (NP)", lambda layout, width: NFN(layout, (width,) * 3, CLASSES), 512, published=(2, 1024, 2048, 3)),
        Method("dws", "DWS", lambda layout, width: DWS(layout, width, 4, CLASSES), 32, published=(2, 2048, 4096, 3)),
    )
}


def select(names: str) -> tuple[list[Method], dict[str, str]]:
    """Methods of a comma-separated list, and by name why some of them cannot run.

    "all" stands for every method that can run here; one that is asked for by name must.

    Raises:
        ValueError: an unknown name, or one that cannot run.
    """
    asked = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in asked if name not in METHODS and name != "all"]
    if unknown or not asked:
        raise ValueError(f"--methods: expected all or some of {', '.join(METHODS)}, got {unknown[0] if unknown else 'none'!r}")
    wanted = dict.fromkeys(name for entry in asked for name in (METHODS if entry == "all" else (entry,)))
    missing = {name: reason for name in wanted if (reason := METHODS[name].why_not())}
    named = [name for name in missing if name in asked]
    if named:
        raise ValueError(f"--methods: {named[0]} cannot run: {missing[named[0]]}")
    return [METHODS[name] for name in wanted if name not in missing], missing


def parameters(method: Method, layout: Sequence[int], width: int) -> int:
    """Number of trained parameters."""
    return sum(p.numel() for p in method.model(layout, width).parameters() if p.requires_grad)


def width_for(method: Method, target: int, layout: Sequence[int] = (2, 16, 32, 3)) -> int:
    """The width with the number of parameters nearest to `target`: a multiple of the method's step."""
    counts = {1: parameters(method, layout, method.step)}
    high = 1
    while counts[high] < target:  # parameters grow with the width
        high *= 2
        counts[high] = parameters(method, layout, high * method.step)
    low = max(1, high // 2)
    while high - low > 1:
        middle = (low + high) // 2
        counts[middle] = parameters(method, layout, middle * method.step)
        low, high = (middle, high) if counts[middle] < target else (low, middle)
    return method.step * min(counts, key=lambda steps: abs(counts[steps] - target))

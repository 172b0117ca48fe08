"""What is compiled ahead of time: sample expressions, and the list of what a kernel can be made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from oracle import Network, mlp
from pair_samples import PairSample
from sample_list import PLAIN, PRUNED, UNEQUAL_REVERSED
from samples import Sample

from ngkernels.ops.node_map import After, node_map


@dataclass(frozen=True)
class Variant:
    """wanted: words of which one begins the name of every leaf that wants a gradient; none: all. edges, warps: of a tile; 0: as the tables say."""

    sample: Sample | PairSample | NodeSample
    precision: str = "bf16"  # of matrix products
    weights: torch.dtype = torch.float32
    wanted: tuple[str, ...] = ("",)
    size: tuple[int, int] = (0, 0)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.precision == "float64" else torch.float32


ONE, TWO, BOTH = (mlp(8, 8),), (mlp(2, 8, 8),), (mlp(8, 8, reverse=True),)  # tiles of one shape, of two; blocks that share weights


def ng_gnn(width: int, layer: int, **changes) -> Sample:
    """Message layer `layer` (from 1) of NG-GNN: a chain of layer - 1 updates, FiLM, the usual reductions."""
    given = {"networks": (mlp(2, 64, 64, 3),), "width": width, "hidden": width, "features": width, "node_width": width, "head": 0, **changes}
    return PLAIN.but(f"ng-gnn-{width}-{layer}", **{"residual": (False,) * (layer - 1), "memory": (), **given})


def ng_t(width: int, updates: int, **changes) -> PairSample:
    """Attention over the pair states of NG-T after `updates` layers."""
    given = {"networks": (mlp(2, 64, 64, 3),), "width": width, "hidden": 2 * width, "node_width": width, "heads": 8, "dk": 8, "dv": 8, **changes}
    many = dict.fromkeys(("residual", "reverse", "nodes", "norm"), (True,) * updates)
    return PairSample(name=f"ng-t-{width}-{updates}", memory=(), **{**many, **given})


def ng_t_layer(**changes) -> PairSample:
    """What is between two stored states of NG-T, as its models are by default: a pair update, and an MLP of each edge."""
    return ng_t(32, 2, reverse=(True, False), nodes=(True, False), node_width=64, dk=16, dv=16, **changes)


def small(updates: int = 0, **changes) -> PairSample:
    """As small as attention gets."""
    return ng_t(16, updates, **{"networks": ONE, "hidden": 16, "heads": 2, **changes})


@dataclass(frozen=True)
class NodeSample:
    """A node map: columns of x, of reduced, of the result; factors (None: 1); the norm, and whether the activation comes before it."""

    width: int = 32
    reduced: int = 128
    factors: tuple[int | None, ...] = (None, 1)
    norm: str | None = "layer"
    first: bool = False

    def run(self, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """(results, what they depend on)."""
        rows, width = 70, self.width
        inputs, shapes = width + len(self.factors) * self.reduced, [(rows, width), (rows, self.reduced)]
        x, reduced, matrix, bias, lin, lin_bias, weight, shift = live = [
            torch.zeros(s, dtype=dtype, requires_grad=True) for s in (*shapes, (width, inputs), width, (width, width), width, width, width)
        ]
        factors = [None if f is None else torch.ones(rows, dtype=dtype) for f in self.factors]
        bounds = torch.tensor([0, 20, rows]) if self.norm == "graph" else None
        after = After("silu", self.norm, weight, shift, bounds, act_first=self.first)
        return [node_map(x, reduced, [matrix, bias, lin, lin_bias], factors, after)], live


WEB = (Network((9,), (("sparse", 0, 0, ((3, 1), (0, 1), (5, 5), (8, 1), (1, 0))),)),)
HUBS = (Network((9,), (("sparse", 0, 0, tuple((k, i) for k in range(9) for i in range(9))),)),)
EMIT = {"reduce": (), "head": 2, "head_nodes": True}
ALL = ("sum", "mean", "min", "max", "std", "var")
TABULATED = {"encoder": "fourier", "table": "auto", "table_range": 2.0, "frequencies": 16}
# Small ones, which together have everything that WANTED names.
QUICK = {
    "film": Variant(ng_gnn(32, 2, networks=TWO)),
    "film-tf32": Variant(ng_gnn(32, 2, networks=ONE), "tf32"),
    "gate-exact": Variant(ng_gnn(16, 2, networks=ONE, kind="gate", mlp=1, activation="gelu", reduce=("sum",)), "ieee"),
    "product-odd": Variant(ng_gnn(17, 2, networks=ONE, kind="product", activation="tanh", reduce=("mean",))),
    "concat-odd-tf32": Variant(ng_gnn(20, 2, networks=ONE, kind="concat", mlp=1, activation="sigmoid", reduce=("sum", "var")), "tf32"),
    "odd-exact": Variant(ng_gnn(17, 2, networks=ONE, activation="relu", reduce=("min",)), "ieee"),
    "double": Variant(ng_gnn(16, 2, networks=ONE, activation="leaky_relu", reduce=ALL), "float64", torch.float64),
    "double-odd": Variant(ng_gnn(7, 2, networks=ONE, activation="identity", reduce=("max",)), "float64", torch.float64),
    "chunks": Variant(ng_gnn(96, 2, networks=ONE, kind="product", reduce=("sum",))),
    "chunks-odd": Variant(ng_gnn(66, 2, networks=ONE, kind="product", reduce=("sum",))),
    "chunks-exact": Variant(ng_gnn(70, 2, networks=ONE, kind="product", reduce=("sum",)), "ieee"),
    "table": Variant(ng_gnn(16, 2, networks=BOTH, reciprocal=True, reduce=("sum",), **TABULATED)),
    "table-frozen": Variant(ng_gnn(16, 2, networks=ONE, reduce=("sum",), **TABULATED), wanted=("weights", "x")),
    "table-complete": Variant(ng_gnn(16, 1, networks=ONE, reduce=("sum",), **{**TABULATED, "table_range": None})),
    "fourier": Variant(ng_gnn(16, 1, networks=ONE, encoder="fourier", frequencies=16, reduce=("sum",))),
    "fourier-3": Variant(ng_gnn(16, 1, networks=ONE, encoder="fourier", channels=3, frequencies=16, reduce=("sum",))),
    "channels-9": Variant(ng_gnn(16, 1, networks=ONE, channels=9, affine=True, reduce=("sum",))),
    "reciprocal": Variant(ng_gnn(16, 1, networks=BOTH, reciprocal=True, reduce=("sum",))),
    "residual": Variant(ng_gnn(16, 1, networks=ONE, residual=(True,), bias=False, layers=1, reduce=("sum",))),
    "packed": Variant(ng_gnn(16, 2, networks=UNEQUAL_REVERSED, packed=True, reduce=("sum",)), weights=torch.bfloat16),
    "weights-frozen": Variant(ng_gnn(32, 2, networks=ONE), wanted=("x", "update", "message", "encoder")),
    "weights-alone": Variant(ng_gnn(32, 2, networks=ONE), wanted=("weights",)),
    "stored": Variant(ng_gnn(16, 3, networks=ONE, memory=("bfloat16", "virtual"), reduce=("sum",))),
    "readout": Variant(ng_gnn(32, 2, networks=BOTH, **EMIT), weights=torch.float16),
    "readout-tf32": Variant(ng_gnn(32, 2, networks=ONE, **EMIT), "tf32"),
    "readout-odd-exact": Variant(ng_gnn(17, 2, networks=ONE, **EMIT), "ieee"),
    "readout-double": Variant(ng_gnn(16, 2, networks=ONE, **EMIT), "float64", torch.float64),
    "readout-chunks": Variant(ng_gnn(66, 2, networks=ONE, **EMIT)),
    "sparse": Variant(ng_gnn(16, 2, networks=WEB, reduce=("sum",))),
    "sparse-hubs": Variant(ng_gnn(16, 1, networks=HUBS, reduce=("sum",))),
    "sparse-readout": Variant(ng_gnn(16, 1, networks=WEB * 2, reduce=(), head=1, head_nodes=False)),
    "tiles-of-64": Variant(ng_gnn(16, 2, networks=ONE), size=(64, 4)),
    "pairs": Variant(small(1, over=None, reduce=("mean", "max"), features=16, token=True)),
    "pairs-readout": Variant(small(1, over=None, head=1, head_nodes=False, networks=TWO)),
    "heads": Variant(small(1, over="all", token=True)),
    "heads-edges": Variant(small(over="edges", networks=TWO, dropout=0.1)),
    "heads-odd": Variant(small(over="in", dk=5, dv=12, heads=3, multiply=False)),
    "heads-alone": Variant(small(over="in", add=False, heads=2, dk=32, dv=64)),
    "heads-tf32": Variant(small(over="in"), "tf32"),
    "heads-exact": Variant(small(over="in"), "ieee"),
    "heads-double": Variant(small(over="in"), "float64", torch.float64),
    "heads-sparse": Variant(small(over="edges", networks=WEB, **TABULATED)),
    "heads-chunks": Variant(ng_t(66, 0, networks=ONE, over="in", heads=2)),
    "nodes": Variant(NodeSample(), "ieee"),
    "nodes-segments": Variant(NodeSample(norm="graph", first=True), "ieee"),
    "nodes-double": Variant(NodeSample(17, 19, (1, None, 1), None), "float64"),
}  # fmt: skip
SLOW = {
    "layer-1": Variant(ng_gnn(32, 1)),
    "layer-2": Variant(ng_gnn(32, 2)),
    "layer-3": Variant(ng_gnn(32, 3)),
    "layer-4": Variant(ng_gnn(32, 4)),
    "layer-3-tf32": Variant(ng_gnn(32, 3), "tf32"),
    "layer-3-exact": Variant(ng_gnn(32, 3), "ieee"),
    "layer-2-double": Variant(ng_gnn(16, 2), "float64", torch.float64),
    "layer-8": Variant(ng_gnn(32, 8)),
    "width-8": Variant(ng_gnn(8, 3)),
    "width-17-exact": Variant(ng_gnn(17, 2), "ieee"),
    "width-64": Variant(ng_gnn(64, 3)),
    "width-64-exact": Variant(ng_gnn(64, 2), "ieee"),
    "width-128": Variant(ng_gnn(128, 2)),
    "width-130-exact": Variant(ng_gnn(130, 2), "ieee"),
    "width-256": Variant(ng_gnn(256, 2)),
    "all-reductions": Variant(ng_gnn(32, 1, reduce=ALL)),
    "gate": Variant(ng_gnn(32, 2, kind="gate", mlp=1, activation="gelu")),
    "product": Variant(ng_gnn(32, 2, kind="product", activation="tanh")),
    "concat": Variant(ng_gnn(32, 2, kind="concat", mlp=2, reduce=("sum",))),
    "table-32": Variant(ng_gnn(32, 2, encoder="fourier", table="auto", table_range=2.0, frequencies=64, networks=(mlp(2, 64, 64, 3, reverse=True),), reciprocal=True)),
    "fourier-32": Variant(ng_gnn(32, 2, encoder="fourier", channels=3, frequencies=32)),
    "channels-9-32": Variant(ng_gnn(32, 2, channels=9, affine=True)),
    "residual-layers": Variant(PLAIN.but("residual", networks=(mlp(2, 64, 3),), width=32, hidden=32, features=32, node_width=32, layers=2, residual=(True, True), head=0)),
    "packed-32": Variant(ng_gnn(32, 2, networks=UNEQUAL_REVERSED, packed=True), weights=torch.bfloat16),
    "virtual": Variant(PLAIN.but("virtual", width=32, hidden=32, features=32, node_width=32, memory=("virtual", None), residual=(False, False), head=0)),
    "readout-32": Variant(ng_gnn(32, 3, **EMIT), weights=torch.float16),
    "readout-64": Variant(ng_gnn(64, 2, **EMIT), "tf32"),
    "sparse-32": Variant(ng_gnn(32, 2, networks=(PRUNED,))),
    "attend": Variant(ng_t(64, 2)),
    "attend-small": Variant(ng_t(16, 0, heads=2, add=False, over="edges")),
    "attend-edges-table": Variant(ng_t(16, 1, heads=2, over="edges", encoder="fourier", table="auto", table_range=2.0, frequencies=64)),
    "attend-exact": Variant(ng_t(32, 1), "ieee"),
    "attend-odd": Variant(ng_t(17, 1, dk=5, dv=12, heads=3, multiply=False)),
    "attend-dropout": Variant(ng_t(32, 1, dropout=0.1, over="in")),
    "attend-layer": Variant(ng_t_layer(over="edges")),
    "attend-layer-exact": Variant(ng_t_layer(over="edges"), "ieee"),
    "checkpoint-layer": Variant(ng_t_layer(over=None, head=1, head_nodes=False, closed=True)),
    "attend-sparse": Variant(ng_t(32, 1, over="edges", networks=WEB)),
    "nodes-wide": Variant(NodeSample(256, 1024, (None, 1, 1), "graph"), "ieee"),
    "messages-of-pairs": Variant(ng_t(32, 2, over=None, reduce=("mean", "max"), features=32)),
}  # fmt: skip
VARIANTS = QUICK | SLOW

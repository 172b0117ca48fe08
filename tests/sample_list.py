"""The sample list: every option of the engine at least once, each in a small expression."""

from __future__ import annotations

from oracle import Network, mlp
from samples import Sample

PLAIN = Sample("plain")
REVERSED = (mlp(2, 5, 3, copies=2, reverse=True),)
# a residual identity beside a dense block between the same layers, a block that skips a layer, another that runs inside a layer
RESIDUAL = Network(
    (3, 5, 4, 5), (("dense", 0, 1), ("dense", 1, 2), ("dense", 2, 3), ("diagonal", 1, 3), ("diagonal", 2, 3), ("dense", 0, 3)), copies=2
)
LOOPS = Network((4, 3), (("dense", 0, 1), ("diagonal", 0, 0), ("dense", 1, 1)))
# edges one by one: duplicates, self-loops, neurons without any; two layers in both directions; beside dense and diagonal blocks; none at all
WEB = Network((9,), (("sparse", 0, 0, ((3, 1), (0, 1), (5, 5), (8, 1), (1, 0), (3, 1), (2, 7), (5, 4), (4, 5), (0, 8), (6, 6))),), copies=2)
PRUNED = Network(
    (3, 5, 4), (("sparse", 0, 1, ((2, 0), (0, 0), (1, 4), (2, 3), (0, 3))), ("dense", 1, 2), ("sparse", 1, 2, ((4, 3), (0, 0), (4, 1))), ("sparse", 2, 0, ((3, 2), (0, 2))), ("diagonal", 0, 2)),
    copies=2,
)  # fmt: skip
EDGELESS = Network((3, 4), (("sparse", 0, 1, ()), ("sparse", 1, 1, ((0, 3),))))
SPARSE_UNEQUAL = (mlp(2, 5, 3, copies=2), WEB, PRUNED, EDGELESS)
UNEQUAL = (mlp(2, 5, 3, copies=2), mlp(3, 4), RESIDUAL, mlp(1, 1, 6, copies=3))
UNEQUAL_REVERSED = (mlp(2, 5, 3, copies=2, reverse=True), mlp(4, 3, reverse=True))

REDUCTIONS = tuple(PLAIN.but("reduce-" + "-".join(r), reduce=r, head=0) for r in (
    ("sum",), ("mean",), ("min",), ("max",), ("std",), ("var",), ("var", "std"), ("max", "sum", "var"), ("std", "min"), ("mean", "var"), ("sum", "mean", "max"),
    ("std", "sum"), ("var", "std", "max", "min", "mean", "sum"),
))  # fmt: skip
ACTIVATIONS = tuple(
    PLAIN.but(f"activation-{a}", activation=a, mlp=1) for a in ("relu", "gelu", "tanh", "sigmoid", "leaky_relu", "identity")
)
MESSAGES = tuple(
    PLAIN.but(f"{kind}-{layers}", kind=kind, mlp=layers)
    for kind in ("film", "gate", "product", "concat")
    for layers in (0, 1, 2)
    if (kind, layers) != ("film", 0)
)
FOURIER = (
    PLAIN.but("fourier", encoder="fourier"),
    PLAIN.but("fourier-3-channels", encoder="fourier", channels=3),
    PLAIN.but("fourier-reverse", encoder="fourier", networks=REVERSED),
    PLAIN.but("fourier-reciprocal", encoder="fourier", networks=REVERSED, reciprocal=True),
    PLAIN.but("fourier-reciprocal-3-channels", encoder="fourier", networks=REVERSED, reciprocal=True, channels=3),
    PLAIN.but("fourier-then", encoder="fourier", layers=2),
    PLAIN.but("fourier-affine", encoder="fourier", affine=True),
    PLAIN.but("fourier-no-update", encoder="fourier", residual=()),
    PLAIN.but("fourier-many", encoder="fourier", frequencies=35, width=17),
)
TABLES = (
    PLAIN.but("table", encoder="fourier", table="auto"),
    PLAIN.but("table-affine", encoder="fourier", table="auto", affine=True),
    PLAIN.but("table-residual-first", encoder="fourier", table="auto", residual=(True, False)),
    PLAIN.but("table-no-update", encoder="fourier", table="auto", residual=()),
    PLAIN.but("table-beyond", encoder="fourier", table="auto", table_range=0.25),
    PLAIN.but("table-reverse", encoder="fourier", table="auto", networks=REVERSED),
    PLAIN.but("table-reciprocal", encoder="fourier", table="auto", networks=REVERSED, reciprocal=True),
    PLAIN.but("table-reciprocal-beyond", encoder="fourier", table="auto", table_range=0.25, networks=REVERSED, reciprocal=True),
    PLAIN.but("table-reciprocal-affine", encoder="fourier", table="auto", networks=REVERSED, reciprocal=True, affine=True),
    PLAIN.but("table-beyond-many", encoder="fourier", table="auto", table_range=0.25, frequencies=35),
    PLAIN.but("table-then", encoder="fourier", table="auto", layers=1),
    PLAIN.but("table-large", encoder="fourier", table="auto", networks=(mlp(3, 70, 60, 2),), frequencies=20, width=16, features=16, hidden=32),
    PLAIN.but("table-packed", encoder="fourier", table="auto", networks=UNEQUAL_REVERSED, packed=True),
    PLAIN.but("table-shared", encoder="fourier", table="shared"),
    PLAIN.but("table-shared-residual-first", encoder="fourier", table="shared", residual=(True, False)),
    PLAIN.but("table-shared-no-update", encoder="fourier", table="shared", residual=()),
    PLAIN.but("table-shared-then", encoder="fourier", table="shared", layers=1),
    PLAIN.but("table-shared-beyond", encoder="fourier", table="shared", table_range=0.25, networks=REVERSED, reciprocal=True),
    PLAIN.but("table-shared-one-direction", encoder="fourier", table="shared", reciprocal=True),
    PLAIN.but("table-shared-restricted", encoder="fourier", table="shared", restrict=-1),
)  # fmt: skip
ENCODERS = (
    PLAIN.but("identity", encoder="identity"),
    PLAIN.but("identity-3-channels", encoder="identity", channels=3),
    PLAIN.but("identity-residual-first", encoder="identity", channels=3, residual=(True, True)),
    PLAIN.but("identity-then", encoder="identity", channels=3, layers=2),
    PLAIN.but("identity-then-residual", encoder="identity", channels=5, layers=1, residual=(True,)),
    PLAIN.but("identity-reciprocal", encoder="identity", networks=REVERSED, reciprocal=True),
    PLAIN.but("identity-reciprocal-residual-first", encoder="identity", networks=REVERSED, reciprocal=True, residual=(True,)),
    PLAIN.but("identity-no-update", encoder="identity", residual=()),
    PLAIN.but("identity-no-update-reciprocal", encoder="identity", networks=REVERSED, reciprocal=True, residual=(), channels=2),
    PLAIN.but("linear-no-update", residual=()),
    PLAIN.but("linear-3-channels", channels=3),
    PLAIN.but("linear-9-channels", channels=9),
    PLAIN.but("linear-17-channels-reciprocal", channels=17, reciprocal=True),
    PLAIN.but("linear-reverse", networks=REVERSED),
    PLAIN.but("linear-reciprocal", networks=REVERSED, reciprocal=True),
    PLAIN.but("linear-reciprocal-3-channels", networks=REVERSED, reciprocal=True, channels=3),
    PLAIN.but("linear-reciprocal-without-reverse", reciprocal=True),
    PLAIN.but("linear-residual-first", residual=(True, True)),
    PLAIN.but("linear-three-updates", residual=(True, False, True)),
    PLAIN.but("linear-then", layers=2, residual=(True,)),
    PLAIN.but("linear-affine", affine=True),
    PLAIN.but("linear-reciprocal-affine", networks=REVERSED, reciprocal=True, affine=True),
    PLAIN.but("no-biases", bias=False, mlp=1),
    PLAIN.but("head-of-the-edge-alone", head_nodes=False),
    PLAIN.but("head-of-one-layer", head=1),
    PLAIN.but("head-of-three-layers", head=3),
    PLAIN.but("head-of-the-raw-weight", encoder="identity", residual=(), reduce=(), head=1, head_nodes=False),
)
GRAPHS = (
    PLAIN.but("residual-blocks", networks=(RESIDUAL,)),
    PLAIN.but("residual-blocks-reversed", networks=(Network(RESIDUAL.layers, RESIDUAL.blocks, 2, True),), reciprocal=True),
    PLAIN.but("blocks-inside-a-layer", networks=(LOOPS,)),
    PLAIN.but("blocks-inside-a-layer-reversed", networks=(Network(LOOPS.layers, LOOPS.blocks, 2, True),), channels=2),
    PLAIN.but("diagonal-alone", networks=(Network((4, 6, 3), (("diagonal", 0, 1), ("diagonal", 1, 2)), 3),)),
    PLAIN.but("unequal", networks=UNEQUAL),
    PLAIN.but("unequal-reversed", networks=UNEQUAL_REVERSED, reciprocal=True),
    PLAIN.but("packed", networks=UNEQUAL, packed=True),
    PLAIN.but("packed-reversed", networks=UNEQUAL_REVERSED, packed=True, reciprocal=True, channels=2),
    PLAIN.but("packed-fourier", networks=UNEQUAL_REVERSED, packed=True, encoder="fourier"),
    PLAIN.but("single-edge", networks=(mlp(1, 1),)),
    PLAIN.but("a-layer-without-edges", networks=(Network((3, 4, 2, 5), (("dense", 0, 3),), 2),)),
    PLAIN.but("restricted", restrict=-1),
    PLAIN.but("restricted-middle", restrict=1),
    PLAIN.but("restricted-first", restrict=0, head=0),
    PLAIN.but("restricted-first-reversed", restrict=0, networks=REVERSED, reciprocal=True),
    PLAIN.but("restricted-reversed", restrict=1, networks=REVERSED),
    PLAIN.but("restricted-residual", restrict=-1, networks=(RESIDUAL,)),
    PLAIN.but("restricted-unequal", restrict=-1, networks=UNEQUAL),
    PLAIN.but("restricted-fourier", restrict=-1, encoder="fourier", affine=True),
    PLAIN.but("restricted-packed", restrict=-1, networks=UNEQUAL, packed=True, head=0),
)
SPARSE = (
    PLAIN.but("sparse", networks=(WEB,)),
    PLAIN.but("sparse-3-channels", networks=(WEB,), channels=3, encoder="fourier"),
    PLAIN.but("sparse-reversed", networks=(Network(WEB.layers, WEB.blocks, 2, True),), reciprocal=True),
    PLAIN.but("sparse-and-dense", networks=(PRUNED,)),
    PLAIN.but("sparse-and-dense-reversed", networks=(Network(PRUNED.layers, PRUNED.blocks, 2, True),), reciprocal=True, encoder="fourier"),
    PLAIN.but("sparse-edgeless", networks=(EDGELESS,)),
    PLAIN.but("sparse-unequal", networks=SPARSE_UNEQUAL, affine=True),
    PLAIN.but("sparse-packed", networks=SPARSE_UNEQUAL, packed=True),
    PLAIN.but("sparse-table", networks=(WEB,), encoder="fourier", table="auto"),
    PLAIN.but("sparse-restricted", networks=(PRUNED,), restrict=-1),
    PLAIN.but("sparse-restricted-packed", networks=(PRUNED, EDGELESS), restrict=1, packed=True, head=0),
    *(PLAIN.but(f"sparse-memory-{a}-{b}", networks=(PRUNED, WEB), memory=(a, b)) for a, b in (("same", None), ("virtual", "same"), ("virtual", "virtual"))),
    PLAIN.but("sparse-memory-packed", networks=SPARSE_UNEQUAL, packed=True, memory=("same", "virtual")),
)
SIZES = tuple(
    PLAIN.but(f"sizes-D{d}-H{h}-F{f}-dx{x}", networks=(mlp(3, 14, 2),), width=d, hidden=h, features=f, node_width=x, scale=scale, mlp=1)
    for d, h, f, x, scale in ((1, 1, 1, 1, 0.5), (3, 17, 3, 1, 0.4), (17, 3, 17, 3, 0.4), (16, 32, 16, 8, 0.3), (64, 17, 64, 130, 0.15), (130, 64, 130, 17, 0.1), (1, 130, 3, 64, 0.2))
) + (
    PLAIN.but("tiles-and-tails", networks=(mlp(3, 71, 53, 2, copies=2),)),
    PLAIN.but("tiles-and-tails-reversed", networks=(mlp(49, 50, 7, reverse=True),), reciprocal=True),
)  # fmt: skip
MEMORY = tuple(PLAIN.but("-".join(["memory", *(p or "none" for p in policy), *more]), memory=policy, **changes) for policy, more, changes in (
    (("same", None), (), {}), (("virtual", None), (), {}), ((None, "same"), (), {}), ((None, "virtual"), (), {}), (("virtual", "virtual"), (), {}),
    (("virtual+virtual", None), (), {}), (("virtual", "same"), (), {}), (("same", "virtual"), (), {}), (("same+virtual", "virtual+same"), (), {}),
    (("same", "same"), ("reciprocal",), {"networks": REVERSED, "reciprocal": True}),
    (("virtual", "virtual"), ("reciprocal",), {"networks": REVERSED, "reciprocal": True}),
    (("virtual", "same"), ("fourier",), {"encoder": "fourier"}),
    (("virtual", "same"), ("table", "shared"), {"encoder": "fourier", "table": "shared"}),
    (("virtual", None), ("affine",), {"affine": True}),
    (("same", None), ("affine",), {"affine": True, "channels": 3}),
    (("virtual", None), ("residual",), {"networks": (RESIDUAL,)}),
    (("same", None), ("residual",), {"networks": (RESIDUAL,)}),
    (("virtual", "same"), ("restricted",), {"restrict": -1}),
    (("same", "virtual"), ("restricted", "unequal"), {"restrict": -1, "networks": UNEQUAL}),
    (("virtual", "same"), ("packed",), {"networks": UNEQUAL_REVERSED, "packed": True}),
    (("same", "virtual"), ("packed",), {"networks": UNEQUAL_REVERSED, "packed": True, "reciprocal": True}),
    (("virtual", None), ("restricted", "packed"), {"restrict": -1, "networks": UNEQUAL, "packed": True, "head": 0}),
    (("virtual", "virtual"), ("head",), {"reduce": ()}),
    (("virtual", None), ("restricted", "to", "nothing"), {"restrict": 0}),
    (("virtual", None), ("restricted", "to", "nothing", "packed"), {"restrict": 0, "networks": UNEQUAL, "packed": True, "head": 0}),
    (("same", None), ("restricted", "to", "nothing"), {"restrict": 0}),
    (("same",), ("widest",), {"width": 17, "hidden": 3, "features": 1, "node_width": 2, "head": 0, "residual": (False,), "networks": (mlp(20, 21, 5),)}),
    (("same+virtual",), ("widest",), {"width": 33, "hidden": 3, "features": 1, "node_width": 2, "residual": (False,), "networks": (mlp(20, 21, 5),)}),
))  # fmt: skip

SAMPLES = (PLAIN, *REDUCTIONS, *ACTIVATIONS, *MESSAGES, *FOURIER, *TABLES, *ENCODERS, *GRAPHS, *SPARSE, *SIZES, *MEMORY)

# with autocast to bfloat16: sums, because one rounding more or less moves a minimum's gradient to another edge
_SUMS = ("sum", "mean", "std")
LOW_PRECISION = tuple(
    s.but(f"low-{s.name}", reduce=_SUMS, networks=(mlp(3, 16, 11, 2, reverse=s.networks[0].reverse),), width=16, hidden=24, features=17, node_width=8, scale=0.35)
    for s in (PLAIN, *MESSAGES[2:9:3], FOURIER[3], TABLES[5], ENCODERS[2], MEMORY[1])
)  # fmt: skip

"""The sample list of attention and pair updates: every option at least once, each in a small expression."""

from __future__ import annotations

from itertools import product

from oracle import Network, mlp
from pair_samples import PairSample

OVER = ("all", "edges", "in", "out")
PLAIN = PairSample()
REVERSED = (mlp(2, 5, 3, copies=2, reverse=True),)
# a residual identity, between layers of unequal width; blocks inside a layer, with and without a way to every pair
DIAGONALS = Network((3, 5, 4, 6), (("dense", 0, 1), ("dense", 1, 2), ("dense", 2, 3), ("diagonal", 1, 3), ("diagonal", 0, 2)), copies=2)
LOOPS = Network((4, 3), (("dense", 0, 1), ("diagonal", 0, 0), ("dense", 1, 1)), copies=2)
HOLES = Network((3, 4, 2, 5), (("dense", 0, 3),), 2)  # layers that nothing joins
UNEQUAL = (mlp(2, 5, 3, copies=2), mlp(3, 4), DIAGONALS, mlp(1, 1, 6, copies=3))
UNEQUAL_REVERSED = (mlp(2, 5, 3, copies=2, reverse=True), mlp(4, 3, reverse=True))
ONE = {"residual": (True,), "reverse": (True,), "nodes": (True,), "norm": (True,)}
NO_UPDATE = {"residual": (), "reverse": (), "nodes": (), "norm": ()}


def _grid(k: int, over: str, token: bool, both: bool, reverse: bool, restrict: int | None, encoder: str) -> PairSample:
    words = [
        over,
        *["token"] * token,
        *["both"] * both,
        *["reverse"] * reverse,
        *([] if restrict is None else [f"layer{restrict}"]),
        encoder,
    ]
    networks = (mlp(2, 5, 3, reverse=reverse),)
    return PLAIN.but("-".join(words), over=over, token=token, reciprocal=both, networks=networks, restrict=restrict, encoder=encoder)


_BOTH = (False, True)
GRID = tuple(_grid(k, *row) for k, row in enumerate(product(OVER, _BOTH, _BOTH, _BOTH, (None, -1, 1), ("linear", "fourier"))))
QUICK_GRID = GRID[::2][::2] + GRID[1::2][1::2]  # each encoder with half of the rest

ENCODERS = (
    PLAIN.but("identity", encoder="identity", norm=(False, True)),
    PLAIN.but("identity-3-channels", encoder="identity", channels=3),
    PLAIN.but("identity-both", encoder="identity", channels=2, reciprocal=True, token=True),
    PLAIN.but("identity-no-update", encoder="identity", channels=3, **NO_UPDATE),
    PLAIN.but("identity-no-update-token", encoder="identity", channels=3, token=True, over="in", **NO_UPDATE),
    PLAIN.but("linear-3-channels", channels=3, over="edges"),
    PLAIN.but("linear-no-update", **NO_UPDATE),
    PLAIN.but("linear-no-update-token-both", token=True, reciprocal=True, **NO_UPDATE),
    PLAIN.but("fourier-3-channels", encoder="fourier", channels=3, reciprocal=True, networks=REVERSED),
    PLAIN.but("fourier-no-update", encoder="fourier", over="edges", **NO_UPDATE),
    PLAIN.but("then", layers=2, token=True),
    PLAIN.but("fourier-then", encoder="fourier", layers=2, over="edges", reciprocal=True),
    PLAIN.but("identity-then", encoder="identity", channels=3, layers=1, over="in"),
    PLAIN.but("affine", affine=True),
    PLAIN.but("affine-both", affine=True, reciprocal=True, over="edges", token=True),
    PLAIN.but("affine-token-row", affine=True, token=True, restrict=0),
    PLAIN.but("diagonals-row", networks=(DIAGONALS,), restrict=0),  # read against their direction alone
    PLAIN.but("affine-diagonals", affine=True, networks=(DIAGONALS,), channels=2),
    PLAIN.but("affine-fourier-then", affine=True, encoder="fourier", layers=1, token=True, restrict=-1),
)
TABLES = (
    PLAIN.but("table", encoder="fourier", table="auto"),
    PLAIN.but("table-both", encoder="fourier", table="auto", reciprocal=True, over="edges", token=True),
    PLAIN.but("table-reversed", encoder="fourier", table="auto", reciprocal=True, networks=REVERSED, over="in"),
    PLAIN.but("table-beyond", encoder="fourier", table="auto", table_range=0.25, restrict=-1, token=True),
    PLAIN.but("table-no-update", encoder="fourier", table="auto", **NO_UPDATE),
    PLAIN.but("table-diagonals", encoder="fourier", table="auto", networks=(DIAGONALS, LOOPS)),
)
UPDATES = (
    PLAIN.but("no-norm", norm=(False, False)),
    PLAIN.but("residual-last-without-norm", residual=(False, True), norm=(False, False), over="edges"),
    PLAIN.but("nothing-residual", residual=(False, False), norm=(True, False)),
    PLAIN.but("pair-update-later", reverse=(False, True), nodes=(True, True)),
    PLAIN.but("pair-update-first", reverse=(True, False), nodes=(True, True), over="edges"),
    PLAIN.but("no-pair-update", reverse=(False, False), nodes=(True, True)),
    PLAIN.but("no-pair-update-edges", reverse=(False, False), nodes=(False, True), over="edges", token=True),
    PLAIN.but("nodes-nowhere", nodes=(False, False)),
    PLAIN.but("nodes-nowhere-token", nodes=(False, False), token=True, over="in", norm=(False, True)),
    PLAIN.but("nodes-later", nodes=(False, True), reverse=(False, True), residual=(True, True)),
    PLAIN.but(
        "three-updates", residual=(True, True, False), reverse=(True, False, True), nodes=(False, True, True), norm=(True, False, True)
    ),
    PLAIN.but("no-biases", bias=False),
    PLAIN.but("one-column", width=1, norm=(False, False), residual=(True, True), scale=0.3),
    *(PLAIN.but(f"activation-{a}", activation=a) for a in ("silu", "relu", "tanh", "sigmoid", "leaky_relu", "identity")),
)
CONSUMERS = tuple(
    PLAIN.but("-".join([name, *words]), **{**consumer, **graph})
    for name, consumer in {
        "messages": {"over": None, "reduce": ("mean", "min", "max", "std")},
        "readout": {"over": None, "head": 2},
        "together": {"reduce": ("sum", "var"), "head": 1},
    }.items()
    for words, graph in (
        ((), {}),
        (("both",), {"reciprocal": True}),
        (("reversed",), {"networks": REVERSED, "reciprocal": True}),
        (("restricted",), {"restrict": -1}),
        (("diagonals",), {"networks": (DIAGONALS, LOOPS)}),
        (("token",), {"token": True, "kind": "gate"}),
        (("packed",), {"networks": UNEQUAL, "packed": True, "kind": "concat"}),
        (("later",), {"reverse": (False, True), "nodes": (True, True), "norm": (False, False), "encoder": "fourier"}),
    )
)
GRAPHS = tuple(
    PLAIN.but("-".join([name, over, *words]), over=over, networks=networks, **more)
    for name, networks in {
        "diagonals": (DIAGONALS,),
        "loops": (LOOPS,),
        "holes": (HOLES,),
        "unequal": UNEQUAL,
        "one-neuron": (Network((1,), (("dense", 0, 0),), 2),),
    }.items()
    for over in OVER
    for words, more in (((), {}), (("layer0", "token"), {"restrict": 0, "token": True, "encoder": "fourier"}))
) + tuple(
    PLAIN.but("-".join(["packed", over, *words]), over=over, packed=True, **more)
    for over in OVER
    for words, more in (
        (("unequal",), {"networks": UNEQUAL, "channels": 2}),
        (("restricted",), {"networks": UNEQUAL, "restrict": -1, "token": True}),
        (("reversed",), {"networks": UNEQUAL_REVERSED, "reciprocal": True, "token": True}),
    )
)  # fmt: skip
ALONE = tuple(
    PLAIN.but("-".join(["no-self", over, *words]), over=over, include_self=False, **more)
    for over in ("edges", "in", "out")
    for words, more in (
        ((), {}),
        (("token",), {"token": True}),
        (("restricted",), {"restrict": 1}),
        (("holes",), {"networks": (HOLES,)}),
        (("holes", "restricted"), {"networks": (HOLES,), "restrict": 1}),
        (("loops",), {"networks": (LOOPS,)}),
    )
)
VALUES = (
    PLAIN.but("values-as-they-are", multiply=False, add=False),
    PLAIN.but("values-times", add=False, over="edges"),
    PLAIN.but("values-plus", multiply=False, over="in"),
    PLAIN.but("own-scale", attention_scale=None),
    PLAIN.but("negative-scale", attention_scale=-0.7),
)
SIZES = tuple(
    PLAIN.but(f"D{d}-H{h}-dk{dk}-dv{dv}-heads{heads}", networks=(mlp(3, 14, 2),), width=d, hidden=h, dk=dk, dv=dv, heads=heads, node_width=x, scale=scale, norm=(d > 1, d > 1))
    for d, h, dk, dv, heads, x, scale in (
        (1, 1, 1, 1, 1, 1, 0.5), (3, 17, 3, 1, 2, 1, 0.4), (17, 3, 17, 3, 3, 3, 0.3), (16, 32, 16, 16, 4, 8, 0.25), (64, 17, 130, 64, 1, 17, 0.12), (130, 64, 64, 130, 1, 64, 0.08),
        (1, 130, 1, 2, 7, 130, 0.2), (8, 8, 8, 8, 5, 8, 0.3), (33, 16, 5, 32, 2, 4, 0.2),
    )
) + (
    PLAIN.but("tiles-and-tails", networks=(mlp(3, 71, 53, 2),), over="all", **ONE),
    PLAIN.but("tiles-and-tails-edges", networks=(mlp(49, 70, 7, reverse=True),), over="edges", reciprocal=True, **ONE),
    PLAIN.but("tiles-without-edges", networks=(Network((66, 3, 65), (("dense", 1, 2),)),), **ONE),
    PLAIN.but("tiles-inside-a-layer", networks=(Network((3, 67), (("dense", 0, 1), ("dense", 1, 1))),), over="edges", **ONE),
)  # fmt: skip
_AFTER = {
    "residual": (True, True, False),
    "reverse": (True, False, True),
    "nodes": (False, True, False),
    "norm": (True, False, True),
    "closed": True,
}
MEMORY = tuple(
    PLAIN.but("-".join(["memory", *(p or "none" for p in policy), over, *words]), memory=policy, over=over, **{**_AFTER, **more})
    for k, (policy, words, more) in enumerate((
        (("same", None, None), (), {}),
        ((None, "virtual", None), (), {}),
        (("virtual", "same", None), ("both",), {"reciprocal": True}),
        (("same", "virtual", None), ("reversed",), {"networks": REVERSED, "reciprocal": True}),
        ((None, None, "virtual+virtual"), ("fourier",), {"encoder": "fourier"}),
        ((None, "same", None), ("token",), {"token": True}),
        (("virtual", None, "virtual"), ("token", "layer0"), {"token": True, "restrict": 0}),
        (("same+virtual", None, "same"), ("token", "layer-1"), {"token": True, "restrict": -1, "encoder": "fourier"}),
        ((None, "virtual", None), ("loops",), {"networks": (LOOPS, DIAGONALS), "affine": True}),
        ((None, "same", None), ("loops",), {"networks": (LOOPS, DIAGONALS)}),
        (("virtual", None, None), ("packed",), {"networks": UNEQUAL, "packed": True, "token": True}),
        (("same", None, "virtual"), ("packed",), {"networks": UNEQUAL, "packed": True}),
        (("virtual", "virtual", None), ("no-self",), {"include_self": False, "networks": (HOLES,)}),
        ((None, None, "same"), ("messages",), {"reduce": ("mean", "max")}),
        ((None, None, "virtual"), ("messages",), {"reduce": ("mean", "max")}),
    ))
    for over in (("edges", "in", "out")[k % 3], ("edges", "in", "out")[(k + 1) % 3])
)  # fmt: skip
OPTIONS = (*ENCODERS, *UPDATES, *CONSUMERS, *GRAPHS, *ALONE, *VALUES, *SIZES, *MEMORY)

# with autocast to bfloat16
LOW_PRECISION = tuple(
    s.but(f"low-{s.name}", networks=(mlp(3, 16, 11, 2, reverse=s.networks[0].reverse),), width=16, hidden=24, dk=8, dv=16, node_width=8, scale=0.3)
    for s in (PLAIN, PLAIN.but("edges", over="edges", reciprocal=True), ENCODERS[8], TABLES[1], UPDATES[3], PLAIN.but("messages", reduce=("sum", "std")))
)  # fmt: skip

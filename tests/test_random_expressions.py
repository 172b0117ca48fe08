"""Expressions drawn at random from all the options together, against the oracle in float64."""

from __future__ import annotations

import random

import pytest
import torch
from compare import assert_close
from oracle import Network
from samples import Sample, cast, leaves, run_engine, run_oracle

pytestmark = pytest.mark.usefixtures("one_thread")


def draw_network(r: random.Random, reverse: bool) -> Network:
    """Two to four layers, most of them joined to the next, and some more blocks and edges anywhere."""
    layers = tuple(r.choice((1, 2, 3, 5, 7, 13, 20, 49)) for _ in range(r.randint(2, 4)))
    n = len(layers)
    blocks = [("dense", k, k + 1) for k in range(n - 1) if r.random() < 0.9]
    blocks += [(r.choice(("dense", "diagonal")), r.randrange(n), r.randrange(n)) for _ in range(r.randint(0, 2))]
    for src, dst in [(r.randrange(n), r.randrange(n)) for _ in range(r.choice((0, 0, 1, 2)))]:
        edges = tuple((r.randrange(layers[src]), r.randrange(layers[dst])) for _ in range(r.choice((0, 1, 9, 60))))
        blocks.append(("sparse", src, dst, edges))
    return Network(layers, tuple(blocks or [("dense", 0, n - 1)]), r.randint(1, 3), reverse)


def draw(seed: int) -> Sample:
    r = random.Random(seed)
    reverse, packed, updates = r.random() < 0.4, r.random() < 0.3, r.randint(0, 3)
    networks = tuple(draw_network(r, reverse) for _ in range(r.choice((1, 1, 2, 3))))
    restrict = r.choice((None, None, -1, r.randrange(min(len(n.layers) for n in networks))))
    return Sample(
        f"seed-{seed}",
        networks=networks,
        channels=r.choice((1, 1, 2, 5)),
        width=r.choice((1, 4, 5, 8, 16, 17)),
        hidden=r.choice((1, 7, 16, 19)),
        features=r.choice((1, 4, 8, 9, 16, 17)),
        node_width=r.choice((1, 3, 8, 13)),
        encoder=r.choice(("linear", "fourier", "identity")),
        reciprocal=r.random() < 0.4,
        table=r.choice(("auto", "never")),
        table_range=r.choice((None, None, 0.3)),
        layers=r.choice((0, 0, 1, 2)),
        residual=tuple(r.random() < 0.5 for _ in range(updates)),
        activation=r.choice(("silu", "relu", "gelu", "tanh", "sigmoid", "leaky_relu", "identity")),
        kind=r.choice(("film", "gate", "product", "concat")),
        mlp=r.choice((0, 0, 1, 2)),
        reduce=tuple(r.sample(("sum", "mean", "min", "max", "std", "var"), r.randint(1, 6))),
        head=r.choice((0, 1, 2)),
        head_nodes=r.random() < 0.5,
        memory=tuple(r.choice((None, None, "virtual", "same", "virtual+same", "same+virtual")) for _ in range(updates)),
        restrict=restrict,
        affine=not packed and r.random() < 0.3,
        packed=packed,
        bias=r.random() < 0.8,
        scale=r.choice((0.3, 0.5)),
    )


def check(seed: int, backend: str) -> None:
    sample = draw(seed)
    t = leaves(sample, seed)
    assert_close(run_engine(sample, t, backend), run_oracle(sample, t), 1e-9)
    low = run_engine(sample, cast(t, torch.float32), backend)  # a look for what should never come out; budgets are tested elsewhere
    assert all(v.isfinite().all() for v in low.values()), [n for n, v in low.items() if not v.isfinite().all()]


@pytest.mark.parametrize("seed", [*range(60), 1002])  # 1002: a block without edges beside one that nothing reads
def test_random_expressions(seed: int, backend: str):
    check(seed, backend)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 4000, 100))
def test_many_random_expressions(first: int, backend: str):
    for seed in range(first, first + 100):
        check(seed, backend)

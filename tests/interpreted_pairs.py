"""The Triton kernels in Triton's interpreter: attention and pair updates against the dense formulas.

In a process of its own (test_triton_interpreter.py).
"""

from __future__ import annotations

import pair_samples
import pytest
import torch
from compare import assert_bitwise, assert_close
from interpreted import seeded, slow, tiered
from oracle import Network, mlp
from pair_list import GRID, NO_UPDATE, ONE, OPTIONS, PLAIN, TABLES
from pair_samples import PairSample
from samples import cast, named, run
from test_attend import assert_budget_of_pairs
from test_cuda_pairs import SHAPES
from test_random_expressions import check_pairs

import ngkernels as ngk

pytestmark = pytest.mark.usefixtures("one_thread")
# One of each kind in the quick tier; all in the slow one.
QUICK = (
    "three-updates", "affine-diagonals", "messages-reversed", "readout-packed", "messages-diagonals", "loops-in-layer0-token", "packed-in-restricted",
    "no-self-edges-holes-restricted", "sparse-edges", "sparse-no-self", "sparse-hub", "messages-sparse", "values-plus", "D33-H16-dk5-dv32-heads2", "pair-update-first", "memory-same+virtual-none-same-in-token-layer-1",
)  # fmt: skip


@pytest.mark.parametrize("sample", tiered((*OPTIONS, *GRID, *SHAPES), QUICK))
def test_attention_and_pair_updates_in_float64(sample: PairSample):
    assert_close(pair_samples.run_engine(sample, pair_samples.leaves(sample), "triton"), pair_samples.float64_oracle(sample), 1e-10)

@pytest.mark.parametrize("sample", tiered((*TABLES, *OPTIONS[::7]), ("table-both",)))
def test_attention_in_float32_within_twice_the_error_of_plain_pytorch(sample: PairSample):
    wanted, plain = pair_samples.float32_oracle(sample)
    assert_budget_of_pairs(pair_samples.run_engine(sample, cast(pair_samples.leaves(sample), torch.float32), "triton"), wanted, plain, 8e-6)

@pytest.mark.parametrize("seed", seeded(6, 100))
def test_drawn_at_random(seed: int):
    check_pairs(seed, "triton")


def test_weights_of_any_strides_and_dtypes():
    """Each block has its own."""
    sample = PLAIN.but("mixed", networks=(mlp(2, 5, 3),), over="edges", **ONE)
    t = cast(pair_samples.leaves(sample), torch.float32)
    t["weights.0"] = t["weights.0"].bfloat16().transpose(1, 2).contiguous().transpose(1, 2)
    t["weights.1"] = t["weights.1"][:, :, :1].expand_as(t["weights.1"]).half()
    wanted, plain = pair_samples.run_oracle(sample, cast(t, torch.float64)), pair_samples.run_oracle(sample, cast(t, torch.float32))
    found = pair_samples.run_engine(sample, t, "triton")
    assert all(found[f"grad.weights.{k}"].dtype == t[f"weights.{k}"].dtype for k in range(2))
    assert_budget_of_pairs(cast(found, torch.float32), wanted, plain, 2**-7)


MANY_HEADS = (
    PLAIN.but("31-heads", networks=(mlp(2, 3),), heads=31, dk=1, dv=3, width=4, **ONE),
    PLAIN.but("256-heads", networks=(mlp(2, 3),), heads=256, dk=1, dv=1, width=4, **NO_UPDATE),
    PLAIN.but("heads-of-256", networks=(mlp(2, 3),), heads=2, dk=256, dv=130, width=9, scale=0.1, **NO_UPDATE),
)


@pytest.mark.parametrize("sample", **named(MANY_HEADS))
def test_numbers_and_widths_of_heads(sample: PairSample):
    assert_close(pair_samples.run_engine(sample, pair_samples.leaves(sample), "triton"), pair_samples.float64_oracle(sample), 1e-10)


@pytest.mark.parametrize("rate", [0.3, pytest.param(0.9, marks=slow)])
def test_dropout_drops_what_every_backend_drops(rate: float):
    sample = PLAIN.but("dropout", dropout=rate)
    t = pair_samples.leaves(sample)
    results = []
    for backend in ("reference", "triton"):
        with ngk.use_backend(backend):
            results.append(run(lambda live: [pair_samples.attend(sample, live, pair_samples.pair_state(sample, live), seed=-(1 << 40) + 12345)], t))
    assert_close(results[1], results[0], 1e-10)

SPARSE_PAIRS = Network((3, 30), (("sparse", 0, 1, tuple((k % 3, k) for k in range(26)) + ((0, 1), (2, 0))), ("sparse", 1, 1, ((3, 3), (4, 5), (5, 4), (0, 29)))))
TILES = (
    PLAIN.but("triangle", networks=(mlp(2, 35, 3),), residual=(False,), reverse=(True,), nodes=(True,), norm=(False,)),
    PLAIN.but("sparse", networks=(SPARSE_PAIRS,), over="in", residual=(False,), reverse=(True,), nodes=(True,), norm=(False,)),
)

@pytest.mark.parametrize("sample", **named(TILES))
def test_attention_in_tiles_as_on_a_gpu(sample: PairSample, monkeypatch):
    """Small tiles, and partial results in many pieces."""
    monkeypatch.setattr("ngkernels._triton.launch.INTERPRETED", 64)
    monkeypatch.setattr("ngkernels._triton.launch.BUDGET", 1)
    monkeypatch.setattr("ngkernels._triton.launch.MOST_TILES", 0)
    assert_close(pair_samples.run_engine(sample, pair_samples.leaves(sample), "triton"), pair_samples.float64_oracle(sample), 1e-10)

@pytest.mark.parametrize("sample", **named((PLAIN.but("edges", over="edges", networks=(mlp(2, 5, 3),)),)))
def test_attention_run_to_run(sample: PairSample):
    t = cast(pair_samples.leaves(sample), torch.float32)
    assert_bitwise(pair_samples.run_engine(sample, t, "triton"), pair_samples.run_engine(sample, t, "triton"))

def test_only_the_gradient_of_queries():
    sample = PLAIN.but("queries", networks=(mlp(2, 3),))
    found = pair_samples.run_engine(sample, pair_samples.leaves(sample), "triton", {"attend.q"})
    assert_close(found, {n: v for n, v in pair_samples.float64_oracle(sample).items() if n in ("out.0", "grad.attend.q")})

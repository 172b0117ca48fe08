"""The CUDA kernels on a device: what their emulation cannot tell. Run by `make gpu`; elsewhere left out, and so counted."""

from __future__ import annotations

import pair_samples
import pytest
import torch
from compare import assert_bitwise, assert_budget
from oracle import mlp
from pair_list import LOW_PRECISION as PAIR_LOW
from pair_list import OPTIONS
from pair_samples import PairSample
from sample_list import LOW_PRECISION, PLAIN, SAMPLES
from samples import Sample, cast, float32_oracle, leaves, named, run_engine, run_oracle
from test_attend import assert_budget_of_pairs
from test_cuda_pairs import SHAPES, missing, one_logit
from test_triton_device import RUNS

from ngkernels import backends

pytestmark = pytest.mark.gpu
SUPPORTED = tuple(s for s in SAMPLES if 130 not in (s.width, s.hidden, s.features))
SMALL = tuple(s for s in SAMPLES if s.name in ("plain", "table-residual-first", "sparse-unequal", "fourier-reciprocal", "memory-virtual-same"))
LARGE = tuple(
    PLAIN.but(f"width-{w}", networks=(mlp(3, 171, 153, 2),), width=w, hidden=w, features=w, node_width=w, residual=(True, False, True), memory=(), scale=1 / w, head=0)
    for w in (16, 32, 64, 128)
)


@pytest.fixture(autouse=True)
def _built() -> None:
    reason = backends.why_not("cuda", torch.device("cuda"))
    assert reason is None, reason


@pytest.mark.parametrize("sample", **named(SMALL))
def test_under_the_sanitizer(sample: Sample):
    wanted, plain = float32_oracle(sample)
    assert_budget(run_engine(sample, cast(leaves(sample), torch.float32), "cuda"), wanted, plain, 8e-6)


@pytest.mark.parametrize("sample", **named(SUPPORTED))
def test_float32_within_twice_the_error_of_plain_pytorch(sample: Sample):
    wanted, plain = float32_oracle(sample)
    assert_budget(run_engine(sample, cast(leaves(sample), torch.float32), "cuda"), wanted, plain, 8e-6)


@pytest.mark.parametrize("sample", **named(LOW_PRECISION))
def test_bfloat16_operands_within_twice_the_error_of_plain_autocast(sample: Sample):
    t = cast(leaves(sample), torch.float32)
    wanted, plain = run_oracle(sample, cast(t, torch.float64)), run_oracle(sample, t, low=True)
    assert_budget(run_engine(sample, t, "cuda", autocast=torch.bfloat16), wanted, plain, 2**-8)


@pytest.mark.parametrize("sample", **named(LARGE))
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["exact", "bf16"])
def test_run_to_run(sample: Sample, autocast: torch.dtype | None):
    t = cast(leaves(sample), torch.float32)
    first = run_engine(sample, t, "cuda", autocast=autocast)
    for _ in range(RUNS):
        assert_bitwise(run_engine(sample, t, "cuda", autocast=autocast), first)


@pytest.mark.parametrize("sample", **named(LARGE))
def test_every_width_against_the_oracle(sample: Sample):
    wanted, plain = float32_oracle(sample)
    assert_budget(run_engine(sample, cast(leaves(sample), torch.float32), "cuda"), wanted, plain, 8e-6)


# ---- attention, pair updates, layer norms, tokens ----
PAIRS = tuple(s for s in (*OPTIONS, *SHAPES) if not missing(s) and not one_logit(s))


@pytest.mark.parametrize("sample", **named(PAIRS))
def test_pairs_within_twice_the_error_of_plain_pytorch(sample: PairSample):
    wanted, plain = pair_samples.float32_oracle(sample)
    assert_budget_of_pairs(pair_samples.run_engine(sample, cast(pair_samples.leaves(sample), torch.float32), "cuda"), wanted, plain, 8e-6)


@pytest.mark.parametrize("sample", **named(PAIR_LOW))
def test_pairs_with_bfloat16_operands(sample: PairSample):
    t = cast(pair_samples.leaves(sample), torch.float32)
    wanted, plain = pair_samples.run_oracle(sample, cast(t, torch.float64)), pair_samples.run_oracle(sample, t, low=True)
    found = pair_samples.run_engine(sample, t, "cuda", autocast=torch.bfloat16)
    assert_budget_of_pairs(found, wanted, plain, 2**-8)
    assert_bitwise(pair_samples.run_engine(sample, t, "cuda", autocast=torch.bfloat16), found)

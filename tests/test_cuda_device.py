"""The CUDA kernels on a device: what their emulation cannot tell. Run by `make gpu`; elsewhere left out, and so counted."""

from __future__ import annotations

import pytest
import torch
from compare import assert_bitwise, assert_budget
from oracle import mlp
from sample_list import LOW_PRECISION, PLAIN, SAMPLES
from samples import Sample, cast, float32_oracle, leaves, named, run_engine, run_oracle

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
    reason = backends.why_not("cuda", torch.device("cuda"), "aggregate")
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
    assert_bitwise(run_engine(sample, t, "cuda", autocast=autocast), run_engine(sample, t, "cuda", autocast=autocast))


@pytest.mark.parametrize("sample", **named(LARGE))
def test_every_width_against_the_oracle(sample: Sample):
    wanted, plain = float32_oracle(sample)
    assert_budget(run_engine(sample, cast(leaves(sample), torch.float32), "cuda"), wanted, plain, 8e-6)

"""Recorded models of the reference code on a GPU: logits and every gradient. Run by `make gpu`; elsewhere left out, and so counted."""

from __future__ import annotations

import pytest
import torch
from golden_cases import MODELS, check_model

from ngkernels import backends

# Triton takes minutes to compile a kernel of NG-T.
CASES = [(name, on, dtype) for name in MODELS for on, dtype in (("triton", torch.float64), ("triton", torch.float32), ("cuda", torch.float32))]


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "on", "dtype"), [pytest.param(*case, marks=[pytest.mark.slow] * ("ngt" in case[0] and case[1] == "triton")) for case in CASES], ids=lambda x: str(x))
def test_models(name: str, on: str, dtype: torch.dtype):
    """To 1e-10 in float64, which the CUDA kernels do not have."""
    reason = backends.why_not(on, torch.device("cuda"))
    assert reason is None, reason
    check_model(name, on, "cuda", dtype)

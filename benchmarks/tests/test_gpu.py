"""What `python -m benchmarks.gpu` measures, on the CPU as far as it goes there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.cases import Case

gpu = pytest.importorskip("benchmarks.gpu", reason="FlexAttention is not there")
CPU = torch.device("cpu")


@pytest.mark.parametrize("plan", gpu.PLANS, ids=lambda p: p.model.name)
def test_every_model_agrees_with_its_baseline(plan: gpu.Plan):
    case = Case.parse("2x8x8x3@2")
    oracle = plan.model.new_oracle(case)
    contender = gpu.Contender(replace(gpu.OURS[0], backend="reference"), "fp32")
    true = gpu.truth(plan.model, case, oracle, CPU)
    error = (gpu.step_of(plan.model, contender, case, oracle, CPU)().double() - true).norm() / true.norm()
    assert error < gpu.LIMITS["fp32"]
    if plan.width:
        assert oracle.d_hid == plan.width


def test_the_layouts_that_are_claimed_about_are_measured():
    (sparse, wide, _) = gpu.PLANS
    assert "2x2048x4096x3" in sparse.quick.split(",") and sparse.width == 32 and wide.width == 64 and "pyg-tuned-compile" in sparse.rivals
    assert {(large.name, large.backend) for large in gpu.LARGE} >= {("ng-gnn", "cuda"), ("ng-t-edges", "cuda")}
    assert all(sum(a * b for a, b in zip(large.layout, large.layout[1:])) > 999_000_000 for large in gpu.LARGE)


@pytest.fixture
def no_device(monkeypatch):
    """What is asked of a GPU, answered."""
    monkeypatch.setattr(gpu, "event_seconds", lambda step, samples: [float(step() is not None)] * samples)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5)
    return lambda free: monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 1 << 40))


def test_a_large_step_is_measured(no_device):
    no_device(1 << 40)
    found = gpu.measure_large(replace(gpu.LARGE[0], backend="reference", layout=(2, 7, 6, 3)), CPU)
    assert found["median"] == 1.0 and found["peak_bytes"] == 5 and found["edges"] == 2 * 7 + 7 * 6 + 6 * 3 and found["planned_bytes"] > 1000, found
    assert gpu.line_of(found).startswith("ng-gnn ")


@pytest.mark.parametrize("large", gpu.LARGE, ids=lambda large: f"{large.name}-{large.backend}")
def test_a_large_step_says_why_it_is_left_out(large: gpu.Large, no_device):
    no_device(10)
    assert gpu.measure_large(replace(large, layout=(2, 70, 60, 3)), CPU)["failed"].startswith("MemoryError: planned ")

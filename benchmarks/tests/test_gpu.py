"""What is measured on a GPU, as far as it goes without one."""

from __future__ import annotations

import pytest
import torch

from benchmarks import gpu, gpu_large
from benchmarks.cases import Case
from benchmarks.models import nggnn_of
from benchmarks.providers import PROVIDERS, Provider, Runner

CPU = torch.device("cpu")
OURS = (Provider("ngk-reference", "ngkernels, plain PyTorch", backend="reference"),)
RATES = {name: dict.fromkeys(("mma", "fp32", "special", "memory"), 1e9) for name in gpu.LIMITS}


def on_cpu(step, device, samples):
    """In place of `timed`."""
    return [step() is None or 1.0] * samples, 1 << 20


@pytest.fixture
def small(monkeypatch):
    """Every plan on a network of a few neurons, with backends that a CPU has."""
    for name, value in (("OURS", OURS), ("timed", on_cpu), ("captured", lambda step, device: step), ("PLANS", tuple(gpu.replace(p, quick="2x4x6x3@2", rivals=p.rivals[:1]) for p in gpu.PLANS))):
        monkeypatch.setattr(gpu, name, value)
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def test_layouts():
    for plan in gpu.PLANS:
        quick, every = ([Case.parse(text) for text in layouts.split(",")] for layouts in (plan.quick, plan.layouts))
        assert set(quick) <= set(every)
    nggnn, wide, _ = gpu.PLANS
    assert "2x2048x4096x3" in nggnn.quick and "pyg-tuned-compile" in nggnn.rivals and (nggnn.columns, wide.columns) == (32, 64)
    assert all(0.99e9 < Case(gpu_large.LAYOUT).edges < 1.01e9 and Case(s.quick).edges > 0.99e8 for s in gpu_large.SUBJECTS)


def test_each_contender_of_each_plan_is_measured(small):
    pytest.importorskip("benchmarks.gpu_rates", reason="Triton is not installed")
    found = list(gpu.measure_models(RATES, CPU, True, 2))
    assert [f for f in found if "failed" in f] == []
    assert {f["contender"] for f in found} == {*(f"ngk-reference-{p}{c}" for p in gpu.LIMITS for c in ("", "-captured")), "pyg-tuned-tf32", "dense-tf32"}
    assert len(found) == 7 * len(gpu.PLANS) and all(f["error"] < gpu.LIMITS[f["precision"]] and len(f["seconds"]) == 2 for f in found)
    shares = {f["model"]: f["share"] for f in found if f["contender"] == "ngk-reference-fp32" and "share" in f}
    assert set(shares) == {"ng-gnn", "ng-gnn-64"} and shares["ng-gnn-64"] > 1.9 * shares["ng-gnn"]
    assert all(f["model"] in gpu.line_of(f) and "1000.000 ms" in gpu.line_of(f) for f in found)


def test_the_gate_stops_a_wrong_model(small):
    plan, case = gpu.PLANS[0], Case.parse("2x4x6x3@2")
    oracle = plan.model.new_oracle(case)
    true = gpu.truth(plan.model, case, oracle, CPU)
    found = gpu.measure(plan.model, gpu.Contender(OURS[0], "fp32"), case, oracle, 1.1 * true, CPU, 1)
    assert "gate: expected a relative error of at most" in found["failed"] and "median" not in found and gpu.is_wrong(found)


def test_a_rival_without_memory_is_a_result():
    assert not gpu.is_wrong({"contender": "pyg-tuned-tf32", "failed": "OutOfMemoryError: CUDA out of memory"})
    assert gpu.is_wrong({"contender": "pyg-tuned-tf32", "failed": "RuntimeError: no"})
    assert gpu.is_wrong({"contender": "ngk-cuda-tf32", "failed": "OutOfMemoryError: CUDA out of memory"})
    assert not gpu.is_wrong({"contender": "ngk-cuda-bf16", "skipped": "needs more"})


def test_wide_states_of_ours_and_of_the_baseline():
    model, case = nggnn_of(64), Case((2, 5, 3))
    oracle = model.new_oracle(case)
    assert oracle.d_hid == Runner(model, PROVIDERS["pyg-tuned"], case, oracle).model.d_hid == 64
    assert model.work(case, True).flops > 3.9 * gpu.MODELS["ng-gnn"].work(case, True).flops


# ---- a billion edges ----
def test_too_little_memory_is_said():
    for subject in gpu_large.SUBJECTS:
        if subject.backend == "cuda":
            found = gpu_large.measure(subject, (2, 40, 30, 3), CPU, 1 << 10, 1)
            assert "1,370 edges needs" in found["skipped"] and "and 1.0 KiB are free" in gpu.line_of(found) and found["planned_bytes"] > 1 << 10


@pytest.mark.parametrize("model", ["ng-gnn", "ng-t-edges"])
def test_a_step_with_bfloat16_weights(model: str, monkeypatch):
    monkeypatch.setattr(gpu_large, "needed", lambda subject, layout: 1 << 20)
    found = gpu_large.measure(gpu_large.Subject(model, "reference"), (2, 12, 9, 3), CPU, 1 << 30, 2, on_cpu)
    assert found["seconds"] == [1.0, 1.0] and found["peak_bytes"] == 1 << 20 and found["weight_dtype"] == "bf16" and "MiB" in gpu.line_of(found)
    step = gpu_large.step_of(gpu_large.Subject(model, "reference"), (2, 12, 9, 3), CPU)
    assert step().gt(0).all()


@pytest.mark.slow
@pytest.mark.parametrize("subject", gpu_large.SUBJECTS, ids=lambda s: f"{s.model}-{s.backend}")
def test_a_billion_edges_fit_a_gpu_of_16_gib(subject: gpu_large.Subject):
    assert 4 * Case(gpu_large.LAYOUT).edges < gpu_large.needed(subject, gpu_large.LAYOUT) < 16 << 30

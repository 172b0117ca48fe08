"""Which GPU backend runs where none is forced: the one that measured faster, by a table that `python -m ngkernels.tune` writes."""

from __future__ import annotations

import json
from pathlib import Path

import emulation
import pytest
import torch
from emulation import emulated  # noqa: F401  a fixture

import ngkernels as ngk
from ngkernels import backends, measured, tune
from ngkernels.ops import faster
from ngkernels.ops.faster import Shape

pytestmark = [pytest.mark.usefixtures("one_thread", "emulated"), pytest.mark.skipif(not emulation.compiler(), reason="no C++ compiler")]
CPU = torch.device("cpu")


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """Which kernels calls asked for, on CPU tensors that are taken for those of a GPU of capability 9.0 with both backends."""
    asked: list[str] = []
    choose = faster.kernels

    def spy(*args):
        found = choose(*args)
        asked.append(found.__name__.rpartition("._")[2])
        return faster._cuda  # the emulated one can run here whatever is chosen

    monkeypatch.delenv("NGKERNELS_BACKEND", raising=False)
    monkeypatch.setattr(backends, "choose", lambda op, device: backends.BACKENDS.index(backends.forced() or "triton"))
    monkeypatch.setattr(measured, "capability_of", lambda device: (9, 0))
    monkeypatch.setattr(faster, "kernels", spy)
    return asked


@pytest.fixture
def file(monkeypatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("NGKERNELS_FASTER", str(tmp_path / "faster.json"))
    yield tmp_path / "faster.json"
    faster.table.cache_clear()


def run(paired: bool, columns: int = 16, attention: bool = True) -> None:
    graph = ngk.NeuralGraph.mlp([5, 4, 3])
    g = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).requires_grad_()

    x, square = leaf(12, columns), [leaf(columns, columns) for _ in range(6)]
    edges = ngk.EdgeState(graph, [leaf(1, 5, 4, 1), leaf(1, 4, 3, 1)], ngk.encoders.Linear(leaf(columns, 1), leaf(columns)))
    edges = edges.update(x, square[0], square[1], square[2], None, square[3], None, activation="silu", **({"weight_reverse": square[4]} if paired else {}))
    if paired and attention:
        out = ngk.attend(edges, x, x, x, square[0], square[1], heads=2, over="edges")
    else:
        out = ngk.aggregate(edges, ngk.Message.gate(x, square[4], None, square[1], square[2]), ("mean",))
    torch.autograd.grad(out.sum(), square[0])


@pytest.mark.parametrize(("purpose", "paired", "attention"), [("messages", False, False), ("options", True, False), ("attend", True, True)])
def test_the_faster_one_runs_both_ways(purpose: str, paired: bool, attention: bool, ran: list[str], file: Path):
    run(paired, attention=attention)
    assert ran == ["triton", "triton"]  # nothing is measured
    faster.write(file, (9, 0), {Shape(purpose, 16, True): "cuda"})
    ran.clear()
    run(paired, attention=attention)
    assert ran == ["cuda", "cuda"]
    ran.clear()
    with torch.autocast("cpu", torch.bfloat16):  # another class
        run(paired, attention=attention)
    assert ran == ["triton", "triton"]
    ran.clear()
    run(paired, 20, attention)
    assert ran == ["triton", "triton"]


def test_what_is_forced_runs(ran: list[str], file: Path):
    faster.write(file, (9, 0), {Shape("messages", 16, True): "cuda"})
    with ngk.use_backend("triton"):
        run(False)
    assert ran == ["triton", "triton"]


def test_another_architecture_and_what_cuda_does_not_run(ran: list[str], file: Path):
    faster.write(file, (8, 0), {Shape("messages", 16, True): "cuda"})
    run(False)
    faster.write(file, (9, 0), {Shape("messages", 64, True): "cuda"})
    run(False, 16)
    assert set(ran) == {"triton"}
    assert {tuple(r["capability"]) for r in json.loads(file.read_text())} == {(8, 0), (9, 0)}


def test_without_the_cuda_kernels_triton_runs(ran: list[str], file: Path, monkeypatch):
    faster.write(file, (9, 0), {Shape("messages", 16, True): "cuda"})
    monkeypatch.setattr(backends, "why_not", lambda backend, device=None: "it was not built" if backend == "cuda" else None)
    run(False)
    assert ran == ["triton", "triton"]


def test_what_triton_would_spill_runs_on_the_cuda_kernels(ran: list[str], file: Path, monkeypatch):
    x, m = torch.randn(9, 16, requires_grad=True), torch.randn(16, 16) / 16
    edges = ngk.EdgeState(ngk.NeuralGraph.mlp([4, 5]), [torch.randn(1, 4, 5, 1)], ngk.encoders.Linear(m[:, :1], m[0]))
    pairs = edges.update(x, m, m, m, None, m, None, residual=True, weight_reverse=m).update(None, m, None, None, None, m, None, residual=True)

    def attended(heads: int, columns: int) -> None:
        q, wide = torch.randn(9, columns), torch.randn(columns, 16) / 16
        ngk.attend(pairs, q, q, q, wide, wide, heads=heads, over="edges").sum().backward()

    attended(2, 16)  # on a CPU there is nothing to choose
    assert set(ran) == {"triton"}
    ran.clear()
    monkeypatch.setattr(backends, "kind_of", lambda device: "cuda")
    monkeypatch.setattr(backends, "why_not", lambda backend, device=None: None)
    attended(2, 16)
    assert set(ran) == {"cuda"}
    ran.clear()
    with pytest.raises(NotImplementedError, match="registers of 130 columns"):  # the emulated kernels, which stand in for Triton's
        attended(1, 130)
    assert set(ran) == {"triton"}
    with ngk.use_backend("triton"):
        attended(2, 16)
    assert set(ran) == {"triton"}


@pytest.mark.parametrize("text", ["{", '[{"capability": [9, 0]}]', '[{"capability": [9, 0], "purpose": "messages", "columns": 17, "exact": true, "backend": "cuda"}]', '[{"capability": [9, 0], "purpose": "messages", "columns": 16, "exact": true, "backend": "cpp"}]'])
def test_a_malformed_file_is_an_error(text: str, file: Path):
    file.write_text(text)
    with pytest.raises(ValueError, match=r"expected records of capability, purpose, .* in .*faster.json, got .*; write it with python -m ngkernels.tune"):
        faster.table(file)


def test_both_are_measured_for_every_class(monkeypatch):
    """With a clock on which the CUDA kernels win where products are rounded."""
    monkeypatch.setattr(tune, "step_of", lambda columns, paired, device, attention: (columns, paired, attention))

    def clock(step) -> float:
        low = torch.is_autocast_enabled("cpu")
        return 1.0 if (backends.forced() == "cuda") == low else 2.0

    found = dict(tune.compared(CPU, clock))
    assert found == {Shape(p, c, exact): "triton" if exact else "cuda" for p in ("messages", "options", "attend") for c in (16, 32, 64) for exact in (False, True)}
    monkeypatch.undo()
    assert {faster.shape_of(e, True, a) for e, a in measured_expressions()} == {s for s in found if s.exact and s.columns == 16}


def measured_expressions() -> list[tuple]:
    """The expressions of tune's steps of 16 columns: of the class that their time is written for."""
    seen: list[tuple] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faster, "kernels", lambda e, compute, attention=None: seen.append((e, attention)) or faster._cuda)
        patch.setattr(torch.autograd, "grad", lambda *a, **k: None)
        small = ngk.NeuralGraph.mlp([5, 4, 3])
        patch.setattr(ngk.NeuralGraph, "mlp", lambda layers: small)
        with ngk.use_backend("cuda"):
            for purpose, paired in tune.PURPOSES.items():
                tune.step_of(16, paired, CPU, purpose == "attend")()
    return seen

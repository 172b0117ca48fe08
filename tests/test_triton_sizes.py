"""Sizes of tiles: the table, files of measured ones, and the program that measures them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import ngkernels as ngk
from ngkernels import backends, limits, tune
from ngkernels._triton import sizes
from ngkernels._triton.lower import lower
from ngkernels.ops import _triton
from ngkernels.program import Expression, build_message

GPU = torch.device("cuda", 0)
APPLIES = limits.applies  # before conftest.py lifts the limits
NARROW = sizes.Kind(32, False, False)


def lowered(width: int):
    graph, x = ngk.NeuralGraph.mlp([2, 3]), torch.zeros(5, width)
    edges = ngk.EdgeState(graph, [torch.zeros(1, 2, 3, 1)], ngk.encoders.Linear(torch.zeros(width, 1), torch.zeros(width)))
    square = torch.zeros(width, width)
    e = build_message(edges, ngk.Message.gate(x, square, None, square, square), ("sum",), True)
    return lower(e.program, [t.shape[1] for t in e.xs])


@pytest.fixture
def on_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setenv("NGKERNELS_TILES", str(tmp_path / "tiles.json"))
    return tmp_path / "tiles.json"


@pytest.mark.parametrize(("width", "precision", "kind", "size"), [
    (17, "bf16", NARROW, (16, 2)), (32, "ieee", sizes.Kind(32, True, False), (16, 2)), (33, "tf32", sizes.Kind(64, False, False), (16, 4)),
    (64, "ieee", sizes.Kind(64, True, False), (16, 8)), (65, "bf16", sizes.Kind(128, False, False), (16, 8)), (300, "float64", sizes.Kind(1 << 30, True, False), (16, 8)),
])  # fmt: skip
def test_without_a_file_the_table_is_used(on_a_gpu, width, precision, kind, size):
    assert sizes.kind_of(lowered(width), precision) == kind and sizes.size_for(lowered(width), precision, GPU) == size


def test_architectures_may_differ():
    wide = sizes.Kind(1 << 30, False, True)
    assert sizes.usual(wide, (8, 0)) == (16, 4) and sizes.usual(wide, (9, 0)) == sizes.usual(wide) == (16, 8)


@pytest.mark.parametrize(("capability", "width", "precision", "warps", "options"), [
    ((9, 0), 64, "ieee", 8, {}), ((9, 0), 65, "bf16", 8, {}), ((9, 0), 65, "ieee", 8, {"maxnreg": 255}), ((10, 0), 65, "float64", 16, {"maxnreg": 128}),
    ((8, 6), 16, "bf16", 2, {"ptx_options": "--register-usage-level=0"}), ((8, 0), 64, "bf16", 8, {"ptx_options": "--register-usage-level=0"}), ((8, 0), 65, "ieee", 4, {"maxnreg": 255, "ptx_options": "--register-usage-level=0"}),
])  # fmt: skip
def test_options_of_the_compiler(capability, width, precision, warps, options, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    low = lowered(width)
    assert sizes.compiler_options(low, precision, warps, GPU) == options
    pairs = sizes.compiler_options(low._replace(paired=True), precision, warps, GPU)
    assert pairs == ({**options, "maxnreg": 255} if warps == 8 and capability[0] == 8 else options)


def test_measured_sizes_of_this_architecture_come_first(on_a_gpu):
    sizes.write(on_a_gpu, (8, 0), {NARROW: sizes.Size(128, 16)})
    sizes.write(on_a_gpu, (9, 0), {NARROW: sizes.Size(64, 4)})
    sizes.write(on_a_gpu, (9, 0), {NARROW: sizes.Size(32, 4)})
    assert sizes.size_for(lowered(8), "bf16", GPU) == (32, 4) and sizes.size_for(lowered(40), "bf16", GPU) == (16, 4)
    assert sizes.measured(on_a_gpu)[8, 0] == {NARROW: (128, 16)}
    with sizes.forced(sizes.Size(64, 8)):
        assert sizes.size_for(lowered(8), "bf16", GPU) == (64, 8)


@pytest.mark.parametrize("text", ["{", '[{"width": 32}]', json.dumps([dict(zip(sizes.FIELDS, ([9, 0], 32, False, False, 17, 4)))])], ids=["json", "fields", "edges"])
def test_a_broken_file_is_named(on_a_gpu, text: str):
    on_a_gpu.write_text(text)
    sizes.measured.cache_clear()
    with pytest.raises(ValueError, match=r"expected records of capability, width, .* in .*tiles.json, got .*; write it with python -m ngkernels.tune"):
        sizes.size_for(lowered(8), "bf16", GPU)


def test_the_file_lies_in_the_cache_folder_unless_named(monkeypatch):
    monkeypatch.delenv("NGKERNELS_TILES", raising=False)
    assert backends.tiles_path().parts[-3:] == (".cache", "ngkernels", "tiles.json")


@pytest.mark.parametrize("paired", [False, True], ids=["messages", "attention"])
def test_what_is_measured_is_a_training_step(paired: bool, monkeypatch):
    made, mlp = [], ngk.NeuralGraph.mlp
    monkeypatch.setattr(ngk.NeuralGraph, "mlp", staticmethod(lambda layers: made.append(layers) or mlp([n // 64 for n in layers])))
    with ngk.use_backend("reference"):
        tune.step_of(16, paired, torch.device("cpu"))()
    assert made


def lowered_by(step, monkeypatch) -> list:
    """Every expression that a step's ops lower for the kernels, which do not run."""
    found = []

    def note(e: Expression, attention: tuple[int, ...] = ()) -> None:
        found.append(lower(tuple(e.program), tuple(x.shape[1] for x in e.xs), attention))

    monkeypatch.setattr(backends, "why_not", lambda *_, **__: None)
    monkeypatch.setattr(_triton, "aggregate", lambda e, compute, *out: note(e))
    monkeypatch.setattr(_triton, "aggregate_backward", lambda grad, out, aux, ties, e, compute, grads: note(e))
    monkeypatch.setattr(_triton, "attend", lambda e, compute, nodes, shape, *more: note(e, _triton._attention(nodes, shape)))
    monkeypatch.setattr(_triton, "attend_backward", lambda saved, e, compute, nodes, shape, *more: note(e, _triton._attention(nodes, shape)))
    for name in ("node_map", "node_map_backward"):
        monkeypatch.setattr(_triton, name, lambda *_: None)
    with ngk.use_backend("triton"):
        step()
    return found


@pytest.mark.parametrize(("kind", "columns"), tune.STATES.items(), ids=str)
def test_what_is_measured_is_of_the_kind_that_is_written(kind: tuple[int, bool], columns: int, monkeypatch):
    found = lowered_by(tune.step_of(columns, kind[1], torch.device("cpu")), monkeypatch)
    assert len(found) == 2 and {sizes.kind_of(low, "bf16") for low in found} == {sizes.Kind(kind[0], False, kind[1])}


def test_measured_sizes_are_written_and_then_used(on_a_gpu, monkeypatch):
    """From a clock that knows the answer to the sizes that ops take."""
    monkeypatch.setattr(tune, "step_of", lambda columns, paired, device: (columns, paired))
    asked = []

    def clock(step: tuple[int, bool]) -> float:
        size, exact = sizes.size_for(None, "", GPU), not torch.is_autocast_enabled("cpu")
        asked.append((step, exact, size))
        return 1.0 if size == sizes.Size(64, 2) and not exact else 2.0 + step[0]

    found = dict(tune.measured(torch.device("cpu"), (9, 0), clock))
    assert len(found) == 2 * len(tune.STATES) and len(asked) == len(found) * (1 + len(tune.EDGES) * len(tune.WARPS))
    for kind, size in found.items():
        assert size == (sizes.usual(kind, (9, 0)) if kind.exact else (64, 2)), kind
    assert sizes.size_for(lowered(8), "bf16", GPU) == sizes.usual(NARROW, (9, 0)) != (64, 2)
    sizes.write(on_a_gpu, (9, 0), found)
    assert sizes.size_for(lowered(8), "bf16", GPU) == (64, 2) and sizes.size_for(lowered(8), "ieee", GPU) == sizes.usual(sizes.Kind(32, True, False), (9, 0))


def test_the_quickest_size_is_kept():
    assert tune.best(["a", "b", "c", "d"], {"a": 2.0, "b": 1.0, "c": 1.0, "d": float("inf")}.get) == "b"


def test_without_a_gpu_it_says_so():
    if backends.why_not("triton", torch.device("cuda")) is None:
        pytest.skip("there is a GPU")
    done = subprocess.run([sys.executable, "-m", "ngkernels.tune"], capture_output=True, text=True)
    assert done.returncode == 2 and "the Triton kernels do not run on a GPU here: " in done.stderr


# ---- chains that would spill ----
def chain(updates: int, width: int = 128, **more) -> ngk.EdgeState:
    x, square = torch.zeros(5, width), torch.zeros(width, width)
    edges = ngk.EdgeState(ngk.NeuralGraph.mlp([2, 3]), [torch.zeros(1, 2, 3, 1)], ngk.encoders.Linear(torch.zeros(width, 1), torch.zeros(width)))
    for _ in range(updates):
        edges = edges.update(x, square, square, square, None, square, None, **more)
    return edges


@pytest.fixture
def kernels_of_a_gpu(monkeypatch):
    """The rule as on a GPU, with tensors of a CPU."""
    monkeypatch.setattr(limits, "applies", lambda edges, backend: edges.graph.closed != "all")
    monkeypatch.setattr(limits, "full", lambda edges, columns=0: limits.too_long(edges, limits.exact_products(edges), more=1))


@pytest.mark.parametrize(("width", "exact", "more", "most"), [
    (32, False, {}, 7), (33, False, {}, 7), (128, False, {}, 3), (256, False, {}, 1), (32, True, {}, 5), (64, True, {}, 3), (128, True, {}, 1),
    (32, False, {"residual": True}, 3), (128, False, {"residual": True}, 1),
])  # fmt: skip
def test_the_longest_chain_of_each_class(width, exact, more, most):
    assert not limits.too_long(chain(most, width, **more), exact) and limits.too_long(chain(most + 1, width, **more), exact)
    assert limits.too_long(chain(most, width, **more), exact, more=1) and not limits.too_long(chain(most - 1, width, **more), exact, more=1)


def test_one_pair_update_at_a_time():
    reverse = {"weight_reverse": torch.zeros(32, 32), "residual": True}
    one, square = chain(1, 32, **reverse), torch.zeros(32, 32)
    layer = one.update(None, square, None, None, None, square, None, residual=True)
    assert not limits.too_long(one, False) and limits.too_long(one, False, more=1) and limits.too_long(chain(2, 32, **reverse), False)
    assert not limits.too_long(layer, False) and limits.too_long(layer, False, more=1)
    assert limits.too_long(layer.update(None, square, None, None, None, square, None), False)


@pytest.mark.parametrize("op", ["aggregate", "readout", "checkpoint", "attend"])
def test_a_chain_that_would_spill_raises_and_says_what_to_do(op: str, kernels_of_a_gpu):
    x, square = torch.zeros(5, 128), torch.zeros(128, 128)
    calls = {
        "aggregate": lambda e: ngk.aggregate(e, ngk.Message.product(x, square, None, square, square)), "readout": lambda e: ngk.readout(e, [(square[:1], None)]),
        "checkpoint": lambda e: e.checkpoint(), "attend": lambda e: ngk.attend(e, x, x, x, square, square, heads=8, over="edges"),
    }  # fmt: skip
    with ngk.use_backend("reference"):
        calls[op](chain(1))
        with pytest.raises(NotImplementedError, match=rf"{op}: a chain of 3 updates \(exact products\) .* would spill its registers; .*edges.checkpoint\(torch.float32\)"):
            calls[op](chain(3))
        calls[op](chain(1).checkpoint(torch.float32)) if op != "attend" else None


def test_models_restart_from_a_stored_state_by_rule(kernels_of_a_gpu, monkeypatch):
    from neural_graphs.models import NGGNN

    stored, plain = [], ngk.EdgeState.checkpoint
    monkeypatch.setattr(ngk.EdgeState, "checkpoint", lambda self, store=None: stored.append(len(self.steps)) or plain(self, store))
    (*weights, b, c) = (torch.randn(2, *s, dtype=torch.float64) for s in ((2, 3, 1), (3, 1, 1), (3, 1), (1, 1)))
    biases = [b, c]
    results = []
    with ngk.use_backend("reference"):
        for memory in ("auto", "every:1"):
            torch.manual_seed(0)
            results.append(NGGNN(layout=[2, 3, 1], d_hid=130, num_layers=4, out_features=5, edge_memory=memory).double()(weights, biases))
            assert stored and max(stored) == 1, stored
        with pytest.raises(NotImplementedError, match="edge_memory='auto'"):
            NGGNN(layout=[2, 3, 1], d_hid=130, num_layers=4, out_features=5, edge_memory="recompute").double()(weights, biases)
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("exact", [False, True])
def test_ngt_restarts_after_every_layer_by_rule(exact: bool, kernels_of_a_gpu, monkeypatch):
    from neural_graphs.models import NGT

    stored, plain = [], ngk.EdgeState.checkpoint
    monkeypatch.setattr(ngk.EdgeState, "checkpoint", lambda self, store=None: stored.append(len(self.steps)) or plain(self, store))
    monkeypatch.setattr(limits, "exact_products", lambda edges: exact)
    (*weights, b, c) = (torch.randn(2, *s, dtype=torch.float64) for s in ((2, 3, 1), (3, 1, 1), (3, 1), (1, 1)))
    results = []
    with ngk.use_backend("reference"):
        for memory in ("auto", "store"):
            torch.manual_seed(0)
            results.append(NGT(layout=[2, 3, 1], num_layers=4, out_features=5, attention="edges", edge_memory=memory).double()(weights, [b, c]))
            assert stored == [2, 2], stored  # a layer is two updates; the last one has one reader
            stored.clear()
    torch.testing.assert_close(results[0], results[1])


def test_the_rule_is_for_the_triton_kernels_on_a_gpu(monkeypatch):
    monkeypatch.setattr(limits, "applies", APPLIES)
    assert limits.why_not(chain(9), "triton") is None and limits.why_not(chain(9), "cpp") is None and not limits.full(chain(9))

"""Weights on the CPU under states on a GPU, without a GPU: every op in panels of a few neurons, against the op itself."""

from __future__ import annotations

import pair_list
import pair_samples
import pytest
import sample_list
import samples
import torch
from compare import assert_close
from safetensors.torch import load_file
from test_sparse import PAIRS as SPARSE_PAIRS
from test_sparse import Relations
from test_stream import checkpoint, reader, step

import ngkernels as ngk
from neural_graphs.build import from_safetensors
from neural_graphs.models import NGGNN, NGT
from neural_graphs.tasks import embedding
from ngkernels import limits, panels
from ngkernels.ops import in_panels as in_panels_op

pytestmark = pytest.mark.usefixtures("one_thread")
MESSAGES = [s.but(s.name, head=0) for s in sample_list.SAMPLES if s.reduce and not any(s.memory) and not s.packed]
PAIRS = [s.but(s.name, head=0) for s in (*pair_list.QUICK_GRID, *pair_list.OPTIONS) if not (any(s.memory) or s.packed or s.closed) and (s.over or s.reduce)]


@pytest.fixture
def in_panels(monkeypatch):
    """in_panels(size): from now on, ops take weights in panels of so many bytes; returns the list of the panels that were evaluated."""

    def use(size: int) -> list[panels.Panel]:
        done, inside, run = [], [], in_panels_op._Job.run

        def watched(job, panel, *tensors):
            done.append(panel)
            inside.append(panel)
            try:
                return run(job, panel, *tensors)
            finally:
                inside.pop()

        monkeypatch.setattr(in_panels_op._Job, "run", watched)
        monkeypatch.setattr(panels, "needed", lambda edges: not inside and [b.kind for b in edges.graph.parts[0].blocks] != ["diagonal"])  # of biases
        monkeypatch.setattr(panels, "BYTES", size)
        return done

    return use


@pytest.mark.parametrize("size", [1, 200])
@pytest.mark.parametrize("sample", MESSAGES, ids=[s.name for s in MESSAGES])
def test_messages(sample, size: int, in_panels):
    t = samples.leaves(sample)
    wanted = samples.run_engine(sample, t, "cpp")
    done = in_panels(size)
    assert_close(samples.run_engine(sample, t, "cpp"), wanted, 1e-10)
    assert done or not wanted["out.0"].any()


@pytest.mark.parametrize("sample", PAIRS, ids=[s.name for s in PAIRS])
def test_pairs(sample, in_panels):
    t = pair_samples.leaves(sample)
    wanted = pair_samples.run_engine(sample, t, "cpp")
    done = in_panels(150)
    assert_close(pair_samples.run_engine(sample, t, "cpp"), wanted, 1e-10)
    assert done


def test_the_same_bits(in_panels):
    """Results and gradients of the weights, with panels that cut the tiles of the kernels."""
    sample = sample_list.PLAIN.but("large", networks=(sample_list.mlp(3, 171, 133, 5, copies=2, reverse=True),), head=0, encoder="fourier", table="auto")
    t = samples.cast(samples.leaves(sample), torch.float32)
    wanted = samples.run_engine(sample, t, "cpp")
    done = in_panels(40_000)
    found = samples.run_engine(sample, t, "cpp")
    same = {name for name in wanted if torch.equal(found[name], wanted[name])}
    assert len(done) > 6 and same >= {"out.0", *(name for name in wanted if name.startswith("grad.weights"))}
    assert_close(found, wanted, 2e-5)


@pytest.mark.parametrize("over", ["all", "edges", "in"])
@pytest.mark.parametrize("name", ["both-directions", "web", "beside-dense"])
def test_pairs_of_sparse_graphs(name: str, over: str, in_panels):
    r = Relations(*SPARSE_PAIRS[name], reciprocal=True)
    wanted = samples.run(lambda t: [r.masked(t, over)], r.leaves)
    done = in_panels(60)
    assert_close(samples.run(lambda t: [r.attended(t, over)], r.leaves), wanted, 1e-9)
    assert len(done) > 2


def test_every_neuron_is_in_one_panel_and_panels_are_small(monkeypatch):
    monkeypatch.setattr(panels, "BYTES", 4000)
    graph = ngk.NeuralGraph.batch([ngk.NeuralGraph.mlp([3, 50, 70, 2], 2), ngk.NeuralGraph.mlp([4, 30])])
    weights = [torch.randn(size) for size in graph.weight_shapes(1)]
    state = ngk.EdgeState(graph, weights, ngk.encoders.Identity())
    rows = torch.zeros(graph.num_nodes, 1)
    for panel in panels.cut(state, "test", False):
        panel.rows_of(rows).add_(1)
        assert sum(p.of(weights[p.weight]).numel() for p in panel.pieces) <= 1000
    assert torch.equal(rows[:, 0] > 0, graph.in_degree > 0) and rows.max() == 1


def test_long_chains_store_a_state_of_each_panel(in_panels, monkeypatch):
    sample = sample_list.PLAIN.but("chain", networks=(sample_list.mlp(3, 9, 7),), residual=(True, True, True), memory=(None,) * 3, head=0)
    t = samples.leaves(sample)
    wanted, stored = samples.run_engine(sample, t, "cpp"), []
    done = in_panels(100)
    monkeypatch.setattr(limits, "full", lambda edges: stored.append(edges) or True)
    assert_close(samples.run_engine(sample, t, "cpp"), wanted, 1e-10)
    assert len(stored) == 2 * len(done) and all(len(e.steps) == 1 for e in stored)


@pytest.mark.parametrize("model", [NGGNN, NGT], ids=["ng-gnn", "ng-t"])
def test_a_model_over_files(model, tmp_path, in_panels):
    """Weights and their gradients in files."""
    options = {"attention": "edges"} if model is NGT else {}
    path, module = checkpoint(tmp_path, (8, 90, 70, 5)), reader((8, 90, 70, 5), model, **options)
    value, parameters, weights = step(module, from_safetensors(path))
    module.zero_grad(set_to_none=True)
    done = in_panels(4096)
    found = embedding.embed(path, module, gradients=tmp_path / "g.safetensors")
    assert len(done) > 20 and not (tmp_path / "g.safetensors.next").exists()
    torch.testing.assert_close(found.values, value[0], rtol=1e-5, atol=1e-6)
    written = load_file(tmp_path / "g.safetensors")
    for k, grad in enumerate(weights):
        torch.testing.assert_close(written[f"{2 * k}.weight"], grad[0, :, :, 0].T, rtol=1e-4, atol=1e-6)
    for p, wanted in zip(module.parameters(), parameters, strict=True):
        assert (p.grad is None) == (wanted is None)
        if wanted is not None:
            torch.testing.assert_close(p.grad, wanted, rtol=1e-4, atol=1e-4)


def test_autocast_and_backend_are_those_of_the_forward(in_panels):
    """Gradients of matrices are left out: each panel's are rounded to bfloat16."""
    sample = sample_list.LOW_PRECISION[0].but("low", head=0)
    t = samples.cast(samples.leaves(sample), torch.float32)
    wanted = samples.run_engine(sample, t, "reference", autocast=torch.bfloat16)
    in_panels(200)
    found = samples.run_engine(sample, t, "reference", autocast=torch.bfloat16)
    exact = [name for name in wanted if name.startswith(("out", "grad.weights", "grad.x"))]
    assert_close({name: found[name] for name in exact}, {name: wanted[name] for name in exact}, 1e-4)


def test_what_is_not_built_says_so(in_panels, monkeypatch):
    x = torch.randn(12, 4)
    packed = ngk.NeuralGraph.batch([ngk.NeuralGraph.mlp([3, 5, 4])], packed=True)
    e = ngk.EdgeState(packed, torch.randn(35, 1), ngk.encoders.Linear(torch.randn(4, 1), torch.randn(4)))
    message = ngk.Message.product(x, torch.randn(4, 4), None, torch.randn(4, 4), torch.randn(4, 4))
    in_panels(100)
    with pytest.raises(NotImplementedError, match="aggregate: more than 100 bytes of weights on the CPU.*packed=False"):
        ngk.aggregate(e, message)
    for call in (lambda: ngk.readout(e, [(torch.randn(2, 4), None)]), lambda: e.checkpoint(torch.float32), e.checkpoint):
        with pytest.raises(NotImplementedError, match="weights on the CPU under states on a GPU are built for aggregate and attend"):
            call()


@pytest.mark.gpu
@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16"])
def test_on_a_gpu(monkeypatch, low: bool):
    """Weights in memory of the CPU; copies run beside the kernels."""
    monkeypatch.setattr(panels, "BYTES", 30_000)
    model = reader((8, 190, 170, 5)).cuda()
    weights, biases = ([torch.randn(1, *size, 1) / 10 for size in sizes] for sizes in (((8, 190), (190, 170), (170, 5)), ((190,), (170,), (5,))))
    found = []
    for device in ("cuda", "cpu"):
        leaves = [w.to(device).requires_grad_() for w in weights]
        with torch.autocast("cuda", torch.bfloat16, enabled=low):
            out = model(leaves, [b.cuda() for b in biases])
        found.append([out.cpu(), *(g.cpu() for g in torch.autograd.grad(out.sum(), leaves))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)

"""torch.compile and torch.export: whole graphs, static and dynamic, equal to eager."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compare import assert_close
from conftest import DECLARED
from oracle import mlp
from sample_list import PLAIN, PRUNED, REVERSED, UNEQUAL_REVERSED, WEB
from samples import Sample, cast, edge_state, engine, graph_of, leaves, message_of, named, run, run_engine

import ngkernels as ngk

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parent.parent
COMPILED = (
    PLAIN,
    PLAIN.but("virtual", memory=("virtual", "virtual")),
    PLAIN.but("stored", memory=("same", None)),
    PLAIN.but("reciprocal-restricted", networks=REVERSED, reciprocal=True, restrict=1, affine=True),
    PLAIN.but("packed", packed=True, networks=UNEQUAL_REVERSED),
    PLAIN.but("sparse", networks=(PRUNED, WEB)),
    PLAIN.but("fourier", encoder="fourier", channels=3),
    PLAIN.but("table", encoder="fourier", table="auto", table_range=2.0, step=8),
    PLAIN.but("table-shared", encoder="fourier", table="shared", table_range=2.0, step=8),
)


# the two backends differ in one argument of the op: the quick tier compiles for the faster one
one_backend = pytest.mark.parametrize(
    "backend", [pytest.param(b, marks=pytest.mark.slow if b == "reference" and "cpp" in DECLARED else ()) for b in DECLARED], indirect=True
)


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@one_backend
@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("sample", **named(COMPILED))
def test_compiled_without_a_break(sample: Sample, dynamic: bool, backend: str):
    """fullgraph; through AOT autograd, whose traced program runs as it stands."""
    t, graph = cast(leaves(sample), torch.float32), graph_of(sample)
    wanted = run_engine(sample, t, backend)
    with ngk.use_backend(backend):
        compiled = torch.compile(lambda live: engine(sample, live, graph), fullgraph=True, dynamic=dynamic, backend="aot_eager")
        assert_close(run(compiled, t), wanted, 1e-5)


@pytest.mark.usefixtures("dynamo")
def test_sparse_graphs_made_before(backend: str):
    """The graphs of a sparse graph's checkpoints and restrictions are made by one call outside of torch.compile."""
    sample = PLAIN.but("sparse", networks=(PRUNED, WEB), memory=("same", "virtual"), restrict=0)
    t, graph = cast(leaves(sample), torch.float32), graph_of(sample)
    with ngk.use_backend(backend):
        wanted = run(lambda live: engine(sample, live, graph), t)
        compiled = torch.compile(lambda live: engine(sample, live, graph), fullgraph=True, backend="aot_eager")
        assert_close(run(compiled, t), wanted, 1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("sample", **named(COMPILED))
def test_compiled_by_inductor(sample: Sample, backend: str):
    t, graph = cast(leaves(sample), torch.float32), graph_of(sample)
    wanted = run_engine(sample, t, backend)
    with ngk.use_backend(backend):
        assert_close(run(torch.compile(lambda live: engine(sample, live, graph), fullgraph=True), t), wanted, 1e-5)


@one_backend
@pytest.mark.usefixtures("dynamo")
def test_one_compiled_function_serves_other_sizes(backend: str):
    """Other numbers of nodes, networks and features; it may compile again, and must be right."""
    compiled = torch.compile(
        lambda e, message: ngk.aggregate(e, message, ("mean", "max")), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    with ngk.use_backend(backend):
        for s in (
            PLAIN,
            PLAIN.but("wide", node_width=9),
            PLAIN.but("deep", networks=(mlp(3, 4, 5, 2),)),
            PLAIN.but("many", networks=(mlp(2, 5, 3, copies=7),)),
        ):
            t = cast(leaves(s), torch.float32)
            e, message = edge_state(s, t), message_of(s, t)
            assert_close({"out": compiled(e, message)}, {"out": ngk.aggregate(e, message, ("mean", "max"))}, 1e-5)


@one_backend
def test_the_first_call_of_a_process_may_be_a_compiled_one(backend: str):
    program = f"""
import torch, ngkernels as ngk
torch.set_num_threads(1)
graph, w, x = ngk.NeuralGraph.mlp([2, 3]), torch.randn(1, 2, 3, 1), torch.randn(5, 2)
def f(w, x):
    e = ngk.EdgeState(graph, [w], ngk.encoders.Identity())
    return ngk.aggregate(e.restrict(-1), ngk.Message.concat(x, torch.ones(2, 1), None, torch.eye(2), torch.eye(2)), ("sum", "max"))
with ngk.use_backend("{backend}"):
    found = torch.compile(f, fullgraph=True, backend="aot_eager")(w, x)
    torch.testing.assert_close(found, f(w, x))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_exported_program_gives_the_same(backend: str):
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.graph = graph_of(PLAIN)

        def forward(self, t):
            return engine(PLAIN, t, self.graph)

    t = cast(leaves(PLAIN), torch.float32)
    with ngk.use_backend(backend), torch.no_grad():
        program = torch.export.export(Module(), (t,), strict=False)
        found, wanted = program.module()(t), engine(PLAIN, t)
    assert_close({str(k): v for k, v in enumerate(found)}, {str(k): v for k, v in enumerate(wanted)}, 1e-6)

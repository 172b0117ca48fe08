"""The measuring itself: cases, work, timing, records, tables, gate."""

from __future__ import annotations

import pytest
import torch

from benchmarks import gate, machine, memory, plots, records, report, tables, timing, work
from benchmarks.cases import Case
from benchmarks.providers import PROVIDERS, Runner, new_oracle, select
from neural_graphs.baselines.pyg_nggnn import PyGNGGNN


def test_case_counts():
    case = Case.parse("2x4x3@5", batch=9)
    assert (case.layout, case.batch, case.edges, case.last_edges, case.nodes, case.label) == ((2, 4, 3), 5, 100, 60, 45, "2x4x3@5")
    weights, biases, labels = case.inputs()
    assert [tuple(w.shape) for w in weights] == [(5, 2, 4, 1), (5, 4, 3, 1)]
    assert [tuple(b.shape) for b in biases] == [(5, 4, 1), (5, 3, 1)] and labels.shape == (5,)
    with pytest.raises(ValueError, match="expected a layout such as"):
        Case.parse("2,4,3")


def test_layouts_of_the_edge_slope_have_equal_neurons():
    for texts in (memory.EQUAL_NODES, memory.EQUAL_NODES_SMALL):
        first, *others = map(Case.parse, texts)
        assert all(case.nodes == first.nodes and first.edges > 1.5 * case.edges for case in others)


def test_flops_per_edge():
    """The counts of the folded strict scheme at width 32: [conv] -> (forward, backward)."""
    assert [work.conv_flops(layer, 32) for layer in range(4)] == [(0, 0), (4096, 12288), (6144, 18432), (8192, 24576)]
    case = Case((2, 64, 128, 3))
    todo = work.train_step(case, weight_grads=False)
    assert todo.flops == case.edges * 40960 + case.last_edges * 32768
    assert work.train_step(case, weight_grads=True).bytes > todo.bytes
    assert todo.bound_seconds(1.0, 1e30) == todo.flops


def test_interleave_takes_turns_and_finds_the_slow_one():
    turns = []
    found = timing.interleave({"a": lambda: turns.append("a"), "b": lambda: (turns.append("b"), sum(range(20_000)))}, 2, 3, 0.001)
    order = [name for k, name in enumerate(turns) if k == 0 or turns[k - 1] != name]
    assert order[:4] == ["a", "b", "a", "b"]
    assert found["b"].median > found["a"].median


def test_median_prefers_quiet_samples():
    samples = timing.Samples(1, [1.0, 2.0, 9.0, 9.0], [0.0, 0.0, 1.0, 1.0])
    assert samples.median == 1.5 and not samples.noisy
    assert timing.Samples(1, [1.0, 9.0], [0.0, 1.0]).noisy


def test_slug():
    assert machine.slug("Intel(R) Xeon(R) Processor @ 2.1GHz") == "intel-xeon-processor"


def fake_results(path, provider_medians: dict[str, float]):
    run = records.new_run()
    for provider, median in provider_medians.items():
        measurement = {
            "provider": provider, "layout": [2, 4, 3], "batch": 1, "edges": 20, "nodes": 9, "threads": 1, "dtype": "fp32", "weight_grads": True,
            "seconds": [median], "foreign_cores": [0.0], "calls_per_sample": 1, "median": median, "noisy": False, "flops": 1, "bytes": 1,
            "rates": {"copy": 1e9, "gemm_fp32": 1e9}, "bound_seconds": 1e-9, "share": 0.5, "errors": None,
        }  # fmt: skip
        records.append("train_step", run, measurement, path)


def test_table_shows_gains_and_losses(tmp_path):
    assert tables.train_step(tmp_path) == tables.EMPTY
    fake_results(tmp_path, {"ngk-cpp": 0.5, "pyg-compile": 2.0, "pyg-tuned-compile": 0.25})
    text = tables.train_step(tmp_path)
    assert "| 4.0 | **0.50 (slower)** |" in text and "500 ms" in text


def test_report_fills_and_notices_staleness(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- results:train_step -->\nold\n<!-- /results -->\nafter\n")
    assert report.stale([readme], tmp_path) == [readme]
    readme.write_text(report.render(readme.read_text(), tmp_path))
    assert report.stale([readme], tmp_path) == [] and tables.EMPTY in readme.read_text()
    fake_results(tmp_path, {"ngk-cpp": 0.5})
    assert report.stale([readme], tmp_path) == [readme]
    with pytest.raises(ValueError, match="with NAME in"):
        report.render("<!-- results:nothing -->\n<!-- /results -->", tmp_path)
    with pytest.raises(ValueError, match="closed once"):
        report.render("<!-- results:train_step -->\n", tmp_path)


def test_plots(tmp_path):
    fake_results(tmp_path, {"ngk-cpp": 0.5, "pyg": 2.0})
    assert [p.name for p in plots.draw(tmp_path)] == ["train_step.png"]


def test_memory_summary():
    def point(series, edges, nodes):
        return {
            "provider": "ngk-cpp", "threads": 1, "dtype": "fp32", "weight_grads": True, "series": series, "layout": [edges],
            "edges": edges, "nodes": nodes, "peak_bytes": 10 * edges + 3000 * nodes + 77,
        }  # fmt: skip

    rows = [point("edges", 1000, 50), point("edges", 5000, 50), point("nodes", 10, 3), point("nodes", 99, 30), point("nodes", 400, 80)]
    (found,) = memory.summary(rows)
    assert found["bytes_per_edge"] == pytest.approx(10) and found["bytes_per_node"] == pytest.approx(3000)


def test_memory_child_counts_what_a_step_keeps():
    """A step of the PyG baseline on 20,000 edges keeps kilobytes per edge, in a fresh process."""
    case = Case((2, 96, 200, 3))
    request = ["-m", "benchmarks.memory", "--child"]
    import json
    import subprocess
    import sys

    body = {"provider": "pyg", "layout": list(case.layout), "batch": 1, "threads": 1, "dtype": "fp32", "weight_grads": False}
    done = subprocess.run([sys.executable, *request, json.dumps(body)], cwd=machine.ROOT, capture_output=True, text=True, check=True)
    peak = json.loads(done.stdout.splitlines()[-1])["peak_bytes"]
    assert 2_000 < peak / case.edges < 20_000


def test_gate_lets_the_tuned_baseline_pass_and_stops_a_wrong_one():
    case = Case((2, 6, 5, 3), 2)
    oracle = new_oracle(case)
    checker, runner = gate.Gate(case, oracle), Runner(PROVIDERS["pyg-tuned"], case, oracle)
    assert set(checker.check(runner, "fp32")) == set(gate.FLOOR["fp32"])
    with torch.no_grad():
        runner.model.gnn.edge_update[0].lin_e.weight[0, 0] += 0.1
    with pytest.raises(RuntimeError, match="expected a relative error of .*; not timed"):
        checker.check(runner, "fp32")


def test_unknown_provider():
    with pytest.raises(ValueError, match="expected names of"):
        select("nobody")
    assert [p.name for p in select("pyg,pyg")[0]] == ["pyg"]


def test_oracle_is_the_same_every_time():
    case = Case((2, 3, 1))
    first, second = new_oracle(case), new_oracle(case)
    assert isinstance(first, PyGNGGNN)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))

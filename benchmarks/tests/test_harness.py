"""The measuring itself: cases, work, timing, records, tables, gate."""

from __future__ import annotations

import pytest
import torch

import ngkernels as ngk
from benchmarks import attention, attention_problems, gate, machine, memory, plots, records, report, tables, timing, work
from benchmarks.cases import Case
from benchmarks.models import MODELS
from benchmarks.providers import PROVIDERS, Runner, select, why_not


def test_case_counts():
    case = Case.parse("2x4x3@5", batch=9)
    assert (case.layout, case.batch, case.edges, case.last_edges, case.nodes, case.label) == ((2, 4, 3), 5, 100, 60, 45, "2x4x3@5")
    assert (case.pairs, case.last_pairs) == (5 * 81, 5 * 27)
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


def test_flops_per_pair():
    """NG-T by hand at the published widths, in products of 32 x 64: updates 3, 4, 4; the last alone 2 (3 + 4) + 5."""
    product, small = 4096, 256 + 256 + 512  # logits, weighted values, weighted states of 8 heads
    maps = 3 * 2 * 32 * 128
    assert [work.pair_state_flops(k, both=True) for k in range(4)] == [0, 3 * product, 7 * product, 11 * product]
    assert [work.pair_state_flops(k, both=False) for k in range(4)] == [0, 3 * product, 11 * product, 19 * product]
    assert work.attention_flops(0, True) == (small, 3 * small)
    case = Case((2, 64, 128, 3))
    every = small + (3 * product + maps + small) + (7 * product + maps + small)
    found = work.train_step_ngt(case, weight_grads=False)
    assert found.flops == 4 * (197**2 * every + 3 * 197 * (19 * product + maps + small))
    assert work.train_step_ngt(case, weight_grads=True).bytes > found.bytes


def test_the_bound_and_the_planner():
    """What the planner counts op by op is the bound for NG-GNN. NG-T's program makes the state of a pair from the table before its first
    products, which the bound has from the table."""
    from neural_graphs.models import NGGNN, NGT

    for case in (Case((2, 512, 1024, 3)), Case((2, 32, 32, 1), 64)):
        model = NGGNN(case.layout, norm="batch_graph")
        assert ngk.plan(model, model.graph(case.batch)).work.edge_flops == work.train_step(case, weight_grads=False).flops
    model, case = NGT((2, 64, 128, 3)), Case((2, 64, 128, 3))
    bound = work.train_step_ngt(case, weight_grads=False).flops
    assert bound < ngk.plan(model, model.graph(1)).work.edge_flops < 1.4 * bound


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


def fake_results(path, provider_medians: dict[str, float], model: str = "ng-gnn"):
    run = records.new_run()
    for provider, median in provider_medians.items():
        measurement = {
            "model": model, "provider": provider, "layout": [2, 4, 3], "batch": 1, "edges": 20, "nodes": 9, "pairs": 81, "threads": 1, "dtype": "fp32", "weight_grads": True,
            "seconds": [median], "foreign_cores": [0.0], "calls_per_sample": 1, "median": median, "noisy": False, "flops": 1, "bytes": 1,
            "rates": {"copy": 1e9, "gemm_fp32": 1e9}, "bound_seconds": 1e-9, "share": 0.5, "errors": None,
        }  # fmt: skip
        records.append("train_step", run, measurement, path)


def test_table_shows_gains_and_losses(tmp_path):
    assert tables.train_step(tmp_path) == tables.EMPTY
    fake_results(tmp_path, {"ngk-cpp": 0.5, "pyg-compile": 2.0, "pyg-tuned-compile": 0.25})
    text = tables.train_step(tmp_path)
    assert "| 4.0 | **0.50 (slower)** |" in text and "500 ms" in text


def test_table_of_ngt_is_about_pairs(tmp_path):
    fake_results(tmp_path, {"ngk-cpp": 0.5, "dense": 4.0, "dense-compile": 0.25}, model="ng-t")
    text = tables.TABLES["train_step_ngt"](tmp_path)
    assert tables.train_step(tmp_path) == tables.EMPTY  # NG-GNN has none
    assert "| 81 | fp32 | on | 500 ms | 6.17e+03 |" in text and "| 8.0 | **0.50 (slower)** |" in text


def test_table_of_attention_has_a_line_for_each_rival(tmp_path):
    assert tables.attention(tmp_path) == tables.EMPTY
    run = records.new_run()
    for provider, median in {"ngk-cpp": 0.5, "sdpa": 2.0, "flex": 0.25}.items():
        records.append("attention", run, {
            "problem": "additive", "provider": provider, "direction": "forward_backward", "layout": [2, 4, 3], "batch": 1, "pairs": 81,
            "read_pairs": 81, "threads": 1, "median": median, "noisy": provider == "sdpa",
        }, tmp_path)  # fmt: skip
    text = tables.attention(tmp_path)
    assert "| [2, 4, 3] | additive | forward, backward | 500 ms | 6.17e+03 | flex 250 ms | **0.50 (slower)** |" in text
    assert "|  |  |  |  |  | sdpa 2 s † | 4.0 |" in text


def test_memory_tables_are_apart(tmp_path):
    assert tables.TABLES["memory_ngt"](tmp_path) == tables.EMPTY
    run = records.new_run()
    for model, series in (("ng-t", "pairs"), ("ng-t-edges", "edges")):
        for nodes in (100, 200, 400):
            records.append("memory", run, {
                "model": model, "provider": "ngk-cpp", "threads": 1, "dtype": "fp32", "weight_grads": True, "series": series,
                "layout": [2, nodes], "edges": nodes**2 // 5, "nodes": nodes, "pairs": nodes**2, "peak_bytes": 7 * nodes**2, "seconds": 1e-6 * nodes**2,
                "limit_bytes": None,
            }, tmp_path)  # fmt: skip
    text = tables.TABLES["memory_ngt"](tmp_path)
    assert "| all pairs | ngkernels, C++ kernels | fp32 | on | - | - | 7 | [2, 400], 32,000 edges | 1 MiB | 1.00 |" in text
    assert "| along edges | ngkernels, C++ kernels | fp32 | on | 35 | - | - | [2, 400], 32,000 edges | 1 MiB | 1.00 |" in text
    assert tables.memory_table(tmp_path) == tables.EMPTY


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
            "model": "ng-gnn", "provider": "ngk-cpp", "threads": 1, "dtype": "fp32", "weight_grads": True, "series": series, "layout": [edges],
            "edges": edges, "nodes": nodes, "pairs": nodes**2, "peak_bytes": 10 * edges + 3000 * nodes + 77, "seconds": 1e-6 * edges**1.5,
        }  # fmt: skip

    rows = [point("edges", 1000, 50), point("edges", 5000, 50), point("nodes", 10, 3), point("nodes", 99, 30), point("nodes", 400, 80)]
    (found,) = memory.summary(rows)
    assert found["bytes_per_edge"] == pytest.approx(10) and found["bytes_per_node"] == pytest.approx(3000)
    assert found["bytes_per_pair"] is None and found["time_exponent"] == pytest.approx(1.5)
    rows = [{**point("pairs", n * n // 2, n), "model": "ng-t", "peak_bytes": 50 * n * n} for n in (10, 20, 40)]
    (found,) = memory.summary(rows)
    assert found["bytes_per_pair"] == pytest.approx(50) and found["bytes_per_edge"] is None


def test_memory_limit_of_ngt():
    case = Case((2, 4, 3), 2)
    assert memory.limit(MODELS["ng-t"], case) == 16 * 40 + 30_000 * 18 + 40 * 2**20
    assert memory.limit(MODELS["ng-gnn"], case) is None


def test_memory_child_counts_what_a_step_keeps():
    """A step of the PyG baseline on 20,000 edges keeps kilobytes per edge, in a fresh process."""
    case = Case((2, 96, 200, 3))
    request = ["-m", "benchmarks.memory", "--child"]
    import json
    import subprocess
    import sys

    body = {
        "model": "ng-gnn",
        "provider": "pyg",
        "layout": list(case.layout),
        "batch": 1,
        "threads": 1,
        "dtype": "fp32",
        "weight_grads": False,
    }
    done = subprocess.run([sys.executable, *request, json.dumps(body)], cwd=machine.ROOT, capture_output=True, text=True, check=True)
    peak = json.loads(done.stdout.splitlines()[-1])["peak_bytes"]
    assert 2_000 < peak / case.edges < 20_000


RIVALS = {"ng-gnn": "pyg-tuned", "ng-t": "dense"}
WRONG = {"ng-gnn": "gnn.edge_update.0.lin_e.weight", "ng-t": "layers.0.edge_updates.edge_mlp0.lin0_e.weight"}


@pytest.mark.parametrize("name", RIVALS)
def test_gate_lets_a_baseline_pass_and_stops_a_wrong_one(name):
    case, model = Case((2, 6, 5, 3), 2), MODELS[name]
    oracle = model.new_oracle(case)
    checker, runner = gate.Gate(model, case, oracle), Runner(model, PROVIDERS[RIVALS[name]], case, oracle)
    assert set(checker.check(runner, "fp32")) == set(gate.FLOOR["fp32"])
    with torch.no_grad():
        dict(runner.model.named_parameters())[WRONG[name]][0, 0] += 0.1
    with pytest.raises(RuntimeError, match="expected a relative error of .*; not timed"):
        checker.check(runner, "fp32")


@pytest.mark.parametrize("name", RIVALS)
def test_this_project_passes_the_gate(name):
    case, model = Case((2, 6, 5, 3), 2), MODELS[name]
    oracle = model.new_oracle(case)
    checker = gate.Gate(model, case, oracle)
    for provider in [p for p in ("ngk-cpp", "ngk-reference") if why_not(name, p) is None]:
        for dtype in ("fp32", "bf16"):
            assert set(checker.check(Runner(model, PROVIDERS[provider], case, oracle), dtype)) == set(gate.FLOOR[dtype])


@pytest.mark.parametrize("problem", attention.FLOPS)
def test_attention_problems_are_the_same_function(problem):
    """This project against the plain formula in float64: the result and every gradient."""
    case = Case((2, 5, 4, 3), 2)
    ours, plain, *_ = attention_problems.contenders(problem, case, torch.float64).values()
    data = attention_problems.Inputs(case, attention_problems.WIDTH if problem == "sparse" else 1, torch.float64)
    with ngk.use_backend("reference"):
        found, true = (attention.run(call, data, "forward_backward") for call in (ours, plain))
    assert sum(t is not None for t in true) >= 6
    assert attention.check(problem, found, true) < 1e-10
    found[1] = found[1] * 1.1
    with pytest.raises(RuntimeError, match="gate: .* expected a relative error of at most"):
        attention.check(problem, found, true)


def test_select():
    model = MODELS["ng-gnn"]
    with pytest.raises(ValueError, match="expected names of"):
        select(model, "nobody")
    with pytest.raises(RuntimeError, match="dense was asked for and cannot run: it is no baseline of NG-GNN"):
        select(model, "dense")
    assert [p.name for p in select(model, "pyg,pyg")[0]] == ["pyg"]
    assert [p.name for p in select(MODELS["ng-t"], "dense")[0]] == ["dense"]


@pytest.mark.parametrize("name", RIVALS)
def test_oracle_has_the_same_parameters_every_time(name):
    case, model = Case((2, 4, 3)), MODELS[name]
    first, second = model.new_oracle(case), model.new_oracle(case)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))

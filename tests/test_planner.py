"""Plans: predicted peaks beside measured ones, work beside formulas, the choice of a policy, refusal."""

from __future__ import annotations

import copy
import importlib
import json
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import emulation
import pytest
import torch
from allocations import planned_and_allocated
from conftest import DECLARED
from emulation import emulated  # noqa: F401  a fixture

import ngkernels as ngk
from neural_graphs import cli
from neural_graphs.models import NGGNN, NGT
from neural_graphs.models.memory import EdgeMemory
from neural_graphs.scaling import measure as measuring
from neural_graphs.scaling.methods import METHODS
from neural_graphs.scaling.study import edges_of, layout_of
from ngkernels import limits
from ngkernels.planner import parse_size, size_text
from ngkernels.trace import Trace

APPLIES = limits.applies  # before conftest.py lifts the limits
MIB = 1 << 20
ROOT = Path(__file__).resolve().parent.parent
cpp = pytest.mark.skipif(
    "cpp" not in DECLARED or not Path("/proc/self/clear_refs").exists(), reason="needs the cpp backend and Linux's /proc"
)


def predicted(method: str, hidden: int, weight_grads: bool, threads: int = 1) -> int:
    """The peak of a step of the study (AdamW with amsgrad: three states), above what its process holds after the warm-up."""
    model = METHODS[method].model(layout_of(hidden), 32)
    options = {"weight_grads": weight_grads, "optimizer_states": 3, "threads": threads}
    return ngk.plan(model, model.graph(1), policies=[POLICY.get(method, "recompute")], **options).peak_bytes


POLICY = {"ng-gnn-hybrid": "hybrid", "ng-gnn-store": "store", "ng-gnn-every2": "every:2"}


@cpp
@pytest.mark.parametrize(
    ("method", "hidden", "weight_grads"),
    [
        ("ng-gnn", 1024, True), ("ng-gnn-hybrid", 256, False), ("ng-t-edges", 256, False),
        *(pytest.param(*p, marks=pytest.mark.slow) for p in (
            ("ng-gnn", 1024, False), ("ng-gnn-store", 256, True), ("ng-gnn-every2", 256, False), ("ng-t", 256, True)
        )),
    ],
)  # fmt: skip
def test_peaks_within_a_tenth_of_measured_ones(method: str, hidden: int, weight_grads: bool):
    request = {
        "method": method, "layout": layout_of(hidden), "width": 32, "dtype": "fp32", "weight_grads": weight_grads, "threads": 1, "device": "cpu",
        "limit_bytes": 1 << 30, "repeats": 1,
    }  # fmt: skip
    found = measuring.measure(request, 300)
    assert found["outcome"] == "ok", found
    assert predicted(method, hidden, weight_grads) == pytest.approx(found["peak_bytes"], rel=0.1)


RECORDED = {
    "ng-gnn": lambda layout: NGGNN(layout, norm="batch_graph"),
    "ng-t": NGT,
    "ng-t-edges": lambda layout: NGT(layout, attention="edges"),
}


@cpp
def test_peaks_of_recorded_steps():
    """Each largest network of the published records of memory (two steps without optimiser)."""
    for path in (ROOT / "benchmarks" / "results").glob("*/memory.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [{"model": "ng-gnn"} | r for r in rows if r["provider"] == "ngk-cpp"]  # the first records had one model
        last = {r["model"]: r["run"] for r in rows}
        for row in (r for r in rows if r["run"] == last[r["model"]] and r["peak_bytes"] > 40 * MIB):
            model = RECORDED[row["model"]](row["layout"])
            found = ngk.plan(model, model.graph(row["batch"]), weight_grads=row["weight_grads"], threads=row["threads"], optimizer_states=0)
            assert found.peak_bytes == pytest.approx(row["peak_bytes"], rel=0.1), (row["model"], row["layout"])


@cpp
def test_peaks_of_the_recorded_study():
    """Every size of the memory-scaling study that a method on these kernels was measured at."""
    for path in (ROOT / "benchmarks" / "results").glob("*/scale.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [r for r in rows if r["outcome"] == "ok" and r["device"] == "cpu" and METHODS[r["method"]].policy is not None and r["peak_bytes"] > 40 * MIB]
        assert len(rows) > 10
        for row in rows:
            method = METHODS[row["method"]]
            model = method.model(row["layout"], row["width"])
            options = {"weight_grads": row["weight_grads"], "threads": row["threads"], "policies": [method.policy], "optimizer_states": 3}
            found = ngk.plan(model, model.graph(row["batch"]), **options)
            assert found.peak_bytes == pytest.approx(row["peak_bytes"], rel=0.1), (row["method"], row["layout"])


def test_more_threads_take_more():
    one, two, many = (predicted("ng-gnn", 256, False, threads) for threads in (1, 2, 1 << 20))
    if "cpp" in DECLARED:
        assert one < two < many < one + (1 << 30)  # no more workers than pieces of work


# ---- a GPU ----
def small_ngt(**options) -> NGT:
    return NGT([2, 40, 40, 3], d_node=16, d_edge=16, d_attn_hid=16, d_node_hid=16, d_edge_hid=16, num_layers=3, fourier_features=16, **options)


GPU = {
    "ng-gnn": lambda: (NGGNN([2, 40, 40, 3], d_hid=16, fourier_features=16), ngk.NeuralGraph.mlp([2, 40, 40, 3], batch_size=3)),
    "ng-t-edges": lambda: (small_ngt(attention="edges"), ngk.NeuralGraph.mlp([2, 40, 40, 3], batch_size=3)),
    "ng-t": lambda: (small_ngt(), ngk.NeuralGraph.mlp([2, 40, 40, 3])),
}


@pytest.mark.usefixtures("one_thread", "emulated")
@pytest.mark.skipif(not emulation.compiler(), reason="no C++ compiler")
@pytest.mark.parametrize(("method", "policy", "weight_grads"), [
    ("ng-gnn", "recompute", True), ("ng-t-edges", "recompute", False), *(pytest.param(*p, marks=pytest.mark.slow) for p in (
        ("ng-gnn", "hybrid", False), ("ng-gnn", "store", True), ("ng-t-edges", "store", True), ("ng-t", "recompute", True)
    )),
])  # fmt: skip
def test_peaks_of_a_gpu_with_cuda_kernels(method: str, policy: str, weight_grads: bool):
    """Of the host side of the kernels, which is the same on a GPU: what is allocated beside tensors is counted too."""
    model, graph = GPU[method]()
    model.memory = EdgeMemory.parse(policy)
    planned, allocated = planned_and_allocated(model, graph, "cuda", policy, weight_grads)
    assert planned == pytest.approx(allocated, rel=0.05)


@pytest.fixture
def limits_of_a_gpu(monkeypatch):
    monkeypatch.setattr(limits, "applies", APPLIES)


def test_plans_of_a_gpu_need_none(limits_of_a_gpu):
    """Triton's kernels where they take the chains, else the CUDA kernels: a state of every edge is stored by no policy that does not say so."""
    small, large = ngk.NeuralGraph.mlp([2, 512, 512, 3]), ngk.NeuralGraph.mlp([2, 4096, 4096, 3])
    for model in (model_of(), NGT([2, 64, 64, 3], attention="edges"), NGT([2, 64, 64, 3])):
        sizes = [ngk.plan(model, g, device="cuda", policies=["recompute"]).peak_bytes for g in (small, large)]
        assert sizes[1] - sizes[0] < 30 * (large.num_edges - small.num_edges), sizes
    found = ngk.plan(NGT([2, 64, 64, 3], attention="edges"), small, "100GiB", device="cuda")
    assert found.policy == "recompute" and not found.refused and "on a GPU" in found.describe()
    with pytest.raises(ValueError, match="plan: expected device 'cpu' or 'cuda', got 'mps'"):
        ngk.plan(model_of(), small, device="mps")


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_ten_thousand_networks_are_as_many_launches_as_ten(backend: str, monkeypatch):
    """Forward and backward, of any layouts: one table says where each has its tensors."""
    launches, x, width = [], torch.empty(8, 8, device="meta"), 8
    monkeypatch.setattr(Trace, "hold", lambda self, *values: launches.append(values))
    counts = []
    for networks in (10, 10_000):
        graph = ngk.NeuralGraph.batch([ngk.NeuralGraph.mlp((2, 3 + k % 5, 6 + k % 3, 1)) for k in range(networks)], packed=True)
        weights = [torch.empty(graph.num_edges, 1, device="meta", requires_grad=True)]
        nodes = torch.empty(graph.num_nodes, width, device="meta", requires_grad=True)
        with ngk.use_backend(backend), Trace(gpu=True):
            edges = ngk.EdgeState(graph, weights, ngk.encoders.Linear(x[:, :1], x[0])).update(nodes, x, x, x, x[0], x, x[0])
            ngk.aggregate(edges, ngk.Message.product(nodes, x, None, x, x), ("mean", "max")).sum().backward()
        counts.append(len(launches))
        launches.clear()
    assert counts[0] == counts[1] < 30, counts


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_partial_results_of_a_gpu_are_counted_up_to_their_limit(backend: str, monkeypatch):
    launch = importlib.import_module(f"ngkernels._{backend}.launch")
    monkeypatch.setattr(launch, "MOST_TILES", 1, raising=False)
    model, graph, peaks = model_of(), ngk.NeuralGraph.mlp([2, 4096, 4096, 3]), {}
    for limit in (4, 64):
        monkeypatch.setattr(launch, "BUDGET", limit * MIB)
        with ngk.use_backend(backend):
            peaks[limit] = ngk.plan(model, graph, device="cuda").peak_bytes / MIB
    assert 30 < peaks[64] - peaks[4] < 120, peaks  # those of the table are sorted beside themselves


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_what_a_neuron_takes_on_a_gpu(backend: str, monkeypatch):
    """At most 4,000 bytes, at 32 columns and four layers: node terms and the sums of their gradients are there for a window of neurons."""
    launch = importlib.import_module(f"ngkernels._{backend}.launch")
    monkeypatch.setattr(launch, "MOST_TILES", 1, raising=False)
    monkeypatch.setattr(launch, "BUDGET", MIB // 2)
    monkeypatch.setattr("ngkernels.ops.node_map.ROWS", 256)
    peaks = []
    for width, layers in ((16, 384), (64, 24)):  # of as many edges
        model = NGGNN([width] * (layers + 1), d_hid=32, fourier_features=16)
        with ngk.use_backend(backend):
            peaks.append(ngk.plan(model, model.graph(1), device="cuda", weight_grads=True, optimizer_states=0).peak_bytes)
    assert 3000 < (peaks[0] - peaks[1]) / (16 * 385 - 64 * 25) <= 4000, peaks


def test_what_the_kernels_of_a_gpu_refuse_is_said(limits_of_a_gpu):
    model, graph = NGT([2, 64, 64, 3], attention="edges"), ngk.NeuralGraph.mlp([2, 64, 64, 3])
    with ngk.use_backend("triton"):
        found = ngk.plan(model, graph, "1GiB", device="cuda")
        assert found.policy == "store" and [name for name, _ in found.refused] == ["recompute", "hybrid", "every:2"]
        assert "recompute: not there: attend: a chain of 4 pair updates from the last stored state would spill its registers" in found.describe()
        assert ngk.plan(model, graph, device="cuda").policy == "store"  # the first that runs
        with pytest.raises(NotImplementedError, match="would spill its registers"):
            ngk.plan(model, graph, device="cuda", policies=["hybrid"])
    with ngk.use_backend("cpp"), pytest.raises(NotImplementedError, match="backend 'cpp' was forced but it runs on cpu tensors, got cuda"):
        ngk.plan(model, graph, device="cuda")


# ---- the choice ----
def model_of(layers: int = 4, **options) -> NGGNN:
    return NGGNN([2, 64, 64, 3], d_hid=16, num_layers=layers, fourier_features=16, **options)


def test_policies():
    assert model_of().policies() == ("recompute", "hybrid", "every:2", "store")
    assert model_of(7).policies() == ("recompute", "hybrid", "every:5", "every:4", "every:3", "every:2", "store")
    assert model_of(2).policies() == ("recompute",) == model_of(update_edges=False).policies()
    assert NGT([2, 8, 8, 3]).policies() == ("recompute",)
    assert NGT([2, 8, 8, 3], attention="edges").policies() == ("recompute", "hybrid", "every:2", "store")


def test_every_policy_is_looked_at_and_the_cheapest_taken():
    model = model_of()
    found = ngk.plan(model, model.graph(1), "1GiB")
    assert [c.policy for c in found.candidates] == list(model.policies())
    assert found.policy == min(found.candidates, key=lambda c: c.cost).policy and found.budget == 1 << 30
    peaks = {c.policy: c.peak_bytes for c in found.candidates}
    assert peaks["recompute"] < peaks["every:2"] < peaks["store"]
    flops = {c.policy: c.work.edge_flops for c in found.candidates}
    assert flops["recompute"] < flops["hybrid"]  # whose chains end in e itself
    text = found.describe()
    assert text.count("\n") == 5 and "recompute: peak" in text and "(chosen)" in text and "4,416 edges" in text


def test_a_stored_state_is_chosen_where_it_pays(monkeypatch):
    """A long chain on a machine whose memory costs nothing."""
    monkeypatch.setattr("ngkernels.planner.FLOPS_PER_BYTE", 0)
    model = model_of(12)
    roomy = ngk.plan(model, model.graph(1), "1GiB", policies=["recompute", "every:4"])
    assert roomy.policy == "every:4"
    least = {c.policy: c.peak_bytes for c in roomy.candidates}["recompute"]
    tight = ngk.plan(model, model.graph(1), least, policies=["recompute", "every:4"])
    assert tight.policy == "recompute" and "(over the budget)" in tight.describe()


def test_refusal_says_what_is_needed():
    model = model_of()
    with pytest.raises(
        ngk.BudgetError, match=r"plan: expected a budget of at least \d+ bytes \(.*'recompute'\) for NeuralGraph.*, got 1.0 KiB"
    ) as refused:
        ngk.plan(model, model.graph(1), 1024)
    needed = refused.value.needed  # the first plan for a graph also counts what is kept with the graph from then on
    assert ngk.plan(model, model.graph(1), needed).peak_bytes == pytest.approx(needed, rel=0.001)
    with pytest.raises(ngk.BudgetError):
        ngk.plan(model, model.graph(1), int(0.99 * needed))
    assert isinstance(refused.value, MemoryError)


def test_without_a_budget_one_plan_of_the_policy_that_stores_least():
    found = ngk.plan(model_of(), ngk.NeuralGraph.mlp([2, 64, 64, 3]))
    assert found.policy == "recompute" and len(found.candidates) == 1


def test_forward_needs_less_and_mapped_weights_nothing():
    model, graph = model_of(), ngk.NeuralGraph.mlp([2, 2048, 2048, 3])
    step = ngk.plan(model, graph, weight_grads=True)
    forward = ngk.plan(model, graph, training=False)
    mapped = ngk.plan(model, graph, training=False, weights_mapped=True)
    assert forward.work.edge_flops * 2 < step.work.edge_flops and forward.peak_bytes < step.peak_bytes
    assert forward.peak_bytes - mapped.peak_bytes == pytest.approx(4 * graph.num_edges, rel=0.01)
    assert ngk.plan(model, graph, weight_grads=True, weights_mapped=True).peak_bytes < step.peak_bytes - 8 * graph.num_edges


def test_nothing_is_computed_and_nothing_is_left():
    model = model_of()
    before = [p.clone() for p in model.parameters()]
    graph = model.graph(1)
    huge = ngk.NeuralGraph.mlp([2, 1 << 15, 1 << 16, 3])  # two billion edges
    assert ngk.plan(model, huge, training=False).peak_bytes > 8 << 30
    ngk.plan(model, graph, "1GiB")
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters())) and all(p.grad is None for p in model.parameters())
    weights = [torch.randn(1, a, b, 1) for a, b in zip(model.layout, model.layout[1:])]
    assert model(weights, [torch.zeros(1, n, 1) for n in model.layout[1:]]).device.type == "cpu"


@pytest.mark.parametrize(
    "model",
    [
        model_of(head="equivariant"), model_of(pooling=("mean", "all"), reverse_edges=True), model_of(activation_embedding=True),
        model_of(pooling=("max_edge", "all")), NGT([2, 8, 8, 3], pooling="cls_token"), NGT([2, 8, 8, 3], attention="edges", head="equivariant"),
    ],
    ids=["equivariant", "reverse", "activations", "pooled edges", "token", "ng-t equivariant"],
)  # fmt: skip
def test_models_of_every_kind(model):
    found = ngk.plan(model, model.graph(3), "1GiB", weight_grads=True)
    assert found.peak_bytes > 0 and found.work.edge_flops > 0 and found.work.node_flops > 0


def test_sparse_and_packed_graphs():
    index = torch.randint(0, 50, (2, 400))
    model = NGGNN([50, 50, 50, 50], d_hid=16, fourier_features=16, positional=False, pooling=("mean", "all"))
    sparse = ngk.plan(model, ngk.NeuralGraph.from_edge_index(index, 50), "1GiB")
    small = ngk.NeuralGraph.batch([ngk.NeuralGraph.mlp([2, 4, 4, 3]) for _ in range(5)], packed=True)
    assert sparse.peak_bytes > 0 and ngk.plan(model, small).work.edge_flops > 0


# ---- models that plan for themselves ----
def test_a_model_with_a_budget_chooses_its_memory():
    plain, planned = model_of(), model_of(edge_memory="auto:1GiB")
    planned.load_state_dict(plain.state_dict())
    weights = [torch.randn(1, a, b, 1) / 8 for a, b in zip(plain.layout, plain.layout[1:])]
    biases = [torch.randn(1, n, 1) for n in plain.layout[1:]]
    assert torch.equal(plain(weights, biases), planned(weights, biases))  # "recompute" is chosen here
    assert planned.memory == EdgeMemory.parse("recompute") and len(planned._policies) == 1
    with pytest.raises(ngk.BudgetError, match="expected a budget of at least"):
        model_of(edge_memory="auto:64KiB")(weights, biases)
    assert copy.deepcopy(planned).budget == planned.budget == 1 << 30
    pickle.dumps(plain.state_dict())


def test_auto_is_recompute_but_for_chains_that_kernels_do_not_take():
    auto = model_of().memory
    assert auto.restart and replace(auto, restart=False) == model_of(edge_memory="recompute").memory and model_of().budget is None
    assert NGT([2, 8, 8, 3]).memory == NGT([2, 8, 8, 3], edge_memory="auto:1GiB").memory.__class__()


def test_sizes():
    assert [parse_size(t) for t in ("8GiB", "512 MiB", "1.5GB", "100")] == [8 << 30, 512 << 20, 1_500_000_000, 100]
    assert [size_text(n) for n in (100, 1536, 3 << 30)] == ["100 bytes", "1.5 KiB", "3.0 GiB"]
    with pytest.raises(ValueError, match="expected a size such as 8GiB or 512MiB, got 'much'"):
        model_of(edge_memory="auto:much")


# ---- the command ----
def ngk_plan(capsys, *arguments) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", *map(str, arguments)])
    shown = capsys.readouterr()
    return ended.value.code or 0, shown.out, shown.err


def test_command(capsys, tmp_path):
    from safetensors.torch import save_file

    status, out, _ = ngk_plan(capsys, "2,64,128,3", "--budget", "1GiB")
    assert status == 0 and "NG-GNN: a training step over 8,704 edges and 197 neurons" in out and "store: peak" in out
    file = tmp_path / "m.safetensors"
    save_file({"0.weight": torch.zeros(64, 2), "2.weight": torch.zeros(3, 64, dtype=torch.bfloat16), "0.bias": torch.zeros(64)}, file)
    status, out, _ = ngk_plan(capsys, file, "--model", "ng-t-edges", "--forward", "--json", "--stream")
    assert status == 0 and json.loads(out)["edges"] == 320 and json.loads(out)["training"] is False
    status, out, _ = ngk_plan(capsys, "2,64,128,3", "--model", "ng-t-edges", "--device", "cuda", "--json")
    assert status == 0 and json.loads(out)["device"] == "cuda" and json.loads(out)["refused"] == {}
    status, _, err = ngk_plan(capsys, "2,64,128,3", "--budget", "1MiB")
    assert status == 1 and "expected a budget of at least" in err
    for arguments, words in (
        (["2,64,128,3", "--model", "x"], "--model: expected ng-gnn, ng-t, ng-t-edges, got 'x'"),
        ([tmp_path / "none.safetensors"], "expected a file"),
        (["2,64,128,3", "--device", "tpu"], "plan: expected device 'cpu' or 'cuda', got 'tpu'"),
    ):
        status, _, err = ngk_plan(capsys, *arguments)
        assert status == 1 and words in err


def test_planning_needs_no_library():
    """Where the kernels are not built, plans leave out what those need beside tensors."""
    code = "import ngkernels.backends as b; b._load_error = 'none'; b._library = lambda: 'none'\nfrom neural_graphs.models import NGGNN\nimport ngkernels as ngk, warnings\n"
    code += "warnings.simplefilter('ignore'); m = NGGNN([2, 8, 8, 3]); print(ngk.plan(m, m.graph(1)).peak_bytes)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and int(done.stdout) > 0, done.stderr[-500:]


def test_edges_of_the_study():
    assert edges_of(256) == 133_120

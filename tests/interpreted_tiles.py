"""The Triton kernels in Triton's interpreter: tiles and partial results as on a GPU, determinism, what backward evaluates again.

In a process of its own (test_triton_interpreter.py).
"""

from __future__ import annotations

import pair_samples
import pytest
import torch
from compare import assert_bitwise, assert_budget, assert_close
from interpreted import slow
from oracle import Network, mlp
from pair_list import PLAIN as PAIR
from sample_list import GRAPHS, LOOPS, MEMORY, PLAIN, RESIDUAL, SPARSE_UNEQUAL, TABLES, UNEQUAL, UNEQUAL_REVERSED
from samples import Sample, cast, edge_state, engine, float32_oracle, float64_oracle, leaves, named, run_engine
from test_determinism import alone

import ngkernels as ngk
from ngkernels._triton.plan import NODES, REDUCE, Plan

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- the sizes of tiles that GPUs get ----
HUB = Network((3, 60), (("sparse", 1, 0, tuple((k, 1) for k in range(60)) + ((3, 0), (9, 0), (3, 2))), ("dense", 1, 0)))  # a neuron with many edges beside two with few
GPU_TILES = (
    PLAIN.but("film", reduce=("sum", "mean", "min", "max", "std", "var")),
    PLAIN.but("diagonal", networks=(RESIDUAL,), memory=("virtual", None)),
    PLAIN.but("table", networks=UNEQUAL_REVERSED, encoder="fourier", table="auto", table_range=0.3, packed=True, reciprocal=True),
    PLAIN.but("sparse", networks=SPARSE_UNEQUAL, memory=("virtual", None)),
    PLAIN.but("hub", networks=(HUB,)),
)

@pytest.mark.parametrize("size", [16, pytest.param(32, marks=slow), pytest.param(64, marks=slow)])
@pytest.mark.parametrize("sample", **named(GPU_TILES))
def test_tiles_as_on_a_gpu(sample: Sample, size: int, monkeypatch):
    monkeypatch.setattr("ngkernels._triton.launch.INTERPRETED", size)
    if sample.table == "auto":  # in float32 alone
        wanted, plain = float32_oracle(sample)
        return assert_budget(run_engine(sample, cast(leaves(sample), torch.float32), "triton"), wanted, plain, 8e-6)
    assert_close(run_engine(sample, leaves(sample), "triton"), float64_oracle(sample), 1e-10)

@pytest.mark.parametrize("sample", **named((PLAIN.but("mlp"), TABLES[7], GRAPHS[0], MEMORY[1])))
def test_partial_results_in_many_pieces(sample: Sample, monkeypatch):
    """Where memory for partial results is short, they are added up piece by piece; node gradients are bitwise the same."""
    dtype = torch.float32 if sample.table == "auto" else torch.float64
    t = cast(leaves(sample), dtype)
    whole = run_engine(sample, t, "triton")
    monkeypatch.setattr("ngkernels._triton.launch.BUDGET", 1)
    monkeypatch.setattr("ngkernels._triton.launch.MOST_TILES", 0)
    pieces = run_engine(sample, t, "triton")
    bitwise = {n for n in whole if n.startswith(("out.", "grad.weights.", "grad.x"))}
    assert_bitwise({n: pieces[n] for n in bitwise}, {n: whole[n] for n in bitwise})
    assert_close(pieces, whole, 1e-5 if dtype == torch.float32 else 1e-12)

def test_many_sources_are_split_and_merged_in_their_order(monkeypatch):
    """A neuron with more sources than one program works through has several partial results."""
    sample = PLAIN.but("skinny", networks=(mlp(530, 3),), reduce=("sum", "mean", "min", "max", "std", "var"), residual=(False,), head=0)
    topology = edge_state(sample, leaves(sample)).graph.edges_as().table
    work = Plan(topology, torch.device("cpu")).cut(None, (0,), 256, 533, REDUCE, False)
    assert work.tiles == 3 and len({*zip(work.i0.tolist(), work.j0.tolist(), strict=True)}) == 3
    assert_close(run_engine(sample, leaves(sample), "triton"), float64_oracle(sample), 1e-10)


@pytest.mark.parametrize("work", [REDUCE, NODES])
def test_ten_thousand_networks_are_few_launches(work: str):
    """A launch for each shape of tiles, whatever the number of networks: one table says where each has its tensors."""
    layouts = [(2, 3 + k % 5, 6 + k % 3, 1) for k in range(10_000)]
    graph = ngk.NeuralGraph.batch([ngk.NeuralGraph.mlp(layout) for layout in layouts], packed=True)
    plan = Plan(graph.edges_as().table, torch.device("cpu"))
    cut = plan.cut(None, (0,), 16, graph.num_nodes, work, False)
    shapes = {(group.shape, group.later) for group in cut.groups}
    assert len(cut.groups) == len(shapes) == 2 and sum(len(group.rows) for group in cut.groups) == 30_000
    *_, chunks = cut.chunks(128, 0, 0, 0, 1 << 30)
    assert sum(len(chunk.launches) for chunk in chunks) == 2


FROM_TO = tuple((first, second) for first in (None, "same", "virtual") for second in (None, "same", "virtual"))


@pytest.mark.parametrize("over", [None, "edges"], ids=["messages-and-readout", "attention"])
@pytest.mark.parametrize("policy", FROM_TO, ids=lambda p: "-".join(map(str, p)))
def test_evaluation_from_and_gradients_to_every_state(policy: tuple[str | None, str | None], over: str | None):
    """The chain begins at the weights or at a stored state, and gradients go down to either or stop at a virtual checkpoint."""
    if over is None:
        sample = PLAIN.but("from-to", memory=policy, networks=(mlp(2, 3),))
        assert_close(run_engine(sample, leaves(sample), "triton"), float64_oracle(sample), 1e-10)
    else:
        sample = PAIR.but("from-to", memory=policy, networks=(mlp(2, 3),), over=over, closed=True)
        assert_close(pair_samples.run_engine(sample, pair_samples.leaves(sample), "triton"), pair_samples.float64_oracle(sample), 1e-10)


# ---- determinism ----
@pytest.mark.parametrize("sample", **named((PLAIN, TABLES[6].but("table"), GRAPHS[8])))
def test_run_to_run(sample: Sample):
    t = cast(leaves(sample), torch.float32)
    assert_bitwise(run_engine(sample, t, "triton"), run_engine(sample, t, "triton"))

@pytest.mark.parametrize(
    "networks", [(mlp(2, 6, 3), mlp(3, 18, 2)), pytest.param(UNEQUAL, marks=slow), pytest.param(UNEQUAL_REVERSED, marks=slow)],
    ids=["two", "unequal", "reversed"],
)  # fmt: skip
def test_a_network_alone_and_in_a_batch(networks, monkeypatch):
    """Node outputs, edge outputs, gradients of its weights and its nodes: bitwise."""
    sample = PLAIN.but("batch", networks=networks, reciprocal=networks is UNEQUAL_REVERSED)
    t = cast(leaves(sample), torch.float32)
    batch = run_engine(sample, t, "triton")
    for k, net in enumerate(networks):
        found, wanted = alone(sample, t, batch, k, net.copies - 1, "triton")
        assert_bitwise(found, wanted)

@pytest.mark.parametrize("sample", **named((PLAIN.but("loops", networks=(LOOPS,)), PLAIN.but("packed", networks=UNEQUAL, packed=True, restrict=-1, head=0, memory=("virtual", None)))))
def test_every_entry_is_written(sample: Sample):
    t = cast(leaves(sample), torch.float32)
    clean = run_engine(sample, t, "triton")
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3).isnan().all()
        assert_bitwise(run_engine(sample, t, "triton"), clean)
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]

# ---- what backward evaluates again ----
AGAIN = (
    PLAIN.but("film", networks=(mlp(49, 7),), reduce=("min", "max"), head=0),
    PLAIN.but("table", networks=(mlp(7, 31, 3),), reduce=("min", "max"), encoder="fourier", table="auto", table_range=0.5, head=0),
    PLAIN.but("mlp", networks=(mlp(17, 5, reverse=True),), reduce=("min", "max"), kind="concat", mlp=2, reciprocal=True, features=19, head=0),
)

@pytest.mark.parametrize("sample", **named(AGAIN))
def test_backward_meets_the_very_bits_of_the_forward(sample: Sample):
    """The last bias of the messages collects every share of the extremes' gradients: whole numbers, so the sum is exact."""
    t = cast(leaves(sample), torch.float32)
    bias = t["message.edge.bias" if not sample.mlp else f"message.mlp{sample.mlp - 1}.bias"].requires_grad_()
    with ngk.use_backend("triton"):
        (out,) = engine(sample, t)
        incoming = torch.randint(1, 9, out.shape, generator=torch.Generator().manual_seed(3)).float()
        (grad,) = torch.autograd.grad(out, bias, incoming)
    reached = incoming[(out != 0).any(-1).any(-1)].sum((0, 1))
    assert torch.equal(grad[-sample.features :], reached)

@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_a_weight_that_is_not_finite_stays_with_its_neuron(value: float):
    sample = PLAIN.but("nan", head=0, reduce=("sum", "mean", "min", "max", "std", "var"), encoder="fourier", table="auto", table_range=1.0)
    t = cast(leaves(sample), torch.float32)
    clean = run_engine(sample, t, "triton")
    t["weights.1"][0, 2, 1, 0] = value
    found = run_engine(sample, t, "triton")
    node = 2 + 5 + 1
    others = [n for n in range(20) if n != node]
    assert torch.equal(found["out.0"][others], clean["out.0"][others]) and found["out.0"][node].isnan().all()

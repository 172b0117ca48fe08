"""The CUDA kernels on an emulated GPU (csrc/cuda/emulation.h): values and every gradient against the oracle in float64.

What is verified: the layout of fragments over the lanes, their way from one product to the next, masks, the cut into panels, working
memory, the order of threads. What is not: that a device does what the PTX manual says, and how fast.
"""

from __future__ import annotations

from math import ceil
from pathlib import Path

import emulated_checks as checks
import emulation
import numpy as np
import pytest
import samples
import torch
from compare import assert_bitwise, assert_budget, assert_close
from emulation import AHEAD, BACKWARDS, emulated, order  # noqa: F401  a fixture
from layouts import LAYOUTS
from oracle import Network, mlp
from sample_list import LOW_PRECISION, PLAIN, SAMPLES, SPARSE_UNEQUAL
from samples import Sample, cast, float32_oracle, leaves, named, run, run_engine, run_oracle
from samples import oracle as oracle_of
from test_determinism import alone
from travel import Twins
from travel import to as travelling_to

import ngkernels as ngk
from ngkernels import backends, kept, topology
from ngkernels._cuda import launch, plan

pytestmark = [
    pytest.mark.usefixtures("one_thread", "emulated"),
    pytest.mark.skipif(not emulation.compiler(), reason="no C++ compiler"),
]
QUICK = (
    "plain", "reduce-var-std-max-min-mean-sum", "reduce-sum", "activation-gelu", "activation-tanh", "gate-1", "product-0", "concat-2", "film-2", "table-residual-first",
    "table-reciprocal", "table-packed", "table-no-update", "identity-3-channels", "identity-then-residual", "linear-reciprocal-3-channels", "linear-affine",
    "linear-three-updates", "no-biases", "unequal-reversed", "packed-reversed", "single-edge", "restricted-middle", "sizes-D17-H3-F17-dx3", "table-reciprocal-beyond", "fourier-reciprocal-3-channels",
    "residual-blocks-reversed", "blocks-inside-a-layer", "diagonal-alone", "packed", "restricted-unequal", "sparse-reversed",
    "sparse-unequal", "sparse-packed", "sparse-table", "sparse-restricted-packed", "sparse-memory-packed", "memory-virtual+virtual-none",
    "memory-same+virtual-virtual+same", "memory-virtual-same-packed", "memory-same-widest", "memory-virtual-none-affine", "head-of-the-raw-weight",
)  # fmt: skip
SAMPLE_OF = {s.name: s for s in SAMPLES}


def missing(s: Sample) -> str | None:
    """What of a sample the kernels do not run, as they say it."""
    return "registers of 130 columns" if 130 in (s.width, s.hidden, s.features) else None


def tiered() -> list:
    assert set(QUICK) <= set(SAMPLE_OF)
    return [pytest.param(s, id=n, marks=() if n in QUICK else pytest.mark.slow) for n, s in SAMPLE_OF.items() if missing(s) is None]


@pytest.mark.parametrize("sample", tiered())
def test_float32_within_twice_the_error_of_plain_pytorch(sample: Sample):
    checks.exact(samples, sample, assert_budget)


@pytest.mark.parametrize("sample", **named(s for s in SAMPLE_OF.values() if missing(s)))
def test_what_is_not_there_is_named(sample: Sample):
    with pytest.raises(NotImplementedError, match=f"(aggregate|evaluate): backend 'cuda' does not run .*{missing(sample)}"):
        run_engine(sample, cast(leaves(sample), torch.float32), "cuda")


def test_float64_is_named():
    with pytest.raises(NotImplementedError, match="does not run torch.float64 parameters"):
        run_engine(SAMPLE_OF["plain"], leaves(PLAIN), "cuda")


@pytest.mark.parametrize("name", ["plain", "table-packed", "sparse-unequal", "unequal-reversed", "memory-virtual-same-packed"])
def test_what_a_cuda_graph_can_capture(name: str, monkeypatch):
    checks.captured(samples, SAMPLE_OF[name], monkeypatch)


def test_a_capture_without_a_first_run_is_named(monkeypatch):
    sample = PLAIN.but("new", networks=(mlp(3, 5, 8, 2),))
    monkeypatch.setattr(kept, "capturing", lambda: True)
    with pytest.raises(RuntimeError, match="expected a step that has run before it is captured as a CUDA graph"):
        run_engine(sample, cast(leaves(sample), torch.float32), "cuda")


def test_many_partial_rows_of_a_hub_are_added_up_in_two_steps(monkeypatch):
    """A source has a row for each of its listed edges."""
    hub = Network((3, 700), (("sparse", 0, 1, tuple((k == 9, k) for k in range(700))), ("sparse", 1, 0, ((0, 0), (5, 1)))))
    for longest, samples_of in ((plan.LONGEST, [PLAIN.but("hub", networks=(hub,), head=0)]), (3, [SAMPLE_OF[n] for n in ("plain", "sparse-unequal", "restricted-middle")])):
        made: list[plan.Plan] = []
        monkeypatch.setattr(plan, "LONGEST", longest)
        monkeypatch.setattr(plan, "_of_topology", kept.OfTopology(lambda *given, made=made: made.append(plan.Plan(*given)) or made[-1]))
        for sample in samples_of:
            checks.exact(samples, sample, assert_budget)
        launches = [found for p in made for work in p._works._values.values() for found in work._parts._values.values()]
        assert {len(found.sums) for found in launches} == {2}


@pytest.mark.parametrize("reduce", [("sum", "mean", "min", "max", "std", "var"), ("sum", "max")], ids="-".join)
def test_many_partial_rows_of_a_hub_are_merged_in_two_steps(reduce: tuple[str, ...], monkeypatch):
    monkeypatch.setattr(plan, "LONGEST", 2)
    monkeypatch.setattr(plan, "_of_topology", kept.OfTopology(plan.Plan))
    checks.exact(samples, PLAIN.but("wide", networks=(mlp(1300, 2, 3),), head=0, reduce=reduce), assert_budget)


@pytest.mark.parametrize("count", [0, 1, launch.STORED, launch.STORED + 1, 1000])
def test_numbers_as_arguments_of_kernels(count: int):
    values = [(-1) ** k * (k << 52) + k for k in range(count)]
    assert launch.numbers(values, torch.device("cpu")).tolist() == values


LOW = [s for s in LOW_PRECISION if missing(s) is None]


@pytest.mark.parametrize("sample", **named(LOW))
@pytest.mark.parametrize("tf32", [False, True], ids=["bf16", "tf32"])
def test_rounded_operands_within_twice_the_error_of_plain_autocast(sample: Sample, tf32: bool):
    checks.rounded(samples, sample, tf32, assert_budget)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weight_dtypes_keep_their_gradients_dtype(dtype: torch.dtype):
    sample = SAMPLE_OF["table-reverse"]  # twice, as two blocks add to these gradients
    t = cast(leaves(sample), torch.float32, dtype)
    wanted = run_oracle(sample, cast(t, torch.float64))
    plain = run(lambda live: oracle_of(sample, {name: v.float() for name, v in live.items()}), t)
    assert_budget(run_engine(sample, t, "cuda"), wanted, plain, torch.finfo(dtype).eps)


# ---- the same bits ----
BITWISE = ("plain", "table-residual-first", "identity-residual-first", "sparse-unequal", "memory-virtual-same", pytest.param("tiles-and-tails-reversed", marks=pytest.mark.slow))


@pytest.mark.parametrize("name", BITWISE)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["exact", "bf16"])
def test_the_order_of_threads_does_not_matter(name: str, autocast: torch.dtype | None):
    checks.any_order_of_threads(samples, SAMPLE_OF[name], autocast)


@pytest.mark.parametrize("name", BITWISE)
@pytest.mark.parametrize("shared", [100_000, 48_000, 36_000])
def test_working_memory_outside_of_shared_memory(name: str, shared: int, monkeypatch):
    checks.outside_of_shared_memory(samples, SAMPLE_OF[name], shared, monkeypatch)


@pytest.mark.parametrize("name", BITWISE)
def test_partial_results_in_many_launches(name: str, monkeypatch):
    checks.in_many_launches(samples, SAMPLE_OF[name], monkeypatch)


def test_a_network_alone_and_in_a_batch():
    sample = SAMPLE_OF["plain"].but("batch", networks=(mlp(2, 35, 3, copies=2), mlp(4, 17)))
    t = cast(leaves(sample), torch.float32)
    batch = run_engine(sample, t, "cuda")
    for network, copy in ((0, 1), (1, 0)):
        found, wanted = alone(sample, t, batch, network, copy, "cuda")
        assert_bitwise(found, wanted)


# ---- which gradients ----
@pytest.mark.parametrize("wanted", [{"weights.0"}, {"weights.1", "x"}, {"x0"}, {"message.edge.weight"}, {"encoder.weight"}, {"update1.in.bias", "x1"}], ids=lambda names: "+".join(sorted(names)))
@pytest.mark.parametrize("name", ["table-packed", "identity-residual-first", "linear-reverse"])
def test_gradients_that_are_asked_for(name: str, wanted: set[str]):
    checks.gradients_that_are_asked_for(samples, SAMPLE_OF[name], wanted)


HUB = Network((3, 60), (("sparse", 1, 0, tuple((k, 1) for k in range(60)) + ((3, 0), (9, 0), (3, 2))), ("dense", 1, 0)))


@pytest.mark.parametrize("networks", [(mlp(700, 2),), (mlp(2, 700),), (HUB,)], ids=["hub-in", "hub-out", "hub-sparse"])
def test_hubs_above_every_panel(networks):
    sample = PLAIN.but("hub", networks=networks, head=0, residual=(True,), width=3, features=2)
    wanted, plain = float32_oracle(sample)
    assert_budget(run_engine(sample, cast(leaves(sample), torch.float32), "cuda"), wanted, plain, checks.FLOAT32_FLOOR)


# Of 0 to 5 edges each, and of more than a panel has, in the middle of them; first layers of every size up to a tile's, alone and in batches.
DEGREES = [k % 6 for k in range(70)] + [300] + [k * 7 % 3 for k in range(20)]
TINY = Network((301, len(DEGREES)), (("sparse", 0, 1, tuple((k % 301, i) for i, n in enumerate(DEGREES) for k in range(i, i + n))),), copies=2)
SMALL = (mlp(1, 41, 2, copies=2), mlp(2, 35, 3), mlp(3, 19), mlp(4, 4), mlp(5, 6, 7, 8, 9), mlp(9, 17), Network((6, 6, 6), (("diagonal", 0, 1), ("dense", 1, 2), ("diagonal", 0, 2))))


@pytest.mark.parametrize("networks", [(TINY,), SMALL, (TINY, *SMALL)], ids=["tiny-rows", "small-layers", "both"])
@pytest.mark.parametrize("of", ["reduce-var-std-max-min-mean-sum", "table-reciprocal", "linear-reciprocal-3-channels"])
def test_tiles_of_several_destinations(networks, of: str):
    sample = SAMPLE_OF[of].but("several", networks=networks, head=0)
    wanted, plain = float32_oracle(sample)
    assert_budget(run_engine(sample, cast(leaves(sample), torch.float32), "cuda"), wanted, plain, checks.FLOAT32_FLOOR)


def test_tiles_are_full():
    """Of listed edges, and of small layers where their sizes divide a tile's."""
    sizes = {(TINY,): ceil(sum(DEGREES) / 16) * 2, (mlp(2, 40),): 5, (mlp(1, 33),): 3, (mlp(8, 10),): 5, (mlp(3, 16),): 4, (mlp(17, 2),): 4}
    for networks, tiles in sizes.items():
        found = plan.Plan(samples.graph_of(PLAIN.but("several", networks=networks)).edges_as().table, torch.device("cpu")).work()
        (work,) = found.gradients(64, 0, 0, 0, 1 << 30)
        assert work.slots == 16 * tiles


@pytest.mark.parametrize("name", ["sparse-unequal", "sparse-packed"])
def test_lists_that_stay_on_the_device(name: str, monkeypatch):
    t = cast(leaves(SAMPLE_OF[name]), torch.float32)
    wanted = run_engine(SAMPLE_OF[name], t, "cuda")
    monkeypatch.setattr(topology, "stays", lambda device: True)
    monkeypatch.setattr(topology, "_whole", None)
    assert_bitwise(run_engine(SAMPLE_OF[name], t, "cuda"), wanted)


@pytest.mark.parametrize("kept", [0.0, 0.3, 1.0])
def test_tables_of_networks_whose_weights_are_mostly_0(kept: float):
    """Most edges are in one cell, and are summed by many threads."""
    sample = SAMPLE_OF["table-reciprocal"].but("pruned", networks=(mlp(3, 40, 30, 2, copies=2),), head=0)
    t, g = cast(leaves(sample), torch.float32), torch.Generator().manual_seed(0)
    for name in (n for n in t if n.startswith("weights.")):
        t[name] *= torch.rand(t[name].shape, generator=g) < kept
    assert_budget(run_engine(sample, t, "cuda"), run_oracle(sample, cast(t, torch.float64)), run_oracle(sample, t), checks.FLOAT32_FLOOR)


def test_nan_stays_with_its_neuron():
    sample = PLAIN.but("nan", head=0, reduce=("sum", "mean", "min", "max", "std", "var"))
    t = cast(leaves(sample), torch.float32)
    clean = run_engine(sample, t, "cuda")
    t["weights.1"][0, 2, 1, 0] = float("nan")
    found = run_engine(sample, t, "cuda")["out.0"]
    node, others = 8, [n for n in range(20) if n != 8]
    assert found[node].isnan().all() and torch.equal(found[others], clean["out.0"][others])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_how_weights_lie_in_memory_does_not_matter(dtype: torch.dtype, channels: int):
    """They come in lines of 16 bytes wherever these begin: those of sources that are neighbours, or those of destinations; nothing beyond them is read."""
    g = torch.Generator().manual_seed(0)
    graph, width = ngk.NeuralGraph.mlp([37, 21, 19]), 17
    weights = [torch.randn(1, a, b, channels, generator=g).to(dtype) for a, b in ((37, 21), (21, 19))]
    x = torch.randn(graph.num_nodes, 4, generator=g)
    encoder = [torch.randn(*shape, generator=g).requires_grad_() for shape in ((width, channels), (width,))]
    message = [torch.randn(*shape, generator=g).requires_grad_() for shape in ((6, width), (6,), (6, 4), (6, 4))]

    def results(views: list[torch.Tensor]) -> list[torch.Tensor]:
        own = [v.detach().requires_grad_() for v in views]
        out = ngk.aggregate(ngk.EdgeState(graph, own, ngk.encoders.Linear(*encoder)), ngk.Message.product(x, *message), ("mean", "max"))
        return [out, *torch.autograd.grad(out.square().sum(), [*own, *encoder, *message])]

    with ngk.use_backend("cuda"):
        wanted = results(weights)
        for change in LAYOUTS:
            assert all(torch.equal(a, b) for a, b in zip(results([change(w) for w in weights]), wanted, strict=True))


@pytest.mark.parametrize("width", [6, 12, 24])
@pytest.mark.parametrize(("dtype", "error"), [("float32", 2e-5), ("bfloat16", 2**-7), ("float16", 2**-10)])
@pytest.mark.parametrize("networks", [(mlp(2, 19, 3, reverse=True), mlp(17, 2)), SPARSE_UNEQUAL], ids=["dense", "sparse"])
def test_stored_states_of_any_width(networks: tuple[Network, ...], dtype: str, error: float, width: int):
    """Where their rows are lines of 16 bytes, lanes exchange columns to write and read such."""
    sample = PLAIN.but("stored", networks=networks, packed=True, memory=(dtype, dtype), width=width, head=width, scale=0.3)
    t = cast(leaves(sample), torch.float32)
    assert_close(run_engine(sample, t, "cuda"), run_engine(sample, t, "reference"), error)


def test_what_is_kept_of_a_graph_is_not_where_its_weights_lie():
    """One tensor twice, then two of the same layout, and back."""
    g = torch.Generator().manual_seed(0)
    graph, encoder = ngk.NeuralGraph.mlp([4, 4, 4]), ngk.encoders.Linear(torch.randn(8, 1, generator=g), torch.randn(8, generator=g))
    a, b, x = torch.randn(1, 4, 4, 1, generator=g), torch.randn(1, 4, 4, 1, generator=g), torch.randn(12, 3, generator=g)
    message = ngk.Message.product(x, torch.randn(5, 8, generator=g), torch.randn(5, generator=g), torch.randn(5, 3, generator=g), torch.randn(5, 3, generator=g))
    for weights in ([a, a], [a, b], [b.clone(), a], [b, b], [a, a]):
        results = []
        for backend in ("reference", "cuda"):
            own = [w.detach().requires_grad_() for w in weights]
            with ngk.use_backend(backend):
                out = ngk.aggregate(ngk.EdgeState(graph, own, encoder), message, ("sum", "max"))
                results.append({str(k): v for k, v in enumerate([out.detach(), *torch.autograd.grad(out.square().sum(), own)])})
        assert_close(results[1], results[0], 1e-5)


def test_panels_cover_every_edge_once():
    for sizes in ((1, 1), (3, 5000), (5000, 3), (70, 4100), (16, 16), (17, 33)):
        graph = ngk.NeuralGraph.mlp(list(sizes))
        edges = ngk.EdgeState(graph, [torch.zeros(1, *sizes, 1)], ngk.encoders.Identity())
        topology = edges.graph.edges_as(False, False, True).table
        found = plan.Plan(topology, torch.device("cpu")).work()
        for work in (found.reduce(), *found.gradients(64, 0, 0, 0, 1 << 30)):
            (panels,) = work.launches
            seen = torch.zeros(sizes[1], sizes[0], dtype=torch.int64)
            for _, _, i0, i1, j0, j1, *_ in panels.tolist():
                seen[i0:i1, j0:j1] += 1
            assert (seen == 1).all() and panels[:, 4].remainder(16).eq(0).all()


def test_plans_are_made_on_their_device():
    """Whatever takes the default device instead meets tensors of another one here."""
    index = torch.tensor([[0, 2, 3, 1, 3], [1, 1, 3, 0, 1]])
    for graph in (ngk.NeuralGraph.from_edge_index(index, 4).closure("edges"), ngk.NeuralGraph.mlp([5, 40, 3])):
        topology = graph.edges_as().table
        with torch.device("meta"):
            found = plan.Plan(topology, torch.device("cpu"))
            assert found.degrees(graph.num_nodes).device.type == "cpu"
            for work in (found.work().reduce(), *found.work().gradients(64, 8, 64, 64, 1 << 12)):
                assert work.launches and all(t.device.type == "cpu" for t in (*work.launches, *work.messages, *(t for sums in work.sums for t in sums)))


# ---- seeded bugs ----
PATCHES = (
    ("cells-that-go-on-overwritten", "second_stage.h", "(first > begin)) * 2 * TABLE_LINES", "(first < 0)) * 2 * TABLE_LINES"),
    ("cells-of-one-piece-alone", "second_stage.h", "piece <= (end - 1) / PIECE", "piece <= begin / PIECE"),
    ("numbers-all-the-first", "second_stage.h", "s.to[k] = s.values[k];", "s.to[k] = s.values[0];"),
    ("tail-of-sources-counts", "edges.h", "sources = first(panel.j1 - j);", "sources = 0xffffu;"),
    ("tail-of-destinations-counts", "edges.h", "left = (panel.i1 - i) << block->log_rows", "left = 16"),
    ("tail-of-listed-edges-counts", "edges.h", "present = first(rows) &", "present = 0xffffu &"),
    ("idle-warps-have-edges", "edges.h", "rows = there ? static_cast<int>(left < 16 ? left : 16) : 0;", "rows = there || left ? static_cast<int>(left < 16 ? left : 16) : 0;"),
    ("runs-begin-in-every-tile", "edges.h", "starts = block->edges || j == panel.j0 ? begins & first(rows) : 0;", "starts = (begins | 1u) & first(rows);"),
    ("last-run-goes-on", "edges.h", "closed = run >> 16 & 1", "closed = false"),
    ("every-tile-from-the-first-run", "edges.h", "row = static_cast<int>(run >> 32)", "row = 0"),
    ("one-destination-for-a-tile", "edges.h", "node[h] = node_of(panel, e);", "node[h] = node_of(panel, edge(panel, 0));"),
    ("one-destinations-coefficients", "aggregate_back.h", "coefficients(1, stride)", "coefficients(0, stride)"),
    ("statistics-of-the-run-before", "aggregate.h", "run.begins ? 0 : seen", "seen"),
    ("rows-of-a-fragment-exchanged", "precision.h", "{pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3])", "{pack_bf16(v[2], v[3]), pack_bf16(v[0], v[1])"),
    ("tf32-columns-in-their-own-order", "precision.h", "{v[0], v[2], v[1], v[3],", "{v[0], v[2], v[3], v[1],"),
    ("transposed-rows-exchanged", "precision.h", "(lane() / 16 * 8 + lane() % 8) * ld + lane() / 8 % 2 * 8", "(lane() / 8 % 2 * 8 + lane() % 8) * ld + lane() / 16 * 8"),
    ("no-barrier-after-the-product", "backprop.h", "matrix_gradients(upper, up);\n        sync_block();", "matrix_gradients(upper, up);"),
    ("no-barrier-before-the-product", "backprop.h", "sync_block();\n        matrix_gradients(upper, up);", "matrix_gradients(upper, up);"),
    ("features-read-before-they-are-there", "edges.h", "turn(0);\n    sync_warp();\n    fetch(panel);", "turn(0);\n    fetch(panel);"),
    ("features-read-before-they-arrive", "edges.h", "wait_for_copies<AHEAD - 1>();", ""),
    ("all-tiles-arrive-at-one-place", "edges.h", "tile % AHEAD * this->sides()", "tile % 1 * this->sides()"),
    ("alignment-forgotten", "edges.h", "r * size : 0)) + before(from)", "r * size : 0)) + 0 * before(from)"),
    ("first-tile-of-a-band-for-all", "inputs.h", "(tile * g.channels + c)", "(0 * tile + c)"),
    ("bands-counted-by-the-strip", "edges.h", "panel.i1 - panel.i0 + BAND - 1) / BAND", "panel.i1 - panel.i0) / BAND"),
    ("bands-beyond-the-panel", "edges.h", "panel.i1 - coming.i < BAND ?", "panel.i1 - coming.i < 0 ?"),
    ("halves-of-lines-not-exchanged", "lines.h", "exchange(pairs + 1, pairs + 3, 2);", ""),
    ("rows-of-lines-not-exchanged", "lines.h", "exchange(x + k, x + 4 + k, 1);", "x[k] += 0;"),
    ("many-features-of-one-row", "inputs.h", "starts_of(from, g.channels)[r]", "starts_of(from, g.channels)[0]"),
    ("spread-lost-between-two-steps", "second_stage.h", "if (g.slots.spread()) to[g.padded] = squares;", "if (g.slots.spread()) to[g.padded] = 0;"),
    ("message-overwrites-the-state", "evaluator.h", "odd ? 2 : 1 - g.edge_stages % 2", "odd ? 2 : g.edge_stages % 2"),
    ("residual-gradient-lost", "backprop.h", "if (stage.add >= 0 || (FULL && stage.source == FROM_NORM)) store8(", "if (FULL && stage.source == FROM_NORM) store8("),
    ("second-half-forgotten", "backprop.h", "h < upper.halves; ++h) add_product", "h < 1; ++h) add_product"),
    ("strip-overwrites-the-last-one", "sinks.h", "*to = run.begins ? total : *to + total;", "*to = total;"),
    ("variance-between-lanes-lost", "../message_math.h", "*squares + (other_squares + delta * delta * (na * nb / n))", "*squares + other_squares"),
    ("reversed-blocks-overwrite", "sinks.h", "add ? x + read_value<float>(p, dtype) : x", "add && dtype < 0 ? x + read_value<float>(p, dtype) : x"),
    ("tiles-of-one-edge", "edges.h", "3 * (at < block->n_edges ? at : 16 * i)", "3 * 16 * i"),
    ("sources-of-one-destination", "sinks.h", "if (all || eval.ok[k / 2 % 2])", "if (all ? eval.ok[0] : eval.ok[k / 2 % 2])"),
    ("table-and-features-both", "sinks.h", "stage.source == FROM_TABLE && !eval.row_beyond(k) ? 0.0f : v[k]", "v[k]"),
    ("beyond-the-table-forgotten", "backprop.h", "if (lowest.source == FROM_FOURIER || beyond_table())", "if (lowest.source == FROM_FOURIER)"),
)  # fmt: skip


def passes(library: Path) -> bool:
    """Whether a library of kernels gives right values for a few samples."""
    with backends.emulate_cuda(library):
        try:
            for name in ("plain", "gate-1", "linear-residual-first", "unequal-reversed", "sparse-unequal", "table-reciprocal-beyond", "memory-none-virtual", "tiles-and-tails-reversed"):
                sample = SAMPLE_OF[name].but(name, reduce=("sum", "mean", "min", "max", "std", "var"), head=0)
                wanted, plain = float32_oracle(sample)
                assert_budget(run_engine(sample, cast(leaves(sample), torch.float32), "cuda"), wanted, plain, checks.FLOAT32_FLOOR)
            test_tiles_of_several_destinations((TINY, *SMALL), "table-reciprocal")
            test_how_weights_lie_in_memory_does_not_matter(torch.float32, 1)
            test_how_weights_lie_in_memory_does_not_matter(torch.bfloat16, 3)
            test_tables_of_networks_whose_weights_are_mostly_0(0.3)
            for dtype, error in (("float32", 2e-5), ("bfloat16", 2**-7)):
                test_stored_states_of_any_width(SPARSE_UNEQUAL, dtype, error, 24)
            with pytest.MonkeyPatch.context() as monkeypatch:
                test_many_partial_rows_of_a_hub_are_merged_in_two_steps(("mean", "std"), monkeypatch)
            t = cast(leaves(LOW[0]), torch.float32)
            wanted, plain = run_oracle(LOW[0], cast(t, torch.float64)), run_oracle(LOW[0], t, low=True)
            for of in (0, BACKWARDS, AHEAD):
                with order(of):
                    assert_budget(run_engine(LOW[0], t, "cuda", autocast=torch.bfloat16), wanted, plain, checks.BFLOAT16_FLOOR)
        except AssertionError:
            return False
    return True


@pytest.mark.mutants
@pytest.mark.parametrize(("file", "old", "new"), [pytest.param(*p[1:], id=p[0]) for p in PATCHES])
def test_seeded_bugs_are_caught(file: str, old: str, new: str, tmp_path: Path):
    emulation.check_bug(tmp_path, file, old, new, passes)


# ---- tensors that travel to a device with each op (tests/travel.py) ----
@pytest.mark.parametrize("sample", **named((PLAIN, PLAIN.but("packed", packed=True, networks=(mlp(2, 5, 3), mlp(3, 4)), residual=(True,)))))
def test_tensors_that_travel_make_no_difference(sample: Sample, emulated, monkeypatch):  # noqa: F811
    t, seen = cast(leaves(sample), torch.float32), []
    wanted = run_engine(sample, t, "cuda")
    run_on_device = launch.run
    monkeypatch.setattr(launch, "run", lambda *args: seen.append(args[0]) or run_on_device(*args))
    with travelling_to(torch.device("cpu")):
        assert_bitwise(run_engine(sample, t, "cuda"), wanted)
    assert seen


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_twins_keep_strides_and_what_is_shared(tmp_path: Path):
    """And write only what has changed: weights may lie in a file that nobody can write to."""
    np.arange(3, dtype=np.float32).tofile(tmp_path / "weights")
    only_read = torch.from_numpy(np.memmap(tmp_path / "weights", dtype=np.float32, mode="r"))
    whole = torch.arange(24.0).reshape(4, 6)
    left, right = whole.t()[1:3], whole[1, 2:]
    twins = Twins(torch.device("cpu"))
    a, b, c = map(twins.of, (left, right, only_read))
    assert a.stride() == left.stride() and torch.equal(a, left) and a.data_ptr() != left.data_ptr()
    assert torch.equal(c, only_read) and c.data_ptr() != only_read.data_ptr()
    b[0] = -1
    assert a[1, 1] == -1 and whole[1, 2] == 8
    twins.bring_back()
    assert whole[1, 2] == -1

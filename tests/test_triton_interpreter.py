"""The Triton kernels in Triton's interpreter, on the CPU: values and every gradient against the oracle in float64.

The interpreter must be asked for before the first import of triton. A run that declares the triton backend on a machine without a GPU
does so (conftest.py) and has these tests in its own process; any other run starts a process for them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pair_samples
import pytest
import torch
from compare import assert_bitwise, assert_budget, assert_close
from oracle import Network, mlp
from pair_list import GRID, OPTIONS
from pair_list import PLAIN as PAIR
from pair_list import TABLES as PAIR_TABLES
from pair_samples import PairSample
from sample_list import GRAPHS, LOOPS, MEMORY, PLAIN, RESIDUAL, REVERSED, SAMPLES, SPARSE_UNEQUAL, TABLES, UNEQUAL, UNEQUAL_REVERSED
from samples import Sample, cast, coefficients, engine, float32_oracle, float64_oracle, leaves, named, run, run_engine, run_oracle
from test_attend import assert_budget_of_pairs
from test_determinism import alone

import ngkernels as ngk
from ngkernels import edges, graph

ROOT = Path(__file__).resolve().parent.parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.usefixtures("one_thread")
slow = pytest.mark.slow

# One of each kind in the quick tier; all in the slow one.
QUICK = (
    "plain", "reduce-var-std-max-min-mean-sum", "activation-gelu", "gate-1", "product-0", "concat-2", "fourier-reciprocal-3-channels", "identity-then-residual",
    "linear-reciprocal-affine", "residual-blocks-reversed", "packed-reversed", "restricted-middle", "sizes-D130-H64-F130-dx17", "memory-virtual-same-packed",
    "sparse-and-dense-reversed", "sparse-memory-packed",
)  # fmt: skip
QUICK_FLOAT32 = ("table-reciprocal-beyond", "table-packed")
QUICK_PAIRS = (
    "three-updates", "affine-diagonals", "messages-reversed", "readout-packed", "messages-diagonals", "loops-in-layer0-token", "packed-in-restricted",
    "no-self-edges-holes-restricted", "values-plus", "D33-H16-dk5-dv32-heads2", "pair-update-first", "memory-same+virtual-none-same-in-token-layer-1",
)  # fmt: skip


def tiered(samples: tuple[Sample, ...], quick: tuple[str, ...]) -> list:
    missing = set(quick) - {s.name for s in samples}
    assert not missing, missing
    return [pytest.param(s, id=s.name, marks=() if s.name in quick else slow) for s in samples]


if not INTERPRETED:
    needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed, and this run does not declare its backend")

    def in_a_process(tier: str) -> None:
        env = {**os.environ, "TRITON_INTERPRET": "1", "NGKERNELS_TEST_BACKENDS": "triton"}
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", tier, str(Path(__file__).relative_to(ROOT))]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]

    @needs_triton
    def test_in_a_process_of_the_interpreter():
        in_a_process("not slow and not big")

    @slow
    @needs_triton
    def test_everything_in_a_process_of_the_interpreter():
        in_a_process("slow")

else:

    @pytest.mark.parametrize("sample", tiered(SAMPLES, QUICK))
    def test_float64_outputs_and_every_gradient(sample: Sample):
        assert_close(run_engine(sample, leaves(sample), "triton"), float64_oracle(sample), 1e-10)

    @pytest.mark.parametrize("sample", tiered(SAMPLES, QUICK_FLOAT32))
    def test_float32_within_twice_the_error_of_plain_pytorch(sample: Sample):
        wanted, plain = float32_oracle(sample)
        assert_budget(run_engine(sample, cast(leaves(sample), torch.float32), "triton"), wanted, plain, 8e-6)

    # ---- the node side ----
    from test_node_map import (  # noqa: F401  once more here, in the interpreter's process
        test_activations,
        test_equal_states_have_finite_gradients,
        test_float64_values_and_every_gradient,
        test_networks_alone_and_in_a_batch,
        test_no_rows,
    )
    from test_node_map import test_compiled_without_a_break as test_node_map_compiled  # noqa: F401
    from test_node_map import test_float32_within_twice_the_error_of_plain_pytorch as test_node_map_in_float32  # noqa: F401

    def test_node_map_run_to_run(monkeypatch):
        """Sums over rows in many parts."""
        import test_node_map as nodes

        monkeypatch.setattr("ngkernels._triton.node_map_back.PART", 64)
        t, options = nodes.arguments("reference", torch.float32), ("reference", "segments", "silu", False)
        with ngk.use_backend("triton"):
            first = nodes.outputs(nodes.run, t, *options)
            assert_bitwise(nodes.outputs(nodes.run, t, *options), first)
        assert_close(first, nodes.outputs(nodes.formula, t, *options), 1e-5)

    # ---- torch.compile ----
    @pytest.mark.parametrize("sample", [PLAIN.but("plain", head=0), pytest.param(TABLES[6].but("table", head=0), marks=slow)], ids=lambda s: s.name)
    def test_compiled_in_one_piece(sample: Sample):
        t = cast(leaves(sample), torch.float32)
        torch._dynamo.reset()
        with ngk.use_backend("triton"):
            compiled = torch.compile(lambda live: engine(sample, live)[0], fullgraph=True, backend="aot_eager")
            assert torch.equal(compiled(t), engine(sample, t)[0])
        torch._dynamo.reset()

    # ---- attention and pair updates ----
    @pytest.mark.parametrize("sample", tiered((*OPTIONS, *GRID), QUICK_PAIRS))
    def test_attention_and_pair_updates_in_float64(sample: PairSample):
        assert_close(pair_samples.run_engine(sample, pair_samples.leaves(sample), "triton"), pair_samples.float64_oracle(sample), 1e-10)

    @pytest.mark.parametrize("sample", tiered((*PAIR_TABLES, *OPTIONS[::7]), ("table-both",)))
    def test_attention_in_float32_within_twice_the_error_of_plain_pytorch(sample: PairSample):
        wanted, plain = pair_samples.float32_oracle(sample)
        assert_budget_of_pairs(pair_samples.run_engine(sample, cast(pair_samples.leaves(sample), torch.float32), "triton"), wanted, plain, 8e-6)

    @pytest.mark.parametrize("rate", [0.3, pytest.param(0.9, marks=slow)])
    def test_dropout_drops_what_every_backend_drops(rate: float):
        sample = PAIR.but("dropout", dropout=rate)
        t = pair_samples.leaves(sample)
        results = []
        for backend in ("reference", "triton"):
            with ngk.use_backend(backend):
                results.append(run(lambda live: [pair_samples.attend(sample, live, pair_samples.pair_state(sample, live), seed=-(1 << 40) + 12345)], t))
        assert_close(results[1], results[0], 1e-10)

    SPARSE_PAIRS = Network((3, 30), (("sparse", 0, 1, tuple((k % 3, k) for k in range(26)) + ((0, 1), (2, 0))), ("sparse", 1, 1, ((3, 3), (4, 5), (5, 4), (0, 29)))))
    PAIR_TILES = (
        PAIR.but("triangle", networks=(mlp(2, 35, 3),), residual=(False,), reverse=(True,), nodes=(True,), norm=(False,)),
        PAIR.but("sparse", networks=(SPARSE_PAIRS,), over="in", residual=(False,), reverse=(True,), nodes=(True,), norm=(False,)),
    )

    @pytest.mark.parametrize("sample", **named(PAIR_TILES))
    def test_attention_in_tiles_as_on_a_gpu(sample: PairSample, monkeypatch):
        """Small tiles, and partial results in many pieces."""
        monkeypatch.setattr("ngkernels._triton.launch.INTERPRETED", 64)
        monkeypatch.setattr("ngkernels._triton.launch.BUDGET", 1)
        monkeypatch.setattr("ngkernels._triton.launch.MOST_TILES", 0)
        assert_close(pair_samples.run_engine(sample, pair_samples.leaves(sample), "triton"), pair_samples.float64_oracle(sample), 1e-10)

    @pytest.mark.parametrize("sample", **named((PAIR.but("edges", over="edges", networks=(mlp(2, 5, 3),)),)))
    def test_attention_run_to_run(sample: PairSample):
        t = cast(pair_samples.leaves(sample), torch.float32)
        assert_bitwise(pair_samples.run_engine(sample, t, "triton"), pair_samples.run_engine(sample, t, "triton"))

    def test_only_the_gradient_of_queries():
        sample = PAIR.but("queries", networks=(mlp(2, 3),))
        found = pair_samples.run_engine(sample, pair_samples.leaves(sample), "triton", {"attend.q"})
        assert_close(found, {n: v for n, v in pair_samples.float64_oracle(sample).items() if n in ("out.0", "grad.attend.q")})

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_weight_dtypes_keep_their_gradients_dtype(dtype: torch.dtype):
        sample = TABLES[0].but("dtype", networks=REVERSED)
        t = cast(leaves(sample), torch.float32, dtype)
        wanted, plain = run_oracle(sample, cast(t, torch.float64)), run(lambda live: _float(sample, live), t)
        # the interpreter cuts off instead of rounding, where a kernel stores 16 bits; twice, as two blocks add to these gradients
        assert_budget(run_engine(sample, t, "triton"), wanted, plain, 4 * torch.finfo(dtype).eps)

    def _float(sample: Sample, live):
        from samples import oracle

        return oracle(sample, {name: v.float() for name, v in live.items()})

    # ---- the sizes of tiles that GPUs get ----
    HUB = Network((3, 60), (("sparse", 1, 0, tuple((k, 1) for k in range(60)) + ((3, 0), (9, 0), (3, 2))), ("dense", 1, 0)))  # a neuron with many edges beside two with few
    GPU_TILES = (
        PLAIN.but("film", reduce=("sum", "mean", "min", "max", "std", "var")),
        PLAIN.but("diagonal", networks=(RESIDUAL,), memory=("virtual", None)),
        PLAIN.but("table", networks=UNEQUAL_REVERSED, encoder="fourier", packed=True, reciprocal=True),
        PLAIN.but("sparse", networks=SPARSE_UNEQUAL, memory=("virtual", None)),
        PLAIN.but("hub", networks=(HUB,)),
    )

    @pytest.mark.parametrize("size", [16, pytest.param(32, marks=slow), pytest.param(64, marks=slow)])
    @pytest.mark.parametrize("sample", **named(GPU_TILES))
    def test_tiles_as_on_a_gpu(sample: Sample, size: int, monkeypatch):
        monkeypatch.setattr("ngkernels._triton.launch.INTERPRETED", size)
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

    # ---- one leaf at a time ----
    @pytest.mark.parametrize("wanted", [{"weights.0"}, {"x"}, {"x0"}, {"message.edge.bias"}, {"encoder.weight"}], ids=lambda w: "-".join(w))
    def test_only_the_wanted_gradients(wanted: set[str]):
        found = run_engine(PLAIN, leaves(PLAIN), "triton", wanted)
        assert_close(found, {n: v for n, v in float64_oracle(PLAIN).items() if n.startswith("out.") or n.removeprefix("grad.") in wanted})

    def test_a_block_that_nobody_reads_has_no_gradient():
        sample = PLAIN.but("some", reduce=(), networks=(mlp(2, 5, 3, reverse=True),))
        results = []
        for f in (lambda live: run_oracle_outputs(sample, live), lambda live: engine(sample, live)):
            live = {name: v.clone().requires_grad_() for name, v in leaves(sample).items()}
            with ngk.use_backend("triton"):
                out = f(live)
                grads = torch.autograd.grad((out[2] * coefficients(out)[2]).sum(), list(live.values()), allow_unused=True)
            results.append({name: torch.zeros_like(v) if g is None else g for (name, v), g in zip(live.items(), grads, strict=True)})
        assert_close(results[1], results[0], 1e-10)

    def run_oracle_outputs(sample: Sample, live):
        from samples import oracle

        return oracle(sample, live)

    # ---- layer norm and tokens, which the samples do not have ----
    @pytest.mark.parametrize("token", [False, True], ids=["norm", "norm-and-token"])
    def test_layer_norm_of_edge_states(token: bool):
        """Registers of two chunks, against the reference backend."""
        d, h, f, x = 70, 7, 4, 6
        g = torch.Generator().manual_seed(0)

        def leaf(*shape: int) -> torch.Tensor:
            return (0.5 * torch.randn(*shape, generator=g, dtype=torch.float64)).requires_grad_()

        net = ngk.NeuralGraph.mlp([2, 5, 3], batch_size=2)
        weights, sizes = [leaf(2, 2, 5, 1), leaf(2, 5, 3, 1)], [(h, d), (h, x), (h, x), (h,), (d, h), (d,), (d,), (d,)]
        if token:
            blocks = (graph.Block("dense", 1, 2, 0), graph.Block("dense", 2, 3, 1), graph.Block("dense", 0, 3, 2))
            net, weights = ngk.NeuralGraph([graph.Part((1, 2, 5, 3), blocks, 2, token=True)]), [*weights, leaf(2, 1, 3, 1)]
        states, updates = leaf(net.num_nodes, x), [[leaf(*s) for s in sizes] for _ in range(2)]
        encoder, message = (leaf(d, 1), leaf(d)), (leaf(2 * f, d), leaf(2 * f), leaf(f, x), leaf(f, x))
        wanted = [*weights, states, *encoder, *message, *(t for u in updates for t in u)]
        results = []
        for backend in ("reference", "triton"):
            with ngk.use_backend(backend):
                e = ngk.EdgeState(net, weights, ngk.encoders.Linear(*encoder))
                for *u, scale, shift in updates:
                    e = e.update(states, *u, activation="gelu", residual=True, norm=edges.Norm(scale, shift))
                out = ngk.aggregate(e, ngk.Message.film(states, *message), ("mean", "max", "std"))
                grads = torch.autograd.grad((out * coefficients([out])[0]).sum(), wanted)
            results.append({"out": out.detach(), **{str(k): v for k, v in enumerate(grads)}})
        assert_close(results[1], results[0], 1e-10)

    # ---- whole models ----
    @slow
    @pytest.mark.parametrize("name", ["NGGNN", "NGT-all", "NGT-edges"])
    def test_whole_models_agree_with_the_reference(name: str):
        from neural_graphs.models import NGGNN, NGT

        layout = [2, 4, 3]
        model = NGGNN(layout=layout, d_hid=16, num_layers=2, out_features=5) if name == "NGGNN" else NGT(layout=layout, out_features=5, attention=name[4:])
        weights = [torch.randn(2, a, b, 1, requires_grad=True) for a, b in zip(layout, layout[1:])]
        biases, results = [torch.randn(2, b, 1) for b in layout[1:]], []
        for backend in ("reference", "triton"):
            with ngk.use_backend(backend):
                logits = model(weights, biases)
                results.append({str(k): v for k, v in enumerate([logits.detach(), *torch.autograd.grad(logits.square().sum(), weights)])})
        assert_close(results[1], results[0], 1e-4)

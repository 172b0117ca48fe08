"""The Triton kernels in Triton's interpreter: values and every gradient of messages, readouts, checkpoints and node maps against the oracle.

In a process of its own (test_triton_interpreter.py).
"""

from __future__ import annotations

import pytest
import torch
from allocations import planned_and_allocated
from compare import assert_bitwise, assert_budget, assert_close
from interpreted import seeded, slow, tiered
from oracle import mlp
from sample_list import PLAIN, REVERSED, SAMPLES, TABLES
from samples import Sample, cast, coefficients, engine, float32_oracle, float64_oracle, leaves, named, oracle, run, run_engine, run_oracle
from test_node_map import (  # noqa: F401  once more here, in the interpreter's process
    test_activations,
    test_equal_states_have_finite_gradients,
    test_float64_values_and_every_gradient,
    test_networks_alone_and_in_a_batch,
    test_no_rows,
)
from test_node_map import test_compiled_without_a_break as test_node_map_compiled  # noqa: F401
from test_node_map import test_float32_within_twice_the_error_of_plain_pytorch as test_node_map_in_float32  # noqa: F401
from test_random_expressions import check

import ngkernels as ngk
from neural_graphs.models import NGGNN, NGT
from ngkernels import edges, graph

pytestmark = pytest.mark.usefixtures("one_thread")
# One of each kind in the quick tier; all in the slow one.
QUICK = (
    "plain", "reduce-sum", "reduce-sum-mean-max", "linear-9-channels", "fourier-many", "reduce-var-std-max-min-mean-sum", "activation-gelu", "gate-1", "product-0", "concat-2", "fourier-reciprocal-3-channels", "identity-then-residual",
    "linear-reciprocal-affine", "residual-blocks-reversed", "packed-reversed", "restricted-middle", "sizes-D130-H64-F130-dx17", "memory-virtual-same-packed",
    "sparse-and-dense-reversed", "sparse-memory-packed",
)  # fmt: skip
QUICK_FLOAT32 = ("table-reciprocal-beyond", "table-packed", "table-shared-beyond", "table-affine", "table-residual-first", "table-beyond-many", "sparse-table")


@pytest.mark.parametrize("sample", tiered(SAMPLES, QUICK))
def test_float64_outputs_and_every_gradient(sample: Sample):
    assert_close(run_engine(sample, leaves(sample), "triton"), float64_oracle(sample), 1e-10)

@pytest.mark.parametrize("sample", tiered(SAMPLES, QUICK_FLOAT32))
def test_float32_within_twice_the_error_of_plain_pytorch(sample: Sample):
    wanted, plain = float32_oracle(sample)
    assert_budget(run_engine(sample, cast(leaves(sample), torch.float32), "triton"), wanted, plain, 8e-6)


@pytest.mark.parametrize("seed", seeded(6, 100))
def test_drawn_at_random(seed: int):
    check(seed, "triton")


WIDE = (
    PLAIN.but("256", networks=(mlp(2, 3),), width=256, hidden=40, features=8, node_width=9, scale=0.08, head=1),
    PLAIN.but("256-messages", networks=(mlp(2, 3),), width=8, hidden=256, features=256, node_width=9, scale=0.08, head=0),
    PLAIN.but("199", networks=(mlp(2, 3),), width=199, hidden=201, features=203, node_width=7, scale=0.08, head=0, residual=(True,)),
)


@pytest.mark.parametrize("sample", **named(WIDE))
def test_widths_up_to_256(sample: Sample):
    assert_close(run_engine(sample, leaves(sample), "triton"), run_oracle(sample, leaves(sample)), 1e-10)


# ---- the node side ----
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weight_dtypes_keep_their_gradients_dtype(dtype: torch.dtype):
    sample = TABLES[0].but("dtype", networks=REVERSED)
    t = cast(leaves(sample), torch.float32, dtype)
    wanted, plain = run_oracle(sample, cast(t, torch.float64)), run(lambda live: _float(sample, live), t)
    # the interpreter cuts off instead of rounding, where a kernel stores 16 bits; twice, as two blocks add to these gradients
    assert_budget(run_engine(sample, t, "triton"), wanted, plain, 4 * torch.finfo(dtype).eps)

def _float(sample: Sample, live):
    return oracle(sample, {name: v.float() for name, v in live.items()})


@pytest.mark.parametrize("dtype", ["float16", pytest.param("float16+virtual", marks=slow)])
def test_a_state_stored_in_half_precision(dtype: str):
    sample = PLAIN.but("half", memory=(dtype, None))
    t = cast(leaves(sample), torch.float32)
    assert_close(run_engine(sample, t, "triton"), run_engine(sample, t, "reference"), 1e-5, 1e-3)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reversed"])
def test_weights_in_memory_of_their_own_order(reverse: bool):
    """Views with strides and an offset are read where they lie, and get their gradients."""
    sample = PLAIN.but("strides", networks=(mlp(3, 5, 4, copies=2, reverse=reverse),), channels=2, reciprocal=reverse)
    t, wanted = leaves(sample), float64_oracle(sample)
    t["weights.0"] = torch.stack([torch.zeros(2, 2, 5, 3), t["weights.0"].permute(0, 3, 2, 1)])[1].permute(0, 3, 2, 1)  # as (out, in), behind another tensor
    t["weights.1"] = t["weights.1"].new_zeros(9, 2, 5, 8)[3:, :, :, ::2].permute(1, 2, 3, 0)[..., ::3].copy_(t["weights.1"])
    assert not any(t[f"weights.{k}"].is_contiguous() for k in range(2))
    live = {name: v.requires_grad_() for name, v in t.items()}
    with ngk.use_backend("triton"):
        out = engine(sample, live)
        grads = torch.autograd.grad(sum((o * c).sum() for o, c in zip(out, coefficients(out), strict=True)), list(live.values()))
    found = {f"out.{k}": o.detach() for k, o in enumerate(out)} | {f"grad.{name}": g for name, g in zip(live, grads, strict=True)}
    assert_close(found, wanted, 1e-10)


# ---- one leaf at a time ----
@pytest.mark.parametrize("wanted", [{"weights.0"}, {"x"}, {"x0"}, {"message.edge.bias"}, {"encoder.weight"}], ids=lambda w: "-".join(w))
def test_only_the_wanted_gradients(wanted: set[str]):
    found = run_engine(PLAIN, leaves(PLAIN), "triton", wanted)
    assert_close(found, {n: v for n, v in float64_oracle(PLAIN).items() if n.startswith("out.") or n.removeprefix("grad.") in wanted})

def test_a_block_that_nobody_reads_has_no_gradient():
    sample = PLAIN.but("some", reduce=(), networks=(mlp(2, 5, 3, reverse=True),))
    results = []
    for f in (lambda live: oracle(sample, live), lambda live: engine(sample, live)):
        live = {name: v.clone().requires_grad_() for name, v in leaves(sample).items()}
        with ngk.use_backend("triton"):
            out = f(live)
            grads = torch.autograd.grad((out[2] * coefficients(out)[2]).sum(), list(live.values()), allow_unused=True)
        results.append({name: torch.zeros_like(v) if g is None else g for (name, v), g in zip(live.items(), grads, strict=True)})
    assert_close(results[1], results[0], 1e-10)

def run_oracle_outputs(sample: Sample, live):
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


# ---- plans of a GPU ----
@pytest.mark.parametrize("method", ["ng-gnn", pytest.param("ng-t-edges", marks=slow)])
def test_peaks_of_a_gpu_with_triton_kernels(method: str):
    """Partial results, tables and node terms are counted, as the host side of the kernels allocates them."""
    if method == "ng-gnn":
        layout = [2, 60, 60, 3]
        model = NGGNN(layout, d_hid=16, num_layers=2, fourier_features=8)
    else:
        layout = [2, 17, 9, 3]
        model = NGT(layout, attention="edges", d_node=16, d_edge=16, d_attn_hid=16, d_node_hid=16, d_edge_hid=16, num_layers=2, fourier_features=8)
    planned, allocated = planned_and_allocated(model, ngk.NeuralGraph.mlp(layout, batch_size=2), "triton", "recompute", True)
    assert planned == pytest.approx(allocated, rel=0.05)

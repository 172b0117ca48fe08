"""The Triton kernels on a GPU: what neither the interpreter nor compilation alone can show."""

from __future__ import annotations

import pair_samples
import pytest
import samples
import torch
from compare import assert_bitwise, assert_budget, assert_close
from layouts import NETWORK
from oracle import Network, mlp
from pair_list import DIAGONALS
from pair_list import LOW_PRECISION as PAIR_LOW
from pair_list import PLAIN as PAIR
from pair_samples import PairSample
from sample_list import PLAIN, SPARSE_UNEQUAL, TABLES, UNEQUAL_REVERSED
from samples import Sample, cast, engine, float32_oracle, float64_oracle, leaves, named, run_engine, run_oracle
from test_attend import assert_budget_of_pairs
from test_determinism import AGAIN, LARGE, alone

import ngkernels as ngk
from ngkernels import backends

pytestmark = pytest.mark.gpu

RUNS = 50
PAIR_WEB = Network((9,), (("sparse", 0, 0, ((3, 1), (0, 1), (5, 5), (8, 1), (1, 0), (2, 7), (5, 4), (4, 5), (0, 8))),), copies=2)
SMALL = (
    PLAIN.but("sparse", networks=SPARSE_UNEQUAL, head=0),
    PLAIN.but("film", reduce=("sum", "mean", "min", "max", "std", "var"), networks=(mlp(3, 21, 7),)),
    PLAIN.but("packed-table", networks=UNEQUAL_REVERSED, encoder="fourier", table="auto", table_range=0.3, packed=True, reciprocal=True),
    PLAIN.but("virtual", memory=("virtual", None), networks=(mlp(3, 21, 7, reverse=True),)),
)


@pytest.mark.parametrize("sample", **named(SMALL))
def test_under_the_sanitizer(sample: Sample):
    """Small, for compute-sanitizer."""
    wanted, plain = float32_oracle(sample)
    assert_budget(run_engine(sample, cast(leaves(sample), torch.float32), "triton"), wanted, plain, 8e-6)


SMALL_PAIRS = (
    PAIR.but("all", networks=(mlp(3, 21, 7), NETWORK)),
    PAIR.but("edges-table", networks=(DIAGONALS,), over="edges", encoder="fourier", table="auto", token=True),
    PAIR.but("sparse", networks=(PAIR_WEB,), over="in", reduce=("mean", "max")),
)


@pytest.mark.parametrize("sample", **named(SMALL_PAIRS))
def test_attention_under_the_sanitizer(sample: PairSample):
    wanted, plain = pair_samples.float32_oracle(sample)
    assert_budget_of_pairs(pair_samples.run_engine(sample, cast(pair_samples.leaves(sample), torch.float32), "triton"), wanted, plain, 8e-6)


@pytest.mark.parametrize("sample", **named(PAIR_LOW))
def test_attention_with_bfloat16_operands_within_twice_the_error_of_plain_autocast(sample: PairSample):
    t = cast(pair_samples.leaves(sample), torch.float32)
    wanted, plain = pair_samples.run_oracle(sample, cast(t, torch.float64)), pair_samples.run_oracle(sample, t, low=True)
    assert_budget_of_pairs(pair_samples.run_engine(sample, t, "triton", autocast=torch.bfloat16), wanted, plain, 2**-8)


@pytest.mark.parametrize("sample", **named((PAIR.but("large", networks=(mlp(3, 171, 53),)), PAIR.but("dropout", networks=(mlp(3, 71, 2, copies=3),), over="edges", dropout=0.3))))
def test_attention_run_to_run(sample: PairSample):
    t = cast(pair_samples.leaves(sample), torch.float32)
    wanted = pair_samples.run_engine(sample, t, "triton")
    for _ in range(RUNS):
        assert_bitwise(pair_samples.run_engine(sample, t, "triton"), wanted)


@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("width", [16, 32, 64, 130])
def test_matrix_products_of_every_width(width: int, precision: str):
    """Exact, and in tf32 within its rounding."""
    sample = PLAIN.but("wide", networks=(mlp(3, 70, 30, 2),), width=width, hidden=width, features=width, node_width=width, scale=0.8 / width**0.5, reduce=("sum", "mean", "std"))
    t = cast(leaves(sample), torch.float32)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        found = run_engine(sample, t, "triton")
    finally:
        torch.set_float32_matmul_precision(before)
    assert_budget(found, run_oracle(sample, cast(t, torch.float64)), run_oracle(sample, t), 8e-6 if precision == "highest" else 2**-9)


@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("sample", **named(AGAIN))
def test_backward_meets_the_very_bits_of_the_forward(sample: Sample, low: bool):
    """With whole-number gradients the bias of the messages collects, exactly, every share of the extremes' gradients."""
    t = {name: v.cuda() for name, v in cast(leaves(sample), torch.float32).items()}
    bias = t["message.edge.bias" if not sample.mlp else f"message.mlp{sample.mlp - 1}.bias"].requires_grad_()
    with ngk.use_backend("triton"):
        with torch.autocast("cuda", torch.bfloat16, enabled=low):
            (out,) = engine(sample, t)
        incoming = torch.randint(1, 9, out.shape, generator=torch.Generator().manual_seed(3)).float().cuda()
        (grad,) = torch.autograd.grad(out, bias, incoming)
    assert torch.equal(grad[-sample.features :], incoming[(out != 0).any(-1).any(-1)].sum((0, 1)))


PARALLEL = (PLAIN.but("large", networks=LARGE), TABLES[6].but("table", networks=(mlp(3, 71, 230, 90, 2, reverse=True),)), PLAIN.but("many", networks=(mlp(2, 9, 4, copies=400),)), PLAIN.but("skinny", networks=(mlp(4097, 3),)))


@pytest.mark.parametrize("sample", **named(PARALLEL))
def test_run_to_run(sample: Sample):
    t = cast(leaves(sample), torch.float32)
    wanted = run_engine(sample, t, "triton")
    for _ in range(RUNS):
        assert_bitwise(run_engine(sample, t, "triton"), wanted)


def test_a_network_alone_and_in_a_batch(monkeypatch):
    networks = (mlp(2, 64, 64, 3), mlp(2, 5, 3), mlp(3, 71, 130, 2), mlp(2, 40, 40, 1, copies=3))
    sample = PLAIN.but("batch", networks=networks)
    t = cast(leaves(sample), torch.float32)
    batch = run_engine(sample, t, "triton")
    for k, net in enumerate(networks):
        for copy in range(net.copies):
            found, wanted = alone(sample, t, batch, k, copy, "triton")
            assert_bitwise(found, wanted)


@pytest.mark.parametrize("sample", **named((PLAIN.but("graph", networks=(mlp(3, 40, 20, 2),), head=0), PAIR.but("attention", networks=(mlp(3, 20, 2),)))))
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_no_synchronisation_and_captured_as_a_graph(sample: Sample, backend: str):
    """Forward and backward wait for nothing on the host, and replay on other numbers in the same memory."""
    module = pair_samples if isinstance(sample, PairSample) else samples
    t = {name: v.cuda().requires_grad_() for name, v in cast(module.leaves(sample), torch.float32).items()}

    def step() -> list[torch.Tensor]:
        (out,) = module.engine(sample, t)
        return [out.detach(), *torch.autograd.grad(out.sum(), list(t.values()))]

    with ngk.use_backend(backend):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
            torch.cuda.set_sync_debug_mode("error")
            try:
                wanted = step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        kept = {name: v.detach().clone() for name, v in t.items()}
        with torch.no_grad():
            for v in t.values():
                v.mul_(0.5)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = step()
        with torch.no_grad():
            for name, v in t.items():
                v.copy_(kept[name])
        graph.replay()
    torch.cuda.synchronize()
    assert_bitwise({str(k): v for k, v in enumerate(found)}, {str(k): v for k, v in enumerate(wanted)})


@pytest.mark.parametrize("sample", **named((PLAIN, PLAIN.but("table", encoder="fourier", table="auto", table_range=2.0, step=7))))
def test_compiled_in_one_piece(sample: Sample):
    sample = sample.but(sample.name, head=0)
    t = {name: v.cuda() for name, v in cast(leaves(sample), torch.float32).items()}
    with ngk.use_backend("triton"):
        assert torch.equal(torch.compile(lambda live: engine(sample, live)[0], fullgraph=True)(t), engine(sample, t)[0])


def test_triton_is_the_default_on_a_gpu():
    assert backends.BACKENDS[backends.choose("aggregate", torch.device("cuda"))] == "triton"


@pytest.mark.big
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_more_than_2_to_the_31_weights(backend: str):
    """64-bit addresses, forward and backward, messages and values: the last neurons of a large block, against the same neurons alone."""
    n = 46_400
    graph, few = ngk.NeuralGraph.mlp([n, n]), ngk.NeuralGraph.mlp([n, 8])
    w = torch.empty(1, n, n, 1, dtype=torch.bfloat16, device="cuda")
    w.uniform_(-1, 1)
    x = torch.randn(2 * n, 4, device="cuda")
    last = torch.cat([x[:n], x[-8:]])
    eye, encoder = torch.eye(4, device="cuda"), ngk.encoders.Linear(torch.randn(4, 1, device="cuda"), torch.zeros(4, device="cuda"))
    head = [(torch.randn(1, 4, device="cuda"), None)]

    def step(of: ngk.NeuralGraph, weights: torch.Tensor, nodes: torch.Tensor) -> list[torch.Tensor]:
        own = weights.detach().requires_grad_()
        edges = ngk.EdgeState(of, [own], encoder)
        out = ngk.aggregate(edges, ngk.Message.product(nodes, eye, None, eye, eye), ("sum", "max"))[-8:]
        (of_messages,) = torch.autograd.grad(out.square().sum(), own)
        (values,) = ngk.readout(edges, head)
        (of_values,) = torch.autograd.grad(values, own, values.detach())
        return [out.detach(), values.detach()[:, :, -8:], *(t[:, :, -8:].float() for t in (of_messages, of_values))]

    with ngk.use_backend(backend):
        found = [t.clone() for t in step(graph, w, x)]
        torch.cuda.empty_cache()
        for a, b, rtol in zip(found, step(few, w[:, :, -8:], last), (1e-4, 1e-4, 1e-2, 1e-2), strict=True):  # gradients: bfloat16
            torch.testing.assert_close(a, b, rtol=rtol, atol=1e-2)


def test_double_precision_as_in_the_interpreter():
    assert_close(run_engine(PLAIN, leaves(PLAIN), "triton"), float64_oracle(PLAIN), 1e-10)

"""The CUDA kernels on a device: what their emulation cannot tell. Run by `make gpu`; elsewhere left out, and so counted."""

from __future__ import annotations

import emulated_checks as checks
import pair_samples
import pytest
import samples
import torch
from compare import assert_bitwise, assert_budget
from instance_list import CHAINS, INSTANCES, NGT, check, sample_of
from oracle import mlp
from pair_list import LOW_PRECISION as PAIR_LOW
from pair_list import OPTIONS
from pair_list import PLAIN as PAIR
from pair_samples import PairSample
from sample_list import LOW_PRECISION, PLAIN, SAMPLES
from samples import Sample, cast, float32_oracle, leaves, named, run_engine, run_oracle
from test_attend import assert_budget_of_pairs
from test_cuda_pairs import SHAPES, missing, one_logit
from test_triton_device import RUNS, SMALL_PAIRS

import ngkernels as ngk
from ngkernels import backends, topology
from ngkernels._cuda import launch

pytestmark = pytest.mark.gpu
SUPPORTED = tuple(s for s in SAMPLES if 130 not in (s.width, s.hidden, s.features))
SMALL = tuple(s for s in SAMPLES if s.name in ("plain", "table-residual-first", "sparse-unequal", "fourier-reciprocal", "memory-virtual-same"))
LARGE = tuple(
    PLAIN.but(f"width-{w}", networks=(mlp(3, 171, 153, 2),), width=w, hidden=w, features=w, node_width=w, residual=(True, False, True), memory=(), scale=1 / w, head=0)
    for w in (16, 32, 64, 128)
)
SUMS = tuple(s.but(f"sums-{s.name}", reduce=("sum", "mean", "var")) for s in LARGE)  # one rounding more or less moves a minimum's gradient to another edge
FEW = tuple(i for i in INSTANCES if i[1] == 32)


@pytest.fixture(autouse=True)
def _built() -> None:
    reason = backends.why_not("cuda", torch.device("cuda"))
    assert reason is None, reason


@pytest.mark.parametrize("sample", **named(SMALL))
def test_under_the_sanitizer(sample: Sample):
    wanted, plain = float32_oracle(sample)
    assert_budget(run_engine(sample, cast(leaves(sample), torch.float32), "cuda"), wanted, plain, 8e-6)


@pytest.mark.parametrize("sample", **named(SMALL_PAIRS))
def test_attention_under_the_sanitizer(sample: PairSample):
    wanted, plain = pair_samples.float32_oracle(sample)
    assert_budget_of_pairs(pair_samples.run_engine(sample, cast(pair_samples.leaves(sample), torch.float32), "cuda"), wanted, plain, 8e-6)


@pytest.mark.parametrize(("purpose", "d", "precision"), FEW)
def test_each_purpose_and_rounding_under_the_sanitizer(purpose: str, d: int, precision: str):
    """Messages, those after pair updates, attention; in bf16, in tf32, exact."""
    check(sample_of(purpose, d, precision), precision)


@pytest.mark.parametrize(("purpose", "d", "precision"), INSTANCES)
def test_every_instance(purpose: str, d: int, precision: str):
    check(sample_of(purpose, d, precision), precision)


@pytest.mark.parametrize("precision", launch.PRECISIONS)
@pytest.mark.parametrize("sample", **named((*CHAINS, *NGT)))
def test_long_chains_of_updates(sample: Sample, precision: str):
    check(sample, precision)


@pytest.mark.parametrize("sample", **named(SUPPORTED))
def test_float32_within_twice_the_error_of_plain_pytorch(sample: Sample):
    wanted, plain = float32_oracle(sample)
    assert_budget(run_engine(sample, cast(leaves(sample), torch.float32), "cuda"), wanted, plain, 8e-6)


@pytest.mark.parametrize("sample", **named(LOW_PRECISION))
def test_bfloat16_operands_within_twice_the_error_of_plain_autocast(sample: Sample):
    t = cast(leaves(sample), torch.float32)
    wanted, plain = run_oracle(sample, cast(t, torch.float64)), run_oracle(sample, t, low=True)
    assert_budget(run_engine(sample, t, "cuda", autocast=torch.bfloat16), wanted, plain, 2**-8)


@pytest.mark.parametrize("sample", **named(LARGE))
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["exact", "bf16"])
def test_run_to_run(sample: Sample, autocast: torch.dtype | None):
    t = cast(leaves(sample), torch.float32)
    first = run_engine(sample, t, "cuda", autocast=autocast)
    for _ in range(RUNS):
        assert_bitwise(run_engine(sample, t, "cuda", autocast=autocast), first)


@pytest.mark.parametrize("sample", **named(SUMS))
def test_every_width_against_the_oracle(sample: Sample):
    wanted, plain = float32_oracle(sample)
    assert_budget(run_engine(sample, cast(leaves(sample), torch.float32), "cuda"), wanted, plain, 8e-6)


@pytest.mark.parametrize("tf32", [False, True], ids=["bf16", "tf32"])
@pytest.mark.parametrize("sample", **named(SUMS))
def test_rounded_operands_of_every_width_against_the_oracle(sample: Sample, tf32: bool):
    checks.rounded(samples, sample, tf32, assert_budget)


# ---- attention, pair updates, layer norms, tokens ----
PAIRS = tuple(s for s in (*OPTIONS, *SHAPES) if not missing(s) and not one_logit(s))


@pytest.mark.parametrize("sample", **named(PAIRS))
def test_pairs_within_twice_the_error_of_plain_pytorch(sample: PairSample):
    wanted, plain = pair_samples.float32_oracle(sample)
    assert_budget_of_pairs(pair_samples.run_engine(sample, cast(pair_samples.leaves(sample), torch.float32), "cuda"), wanted, plain, 8e-6)


@pytest.mark.parametrize("sample", **named(PAIR_LOW))
def test_pairs_with_bfloat16_operands(sample: PairSample):
    t = cast(pair_samples.leaves(sample), torch.float32)
    wanted, plain = pair_samples.run_oracle(sample, cast(t, torch.float64)), pair_samples.run_oracle(sample, t, low=True)
    found = pair_samples.run_engine(sample, t, "cuda", autocast=torch.bfloat16)
    assert_budget_of_pairs(found, wanted, plain, 2**-8)
    assert_bitwise(pair_samples.run_engine(sample, t, "cuda", autocast=torch.bfloat16), found)


PARALLEL = (
    PAIR.but("all", networks=(mlp(3, 171, 53),)),
    PAIR.but("edges-wide", networks=(mlp(3, 171, 153, 2),), over="edges", width=64, hidden=64, heads=4, dk=16, dv=16, scale=0.1),
    PAIR.but("dropout", networks=(mlp(3, 71, 2, copies=3),), over="edges", dropout=0.3),
    PAIR.but("messages", networks=(mlp(3, 171, 153, 2),), over=None, reduce=("mean", "min", "max", "std"), width=32, hidden=32, features=32, scale=0.2),
)


@pytest.mark.parametrize("sample", **named(PARALLEL))
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["exact", "bf16"])
def test_pairs_run_to_run(sample: PairSample, autocast: torch.dtype | None):
    t = cast(pair_samples.leaves(sample), torch.float32)
    first = pair_samples.run_engine(sample, t, "cuda", autocast=autocast)
    for _ in range(RUNS):
        assert_bitwise(pair_samples.run_engine(sample, t, "cuda", autocast=autocast), first)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_edges_given_on_the_device(backend: str):
    """Their lists are made there and stay: the same bits as of edges given on the CPU."""
    index = torch.randint(0, 300, (2, 5000), generator=torch.Generator().manual_seed(0)).unique(dim=1)
    g = torch.Generator(device="cuda").manual_seed(0)
    w, x = torch.randn(index.shape[1], 1, device="cuda", generator=g), torch.randn(300, 16, device="cuda", generator=g)
    encoder = ngk.encoders.Linear(torch.randn(16, 1, device="cuda", generator=g), torch.randn(16, device="cuda", generator=g))
    a, b, c = (torch.randn(16, 16, device="cuda", generator=g) for _ in range(3))
    results = []
    for given in (index, index.cuda()):
        graph, own, nodes = ngk.NeuralGraph.from_edge_index(given, 300), w.clone().requires_grad_(), x.clone().requires_grad_()
        assert len(graph.edges_as().table) == 2 + len(topology.COLUMNS) or given is index
        with ngk.use_backend(backend):
            out = ngk.aggregate(ngk.EdgeState(graph, own, encoder), ngk.Message.product(nodes, a, None, b, c), ("mean", "max", "std"))
            out.square().sum().backward()
        results.append({"out": out.detach(), "weights": own.grad, "x": nodes.grad})
    assert_bitwise(*results)

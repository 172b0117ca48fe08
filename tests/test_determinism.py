"""The same bits from run to run, on any number of threads, alone or in a batch, over dirty memory; and what backward evaluates again."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pair_samples
import pytest
import samples
import torch
from compare import assert_bitwise
from oracle import Network, mlp
from pair_list import OPTIONS
from pair_samples import PairSample
from sample_list import LOOPS, PLAIN, RESIDUAL, SAMPLES, SPARSE_UNEQUAL, UNEQUAL, UNEQUAL_REVERSED
from samples import Sample, Tensors, cast, coefficients, edge_state, engine_on, leaves, message_of, named, run_engine

import ngkernels as ngk

LARGE = (mlp(3, 71, 530, 90, 2),)  # several pieces and items of work
_RANDOM = random.Random(0)
WEB = Network((700, 90), (("sparse", 0, 0, tuple((_RANDOM.randrange(700), _RANDOM.choice((5, _RANDOM.randrange(700)))) for _ in range(21000))), ("dense", 0, 1)), reverse=True)
PARALLEL = (
    PLAIN.but("large", networks=LARGE),
    PLAIN.but("large-virtual", networks=LARGE, memory=("virtual", None), residual=(False,), head=0),
    PLAIN.but("table-reciprocal", networks=(mlp(3, 71, 230, 90, 2, reverse=True),), reciprocal=True, encoder="fourier", table="auto"),
    PLAIN.but("many-small", networks=(mlp(2, 9, 4, copies=400),)),
    PLAIN.but("packed", networks=(*UNEQUAL, mlp(2, 9, 4, copies=300)), packed=True),
    PLAIN.but("skinny", networks=(mlp(4097, 3),)),
    PLAIN.but("sparse", networks=(WEB,), reciprocal=True),
    PLAIN.but("sparse-virtual", networks=(WEB,), memory=("virtual", "same"), reduce=()),
    PLAIN.but("wide-features", networks=(mlp(40, 200, 3),), features=33, width=17, scale=0.3),
)


@pytest.fixture
def threads():
    """Sets the number of threads, for this test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("sample", **named(PARALLEL))
def test_run_to_run_and_on_any_number_of_threads(sample: Sample, threads):
    t = cast(leaves(sample), torch.float32)
    threads(2)
    wanted = run_engine(sample, t, "cpp")
    for count in (2, 1, 3, 2):
        threads(count)
        assert_bitwise(run_engine(sample, t, "cpp"), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("sample", **named(PARALLEL))
def test_many_runs_on_more_threads_than_cores(sample: Sample, threads):
    t = cast(leaves(sample), torch.float32)
    wanted = run_engine(sample, t, "cpp")
    for count in (8, 5, 16, 2) * 5:
        threads(count)
        assert_bitwise(run_engine(sample, t, "cpp"), wanted)


def test_the_reference_is_deterministic(one_thread):
    t = cast(leaves(PLAIN), torch.float32)
    assert_bitwise(run_engine(PLAIN, t, "reference"), run_engine(PLAIN, t, "reference"))


# ---- alone or in a batch ----
def alone(sample: Sample, t: Tensors, batch: Tensors, network: int, copy: int, backend: str = "cpp") -> tuple[Tensors, Tensors]:
    """One network of a batch by itself, its outputs and gradients; and the batch's rows of the same."""
    nets = sample.networks
    net = nets[network]
    node = sum(n.copies * n.num_nodes for n in nets[:network]) + copy * net.num_nodes
    first = sum(len(n.blocks) for n in nets[:network])
    outputs = sum(len(n.blocks) * (2 if n.reverse else 1) for n in nets[:network])
    rows, one = slice(node, node + net.num_nodes), slice(copy, copy + 1)
    own = {name: v[rows] if name.startswith("x") else v for name, v in t.items() if not name.startswith("weights.")}
    own.update({f"weights.{k}": t[f"weights.{first + k}"][one] for k in range(len(net.blocks))})
    live = {name: v.clone().requires_grad_() for name, v in own.items()}
    out = engine_on(backend, replace(sample, networks=(replace(net, copies=1),)), live)
    weighted = coefficients([v for name, v in batch.items() if name.startswith("out.")])
    parts = [out[0] * weighted[0][rows], *(o * weighted[1 + outputs + k][one] for k, o in enumerate(out[1:]))]
    local = [name for name in live if name.startswith(("weights.", "x"))]
    found = {f"grad.{n}": g for n, g in zip(local, torch.autograd.grad(sum(p.sum() for p in parts), [live[n] for n in local]), strict=True)}
    found.update({f"out.{k}": o.detach() for k, o in enumerate(out)})
    wanted = {f"grad.{n}": batch[f"grad.{n}"][rows] for n in local if n.startswith("x")}
    wanted.update({f"grad.weights.{k}": batch[f"grad.weights.{first + k}"][one] for k in range(len(net.blocks))})
    wanted["out.0"] = batch["out.0"][rows]
    wanted.update({f"out.{k}": batch[f"out.{outputs + k}"][one] for k in range(1, len(out))})
    return found, wanted


ENCODERS = {
    "linear": {},
    "fourier": {"encoder": "fourier"},
    "table": {"encoder": "fourier", "table": "auto"},
    "table-beyond": {"encoder": "fourier", "table": "auto", "table_range": 0.5},
}


@pytest.mark.parametrize("encoder", ENCODERS.values(), ids=ENCODERS.keys())
@pytest.mark.parametrize(
    "networks",
    [UNEQUAL, UNEQUAL_REVERSED, (mlp(2, 64, 64, 3), mlp(2, 5, 3), mlp(3, 71, 130, 2), mlp(2, 40, 40, 1, copies=3))],
    ids=["unequal", "reversed", "large"],
)
def test_a_network_alone_and_in_a_batch(networks: tuple[Network, ...], encoder: dict):
    """Node outputs, edge outputs, gradients of its weights and its nodes: bitwise."""
    sample = PLAIN.but("batch", networks=networks, reciprocal=networks is UNEQUAL_REVERSED, **encoder)
    t = cast(leaves(sample), torch.float32)
    batch = run_engine(sample, t, "cpp")
    for k, net in enumerate(networks):
        for copy in range(net.copies):
            found, wanted = alone(sample, t, batch, k, copy)
            assert_bitwise(found, wanted)


# ---- dirty memory ----
@pytest.fixture
def poisoned():
    """Fresh memory is full of NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.mark.parametrize("sample", **named((*SAMPLES, *OPTIONS)))
def test_what_was_computed_before_does_not_matter(sample: Sample):
    """Workers keep their memory from call to call: NaN that an earlier one left there reaches nothing."""
    module = pair_samples if isinstance(sample, PairSample) else samples
    t = cast(module.leaves(sample), torch.float32)
    wanted = module.run_engine(sample, t, "cpp")
    for dtype in (torch.float64, torch.float32):
        module.run_engine(sample, {name: torch.full_like(v, math.nan, dtype=dtype) for name, v in t.items()}, "cpp")
    assert_bitwise(module.run_engine(sample, t, "cpp"), wanted)


POISONED = (
    PLAIN,
    PLAIN.but("residual-blocks", networks=(RESIDUAL,), memory=("virtual", None)),
    PLAIN.but("loops", networks=(LOOPS,)),
    PLAIN.but("packed", networks=UNEQUAL_REVERSED, packed=True, memory=("same", None)),
    PLAIN.but("packed-restricted", networks=UNEQUAL, packed=True, restrict=-1, head=0, memory=("virtual", None)),
    PLAIN.but("restricted", networks=UNEQUAL_REVERSED, restrict=0, reciprocal=True),
    PLAIN.but("sparse", networks=SPARSE_UNEQUAL, memory=("virtual", None)),
    PLAIN.but("no-edges", networks=(Network((3, 4, 2, 5), (("dense", 0, 3),), 2),)),
    PLAIN.but("table", encoder="fourier", table="auto", table_range=0.5),
    PLAIN.but("unread-half", memory=("virtual", None), reduce=()),
    PLAIN.but("sizes", features=17, width=3, hidden=33, node_width=5, mlp=1, reduce=("sum", "mean", "min", "max", "std", "var")),
)


@pytest.mark.parametrize("wanted", [None, {"weights.0"}, {"x"}], ids=["all", "one-weight", "x"])
@pytest.mark.parametrize("sample", **named(POISONED))
def test_every_entry_is_written(sample: Sample, wanted: set[str] | None, backend: str, poisoned, one_thread):
    t = cast(leaves(sample), torch.float32)
    found = run_engine(sample, t, backend, wanted)
    assert all(v.isfinite().all() for v in found.values()), [n for n, v in found.items() if not v.isfinite().all()]
    torch.use_deterministic_algorithms(False)
    assert_bitwise(found, run_engine(sample, t, backend, wanted))


LEFT = (
    *POISONED,
    *(PLAIN.but(f"left-{kind}-{f}", kind=kind, features=f, width=9, encoder="fourier", table=table, residual=(), networks=(mlp(20, 2, 21, 1),)) for kind in ("film", "gate", "product", "concat") for f, table in ((1, "auto"), (9, "auto"), (5, "never"))),
    PLAIN.but("left-stored-17", width=17, hidden=3, features=1, node_width=2, memory=("same", None), head=0),
    PLAIN.but("left-virtual-17", width=17, hidden=3, features=1, node_width=2, memory=("same+virtual", "virtual"), reduce=()),
)  # fmt: skip


_WIDE = {
    "width": 64,
    "hidden": 64,
    "features": 64,
    "node_width": 64,
    "networks": (mlp(60, 50, 40),),
    "reduce": ("mean", "min", "max", "std"),
}
DIRT = (
    PLAIN.but("wide", **_WIDE),
    PLAIN.but("wide-table", encoder="fourier", table="auto", table_range=1.0, **_WIDE),
    PLAIN.but("wide-sums", kind="concat", mlp=2, **{**_WIDE, "reduce": ("sum",)}),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("sample", **named(LEFT))
def test_nothing_is_left_of_an_earlier_call(sample: Sample, dtype: torch.dtype, one_thread):
    """The kernels keep their working memory from call to call. Larger calls that fill it with NaN go first."""
    t = cast(leaves(sample), dtype)
    wanted = run_engine(sample, t, "cpp")
    assert all(v.isfinite().all() for v in wanted.values())
    for dirt in DIRT:
        run_engine(dirt, {name: torch.full_like(v, torch.nan) for name, v in cast(leaves(dirt), dtype).items()}, "cpp")
        assert_bitwise(run_engine(sample, t, "cpp"), wanted)


# ---- what backward evaluates again ----
AGAIN = (
    PLAIN.but("film", networks=LARGE, reduce=("max",), head=0),
    PLAIN.but("one-row", networks=(mlp(49, 13),), reduce=("max",), head=0),
    PLAIN.but("gate", networks=(mlp(97, 61, reverse=True),), reduce=("max",), kind="concat", mlp=2, reciprocal=True, features=19, head=0),
    PLAIN.but("fourier", networks=(mlp(7, 150, 3),), reduce=("max",), encoder="fourier", head=0),
    PLAIN.but("table", networks=(mlp(7, 150, 3),), reduce=("max",), encoder="fourier", table="auto", table_range=0.5, head=0),
    PLAIN.but("virtual", networks=(mlp(7, 150, 3),), reduce=("max",), memory=("virtual", "virtual"), head=0),
    PLAIN.but("sparse", networks=(WEB,), reduce=("max",), encoder="fourier", table="auto", head=0),
    PLAIN.but("stored", networks=(mlp(7, 150, 3),), reduce=("max",), memory=("bfloat16", None), head=0),
    PLAIN.but("packed", networks=(*UNEQUAL, mlp(7, 90, 3)), packed=True, reduce=("max",), head=0),
    PLAIN.but("low", networks=(mlp(7, 150, 3),), reduce=("max",), width=16, hidden=32, features=32, scale=0.3, head=0),
)


@pytest.mark.parametrize("extreme", ["min", "max"])
@pytest.mark.parametrize("sample", **named(AGAIN))
def test_backward_meets_the_very_bits_of_the_forward(sample: Sample, extreme: str, backend: str, device: torch.device):
    """The bias of the messages collects every share of the extremes' gradients. With whole-number gradients the sum is exact, so a
    single message that came out differently the second time would be missed in it."""
    sample = sample.but(sample.name, reduce=(extreme,))
    t = {name: v.to(device) for name, v in cast(leaves(sample), torch.float32).items()}
    bias = t["message.edge.bias" if not sample.mlp else f"message.mlp{sample.mlp - 1}.bias"].requires_grad_()
    with ngk.use_backend(backend):
        e = edge_state(sample, t)
        for low in (False, True):
            with torch.autocast(device.type, torch.bfloat16, enabled=low):
                out = ngk.aggregate(e, message_of(sample, t), sample.reduce)
            incoming = torch.randint(1, 9, out.shape, generator=torch.Generator().manual_seed(3)).float().to(device)
            (grad,) = torch.autograd.grad(out, bias, incoming)
            reached = incoming[e.graph.in_degree.to(device) > 0].sum((0, 1))
            assert torch.equal(grad[-sample.features :], reached)

"""The ops as PyTorch ops: gradcheck, opcheck, second derivatives, any choice of gradients, what is saved for backward."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from compare import assert_bitwise, assert_close
from oracle import Network, mlp
from sample_list import EDGELESS, PLAIN, PRUNED, REVERSED, UNEQUAL_REVERSED, WEB
from samples import Sample, cast, edge_state, engine, graph_of, leaves, message_of, named, run_engine
from torch.utils._python_dispatch import TorchDispatchMode

import ngkernels as ngk

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = PLAIN.but("tiny", networks=(mlp(2, 3, 1, copies=2),), width=3, hidden=2, features=2, node_width=2, head=1)
SMALL = (
    TINY,
    TINY.but("reciprocal-fourier-gate", networks=(mlp(2, 2, 1, reverse=True),), reciprocal=True, encoder="fourier", kind="gate"),
    TINY.but("concat-sum-var", kind="concat", mlp=1, reduce=("sum", "var"), activation="tanh"),
    TINY.but("product-identity", kind="product", encoder="identity", residual=(True,), reduce=("max", "mean")),
    TINY.but("then-gelu", layers=1, activation="gelu", reduce=("std",), head=2),
    TINY.but("stored", memory=("same", None)),
    TINY.but("restricted", restrict=-1),
    TINY.but("sparse", networks=(Network((4,), (("sparse", 0, 0, ((0, 1), (2, 1), (3, 3), (0, 1))),)),)),
    TINY.but("packed", packed=True, networks=(mlp(2, 2, 1, reverse=True), mlp(1, 3))),
)
VIRTUAL = (
    TINY.but("virtual", memory=("virtual", None)),
    TINY.but("virtual-stored", memory=("virtual", "same")),
    TINY.but("virtual-virtual", memory=("virtual", "virtual"), head=0),
)


def function_of(s: Sample, read: bool) -> tuple:
    """The sample as a function of all its leaves; aggregate alone or readout alone."""
    s = s.but(s.name, reduce=()) if read else s.but(s.name, head=0)
    t = leaves(s)
    return lambda *xs: tuple(engine(s, dict(zip(t, xs, strict=True)))), [v.clone().requires_grad_() for v in t.values()]


ops = pytest.mark.parametrize("read", [False, True], ids=["aggregate", "readout"])


@ops
@pytest.mark.parametrize("sample", **named((*SMALL, *VIRTUAL)))
def test_gradcheck(sample: Sample, read: bool, backend: str):
    if read and not sample.head:
        sample = sample.but(sample.name, head=1)
    f, inputs = function_of(sample, read)
    with ngk.use_backend(backend):
        assert torch.autograd.gradcheck(f, inputs, fast_mode=True)


@ops
@pytest.mark.parametrize("sample", **named(SMALL))
def test_gradgradcheck(sample: Sample, read: bool, backend: str):
    f, inputs = function_of(sample, read)
    with ngk.use_backend(backend):
        assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


@pytest.mark.slow
@ops
@pytest.mark.parametrize("sample", **named(SMALL))
def test_gradgradcheck_entry_by_entry(sample: Sample, read: bool, backend: str):
    f, inputs = function_of(sample, read)
    with ngk.use_backend(backend):
        assert torch.autograd.gradcheck(f, inputs) and torch.autograd.gradgradcheck(f, inputs)


@pytest.mark.parametrize("sample", **named(VIRTUAL))
def test_second_derivatives_through_a_virtual_checkpoint_say_no(sample: Sample, backend: str):
    """They would miss what the checkpoint cuts; an error is better than a wrong number."""
    t = {name: v.requires_grad_() for name, v in leaves(sample).items()}
    with ngk.use_backend(backend):
        out = engine(sample, t)
        grads = torch.autograd.grad(sum(o.sin().sum() for o in out), list(t.values()), create_graph=True)
        with pytest.raises(
            NotImplementedError, match="second derivatives through a virtual checkpoint are not available; use recompute or checkpoint"
        ):
            torch.autograd.grad(sum(g.sum() for g in grads), list(t.values()))


def test_second_derivatives_through_the_table(backend: str):
    """float32: the table's second derivative against that of the direct evaluation in float64."""
    sample = TINY.but("table", encoder="fourier", table="auto", head=0, reduce=("mean",))

    def second(t):
        t = {name: v.requires_grad_() for name, v in t.items()}
        with ngk.use_backend(backend):
            (out,) = engine(sample, t)
            first = torch.autograd.grad(out.sin().sum(), list(t.values()), create_graph=True)
            return dict(zip(t, torch.autograd.grad(sum((g * g).sum() for g in first), list(t.values())), strict=True))

    t = leaves(sample)
    assert_close(second(cast(t, torch.float32)), second(cast(cast(t, torch.float32), torch.float64)), 2e-3)


# ---- opcheck ----
class Calls(TorchDispatchMode):
    """Every call of an op of the engine, with its arguments."""

    def __init__(self):
        super().__init__()
        self.calls: dict[str, tuple] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace.startswith("ngkernels"):  # a kernel's name and arguments are those of the op that calls it
            self.calls.setdefault(func._opname, (getattr(torch.ops.ngkernels, func._opname).default, args))
        return func(*args, **(kwargs or {}))


OPS = ("aggregate", "aggregate_backward", "evaluate", "evaluate_backward", "carry", "double_backward")
CHECKED = (
    TINY,
    TINY.but("virtual", memory=("virtual", None)),
    TINY.but("table", encoder="fourier", table="auto"),
    TINY.but("reversed", networks=REVERSED, reciprocal=True, restrict=1),
    TINY.but("sparse", networks=(EDGELESS, WEB)),
    TINY.but("packed-reversed", packed=True, networks=UNEQUAL_REVERSED, reciprocal=True),
)


@lru_cache
def calls_of(sample: Sample, backend: str) -> dict[str, tuple]:
    """The arguments of every op in a forward, a backward and a second backward of the sample, and of a virtual checkpoint."""
    t = {name: v.requires_grad_() for name, v in cast(leaves(sample), torch.float32).items()}
    with ngk.use_backend(backend), Calls() as seen:
        out = engine(sample, t)
        twice = "virtual" not in sample.memory
        grads = torch.autograd.grad(sum(o.sin().sum() for o in out), list(t.values()), allow_unused=True, create_graph=twice)
        if twice:
            torch.autograd.grad(sum(g.sin().sum() for g in grads if g is not None), list(t.values()), allow_unused=True)
        edge_state(sample.but(sample.name, restrict=None), t).checkpoint()
    return seen.calls


def fresh(value, grad: bool):
    if isinstance(value, list):
        return [fresh(v, grad) for v in value]
    if isinstance(value, torch.Tensor):
        return value.detach().clone().requires_grad_(grad and value.is_floating_point())
    return value


CALLS = [
    pytest.param(s, op, grad, id=f"{s.name}-{op}-{'grad' if grad else 'no-grad'}")
    for s in CHECKED
    for op in OPS
    for grad in (False, True)
    if op != "double_backward" or not (grad or "virtual" in s.memory)  # no third derivative, no second one of a virtual checkpoint
]


@pytest.mark.parametrize(("sample", "op", "grad"), CALLS)
def test_opcheck(sample: Sample, op: str, grad: bool, backend: str):
    """Schema, fake tensors, autograd registration, AOT dispatch with dynamic shapes."""
    func, args = calls_of(sample, backend)[op]
    if sample.name == "virtual" and grad and "backward" in op:
        tests = ("test_schema", "test_faketensor", "test_autograd_registration")  # the fourth asks for second derivatives
    else:
        tests = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    with ngk.use_backend(backend):
        result = torch.library.opcheck(func, tuple(fresh(a, grad) for a in args), test_utils=tests)
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("direction", [-1, 0, 1])
def test_opcheck_of_tables(direction: int):
    grid = (torch.randn(5, 1 if direction < 0 else 3), direction, 4, 6)
    torch.library.opcheck(torch.ops.ngkernels.tabulate.default, (torch.randn(3, 10, requires_grad=True), *grid))
    torch.library.opcheck(torch.ops.ngkernels.tabulate_backward.default, (torch.randn(13, 3, 3, requires_grad=True), *grid))


# ---- needs_input_grad ----
@pytest.mark.parametrize("sample", **named((
    PLAIN, PLAIN.but("table", encoder="fourier", table="auto"), PLAIN.but("virtual", memory=("virtual", None)), PLAIN.but("reversed", networks=REVERSED, reciprocal=True),
    PLAIN.but("identity-residual", encoder="identity", channels=3, residual=(True,)), PLAIN.but("sparse", networks=(PRUNED, WEB)),
)))  # fmt: skip
@pytest.mark.parametrize("but_one", [False, True], ids=["each-alone", "all-but-one"])
def test_any_choice_of_gradients(sample: Sample, but_one: bool, backend: str):
    """The same numbers as when every gradient is asked for."""
    t = cast(leaves(sample), torch.float32)
    everything = run_engine(sample, t, backend)
    for name in t:
        wanted = set(t) - {name} if but_one else {name}
        found = run_engine(sample, t, backend, wanted)
        assert {n for n in found if n.startswith("grad.")} == {f"grad.{n}" for n in wanted}
        if backend == "reference":
            assert_close(found, {n: everything[n] for n in found}, 1e-5)
        else:
            assert_bitwise(found, {n: everything[n] for n in found})


# ---- what is saved ----
@pytest.mark.parametrize("memory", [(), ("virtual", None)], ids=["recompute", "virtual"])
@pytest.mark.parametrize("encoder", ["linear", "fourier", "table"])
def test_nothing_of_the_size_of_the_edges_times_d_is_saved(memory, encoder: str, backend: str):
    sample = PLAIN.but(
        "saved",
        networks=(mlp(2, 40, 40, 3, reverse=True),),
        reciprocal=True,
        memory=memory,
        encoder=encoder.replace("table", "fourier"),
        table="auto" if encoder == "table" else "never",
        table_range=0.25,
        step=3,
    )
    t = {name: v.requires_grad_() for name, v in cast(leaves(sample), torch.float32).items()}
    sizes: list[tuple[int, ...]] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tuple(tensor.shape))
        return tensor

    with ngk.use_backend(backend), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = ngk.aggregate(edge_state(sample, t), message_of(sample, t), sample.reduce)
    edges, weights = graph_of(sample).num_edges, max(v.numel() for name, v in t.items() if name.startswith("weights."))
    assert weights < 2 * edges and sizes
    too_large = [size for size in sizes if torch.Size(size).numel() > weights]
    assert not too_large, too_large
    out.sum().backward()

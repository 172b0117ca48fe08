"""checkpoint: stored and virtual restarts, in every order, give the values and the gradients of the state itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from compare import assert_bitwise, assert_budget, assert_close
from sample_list import MEMORY, PLAIN, REVERSED, UNEQUAL_REVERSED
from samples import Sample, cast, edge_state, engine, float32_oracle, float64_oracle, graph_of, leaves, named, run, run_engine
from samples import oracle as oracle_of

import ngkernels as ngk

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("sample", **named(MEMORY))
def test_float64_outputs_and_every_gradient(sample: Sample, backend: str):
    assert_close(run_engine(sample, leaves(sample), backend), float64_oracle(sample), 1e-10)


@pytest.mark.parametrize("sample", **named(MEMORY))
def test_float32_within_twice_the_error_of_plain_pytorch(sample: Sample, backend: str):
    wanted, plain = float32_oracle(sample)
    assert_budget(run_engine(sample, cast(leaves(sample), torch.float32), backend), wanted, plain, 8e-6)


@pytest.mark.parametrize("sample", **named(s for s in MEMORY if "same" not in "".join(p or "" for p in s.memory)))
def test_a_virtual_checkpoint_changes_no_value(sample: Sample, backend: str):
    """Bitwise: the forward still starts at the weights. Gradients are the same sums in another order."""
    t = cast(leaves(sample), torch.float32)
    found, without = run_engine(sample, t, backend), run_engine(replace(sample, memory=()), t, backend)
    outputs = [name for name in found if name.startswith("out.")]
    assert_bitwise({n: found[n] for n in outputs}, {n: without[n] for n in outputs})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "changes",
    [{}, {"networks": REVERSED, "reciprocal": True}, {"networks": UNEQUAL_REVERSED, "packed": True}],
    ids=["plain", "reversed", "packed"],
)
def test_stored_values_are_rounded_to_their_dtype(changes: dict, dtype: torch.dtype, backend: str):
    """The oracle rounds in the same place; later consumers start from exactly the stored numbers."""
    name = str(dtype).removeprefix("torch.")
    sample = PLAIN.but(name, memory=(name, None), **changes)
    t = cast(leaves(sample), torch.float32)
    with ngk.use_backend(backend):
        stored = edge_state(replace(sample, residual=(False,)), t)
        values = ngk.readout(stored, [(torch.eye(sample.width), None)])
    exact = edge_state(replace(sample, residual=(False,), memory=()), t)
    with ngk.use_backend(backend):
        wanted = ngk.readout(exact, [(torch.eye(sample.width), None)], dtype=dtype)
    assert all(w.dtype == dtype for w in stored.weights)
    assert_bitwise({str(k): v for k, v in enumerate(values)}, {str(k): v.float() for k, v in enumerate(wanted)})

    plain = run(lambda live: oracle_of(sample, live), t)
    truth = run(lambda live: oracle_of(replace(sample, memory=()), live), cast(t, torch.float64))
    assert_budget(run_engine(sample, t, backend), truth, plain, 4 * torch.finfo(dtype).eps)


def test_nothing_is_stored_by_a_virtual_checkpoint(backend: str):
    """Its carriers are zero, one number each, and carry only a gradient."""
    t = {name: v.requires_grad_() for name, v in leaves(PLAIN).items()}
    with ngk.use_backend(backend):
        e = edge_state(PLAIN.but("virtual", memory=(None, "virtual")), t)
    carriers = e.steps[-1].carriers
    assert [tuple(c.shape) for c in carriers] == [(2, 2, 5, 5), (2, 5, 3, 5)]
    assert all(c.requires_grad and (c == 0).all() and c.untyped_storage().nbytes() <= 8 for c in carriers)


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    """Names of the engine's ops as they are called, and the shapes of the gradients that evaluate_backward is given."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []
        self.gradients: list[list[tuple[int, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("ngkernels", "ngkernels_C"):
            self.names.append(func._opname)
        if func._opname == "evaluate_backward":
            self.gradients.append([tuple(g.shape) for g in args[0]])
        return func(*args, **(kwargs or {}))


def test_gradients_meet_at_a_virtual_checkpoint(backend: str):
    """Two consumers, one way back: what lies before the checkpoint is differentiated once, whatever follows it."""
    sample = PLAIN.but("two", memory=("virtual", None))
    with ngk.use_backend(backend), Calls() as calls:
        run(lambda live: engine(sample, live), leaves(sample))
    assert sorted(name for name in calls.names if "backward" in name) == ["aggregate_backward", "evaluate_backward", "evaluate_backward"]


@pytest.mark.parametrize("read", [False, True], ids=["aggregate", "readout"])
def test_blocks_that_nothing_reads_are_not_differentiated(read: bool, backend: str):
    """Behind a consumer of the last layer alone, no buffer of zeros is made for the other blocks."""
    sample = PLAIN.but("dead", memory=("virtual", None), restrict=-1, **({"reduce": ()} if read else {"head": 0}))
    with ngk.use_backend(backend), Calls() as calls:
        run(lambda live: engine(sample, live), leaves(sample))
    assert calls.gradients[-1] == [(0,), (2, 5, 3, sample.width)]


@pytest.mark.parametrize("policy", ["virtual", "same"])
def test_gradients_stop_where_no_leaf_wants_one(policy: str, backend: str):
    """What follows the checkpoint can be trained alone, and what precedes it alone."""
    sample = PLAIN.but("part", memory=(policy, None))
    everything = run_engine(sample, leaves(sample), backend)
    before = {name for name in leaves(sample) if name.startswith(("weights", "encoder", "x0", "update0"))}
    for part in (before, set(leaves(sample)) - before):
        found = run_engine(sample, leaves(sample), backend, part)
        assert_close(found, {name: everything[name] for name in found}, 1e-12)


def test_a_checkpoint_with_nothing_to_train_is_legal(backend: str):
    for policy in ("virtual", "same"):
        sample = PLAIN.but("frozen", memory=(policy, policy))
        with ngk.use_backend(backend), torch.no_grad():
            found = engine(sample, leaves(sample))
        assert_close(
            {f"out.{k}": o for k, o in enumerate(found)}, {k: v for k, v in float64_oracle(PLAIN).items() if k.startswith("out.")}, 1e-10
        )


def test_the_function_and_the_method_are_the_same(backend: str):
    t = leaves(PLAIN)
    with ngk.use_backend(backend):
        e = edge_state(PLAIN, t)
        a, b = ngk.checkpoint(e, torch.float32), e.checkpoint(torch.float32)
    assert all(torch.equal(x, y) and x.dtype == torch.float32 for x, y in zip(a.weights, b.weights, strict=True))
    assert a.width == b.width == e.width and a.graph.num_edges == graph_of(PLAIN).num_edges


def test_a_restricted_state_cannot_be_stored(backend: str):
    with ngk.use_backend(backend):
        e = edge_state(PLAIN, leaves(PLAIN)).restrict(-1)
        for store in (None, torch.float32):
            with pytest.raises(
                ValueError, match="checkpoint: expected an unrestricted state, got one restricted to a node layer; checkpoint first"
            ):
                e.checkpoint(store)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64], ids=str)
def test_values_are_stored_in_floating_dtypes(dtype: torch.dtype, backend: str):
    with ngk.use_backend(backend):
        e = edge_state(PLAIN, leaves(PLAIN))
        with pytest.raises(TypeError, match=f"checkpoint: expected dtype float32, bfloat16, float16 or float64, got {dtype}"):
            e.checkpoint(dtype)

"""What every test file shares: the backends a run must cover, their device, the random state.

NGKERNELS_TEST_BACKENDS declares the backends, "reference,cpp" unless set. A test that takes the `backend` fixture runs once for
each of them; one that is declared and cannot run here fails those tests, it never skips them.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator

import pytest

DECLARED = tuple(name.strip() for name in os.environ.get("NGKERNELS_TEST_BACKENDS", "reference,cpp").split(",") if name.strip())

KERNELS = tuple(name for name in DECLARED if name != "reference")

# Files of tests that take longest begin first, so that no core waits for the last of them where files run side by side.
LONGEST = ("test_triton_aot", "test_cuda_build", "test_cuda_emulation", "test_triton_interpreter", "test_cuda_pairs", "test_cuda_instances", "test_planner", "test_golden", "test_random_expressions", "test_memory")

# Of the tests that run once for each declared backend, those that the CUDA kernels run: in float32. The rest are in float64, which these kernels do
# not have, or about what only other backends do. Left out, and so counted.
ON_CUDA = frozenset(
    f"test_{name}" for name in (
        "bfloat16_operands_within_twice_the_error_of_plain_autocast", "autocast_to_float16_computes_in_float32", "weight_dtypes_keep_their_gradients_dtype",
        "fourier_features_stay_bounded_for_any_finite_weight", "weights_beyond_the_table_are_evaluated_directly", "float32_budget_over_other_random_numbers",
        "large_logits_do_not_overflow", "nan_and_inf_stay_in_their_network", "any_choice_of_gradients", "every_entry_is_written", "backward_runs_where_forward_ran",
        "a_virtual_checkpoint_changes_no_value", "backward_meets_the_very_bits_of_the_forward", "strided_weights_are_read_in_place",
        "node_states_and_matrices_of_any_strides", "a_state_may_be_used_again", "packed_weights_give_the_list_batch_bitwise", "the_order_of_edges_is_the_users",
        "random_expressions", "random_pairs", "many_random_expressions", "many_random_pairs", "float32_curve_is_far_closer_than_another_seeds",
    )
)  # fmt: skip


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if "triton" in DECLARED and not _has_gpu():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the first import of triton: its kernels then run on CPU tensors

import numpy as np  # noqa: E402
import torch  # noqa: E402

from ngkernels import backends  # noqa: E402

if os.environ.get("TRITON_INTERPRET") == "1" and "triton" in DECLARED:
    from interpreter import quicken  # noqa: E402

    quicken()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--mutants", action="store_true", help="also the seeded bugs of the C++ kernels, each compiled apart (some minutes)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The seeded bugs of the C++ kernels are asked for by name; tests of a GPU are for machines that have one. Long files go first."""
    absent = {"mutants"} if not config.getoption("--mutants") else set()
    absent |= {"gpu"} if backends.why_not("triton", torch.device("cuda")) is not None else set()
    left_out = [item for item in items if any(item.get_closest_marker(name) for name in absent) or _not_on_cuda(item)]
    config.hook.pytest_deselected(items=left_out)
    gone = set(map(id, left_out))
    order = {file: k for k, file in enumerate(LONGEST)}
    items[:] = sorted((item for item in items if id(item) not in gone), key=lambda item: order.get(item.path.stem, len(order)))


def _backend_of(item: pytest.Item) -> str | None:
    """The declared backend that a test runs for; None where it names its own."""
    of_these = (DECLARED, KERNELS)
    own = any(
        "backend" in mark.args[0] and not mark.kwargs.get("indirect") and all(mark.args[1] is not values for values in of_these)
        for mark in item.iter_markers("parametrize")
    )
    return item.callspec.params.get("backend") if hasattr(item, "callspec") and not own else None


def _not_on_cuda(item: pytest.Item) -> bool:
    return _backend_of(item) == "cuda" and item.originalname not in ON_CUDA


def pytest_configure(config: pytest.Config) -> None:
    if "cuda" in DECLARED and not _has_gpu():  # on the emulated GPU, as Triton's kernels in their interpreter
        import emulation

        running = contextlib.ExitStack()
        running.enter_context(backends.emulate_cuda(emulation.library()))
        config.add_cleanup(running.close)
    config.addinivalue_line("markers", "gpu: needs a GPU that Triton runs on; elsewhere left out, and so counted")
    config.addinivalue_line("markers", "mutants: a seeded bug that has to be compiled; runs with --mutants only")
    unknown = [name for name in DECLARED if name not in backends.BACKENDS]
    if unknown or not DECLARED:
        raise pytest.UsageError(
            f"NGKERNELS_TEST_BACKENDS: expected some of {', '.join(backends.BACKENDS)}, got {', '.join(unknown) or 'nothing'}"
        )


def pytest_report_header() -> str:
    return f"backends that must run: {', '.join(DECLARED)} (isa {backends.isa()}, {torch.get_num_threads()} threads)"


def why_backend_cannot_run(name: str) -> str | None:
    """None if every op that has this backend runs with it here, else what does not and why."""
    reasons = {op: row[name] for op, row in backends.availability().items() if row.get(name) is not None}
    return "; ".join(f"{op}: {reason}" for op, reason in reasons.items()) or None


@pytest.fixture(params=DECLARED)
def backend(request: pytest.FixtureRequest) -> str:
    """Name of a declared backend; force it with `ngkernels.use_backend(backend)`."""
    reason = why_backend_cannot_run(request.param)
    if reason is not None:
        pytest.fail(f"backend {request.param!r} is declared in NGKERNELS_TEST_BACKENDS and cannot run: {reason}", pytrace=False)
    return request.param


@pytest.fixture
def device(backend: str) -> torch.device:
    """The device that `backend` is tested on."""
    return torch.device("cuda" if backend in ("triton", "cuda") and torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _tensors_travel(request: pytest.FixtureRequest) -> Iterator[None]:
    """On a machine with a GPU, tensors that a test of a GPU backend leaves on the CPU travel to it with each op, and back."""
    if _backend_of(request.node) not in ("triton", "cuda") or not _has_gpu():
        yield
        return
    import travel

    with travel.to(torch.device("cuda")):
        yield


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    """Each test starts from the same random state, whichever tests ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _chains_of_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are right beyond what ngkernels.limits lets them do on a GPU; tests/test_triton_sizes.py is about the limits."""
    from ngkernels import limits

    monkeypatch.setattr(limits, "applies", lambda edges, backend: False)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For the many small cases: on a busy machine, threads that wait for one another cost more than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

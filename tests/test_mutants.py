"""Seeded bugs of each op, and that the tests of that op fail on every one of them.

Those of the C++ kernels are compiled apart, with `pytest --mutants tests/test_mutants.py`: some minutes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import mutants
import mutants_cpp
import mutants_triton
import pair_list
import pytest
import test_aggregate
import test_attend
import test_attend_torch
import test_checkpoint
import test_readout
import torch
from conftest import DECLARED

pytestmark = pytest.mark.usefixtures("one_thread")


def aggregate(backend: str) -> Iterator[Callable]:
    for sample in test_aggregate.REDUCED:
        yield partial(test_aggregate.test_float64_outputs_and_every_gradient, sample, backend)
    for sample in test_aggregate.REDUCED:
        if "table" in sample.name:
            yield partial(test_aggregate.test_float32_within_twice_the_error_of_plain_pytorch, sample, backend)
    yield partial(test_aggregate.test_results_come_in_the_order_asked_for, backend)
    yield partial(test_aggregate.test_extremes_share_their_gradient_among_ties, 0.0, backend)
    yield partial(test_aggregate.test_std_is_zero_without_gradient_up_to_the_threshold, backend)
    yield partial(test_aggregate.test_the_variance_survives_a_large_mean, backend)
    yield partial(test_aggregate.test_weights_beyond_the_table_are_evaluated_directly, 3.0, backend)
    yield partial(test_aggregate.test_autocast_to_float16_computes_in_float32, backend)


def readout(backend: str) -> Iterator[Callable]:
    for sample in (*test_readout.READ[::3], *test_readout.READ[1::3], *test_readout.HEADS):
        yield partial(test_readout.test_float64_outputs_and_every_gradient, sample, backend)
    yield partial(test_readout.test_result_dtypes_round_once, torch.bfloat16, torch.float32, backend)
    yield partial(test_readout.test_a_block_that_nobody_reads_has_no_gradient, 1, test_readout.UNEQUAL, False, backend)
    yield partial(test_readout.test_reading_the_raw_weight_gives_it_back_bitwise, backend)


def checkpoint(backend: str) -> Iterator[Callable]:
    for sample in test_checkpoint.MEMORY:
        yield partial(test_checkpoint.test_float64_outputs_and_every_gradient, sample, backend)
    yield partial(test_checkpoint.test_stored_values_are_rounded_to_their_dtype, {}, torch.float32, backend)


def attend(backend: str) -> Iterator[Callable]:
    for sample in (
        *test_attend.OPTIONS[::3],
        *pair_list.UPDATES,
        *test_attend.ALONE,
        *test_attend.QUICK_GRID[::5],
        *(s for s in test_attend.OPTIONS if s.token and any(s.memory)),
    ):
        yield partial(test_attend.test_float64_outputs_and_every_gradient, sample, backend)
    yield partial(test_attend.test_equal_logits_give_the_mean, "out", backend)
    yield partial(test_attend_torch.test_dropout_keeps_the_mean, 0.5, backend)


TESTS = {"aggregate": aggregate, "readout": readout, "checkpoint": checkpoint, "attend": attend}


def failures(op: str, backend: str) -> Iterator[BaseException]:
    """What the tests of an op raise."""
    for test in TESTS[op](backend):
        try:
            test()
        except (Exception, pytest.fail.Exception) as error:
            yield error


@pytest.mark.parametrize("op", TESTS)
def test_without_a_bug_they_pass(op: str, backend: str):
    assert next(failures(op, backend), None) is None


@pytest.mark.parametrize("mutant", [m for m in mutants.PYTHON if m.backend in DECLARED], ids=lambda m: f"{m.op}-{m.name}")
def test_every_seeded_bug_is_caught(mutant: mutants.Mutant):
    with mutants.applied(mutant):
        assert next(failures(mutant.op, mutant.backend), None) is not None, "no test of the op noticed it"
    assert all(sum(m.op == op for m in mutants.PYTHON) >= 5 for op in TESTS)


@pytest.mark.parametrize("patch", mutants_cpp.PATCHES, ids=lambda p: p.name)
def test_every_bug_of_the_kernels_fits_the_source(patch: mutants_cpp.Patch):
    assert patch.applied((mutants_cpp.ROOT / "csrc" / patch.file).read_text())


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> mutants_cpp.Workshop:
    """A copy of the project whose library can be broken; as it is, its tests pass."""
    shop = mutants_cpp.Workshop(tmp_path_factory.mktemp("mutants"))
    shop.build(None)
    done = shop.test()
    assert done.returncode == 0, done.stdout[-3000:]
    return shop


@pytest.mark.mutants
@pytest.mark.parametrize("patch", mutants_cpp.PATCHES, ids=lambda p: p.name)
def test_every_bug_of_the_kernels_is_caught(patch: mutants_cpp.Patch, workshop: mutants_cpp.Workshop):
    workshop.build(patch)
    done = workshop.test()
    assert done.returncode != 0, "the tests passed"
    assert done.returncode < 0 or " failed" in done.stdout, done.stdout[-3000:]  # a crash, or an assertion


@pytest.fixture(scope="session")
def copied(tmp_path_factory: pytest.TempPathFactory) -> mutants_triton.Copy:
    """A copy of the project whose Triton kernels can be broken; as it is, its tests pass."""
    pytest.importorskip("triton", reason="Triton is not installed, and this run does not declare its backend")
    copy = mutants_triton.Copy(tmp_path_factory.mktemp("triton"))
    done = copy.test(None)
    assert done.returncode == 0, done.stdout[-3000:]
    return copy


@pytest.mark.mutants
@pytest.mark.parametrize("patch", mutants_triton.PATCHES, ids=lambda p: p.name)
def test_every_bug_of_the_triton_kernels_is_caught(patch: mutants_cpp.Patch, copied: mutants_triton.Copy):
    done = copied.test(patch)
    assert done.returncode != 0, "the tests passed"
    assert done.returncode < 0 or " failed" in done.stdout, done.stdout[-3000:]  # a crash, or an assertion

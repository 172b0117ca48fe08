"""Recipes of small matrices against plain matrix products: values, gradients, what is kept, what is refused.

A graph of one edge of weight 1, read out through the column of all packed parameters, gives the result of any recipe.
"""

from __future__ import annotations

import random

import pytest
import torch
from compare import assert_bitwise, assert_close
from conftest import DECLARED
from test_backends import isa  # noqa: F401  a fixture: every instruction set, forced

import ngkernels as ngk
from ngkernels import backends
from ngkernels.encoders import Identity
from ngkernels.fold import RECORD, Fold
from ngkernels.ops import evaluate
from ngkernels.program import build_state, recipe_of

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = (1, 2, 3, 16, 17, 35, 64)


def packed(fold: Fold, recipe: list[int] | None = None) -> torch.Tensor:
    """The result of the fold, or of another recipe on its leaves: [size]."""
    one = torch.ones(1, 1, dtype=fold.dtype)
    edges = ngk.EdgeState(ngk.NeuralGraph.mlp([1, 1]), [one], Identity())
    e = build_state(edges, False, [(one.expand(fold.size, 1), None)])
    head = e.program[: len(e.program) - len(recipe_of(e.program))]
    e = e._replace(params=fold.leaves, program=head + (fold.recipe if recipe is None else recipe))
    compute = 2 * backends.choose("evaluate", torch.device("cpu"))
    return evaluate.run(*e, [4, 1, 1, 1, fold.size], evaluate.DTYPES.index(fold.dtype), compute)[0].flatten()


class Plain:
    """The same steps as a Fold, taken at once by torch."""

    def __init__(self):
        self.stored: list[torch.Tensor] = []

    def leaf(self, t: torch.Tensor) -> torch.Tensor:
        return t if t.dim() == 2 else t[:, None]

    def store(self, t: torch.Tensor) -> None:
        self.stored.append(t.flatten())


def strided(rows: int, columns: int, kind: int, g: torch.Generator) -> torch.Tensor:
    """A matrix that is contiguous, transposed, part of a larger one, one repeated row; or a vector."""
    if kind == 1:
        return torch.randn(columns, rows, generator=g, dtype=torch.float64).T
    if kind == 2:
        return torch.randn(rows + 1, 2 * columns, generator=g, dtype=torch.float64)[1:, ::2]
    if kind == 3:
        return torch.randn(1, columns, generator=g, dtype=torch.float64).expand(rows, columns)
    t = torch.randn(rows, columns, generator=g, dtype=torch.float64)
    return t[:, 0] if columns == 1 else t


def random_steps(seed: int) -> tuple[list[torch.Tensor], list[tuple]]:
    """Leaves, and what is done with them: ("times" | "plus", a, b) and ("store", a), of matrices by number."""
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    sizes = rng.sample(SIZES, 3)
    shapes = [(rng.choice(sizes), rng.choice([1, *sizes])) for _ in range(rng.randint(2, 7))]
    leaves = [strided(*shape, rng.randrange(4), g) for shape in shapes]
    steps: list[tuple] = []
    for _ in range(rng.randint(4, 12)):
        n = len(shapes)
        found = [("times", a, b) for a in range(n) for b in range(n) if shapes[a][1] == shapes[b][0]]
        found += [("plus", a, b) for a in range(n) for b in range(n) if shapes[a] == shapes[b]]
        step = rng.choice([*found, *[("store", rng.randrange(n))] * (1 + len(found) // 2)])
        steps.append(step)
        if step[0] != "store":
            shapes.append((shapes[step[1]][0], shapes[step[2]][1]))
    return leaves, [*steps, ("store", len(shapes) - 1), ("store", 0)]


def folded(leaves: list[torch.Tensor], steps: list[tuple]) -> Fold:
    fold = Fold(leaves[0].dtype)
    matrices = [fold.leaf(t) for t in leaves]
    for name, *operands in steps:
        a, *b = [matrices[k] for k in operands]
        if name == "store":
            fold.store(a)
        else:
            matrices.append(getattr(a, name)(*b))
    return fold


def plain(leaves: list[torch.Tensor], steps: list[tuple]) -> torch.Tensor:
    todo = Plain()
    matrices = [todo.leaf(t) for t in leaves]
    for name, *operands in steps:
        a, *b = [matrices[k] for k in operands]
        if name == "store":
            todo.store(a)
        else:
            matrices.append(a @ b[0] if name == "times" else a + b[0])
    return torch.cat(todo.stored)


def outputs(function, leaves: list[torch.Tensor], wanted: set[int]) -> dict[str, torch.Tensor]:
    live = [t.detach().requires_grad_(k in wanted) for k, t in enumerate(leaves)]
    out = function(live)
    slopes, grads = torch.linspace(-1, 2, out.numel(), dtype=out.dtype), dict.fromkeys(wanted)
    if wanted and out.requires_grad:
        grads = dict(zip(wanted, torch.autograd.grad((out * slopes).sum(), [live[k] for k in wanted], allow_unused=True), strict=True))
    return {"out": out.detach(), **{f"grad{k}": torch.zeros_like(live[k]) if g is None else g for k, g in grads.items()}}


def check(seed: int, tolerance: float = 1e-11) -> None:
    leaves, steps = random_steps(seed)
    for wanted in (set(range(len(leaves))), {seed % len(leaves)}, set()):
        found = outputs(lambda live: packed(folded(live, steps)), leaves, wanted)
        assert_close(found, outputs(lambda live: plain(live, steps), leaves, wanted), tolerance)


@pytest.mark.parametrize("seed", range(40))
def test_random_recipes(seed: int, backend: str):
    with ngk.use_backend(backend):
        check(seed)


@pytest.mark.parametrize("seed", range(6))
def test_every_instruction_set(seed: int, isa: str):  # noqa: F811
    with ngk.use_backend("cpp"):
        check(seed)


def test_gradcheck_and_gradgradcheck(backend: str):
    a, b, v = torch.randn(3, 2, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)

    def function(*tensors):
        fold = Fold(torch.float64)
        x, y, z = (fold.leaf(t) for t in tensors)
        product = x.times(y)
        for m in (product.times(product).times(z), x, x, z.plus(product.times(z))):
            fold.store(m)
        return packed(fold)

    with ngk.use_backend(backend):
        assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in (a, b, v)])
        assert torch.autograd.gradgradcheck(function, [t.requires_grad_() for t in (a, b, v)])


def test_a_tensor_in_several_places_gathers_its_gradient(backend: str):
    w = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    fold = Fold(torch.float64)
    fold.store(fold.leaf(w).times(fold.leaf(w)))
    fold.store(w)
    with ngk.use_backend(backend):
        (found,) = torch.autograd.grad(packed(fold).sum(), w)
    (wanted,) = torch.autograd.grad((w @ w).sum() + w.sum(), w)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_parameters_of_another_dtype_come_in_that_of_the_result(dtype: torch.dtype, backend: str):
    a, b = torch.randn(5, 4).to(dtype).requires_grad_(), torch.randn(4).to(dtype).requires_grad_()
    fold = Fold(torch.float32)
    fold.store(fold.leaf(a).times(fold.leaf(b)))
    with ngk.use_backend(backend), torch.autocast("cpu", dtype=torch.bfloat16):
        out = packed(fold)
    grads = torch.autograd.grad(out.sum(), (a, b))
    torch.testing.assert_close(out, a.float() @ b.float())  # not rounded to bfloat16
    assert out.dtype == torch.float32 and [g.dtype for g in grads] == [dtype, dtype]


def test_leaves_are_all_that_is_kept(backend: str):
    a, b, kept = torch.randn(8, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True), []
    fold = Fold(torch.float32)
    fold.store(fold.leaf(a).times(fold.leaf(b)))
    with ngk.use_backend(backend), torch.autograd.graph.saved_tensors_hooks(lambda v: kept.append(v) or v, lambda v: v):
        packed(fold)
    others = [v for v in kept if v.data_ptr() not in (a.data_ptr(), b.data_ptr())]
    assert all(v.numel() < 64 or v.dtype == torch.int64 for v in others)


def test_bitwise_the_same_again(backend: str):
    leaves, steps = random_steps(3)
    with ngk.use_backend(backend):
        first, again = (outputs(lambda live: packed(folded(live, steps)), leaves, {0, 1}) for _ in range(2))
    assert_bitwise(again, first)


def broken(change) -> list[int]:
    fold = Fold(torch.float64)
    fold.store(fold.leaf(torch.ones(2, 3)).times(fold.leaf(torch.ones(3, 2))))
    recipe = list(fold.recipe)
    change(recipe)
    return recipe


@pytest.mark.skipif("cpp" not in DECLARED, reason="needs the cpp backend")
@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.__setitem__(2 * RECORD + 1, 2),  # an operand that comes later
        lambda r: r.__setitem__(2 * RECORD + 2, 0),  # sizes that do not fit
        lambda r: r.__setitem__(2 * RECORD, 7),  # no such operation
        lambda r: r.__setitem__(2 * RECORD + 3, 1),  # beyond the result
        lambda r: r.__setitem__(RECORD + 1, 0),  # a leaf twice
        lambda r: r.pop(),
    ],
)
def test_what_would_leave_memory_is_refused(change):
    fold = Fold(torch.float64)
    fold.store(fold.leaf(torch.ones(2, 3, dtype=torch.float64)).times(fold.leaf(torch.ones(3, 2, dtype=torch.float64))))
    with ngk.use_backend("cpp"), pytest.raises(RuntimeError, match="malformed recipe"):
        packed(fold, broken(change))

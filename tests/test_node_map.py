"""node_map against its formula: values, gradients, second derivatives, as a PyTorch op; bits, instruction sets, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compare import assert_bitwise, assert_budget, assert_close
from conftest import DECLARED, KERNELS
from samples import device_of
from test_backends import isa  # noqa: F401  a fixture: every instruction set, forced
from test_torch import Calls

import ngkernels as ngk
from ngkernels import backends
from ngkernels.checks import ACTIVATIONS
from ngkernels.ops.node_map import After, node_map

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPES = {  # rows, F, C, O, rows of the matrix before lin (0: no lin), factors (None: 1)
    "small": (9, 3, 4, 5, 0, (None, 1)),
    "reference": (453, 32, 128, 32, 32, (None, 1)),
    "odd": (401, 17, 19, 13, 6, (1, None, 1)),
    "narrow": (6, 2, 1, 2, 3, (1,)),
    "no-factors": (50, 4, 1, 17, 0, ()),
    "one-row": (1, 3, 2, 4, 4, (None,)),
}
NORMS = ("none", "layer", "graph", "segments")


def arguments(shape: str, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    rows, f, c, o, inner, factors = SHAPES[shape]
    g = torch.Generator().manual_seed(0)
    sizes = {
        "x": (rows, f),
        "reduced": (rows, c),
        "matrix": (inner or o, f + len(factors) * c),
        "bias": (inner or o,),
        "weight": (o,),
        "shift": (o,),
    }
    sizes |= {"lin": (o, inner), "lin_bias": (o,)} if inner else {}
    return {name: torch.randn(*s, generator=g, dtype=torch.float64).div_(s[-1] ** 0.5).to(dtype) for name, s in sizes.items()}


def factors_of(shape: str, dtype: torch.dtype) -> list[torch.Tensor | None]:
    rows, *_, factors = SHAPES[shape]
    return [None if f is None else torch.linspace(0.5, 2, rows, dtype=dtype)[:, None] * (k + 1) for k, f in enumerate(factors)]


def bounds_of(norm: str, rows: int) -> torch.Tensor | None:
    """One segment, or several: of one row, of more rows than are computed at once."""
    if norm not in ("graph", "segments"):
        return None
    return torch.tensor([0, rows] if norm == "graph" else sorted({0, min(1, rows - 1), rows // 3, rows}))


def run(t: dict[str, torch.Tensor], shape: str, norm: str, act: str, first: bool) -> torch.Tensor:
    """On the device of the backend that is forced, there and back."""
    home, device = t["x"].device, device_of(backends._forced[-1] if backends._forced else "cpp")
    t = {name: v.to(device) for name, v in t.items()}
    maps = [t[name] for name in ("matrix", "bias", "lin", "lin_bias") if name in t]
    kind = {"none": None, "segments": "graph"}.get(norm, norm)
    affine = (t["weight"], t["shift"]) if kind else (None, None)
    bounds = bounds_of(norm, len(t["x"]))
    after = After(act, kind, *affine, None if bounds is None else bounds.to(device), act_first=first)
    factors = [None if f is None else f.to(device) for f in factors_of(shape, t["x"].dtype)]
    return node_map(t["x"], t["reduced"], maps, factors, after).to(home)


def formula(t: dict[str, torch.Tensor], shape: str, norm: str, act: str, first: bool) -> torch.Tensor:
    scaled = [t["reduced"] if a is None else a * t["reduced"] for a in factors_of(shape, t["x"].dtype)]
    y = F.linear(torch.cat([t["x"], *scaled], 1), t["matrix"], t["bias"])
    y = F.linear(y, t["lin"], t["lin_bias"]) if "lin" in t else y
    activation = {"silu": F.silu, "gelu": F.gelu, "leaky_relu": F.leaky_relu, "identity": lambda v: v}.get(act) or getattr(torch, act)
    y = activation(y) if first else y
    if norm == "layer":
        y = F.layer_norm(y, y.shape[1:], t["weight"], t["shift"])
    elif norm != "none":
        bounds = bounds_of(norm, len(y)).tolist()
        pieces = [y[a:b] for a, b in zip(bounds, bounds[1:])]
        y = torch.cat([(p - p.mean()) / (p.std(correction=0) + 1e-5) for p in pieces]) * t["weight"] + t["shift"]
    return y if first else activation(y)


def outputs(function, t: dict[str, torch.Tensor], *options, wanted: set[str] | None = None) -> dict[str, torch.Tensor]:
    """The result and the gradient of each argument."""
    live = {name: v.clone().requires_grad_(wanted is None or name in wanted) for name, v in t.items()}
    out = function(live, *options)
    coefficients = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
    names = [name for name, v in live.items() if v.requires_grad]
    found = torch.autograd.grad((out * coefficients).sum(), [live[n] for n in names], allow_unused=True)
    return {"out": out.detach(), **{f"grad.{n}": torch.zeros_like(live[n]) if g is None else g for n, g in zip(names, found, strict=True)}}


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_float64_values_and_every_gradient(shape: str, norm: str, first: bool, backend: str):
    options = (shape, norm, "silu", first)
    with ngk.use_backend(backend):
        assert_close(outputs(run, arguments(shape), *options), outputs(formula, arguments(shape), *options), 1e-9)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("norm", ["none", "segments"])
def test_activations(act: str, norm: str, backend: str):
    with ngk.use_backend(backend):
        for first in (False, True):
            options = ("odd", norm, act, first)
            assert_close(outputs(run, arguments("odd"), *options), outputs(formula, arguments("odd"), *options), 1e-9)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", ["small", "reference", "odd"])
def test_float32_within_twice_the_error_of_plain_pytorch(shape: str, norm: str, backend: str):
    t, options = arguments(shape, torch.float32), (shape, norm, "silu", False)
    wanted, plain = outputs(formula, {n: v.double() for n, v in t.items()}, *options), outputs(formula, t, *options)
    with ngk.use_backend(backend):
        assert_budget(outputs(run, t, *options), wanted, plain, 8e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_gradcheck_and_gradgradcheck(norm: str, backend: str):
    t = arguments("narrow")
    t = {name: v.requires_grad_() for name, v in t.items() if norm != "none" or name not in ("weight", "shift")}

    def function(*tensors):
        return run(dict(zip(t, tensors, strict=True)), "narrow", norm, "tanh", False)

    with ngk.use_backend(backend):
        assert torch.autograd.gradcheck(function, tuple(t.values()))
        assert torch.autograd.gradgradcheck(function, tuple(t.values()))


@pytest.mark.parametrize("norm", NORMS)
def test_opcheck(norm: str, backend: str):
    t = {name: v.requires_grad_() for name, v in arguments("small").items()}
    with ngk.use_backend(backend), Calls() as seen:
        run(t, "small", norm, "silu", False).sum().backward()
    assert {"node_map", "node_map_backward"} <= seen.calls.keys()
    for op, given in seen.calls.values():
        torch.library.opcheck(op, given)


@pytest.mark.parametrize("name", ["x", "reduced", "matrix", "lin_bias", "weight"])
def test_any_choice_of_gradients(name: str, backend: str):
    options = ("reference", "segments", "silu", False)
    with ngk.use_backend(backend):
        every = outputs(run, arguments("reference"), *options)
        alone = outputs(run, arguments("reference"), *options, wanted={name})
    assert_close(alone, {n: every[n] for n in alone}, 1e-12)


def test_nothing_but_the_arguments_is_kept(backend: str, device: torch.device):
    t, kept = {name: v.to(device).requires_grad_() for name, v in arguments("reference").items()}, []
    with ngk.use_backend(backend), torch.autograd.graph.saved_tensors_hooks(lambda v: kept.append(v) or v, lambda v: v):
        run(t, "reference", "graph", "silu", False)
    given = {v.data_ptr() for v in t.values()}
    assert all(v.data_ptr() in given or v.numel() <= 453 for v in kept)


@pytest.mark.skipif("cpp" not in DECLARED, reason="needs the cpp backend")
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bitwise_for_any_number_of_threads(norm: str, dtype: torch.dtype):
    t, found = arguments("reference", dtype), []
    with ngk.use_backend("cpp"):
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            found.append(outputs(run, t, "reference", norm, "silu", False))
    for other in found[1:]:
        assert_bitwise(other, found[0])


@pytest.mark.parametrize("norm", NORMS)
def test_every_instruction_set(isa: str, norm: str):  # noqa: F811
    with ngk.use_backend("cpp"):
        for shape in SHAPES:
            options = (shape, norm, "gelu", False)
            assert_close(outputs(run, arguments(shape), *options), outputs(formula, arguments(shape), *options), 1e-9)


@pytest.mark.skipif(not {"cpp", "triton"} & set(DECLARED), reason="needs a backend with kernels")
def test_equal_states_have_finite_gradients():
    """Their spread is 0."""
    kernels = "cpp" if "cpp" in DECLARED else "triton"
    t = {name: torch.ones_like(v) for name, v in arguments("narrow", torch.float32).items()}
    with ngk.use_backend(kernels):
        t["matrix"].zero_()
        found = outputs(run, t, "narrow", "graph", "silu", False)
    assert all(v.isfinite().all() for v in found.values())


def part_of(t: dict[str, torch.Tensor], norm: str, first: int, bounds: list[int], device: str) -> list[torch.Tensor]:
    """The rows from `first` on that bounds cover, and the gradients of their x and reduced."""
    rows = slice(first, first + bounds[-1])
    live = {n: (v[rows] if n in ("x", "reduced") else v).to(device).requires_grad_() for n, v in t.items()}
    factor = factors_of("reference", t["x"].dtype)[1][rows].to(device)
    after = After("silu", norm, live["weight"], live["shift"], torch.tensor(bounds, device=device))
    out = node_map(live["x"], live["reduced"], [live["matrix"], live["bias"], live["lin"], live["lin_bias"]], [None, factor], after)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [live["x"], live["reduced"]])]


@pytest.mark.parametrize("norm", ["layer", "graph"])
@pytest.mark.parametrize("backend", KERNELS)
def test_networks_alone_and_in_a_batch(backend: str, norm: str):
    """The same bits, forward and backward."""
    t, bounds, device = arguments("reference", torch.float32), [0, 150, 151, 453], device_of(backend)
    with ngk.use_backend(backend):
        batch = part_of(t, norm, 0, bounds, device)
        for first, last in zip(bounds, bounds[1:]):
            alone = part_of(t, norm, first, [0, last - first], device)
            assert all(torch.equal(a, b[first:last]) for a, b in zip(alone, batch, strict=True))


@pytest.mark.parametrize("norm", ["none", "layer"])
def test_no_rows(norm: str, backend: str):
    t = {name: v[:0] if name in ("x", "reduced") else v for name, v in arguments("small").items()}
    with ngk.use_backend(backend):
        live = {name: v.to(device_of(backend)).requires_grad_() for name, v in t.items()}
        after = After("silu", "layer", live["weight"], live["shift"]) if norm == "layer" else After("silu")
        out = node_map(live["x"], live["reduced"], [live["matrix"], live["bias"]], [None, None], after)
        assert out.shape == (0, 5)
        assert all(not g.any() for g in torch.autograd.grad(out.sum(), [live["x"], live["matrix"], live["bias"]]))


def test_compiled_without_a_break(backend: str):
    t, options = arguments("small", torch.float32), ("small", "segments", "silu", False)
    torch._dynamo.reset()
    with ngk.use_backend(backend):
        compiled = torch.compile(lambda live: run(live, *options), fullgraph=True, backend="aot_eager")
        assert_close(outputs(compiled, t), outputs(run, t, *options), 1e-6)
    torch._dynamo.reset()


def test_transforms_run_through_plain_operations(backend: str):
    t = arguments("small")
    with ngk.use_backend(backend):
        found = torch.func.grad(lambda x: run({**t, "x": x}, "small", "layer", "silu", False).sum())(t["x"])
        wanted = outputs(lambda live: run(live, "small", "layer", "silu", False).sum().expand(1), t, wanted={"x"})
    torch.testing.assert_close(found, -wanted["grad.x"])


ERRORS = {
    "rows": (
        {"reduced": torch.zeros(8, 4)},
        r"node_map: expected x \[R, F\] and reduced \[R, C\] of as many rows, got \(9, 3\) and \(8, 4\)",
    ),
    "matrix": ({"matrix": torch.zeros(5, 10)}, r"node_map: expected matrix of shape \(\*, 11\), got \(5, 10\)"),
    "bias": ({"bias": torch.zeros(4)}, r"node_map: expected bias of matrix of shape \(5,\), got \(4,\)"),
    "norm": ({"weight": torch.zeros(4)}, r"node_map: expected weight of the norm of shape \(5,\), got \(4,\)"),
}


@pytest.mark.parametrize(("changed", "text"), ERRORS.values(), ids=ERRORS.keys())
def test_shapes_that_do_not_fit_raise(changed: dict, text: str):
    with pytest.raises(ValueError, match=text):
        run({**arguments("small", torch.float32), **changed}, "small", "layer", "silu", False)


def test_options_that_are_unknown_raise():
    t = arguments("small", torch.float32)
    for norm, act, text in (
        ("batch", "silu", "expected norm None, layer or graph, got 'batch'"),
        ("none", "elu", "expected activation in .*, got 'elu'"),
    ):
        with pytest.raises(ValueError, match=f"node_map: {text}"):
            run(t, "small", norm, act, False)
    with pytest.raises(ValueError, match="node_map: expected bounds, int64"):
        node_map(
            t["x"],
            t["reduced"],
            [t["matrix"], t["bias"]],
            factors_of("small", torch.float32),
            After("silu", "graph", t["weight"], t["shift"]),
        )
    with pytest.raises(ValueError, match=r"node_map: expected maps \(matrix, bias\) or .*, got 1 tensors"):
        node_map(t["x"], t["reduced"], [t["matrix"]], [], None)

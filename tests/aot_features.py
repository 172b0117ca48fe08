"""What makes one compiled kernel differ from another: the options that change its code, found in a launch, and the list of them all."""

from __future__ import annotations

from ngkernels._triton.lower import Step
from ngkernels.checks import ACTIVATIONS
from ngkernels.program import ATTEND, EMIT, FOURIER, LIN, LOAD, REDUCE, TABLE

OPS = ("load", "fourier", "table", "lin", "act", "add", "mark", "norm", "mask")
COMBINE = ("concat", "film", "gate", "product", "values", "attention")  # by number
NEED = ("params", "nodes", "weights", "table", "later")
USED, PADDED, HEAD, SLOT = 1, 2, 3, 4  # of a chunk
Features = dict[str, set[str]]

_PART = ", last in part"
_ONE = ("bf16 one chunk", "tf32 one chunk", "ieee one chunk", "float64 one chunk")
_PARTS = tuple(p + _PART for p in _ONE)
_CHUNKS = ("bf16 chunks", f"bf16 chunks{_PART}", f"ieee chunks{_PART}")
_ACTIVATIONS = tuple(f"act {a}" for a in ACTIVATIONS)
_LINEAR = ("lin of nodes", "lin with bias", "lin alone", "lin by direction", "lin of pairs")
_ENCODERS = ("load of few", "load of many", "load with statistics", "fourier of one", "fourier of several", "table", "table, weights beyond it too")
_SHORT = ("load of few", "lin of nodes", "lin with bias", "lin of pairs", "act silu", "act gelu", "add", "norm")
_DENSE, _SPARSE = ("1x16", "4x4"), ("1x16 sparse", "4x4 sparse")
_HEADS = {
    "heads": ("one a group", "several a group", "one group", "groups", "padded"),
    "values": ("times", "as they are"),
    "states": ("summed", "not summed"),
    "dropout": ("yes", "no"),
}
_PLAIN = {"raw": ("fp32", "fp64")}
_EXACT = {"products": ("ieee", "float64"), **_PLAIN}
_NORMED = {"norm": ("layer", "segments"), "activation first": ("yes", "no"), "raw": ("fp32",)}
_FACTORS = {"parts": ("1", "2", "3"), "factors of 1": ("all", "some")}
# Every kernel, with the axes along which its code changes and what is compiled along each of them: by the quick variants together.
WANTED: dict[str, dict[str, tuple[str, ...]]] = {
    "aggregate_kernel": {
        "products": (*_ONE, *_PARTS, *_CHUNKS),
        "steps": (*_ENCODERS, *_LINEAR, *_ACTIVATIONS, "add", "mark", "norm", "mask"),
        "tiles": (*_DENSE, *_SPARSE, "4x16"),
        "tensors": ("1", "several"),
        "raw": ("fp32", "bf16", "fp64"),
        "partners": ("none", "to the last pair update"),
        "combine": ("concat", "film", "gate", "product"),
        "reduce": (*REDUCE, "mean beside"),
    },
    "evaluate_kernel": {
        "products": ("bf16 one chunk", *_PARTS, f"bf16 chunks{_PART}"),
        "steps": _SHORT,
        "tiles": (*_DENSE, "4x4 sparse"),
        "tensors": ("1", "several"),
        "raw": ("fp32", "fp16", "fp64"),
        "partners": ("none", "to the last pair update"),
        "combine": ("values",),
    },
    "attend_kernel": {
        "products": (*_ONE, f"bf16 one chunk{_PART}", f"bf16 chunks{_PART}"),
        "steps": ("load of few", *_LINEAR[:3], "lin of pairs", "act gelu", "add", "norm", "mask", "table, weights beyond it too"),
        "tiles": (*_DENSE, "4x4 sparse"),
        "tensors": ("1", "several"),
        "raw": ("fp32", "fp64"),
        "partners": ("none", "to the end"),
        "combine": ("attention",),
        **_HEADS,
    },
    "gradient_kernel": {
        "products": (*_ONE, *_PARTS, *_CHUNKS),
        "steps": (*_ENCODERS, *_LINEAR, *_ACTIVATIONS, "add", "mark", "norm", "mask"),
        "tiles": (*_DENSE, *_SPARSE, "4x16"),
        "tensors": ("1", "several"),
        "raw": ("fp32", "bf16", "fp16", "fp64"),
        "partners": ("none", "to the last pair update", "to the end"),
        "combine": COMBINE,
        "reduce": (*REDUCE, "mean beside"),
        "need": (*NEED, *(f"no {name}" for name in NEED)),
        **_HEADS,
    },
    "merge_kernel": {"reduce": (*REDUCE, "mean beside"), **_PLAIN},
    "softmax_kernel": {"of": ("logits", "sums"), **_PLAIN},
    "delta_kernel": _PLAIN,
    "fold_kernel": _PLAIN,
    "cells_kernel": {"raw": ("fp32",)},
    "project_kernel": _EXACT,
    "node_gradient_kernel": _EXACT,
    "linear_kernel": {**_EXACT, "parts": ("0", "2", "3"), "factors of 1": ("none", "some")},
    "inputs_kernel": {**_EXACT, **_FACTORS},
    "maps_kernel": {**_EXACT, "scaled": ("yes", "no")},
    "down_kernel": {"norm": ("none", "layer", "segments"), "activation first": ("yes", "no"), **_PLAIN},
    "moments_kernel": {"raw": ("fp32",)},
    "spread_kernel": {"raw": ("fp32",)},
    "slopes_kernel": {"raw": ("fp32",)},
    "norm_kernel": _NORMED,
    "row_sums_kernel": _NORMED,
}


def plain(value):
    """Numbers out of the constexpr that hold them."""
    value = getattr(value, "value", value)
    return tuple(map(plain, value)) if isinstance(value, tuple) else value


def _steps(c: dict) -> set[str]:
    found = set()
    for step in (Step(*s) for s in c["STEPS"]):
        chunk = c["CHUNKS"][step.first]
        if step.op == LOAD:
            found |= {"load of few" if chunk[PADDED] < 16 else "load of many"} | ({"load with statistics"} if step.arg0 >= 0 else set())
        elif step.op == FOURIER:
            found.add("fourier of one" if step.n_in == 1 else "fourier of several")
        elif step.op == TABLE:
            found.add("table" if step.w < 0 else "table, weights beyond it too")
        elif step.op == LIN:
            found.add("lin of nodes" if step.node >= 0 else "lin with bias" if step.b >= 0 else "lin alone")
            found |= ({"lin by direction"} if step.arg0 > 0 else set()) | ({"lin of pairs"} if step.arg1 >= 0 else set())
        else:
            found.add(f"act {ACTIVATIONS[step.arg0]}" if OPS[step.op] == "act" else OPS[step.op])
    return found


def _columns(c: dict) -> str:
    several = any(Step(*s).count_in > 1 for s in c["STEPS"])
    part = any(chunk[USED] < chunk[PADDED] for chunk in c["CHUNKS"] if chunk[PADDED] >= 16)
    return ("chunks" if several else "one chunk") + _PART * part


def _heads(c: dict) -> Features:
    heads, _, _, groups, of_group, multiply, summed, _, _, *chunks = c["SHAPE"]
    return {
        "heads": {"one a group" if of_group == 1 else "several a group", "one group" if groups == 1 else "groups", *(["padded"] if any(k[HEAD] != k[SLOT] for k in chunks) else [])},
        "values": {"times" if multiply else "as they are"},
        "states": {"summed" if summed else "not summed"},
        "dropout": {"yes" if c["DROPOUT"] else "no"},
    }


def _reductions(slots: tuple) -> set[str]:
    return {name for name, slot in zip(REDUCE, slots) if slot >= 0} | ({"mean beside"} if slots[len(REDUCE)] else set())


def _of_nodes(c: dict) -> Features:
    """Kernels that read no edges."""
    found = {"products": {c["PRECISION"]}} if "PRECISION" in c else {}
    if "NORM" in c:
        found |= {"norm": {("none", "layer", "segments")[c["NORM"]]}, "activation first": {"yes" if c["FIRST"] else "no"}}
    if "PARTS" in c:
        units = bin(c["UNIT"]).count("1")
        found |= {"parts": {str(c["PARTS"])}, "factors of 1": {"none" if not units else "all" if units == c["PARTS"] else "some"}}
    if "SCALED" in c:
        found["scaled"] = {"yes" if c["SCALED"] else "no"}
    if "FROM" in c:
        found["of"] = {"sums" if c["FROM"] else "logits"}
    return found


def features(kernel: str, signature: dict, constants: dict) -> Features:
    """The values that a launch has along the axes of its kernel."""
    c, found = {name: plain(v) for name, v in constants.items()}, {}
    if "STEPS" in c:
        pointer = signature["weights"][0].removeprefix("*")
        tile = f"{c['BI']}x{c['BJ']}" + " sparse" * c["SPARSE"]
        live = "none" if not c["LIVE"] else "to the end" if c["LIVE"] == len(c["STEPS"]) else "to the last pair update"
        found = {
            "products": {f"{c['PRECISION']} {_columns(c)}"}, "steps": _steps(c), "tiles": {tile}, "tensors": {"1" if c["POINTERS"] == 1 else "several"},
            "raw": {pointer}, "partners": {live},
        }  # fmt: skip
        combine = c.get("COMBINE", ATTEND if kernel == "attend_kernel" else EMIT)
        found["combine"] = {COMBINE[combine]}
        if combine == ATTEND:
            found |= _heads(c)
    if "SLOTS" in c and c.get("COMBINE") not in (EMIT, ATTEND):
        found["reduce"] = _reductions(c["SLOTS"])
    if "NEED" in c:
        found["need"] = {name if flag else f"no {name}" for name, flag in zip(NEED, c["NEED"])}
    if "STEPS" not in c:
        found |= _of_nodes(c)
    first = next(t for t in signature.values() if isinstance(t, str) and t.startswith("*"))
    found.setdefault("raw", {first.removeprefix("*")})
    return found

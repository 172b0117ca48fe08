"""Addresses in Triton IR: offsets that are computed in 32 bits from numbers that may be large.

A graph may have more than 2^31 weights, node terms or partial results. Whatever is multiplied on the way to an address must be 64 bits wide
by then, unless it is small: made of constants and ranges, or the number of a block of columns times its width.
"""

from __future__ import annotations

import re

_DEFINED = re.compile(r"^\s*(%[\w$.-]+)(?::\d+)? = (?:\"?([\w.]+)\"?)(.*)$", re.M)
_NAME = re.compile(r"%[\w$.-]+(?:#\d+)?")
_SMALL = {"arith.constant", "tt.make_range"}
_THROUGH = {"arith.addi", "arith.subi", "arith.muli", "arith.divsi", "arith.remsi", "arith.minsi", "arith.select", "arith.shli", "arith.extsi", "arith.divui",
            "arith.remui", "arith.andi", "arith.ori", "arith.extui", "arith.maxsi", "tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape", "tt.trans"}  # fmt: skip


def _values(ir: str) -> dict[str, tuple[str, list[str], str]]:
    """Of every value the operation that makes it, its operands and the rest of its line."""
    found = {}
    for name, op, rest in _DEFINED.findall(ir):
        rest = rest.partition(" loc(")[0]
        found[name] = (op, _NAME.findall(rest.partition(" : ")[0]), rest)
    return found


def _small(name: str, values: dict, seen: dict[str, bool]) -> bool:
    """Whether a 32-bit value is made of constants and ranges alone, or is the number of a block of columns."""
    if name not in seen:
        seen[name] = False  # what a loop carries is not known to be small
        op, operands, rest = values.get(name, ("an argument", [], ""))
        if op == "tt.get_program_id":
            seen[name] = rest.strip().partition(" ")[0] in ("y", "z")
        elif op == "arith.trunci":
            seen[name] = True  # kernels say so where they know it: rows of a tile
        else:
            seen[name] = op in _SMALL or (op in _THROUGH or op == "arith.cmpi") and all(_small(o, values, seen) for o in operands)
    return seen[name]


def narrow(ir: str) -> list[str]:
    """The multiplications in 32 bits, of values that are not small, that addresses depend on."""
    values, seen, wrong = _values(ir), {}, []
    todo = [operands[1] for op, operands, _ in values.values() if op == "tt.addptr"]
    done = set(todo)
    while todo:
        name = todo.pop()
        op, operands, rest = values.get(name, ("an argument", [], ""))
        if op in ("arith.muli", "arith.shli") and re.search(r"\bi32\b|xi32>", rest) and not all(_small(o, values, seen) for o in operands):
            wrong.append(f"{name} = {op}{rest}")
        new = [o for o in operands if o not in done] if op in _THROUGH else []
        done.update(new)
        todo += new
    return wrong

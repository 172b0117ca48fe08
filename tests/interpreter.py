"""Triton's interpreter, faster: it prepares the language anew for every call of a function inside a kernel, most of its time."""

from __future__ import annotations

from triton import language as tl
from triton.runtime import interpreter

_prepared: set = set()


def _call(self, *args, **kwargs):
    """A device function's call. The kernel around it has prepared triton.language itself; other modules are prepared once and stay so."""
    modules = frozenset(name for name, value in self.fn.__globals__.items() if value is tl.core)
    if modules and "core" not in _prepared:
        interpreter._patch_lang(self.fn)
        _prepared.add("core")
    try:
        return self.rewrite()(*args, **kwargs)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


def quicken() -> None:
    interpreter.InterpretedFunction.__call__ = _call

"""Implementation and autograd of the ops: as torch.library does it, for ops that take lists of tensors, at a fraction of its cost a call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import backends, journal
from .expression import backend_of, compiled, library

_PLAIN = frozenset((Tensor, torch.nn.Parameter))


def _tensors(arguments) -> list[Tensor]:
    """Those among the arguments, and those in lists among them, in their order."""
    found: list[Tensor] = []
    for a in arguments:
        if isinstance(a, Tensor):
            found.append(a)
        elif isinstance(a, (list, tuple)) and a and isinstance(a[0], Tensor):
            found += a
    return found


def _eager(tensors: list[Tensor]) -> bool:
    """Whether nobody looks at the ops that are called: no compiler, no tracer, no transform, no mode, no tensor of another class."""
    return _PLAIN.issuperset(map(type, tensors)) and not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )


def register(name: str, implementation: Callable, backward: Callable, setup: Callable | None = None) -> Callable:
    """Registers what an op does and its derivative; its arguments are tensors, lists of tensors and constants.

    Args:
        implementation: what the op does, on every device, where no C++ kernel does it.
        backward: (ctx, need, *grads) -> a gradient or None for each tensor of the arguments, those of lists one by one; `need` says
            for each of them whether it is wanted; grads: of each tensor of the output.
        setup: (ctx, inputs, output), as for torch.library.register_autograd.

    Returns:
        The op as a function. In eager mode it does what the op does without the dispatcher, whose way through Python costs more than
        the kernel of a small network.
    """
    op = getattr(torch.ops.ngkernels, name).default
    kernel = getattr(torch.ops.ngkernels_C, name).default if compiled is not None and hasattr(torch.ops.ngkernels_C, name) else None
    compute = -2 if name.endswith("_backward") else -1  # where this argument stands

    def kernel_for(arguments) -> torch._ops.OpOverload | None:
        """The C++ kernel, if that is what the arguments ask for."""
        return kernel if kernel is not None and backend_of(arguments[compute]) == "cpp" else None

    backends.implementations[op] = implementation
    library.impl(name, lambda *arguments: (kernel_for(arguments) or implementation)(*arguments), "CompositeExplicitAutograd")
    returns = str(op._schema).rpartition("->")[2].strip()
    many, single = returns == "Tensor[]", returns == "Tensor"

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx, function, arguments, *_tensors):
            with torch._C._AutoDispatchBelowAutograd():
                output = function(*arguments)
            if setup is not None:
                setup(ctx, arguments, output)
            return output if single else tuple(output)

        @staticmethod
        def backward(ctx, *grads):
            return (None, None, *backward(ctx, ctx.needs_input_grad[2:], *grads))

    Node.__name__ = Node.__qualname__ = "".join(part.capitalize() for part in name.split("_"))
    bare = super(torch.autograd.Function, Node).apply  # without its look for transforms, which _eager has had

    def differentiable(function, arguments, tensors, apply):
        if not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
            with torch._C._AutoDispatchBelowAutograd():
                return function(*arguments)
        output = apply(function, arguments, *tensors)
        return list(output) if many else output

    def autograd(keyset, *arguments):
        below = keyset & torch._C._after_autograd_keyset
        function = kernel_for(arguments) or (lambda *a: op.redispatch(below, *a))
        return differentiable(function, arguments, _tensors(arguments), Node.apply)

    library.impl(name, autograd, "Autograd", with_keyset=True)  # of `op` alone: compiled code, whose derivatives are made, calls the kernel

    def run(*arguments):
        tensors = _tensors(arguments)
        if not _eager(tensors):
            return op(*arguments)
        return differentiable(journal.kept(name, kernel_for(arguments) or implementation), arguments, tensors, bare)

    return run

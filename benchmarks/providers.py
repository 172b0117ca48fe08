"""Who computes the training step: this project's backends and the baselines, all with the same parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from benchmarks.cases import Case
from benchmarks.models import MODELS, Model

DTYPES = ("fp32", "bf16")


@dataclass(frozen=True)
class Provider:
    """One way to compute the step.

    Attributes:
        backend: of ngkernels; None for a baseline.
        style, order: of the PyG baseline, see neural_graphs.baselines.pyg_nggnn.
        compiled: whether the whole model goes through torch.compile.
        text: one line for people.
    """

    name: str
    text: str
    backend: str | None = None
    style: str = "published"
    order: str = "source"
    compiled: bool = False

    @property
    def ours(self) -> bool:
        return self.backend is not None


PROVIDERS = {
    p.name: p
    for p in (
        Provider("ngk-cpp", "ngkernels, C++ kernels", backend="cpp"),
        Provider("ngk-cpp-compile", "ngkernels, C++ kernels, model compiled", backend="cpp", compiled=True),
        Provider("ngk-reference", "ngkernels, plain PyTorch", backend="reference"),
        Provider("pyg", "PyG, operations as published"),
        Provider("pyg-compile", "PyG, operations as published, compiled", compiled=True),
        Provider("pyg-tuned", "PyG, linears hoisted, edges sorted by target", style="hoisted", order="target"),
        Provider(
            "pyg-tuned-compile", "PyG, linears hoisted, edges sorted by target, compiled", style="hoisted", order="target", compiled=True
        ),
        Provider("dense", "dense pairs, operations as published"),
        Provider("dense-compile", "dense pairs, operations as published, compiled", compiled=True),
    )
}


@cache
def why_not(model: str, name: str) -> str | None:
    """Why a provider cannot run a model here, or None."""
    provider, subject = PROVIDERS[name], MODELS[model]
    if not provider.ours:
        return None if name in subject.rivals else f"it is no baseline of {subject.text}"
    try:
        import ngkernels as ngk

        case = Case((2, 3, 2))
        with ngk.use_backend(provider.backend):
            weights, biases, _ = case.inputs()
            subject.ours(subject.new_oracle(case))(weights, biases)
    except Exception as error:  # any failure is a reason, and it is shown
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    return None


class Runner:
    """A provider's model for one case, with the parameters of `oracle`."""

    def __init__(self, model: Model, provider: Provider, case: Case, oracle: nn.Module):
        self.provider, self.case = provider, case
        self.model: nn.Module = model.ours(oracle) if provider.ours else model.baseline(provider, oracle)
        if provider.ours:
            self.model.graph(case.batch)
        elif hasattr(self.model, "edge_index"):
            self.model.edge_index(case.batch)
        self.call: Callable[[list[Tensor], list[Tensor]], Tensor] = self.model
        if provider.compiled:
            self.call = torch.compile(self.model, fullgraph=True, dynamic=False)

    def context(self, dtype: str) -> contextlib.ExitStack:
        """The backend and the autocast of a call."""
        stack = contextlib.ExitStack()
        if self.provider.ours:
            import ngkernels as ngk

            stack.enter_context(ngk.use_backend(self.provider.backend))
        if dtype == "bf16":
            stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))
        return stack

    def step(self, weights: list[Tensor], biases: list[Tensor], labels: Tensor, dtype: str = "fp32") -> Tensor:
        """Forward, cross-entropy, backward. Gradients of the step before are dropped first. Returns the logits."""
        self.model.zero_grad(set_to_none=True)
        for tensor in (*weights, *biases):
            tensor.grad = None
        with self.context(dtype):
            logits = self.call(weights, biases)
            loss = nn.functional.cross_entropy(logits.float() if dtype == "bf16" else logits, labels)
            loss.backward()
        return logits


def select(model: Model, names: str) -> tuple[list[Provider], dict[str, str]]:
    """Providers of a comma-separated list and, by name, why some of them cannot run.

    `default` stands for the model's usual ones: there, what cannot run is left out; a provider asked for by name must run.
    """
    wanted = [n for part in names.split(",") if part for n in (model.providers if part == "default" else (part,))]
    unknown = [n for n in wanted if n not in PROVIDERS]
    if unknown:
        raise ValueError(f"providers: expected names of {', '.join(PROVIDERS)} or default, got {unknown[0]!r}")
    missing = {n: reason for n in wanted if (reason := why_not(model.name, n))}
    asked = [n for n in missing if n in names.split(",")]
    if asked:
        raise RuntimeError(f"providers: {asked[0]} was asked for and cannot run: {missing[asked[0]]}")
    return [PROVIDERS[n] for n in dict.fromkeys(wanted) if n not in missing], missing


def usable(model: Model, names: str) -> tuple[list[Provider], dict[str, str]]:
    """`select` for a command line: what is wrong becomes one line of usage error."""
    import typer

    try:
        return select(model, names)
    except (ValueError, RuntimeError) as error:
        raise typer.BadParameter(str(error)) from None

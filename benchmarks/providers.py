"""Who computes the training step: this project's backends and the PyG baselines, all with the same parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from benchmarks.cases import CLASSES, Case
from neural_graphs.baselines.pyg_nggnn import PyGNGGNN

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
    )
}
DEFAULT = ("ngk-cpp", "pyg-compile", "pyg-tuned-compile", "pyg")


@cache
def why_not(name: str) -> str | None:
    """Why a provider cannot run here, or None."""
    provider = PROVIDERS[name]
    if not provider.ours:
        return None
    try:
        import neural_graphs.models
        import ngkernels as ngk

        with ngk.use_backend(provider.backend):
            model = neural_graphs.models.NGGNN(layout=[2, 3, 2], d_hid=32, num_layers=4, out_features=CLASSES)
            weights, biases, _ = Case((2, 3, 2)).inputs()
            model(weights, biases)
    except Exception as error:  # any failure is a reason, and it is shown
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    return None


class Runner:
    """A provider's model for one case, with the parameters of `oracle`."""

    def __init__(self, provider: Provider, case: Case, oracle: PyGNGGNN):
        self.provider, self.case = provider, case
        state, layout = oracle.reference_state_dict(), list(case.layout)
        self.model: nn.Module
        if provider.ours:
            from neural_graphs.models import NGGNN

            self.model = NGGNN.from_reference(state, oracle.reference_config(), edge_memory="recompute")
            self.model.graph(case.batch)
        else:
            self.model = PyGNGGNN(layout, style=provider.style, order=provider.order).load_reference(state)
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


def new_oracle(case: Case, seed: int = 0) -> PyGNGGNN:
    """The published baseline with random parameters: where every provider takes its own from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return PyGNGGNN(list(case.layout), out_features=CLASSES, style="published", order="source")


def select(names: str) -> tuple[list[Provider], dict[str, str]]:
    """Providers of a comma-separated list and, by name, why some of them cannot run.

    `default` stands for the usual ones: there, what cannot run is left out; a provider asked for by name must run.
    """
    wanted = [n for part in names.split(",") if part for n in (DEFAULT if part == "default" else (part,))]
    unknown = [n for n in wanted if n not in PROVIDERS]
    if unknown:
        raise ValueError(f"providers: expected names of {', '.join(PROVIDERS)} or default, got {unknown[0]!r}")
    missing = {n: reason for n in wanted if (reason := why_not(n))}
    asked = [n for n in missing if n in names.split(",")]
    if asked:
        raise RuntimeError(f"providers: {asked[0]} was asked for and cannot run: {missing[asked[0]]}")
    return [PROVIDERS[n] for n in dict.fromkeys(wanted) if n not in missing], missing


def usable(names: str) -> tuple[list[Provider], dict[str, str]]:
    """`select` for a command line: what is wrong becomes one line of usage error."""
    import typer

    try:
        return select(names)
    except (ValueError, RuntimeError) as error:
        raise typer.BadParameter(str(error)) from None

"""The correctness gate: nothing is timed that does not compute the same function.

Logits, gradients of the input weights and gradients of the parameters are compared with the published baseline in float64. The error
allowed is three times that of the published baseline itself in the precision under test, plus a floor: a provider must be about as
right as plain PyTorch, no more and no less.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.baselines.pyg_nggnn import PyGNGGNN
from benchmarks.cases import Case
from benchmarks.providers import PROVIDERS, Runner

FACTOR = 3.0
FLOOR = {"fp32": 1e-4, "bf16": 2e-2}
LIMIT = 600_000  # edges: the float64 oracle keeps about 13 kB per edge


@dataclass
class Outcome:
    """What one step gave, in float64."""

    logits: Tensor
    weights: Tensor
    parameters: dict[str, Tensor]

    def errors(self, true: Outcome) -> dict[str, float]:
        """Relative errors in the 2-norm: of the logits, of all weight gradients, of all parameter gradients with a common name."""
        found = {"logits": _relative(self.logits, true.logits), "weight_grads": _relative(self.weights, true.weights)}
        common = sorted(self.parameters.keys() & true.parameters.keys())
        if common:
            mine, theirs = (torch.cat([o.parameters[n].flatten() for n in common]) for o in (self, true))
            found["parameter_grads"] = _relative(mine, theirs)
        return found


def _relative(value: Tensor, true: Tensor) -> float:
    return ((value - true).norm() / true.norm()).item()


def outcome(runner: Runner, dtype: str, floating: torch.dtype = torch.float32, seed: int = 0) -> Outcome:
    """Runs one step with weight gradients on. Inputs are the float32 ones, whatever `floating` is."""
    weights, biases, labels = runner.case.inputs(seed)
    weights = [w.to(floating).requires_grad_() for w in weights]
    logits = runner.step(weights, [b.to(floating) for b in biases], labels, dtype)
    parameters = {n: p.grad.double() for n, p in runner.model.named_parameters() if p.grad is not None}
    runner.model.zero_grad(set_to_none=True)
    return Outcome(logits.detach().double(), torch.cat([w.grad.double().flatten() for w in weights]), parameters)


class Gate:
    """Compares providers with float64 for one case; the two PyTorch runs that set the budget are made once."""

    def __init__(self, case: Case, oracle: PyGNGGNN):
        self.case, self.skipped = case, case.edges > LIMIT
        self.budgets: dict[str, dict[str, float]] = {}
        if not self.skipped:
            self.single = Runner(PROVIDERS["pyg"], case, oracle)
            double = Runner(PROVIDERS["pyg"], case, oracle)
            double.model = copy.deepcopy(double.model).double()
            double.call = double.model
            self.true = outcome(double, "fp32", torch.float64)

    def budget(self, dtype: str) -> dict[str, float]:
        if dtype not in self.budgets:
            self.budgets[dtype] = outcome(self.single, dtype).errors(self.true)
        return self.budgets[dtype]

    def check(self, runner: Runner, dtype: str) -> dict[str, float] | None:
        """Errors of a provider; None where the case is too large for the oracle.

        Raises:
            RuntimeError: an error is above its budget.
        """
        if self.skipped:
            return None
        errors = outcome(runner, dtype).errors(self.true)
        for what, error in errors.items():
            allowed = FACTOR * self.budget(dtype).get(what, 0.0) + FLOOR[dtype]
            if not error <= allowed:
                raise RuntimeError(
                    f"gate: {runner.provider.name} at {self.case.label} in {dtype}: expected a relative error of {what} "
                    f"of at most {allowed:.2g}, got {error:.2g}; not timed"
                )
        return errors

"""The correctness gate: nothing is timed that does not compute the same function.

Logits, gradients of the input weights and gradients of the parameters are compared with the published baseline in float64. The error
allowed is that of the published baseline itself in the precision under test (three times that in fp32), plus a floor: a provider must
be about as right as plain PyTorch.

NG-GNN's min and max are not differentiable where two messages nearly tie: another rounding picks another edge and moves a whole gradient there.
Seen in every provider, PyG included, and in a handful of entries at a time, so weight gradients are held to the tight bound on the 99 %
of entries with the smallest errors, and to a loose one on all.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.cases import Case
from benchmarks.models import Model
from benchmarks.providers import PROVIDERS, Runner

FACTOR = {"fp32": 3.0, "bf16": 1.0}
FLOOR = {
    "fp32": {"logits": 1e-4, "weight_grads": 1e-4, "weight_grads_all": 1e-2, "parameter_grads": 1e-3},
    "bf16": {"logits": 2e-2, "weight_grads": 5e-2, "weight_grads_all": 2e-1, "parameter_grads": 5e-2},
}
LIMIT = 8e9  # bytes that the float64 oracle may keep


@dataclass
class Outcome:
    """What one step gave, in float64."""

    logits: Tensor
    weights: Tensor
    parameters: dict[str, Tensor]

    def errors(self, true: Outcome) -> dict[str, float]:
        """Relative errors in the 2-norm: logits, weight gradients (best 99 %, and all), parameter gradients with a common name."""
        wrong = (self.weights - true.weights).abs().sort().values
        best = wrong[: max(1, int(0.99 * wrong.numel()))]
        found = {
            "logits": _relative(self.logits, true.logits),
            "weight_grads": (best.norm() / true.weights.norm()).item(),
            "weight_grads_all": (wrong.norm() / true.weights.norm()).item(),
        }
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

    def __init__(self, model: Model, case: Case, oracle: nn.Module):
        self.case, self.skipped = case, model.oracle_bytes(case) > LIMIT
        self.budgets: dict[str, dict[str, float]] = {}
        if not self.skipped:
            published = PROVIDERS[model.rivals[0]]
            self.single = Runner(model, published, case, oracle)
            double = Runner(model, published, case, oracle)
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
            allowed = FACTOR[dtype] * self.budget(dtype).get(what, 0.0) + FLOOR[dtype][what]
            if not error <= allowed:
                raise RuntimeError(
                    f"gate: {runner.provider.name} at {self.case.label} in {dtype}: expected a relative error of {what} "
                    f"of at most {allowed:.2g}, got {error:.2g}; not timed"
                )
        return errors

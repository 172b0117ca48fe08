"""Recorded cases of the reference code: tests/golden/NAME.json and NAME.safetensors, float64."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 1e-10


class Case:
    """A recorded case: `config` and tensors, looked up by kind and name."""

    def __init__(self, name: str):
        self.config = json.loads((GOLDEN / f"{name}.json").read_text())["config"]
        self.tensors = load_file(GOLDEN / f"{name}.safetensors")

    def group(self, *kinds: str) -> dict[str, torch.Tensor]:
        pairs = ((key.split("/", 1), t) for key, t in self.tensors.items())
        return {key[1]: t for key, t in pairs if len(key) == 2 and key[0] in kinds}

    def inputs(self) -> dict[str, torch.Tensor]:
        return {name: t.clone().requires_grad_() for name, t in self.group("input").items()}

    def check(self, outputs: dict[str, torch.Tensor], inputs: dict[str, torch.Tensor], module: torch.nn.Module | None = None) -> None:
        """Outputs, and after backward from the recorded loss every recorded gradient."""
        wanted = self.group("out")
        assert wanted.keys() == outputs.keys()
        for name, t in outputs.items():
            close(t, wanted[name], f"out/{name}")
        sum((t * self.tensors[f"coeff/{name}"]).sum() for name, t in outputs.items()).backward()
        for name, t in self.group("grad_input").items():
            close(inputs[name].grad, t, f"grad_input/{name}")
        parameters = dict(module.named_parameters()) if module is not None else {}
        for name, t in self.group("grad_param").items():
            found = parameters[name].grad
            close(torch.zeros_like(t, dtype=torch.float64) if found is None else found, t, f"grad_param/{name}")


def close(found: torch.Tensor, wanted: torch.Tensor, name: str) -> None:
    """To 1e-10 of the largest entry; to the rounding of what was recorded in float32."""
    assert found.dtype == torch.float64, name
    assert found.shape == wanted.shape, name
    rounding = 0.0 if wanted.dtype == torch.float64 else 2.0**-24
    error, size = (found - wanted.double()).abs().max().item(), wanted.abs().max().item()
    assert error <= (TOLERANCE + rounding) * size, f"{name}: {error} of {size}"


def loaded(module: torch.nn.Module, case: Case) -> torch.nn.Module:
    module.double().load_state_dict(case.group("param", "buffer"))
    return module

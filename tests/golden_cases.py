"""Recorded cases of the reference code: tests/golden/NAME.json and NAME.safetensors, float64. Whole models are read in other places too."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

import ngkernels as ngk
from neural_graphs.models import NGGNN, NGT

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 1e-10
MODELS = ("a_nggnn_2_8_16_3", "a3_nggnn_gating_relufirst", "a5_nggnn_probe_2_8_8_1", "a6_nggnn_linearenc_meanpool", "b_ngt_2_6_10_3")
FLOAT32 = 1e-3  # plain PyTorch's own error there: up to 2e-4


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

    def check(self, outputs: dict[str, torch.Tensor], inputs: dict[str, torch.Tensor], module: torch.nn.Module | None = None, tolerance: float = TOLERANCE) -> None:
        """Outputs, and after backward from the recorded loss every recorded gradient, float64."""
        wanted = self.group("out")
        assert wanted.keys() == outputs.keys()
        for name, t in outputs.items():
            close(t, wanted[name], f"out/{name}", tolerance)
        sum((t * self.tensors[f"coeff/{name}"]).sum() for name, t in outputs.items()).backward()
        for name, t in self.group("grad_input").items():
            close(inputs[name].grad, t, f"grad_input/{name}", tolerance)
        parameters = dict(module.named_parameters()) if module is not None else {}
        for name, t in self.group("grad_param").items():
            found = parameters[name].grad
            close(torch.zeros_like(t, dtype=torch.float64) if found is None else found, t, f"grad_param/{name}", tolerance)


def close(found: torch.Tensor, wanted: torch.Tensor, name: str, tolerance: float = TOLERANCE) -> None:
    """To `tolerance` of the largest entry; to the rounding of what was recorded in float32."""
    assert found.dtype == torch.float64, name
    assert found.shape == wanted.shape, name
    rounding = 0.0 if wanted.dtype == torch.float64 else 2.0**-24
    error, size = (found - wanted.double()).abs().max().item(), wanted.abs().max().item()
    assert error <= (tolerance + rounding) * size, f"{name}: {error} of {size}"


def loaded(module: torch.nn.Module, case: Case) -> torch.nn.Module:
    module.double().load_state_dict(case.group("param", "buffer"))
    return module


def check_model(name: str, backend: str, device: str, dtype: torch.dtype) -> None:
    """A recorded model computed there, in that precision: logits, and every gradient of inputs and parameters."""
    case = Case(name)
    kind, groups = (NGT, ("param",)) if "ngt" in name else (NGGNN, ("param", "buffer"))
    model, inputs, layers = kind.from_reference(case.group(*groups), case.config), case.inputs(), range(len(case.config["layout"]) - 1)
    weights, biases = ([inputs[f"{what}.{k}"].to(device, dtype) for k in layers] for what in ("weights", "biases"))
    state = {key: t.to(device, dtype if t.is_floating_point() else t.dtype) for key, t in (*model.named_parameters(), *model.named_buffers())}
    with ngk.use_backend(backend):
        logits = torch.func.functional_call(model, state, (weights, biases))
        case.check({"logits": logits.cpu().double()}, inputs, model, TOLERANCE if dtype == torch.float64 else FLOAT32)

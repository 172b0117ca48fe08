"""The PyG baselines are the reference: float64 against the recorded case, in both styles and edge orders, and with the dense front end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from neural_graphs.baselines.dense_nggnn import DenseNGGNN
from neural_graphs.baselines.pyg_nggnn import ORDERS, STYLES, PyGNGGNN

CASE = Path(__file__).resolve().parents[2] / "tests" / "golden" / "a_nggnn_2_8_16_3"


@pytest.fixture(scope="module")
def golden() -> tuple[dict[str, torch.Tensor], dict]:
    from safetensors.torch import load_file

    return load_file(CASE.with_suffix(".safetensors")), json.loads(CASE.with_suffix(".json").read_text())["config"]


def part(tensors: dict[str, torch.Tensor], *prefixes: str) -> dict[str, torch.Tensor]:
    return {name.split("/", 1)[1]: t for name, t in tensors.items() if name.split("/", 1)[0] in prefixes}


def relative(value: torch.Tensor, true: torch.Tensor) -> float:
    return ((value - true).abs().max() / true.abs().max()).item()


MODELS = {f"{style}-{order}": (PyGNGGNN, {"style": style, "order": order}) for style in STYLES for order in ORDERS}
MODELS["dense"] = (DenseNGGNN, {})


@pytest.mark.parametrize("kind", MODELS)
def test_golden(golden, kind):
    tensors, config = golden
    make, options = MODELS[kind]
    model = make(config["layout"], **options).double().load_reference(part(tensors, "param", "buffer"))
    inputs = {name: t.clone().requires_grad_() for name, t in part(tensors, "input").items()}
    weights, biases = ([inputs[f"{kind}.{layer}"] for layer in range(3)] for kind in ("weights", "biases"))
    logits = model(weights, biases)
    assert relative(logits, tensors["out/logits"]) < 1e-10
    (tensors["coeff/logits"] * logits).sum().backward()
    checked = 0
    for name, true in part(tensors, "grad_input").items():
        assert relative(inputs[name].grad, true) < 1e-10, name
        checked += 1
    parameters = dict(model.named_parameters())
    for name, true in part(tensors, "grad_param").items():
        assert relative(parameters[name].grad, true) < 1e-10, name
        checked += 1
    assert checked == 83


def test_config_is_that_of_the_reference(golden):
    """reference_config() says what the recorded config says; Hydra's entries and the batch size apart."""
    config = PyGNGGNN(golden[1]["layout"]).reference_config()

    def plain(value):
        return {k: plain(v) for k, v in value.items() if not k.startswith("_") and k != "B"} if isinstance(value, dict) else value

    assert config == plain(golden[1])


def test_parameters_have_the_names_of_the_reference(golden):
    state = PyGNGGNN(golden[1]["layout"]).reference_state_dict()
    recorded = part(golden[0], "param", "buffer")
    assert {n: tuple(t.shape) for n, t in state.items()} == {n: tuple(t.shape) for n, t in recorded.items()}


def test_argument_errors():
    with pytest.raises(ValueError, match="expected style in"):
        PyGNGGNN([2, 3, 1], style="fast")
    with pytest.raises(ValueError, match="expected order in"):
        PyGNGGNN([2, 3, 1], order="random")

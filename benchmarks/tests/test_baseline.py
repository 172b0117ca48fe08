"""The baselines are the reference: float64 against the recorded cases; of NG-GNN in both styles and edge orders and with the dense front end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from neural_graphs.baselines import dense_ngt
from neural_graphs.baselines.dense_nggnn import DenseNGGNN
from neural_graphs.baselines.dense_ngt import DenseNGT
from neural_graphs.baselines.pyg_nggnn import ORDERS, STYLES, PyGNGGNN

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"


def recorded(name: str) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and configuration of a recorded case."""
    from safetensors.torch import load_file

    return load_file(GOLDEN / f"{name}.safetensors"), json.loads((GOLDEN / f"{name}.json").read_text())["config"]


@pytest.fixture(scope="module")
def golden() -> tuple[dict[str, torch.Tensor], dict]:
    return recorded("a_nggnn_2_8_16_3")


def part(tensors: dict[str, torch.Tensor], *prefixes: str) -> dict[str, torch.Tensor]:
    return {name.split("/", 1)[1]: t for name, t in tensors.items() if name.split("/", 1)[0] in prefixes}


def relative(value: torch.Tensor, true: torch.Tensor) -> float:
    return ((value - true).abs().max() / true.abs().max()).item()


def check_gradients(tensors, outputs: dict[str, torch.Tensor], inputs: dict[str, torch.Tensor], module: torch.nn.Module) -> int:
    """Backward from the recorded loss, and every recorded gradient; their number."""
    sum((tensors[f"coeff/{name}"] * t).sum() for name, t in outputs.items()).backward()
    parameters = dict(module.named_parameters())
    wanted = [(inputs[n].grad, n, true) for n, true in part(tensors, "grad_input").items()]
    wanted += [(parameters[n].grad, n, true) for n, true in part(tensors, "grad_param").items()]
    for found, name, true in wanted:
        rounding = 0.0 if true.dtype == torch.float64 else 2.0**-24  # some gradients are recorded in float32
        assert relative(found, true) < 1e-10 + rounding, name
    return len(wanted)


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
    assert check_gradients(tensors, {"logits": logits}, inputs, model) == 83


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


def leaves(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t.clone().requires_grad_() for name, t in part(tensors, "input").items()}


def test_ngt_golden():
    tensors, config = recorded("b_ngt_2_6_10_3")
    model, inputs = DenseNGT(config["layout"]).double().load_reference(part(tensors, "param", "buffer")), leaves(tensors)
    logits = model(*([inputs[f"{kind}.{layer}"] for layer in range(3)] for kind in ("weights", "biases")))
    assert relative(logits, tensors["out/logits"]) < 1e-10
    assert check_gradients(tensors, {"logits": logits}, inputs, model) == 60
    assert model.reference_config() == {k: v for k, v in config.items() if k != "B"}


def attention(c):
    return dense_ngt.Attention(c["d_node"], c["d_edge"], c["d_hid"], c["n_heads"], c["modulate_v"])


def update(c):
    return dense_ngt.PairUpdate(c["d_node"], c["d_edge"], c["d_edge_hid"])


def layer(c):
    return dense_ngt.Layer(c["d_node"], c["d_edge"], c["d_attn_hid"], c["d_node_hid"], c["d_edge_hid"], c["n_heads"])


PARTS = {
    "e3_rtattention_modv": (attention, ("y",)),
    "e3b_rtattention_nomodv": (attention, ("y",)),
    "e4_rt_edge_layer": (update, ("e",)),
    "e5_rt_layer": (layer, ("node", "edge")),
}


@pytest.mark.parametrize("name", PARTS)
def test_ngt_parts_golden(name):
    tensors, config = recorded(name)
    make, outputs = PARTS[name]
    module, inputs = make(config).double(), leaves(tensors)
    module.load_state_dict(part(tensors, "param", "buffer"))
    found = module(inputs["node"], inputs["edge"])
    found = dict(zip(outputs, found if isinstance(found, tuple) else (found,), strict=True))
    assert {f"out/{n}" for n in found} == {n for n in tensors if n.startswith("out/")}
    for output, t in found.items():
        assert relative(t, tensors[f"out/{output}"]) < 1e-10
    assert check_gradients(tensors, found, inputs, module) > 4


def test_ngt_has_the_parameters_of_this_project():
    """NGT takes over the state of the dense formula, and computes the same."""
    from neural_graphs.models import NGT

    torch.manual_seed(0)
    dense = DenseNGT([2, 5, 3]).double()
    model = NGT.from_reference(dense.reference_state_dict(), dense.reference_config())
    weights, biases = [torch.randn(2, a, b, 1).double() for a, b in ((2, 5), (5, 3))], [torch.randn(2, b, 1).double() for b in (5, 3)]
    assert relative(model(weights, biases), dense(weights, biases)) < 1e-10

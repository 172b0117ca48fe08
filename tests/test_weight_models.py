"""NFN and DWS: recorded cases of the reference code, symmetries, batches, checkpoints, errors."""

from __future__ import annotations

import copy

import pytest
import torch
from golden_cases import TOLERANCE, Case
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import networks, relative

from neural_graphs.models import DWS, NFN

CASES = {"d4_dws_2_3_4_3_4_2": DWS, "d5_dws_ds_mean": DWS, "d6_dws_diagonal_sum": DWS, "d7_nfn_2_4_5_3": NFN}
LAYOUT = [2, 5, 4, 3]
KINDS = {
    "nfn": lambda layout: NFN(layout, (6, 5), 4, fourier_features=7, fourier_sigma=1.0, head_width=8, dropout=0.0),
    "dws": lambda layout: DWS(layout, 8, 2, 4, num_heads=2),
    "dws-ds": lambda layout: DWS(layout, 6, 1, 4, set_layer="ds", reduction="mean", n_fc_layers=2, batch_norm=False),
    "dws-diagonal": lambda layout: DWS(layout, 4, 1, 4, num_heads=4, reduction="sum", diagonal=True),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def new(kind: str, layout=LAYOUT, dtype=torch.float64):
    """A model with parameters far from their start, where biases are almost 0."""
    model = KINDS[kind](layout).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    return model


def recorded(name: str):
    case = Case(name)
    tensors = {n: t.double() if t.is_floating_point() else t for n, t in case.group("param", "buffer").items()}
    return case, tensors, CASES[name].from_reference(tensors, case.config)


# ---- the reference ----
@pytest.mark.parametrize("name", CASES)
def test_recorded_case(name: str):
    """Outputs and every gradient. Some gradients are 0 but for rounding: a shift of all keys does not change a softmax."""
    case, _, model = recorded(name)
    inputs, layers = case.inputs(), range(len(case.config["layout"]) - 1)
    logits = model([inputs[f"weights.{k}"] for k in layers], [inputs[f"biases.{k}"] for k in layers])
    assert relative(logits, case.tensors["out/logits"]) <= TOLERANCE
    (logits * case.tensors["coeff/logits"]).sum().backward()
    found = {**inputs, **dict(model.named_parameters())}
    wanted = case.group("grad_input", "grad_param")
    assert wanted.keys() == found.keys()
    errors = {n: relative(torch.zeros_like(t) if found[n].grad is None else found[n].grad, t, 1e-3) for n, t in wanted.items()}
    assert max(errors.values()) <= TOLERANCE, max(errors, key=errors.get)


@pytest.mark.parametrize("name", CASES)
def test_checkpoints_that_do_not_fit(name: str):
    case, tensors, model = recorded(name)
    gone = dict(tensors)
    first = next(iter(model.state_dict()))
    gone["other"] = gone.pop(first)
    op = type(model).__name__
    with pytest.raises(ValueError, match=rf"{op}.from_reference: .*missing: {first}; left over: other"):
        type(model).from_reference(gone, case.config)
    wrong = {n: t[:1] if n.endswith("weight") else t for n, t in tensors.items()}
    with pytest.raises(ValueError, match=rf"{op}.from_reference: expected tensors of the config's shapes"):
        type(model).from_reference(wrong, case.config)
    with pytest.raises(ValueError, match=rf"{op}.from_reference: expected config with layout"):
        type(model).from_reference(tensors, {"B": 2})


def test_options_that_are_not_built():
    for name, value in (("add_skip", True), ("bias", False), ("input_dim_downsample", 8), ("equiv_out_features", 4)):
        with pytest.raises(NotImplementedError, match=rf"DWS.from_reference: expected {name}=.*; that option is not built"):
            DWS.from_reference({}, {"layout": LAYOUT, "hidden_dim": 4, name: value})
    for name, value in (("mode", "HNP"), ("normalize", True)):
        with pytest.raises(NotImplementedError, match=rf"NFN.from_reference: expected {name}="):
            NFN.from_reference({}, {"layout": LAYOUT, "hchannels": [4], name: value})


@every_kind
def test_state_dict_round_trip(kind: str, tmp_path):
    first, second = new(kind), KINDS[kind](LAYOUT).double()
    torch.save(first.state_dict(), tmp_path / "model.pt")
    second.load_state_dict(torch.load(tmp_path / "model.pt"))
    weights, biases = networks(LAYOUT, dtype=torch.float64)
    logits = first(weights, biases)
    assert logits.shape == (2, 4)
    assert torch.equal(copy.deepcopy(second)(weights, biases), logits)


def test_reference_names():
    names = set(NFN(LAYOUT).state_dict())
    assert {"nfnet_features.0._B", "nfnet_features.2.layer_0_rc.weight", "nfnet_features.6.bias_2.bias", "head.7.weight"} <= names
    assert NFN(LAYOUT).state_dict()["nfnet_features.2.layer_0.weight"].shape == (512, 525, 1, 1)
    names = set(DWS(LAYOUT).state_dict())
    block = "layers.layers.4.weight_to_weight.layers"
    assert {f"{block}.1_1.lin_both.0.weight", f"{block}.0_0.set_layer.set_layer.mab.fc_q.weight", f"{block}.0_2.layer.0.bias"} <= names
    assert {"layers.layers.1.weights_bn.2.running_var", "clf.layer.0.weight"} <= names


# ---- symmetries ----
layouts = st.lists(st.integers(1, 5), min_size=2, max_size=4).map(lambda hidden: [2, *hidden, 3])
symmetry = settings(max_examples=8, deadline=None, derandomize=True)


def permuted(tensors, orders):
    """Weights (B, in, out, C) or biases (B, out, C) of the networks with their neurons in another order."""
    weights, biases = tensors
    return [w[:, a][:, :, b] for w, a, b in zip(weights, orders, orders[1:])], [b[:, o] for b, o in zip(biases, orders[1:])]


def hidden_orders(layout):
    return [torch.arange(layout[0]), *(torch.randperm(d) for d in layout[1:-1]), torch.arange(layout[-1])]


@every_kind
@symmetry
@given(layout=layouts, seed=st.integers(0, 1000))
def test_logits_do_not_depend_on_the_order_of_hidden_neurons(kind: str, layout, seed):
    torch.manual_seed(seed)
    model, inputs = new(kind, layout), networks(layout, dtype=torch.float64)
    assert relative(model(*permuted(inputs, hidden_orders(layout))), model(*inputs)) <= 1e-9


@every_kind
@symmetry
@given(layout=layouts, seed=st.integers(0, 1000))
def test_features_follow_the_order_of_hidden_neurons(kind: str, layout, seed):
    torch.manual_seed(seed)
    model, inputs, orders = new(kind, layout), networks(layout, dtype=torch.float64), hidden_orders(layout)

    def features(weights, biases):
        if not isinstance(model, NFN):
            return model.layers((weights, biases))
        found = model.nfnet_features(([w.permute(0, 3, 2, 1) for w in weights], [b.mT for b in biases]))
        return [w.permute(0, 3, 2, 1) for w in found[0]], [b.mT for b in found[1]]

    for moved, wanted in zip(features(*permuted(inputs, orders)), permuted(features(*inputs), orders), strict=True):
        assert all(relative(m, w, 1e-3) <= 1e-9 for m, w in zip(moved, wanted, strict=True))


@every_kind
@pytest.mark.parametrize("layer", [0, -1])
def test_input_and_output_neurons_are_not_alike(kind: str, layer: int):
    """Only hidden neurons may change places."""
    model, inputs = new(kind), networks(LAYOUT, dtype=torch.float64)
    orders = [torch.arange(d) for d in LAYOUT]
    orders[layer] = orders[layer].flip(0)
    assert relative(model(*permuted(inputs, orders)), model(*inputs)) > 1e-4


# ---- batches, precision, training ----
@every_kind
def test_a_network_does_not_feel_its_batch_mates(kind: str):
    model = new(kind).eval()
    weights, biases = networks(LAYOUT, 3, torch.float64)
    alone = torch.cat([model([w[k : k + 1] for w in weights], [b[k : k + 1] for b in biases]) for k in range(3)])
    assert relative(model(weights, biases), alone) <= 1e-12


def test_batch_norm_does_feel_them_in_training():
    model = new("dws")
    weights, biases = networks(LAYOUT, 3, torch.float64)
    assert relative(model(weights, biases)[:1], model([w[:1] for w in weights], [b[:1] for b in biases])) > 1e-4


@every_kind
def test_dropout_acts_in_training_only(kind: str):
    weights, biases = networks(LAYOUT)
    model = NFN(LAYOUT, (4,), dropout=0.5) if kind == "nfn" else DWS(LAYOUT, 4, 1, num_heads=2, dropout=0.5)
    assert not torch.equal(model(weights, biases), model(weights, biases))
    assert torch.equal(model.eval()(weights, biases), model(weights, biases))


@every_kind
def test_weights_of_low_precision_and_any_strides(kind: str):
    model = new(kind, dtype=torch.float32).eval()
    weights, biases = networks(LAYOUT)
    wanted = model([w.bfloat16().float() for w in weights], [b.bfloat16().float() for b in biases])
    turned = [w.bfloat16().transpose(1, 2).contiguous().transpose(1, 2) for w in weights]
    assert relative(model(turned, [b.bfloat16() for b in biases]), wanted) <= 1e-6


@every_kind
def test_learns(kind: str):
    """Tells networks apart by the sign of their last bias."""
    model = KINDS[kind](LAYOUT)
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    weights, biases = networks(LAYOUT, 32)
    labels = (biases[-1][:, 0, 0] > 0).long()
    losses = []
    for _ in range(60):
        losses.append(torch.nn.functional.cross_entropy(model(weights, biases), labels))
        optimiser.zero_grad()
        losses[-1].backward()
        optimiser.step()
    assert losses[-1] < 0.5 * losses[0]


@every_kind
def test_compiles_in_one_piece(kind: str):
    torch._dynamo.reset()
    model, inputs = new(kind), networks(LAYOUT, dtype=torch.float64)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert relative(compiled(*inputs), model(*inputs)) <= 1e-12


# ---- errors ----
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DWS([2, 3, 1]), r"DWS: expected layout of at least 4 layers \(3 weights\), got \(2, 3, 1\)"),
        (lambda: DWS(LAYOUT, 12), r"DWS: expected widths that num_heads divides, got 24 channels and 8 heads; change hidden_dim|got 12"),
        (lambda: DWS(LAYOUT, reduction="attn"), r"DWS: expected reduction in max, mean, sum, got 'attn'"),
        (lambda: DWS(LAYOUT, set_layer="x"), r"DWS: expected set_layer in sab, ds, got 'x'"),
        (lambda: DWS(LAYOUT, n_hidden=-1), r"DWS: expected n_hidden of at least 0, got -1"),
        (lambda: DWS(LAYOUT, hidden_dim=0), r"DWS: expected hidden_dim of at least 1, got 0"),
        (lambda: NFN([3]), r"NFN: expected layout of at least 2 layers"),
        (lambda: NFN(LAYOUT, ()), r"NFN: expected at least one hidden layer"),
        (lambda: NFN(LAYOUT, out_features=0), r"NFN: expected out_features of at least 1, got 0"),
        (lambda: NFN(LAYOUT, check_finite="x"), r"NFN: expected check_finite in None, warn, error, got 'x'"),
    ],
)
def test_options(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()


@every_kind
def test_inputs(kind: str):
    model = KINDS[kind](LAYOUT)
    weights, biases = networks(LAYOUT)
    op = type(model).__name__
    with pytest.raises(ValueError, match=rf"{op}: expected weights\[0\] of shape \(2, 2, 5, 1\) .*, got \(2, 5, 2, 1\)"):
        model([w.transpose(1, 2) for w in weights], biases)
    with pytest.raises(ValueError, match=rf"{op}: expected 3 weights .*, got 2"):
        model(weights[:2], biases)
    with pytest.raises(TypeError, match=rf"{op}: expected weights\[0\] of a dtype that fits"):
        model([w.double() for w in weights], biases)
    model.check_finite = "error"
    weights[1][0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=rf"{op}: expected finite weights\[1\]"):
        model(weights, biases)

"""INR classification: the model learns, its input is invariant, a resumed run equals an uninterrupted one, the baselines run."""

from dataclasses import replace

import pytest
import torch

from neural_graphs.data import (
    DigitConfig,
    InrSet,
    PictureMotion,
    SirenConfig,
    digit_inrs,
    digit_splits,
    load_digit_pictures,
    permute_hidden,
)
from neural_graphs.tasks.baselines import MlpConfig, bounds, run_baseline, weight_baselines
from neural_graphs.tasks.inr_classification import (
    ClassifierConfig,
    InrInputs,
    ShuffledBatches,
    build_model,
    predict,
    score,
    train_classifier,
)
from neural_graphs.tasks.training import TrainConfig

pytestmark = pytest.mark.usefixtures("one_thread")
MODELS = pytest.mark.parametrize("model", ["ng-gnn", "ng-t"])
TINY = ClassifierConfig(d_hid=8, num_layers=3, fourier_features=8, train=TrainConfig(steps=12, batch=8, warmup=2, eval_every=5))


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    config = DigitConfig(images=40, per_image=3, siren=SirenConfig(steps=40))
    return digit_splits(digit_inrs(config, tmp_path_factory.mktemp("cache")))


class StopAfter:
    def __init__(self, looks):
        self.looks = looks

    @property
    def requested(self):
        self.looks -= 1
        return self.looks < 0


@MODELS
def test_resumed_equals_uninterrupted(sets, tmp_path, model):
    config = replace(TINY, model=model)
    whole, finished = train_classifier(sets, config, {}, tmp_path / "whole.pt")
    assert finished
    part, finished = train_classifier(sets, config, {}, tmp_path / "part.pt", stop=StopAfter(7))
    assert not finished and part.step == 7
    part, finished = train_classifier(sets, config, {}, tmp_path / "part.pt")
    assert finished and part.history == whole.history
    theirs = whole.model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in part.model.state_dict().items())


def test_fresh_ignores_a_checkpoint(sets, tmp_path):
    train_classifier(sets, TINY, {}, tmp_path / "x.pt")
    trainer, _ = train_classifier(sets, TINY, {"other": 1}, tmp_path / "x.pt", resume=False)
    assert trainer.step == 12


@MODELS
def test_the_model_learns(sets, tmp_path, model):
    """Two classes that differ in the sign of the last layer's weights: easy, and impossible without reading weights."""

    def easy(part):
        labels = torch.arange(len(part)) % 2
        scale = torch.where(labels == 1, 1.0, -1.0)
        last = part.weights[2].abs() * scale[:, None, None]
        biases = tuple(bias.abs() + 0.01 for bias in part.biases)
        return InrSet((*part.weights[:2], last), biases, labels, torch.arange(len(part)), part.psnr)

    data = {name: easy(part) for name, part in sets.items()}
    config = replace(TINY, model=model, augment=False, train=TrainConfig(steps=150, batch=16, lr=5e-3, warmup=10, eval_every=150))
    trainer, _ = train_classifier(data, config, {}, tmp_path / "x.pt")
    assert trainer.history[-1]["test_accuracy"] > 85


@MODELS
def test_bf16_runs(sets, tmp_path, model):
    config = replace(TINY, model=model, train=replace(TINY.train, steps=4, bf16=True))
    trainer, _ = train_classifier(sets, config, {}, tmp_path / "x.pt")
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in trainer.model.parameters())


@MODELS
@pytest.mark.parametrize("attention", ["all", "edges"])
def test_prediction_does_not_depend_on_order_signs_or_batch(sets, model, attention):
    config = replace(TINY, model=model, attention=attention)
    model, inputs, networks = build_model(config, (2, 8, 8, 1), 10), InrInputs(sets["train"], None), sets["test"]
    expected = model(*inputs(networks))
    weights, biases = [w.clone() for w in networks.weights], [b.clone() for b in networks.biases]
    weights[0], biases[0], weights[1] = -weights[0], -biases[0], -weights[1]
    orders = [torch.randperm(8).expand(len(networks), 8) for _ in range(2)]
    weights, biases = permute_hidden(weights, biases, orders)
    same = InrSet(tuple(weights), tuple(biases), networks.labels, networks.images, networks.psnr)
    torch.testing.assert_close(model(*inputs(same)), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(predict(model, inputs, networks, batch=5), expected.argmax(1))


def test_augmentation_changes_training_input_only(sets):
    inputs, networks = InrInputs(sets["train"], PictureMotion()), sets["train"]
    plain, moved = inputs(networks), inputs(networks, torch.Generator().manual_seed(0))
    assert not torch.allclose(plain[0][0], moved[0][0]) and plain[0][0].shape == (len(networks), 2, 8, 1)
    assert InrInputs(replace(networks, weights=(networks.weights[1][:, :3], *networks.weights[1:])), PictureMotion()).motion is None


def test_model_parameters_depend_on_the_seed_alone():
    first = build_model(TINY, (2, 8, 8, 1), 10).state_dict()
    torch.rand(3)
    state = torch.get_rng_state()
    again = build_model(TINY, (2, 8, 8, 1), 10).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = build_model(replace(TINY, train=replace(TINY.train, seed=1)), (2, 8, 8, 1), 10).state_dict()
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_batches_cover_every_network_once_per_epoch():
    batches = ShuffledBatches(20, 5, seed=3)
    epochs = [torch.cat([batches(4 * epoch + k) for k in range(4)]) for epoch in range(3)]
    assert all(torch.equal(epoch.sort().values, torch.arange(20)) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])
    assert torch.equal(ShuffledBatches(20, 5, seed=3)(6), batches(6))
    assert len(ShuffledBatches(3, 5, seed=0)(9)) == 3


def test_score_counts_pictures_as_independent():
    labels, images = torch.zeros(8, dtype=torch.int64), torch.arange(4).repeat_interleave(2)
    networks = InrSet((), (), labels, images, labels.float())
    found = score(torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), networks)  # two pictures right, two wrong
    assert found["accuracy"] == 50 and found["standard_error"] == pytest.approx(25)
    found = score(torch.tensor([0, 1, 0, 1, 0, 1, 0, 1]), networks)  # every picture half right
    assert found["accuracy"] == 50 and found["standard_error"] == pytest.approx(0)


def test_baselines_run_and_pixels_beat_chance(sets):
    config = MlpConfig(steps=60, batch=32, width=32)
    pictures, _ = load_digit_pictures()
    todo = weight_baselines(PictureMotion()) + bounds(pictures)
    results = [run_baseline(baseline, sets, config) for baseline in todo]
    assert [r["name"] for r in results] == ["mlp-plain", "mlp-signs", "mlp-permuted", "mlp-sorted", "pixels", "probes-64", "probes-4"]
    assert {r["reads"] for r in results} == {"weights", "picture"} and all(0 <= r["accuracy"] <= 100 for r in results)
    assert results[0] == run_baseline(todo[0], sets, config)
    assert run_baseline(todo[0], sets, config, stop=StopAfter(3)) is None
    assert len(bounds(None)) == 2


def test_sorted_baseline_is_invariant(sets):
    features = weight_baselines(None)[3].features
    networks = sets["test"]
    orders = [torch.randperm(8).expand(len(networks), 8) for _ in range(2)]
    weights, biases = permute_hidden(networks.weights, networks.biases, orders)
    shuffled = InrSet(tuple(weights), tuple(biases), networks.labels, networks.images, networks.psnr)
    torch.testing.assert_close(features(networks, None), features(shuffled, None))


def test_unknown_model():
    with pytest.raises(ValueError, match="expected model to be one of ng-gnn, ng-t, got 'ng-x'"):
        ClassifierConfig(model="ng-x")

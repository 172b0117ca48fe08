"""The public file layouts of INR collections, on files fabricated exactly as those collections have them."""

import json

import pytest
import torch

from neural_graphs.data import (
    DataError,
    InrSet,
    export_mnist_layout,
    read_collection,
    read_network,
    read_networks,
    read_nfn,
    read_splits,
)
from neural_graphs.data.formats import label_and_image

LAYOUT = (2, 5, 4, 1)


def state(seed=0, layout=LAYOUT):
    torch.manual_seed(seed)
    tensors = {}
    for layer, (fan_in, fan_out) in enumerate(zip(layout[:-1], layout[1:])):
        tensors[f"seq.{layer}.weight"] = torch.randn(fan_out, fan_in)
        tensors[f"seq.{layer}.bias"] = torch.randn(fan_out)
    return tensors


def some_networks(count=6):
    weights = tuple(torch.randn(count, a, b) for a, b in zip(LAYOUT[:-1], LAYOUT[1:]))
    biases = tuple(torch.randn(count, b) for b in LAYOUT[1:])
    return InrSet(weights, biases, torch.arange(count) % 10, torch.arange(count) // 2 + 100, torch.full((count,), float("nan")))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_mnist_inr_round_trip(tmp_path, suffix):
    sets = {name: some_networks() for name in ("train", "val", "test")}
    splits = export_mnist_layout(sets, tmp_path, suffix)
    content = json.loads(splits.read_text())
    assert set(content) == {"train", "val", "test"} and set(content["train"]) == {"path", "label"}
    assert content["train"]["path"][1] == f"mnist-inrs/mnist_png_training_1_100/run_0/model_final{suffix}"
    assert content["test"]["path"][5].startswith("mnist-inrs/mnist_png_testing_5_102/run_")
    for read in (read_splits(splits), read_collection(tmp_path)):
        for name in sets:
            assert all(torch.equal(a, b) for a, b in zip(sets[name].weights + sets[name].biases, read[name].weights + read[name].biases))
            assert torch.equal(sets[name].labels, read[name].labels)
        assert torch.equal(read["train"].images, sets["train"].images)
        assert not set(read["train"].images.tolist()) & set(read["test"].images.tolist())
    first = read_network(tmp_path / content["train"]["path"][0])
    assert first[0][0].shape == (2, 5) and first[2] is None


def test_stored_names_and_shapes_are_the_public_ones(tmp_path):
    splits = export_mnist_layout({name: some_networks(2) for name in ("train", "val", "test")}, tmp_path)
    stored = torch.load(splits.parent / json.loads(splits.read_text())["train"]["path"][0], weights_only=True)
    assert list(stored) == [f"seq.{k}.{part}" for k in range(3) for part in ("weight", "bias")]
    assert stored["seq.0.weight"].shape == (5, 2) and stored["seq.2.bias"].shape == (1,)


def test_fmnist_inr(tmp_path):
    for part, numbers in (("train", (0, 1, 2)), ("test", (0, 1))):
        (tmp_path / "fmnist_inrs" / part).mkdir(parents=True)
        for number in numbers:
            torch.save({**state(number), "label": number + 3}, tmp_path / f"fmnist_inrs/{part}/model_{number}.pth")
    paths = {"train": ["fmnist_inrs/train/model_0.pth", "fmnist_inrs/train/model_2.pth"], "val": ["fmnist_inrs/train/model_1.pth"],
             "test": ["fmnist_inrs/test/model_0.pth", "fmnist_inrs/test/model_1.pth"]}  # fmt: skip
    labels = {"train": [3, 5], "val": [4], "test": [3, 4]}
    (tmp_path / "fmnist_splits.json").write_text(json.dumps({name: {"path": paths[name], "label": labels[name]} for name in paths}))
    sets = read_collection(tmp_path)
    assert {name: part.labels.tolist() for name, part in sets.items()} == labels
    assert read_networks([tmp_path / path for path in paths["train"]]).labels.tolist() == [3, 5]
    assert read_network(tmp_path / paths["train"][1])[2] == 5
    torch.testing.assert_close(sets["train"].weights[0][1], state(2)["seq.0.weight"].t())
    assert not set(sets["train"].images.tolist()) & set(sets["test"].images.tolist())


def test_nfn(tmp_path):
    for index in range(60):
        folder = tmp_path / f"randinit_smaller_{index % 10}s"
        folder.mkdir(exist_ok=True)
        tensors = {}
        for layer, (fan_in, fan_out) in enumerate(zip(LAYOUT[:-1], LAYOUT[1:])):
            name = f"net.{layer}.linear" if layer < 2 else f"net.{layer}"
            tensors[f"{name}.weight"], tensors[f"{name}.bias"] = torch.full((fan_out, fan_in), float(index)), torch.zeros(fan_out)
        torch.save(tensors, folder / f"net{index}.pth")
    sets = read_collection(tmp_path)
    assert [len(sets[name]) for name in ("train", "val", "test")] == [45, 5, 10]
    assert sets["val"].labels.tolist() == [5, 6, 7, 8, 9]
    assert sets["test"].weights[1][0, 0, 0] == 50
    (tmp_path / "randinit_smaller_3s" / "net13.pth").unlink()
    with pytest.raises(DataError, match="without gaps, got 59 files"):
        read_nfn(tmp_path)


def test_labels_in_paths():
    assert label_and_image("mnist-inrs/mnist_png_training_7_4321/run/checkpoints.pth") == (7, 4321)
    assert label_and_image("x/mnist_png_testing_7_4321/run/a.pth") == (7, 1_004_321)
    assert label_and_image("root/randinit_smaller_3s/net12.pth") == (3, 12)
    assert label_and_image("fmnist_inrs/train/model_99.pth") == (None, 99)
    assert label_and_image("a/b.pth") == (None, None)


def test_safetensors_are_ordered_by_layer_number(tmp_path):
    from safetensors.torch import save_file

    layout = (2, *[3] * 11, 1)
    save_file(state(0, layout), str(tmp_path / "x.safetensors"))
    weights, biases, _ = read_network(tmp_path / "x.safetensors")
    assert [w.shape[0] for w in weights] == list(layout[:-1]) and len(biases) == 12
    torch.testing.assert_close(weights[10], state(0, layout)["seq.10.weight"].t())


def test_errors_name_the_file(tmp_path):
    torch.save(state(), tmp_path / "a_1s_0.pth")
    with pytest.raises(DataError, match="no label for .*a_1s_0.pth"):
        read_networks([tmp_path / "a_1s_0.pth"])
    torch.save(state(0, (2, 3, 1)), tmp_path / "b.pth")
    with pytest.raises(DataError, match="expected all networks to have the layout of .*a_1s_0.pth, .*b.pth has weights"):
        read_networks([tmp_path / "a_1s_0.pth", tmp_path / "b.pth"], [0, 1])
    torch.save({"seq.0.weight": torch.zeros(3, 2)}, tmp_path / "c.pth")
    with pytest.raises(DataError, match=r"expected .*c.pth to be a stack of linear layers with biases, got seq.0.weight \[3, 2\]"):
        read_network(tmp_path / "c.pth")
    torch.save(torch.zeros(3), tmp_path / "d.pth")
    with pytest.raises(DataError, match="expected .*d.pth to hold a state_dict, got Tensor"):
        read_network(tmp_path / "d.pth")
    with pytest.raises(DataError, match="expected at least one network file"):
        read_networks([])
    with pytest.raises(DataError, match="is not a folder"):
        read_collection(tmp_path / "none")
    with pytest.raises(ValueError, match='expected suffix ".pth" or ".safetensors", got ".npz"'):
        export_mnist_layout({}, tmp_path, ".npz")
    (tmp_path / "x_splits.json").write_text('{"train": {"path": ["a"], "label": []}}')
    with pytest.raises(DataError, match='x_splits.json to have "train"'):
        read_collection(tmp_path)
    (tmp_path / "y_splits.json").write_text("{}")
    with pytest.raises(DataError, match="has several splits files"):
        read_collection(tmp_path)

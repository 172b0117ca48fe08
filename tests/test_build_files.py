"""Safetensors files: weights that stay in them, files larger than memory, shards."""

from __future__ import annotations

import json
import math
import struct

import pytest
import torch
from safetensors.torch import save_file
from test_build_llama import block, llama

from neural_graphs import build


def mapped_files() -> str:
    with open("/proc/self/maps") as file:
        return file.read()


def test_weights_stay_in_the_file(tmp_path):
    state = llama(1, 64, 96, make=lambda *shape: torch.randn(*shape).bfloat16())
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    network = build.from_safetensors(path)
    places = [line.split() for line in mapped_files().splitlines() if line.endswith(str(path))]
    spans = [tuple(int(n, 16) for n in place[0].split("-")) for place in places]
    for name, w in zip(network.origin.tensors, network.weights, strict=True):
        for n, t in zip(name, w.planes if isinstance(w, build.Channels) else [w] * len(name), strict=True):
            assert any(a <= t.data_ptr() < b for a, b in spans), n
            assert t.dtype is torch.bfloat16
    _, up = block(network, "model.layers.0.mlp.up_proj.weight")
    assert torch.equal(up[0, :, :, 0], state["model.layers.0.mlp.up_proj.weight"].T)
    before = path.read_bytes()
    up.zero_()  # stays in memory
    assert path.read_bytes() == before


def sparse_file(path, layers: int) -> int:
    """A file of a decoder of 7B width that has a header and, on disk, nothing else; returns its size."""
    header, at = {}, 0
    for name, t in llama(
        layers, 4096, 11008, vocab=32000, make=lambda *shape: torch.empty(*shape, dtype=torch.bfloat16, device="meta")
    ).items():
        size = 2 * math.prod(t.shape)
        header[name] = {"dtype": "BF16", "shape": list(t.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    return 8 + len(text) + at


def test_a_file_larger_than_memory(tmp_path):
    """Two hundred blocks of 7B width, 81 GB of zeros that are nowhere: mapped, and one row of the last block read."""
    size = sparse_file(tmp_path / "model.safetensors", 200)
    assert size > 80e9
    network = build.from_safetensors(tmp_path / "model.safetensors")
    _, down = block(network, "model.layers.199.mlp.down_proj.weight")
    assert tuple(down.shape) == (1, 11008, 4096, 1) and not down[0, 7].any()


def test_shards(tmp_path):
    state = llama()
    whole = build.from_state_dict(state)
    places = {name: f"model-{k % 3}.safetensors" for k, name in enumerate(state)}
    for shard in set(places.values()):
        save_file({n: t for n, t in state.items() if places[n] == shard}, tmp_path / shard)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    for path in (index, tmp_path):
        network = build.from_safetensors(path)
        assert all(torch.equal(a, b) for a, b in zip(network.tensors(), whole.tensors(), strict=True))
    with pytest.raises(
        build.CheckpointError, match=r"from_safetensors: '.*model-0.safetensors': expected .*; a shard alone\? pass its index"
    ):
        build.from_safetensors(tmp_path / "model-0.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "model-1.safetensors")
    with pytest.raises(build.CheckpointError, match=r"expected '.*' in the shard '.*model-1.safetensors', as the index says, got none"):
        build.from_safetensors(index)
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(build.CheckpointError, match=r"expected the shard 'model-1.safetensors' beside '.*', got no such file; download it"):
        build.from_safetensors(index)
    for text, message in (("{}", "expected an index with a weight_map"), ("[", "expected a JSON file, got")):
        index.write_text(text)
        with pytest.raises(build.CheckpointError, match=message):
            build.from_safetensors(index)
    with pytest.raises(build.CheckpointError, match="expected a folder with one index or one safetensors file, got none"):
        (tmp_path / "empty").mkdir()
        build.from_safetensors(tmp_path / "empty")


def test_query_heads_of_the_config_beside_the_file(tmp_path):
    save_file(llama(1, keys=4), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 4}))
    assert build.from_safetensors(tmp_path / "model.safetensors").graph.num_edges > 0
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(build.CheckpointError, match=r"expected a JSON file, got '.*config.json'"):
        build.from_safetensors(tmp_path / "model.safetensors")


def test_tensors_off_their_alignment_are_copied(tmp_path):
    """An odd number of bfloat16 in front: what follows does not lie on a multiple of 4 bytes."""
    tensors = {"0.bias": torch.randn(3).bfloat16(), "0.weight": torch.randn(3, 2)}
    header = {
        "0.bias": {"dtype": "BF16", "shape": [3], "data_offsets": [0, 6]},
        "0.weight": {"dtype": "F32", "shape": [3, 2], "data_offsets": [6, 30]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = tensors["0.bias"].view(torch.uint8).numpy().tobytes() + tensors["0.weight"].numpy().tobytes()
    (tmp_path / "odd.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    network = build.from_safetensors(tmp_path / "odd.safetensors")
    assert torch.equal(network.weights[0][0, :, :, 0], tensors["0.weight"].T) and torch.equal(network.biases[0][0, :, 0], tensors["0.bias"])

"""`ngk inspect`: what is in a checkpoint, from its header alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_build_files import sparse_file
from test_build_llama import llama

from neural_graphs import build, cli
from neural_graphs.report.inspect import inspect
from ngkernels.planner import size_text


def ngk(capsys, *arguments) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    shown = capsys.readouterr()
    return ended.value.code or 0, shown.out, shown.err


@pytest.fixture
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "180")


def resident_peak() -> int:
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))


def test_facts_of_an_mlp(tmp_path):
    state = {f"seq.{2 * k}.weight": torch.randn(o, i) for k, (i, o) in enumerate([(2, 4), (4, 3)])} | {"seq.0.bias": torch.randn(4)}
    save_file(state, tmp_path / "net.safetensors")
    facts = inspect(tmp_path / "net.safetensors")
    assert (facts["architecture"], facts["nodes"], facts["edges"], facts["bytes"]) == ("mlp", 9, 20, 4 * 24)
    assert [layer["name"] for layer in facts["layers"]] == ["input", "seq.0", "seq.2"]
    assert [layer["bias"] for layer in facts["layers"]] == ["", "seq.0.bias", ""]
    assert [(b["edges"], b["bytes"], b["dtype"], b["sizes"]) for b in facts["blocks"]] == [
        (8, 32, "float32", [2, 4]),
        (12, 48, "float32", [4, 3]),
    ]


@pytest.mark.parametrize("head", [True, False], ids=["head", "tied"])
@pytest.mark.parametrize("keys", [8, 4], ids=["all keys", "grouped"])
def test_every_byte_is_counted_once(tmp_path, head: bool, keys: int):
    state = {name: t.bfloat16() for name, t in llama(3, keys=keys, head=head).items()}
    save_file(state, tmp_path / "model.safetensors")
    facts = inspect(tmp_path / "model.safetensors", 4)
    assert facts["bytes"] == sum(t.numel() * 2 for t in state.values())
    assert facts["edges"] == sum(b["edges"] for b in facts["blocks"]) == build.from_state_dict(state, num_heads=4).graph.num_edges
    assert sorted({t for b in facts["blocks"] for t in b["tensors"]}) == sorted(state)


def test_values_are_not_read(tmp_path):
    """A file of 81 GB that is nowhere: its header is enough."""
    sparse_file(tmp_path / "model.safetensors", 200)
    described = build.describe_safetensors(tmp_path / "model.safetensors")
    assert all(b.is_meta for b in described.biases)
    before = resident_peak()
    assert inspect(tmp_path / "model.safetensors")["bytes"] > 80e9
    assert resident_peak() - before < 64 * 2**20


def test_tables(tmp_path, capsys, wide):
    save_file(llama(12), tmp_path / "model.safetensors")
    status, out, _ = ngk(capsys, "inspect", tmp_path)
    assert status == 0
    assert "model.layers.*.self_attn.qkv" in out and "8 x 12 (12 times)" in out and "silu" in out
    assert "not modelled: the softmax" in out and "float32" in out
    save_file(llama(1), tmp_path / "model.safetensors")
    _, out, _ = ngk(capsys, "inspect", tmp_path / "model.safetensors")
    assert "model.layers.0.self_attn.qkv" in out and "times)" not in out


def test_json_names_every_block(tmp_path, capsys):
    save_file(llama(12), tmp_path / "model.safetensors")
    status, out, _ = ngk(capsys, "inspect", tmp_path / "model.safetensors", "--json")
    facts = json.loads(out)
    assert status == 0 and facts == json.loads(json.dumps(inspect(tmp_path / "model.safetensors")))
    assert len(facts["blocks"]) == 12 * 10 + 3


def test_errors_are_one_sentence(tmp_path, capsys):
    (tmp_path / "net.safetensors").write_bytes(b"\xff" * 100)
    save_file({"h.0.attn.c_attn.weight": torch.zeros(2, 2), "wte.weight": torch.zeros(2, 2)}, tmp_path / "gpt2.safetensors")
    save_file(llama(1, keys=4), tmp_path / "grouped.safetensors")
    for name, message in [
        ("none.safetensors", "expected a file, got"),
        ("net.safetensors", "expected a complete safetensors file, got"),
        ("gpt2.safetensors", "expected numbered linear layers"),
        ("grouped.safetensors", "pass num_heads, or keep config.json beside the file"),
    ]:
        status, _, err = ngk(capsys, "inspect", tmp_path / name)
        assert status == 1 and err.startswith("error: describe_safetensors: ") and message in err and len(err.strip().splitlines()) == 1


def test_sizes_as_text():
    assert [size_text(n) for n in (0, 1023, 1536, 13476831232)] == ["0 bytes", "1,023 bytes", "1.5 KiB", "12.6 GiB"]

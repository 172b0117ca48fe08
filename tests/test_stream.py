"""Weights that stay in their files: the same bits as in memory, little memory, interruptions, named errors."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import DECLARED
from safetensors.torch import load_file, save_file

from neural_graphs import cli
from neural_graphs.build import CheckpointError, from_safetensors, stream_safetensors
from neural_graphs.models import NGGNN, NGT
from neural_graphs.tasks import embedding
from ngkernels import mapped
from ngkernels.journal import Journal

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif("cpp" not in DECLARED or not sys.platform.startswith("linux"), reason="needs the cpp backend on Linux")
LAYOUT = (40, 300, 500, 7)


def checkpoint(folder: Path, layout=LAYOUT, dtype=torch.float32, seed: int = 0) -> Path:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for k, (i, o) in enumerate(zip(layout, layout[1:])):
        state[f"{2 * k}.weight"] = (torch.randn(o, i, generator=generator) / i**0.5).to(dtype)
        state[f"{2 * k}.bias"] = (torch.randn(o, generator=generator) / 10).to(dtype)
    path = folder / "model.safetensors"
    save_file(state, path)
    return path


def reader(layout=LAYOUT, cls=NGGNN, **options):
    torch.manual_seed(1)
    sizes = (
        {"d_hid": 16}
        if cls is NGGNN
        else {"d_node": 16, "d_edge": 16, "d_attn_hid": 32, "d_node_hid": 16, "d_edge_hid": 16, "num_heads": 4}
    )
    return cls(
        list(layout), num_layers=3, fourier_features=16, positional=False, pooling=("mean", "all"), out_features=5, **sizes, **options
    )


def step(model, network, backward: bool = True):
    """(result, gradients of parameters, of weights) in memory."""
    model.zero_grad(set_to_none=True)
    weights = [w.detach().requires_grad_(backward) for w in network.weights]
    found = model.forward_graph(network.graph, weights, [b.float() for b in network.biases])
    if backward:
        found.sum().backward()
    return found.detach(), [p.grad for p in model.parameters()], [w.grad for w in weights]


def same(a, b) -> bool:
    return all((x is None) == (y is None) and (x is None or torch.equal(x, y)) for x, y in zip(a, b, strict=True))


# ---- the same bits ----
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"reverse_edges": True}], ids=["", "reverse"])
def test_a_step_of_ng_gnn(tmp_path, dtype, options):
    path, model = checkpoint(tmp_path, dtype=dtype), reader(**options)
    value, parameters, weights = step(model, from_safetensors(path, reverse=model.reverse_blocks))
    model.zero_grad(set_to_none=True)
    found = embedding.embed(path, model, gradients=tmp_path / "grads.safetensors")
    assert torch.equal(found.values, value[0]) and same(parameters, [p.grad for p in model.parameters()])
    written = load_file(tmp_path / "grads.safetensors")
    assert written.keys() == load_file(path).keys() and not (tmp_path / "grads.safetensors.next").exists()
    for k, grad in enumerate(weights):
        assert torch.equal(written[f"{2 * k}.weight"], grad[0, :, :, 0].T) and grad.abs().max() > 0
        assert not written[f"{2 * k}.bias"].any()


def test_a_step_of_ng_t_along_edges(tmp_path):
    layout = (8, 90, 70, 5)
    path, model = checkpoint(tmp_path, layout), reader(layout, NGT, attention="edges")
    value, parameters, weights = step(model, from_safetensors(path))
    model.zero_grad(set_to_none=True)
    found = embedding.embed(path, model, gradients=tmp_path / "g.safetensors")
    assert torch.equal(found.values, value[0]) and same(parameters, [p.grad for p in model.parameters()])
    written = load_file(tmp_path / "g.safetensors")
    assert all(torch.equal(written[f"{2 * k}.weight"], g[0, :, :, 0].T) for k, g in enumerate(weights))


def test_forward_alone_and_any_number_of_threads(tmp_path):
    path, model = checkpoint(tmp_path), reader()
    value, _, _ = step(model, from_safetensors(path), backward=False)
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            assert torch.equal(embedding.embed(path, model).values, value[0])
    finally:
        torch.set_num_threads(threads)


def test_a_sharded_decoder(tmp_path):
    """LLaMA-shaped, two shards, one of them the embedding alone (rows by source instead of by destination)."""
    sizes = {"q": (32, 32), "k": (32, 32), "v": (32, 32), "o": (32, 32)}
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: (torch.randn(shape, generator=generator) / 6).bfloat16()  # noqa: E731
    block = {f"model.layers.0.self_attn.{n}_proj.weight": draw(*s) for n, s in sizes.items()}
    block |= {f"model.layers.0.mlp.{n}_proj.weight": draw(96, 32) for n in ("gate", "up")} | {
        "model.layers.0.mlp.down_proj.weight": draw(32, 96)
    }
    block |= {f"model.layers.0.{n}_layernorm.weight": 1 + draw(32) for n in ("input", "post_attention")}
    shards = {
        "a.safetensors": {"model.embed_tokens.weight": draw(500, 32)},
        "b.safetensors": {**block, "model.norm.weight": 1 + draw(32), "lm_head.weight": draw(500, 32)},
    }
    for name, state in shards.items():
        save_file(state, tmp_path / name)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {k: name for name, s in shards.items() for k in s}}))
    network = from_safetensors(tmp_path, attention="parallel")
    model = reader(network.layout)
    value, _, weights = step(model, network)
    found = embedding.embed(tmp_path, model, gradients=tmp_path / "grads")
    assert torch.equal(found.values, value[0])
    written = {name: t for shard in shards for name, t in load_file(tmp_path / "grads" / shard).items()}
    for (name,), g in ((n, g) for n, g in zip(network.origin.tensors, weights) if n):
        assert torch.equal(written[name].flatten().sort().values, g.flatten().sort().values) and written[name].any(), name
    assert (tmp_path / "grads" / "model.safetensors.index.json").exists()


# ---- memory ----
PEAK = """
import sys, torch
from neural_graphs.models import NGGNN
from neural_graphs.report.process import held_bytes, reset_peak
from neural_graphs.tasks.embedding import embed
path, gradients, layout = sys.argv[1], sys.argv[2] or None, eval(sys.argv[3])
torch.set_num_threads(2)
def model(layout): return NGGNN(list(layout), d_hid=8, num_layers=2, fourier_features=8, positional=False, pooling=("mean", "all"), out_features=3)
small = sys.argv[4]
embed(small, model((4, 4, 4, 4)), gradients and gradients + ".warm")
reset_peak(); before = held_bytes("VmRSS")
embed(path, model(layout), gradients)
print(held_bytes("VmHWM") - before)
"""


@pytest.mark.parametrize("backward", [False, True])
def test_memory_is_that_of_a_few_panels(tmp_path, backward):
    """48 MiB of weights in two blocks, a quarter of that at most; file pages count."""
    layout = (4, 2048, 4096, 4)
    (tmp_path / "small").mkdir()
    path, small = checkpoint(tmp_path, layout), checkpoint(tmp_path / "small", (4, 4, 4, 4))
    size = path.stat().st_size
    gradients = str(tmp_path / "g.safetensors") if backward else ""
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'python'}", "MALLOC_MMAP_THRESHOLD_": str(1 << 17)}
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(path), gradients, repr(layout), str(small)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-1500:]
    assert size > 32 << 20 and int(done.stdout) < size * (0.5 if backward else 0.3), f"{int(done.stdout) >> 20} MiB"


# ---- interruptions ----
def test_every_place_of_interruption(tmp_path, monkeypatch):
    """The run is stopped after each write of the journal in turn, and started again: nothing lost, nothing counted twice."""
    layout = (8, 40, 30, 5)
    path, model = checkpoint(tmp_path, layout), reader(layout)
    monkeypatch.setattr(mapped, "CHUNK", 1 << 10)
    value, parameters, _ = step(model, from_safetensors(path))
    model.zero_grad(set_to_none=True)
    embedding.embed(path, model, gradients=tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()

    class Killed(BaseException):
        pass

    write, real = Journal._write, os.replace
    for half in (False, True):  # before the record is in place, after it
        left, runs = [0], 0

        def counted(p, w, half=half, left=left):
            left[0] -= 1
            if left[0] < 0 and not half:
                raise Killed
            write(p, w)
            if left[0] < 0:
                raise Killed

        monkeypatch.setattr(Journal, "_write", staticmethod(counted))
        while True:
            model.zero_grad(set_to_none=True)
            left[0] = 1
            runs += 1
            try:
                found = embedding.embed(path, model, tmp_path / "g.safetensors", tmp_path / "state")
                break
            except Killed:
                assert runs < 200
        assert runs > 10 and found.replayed > 5
        assert torch.equal(found.values, value[0]) and same(parameters, [p.grad for p in model.parameters()])
        assert (tmp_path / "g.safetensors").read_bytes() == whole and not (tmp_path / "state").exists()
        monkeypatch.setattr(Journal, "_write", staticmethod(write))
    assert real is os.replace


def test_kill_9(tmp_path):
    layout = (16, 1500, 1500, 16)
    path, command = checkpoint(tmp_path, layout), [sys.executable, "-m", "neural_graphs.cli", "embed"]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'python'}", "COLUMNS": "200"}
    whole = [*command, str(path), "--gradients", str(tmp_path / "a.safetensors"), "--out", str(tmp_path / "a.json")]
    assert subprocess.run(whole, env=env, capture_output=True).returncode == 0
    options = ["--gradients", str(tmp_path / "b.safetensors"), "--out", str(tmp_path / "b.json"), "--state", str(tmp_path / "state")]
    run = subprocess.Popen([*command, str(path), *options], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while not list((tmp_path / "state").glob("*.aggregate_backward.pt")) and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    done = subprocess.run([*command, str(path), *options], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "parts were finished already" in done.stdout, done.stdout + done.stderr
    for name in ("safetensors", "json"):
        assert (tmp_path / f"a.{name}").read_bytes() == (tmp_path / f"b.{name}").read_bytes()


def test_a_journal_of_another_computation_is_refused(tmp_path):
    Journal(tmp_path / "state", {"a": 1})
    with pytest.raises(ValueError, match="journal: expected one of this computation in .*, got that of another"):
        embedding.embed(checkpoint(tmp_path), reader(), state=tmp_path / "state")


# ---- errors ----
def test_broken_files_are_named_before_anything_is_computed(tmp_path, monkeypatch):
    monkeypatch.setattr(NGGNN, "forward_graph", lambda *_: pytest.fail("computed"))
    path = checkpoint(tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[:-5])
    with pytest.raises(CheckpointError, match="expected a complete safetensors file"):
        embedding.embed(path, reader())
    path.write_bytes(data[:20] + bytes([data[20] ^ 0x40]) + data[21:])
    with pytest.raises(CheckpointError):
        embedding.embed(path, reader())
    state = load_file(checkpoint(tmp_path))
    state["2.weight"][3, 4] = float("inf")
    save_file(state, path)
    with pytest.raises(CheckpointError, match="expected finite values of '2.weight' in .*, got NaN or infinity"):
        embedding.embed(path, reader())


def test_no_room_on_the_disk(tmp_path, monkeypatch):
    path = checkpoint(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 0, 10))
    with pytest.raises(OSError, match=r"stream: expected \d+ bytes free in .*, got 10; make room"):
        embedding.embed(path, reader(), gradients=tmp_path / "g.safetensors")
    monkeypatch.undo()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"stream: expected room for \d+ bytes"):
        embedding.embed(path, reader(), gradients=tmp_path / "g.safetensors")
    assert not (tmp_path / "g.safetensors").exists() and not mapped._files


def test_refused(tmp_path):
    path = checkpoint(tmp_path)
    with pytest.raises(ValueError, match="expected gradients in another file than the weights"):
        embedding.embed(path, reader(), gradients=path)
    with pytest.raises(FileNotFoundError):
        embedding.embed(tmp_path / "none.safetensors", reader())
    assert not mapped._files


def test_tensors_outlive_the_context(tmp_path):
    with stream_safetensors(checkpoint(tmp_path)) as network:
        inside = network.weights[1].sum()
    assert torch.equal(network.weights[1].sum(), inside) and mapped.find(network.weights[1]) is None


# ---- the command ----
def test_command(tmp_path, capsys):
    def ngk(*arguments) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(["embed", *map(str, arguments)])
        shown = capsys.readouterr()
        return ended.value.code or 0, shown.out, shown.err

    path = checkpoint(tmp_path)
    status, out, _ = ngk(path, "--out", tmp_path / "e.json", "--budget", "1GiB")
    assert (
        status == 0
        and "result: " in out
        and "peak of the process" in out
        and len(json.loads((tmp_path / "e.json").read_text())["values"]) == 10
    )
    status, _, err = ngk(path, "--budget", "1KiB")
    assert status == 1 and "expected a budget of at least" in err
    status, _, err = ngk(path, "--model", "ng-t")
    assert status == 1 and "--model: expected ng-gnn or ng-t-edges" in err

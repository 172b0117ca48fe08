"""Files are whole or absent; what cannot be read or written is named, with a remedy."""

import errno
import json
import os

import pytest
import torch

from neural_graphs.data import storage
from neural_graphs.data.storage import DataError, config_hash, read_json, read_tensors, read_torch, write_bytes, write_json, write_tensors


def leftovers(folder):
    return [path.name for path in folder.rglob("*.tmp")]


def test_round_trip(tmp_path):
    tensors = {"a": torch.arange(6.0).reshape(2, 3).t(), "b": torch.tensor([1, 2])}
    write_tensors(tmp_path / "deep" / "x.safetensors", tensors, {"config": "1"})
    read, metadata = read_tensors(tmp_path / "deep" / "x.safetensors")
    assert metadata == {"config": "1"} and all(torch.equal(read[k], tensors[k]) for k in tensors)
    write_json(tmp_path / "x.json", {"a": [1, 2]})
    assert read_json(tmp_path / "x.json") == {"a": [1, 2]}
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("stage", ["fsync", "replace"])
@pytest.mark.parametrize("code, words", [(errno.ENOSPC, "the disk is full"), (errno.EACCES, "cannot write")])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, stage, code, words):
    path = tmp_path / "x.json"
    write_json(path, "old")

    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(storage.os, stage, fail)
    with pytest.raises(DataError, match=f"{words}.*x.json"):
        write_json(path, "new" * 1000)
    monkeypatch.undo()
    assert read_json(path) == "old" and os.listdir(tmp_path) == ["x.json"]


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(storage.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_bytes(tmp_path / "x", b"123")
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_really_full_device(tmp_path, monkeypatch):
    monkeypatch.setattr(storage.tempfile, "mkstemp", lambda **_: (os.open("/dev/full", os.O_WRONLY), str(tmp_path / "gone")))
    with pytest.raises(DataError, match="the disk is full, .* was not written; free some space"):
        write_bytes(tmp_path / "x", b"1" * 100_000)


@pytest.mark.parametrize("damage", ["truncate", "header", "empty", "noise"])
def test_damaged_safetensors_are_named(tmp_path, damage):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.rand(100, 100)})
    content = path.read_bytes()
    path.write_bytes({"truncate": content[:-7], "header": content[:5], "empty": b"", "noise": b"\xff" * 500}[damage])
    with pytest.raises(DataError, match="x.safetensors is corrupt or truncated .*; delete it"):
        read_tensors(path, "delete it")


def test_damaged_torch_files_are_named(tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"a": torch.rand(100, 100)}, path)
    content = path.read_bytes()
    for broken in (content[: len(content) // 2], b"", b"hello world"):
        path.write_bytes(broken)
        with pytest.raises(DataError, match="x.pth is corrupt.*; fetch it again"):
            read_torch(path, "fetch it again")


def test_pickles_with_code_are_refused(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    torch.save({"a": Payload()}, tmp_path / "x.pth")
    with pytest.raises(DataError, match="x.pth is corrupt, or holds objects other than tensors"):
        read_torch(tmp_path / "x.pth")
    assert not (tmp_path / "made").exists()


def test_damaged_json_and_missing_files_are_named(tmp_path):
    (tmp_path / "x.json").write_text('{"a": ')
    with pytest.raises(DataError, match="x.json is not valid JSON"):
        read_json(tmp_path / "x.json")
    for read in (read_json, read_tensors, read_torch):
        with pytest.raises(DataError, match="none does not exist"):
            read(tmp_path / "none")


def test_hash_depends_on_content_only():
    assert config_hash({"a": 1, "b": [1, 2]}) == config_hash(json.loads('{"b": [1, 2], "a": 1}'))
    assert config_hash({"a": 1}) != config_hash({"a": 2})


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("NGK_CACHE", str(tmp_path / "own"))
    assert storage.default_cache() == tmp_path / "own"
    monkeypatch.delenv("NGK_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert storage.default_cache() == tmp_path / "ngkernels"

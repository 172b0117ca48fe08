"""csrc/cuda compiles for every GPU it is meant for, and no kernel takes more registers, stack or spills than is written down.

`python tests/test_cuda_build.py` records them, in some minutes.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RECORD = Path(__file__).with_name("cuda_resources.json")
spec = importlib.util.spec_from_file_location("cuda_build", ROOT / "csrc" / "cuda" / "build.py")
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)
needs_nvcc = pytest.mark.skipif(build.find_nvcc() is None, reason="no nvcc")
INSTANCES = {f"{way} {rounding}" for way in ("forward", "backward") for rounding in ("bf16", "tf32", "exact")}
SIMPLE = {"Gather", "Project", "NodeGradient", "Fold", "SumBlocks", "Merge", "Coefficients", "SumCells", "MergeCells", "Softmax", "Delta", "Store", "Arrange"}
PURPOSES = {"width": "", "options": "options ", "attend": "attend "}


def of(objects: list[Path]) -> dict[str, dict[str, dict[str, int]]]:
    """By capability, resources of the kernels of these object files."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for o in objects:
        for capability, kernels in build.resources(o.with_suffix(".log").read_text()).items():
            found.setdefault(capability, {}).update(kernels)
    return found


def expected() -> set[str]:
    """The kernels of all sources."""
    wide = [p.stem.rpartition("_") for p in build.sources() if p.stem != "second_stage"]
    return SIMPLE | {f"{PURPOSES[purpose]}{name} {width}" for purpose, _, width in wide for name in INSTANCES}


def check(found: dict[str, dict[str, dict[str, int]]]) -> None:
    """Every kernel is there, none spills, none takes more than is written down."""
    known = json.loads(RECORD.read_text())["kernels"]
    for capability, kernels in found.items():
        assert set(kernels) == expected()
        assert not {name: now for name, now in kernels.items() if now["spills"]}
        grown = {name: (known[capability][name], now) for name, now in kernels.items() if any(now[k] > known[capability][name][k] for k in now)}
        assert not grown, grown


@needs_nvcc
def test_a_library_with_cuda_kernels(tmp_path: Path):
    """Built beside the one that is there, for one architecture, it loads under any torch, and says what is missing under one without CUDA."""
    environment = {**os.environ, "NGKERNELS_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0"}
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    check(of([ROOT / "build" / f"objects-{sys.implementation.cache_tag}" / "cuda" / f"{p.stem}.o" for p in build.sources()]))
    text = "import sys, torch; torch.ops.load_library(sys.argv[1]); print(torch.ops.ngkernels_C.cuda_built()); torch.ops.ngkernels_C."
    for call in ("cuda_launch(0, [], 1, 0, 0)", "cuda_runs(0)"):
        done = subprocess.run([sys.executable, "-c", text + call, str(tmp_path / "ngkernels" / "_C.abi3.so")], capture_output=True, text=True)
        assert done.stdout.strip() == "True" and "ngkernels: " in done.stderr


@needs_nvcc
@pytest.mark.slow
def test_all_architectures(tmp_path: Path):
    found = of(build.compile_all(build.find_nvcc(), tmp_path, build.architectures(";".join(build.ARCHITECTURES))))
    assert set(found) == set(build.ARCHITECTURES)
    check(found)


def test_the_record_is_whole():
    record = json.loads(RECORD.read_text())["kernels"]
    assert set(record) == set(build.ARCHITECTURES)
    for kernels in record.values():
        assert set(kernels) == expected()
        assert all(value["registers"] <= 255 and not value["spills"] for value in kernels.values())


@pytest.mark.parametrize(("text", "wanted"), [
    ("9.0", ["arch=compute_90,code=[sm_90]"]),
    ("9.0+PTX;8.0", ["arch=compute_80,code=[sm_80,sm_90]", "arch=compute_90,code=compute_90"]),
    ("7.5 8.6 9.0;", ["arch=compute_86,code=[sm_86,sm_90]"]),
    ("8.6 10.0a", ["arch=compute_86,code=[sm_86]", "arch=compute_100a,code=sm_100a"]),
])
def test_architectures(text: str, wanted: list[str], monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", text)
    assert [o for o in build.architectures() if o.startswith("arch")] == wanted


@pytest.mark.parametrize("text", ["7.5", "Hopper", "9"])
def test_architectures_that_are_none(text: str, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", text)
    with pytest.raises(SystemExit, match="expected TORCH_CUDA_ARCH_LIST to name capabilities of 8.0 or more such as 9.0, got"):
        build.architectures()


if __name__ == "__main__":
    begin = time.time()
    found = of(build.compile_all(build.find_nvcc(), ROOT / "build" / "cuda", build.architectures(";".join(build.ARCHITECTURES))))
    nvcc = subprocess.run([build.find_nvcc(), "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[-2]
    kernels = {capability: dict(sorted(found[capability].items())) for capability in build.ARCHITECTURES}
    RECORD.write_text(json.dumps({"nvcc": nvcc, "kernels": kernels}, indent=1) + "\n")
    print(f"{time.time() - begin:.0f} s")

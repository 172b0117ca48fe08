"""csrc/cuda compiles for every GPU it is meant for, and no kernel takes more registers, stack or spills than is written down.

`python tests/test_cuda_build.py` writes the record anew.
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
INSTANCES = {f"{way} {rounding} {width}" for way in ("forward", "backward") for rounding in ("bf16", "tf32", "exact") for width in (16, 32, 64, 128)}
SIMPLE = {"Gather", "Project", "NodeGradient", "Fold", "SumBlocks", "Merge", "Coefficients", "SumCells"}


def options(capability: str) -> list[str]:
    number = capability.replace(".", "")
    return ["-gencode", f"arch=compute_{number},code=sm_{number}"]


def compiled(capability: str, folder: Path, names: tuple[str, ...] = ()) -> dict[str, dict[str, int]]:
    """Resources of the kernels of the sources `names`, of all without."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for source in build.sources():
        if not names or source.stem in names:
            found |= build.resources(build.compile_one(build.find_nvcc(), source, folder / f"{source.stem}.o", options(capability)))
    return found


def check(found: dict[str, dict[str, int]], capability: str) -> None:
    known = json.loads(RECORD.read_text())["kernels"][capability]
    grown = {name: (known[name], now) for name, now in found.items() if any(now[k] > known[name][k] for k in now)}
    assert not grown, grown


@needs_nvcc
def test_narrow_registers_for_one_architecture(tmp_path: Path):
    found = compiled("9.0", tmp_path, ("width_16", "second_stage"))
    assert set(found) == SIMPLE | {name for name in INSTANCES if name.endswith(" 16")}
    check(found, "9.0")


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("capability", build.ARCHITECTURES)
def test_everything(capability: str, tmp_path: Path):
    found = compiled(capability, tmp_path)
    assert set(found) == SIMPLE | INSTANCES
    check(found, capability)


def test_the_record_names_every_kernel():
    record = json.loads(RECORD.read_text())
    assert set(record["kernels"]) == set(build.ARCHITECTURES)
    assert all(set(kernels) == SIMPLE | INSTANCES for kernels in record["kernels"].values())


@needs_nvcc
@pytest.mark.slow
def test_a_library_with_cuda_kernels_loads_under_any_torch(tmp_path: Path):
    """Built beside the one that is there, for one architecture; under a torch without CUDA it says what is missing."""
    environment = {**os.environ, "NGKERNELS_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0"}
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path / "objects")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    text = "import sys, torch; torch.ops.load_library(sys.argv[1]); print(torch.ops.ngkernels_C.cuda_built()); torch.ops.ngkernels_C.cuda_launch(0, [], 1, 0, 0)"
    done = subprocess.run([sys.executable, "-c", text, str(tmp_path / "ngkernels" / "_C.abi3.so")], capture_output=True, text=True)
    assert done.stdout.strip() == "True" and "ngkernels: " in done.stderr


@pytest.mark.parametrize(("text", "wanted"), [("9.0", ["sm_90"]), ("8.0;9.0+PTX", ["sm_80", "sm_90", "compute_90"]), ("8.6 10.0a", ["sm_86", "sm_100a"])])
def test_architectures(text: str, wanted: list[str], monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", text)
    assert [o.partition("code=")[2] for o in build.architectures() if o.startswith("arch")] == wanted


@pytest.mark.parametrize("text", ["7.5", "Hopper", "9"])
def test_architectures_that_are_none(text: str, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", text)
    with pytest.raises(SystemExit, match="expected TORCH_CUDA_ARCH_LIST to name capabilities of 8.0 or more such as 9.0, got"):
        build.architectures()


if __name__ == "__main__":
    begin, kernels = time.time(), {}
    for capability in build.ARCHITECTURES:
        kernels[capability] = compiled(capability, ROOT / "build" / f"cuda-{capability}")
    nvcc = subprocess.run([build.find_nvcc(), "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[-2]
    RECORD.write_text(json.dumps({"nvcc": nvcc, "seconds": round(time.time() - begin), "kernels": {c: dict(sorted(k.items())) for c, k in kernels.items()}}, indent=1) + "\n")

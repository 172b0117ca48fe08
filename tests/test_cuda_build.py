"""csrc/cuda compiles for every GPU it is meant for, and no kernel takes more registers, stack or spills than is written down.

`python tests/test_cuda_build.py 9.0 width_32` records the kernels of a source for an architecture (without names: of all), some minutes each.
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
SIMPLE = {"Gather", "Project", "NodeGradient", "Fold", "SumBlocks", "Merge", "Coefficients", "SumCells", "Softmax", "Delta"}
PURPOSES = {"width": "", "options": "options ", "attend": "attend "}


def options(capability: str) -> list[str]:
    number = capability.replace(".", "")
    return ["-gencode", f"arch=compute_{number},code=sm_{number}"]


def compiled(capability: str, folder: Path, names: tuple[str, ...] = ()) -> dict[str, dict[str, int]]:
    """Resources of the kernels of the sources `names`, of all without."""
    chosen = [p for p in build.sources() if not names or p.stem in names]
    objects = build.compile_all(build.find_nvcc(), folder, options(capability), chosen=chosen)
    return {name: value for o in objects for name, value in build.resources(o.with_suffix(".log").read_text()).items()}


def check(found: dict[str, dict[str, int]], capability: str) -> None:
    known = json.loads(RECORD.read_text())["kernels"].get(capability, {})
    grown = {name: (known[name], now) for name, now in found.items() if name in known and any(now[k] > known[name][k] for k in now)}
    assert not grown, grown


def expected(source: str) -> set[str]:
    """The kernels of a source."""
    purpose, _, width = source.rpartition("_")
    return SIMPLE if source == "second_stage" else {f"{PURPOSES[purpose]}{name} {width}" for name in INSTANCES}


@needs_nvcc
@pytest.mark.parametrize(("capability", "source"), [
    pytest.param(c, p.stem, marks=() if (c, p.stem) == ("9.0", "second_stage") else pytest.mark.slow) for c in build.ARCHITECTURES for p in build.sources()
])  # fmt: skip
def test_resources(capability: str, source: str, tmp_path: Path):
    """Every kernel compiles; those that are recorded for this architecture have not grown."""
    found = compiled(capability, tmp_path, (source,))
    assert set(found) == expected(source)
    check(found, capability)


def test_the_record_holds_whole_sources():
    record = json.loads(RECORD.read_text())["kernels"]
    assert set(record) <= set(build.ARCHITECTURES) and SIMPLE <= set(record["9.0"])
    for kernels in record.values():
        assert set(kernels) == set().union(*(expected(p.stem) for p in build.sources() if expected(p.stem) & set(kernels)))


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
    capability, *names = sys.argv[1:]
    begin = time.time()
    found = compiled(capability, ROOT / "build" / f"cuda-{capability}", tuple(names))
    nvcc = subprocess.run([build.find_nvcc(), "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[-2]
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {"kernels": {}}
    kernels = record["kernels"] | {capability: dict(sorted((record["kernels"].get(capability, {}) | found).items()))}
    RECORD.write_text(json.dumps({"nvcc": nvcc, "kernels": kernels}, indent=1) + "\n")
    print(f"{capability} {' '.join(names)}: {time.time() - begin:.0f} s")

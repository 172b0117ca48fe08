"""Compiles csrc/cuda with nvcc, for setup.py and for the tests that look at what comes out: registers, stack and spills of each kernel."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ARCHITECTURES = ("8.0", "9.0", "10.0")
# Multiplications and additions contract where the source says so: an expression has the same bits on the way there and back.
FLAGS = ("-std=c++17", "-O3", "-fmad=false", "-diag-suppress", "177", "-Xptxas", "-v", "-Xcompiler", "-fPIC,-fvisibility=hidden")
TEMPLATE = re.compile(r"(Messages|Options|Attend)(Forward|Backward)INS0_(4Bf16|4Tf32ILb0EE|4Tf32ILb1EE)ELi(\d+)E")
PURPOSES = {"Messages": "", "Options": "options ", "Attend": "attend "}
ROUNDING = {"4Bf16": "bf16", "4Tf32ILb0EE": "tf32", "4Tf32ILb1EE": "exact"}


def find_nvcc() -> str | None:
    """$CUDA_HOME/bin/nvcc, else the one on PATH; None if there is none."""
    home = os.environ.get("CUDA_HOME")
    if home and (Path(home) / "bin" / "nvcc").exists():
        return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc")


def runtime_folder(nvcc: str) -> Path:
    """Where nvcc's toolkit has libcudart_static.a: `nvcc` may be a script elsewhere that calls it, and toolkits differ in the folder.

    Raises:
        SystemExit: nowhere.
    """
    said = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    top = re.search(r"TOP=(\S+)", said)
    root = Path(top[1]) if top else Path(nvcc).resolve().parent.parent
    for folder in (root / "lib64", root / "lib", *root.glob("targets/*/lib")):
        if (folder / "libcudart_static.a").exists():
            return folder.resolve()
    raise SystemExit(f"ngkernels: expected libcudart_static.a in the toolkit of {nvcc}, found none in {root}; install the CUDA runtime's static library, or NGKERNELS_CUDA=0")


def architectures(listed: str | None = None) -> list[str]:
    """Options of nvcc for the capabilities `listed` as in "8.0;9.0+PTX"; None: for TORCH_CUDA_ARCH_LIST, or ARCHITECTURES.

    The kernels use nothing that is newer than 8.0: the front end runs once, for the oldest, and only the assembler for each. Older capabilities
    have no such kernels: they are left out.

    Raises:
        SystemExit: an entry that is not a capability; none of 8.0 or more.
    """
    text = listed or os.environ.get("TORCH_CUDA_ARCH_LIST") or ";".join(ARCHITECTURES)
    plain, options = {}, []
    entries = [re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry) for entry in re.split(r"[;\s]+", text) if entry]
    able = [found for found in entries if found and int(found[1]) >= 8]
    if not able or None in entries:
        raise SystemExit(f"ngkernels: expected TORCH_CUDA_ARCH_LIST to name capabilities of 8.0 or more such as 9.0, got {text!r}")
    for found in able:
        number = f"{found[1]}{found[2]}{found[3]}"
        if found[3]:
            options += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        else:
            plain[int(number)] = f"sm_{number}"
        options += ["-gencode", f"arch=compute_{number},code=compute_{number}"] if found[4] else []
    if plain:
        options = ["-gencode", f"arch=compute_{min(plain)},code=[{','.join(plain[n] for n in sorted(plain))}]", *options]
    return options


def sources() -> list[Path]:
    """The slowest first."""
    return sorted(HERE.glob("*.cu"), key=lambda p: 0 if p.stem == "second_stage" else -int(p.stem.rpartition("_")[2]))


def compile_one(nvcc: str, source: Path, target: Path, options: list[str]) -> str:
    """The messages of nvcc; nothing is done where `target` is newer than all that goes into it, with the same options.

    Raises:
        subprocess.CalledProcessError: it does not compile.
    """
    command = [nvcc, *FLAGS, *options, "-c", str(source), "-o", str(target)]
    log = target.with_suffix(".log")
    inputs = [*HERE.glob("*"), *HERE.parent.glob("*.h")]
    if target.exists() and log.exists() and log.read_text().startswith(" ".join(command)) and target.stat().st_mtime > max(p.stat().st_mtime for p in inputs):
        return log.read_text()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
    log.write_text(" ".join(command) + "\n" + done.stderr)
    return log.read_text()


def compile_all(nvcc: str, folder: Path, options: list[str], jobs: int | None = None, chosen: Sequence[Path] | None = None) -> list[Path]:
    """The object files of all sources, or of those `chosen`, in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    chosen = sources() if chosen is None else chosen
    targets = [folder / f"{p.stem}.o" for p in chosen]
    with ThreadPoolExecutor(jobs or int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        list(pool.map(lambda pair: compile_one(nvcc, *pair, options), zip(chosen, targets)))
    return targets


def resources(messages: str) -> dict[str, dict[str, dict[str, int]]]:
    """By capability, registers, bytes of stack and of spills of each kernel in nvcc's messages: "attend forward bf16 32" or the name of a
    simple one."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for part in messages.split("Compiling entry function")[1:]:
        name, major, minor = re.search(r"'(\S+)' for 'sm_(\d+)(\d)'", part).groups()
        template, simple = TEMPLATE.search(name), re.search(r"entryINS0_\d+([A-Za-z]+?)ENS", name)
        key = f"{PURPOSES[template[1]]}{template[2].lower()} {ROUNDING[template[3]]} {template[4]}" if template else simple[1]
        stack, stores, loads = (int(v) for v in re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part).groups())
        found.setdefault(f"{major}.{minor}", {})[key] = {"registers": int(re.search(r"Used (\d+) registers", part)[1]), "stack": stack, "spills": stores + loads}
    return found

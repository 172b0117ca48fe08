"""Builds csrc/ into ngkernels/_C.abi3.so. Everything else about the package stands in pyproject.toml.

The library uses torch's stable ABI and Python's limited API: one binary for every Python >= 3.10 and every torch >= 2.11.

Environment:
    NGKERNELS_BUILD      auto (default): build the library if there is a C++ compiler, else install without it;
                         none: install without the library; cpp: build it, and no compiler is an error.
                         A compile error is an error in every mode but none.
    NGKERNELS_CUDA       auto (default): CUDA kernels too, where nvcc is there and torch is one with CUDA; 1: with nvcc, whatever torch;
                         0: without them
    TORCH_CUDA_ARCH_LIST  what they are built for (default: 8.0;9.0;10.0); CUDA_HOME: where nvcc is
    NGKERNELS_CXXFLAGS   flags appended to the compiler's, for a sanitizer or a debug build
    CXX, MAX_JOBS        the compiler, the number of compiler processes (default: one per core)

What was built, or why nothing was, is recorded in ngkernels/_build_info.json, which `python -m ngkernels.env` reads.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
LIBRARY = "_C.abi3.so"
MODES = ("auto", "none", "cpp")
OLDEST_TORCH = (2, 11)  # TORCH_TARGET_VERSION below says the same


def find_compiler() -> str | None:
    """The C++ compiler as a command line: $CXX, else the first of the usual names; None if there is none."""
    if command := os.environ.get("CXX"):
        if shutil.which(shlex.split(command)[0]) is None:
            raise SystemExit(f"ngkernels: expected CXX to name a compiler, got {command!r}, which is not on PATH")
        return command
    return next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def why_not(mode: str, compiler: str | None) -> str | None:
    """The reason to install without the library, or None if it is to be built."""
    if mode not in MODES:
        raise SystemExit(f"ngkernels: expected NGKERNELS_BUILD to be one of {', '.join(MODES)}, got {mode!r}")
    if mode == "none":
        return "NGKERNELS_BUILD=none was set when the package was installed"
    if compiler is None:
        if mode == "cpp":
            raise SystemExit("ngkernels: NGKERNELS_BUILD=cpp needs a C++ compiler, and none of c++, g++, clang++ is on PATH")
        return "no C++ compiler (c++, g++, clang++ or $CXX) was found when the package was installed"
    return None


def require_torch() -> str:
    """The version of the torch to build against."""
    try:
        import torch
    except ImportError as error:
        raise SystemExit(
            "ngkernels: building the library needs torch in this environment: install torch first, then this package with "
            "--no-build-isolation; NGKERNELS_BUILD=none installs without the library"
        ) from error
    if tuple(int(x) for x in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        raise SystemExit(f"ngkernels: expected torch >= {'.'.join(map(str, OLDEST_TORCH))}, got {torch.__version__}")
    return torch.__version__


def cuda_build():
    """The module csrc/cuda/build.py, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("cuda_build", ROOT / "csrc" / "cuda" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def find_nvcc() -> str | None:
    """nvcc if the CUDA kernels are to be built, else None."""
    mode = os.environ.get("NGKERNELS_CUDA") or "auto"
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"ngkernels: expected NGKERNELS_CUDA to be auto, 0 or 1, got {mode!r}")
    if mode == "0":
        return None
    import torch

    nvcc = cuda_build().find_nvcc()
    if mode == "1" and nvcc is None:
        raise SystemExit("ngkernels: NGKERNELS_CUDA=1 needs nvcc, which is neither in $CUDA_HOME/bin nor on PATH")
    return nvcc if mode == "1" or torch.version.cuda else None


def compiler_version(command: str, line: int = 0) -> str:
    out = subprocess.run([*shlex.split(command), "--version"], capture_output=True, text=True, check=True).stdout
    return out.splitlines()[line]


def say(text: str) -> None:
    print(f"\nngkernels: {text}\n", file=sys.stderr, flush=True)


def extension_arguments(compiler: str, torch_version: str) -> dict:
    """Arguments of setup() that build the library."""
    # torch's build reads these: the compiler, and ninja, which lies beside the interpreter when the environment is not activated
    os.environ["CXX"] = compiler
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths

    sources = sorted(p.relative_to(ROOT).as_posix() for d in ("csrc", "csrc/cpu") for p in (ROOT / d).glob("*.cpp"))
    headers = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*.h"))
    if not sources:
        raise SystemExit("ngkernels: csrc/ has no sources: the checkout is incomplete; NGKERNELS_BUILD=none installs without the library")
    flags = [
        "-DPy_LIMITED_API=0x030A0000",
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
        "-DTORCH_STABLE_ONLY",
        "-O3",
        "-g0",
        "-std=c++17",
        # bit-identical re-evaluation in the backward: no contraction that depends on the surrounding code
        "-ffp-contract=off",
        "-fno-math-errno",
        "-fvisibility=hidden",
        # no path of the building machine in the binary
        f"-ffile-prefix-map={ROOT}/=",
        *(f"-ffile-prefix-map={path}/=" for path in include_paths()),
        *shlex.split(os.environ.get("NGKERNELS_CXXFLAGS", "")),
    ]

    nvcc = find_nvcc()
    # libtorch itself, which names libtorch_cuda where there is one: symbols of that are looked up there
    link = ["-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed", *shlex.split(os.environ.get("NGKERNELS_CXXFLAGS", ""))]
    if nvcc:
        link += [f"-L{cuda_build().runtime_folder(nvcc)}", "-lcudart_static", "-lrt", "-ldl", "-lpthread"]

    class BuildLibrary(BuildExtension):
        def finalize_options(self) -> None:
            super().finalize_options()
            # an editable install hands over a temporary folder; a lasting one makes its builds incremental
            self.build_temp = str(ROOT / "build" / f"objects-{sys.implementation.cache_tag}")

        def run(self) -> None:
            cuda = None
            if nvcc:
                options = cuda_build().architectures()
                objects = cuda_build().compile_all(nvcc, Path(self.build_temp) / "cuda", options)
                self.extensions[0].extra_objects += [str(o) for o in objects]
                cuda = {"nvcc": compiler_version(shlex.quote(nvcc), -2), "options": options}
            super().run()
            package = Path(self.get_ext_fullpath("ngkernels._C")).parent
            record(package, library=LIBRARY, compiler=compiler_version(compiler), torch=torch_version, flags=flags_shown(flags), cuda=cuda)

    extension = CppExtension(
        "ngkernels._C",
        sources,
        include_dirs=[str(ROOT / "csrc")],
        depends=[*headers, *(p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc" / "cuda").glob("*.cu") if nvcc), "setup.py"],
        extra_compile_args={"cxx": flags},
        extra_link_args=link,
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildLibrary},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def flags_shown(flags: list[str]) -> list[str]:
    return [flag for flag in flags if not flag.startswith("-ffile-prefix-map")]


def record(package: Path, **facts: object) -> None:
    package.mkdir(parents=True, exist_ok=True)
    (package / "_build_info.json").write_text(json.dumps(facts, indent=1) + "\n")


def plain_arguments(reason: str) -> dict:
    """Arguments of setup() that install without the library."""

    class BuildWithout(build_py):
        def run(self) -> None:
            super().run()
            package = ROOT / "ngkernels" if self.editable_mode else Path(self.build_lib) / "ngkernels"
            (package / LIBRARY).unlink(missing_ok=True)  # of an earlier build: without means without
            record(package, library=None, reason=reason)
            say(f"INSTALLED WITHOUT THE C++ LIBRARY: {reason}.\nThe cpp backend will not be available; the others are not affected.")

    return {"cmdclass": {"build_py": BuildWithout}}


def arguments() -> dict:
    compiler = find_compiler()
    reason = why_not(os.environ.get("NGKERNELS_BUILD") or "auto", compiler)
    if reason is not None:
        return plain_arguments(reason)
    return extension_arguments(compiler, require_torch())


setup(**arguments())

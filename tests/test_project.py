"""The package as a whole: what is in the wheel, which way the imports run, what the environment report says."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import DECLARED, why_backend_cannot_run

from ngkernels import backends, env

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"ngkernels": ROOT / "ngkernels", "neural_graphs": ROOT / "python" / "neural_graphs"}

# Parts of the engine, lowest first: a part may import itself and the parts below it. A module that is named nowhere is part of
# "data": graph, edges, encoders and other descriptions that everybody shares.
LAYERS = (
    {"_C"},
    {"data"},
    {"reference", "_triton", "_cuda"},
    {"ops"},
    {"nn"},
    {"trace", "planner", "stream", "distributed", "pyg", "env"},
)
# The backends are reached through the ops alone; `backends` is where the library is loaded.
ONLY_FROM = {
    "_C": {"ops", "backends"},
    "reference": {"ops"},
    "_triton": {"ops"},
    "_cuda": {"ops"},
}
# Imports against the rule, each with its reason. Keep this empty but for what the public interface asks for.
EXCEPTIONS = {
    ("ngkernels.edges", "ngkernels.ops.checkpoint"): "EdgeState.checkpoint() is the op of that name, as a method",
    ("ngkernels.tune", "ngkernels"): "a program that uses the engine as anybody does,",
    ("ngkernels.tune", "ngkernels._triton.sizes"): "and writes what its kernels read",
    ("ngkernels.tune", "ngkernels.ops.faster"): "and what chooses between backends",
}
# What the engine may import from outside, and where.
ENGINE_NEEDS = {"torch": None, "numpy": None, "triton": {"_triton", "backends"}, "torch_geometric": {"pyg"}}


def python_files(package: str) -> list[Path]:
    return sorted(p for p in PACKAGES[package].rglob("*.py") if "__pycache__" not in p.parts)


def module_name(package: str, path: Path) -> str:
    parts = path.relative_to(PACKAGES[package].parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(source: str, module: str, is_package: bool, known: set[str]) -> set[str]:
    """Absolute names of the modules that `source` imports, inside functions too.

    `from a import b` counts as a.b where that is one of the `known` modules (or the library), else as a.
    """
    found: set[str] = set()

    def from_import(base: str, names: list[str]) -> None:
        for name in names:
            found.add(f"{base}.{name}" if f"{base}.{name}" in known or name == "_C" else base)

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = module.split(".")[: None if is_package else -1]
                parent = parent[: len(parent) - node.level + 1]
                base = ".".join([*parent, *([base] if base else [])])
            from_import(base, [alias.name for alias in node.names])
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "import_module", "__import__"):
            if node.args and isinstance(node.args[0], ast.Constant):
                found.add(str(node.args[0].value))
    return found


def part(module: str) -> str:
    """The part of the engine that a module belongs to; "root" for ngkernels itself."""
    names = module.split(".")
    return names[1] if len(names) > 1 else "root"


def layer(name: str) -> int:
    if name == "root":
        return len(LAYERS)
    return next((i for i, parts in enumerate(LAYERS) if name in parts), 1)


def engine_violation(module: str, target: str) -> str | None:
    """Why `module` of the engine must not import `target`, or None if it may."""
    top = target.split(".")[0]
    me = part(module)
    if top != "ngkernels":
        if top in ENGINE_NEEDS:
            where = ENGINE_NEEDS[top]
            return None if where is None or me in where else f"{top} is for {', '.join(sorted(where))} only"
        return None if top in sys.stdlib_module_names else f"the engine does not depend on {top}"
    it = part(target)
    if it == me or me == "root" or (module, target) in EXCEPTIONS:
        return None
    if it in ONLY_FROM and me not in ONLY_FROM[it]:
        return f"{it} is reached from {', '.join(sorted(ONLY_FROM[it]))} only"
    higher = layer(it) > layer(me)
    level = layer(it) == layer(me) and it in ("reference", "_triton", "_cuda")
    return f"{it} stands above or beside {me}" if higher or level else None


def library_violation(module: str, target: str) -> str | None:
    """Why `module` of neural_graphs must not import `target`, or None if it may."""
    names = target.split(".")
    if names[0] in ("benchmarks", "tests"):
        return f"{names[0]} stands above the library"
    if names[0] == "ngkernels" and part(target) in ("_C", "_triton", "reference"):
        return "the library uses the engine's public interface, not its backends"
    return None


def violations(package: str, rule) -> list[str]:
    files = python_files(package)
    known = {module_name(p, f) for p in PACKAGES for f in python_files(p)}
    out = []
    for path in files:
        module = module_name(package, path)
        for target in sorted(imported(path.read_text(), module, path.name == "__init__.py", known)):
            reason = rule(module, target)
            if reason is not None:
                out.append(f"{path.relative_to(ROOT)} imports {target}: {reason}")
    return out


def test_imports_of_the_engine_run_downwards():
    assert violations("ngkernels", engine_violation) == []


def test_imports_of_the_library_run_downwards():
    assert violations("neural_graphs", library_violation) == []


@pytest.mark.parametrize(
    ("module", "source", "target"),
    [
        ("ngkernels.graph", "from .ops import aggregate", "ops"),
        ("ngkernels.graph", "def f():\n    from .nn.pna import PNA", "nn"),
        ("ngkernels.reference.aggregate", "from ..ops.aggregate import aggregate", "ops"),
        ("ngkernels.reference.aggregate", "from .. import _triton", "_triton"),
        ("ngkernels._triton.aggregate", "import ngkernels", "root"),
        ("ngkernels.nn.pna", "from ngkernels.reference import aggregate", "reference"),
        ("ngkernels.nn.pna", "import importlib\nimportlib.import_module('ngkernels._C')", "_C"),
        ("ngkernels.ops.aggregate", "import neural_graphs.models", "neural_graphs"),
        ("ngkernels.ops.aggregate", "import triton", "triton"),
        ("ngkernels.ops.aggregate", "import scipy", "scipy"),
        ("ngkernels.planner", "from ngkernels._C import x", "_C"),
    ],
)
def test_an_import_upwards_is_seen(module, source, target):
    known = {"ngkernels", *(f"ngkernels.{name}" for name in ("ops", "nn", "reference", "_triton"))}
    (found,) = (t for t in imported(source, module, False, known) if t != "importlib")
    assert target in (part(found), found.split(".")[0])
    assert engine_violation(module, found) is not None


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "ngkernels.ops.aggregate",
            "from .. import reference, backends\nfrom ..graph import NeuralGraph\nimport ngkernels._C, torch, math",
        ),
        ("ngkernels.ops.aggregate", "from . import common\nfrom .common import x"),
        ("ngkernels.nn.pna", "from ..ops import aggregate\nfrom .. import edges"),
        ("ngkernels._triton.aggregate", "import triton.language as tl\nfrom ..program import pack"),
        ("ngkernels.stream", "from .planner import plan"),
    ],
)
def test_an_import_downwards_is_allowed(module, source):
    known = {f"ngkernels.{name}" for name in ("ops", "reference", "backends", "edges", "graph", "ops.common")}
    for found in imported(source, module, False, known):
        assert engine_violation(module, found) is None, found


def test_every_folder_is_a_package():
    bare = {str(f.parent.relative_to(ROOT)) for p in PACKAGES for f in python_files(p) if not (f.parent / "__init__.py").exists()}
    assert not bare, "folders without __init__.py are missing from the wheel"


def run(command: list[str], cwd: Path, **environment: str) -> str:
    result = subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def build_wheel(folder: Path, mode: str) -> Path:
    """A wheel of a copy of the sources, so that nothing left by other builds gets in."""
    copy = folder / "sources"
    leave = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.json")
    for name in ("ngkernels", "python", "csrc"):
        shutil.copytree(ROOT / name, copy / name, ignore=leave)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", str(folder), str(copy)]
    run(pip, folder, NGKERNELS_BUILD=mode)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def plain_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("plain"), "none")


def test_the_wheel_has_every_module(plain_wheel: Path):
    inside = set(zipfile.ZipFile(plain_wheel).namelist())
    wanted = {str(f.relative_to(PACKAGES[p].parent)) for p in PACKAGES for f in python_files(p)}
    assert wanted <= inside
    assert {name.split("/")[0] for name in inside if not name.split("/")[0].endswith(".dist-info")} == set(PACKAGES)


def test_the_wheel_without_the_library_works_and_says_so(plain_wheel: Path, tmp_path: Path):
    assert plain_wheel.name.endswith("-py3-none-any.whl")
    zipfile.ZipFile(plain_wheel).extractall(tmp_path)
    assert not (tmp_path / "ngkernels" / env.LIBRARY).exists()
    text = run([sys.executable, "-m", "ngkernels.env"], tmp_path)
    assert "not built: NGKERNELS_BUILD=none was set" in text
    run([sys.executable, "-c", "import ngkernels, neural_graphs"], tmp_path)


@pytest.mark.slow
def test_the_wheel_with_the_library(tmp_path: Path):
    wheel = build_wheel(tmp_path, "auto")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    built = (tmp_path / "site" / "ngkernels" / env.LIBRARY).exists()
    assert built or "cpp" not in DECLARED
    assert ("-cp310-abi3-" in wheel.name) == built
    text = run([sys.executable, "-m", "ngkernels.env", "--library"], tmp_path / "site")
    assert (f"{env.LIBRARY}, built by" in text) == built


def test_the_declared_backends_run():
    assert {name: why_backend_cannot_run(name) for name in DECLARED} == dict.fromkeys(DECLARED)


def test_environment_report_names_every_op_and_backend():
    text = env.report()
    for op, row in backends.availability().items():
        assert op in text
        assert all(name in text for name in row)
        assert all(reason in text for reason in row.values() if reason)


def test_environment_table_is_aligned_and_explains():
    lines = env.table({"aggregate": {"reference": None, "cpp": "no compiler"}, "attend": {"reference": None}})
    assert lines == [
        "op         reference  cpp",
        "aggregate  yes        no",
        "attend     yes        -",
        "",
        "why not",
        "cpp  aggregate  no compiler",
    ]

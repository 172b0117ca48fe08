"""What this installation can do: `python -m ngkernels.env` prints versions, hardware, and which backend runs which op.

`--library` prints the one line about the compiled library alone.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
from pathlib import Path

import torch

from ngkernels import backends

LIBRARY = "_C.abi3.so"
INSTRUCTION_SETS = ("neon", "sve", "avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16")


def version(distribution: str) -> str:
    """Version of an installed distribution, or "not installed"."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def library() -> str:
    """One line on the compiled library: what built it, or why it is not there."""
    folder = Path(__file__).parent
    path = folder / "_build_info.json"
    info = json.loads(path.read_text()) if path.exists() else {}
    if (folder / LIBRARY).exists():
        if info.get("library") is None:
            return f"{LIBRARY}, built by hand"
        return f"{LIBRARY}, built by {info['compiler']} with torch {info['torch']}"
    return f"not built: {info.get('reason', 'the package is used without having been installed')}"


def cpu() -> tuple[str, list[str]]:
    """Name of the processor and those of INSTRUCTION_SETS that it has, as far as the system says."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = set(facts.get("flags", facts.get("Features", "")).split())
    name = facts.get("model name") or platform.processor() or platform.machine()
    return name, [flag for flag in INSTRUCTION_SETS if flag in flags]


def devices() -> list[str]:
    """The devices that torch can use, the CPU first."""
    found = ["cpu"]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(index)
            found.append(f"cuda:{index} {p.name} (sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB)")
    return found


def facts() -> list[tuple[str, str]]:
    """Everything about the machine and the installation, as (name, value)."""
    name, detected = cpu()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [
        ("ngkernels", version("ngkernels")),
        ("library", library()),
        ("python", f"{platform.python_version()} ({platform.python_implementation()}, {platform.platform()})"),
        ("torch", torch.__version__),
        ("triton", version("triton")),
        ("numpy", version("numpy")),
        ("cpu", f"{name} ({' '.join(detected) or 'instruction sets unknown'})"),
        ("isa in use", backends.isa()),
        ("threads", f"{torch.get_num_threads()} of torch, {cores} cores to run on"),
        *(("devices" if i == 0 else "", device) for i, device in enumerate(devices())),
    ]


def aligned(rows: list[list[str]]) -> list[str]:
    """Rows of cells as lines with the columns aligned."""
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def table(available: dict[str, dict[str, str | None]]) -> list[str]:
    """Which backend runs which op (yes, no, or - where it does not exist), and below it every reason for a no.

    Args:
        available: per op and backend None if it runs here, else the reason why not
    """
    names = list(dict.fromkeys(backend for row in available.values() for backend in row))
    rows = [["op", *names]]
    reasons: dict[tuple[str, str], list[str]] = {}
    for op, row in available.items():
        rows.append([op, *("-" if name not in row else "yes" if row[name] is None else "no" for name in names)])
        for name, reason in row.items():
            if reason is not None:
                reasons.setdefault((name, reason), []).append(op)
    lines = aligned(rows)
    if reasons:
        explained = [[name, "" if len(ops) == len(available) else ", ".join(ops), reason] for (name, reason), ops in reasons.items()]
        lines += ["", "why not", *aligned(explained)]
    return lines


def report() -> str:
    """The whole report as text."""
    return "\n".join([*aligned([list(fact) for fact in facts()]), "", *table(backends.availability())])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m ngkernels.env", description="What this installation can do.")
    parser.add_argument("--library", action="store_true", help="only the line about the compiled library")
    options = parser.parse_args(arguments)
    print(f"library: {library()}" if options.library else report())


if __name__ == "__main__":
    main()

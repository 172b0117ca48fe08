"""What a process knows of its memory: how much it holds, its peak, how much it may still take."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path


def held_bytes(field: str) -> int:
    """Bytes of VmRSS (resident now), VmHWM (resident at most) or VmData (private and writable, resident or not)."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource  # no /proc: the peak stands for all of them

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak() -> bool:
    """Sets VmHWM back to VmRSS; False where the system does not allow it: then the peak of the import counts too."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def trim() -> None:
    """Hands freed memory back to the system, so that it does not hide what comes next."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        pass


def available_memory() -> int | None:
    """Bytes this process may still allocate: the smaller of the machine's and the control group's; None if unknown."""
    found = []
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(int(fields["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError, ValueError):
        pass
    try:
        group = Path("/sys/fs/cgroup")
        found.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no limit reads "max"
        pass
    return min(found) if found else None

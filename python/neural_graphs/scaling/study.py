"""The search for the largest network, its records, and how an interrupted study continues."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..report import machine
from .measure import measure
from .methods import Method, width_for
from .projection import project

SCHEMA = 1
# Networks beside [2, h, 2h, 3], by name: (layout, batch).
OTHERS = {
    "mnist-inrs": ((2, 32, 32, 1), 64), "nerf": ((63, *[256] * 8, 4), 1), "siren-video": ((3, *[1024] * 4, 3), 1),
    "vit-blocks": ((768, 3072, 768, 3072, 768), 1),
}  # fmt: skip
GRID = 8  # hidden widths are multiples of it


def layout_of(hidden: int) -> tuple[int, int, int, int]:
    """The networks of the study: implicit neural representations with two hidden layers."""
    return 2, hidden, 2 * hidden, 3


def edges_of(hidden: int) -> int:
    layout = layout_of(hidden)
    return sum(i * o for i, o in zip(layout, layout[1:]))


@dataclass(frozen=True)
class Settings:
    """What a study asks for.

    Args:
        budgets: bytes, one or more. first, last: smallest and largest hidden width that is tried.
        refine: how often the gap between a width that fits and one that does not is halved, for each budget.
        parameters: None for the published sizes; or the number that every method's width is chosen for.
        weight_grads: gradients of the input network's weights too. max_seconds: of one measurement, start included.
        repeats: timed steps, unless one lasts longer than a second. others: names of OTHERS that are measured too.
        project: a size whose step would not end within max_seconds is projected (scaling/projection.py) instead of being tried.
    """

    budgets: tuple[int, ...]
    first: int = 16
    last: int = 1 << 20
    refine: int = 2
    parameters: int | None = None
    dtype: str = "fp32"
    weight_grads: bool = False
    threads: int = 1
    device: str = "cpu"
    max_seconds: float = 600.0
    repeats: int = 3
    others: tuple[str, ...] = ()
    project: bool = False

    def __post_init__(self) -> None:
        if not self.budgets or min(self.budgets) < 1:
            raise ValueError(f"scale: expected budgets of at least 1 byte, got {self.budgets}")
        if self.dtype not in ("fp32", "bf16"):
            raise ValueError(f"scale: expected dtype fp32 or bf16, got {self.dtype!r}")
        unknown = [name for name in self.others if name not in OTHERS]
        if unknown:
            raise ValueError(f"scale: expected others of {', '.join(OTHERS)}, got {unknown[0]!r}")
        if self.first < GRID or self.first % GRID or self.last < self.first:
            raise ValueError(
                f"scale: expected a first width that is a multiple of {GRID} and not above the last, got {self.first} and {self.last}"
            )

    @property
    def key(self) -> dict[str, Any]:
        """What measurements must agree in to be compared."""
        names = ("dtype", "weight_grads", "threads", "device", "repeats")
        return {**{name: getattr(self, name) for name in names}, "target_parameters": self.parameters}


class Records:
    """The measurements of a study: a file of JSON lines that only grows.

    Args:
        key: what measurements must agree in; lines of other studies stay in the file and are passed over.
        fresh: pass over everything that is there.
    """

    def __init__(self, path: Path, key: dict[str, Any], fresh: bool = False):
        self.path, self.key = path, key
        rows = _read(path) if path.exists() else []
        self.rows = [] if fresh else [row for row in rows if row["key"] == key]

    def find(self, method: str, hidden: int | str, limit: int, max_seconds: float) -> dict[str, Any] | None:
        """The last measurement that answers the question; one that ran out of less memory or time does not, nor does an error."""
        for row in reversed(self.rows):
            if (row["method"], row["hidden"]) == (method, hidden):
                if row["outcome"] == "ok" or (row["outcome"] == "out of memory" and row["limit_bytes"] >= limit):
                    return row
                if row["outcome"] in ("timeout", "projected") and row["max_seconds"] >= max_seconds:
                    return row
        return None

    def latest(self) -> list[dict[str, Any]]:
        """The last measurement of each method and width."""
        return list({(row["method"], row["hidden"]): row for row in self.rows}.values())

    def append(self, row: dict[str, Any]) -> dict[str, Any]:
        """Adds to the file, one line at a time: what is written stays when the study stops."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.rows.append(row)
        return row


def _read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file. A last line that was cut off while it was written is taken out of the file."""
    text = path.read_text()
    whole, cut = text[: text.rfind("\n") + 1], text[text.rfind("\n") + 1 :]
    if cut:
        path.write_text(whole)
    rows = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"scale: expected JSON lines, got line {number} of {str(path)!r}: {error}; take that line out") from error
        if row.get("schema") != SCHEMA:
            raise ValueError(
                f"scale: expected schema {SCHEMA} in {str(path)!r}, got {row.get('schema')} in line {number}; use another --out"
            )
        rows.append(row)
    return rows


@dataclass(frozen=True)
class Largest:
    """The largest network that fits a budget. `row`: its measurement, or None; `bound`: what ends it: "memory", "time", "error" or "study"."""

    method: str
    budget: int
    row: dict[str, Any] | None
    bound: str


class Study:
    """Measures methods one after the other.

    Args:
        settings: what is asked for. path: the file of records.
        told: hears of every measurement: (row, whether it was known from an earlier run).
        starting: hears of every measurement that begins: (method, hidden width). fresh: measure everything again.
    """

    def __init__(
        self,
        settings: Settings,
        path: Path,
        told: Callable[[dict, bool], None] = lambda row, known: None,
        starting: Callable[[Method, int | str], None] = lambda method, hidden: None,
        fresh: bool = False,
    ):
        self.settings, self.told, self.starting = settings, told, starting
        self.records = Records(path, {**settings.key, "slug": device_of(settings.device)["slug"]}, fresh)

    def point(self, method: Method, width: int, hidden: int | str) -> dict[str, Any]:
        """The measurement at one hidden width, or of one of OTHERS; made now or known."""
        layout, batch = OTHERS[hidden] if isinstance(hidden, str) else (layout_of(hidden), 1)
        s, limit = self.settings, max(self.settings.budgets)
        known = self.records.find(method.name, hidden, limit, s.max_seconds)
        if known is not None and (known["outcome"] != "projected" or s.project):
            self.told(known, True)
            return known
        self.starting(method, hidden)
        request = {
            "method": method.name, "layout": layout, "batch": batch, "width": width, "dtype": s.dtype, "weight_grads": s.weight_grads,
            "threads": s.threads, "device": s.device, "limit_bytes": limit, "repeats": s.repeats,
        }  # fmt: skip
        edges = batch * sum(i * o for i, o in zip(layout, layout[1:]))
        own = [row for row in self.records.latest() if row["method"] == method.name and isinstance(row["hidden"], int)]
        found = project(request, own, edges, s.max_seconds) if s.project and batch == 1 else None
        found = measure(request, s.max_seconds) if found is None else found
        row = {
            "schema": SCHEMA, "key": self.records.key, "time": datetime.now(timezone.utc).isoformat(timespec="seconds"), "git": machine.git_sha(),
            "versions": machine.versions(), "machine": device_of(s.device), **request, "hidden": hidden, "edges": edges, "nodes": batch * sum(layout),
            "max_seconds": s.max_seconds, **found,
        }  # fmt: skip
        self.told(self.records.append(row), False)
        return row

    def search(self, method: Method) -> list[Largest]:
        """For each budget the largest network: widths are doubled until one does not fit, then the gap is halved."""
        s = self.settings
        width = method.width if s.parameters is None else width_for(method, s.parameters)
        rows: dict[int, dict] = {}
        hidden = s.first
        while True:
            rows[hidden] = self.point(method, width, hidden)
            if not fits(rows[hidden], max(s.budgets)) or 2 * hidden > s.last:
                break
            hidden *= 2
        for name in s.others:
            self.point(method, width, name)
        for budget in s.budgets:
            for _ in range(s.refine):
                low, high = gap(rows, budget)
                middle = round(math.sqrt(low * high) / GRID) * GRID if low and high else None
                if middle is None or middle in rows:
                    break
                rows[middle] = self.point(method, width, middle)
        return [self._largest(method, rows, budget) for budget in s.budgets]

    @staticmethod
    def _largest(method: Method, rows: dict[int, dict], budget: int) -> Largest:
        low, high = gap(rows, budget)
        bound = "study"
        if high is not None:
            bound = {"timeout": "time", "error": "error"}.get(rows[high]["outcome"], "memory")
        return Largest(method.name, budget, rows.get(low), bound)


def fits(row: dict[str, Any], budget: int) -> bool:
    return row["outcome"] in ("ok", "projected") and row["peak_bytes"] <= budget


def gap(rows: dict[int, dict], budget: int) -> tuple[int | None, int | None]:
    """(largest width that fits, smallest that does not), where measured; widths above one that does not fit do not count."""
    high = min((h for h, row in rows.items() if not fits(row, budget)), default=None)
    return max((h for h, row in rows.items() if fits(row, budget) and (high is None or h < high)), default=None), high


def device_of(device: str) -> dict[str, Any]:
    """What records say of the machine; `slug` names the folder of its results."""
    import torch

    found = machine.device()
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
        found = {**found, "slug": machine.slug(name), "model": name, "memory_bytes": torch.cuda.get_device_properties(device).total_memory}
    return found

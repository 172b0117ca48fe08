"""Results on disk: one JSON line per measurement, under results/<device>/<name>.jsonl."""

from __future__ import annotations

import json
import uuid
from datetime import datetime, timezone
from pathlib import Path

from benchmarks import machine

RESULTS = Path(__file__).resolve().parent / "results"
SCHEMA = 1


def new_run() -> str:
    """A name for one invocation: records with the same one were measured together and may be compared."""
    return datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%S-") + uuid.uuid4().hex[:6]


def append(name: str, run: str, measurement: dict, results: Path = RESULTS) -> dict:
    """Completes a measurement with where and when it was taken, appends it to its file, returns it."""
    record = {
        "schema": SCHEMA,
        "name": name,
        "run": run,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "git": machine.git_sha(),
        "versions": machine.versions(),
        "device": machine.device(),
        **measurement,
    }
    path = results / record["device"]["slug"] / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
    return record


def load(name: str, results: Path = RESULTS) -> dict[str, list[dict]]:
    """Records of every device, oldest first, by device slug. Those that name no model are of NG-GNN: they were the first."""
    found = {}
    for path in sorted(results.glob(f"*/{name}.jsonl")):
        lines = [{"model": "ng-gnn", **json.loads(line)} for line in path.read_text().splitlines() if line.strip()]
        wrong = [r["schema"] for r in lines if r["schema"] != SCHEMA]
        if wrong:
            raise ValueError(f"records: expected schema {SCHEMA} in {path}, got {wrong[0]}")
        found[path.parent.name] = lines
    return found

"""The records of a run, `metrics.jsonl`: read without anything heavy, and cut where a run resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from powertrain.files import write_file

METRICS_FILE = "metrics.jsonl"


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """Return the records of a run's metrics.jsonl in their order; a last line cut short by a crash is left out."""
    path = Path(run_dir) / METRICS_FILE
    records = []
    if path.exists():
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                records.append(json.loads(line))
    return records


def truncate_metrics(run_dir: str | Path, step: int) -> None:
    """Drop the records after `step`, which a run resumed at `step` will write again."""
    path = Path(run_dir) / METRICS_FILE
    if not path.exists():
        return
    kept = "".join(json.dumps(record) + "\n" for record in read_metrics(run_dir) if record["step"] <= step)
    if kept == path.read_text():
        return
    write_file(path, kept)

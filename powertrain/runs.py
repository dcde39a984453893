"""`powertrain runs`: the runs of a directory, with state, progress, last loss and job."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from powertrain.cluster.queue import QueuedJob, SlurmError, queued_jobs
from powertrain.cluster.submit import submitted_job_id
from powertrain.run_status import RunStatus, read_status

DESCRIPTION = """\
List the runs of a directory.

states:
  pending      its Slurm job waits in the queue (also between two attempts)
  starting     its Slurm job runs, and training has not begun
  running      it trains
  finished     it has all its steps
  interrupted  it was asked to stop and saved; the same command continues it
  failed       an error ended it; the last column says which
  lost         it was running, and its process is gone: SIGKILL, a power cut, a machine that died
"""


@dataclass(frozen=True)
class RunRow:
    """One line of the table."""

    run: str  # name of the run directory
    state: str
    step: int | None
    total_steps: int | None
    loss: float | None  # latest training loss, nats per token
    val_loss: float | None
    job_id: str | None
    host: str | None
    updated: float | None  # seconds since 1970
    message: str | None


def is_run(directory: Path) -> bool:
    """Return whether a directory holds a run, begun or submitted."""
    return (directory / "config.yaml").is_file() or (directory / "slurm" / "config.yaml").is_file()


def run_state(status: RunStatus | None, job_id: str | None, job: QueuedJob | None) -> tuple[str, str | None]:
    """Return the state of a run and why, from its own word, its last job, and what the queue says of that job.

    Args:
        job: in the queue; None where it has left the queue, or there is none.
    """
    # COMPLETING is the end of an attempt; when the job is to start again, PENDING follows.
    if job is not None and job.state != "COMPLETING":
        if job.state not in ("RUNNING", "CONFIGURING"):
            return "pending", None
        # What an earlier job or attempt said is over.
        if status is None or status.job_id != job_id or status.updated < (job.started or 0.0):
            return "starting", None
    if status is None:
        if job_id is None:
            return "lost", "nothing was trained"
        return "failed", f"job {job_id} ended before training began: see its log in slurm/"
    if status.is_lost():
        return "lost", f"no sign of life from process {status.pid}"
    return status.state, status.message


def list_runs(directory: Path) -> list[RunRow]:
    """Return the runs in a directory, latest first; the queue is asked once, and only for runs that were submitted."""
    found: list[tuple[Path, RunStatus | None, str | None]] = []
    for path in sorted(directory.iterdir()):
        if path.is_dir() and is_run(path):
            status = read_status(path)
            found.append((path, status, submitted_job_id(path) or (status.job_id if status else None)))
    queue = _queue(job for _, _, job in found if job is not None)
    rows = []
    for path, status, job in found:
        state, message = run_state(status, job, queue.get(job or ""))
        rows.append(
            RunRow(
                run=path.name,
                state=state,
                step=status.step if status else None,
                total_steps=status.total_steps if status else None,
                loss=status.loss if status else None,
                val_loss=status.val_loss if status else None,
                job_id=job,
                host=status.host if status else None,
                updated=status.updated if status else None,
                message=message,
            )
        )
    return sorted(rows, key=lambda row: row.updated or float("inf"), reverse=True)


def _queue(job_ids: Iterable[str]) -> dict[str, QueuedJob]:
    try:
        return queued_jobs(job_ids)
    except SlurmError as error:
        print(f"powertrain runs: states are those the runs themselves wrote: {error}", file=sys.stderr)
        return {}


def _age(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{int(seconds // size)}{unit} ago"
    return f"{max(0, int(seconds))}s ago"


def _cells(row: RunRow, now: float) -> list[str]:
    progress = "" if row.step is None else f"{row.step}"
    if row.total_steps:
        progress += f"/{row.total_steps} {100 * (row.step or 0) // row.total_steps}%"
    return [
        row.run,
        row.state,
        progress,
        "" if row.loss is None else f"{row.loss:.4f}",
        "" if row.val_loss is None else f"{row.val_loss:.4f}",
        row.job_id or "",
        row.host or "",
        "" if row.updated is None else _age(now - row.updated),
        row.message or "",
    ]


def table(rows: Sequence[RunRow], now: float | None = None) -> str:
    """Return the rows as aligned text; `now` is in seconds since 1970."""
    now = time.time() if now is None else now
    lines = [["run", "state", "step", "loss", "val loss", "job", "host", "updated", ""]]
    lines += [_cells(row, now) for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def main(argv: list[str]) -> int:
    """Run `powertrain runs` and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="powertrain runs", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", nargs="?", type=Path, default=Path("runs"), help="paths.runs (default: runs)")
    parser.add_argument("--json", action="store_true", help="one JSON object a run")
    arguments = parser.parse_args(argv)
    if not arguments.directory.is_dir():
        raise ValueError(f"{arguments.directory} is not a directory; give the one that paths.runs named")
    rows = list_runs(arguments.directory)
    if arguments.json:
        for row in rows:
            print(json.dumps(dataclasses.asdict(row)))
    elif rows:
        print(table(rows))
    else:
        print(f"no runs in {arguments.directory}")
    return 0

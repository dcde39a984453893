"""Another attempt for a job that ends early: asked for by the process that has saved, or by the batch script.

Slurm itself starts a job again that it preempts (in its mode REQUEUE) or whose machine fails. Before a time limit, and
where preemption only sends signals, nobody would: that is what `requeue` is for.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

from powertrain.cluster.config import ClusterConfig
from powertrain.cluster.queue import (
    SlurmError,
    SlurmRefusal,
    current_job_id,
    job_state,
    patiently,
    slurm,
    this_restart,
)
from powertrain.files import write_file

ATTEMPTS_FILE = "attempts.json"
# Left for the batch script where Slurm did not answer rank 0: the number of the signal.
UNANSWERED_FILE = "unanswered"
# Of cluster.signal_seconds, spent on asking; the save before may have taken the rest.
ASKING_SHARE = 0.8
# A run whose attempts are too short for one saved step would otherwise be started for ever.
MAX_FRUITLESS_ATTEMPTS = 3


class Answer(NamedTuple):
    """What became of the wish for another attempt."""

    queued: bool  # the job is queued again
    sentence: str


def requeue_job(signum: int, signal_seconds: int, check: Callable[[str], None] = lambda job_id: None) -> Answer:
    """Ask Slurm to start the job of this process again, where the signal that ended it means that it should go on.

    To be called by one process, when nothing is left to be saved: Slurm ends the job at once. Where Slurm does not
    answer, it is asked again for most of the time between signal and limit.

    Args:
        signum: USR1 or USR2, which nobody sends but to have the job saved and queued again; or TERM, which also ends
            a cancelled job, and the processes of a job of which one has failed.
        signal_seconds: the time between signal and limit.
        check: called with the job's id before it is queued again; a `SlurmRefusal` that it raises prevents that.
    Errors:
        SlurmRefusal: by Slurm, or by `check`.
        SlurmError: Slurm does not answer.
    """
    job_id = current_job_id()
    assert job_id is not None, "requeue_job is for processes of a Slurm job"
    seconds = ASKING_SHARE * signal_seconds
    try:
        return patiently(lambda: _ask(job_id, signum, check), seconds)
    except SlurmRefusal:
        raise
    except SlurmError as error:
        raise SlurmError(
            f"job {job_id} is not queued again, since Slurm gave no answer for {seconds:.0f} s ({error})"
        ) from error


def _ask(job_id: str, signum: int, check: Callable[[str], None]) -> Answer:
    now = job_state(job_id)
    again = Answer(True, f"job {job_id} is queued again and will continue from what is saved")
    # By Slurm itself; or as asked for, and the one who asked was ended with the job before it heard.
    if now.restarts > this_restart():
        return again
    # Cancelled or preempted without grace: such jobs are COMPLETING, too.
    wanted = now.state == "RUNNING" and (signum != signal.SIGTERM or now.preempted)
    if not (wanted or now.reason == "TimeLimit"):
        return Answer(False, f"job {job_id} is {now.state}: no other attempt is asked for")
    check(job_id)
    slurm("scontrol", "requeue", job_id)
    return again


def requeue(run_dir: Path, signum: int) -> Answer:
    """Do as `requeue_job` for the run in `run_dir`, unless its attempts lead nowhere.

    Where Slurm does not answer, the batch script takes over.

    Errors:
        SlurmError: as of `requeue_job`, or several attempts in a row have saved nothing new.
    """
    try:
        return requeue_job(signum, _signal_seconds(run_dir), lambda job_id: _check_progress(run_dir, job_id))
    except SlurmRefusal:
        raise
    except SlurmError as error:
        with contextlib.suppress(OSError):
            path = run_dir / "slurm" / UNANSWERED_FILE
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{signum}\n")
        raise SlurmError(
            f"{error}; where its batch script does not manage it either, the same command continues the run"
        ) from error


def _signal_seconds(run_dir: Path) -> int:
    """Return the time between signal and limit; that of the templates, too, where the run has not said it."""
    try:
        return int(yaml.safe_load((run_dir / "config.yaml").read_text())["cluster"]["signal_seconds"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        return ClusterConfig.signal_seconds


def _check_progress(run_dir: Path, job_id: str) -> None:
    """Refuse another attempt after several in a row that have saved nothing new."""
    this = _count_attempt(run_dir, job_id)
    if this.fruitless >= MAX_FRUITLESS_ATTEMPTS:
        raise SlurmRefusal(
            f"job {job_id} is not queued again: each of its last {this.fruitless} attempts ended with no later step "
            f"saved than when the one before it ended (now step {this.saved}); give it more time (cluster.time), or an "
            f"earlier signal (cluster.signal_seconds)"
        )


class _Attempt(NamedTuple):
    """How an attempt of a job ended."""

    job: str
    restarts: int  # how often Slurm had started the job again before
    saved: int  # step of the newest checkpoint
    fruitless: int  # attempts in a row, up to this one, that ended with no later step saved than the one before


def _last_attempt(path: Path, job_id: str) -> _Attempt:
    try:
        read = json.loads(path.read_text())
        last = _Attempt(str(read["job"]), int(read["restarts"]), int(read["saved"]), int(read["fruitless"]))
    except (OSError, ValueError, KeyError, TypeError):
        last = None
    # A run that is submitted again begins anew.
    return last if last is not None and last.job == job_id else _Attempt(job_id, -1, 0, 0)


def _count_attempt(run_dir: Path, job_id: str) -> _Attempt:
    """Return and record how this attempt ended, once however often it asks.

    It is compared with the attempt before it and not with the best of all: a run that has lost its newest checkpoints
    is judged by what it gains from there.
    """
    path = run_dir / "slurm" / ATTEMPTS_FILE
    restarts = this_restart()
    before = _last_attempt(path, job_id)
    if before.restarts == restarts:
        return before
    saved = _saved_step(run_dir)
    this = _Attempt(job_id, restarts, saved, 0 if saved > before.saved else before.fruitless + 1)
    # A full disk is no reason to stop a run that is saved.
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(this._asdict()) + "\n")
    return this


def _saved_step(run_dir: Path) -> int:
    try:
        return int(os.readlink(run_dir / "checkpoints" / "last").rpartition("-")[2])
    except (OSError, ValueError):
        return 0


def main(argv: Sequence[str]) -> int:
    """Run `python -m powertrain.cluster.requeue RUN_DIR`, the last resort of the batch script.

    At the time limit, and where rank 0 has left a signal that Slurm did not answer.
    """
    run_dir = Path(argv[0])
    try:
        signum = int((run_dir / "slurm" / UNANSWERED_FILE).read_text())
    except (OSError, ValueError):
        signum = signal.SIGTERM
    try:
        print(requeue(run_dir, signum).sentence, file=sys.stderr, flush=True)
    except SlurmError as error:
        print(error, file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

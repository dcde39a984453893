"""What Slurm says of jobs: of the one this process belongs to, and of those in the queue."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

T = TypeVar("T")

# A controller that restarts answers after seconds; nobody waits longer for a table of runs.
TIMEOUT_SECONDS = 20.0
# Between questions to a controller that does not answer: doubled from the first to the last.
FIRST_PAUSE_SECONDS, LAST_PAUSE_SECONDS = 1.0, 15.0
# What a controller says that has understood, and would say again.
_REFUSALS = re.compile(r"Invalid job id|denied|disabled")


class SlurmError(OSError):
    """A command of Slurm failed or is missing; the message is one sentence for the user."""


class SlurmRefusal(SlurmError):
    """Asking again would bring the same answer."""


def slurm(*command: str, environment: Mapping[str, str] | None = None) -> str:
    """Run one of Slurm's commands and return what it prints.

    Errors:
        SlurmError: it is not installed, takes too long, or reports an error.
        SlurmRefusal: it is not installed, or Slurm refuses.
    """
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, env=environment, check=False
        )
    except FileNotFoundError:
        raise SlurmRefusal(f"{command[0]} is not installed here: run this where Slurm's commands are") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]} gave no answer in {TIMEOUT_SECONDS:.0f} s") from None
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split()) or f"exit code {done.returncode}"
        kind = SlurmRefusal if _REFUSALS.search(said) else SlurmError
        raise kind(f"{' '.join(command[:2])} failed: {said}")
    return done.stdout


def patiently(ask: Callable[[], T], seconds: float) -> T:
    """Return what `ask` returns, asked again for about `seconds` while it raises a SlurmError that is no refusal.

    A controller answers late exactly when many jobs need it, as when all of a partition are preempted.
    """
    deadline = time.monotonic() + seconds
    pause = FIRST_PAUSE_SECONDS
    while True:
        try:
            return ask()
        except SlurmRefusal:
            raise
        except SlurmError:
            left = deadline - time.monotonic()
            if left <= 0:
                raise
        # Not all jobs at the same moment.
        time.sleep(min(left, pause * random.uniform(0.5, 1.0)))  # noqa: S311
        pause = min(2 * pause, LAST_PAUSE_SECONDS)


def current_job_id(environment: Mapping[str, str] = os.environ) -> str | None:
    """Return the id of the Slurm job that runs this process, as Slurm's commands take it; None outside of jobs.

    A task of an array is named ARRAY_TASK: one of them has the array's own id as its SLURM_JOB_ID, by which a command
    would reach the whole array.
    """
    if "SLURM_ARRAY_JOB_ID" in environment and "SLURM_ARRAY_TASK_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment.get("SLURM_JOB_ID") or None


def this_restart(environment: Mapping[str, str] = os.environ) -> int:
    """Return how often Slurm had started this process's job before."""
    return int(environment.get("SLURM_RESTART_COUNT", "0"))


@dataclass(frozen=True)
class JobState:
    """A job as the controller sees it."""

    state: str  # RUNNING, PENDING, COMPLETING, ...
    reason: str  # TimeLimit, None, ...
    preempted: bool  # it runs on for a while, to make room for another job
    restarts: int  # how often it was queued again, from the moment that Slurm agrees to it


def job_state(job_id: str) -> JobState:
    """Return the state of one job.

    Errors:
        SlurmError: Slurm does not know it, or does not answer.
    """
    fields: dict[str, str] = {}
    for word in slurm("scontrol", "--oneliner", "show", "job", job_id).split():
        key, _, value = word.partition("=")
        fields.setdefault(key, value)
    preempted = fields.get("PreemptTime", "None") != "None"
    restarts = fields.get("Restarts", "0")
    return JobState(
        fields.get("JobState", "UNKNOWN"),
        fields.get("Reason", ""),
        preempted,
        int(restarts) if restarts.isdigit() else 0,
    )


class QueuedJob(NamedTuple):
    """A job in the queue."""

    state: str  # PENDING, RUNNING, COMPLETING, ...
    started: float | None  # of this attempt, or when it is expected to; seconds since 1970


def queued_jobs(job_ids: Iterable[str]) -> dict[str, QueuedJob]:
    """Return those of the jobs that are pending, running or ending; others are left out.

    Errors:
        SlurmError: the queue cannot be read.
    """
    wanted = set(job_ids)
    if not wanted:
        return {}
    if shutil.which("squeue") is None:
        raise SlurmError("squeue is not installed here")
    # All of the queue, hidden partitions too: asked for one id that has left it, squeue fails instead of printing
    # nothing. What the user has squeue leave out by variables counts as well.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SQUEUE_")}
    lines = slurm(
        "squeue", "--noheader", "--all", "--array", "--format=%i|%T|%S",
        environment={**environment, "SLURM_TIME_FORMAT": "%s"},
    ).splitlines()  # fmt: skip
    jobs = (line.strip().split("|") for line in lines)
    return {
        job: QueuedJob(state, float(started) if started.isdigit() else None)
        for job, state, started in jobs
        if job in wanted
    }

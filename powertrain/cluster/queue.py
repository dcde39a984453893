"""What Slurm says of jobs: of the one this process belongs to, and of those in the queue."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

# A controller that restarts answers after seconds; nobody waits longer for a table of runs.
TIMEOUT_SECONDS = 20.0


class SlurmError(OSError):
    """A command of Slurm failed or is missing; the message is one sentence for the user."""


def slurm(*command: str, environment: Mapping[str, str] | None = None) -> str:
    """Run one of Slurm's commands and return what it prints.

    Errors:
        SlurmError: it is not installed, takes too long, or reports an error.
    """
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, env=environment, check=False
        )
    except FileNotFoundError:
        raise SlurmError(f"{command[0]} is not installed here: run this where Slurm's commands are") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]} gave no answer in {TIMEOUT_SECONDS:.0f} s") from None
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split()) or f"exit code {done.returncode}"
        raise SlurmError(f"{' '.join(command[:2])} failed: {said}")
    return done.stdout


def current_job_id(environment: Mapping[str, str] = os.environ) -> str | None:
    """Return the id of the Slurm job that runs this process, as Slurm's commands take it; None outside of jobs.

    A task of an array is named ARRAY_TASK: one of them has the array's own id as its SLURM_JOB_ID, by which a command
    would reach the whole array.
    """
    if "SLURM_ARRAY_JOB_ID" in environment and "SLURM_ARRAY_TASK_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment.get("SLURM_JOB_ID") or None


@dataclass(frozen=True)
class JobState:
    """A job as the controller sees it."""

    state: str  # RUNNING, PENDING, COMPLETING, ...
    reason: str  # TimeLimit, None, ...
    preempted: bool  # it runs on for a while, to make room for another job


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
    return JobState(fields.get("JobState", "UNKNOWN"), fields.get("Reason", ""), preempted)


def queued_states(job_ids: Iterable[str]) -> dict[str, str]:
    """Return the state of each of the jobs that is pending, running or ending; others are left out.

    Errors:
        SlurmError: the queue cannot be read.
    """
    wanted = set(job_ids)
    if not wanted:
        return {}
    if shutil.which("squeue") is None:
        raise SlurmError("squeue is not installed here")
    # All of the queue: asked for one id that has left it, squeue fails instead of printing nothing.
    lines = slurm("squeue", "--noheader", "--array", "--format=%i|%T").splitlines()
    pairs = (line.strip().partition("|") for line in lines)
    return {job: state for job, _, state in pairs if job in wanted}

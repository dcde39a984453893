"""The batch script of a job: readable, complete by itself, and safe whatever the configuration holds."""

from __future__ import annotations

import re
import shlex
import signal
from dataclasses import dataclass
from pathlib import Path

from powertrain.cluster.config import DEFAULTED, ClusterConfig


@dataclass(frozen=True)
class BatchJob:
    """What a job runs, besides the resources that `ClusterConfig` asks for."""

    name: str  # the job's name in the queue
    command: tuple[str, ...]  # run by every process
    work_dir: Path  # where the command runs; relative paths of the configuration begin here
    log_dir: Path  # exists when the job starts
    once: tuple[tuple[str, ...], ...] = ()  # commands run by one process before; they may fail
    last_resort: tuple[str, ...] | None = None  # asks for another attempt when TERM reaches the batch script, and ...
    unanswered: Path | None = None  # ... when the processes end and leave this file: Slurm did not answer them
    code: Path | None = None  # put first on PYTHONPATH
    array: str | None = None  # indices of an array of such jobs, as 0-9%2
    dependency: str | None = None  # as afterok:17

    @property
    def log_pattern(self) -> str:
        """The name of the log in Slurm's terms: by array and index, or by job."""
        return "%A_%a.log" if self.array else "%j.log"


def directive(option: str, value: str | int | None = None) -> str:
    """Return one `#SBATCH` line.

    Slurm splits these lines itself: quotes and backslashes as in a shell, and nothing is expanded.
    """
    if value is None:
        return f"#SBATCH --{option}"
    text = str(value)
    assert "\n" not in text
    if re.fullmatch(r"[A-Za-z0-9_./:,=@%+*|&!\[\]()^~-]+", text):
        return f"#SBATCH --{option}={text}"
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'#SBATCH --{option}="{escaped}"'


def _directives(cluster: ClusterConfig, job: BatchJob) -> list[str]:
    # Slurm replaces %j and its like in the names of files.
    log = str(job.log_dir).replace("%", "%%")
    options: list[tuple[str, str | int | None]] = [
        # `bash` and `interactive` as names switch off Lightning's view of Slurm.
        ("job-name", f"pt-{job.name}"),
        ("chdir", str(job.work_dir)),
        ("output", f"{log}/{job.log_pattern}"),
        ("nodes", cluster.nodes),
        ("ntasks-per-node", cluster.processes_per_node),
    ]
    if cluster.gpus_per_node:
        options.append(("gpus-per-node", cluster.gpus_per_node))
    for name in DEFAULTED:
        value = getattr(cluster, name)
        if value is not None:
            options.append((name.replace("_", "-"), value))
    if job.array is not None:
        options.append(("array", job.array))
    if job.dependency is not None:
        options.append(("dependency", job.dependency))
    options += [
        # To the processes of the run and not to this script.
        ("signal", f"USR1@{cluster.signal_seconds}"),
        ("requeue", None),
        ("open-mode", "append"),
    ]
    for name, value in cluster.sbatch.items():
        if value is True:
            options.append((name, None))
        elif value is not None and value is not False:
            options.append((name, value))
    return [directive(name, value) for name, value in options]


def batch_script(cluster: ClusterConfig, job: BatchJob) -> str:
    """Return the script that `sbatch` takes."""
    processes = cluster.processes_per_node
    lines = ["#!/bin/bash", *_directives(cluster, job), "", "set -eo pipefail +o posix", ""]
    if cluster.setup:
        lines += ["# cluster.setup", *cluster.setup, ""]
    lines += [f"export {key}={shlex.quote(value)}" for key, value in cluster.env.items()]
    if job.code is not None:
        lines += [
            "# The code as it was when this job was submitted.",
            f'export PYTHONPATH={shlex.quote(str(job.code))}"${{PYTHONPATH:+:$PYTHONPATH}}"',
        ]
    lines += [
        "# Processes meet at the first machine; set MASTER_ADDR where its name does not resolve.",
        'export MASTER_ADDR="${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}"',
        "# srun does not take this over from sbatch by itself (Slurm 22.05 and later).",
        'if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"; fi',
        f"share=$(( SLURM_CPUS_ON_NODE > {processes} ? SLURM_CPUS_ON_NODE / {processes} : 1 ))",
        'export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-$share}}"',
        "export PYTHONUNBUFFERED=1",
        "",
    ]
    for command in job.once:
        lines.append(f"srun --nodes=1 --ntasks=1 {shlex.join(command)} || echo 'not done; going on without it'")
    if job.once:
        lines.append("")
    if job.unanswered is not None:
        lines.append(f"rm -f {shlex.quote(str(job.unanswered))}  # of an earlier attempt")
    if job.last_resort is not None:
        lines += [
            "# Before the time limit, and when preempted, the run saves and asks Slurm for another attempt. Where the",
            "# limit comes first (during a long validation, say), this asks instead; in vain, it still waits for them.",
            f"trap {shlex.quote(shlex.join(job.last_resort) + ' || true')} TERM",
            "",
        ]
    lines += [
        "# The first process that fails ends all of them, and one that ends well none: rank 0 may still report, or",
        "# ask for another attempt. In the background, because bash runs a trap only between commands; the trap ends a",
        "# wait early.",
        f"srun --kill-on-bad-exit=1 --wait=0 --label {shlex.join(job.command)} &",
        "ranks=$!",
        'while kill -0 "$ranks" 2> /dev/null; do wait "$ranks" || true; done',
        "code=0",
        'wait "$ranks" || code=$?  # of srun, which bash keeps, but not as a POSIX shell',
    ]
    if job.last_resort is not None and job.unanswered is not None:
        unanswered = shlex.quote(str(job.unanswered))
        usr1 = signal.SIGUSR1.value
        lines += [
            "# A signal that came before the run took signals has ended it.",
            f'[ "$code" -ne {128 + usr1} ] || echo {usr1} > {unanswered} || true',
            "# Where Slurm has not answered the run in time, this asks again.",
            f"if [ -e {unanswered} ]; then {shlex.join(job.last_resort)} || true; fi",
        ]
    lines.append('exit "$code"')
    return "\n".join(lines) + "\n"

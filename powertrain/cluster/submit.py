"""Submit a run, or any command, as a Slurm job."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from powertrain.cluster.config import DEFAULTED, OWN_OPTIONS, ClusterConfig
from powertrain.cluster.queue import SlurmError, queued_jobs, slurm
from powertrain.cluster.requeue import UNANSWERED_FILE
from powertrain.cluster.script import BatchJob, batch_script
from powertrain.cluster.snapshot import copy_code, copy_path
from powertrain.config import RunConfig, to_values
from powertrain.locks import take_lock
from powertrain.run_status import RunBusyError, check_free, read_status, write_status

JOB_FILE = "job.json"
# What an allocation or a launcher around the submitting command has set for itself, and would set for the job too.
_FOREIGN = ("SLURM_", "SRUN_", "PMI_", "PMIX_", "TORCHELASTIC_")
_FOREIGN_NAMES = (
    "RANK",
    "LOCAL_RANK",
    "GROUP_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "NODE_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "CUDA_VISIBLE_DEVICES",
)
# Variables of sbatch that are not SBATCH_ and the name of their option.
_SBATCH_VARIABLES = {
    "array": ("SBATCH_ARRAY_INX",),
    "mem": ("SBATCH_MEM_PER_NODE", "SBATCH_MEM_PER_CPU", "SBATCH_MEM_PER_GPU"),
    "switches": ("SBATCH_REQ_SWITCH",),
    "time": ("SBATCH_TIMELIMIT",),
}


@dataclass(frozen=True)
class SubmittedRun:
    """A job that trains a run."""

    job_id: str
    run_id: str
    run_dir: Path
    log: Path


def _overriding_variables(cluster: ClusterConfig) -> list[str]:
    """Return the variables set here by which sbatch, for which they outrank the script, would submit another job."""
    left = {name.replace("_", "-") for name in DEFAULTED if getattr(cluster, name) is None}
    names: list[str] = []
    for option in sorted((OWN_OPTIONS.keys() | cluster.sbatch.keys()) - left):
        names += _SBATCH_VARIABLES.get(option, (f"SBATCH_{option.replace('-', '_').upper()}",))
    return [name for name in names if name in os.environ]


def submission_environment(cluster: ClusterConfig) -> dict[str, str]:
    """Return the environment that a job inherits: this one without what would change the job.

    That is what belongs to a surrounding job or launcher, and the variables of sbatch for options that the script sets,
    or leaves out on purpose.
    """
    dropped = {*_FOREIGN_NAMES, *_overriding_variables(cluster)}
    return {
        key: value
        for key, value in os.environ.items()
        if key == "SLURM_CONF" or not (key.startswith(_FOREIGN) or key in dropped)
    }


def check_paths(*paths: Path) -> None:
    """Refuse directories of a job that what passes them on would misread."""
    for path in paths:
        # A backslash switches off the %j in the name of a log.
        if any(ord(character) < 32 or character in ":\\" for character in str(path)):
            raise ValueError(
                f"{str(path)!r} is not allowed: PYTHONPATH and Slurm take no colons, backslashes or control characters"
            )


def submit_job(cluster: ClusterConfig, job: BatchJob, path: Path) -> str:
    """Write a job's batch script to `path`, submit it and return the job's id.

    Errors:
        SlurmError: Slurm is not there, or refuses; its own words are in the message.
    """
    job.log_dir.mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(batch_script(cluster, job))
    overriding = _overriding_variables(cluster)
    if overriding:
        print(f"{', '.join(overriding)} not passed to sbatch: the configuration decides that", file=sys.stderr)
    answer = slurm("sbatch", "--parsable", str(path.resolve()), environment=submission_environment(cluster))
    return answer.strip().partition(";")[0]  # `id;cluster` where Slurm runs several


def submitted_job_id(run_dir: Path) -> str | None:
    """Return the id of the job that was last submitted for a run; None without one."""
    try:
        return str(json.loads((run_dir / "slurm" / JOB_FILE).read_text())["job_id"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def python_command(*arguments: str) -> tuple[str, ...]:
    """Return the command that runs a module with this interpreter, and with the code that `BatchJob.code` names."""
    # -P: `-m` would look in the working directory first, which may be the checkout that the copy is to replace.
    return (sys.executable, "-P", "-m", *arguments)


def job_config(config: RunConfig) -> RunConfig:
    """Return the configuration that the processes of the job run: the same, with nothing left to be found out there."""
    return dataclasses.replace(
        config,
        run_id=config.resolved_run_id(),
        paths=dataclasses.replace(config.paths, runs=str(Path(config.paths.runs).absolute())),
        trainer=dataclasses.replace(
            config.trainer,
            num_nodes=config.cluster.nodes,
            devices=config.cluster.processes_per_node,
            accelerator="gpu" if config.cluster.gpus_per_node else "cpu",
        ),
    )


def run_job(config: RunConfig, code: Path | None, once: tuple[tuple[str, ...], ...] = ()) -> BatchJob:
    """Return the job that trains a run; see `job_config` and `copy_code` for the arguments."""
    run_id = config.resolved_run_id()
    run_dir = Path(config.paths.runs).absolute() / run_id
    home = run_dir / "slurm"
    return BatchJob(
        name=run_id,
        command=python_command("powertrain", "train", "--config", str(home / "config.yaml")),
        work_dir=Path.cwd(),
        log_dir=home,
        code=code,
        once=once,
        last_resort=python_command("powertrain.cluster.requeue", str(run_dir)),
        unanswered=home / UNANSWERED_FILE,
    )


def _check_free(run_dir: Path) -> None:
    """Refuse a run that is queued or running already, and end the record of one whose job died without a word."""
    job_id = submitted_job_id(run_dir)
    if job_id is not None:
        queued = queued_jobs([job_id]).get(job_id)
        if queued is not None:
            raise RunBusyError(
                f"job {job_id} of the run {run_dir.name} is {queued.state} already: `scancel {job_id}` ends it, and "
                f"the same command then continues the run"
            )
        status = read_status(run_dir)
        if status is not None and status.state == "running" and status.job_id == job_id:
            message = f"job {job_id} ended without a word"
            write_status(run_dir, dataclasses.replace(status, state="failed", message=message))
    check_free(run_dir)


@contextlib.contextmanager
def _sole_submission(run_dir: Path) -> Iterator[None]:
    """Hold the lock on submissions of a run: of two at once, the job of one would read the configuration of the other.

    Errors:
        RunBusyError: another process submits the run.
    """
    path = run_dir / "slurm" / ".lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        locked: bool | None = None
        # Without locks, for whatever reason, the queue tells of all but the last moments.
        with contextlib.suppress(OSError):
            locked = take_lock(file)
        if locked is False:
            raise RunBusyError(
                f"another process is submitting the run {run_dir.name}: wait for that one, or give this run another "
                f"run_id"
            )
        yield


def _kernels() -> tuple[tuple[str, ...], ...]:
    """Build the kernels here where there is a compiler; else return the command that builds them in the job."""
    from powertrain.native import KernelBuildError, KernelsUnavailable, build_missing

    try:
        build_missing()
    except (KernelsUnavailable, OSError):
        return (python_command("powertrain", "kernels", "build"),)
    except KernelBuildError as error:
        raise SlurmError(f"nothing was submitted: {error}") from error
    return ()


def submit_run(config: RunConfig) -> SubmittedRun:
    """Submit a run: snapshot its configuration and code, build the kernels once, and queue the job.

    Errors:
        RunBusyError: the run is being submitted, queued or running already.
        SlurmError: Slurm is not there, or refuses the job.
    """
    config = job_config(config)
    assert config.run_id is not None
    run_dir = Path(config.paths.runs) / config.run_id
    check_paths(run_dir, Path.cwd())
    slurm("scontrol", "ping")  # before minutes of compilation
    home = run_dir / "slurm"
    with _sole_submission(run_dir):
        _check_free(run_dir)
        code = copy_code(home / "code")
        once = _kernels() if config.cluster.gpus_per_node else ()
        job = run_job(config, code, once)
        (home / "config.yaml").write_text(yaml.safe_dump(to_values(config), sort_keys=False))
        job_id = submit_job(config.cluster, job, home / "job.sh")
        record = {"job_id": job_id, "submitted": time.time(), "processes": config.cluster.processes}
        (home / JOB_FILE).write_text(json.dumps(record) + "\n")
    return SubmittedRun(job_id, config.run_id, run_dir, job.log_dir / job.log_pattern.replace("%j", job_id))


def main(config: RunConfig) -> int:
    """Submit a run and say how to follow it, or with `cluster.dry_run` print the script and touch nothing."""
    cluster = config.cluster
    if cluster.dry_run:
        config = job_config(config)
        run_dir = Path(config.paths.runs) / str(config.run_id)
        print(batch_script(cluster, run_job(config, copy_path(run_dir / "slurm" / "code"))), end="")
        print(f"dry run: nothing was submitted or written; the run would live in {run_dir}", file=sys.stderr)
        return 0
    run = submit_run(config)
    processes = f"{cluster.nodes} x {cluster.processes_per_node} processes"
    if cluster.gpus_per_node:
        processes += " with a GPU each"
    lines = [
        f"submitted job {run.job_id}: run {run.run_id} on {processes}",
        f"  log       tail -F {shlex.quote(str(run.log))}",
        f"  queue     squeue --job {run.job_id}",
        f"  progress  powertrain runs {shlex.quote(str(run.run_dir.parent))}",
        f"  end it    scancel {run.job_id}     (the same command again continues the run)",
    ]
    print("\n".join(lines))
    return 0

"""Several runners of one sweep: a process per local GPU, or a Slurm array with a dependent report."""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from powertrain.cluster.config import ClusterConfig
from powertrain.cluster.script import BatchJob, batch_script
from powertrain.scaling.run import SweepPaths
from powertrain.schema import ConfigError

# Runners import torch at once; a little apart they do not compete for the disk.
STAGGER_SECONDS = 1.0
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def visible_gpus(wanted: str) -> list[str]:
    """Return the GPUs of a list such as `0,1,2`, or all of this machine, by the numbers that torch gives them.

    Errors:
        ConfigError: not a list of numbers, one given twice, or none there.
    """
    import torch

    found = [str(i) for i in range(torch.cuda.device_count())]
    gpus = found if wanted == "all" else [g.strip() for g in wanted.split(",")]
    if not all(g.isdigit() for g in gpus) or len(set(gpus)) != len(gpus):
        raise ConfigError(f"--gpus {wanted}: allowed are numbers separated by commas, each once, or `all`")
    if not found:
        raise ConfigError(f"--gpus {wanted}: this machine has no GPU that torch can see")
    if not set(gpus) <= set(found):
        raise ConfigError(f"--gpus {wanted}: torch sees {len(found)} here; allowed are {', '.join(found)}, or `all`")
    return gpus


def run_on_gpus(arguments: Sequence[str], gpus: Sequence[str], logs: Path, per_gpu: int = 1) -> int:
    """Run `per_gpu` runners on each GPU, each with `arguments`, and return the first exit code that is not 0.

    Signals that ask to stop reach the runners, which save and end, and no further one is started; a runner that fails
    leaves the others at work. The code of one that a signal ended is 128 plus its number.
    """
    logs.mkdir(parents=True, exist_ok=True)
    processes: list[subprocess.Popen[bytes]] = []
    command = [sys.executable, "-m", "powertrain", *arguments]
    received: list[int] = []
    # Where this process sees only some of the machine's GPUs, torch counts those.
    shown = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]

    def forward(signum: int, frame: object) -> None:
        received.append(signum)
        # A terminal has sent Ctrl-C to the runners too, and a second one would end them without a save.
        if signum != signal.SIGINT:
            for process in processes:
                process.send_signal(signum)

    previous = {signum: signal.signal(signum, forward) for signum in _STOP_SIGNALS}
    try:
        # One on every GPU first.
        for number, gpu in itertools.product(range(per_gpu), gpus):
            if received:
                break
            name = f"runner-{gpu}" + (f"-{number}" if per_gpu > 1 else "")
            with (logs / f"{name}.log").open("ab") as log:
                environment = {**os.environ, "CUDA_VISIBLE_DEVICES": shown[int(gpu)] if shown else gpu}
                processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
            if received:
                # It came while this one was being started, and not yet in the list.
                processes[-1].send_signal(signal.SIGTERM)
            time.sleep(STAGGER_SECONDS)
        while any(process.poll() is None for process in processes):
            time.sleep(STAGGER_SECONDS)
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
    code = next((process.returncode for process in processes if process.returncode), 0)
    return code if code >= 0 else 128 - code


def slurm_jobs(
    recipe: str, directory: Path, paths: SweepPaths, runners: int, flags: Sequence[str] = ()
) -> tuple[BatchJob, BatchJob]:
    """Return the array of runners, and the report that follows it; the report's dependency is the array's id.

    Args:
        recipe: as the user named it; a path is made absolute.
        directory: holds the sweep's directory, on a file system that all nodes share.
        flags: of `powertrain sweep run`, passed on to every runner.
    Errors:
        ValueError: no runners, or a directory that Slurm would misread.
    """
    from powertrain.cluster.submit import check_paths, python_command

    if runners < 1:
        raise ValueError(f"--slurm {runners} is not allowed: it must be at least 1 runner")
    name = str(Path(recipe).absolute()) if Path(recipe).is_file() else recipe
    common = (name, "--directory", str(directory.absolute()))
    logs = (paths.root / "slurm").absolute()
    check_paths(logs, Path.cwd())
    array = BatchJob(
        name=paths.root.name,
        command=python_command("powertrain", "sweep", "run", *common, "--quiet", *flags),
        work_dir=Path.cwd(),
        log_dir=logs,
        array=f"0-{runners - 1}",
    )
    report = BatchJob(
        name=f"{paths.root.name}-report",
        command=python_command("powertrain", "sweep", "report", *common),
        work_dir=Path.cwd(),
        log_dir=logs,
    )
    return array, report


def submit(cluster: ClusterConfig, array: BatchJob, report: BatchJob, paths: SweepPaths) -> tuple[str, str]:
    """Submit both jobs and return their ids; the report runs once all runners ended, however they ended."""
    from powertrain.cluster.submit import submit_job

    home = paths.root / "slurm"
    array_id = submit_job(cluster, array, home / "run.sbatch")
    after = dataclasses.replace(report, dependency=f"afterany:{array_id}")
    # One process draws figures; it needs no GPU.
    single = dataclasses.replace(cluster, nodes=1, tasks_per_node=None, gpus_per_node=0)
    return array_id, submit_job(single, after, home / "report.sbatch")


def scripts(cluster: ClusterConfig, array: BatchJob, report: BatchJob) -> str:
    """Return both batch scripts, for --dry-run."""
    after = dataclasses.replace(report, dependency="afterany:<array>")
    single = dataclasses.replace(cluster, nodes=1, tasks_per_node=None, gpus_per_node=0)
    return batch_script(cluster, array) + "\n" + batch_script(single, after)

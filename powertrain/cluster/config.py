"""Where a run executes: this machine, or a Slurm cluster. Plain frozen dataclass, importable without torch."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any

KINDS = ("local", "slurm")

# What the batch script sets itself, and what of the configuration sets it; the short forms are refused with it.
OWN_OPTIONS = {
    "nodes": "cluster.nodes",
    "ntasks": "cluster.nodes and cluster.tasks_per_node",
    "ntasks-per-node": "cluster.tasks_per_node",
    "gpus": "cluster.gpus_per_node",
    "gpus-per-node": "cluster.gpus_per_node",
    "cpus-per-task": "cluster.cpus_per_task",
    "mem": "cluster.mem",
    "time": "cluster.time",
    "partition": "cluster.partition",
    "account": "cluster.account",
    "qos": "cluster.qos",
    "signal": "cluster.signal_seconds",
    "job-name": "name or run_id",
    "chdir": "the directory of the submitting command",
    "output": "the run directory",
    "error": "the run directory",
    "open-mode": "powertrain (restarts append to one log)",
    "requeue": "powertrain (a preempted run continues by itself)",
    "no-requeue": "powertrain (a preempted run continues by itself)",
    "array": "powertrain (one run, one job; `powertrain sweep` makes arrays)",
    "export": "cluster.env",
    "export-file": "cluster.env",
    "wrap": "cluster.setup",
    "parsable": "powertrain",
    "test-only": "cluster.dry_run",
    "wait": "powertrain",
}

# Of these, the ones that null in the configuration leaves to the cluster, and so to the user's variables of sbatch.
DEFAULTED = ("cpus_per_task", "mem", "time", "partition", "account", "qos")

# MINUTES alone is left out: YAML reads 12:00:00 without quotes as 43200, which Slurm would take for minutes.
# M:SS too, which one reads as hours and minutes.
_TIME = re.compile(r"\d+:\d\d:\d\d|\d+-\d{1,2}(:\d\d){0,2}|UNLIMITED", re.IGNORECASE)
_MEMORY = re.compile(r"0|[1-9]\d*[KMGT]?", re.IGNORECASE)
_OPTION = re.compile(r"[a-z][a-z0-9-]+")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def _count(name: str, value: int | None, low: int) -> None:
    if value is not None and value < low:
        raise ValueError(f"cluster.{name}={value} is not allowed: it must be a whole number of at least {low}")


def _one_line(name: str, value: str) -> None:
    if not value or _CONTROL.search(value):
        raise ValueError(f"{name}={value!r} is not allowed: it must be one line of text without control characters")


@dataclass(frozen=True)
class ClusterConfig:
    """Where and on how much of it a run executes; nothing here changes the numbers of the run."""

    kind: str = "local"  # local (this process and its machine) or slurm (submit a batch job)
    nodes: int = 1  # machines of the job
    gpus_per_node: int = 0  # GPUs of each machine, one process each; 0: a CPU job
    tasks_per_node: int | None = None  # processes of each machine; null: one for each GPU, or one
    cpus_per_task: int | None = None  # CPU cores of each process; null: the cluster's default
    mem: str | None = None  # memory of each machine, as 64G; 0: all of it; null: the cluster's default
    time: str | None = None  # limit of one attempt, as 4:00:00 or 2-12:00:00; null: the partition's
    partition: str | None = None  # null: the cluster's default
    account: str | None = None  # whom the job is charged to
    qos: str | None = None  # quality of service
    signal_seconds: int = 300  # seconds before the time limit at which the run saves and queues again
    env: dict[str, str] = field(default_factory=dict)  # environment variables of the job
    setup: tuple[str, ...] = ()  # lines of bash before the run, as `module load cuda`; the only text taken as shell
    sbatch: dict[str, Any] = field(default_factory=dict)  # further options of sbatch, as {constraint: h100}
    dry_run: bool = False  # print what would run, and the batch script of a job; nothing runs

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"cluster.kind={self.kind!r} is not allowed: it must be one of {', '.join(KINDS)}")
        _count("nodes", self.nodes, 1)
        _count("gpus_per_node", self.gpus_per_node, 0)
        _count("tasks_per_node", self.tasks_per_node, 1)
        _count("cpus_per_task", self.cpus_per_task, 1)
        _count("signal_seconds", self.signal_seconds, 1)
        if self.signal_seconds > 65535:
            raise ValueError(f"cluster.signal_seconds={self.signal_seconds} is not allowed: Slurm takes at most 65535")
        if self.gpus_per_node and self.tasks_per_node not in (None, self.gpus_per_node):
            raise ValueError(
                f"cluster.tasks_per_node={self.tasks_per_node} contradicts cluster.gpus_per_node={self.gpus_per_node}: "
                f"each GPU gets one process, so leave cluster.tasks_per_node out"
            )
        if self.mem is not None and not _MEMORY.fullmatch(self.mem):
            raise ValueError(f"cluster.mem={self.mem!r} is not allowed: write an amount as 64G or 500M, or 0 for all")
        if self.time is not None and not _TIME.fullmatch(self.time):
            raise ValueError(
                f"cluster.time={self.time!r} is not allowed: write H:MM:SS or D-HH:MM:SS (in quotes where it is YAML)"
            )
        if self.time_seconds is not None and self.time_seconds <= self.signal_seconds:
            raise ValueError(
                f"cluster.time={self.time} leaves nothing to train: the run saves and queues again "
                f"cluster.signal_seconds={self.signal_seconds} before the limit; give a longer limit or a later signal"
            )
        for name in ("partition", "account", "qos"):
            value = getattr(self, name)
            if value is not None:
                _one_line(f"cluster.{name}", value)
        object.__setattr__(self, "setup", tuple(self.setup))
        for line in self.setup:
            if "\0" in line:
                raise ValueError(f"cluster.setup holds {line!r}, which has a NUL in it")
        for key, text in self.env.items():
            if not _VARIABLE.fullmatch(key):
                raise ValueError(f"cluster.env holds {key!r}, which is not a name of an environment variable")
            if "\0" in text:
                raise ValueError(f"cluster.env.{key}={text!r} is not allowed: it has a NUL in it")
        for key, given in self.sbatch.items():
            if not _OPTION.fullmatch(key):
                raise ValueError(
                    f"cluster.sbatch holds {key!r}: write the long name of an option of sbatch without its dashes, "
                    f"as in cluster.sbatch.constraint=h100"
                )
            # sbatch takes any beginning of an option's name for the option.
            own = min((option for option in OWN_OPTIONS if option.startswith(key)), key=len, default=None)
            if own is not None:
                named = f"cluster.sbatch.{key}" + (f" (--{own})" if own != key else "")
                raise ValueError(f"{named} is not allowed: that is set by {OWN_OPTIONS[own]}")
            if given is not None and not isinstance(given, str | int | float | bool):
                raise ValueError(f"cluster.sbatch.{key}={given!r} is not allowed: it must be a text, a number or true")
            if isinstance(given, str):
                _one_line(f"cluster.sbatch.{key}", given)
        if self.kind == "local":
            self._refuse_options_of_a_job()

    def _refuse_options_of_a_job(self) -> None:
        for option in dataclasses.fields(self):
            value = getattr(self, option.name)
            default = option.default if option.default_factory is dataclasses.MISSING else option.default_factory()
            if option.name not in ("kind", "dry_run") and value != default:
                raise ValueError(
                    f"cluster.{option.name}={value} needs cluster=slurm: without it a run stays on this machine, on "
                    f"trainer.devices processes"
                )

    @property
    def time_seconds(self) -> int | None:
        """The time limit in seconds; None where there is none, or the partition's."""
        if self.time is None or self.time.upper() == "UNLIMITED":
            return None
        days, dash, clock = self.time.rpartition("-")
        parts = [int(part) for part in clock.split(":")]
        parts += [0] * (3 - len(parts))  # after days, minutes and seconds may be left out
        hours, minutes, seconds = parts
        return ((int(days) if dash else 0) * 24 + hours) * 3600 + minutes * 60 + seconds

    @property
    def processes_per_node(self) -> int:
        """Processes of the run on each machine."""
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def processes(self) -> int:
        """Processes of the run."""
        return self.nodes * self.processes_per_node

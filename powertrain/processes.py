"""Which of several processes this is, as what started them says it in the environment. No torch here."""

from __future__ import annotations

import os

# Set for the processes that `training.launch` starts.
LAUNCHER = "POWERTRAIN_LAUNCHER"


def launcher() -> str | None:
    """Return what started this process as one of several: torchrun, srun or powertrain; None where it is alone."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun"
    # A batch script sees Slurm's variables too, but only srun starts processes; a shell under srun is one of one.
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return "srun"
    # Ours, or any other that gives torchrun's variables; one of them alone may be left over from something else.
    return "powertrain" if {"RANK", "LOCAL_RANK"} <= os.environ.keys() else None


def global_rank() -> int:
    """Return this process's number among all; 0 where it is alone."""
    return _number("SLURM_PROCID", "RANK")


def local_rank() -> int:
    """Return this process's number among those of its machine; 0 where it is alone."""
    return _number("SLURM_LOCALID", "LOCAL_RANK")


def is_rank_zero() -> bool:
    """Return whether this is the process of several that speaks and writes for all."""
    return global_rank() == 0


def _number(of_slurm: str, of_others: str) -> int:
    match launcher():
        case None:
            return 0
        case "srun":
            return int(os.environ[of_slurm])
        case _:
            return int(os.environ[of_others])

"""`powertrain train` in which something happens on one rank at the end of a step, before anything is saved of it.

At step 0 it happens while the rank starts, before its model has weights.

Its arguments: FAULT:RANK:STEP OVERRIDES...      FAULT: error, kill, hang, nan, disk or none
"""

import errno
import os
import signal
import sys
import time
from typing import Any

import torch

from powertrain import cli
from powertrain.training import checkpoint, distribution, fit
from powertrain.training.module import PowertrainModule
from tests.forked import launch_forked


def happen(fault: str, module: PowertrainModule | None = None) -> None:
    match fault:
        case "error":
            raise KeyError("the fault of this rank")
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hang":
            time.sleep(600)
        case "nan":
            assert module is not None
            with torch.no_grad():
                next(module.parameters()).fill_(float("nan"))
        case "disk":

            def full(*_: object) -> None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            checkpoint.write_pieces = full  # type: ignore[assignment]


def main() -> int:
    torch.set_num_threads(1)
    fault, rank, step = sys.argv[1].split(":")
    original = PowertrainModule.optimizer_step

    def optimizer_step(self: PowertrainModule, *args: object, **kwargs: object) -> None:
        original(self, *args, **kwargs)
        if self.step == int(step) and self.ranks.rank == int(rank):
            happen(fault, self)

    def materialize(*args: Any) -> None:
        if int(step) == 0 and os.environ["RANK"] == rank:
            happen(fault)
        distribution.materialize(*args)

    fit.materialize = materialize
    PowertrainModule.optimizer_step = optimizer_step  # type: ignore[method-assign]
    return cli.main(["train", *sys.argv[2:]])


def launched() -> int:
    """Be the launcher of two such processes."""
    return launch_forked("tests.training.faulty_train", sys.argv[1:], 2, server=False)

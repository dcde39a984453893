"""`powertrain train` in which something happens on one rank at the end of a step, before anything is saved of it.

python -m tests.training.faulty_train FAULT:RANK:STEP OVERRIDES...      FAULT: error, kill, hang, nan, disk or none
"""

import errno
import os
import signal
import sys
import time

import torch

from powertrain import cli
from powertrain.training import checkpoint
from powertrain.training.module import PowertrainModule


def happen(fault: str, module: PowertrainModule) -> None:
    match fault:
        case "error":
            raise KeyError("the fault of this rank")
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hang":
            time.sleep(600)
        case "nan":
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

    PowertrainModule.optimizer_step = optimizer_step  # type: ignore[method-assign]
    return cli.main(["train", *sys.argv[2:]])


if __name__ == "__main__":
    sys.exit(main())

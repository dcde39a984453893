"""Two steps on two CPU processes; writes the first step's gradients. Lightning starts the second process from here."""

import sys
from pathlib import Path

import torch

from tests.training.fakes import TinyModel, run_tiny
from tests.training.test_gradients import Keep

if __name__ == "__main__":
    torch.set_num_threads(1)
    directory = Path(sys.argv[1])
    keep = Keep()
    torch.manual_seed(0)
    run_tiny(
        directory / "run",
        steps=2,
        model=TinyModel(dropout=0.0),
        callbacks=[keep],
        devices=2,
        micro_batch_size=1,
        grad_clip=None,
    )
    if torch.distributed.get_rank() == 0:
        torch.save(keep.gradients, directory / "gradients.pt")

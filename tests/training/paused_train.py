"""`powertrain train` in which one rank pauses in its start-up: it makes DIRECTORY/paused, and waits for DIRECTORY/go.

Its arguments: PLACE:RANK DIRECTORY OVERRIDES...      PLACE: one of PLACES
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from powertrain import cli
from powertrain.data.datamodule import TokenDataModule
from powertrain.training import fit
from powertrain.training.state import RestoreTraining

PLACES: dict[str, tuple[Any, str]] = {
    "data": (TokenDataModule, "__init__"),
    "meeting": (fit, "process_group"),
    "restore": (fit, "materialize"),
    "train_start": (RestoreTraining, "on_train_start"),
}


def main() -> int:
    torch.set_num_threads(1)
    (place, rank), directory = sys.argv[1].split(":"), Path(sys.argv[2])
    owner, name = PLACES[place]
    original = getattr(owner, name)

    def paused(*args: Any, **kwargs: Any) -> Any:
        (directory / "paused").touch()
        while not (directory / "go").exists():
            time.sleep(0.05)
        return original(*args, **kwargs)

    if rank == os.environ["RANK"]:
        setattr(owner, name, paused)
    return cli.main(["train", *sys.argv[3:]])

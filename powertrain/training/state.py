"""What a checkpoint holds, gathered from a run and put back into one."""

from __future__ import annotations

import dataclasses
from typing import Any

import lightning.pytorch as pl
import torch

from powertrain.training.checkpoint import CheckpointError
from powertrain.training.module import Counters, PowertrainModule
from powertrain.training.rng import capture_rng, restore_rng

FORMAT = 1


def collect_state(
    trainer: pl.Trainer, module: PowertrainModule, datamodule: pl.LightningDataModule, run_config: dict[str, Any]
) -> dict[str, Any]:
    """Gather the state at the end of a step; a collective: every rank calls it, and every rank gets all random states.

    Returns:
        `state_dict` (keys `model.<name>`), `optimizer`, `counters`, `rng` (one per rank), `data`, `config`, `format`.
    """
    assert module.at_step_end, "a checkpoint belongs between two steps"
    states: list[Any] = [capture_rng()]
    if trainer.world_size > 1:
        gathered: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(gathered, states[0])
        states = gathered
    return {
        "format": FORMAT,
        "state_dict": module.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict(),
        "counters": {**dataclasses.asdict(module.counters), "seconds": module.clock.seconds},
        "rng": states,
        "data": datamodule.state_dict(),
        "config": run_config,
    }


def restore_before_fit(state: dict[str, Any], module: PowertrainModule, datamodule: pl.LightningDataModule) -> None:
    """Put weights, counters and the position in the data back; before `Trainer.fit` reads any of them.

    Errors:
        CheckpointError: the checkpoint is of another format or of another model.
        ValueError: the data are not those of the checkpoint.
    """
    if state.get("format") != FORMAT:
        raise CheckpointError(f"the checkpoint has format {state.get('format')!r}; this version reads {FORMAT}")
    try:
        module.load_state_dict(state["state_dict"])
    except RuntimeError as error:
        reasons = [line.strip() for line in str(error).splitlines()[1:3]]
        raise CheckpointError(f"the checkpoint is of another model: {' '.join(reasons)}") from error
    module.counters = Counters(**state["counters"])
    datamodule.load_state_dict(state["data"])


class RestoreTraining(pl.Callback):
    """Puts back what exists only inside `Trainer.fit`: the optimizer's moments and the random state.

    The random state comes last, when every loader is made: what construction drew is forgotten.
    """

    def __init__(self, state: dict[str, Any] | None) -> None:
        self._state = state

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, PowertrainModule)
        if self._state is not None:
            trainer.optimizers[0].load_state_dict(self._state["optimizer"])
            states = self._state["rng"]
            # Another number of ranks cannot continue the same streams; a rank beyond the old ones keeps its own.
            if trainer.global_rank < len(states):
                restore_rng(states[trainer.global_rank])
            self._state = None
        pl_module.clock.start(pl_module.counters.seconds)


def seed_loop_counters(trainer: pl.Trainer, step: int, accumulation: int) -> None:
    """Make Lightning's loops count from `step`, so that its limits and validation intervals are the run's own.

    Lightning restores its loops only with checkpoints of its own format, whose counters are in the middle of a batch.
    """
    loop = trainer.fit_loop.epoch_loop
    loop.batch_progress.total.ready = step * accumulation
    progress = loop.automatic_optimization.optim_progress.optimizer.step.total
    progress.ready = progress.completed = step

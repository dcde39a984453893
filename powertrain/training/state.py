"""What a checkpoint holds, taken from a run and put back into one, whatever its processes and its sharding."""

from __future__ import annotations

import dataclasses
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from powertrain.training.checkpoint import WEIGHTS, Checkpoint, read_weights
from powertrain.training.module import Counters, PowertrainModule
from powertrain.training.rng import restore_rng

_OPTIMIZER = "optimizer."  # optimizer.<moment>.<name of the weight>


def collect_tensors(module: PowertrainModule, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return weights and optimizer state by name, as they are: sharded where they are sharded, nothing is copied."""
    tensors = {WEIGHTS + name: tensor for name, tensor in module.model.state_dict().items()}
    for name, parameter in module.model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{_OPTIMIZER}{key}.{name}"] = value
    return tensors


def collect_values(
    module: PowertrainModule, datamodule: pl.LightningDataModule, run_config: dict[str, Any]
) -> dict[str, Any]:
    """Return `counters`, `data` (the position in it) and `config`, as plain values."""
    assert module.at_step_end, "a checkpoint belongs between two steps"
    return {
        "counters": {**dataclasses.asdict(module.counters), "seconds": module.clock.seconds},
        "data": datamodule.state_dict(),
        "config": run_config,
    }


def restore_before_fit(checkpoint: Checkpoint, module: PowertrainModule, datamodule: pl.LightningDataModule) -> None:
    """Put weights, counters and the position in the data back; before `Trainer.fit` reads any of them.

    Errors:
        CheckpointError: the checkpoint is of another model.
        ValueError: the data are not those of the checkpoint.
    """
    read_weights(checkpoint, module.model)
    module.counters = Counters(**checkpoint.values["counters"])
    data = checkpoint.values["data"]
    # The global batch that is trained on again and again is the first one.
    datamodule.load_state_dict({**data, "consumed_samples": 0} if module.overfit else data)


class RestoreTraining(pl.Callback):
    """Puts back what exists only inside `Trainer.fit`: the optimizer's moments and the random state.

    The random state comes last, when every loader is made: what construction drew is forgotten.
    """

    def __init__(self, checkpoint: Checkpoint | None) -> None:
        self._checkpoint = checkpoint

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, PowertrainModule)
        if self._checkpoint is not None:
            _restore_optimizer(self._checkpoint, pl_module, trainer.optimizers[0])
            # Another number of ranks cannot continue the same streams; a rank beyond the old ones keeps its own.
            rng = self._checkpoint.rng(trainer.global_rank)
            if rng is not None:
                restore_rng(rng)
            self._checkpoint = None
        pl_module.clock.start(pl_module.counters.seconds)


def _restore_optimizer(checkpoint: Checkpoint, module: PowertrainModule, optimizer: torch.optim.Optimizer) -> None:
    tensors: dict[str, Tensor] = {}
    states: dict[Tensor, dict[str, Tensor]] = {}
    for saved, shape in checkpoint.shapes.items():
        if not saved.startswith(_OPTIMIZER):
            continue
        key, name = saved.removeprefix(_OPTIMIZER).split(".", 1)
        parameter = module.model.get_parameter(name)
        # A moment lies and is sharded as its weight; the number of steps is a scalar beside it.
        value = torch.zeros_like(parameter) if shape else torch.zeros(())
        tensors[saved] = states.setdefault(parameter, {})[key] = value
    checkpoint.read_into(tensors)
    # Through the optimizer's own loading, which knows where it wants its scalars.
    state = optimizer.state_dict()
    numbers = {
        parameter: number
        for group, saved_group in zip(optimizer.param_groups, state["param_groups"], strict=True)
        for parameter, number in zip(group["params"], saved_group["params"], strict=True)
    }
    state["state"] = {numbers[parameter]: values for parameter, values in states.items()}
    optimizer.load_state_dict(state)


def seed_loop_counters(trainer: pl.Trainer, step: int, accumulation: int) -> None:
    """Make Lightning's loops count from `step`, so that its limits and validation intervals are the run's own.

    Lightning restores its loops only with checkpoints of its own format, whose counters are in the middle of a batch.
    """
    loop = trainer.fit_loop.epoch_loop
    loop.batch_progress.total.ready = step * accumulation
    progress = loop.automatic_optimization.optim_progress.optimizer.step.total
    progress.ready = progress.completed = step

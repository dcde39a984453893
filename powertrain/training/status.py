"""Tells somebody outside of training how far it is."""

from __future__ import annotations

from typing import Any, Protocol

import lightning.pytorch as pl

from powertrain.training.module import PowertrainModule


class Progress(Protocol):
    """Takes the progress of a run; see `powertrain.run_status.StatusReport.update`."""

    def __call__(self, *, step: int, total_steps: int, loss: float | None, val_loss: float | None) -> None: ...


class TellProgress(pl.Callback):
    """Calls `tell` when training begins, after every step and validation, and where an error or a signal ends it."""

    def __init__(self, tell: Progress) -> None:
        self.tell = tell

    def _tell(self, module: pl.LightningModule) -> None:
        assert isinstance(module, PowertrainModule)
        # NaN until the first step of this process.
        loss = module.loss if module.loss == module.loss else None
        self.tell(step=module.step, total_steps=module.last_step, loss=loss, val_loss=module.counters.val_loss)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._tell(pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._tell(pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._tell(pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        # A callback before this one may have ended training at the last step.
        self._tell(pl_module)

"""The callback that saves a run at its steps, and ends it cleanly on a signal."""

from __future__ import annotations

import signal
from typing import Any

import lightning.pytorch as pl

from powertrain.training.checkpoint import CheckpointStore
from powertrain.training.module import PowertrainModule
from powertrain.training.ranks import Ranks
from powertrain.training.rng import capture_rng
from powertrain.training.signals import StopSignals
from powertrain.training.state import collect_tensors, collect_values


class TrainingInterrupted(Exception):
    """A signal ended training after a whole step, which is saved."""

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(f"{signal.Signals(signum).name}: saved at step {step}")
        self.signum = signum
        self.step = step


class Checkpointing(pl.Callback):
    """Saves every so many steps, with each new lowest validation loss, at the end, and before a signal ends the run.

    A save is written while training goes on; the next one, the end and a signal wait for it. A step that is followed by
    a validation is saved after it, so that a resumed run neither misses nor repeats it.
    """

    def __init__(
        self,
        store: CheckpointStore,
        *,
        every_steps: int,
        run_config: dict[str, Any],
        signals: StopSignals,
        ranks: Ranks,
        patience: float,
    ) -> None:
        """patience: seconds that a process which fails gives its save in flight."""
        self.store = store
        self.every_steps = every_steps
        self.run_config = run_config
        self.signals = signals
        self.ranks = ranks
        self.patience = patience
        self._saved_step: int | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, PowertrainModule)
        self._saved_step = pl_module.step or None

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, PowertrainModule)
        if not pl_module.at_step_end or pl_module.validates_after(pl_module.step):
            return
        # Not in the pause: the ranks' agreement waits for the update, and that is training.
        signum, finished = self._agree()
        due = pl_module.step % self.every_steps == 0
        if not (due or signum or finished):
            return
        pl_module.pause_clock()
        if finished:
            self.store.finish()
        if due:
            self._begin(trainer, pl_module, val_loss=None)
        self._stop_on(signum, trainer, pl_module, val_loss=None)
        pl_module.clock.resume()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, PowertrainModule)
        counters = pl_module.counters
        due = counters.step % self.every_steps == 0 or counters.step == pl_module.last_step
        if due or counters.best_step == counters.step:
            self._begin(trainer, pl_module, val_loss=counters.val_loss)
        if counters.step < pl_module.last_step:
            signum, finished = self._agree()
            if finished:
                self.store.finish()
            self._stop_on(signum, trainer, pl_module, val_loss=counters.val_loss)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.store.finish()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        # Not together: an error may be of this process alone. A second Ctrl-C waits for nothing.
        if isinstance(exception, Exception):
            self.store.settle(self.patience)

    def _begin(self, trainer: pl.Trainer, module: PowertrainModule, *, val_loss: float | None) -> None:
        if self._saved_step == module.step:
            return
        self.store.begin(
            module.step,
            collect_tensors(module, trainer.optimizers[0]),
            collect_values(module, trainer.datamodule, self.run_config),  # type: ignore[attr-defined]
            rng=capture_rng(),
            val_loss=val_loss,
        )
        self._saved_step = module.step

    def _agree(self) -> tuple[int, bool]:
        """Return the signal that a rank got (0: none), and whether a save came to its end; one collective for both."""
        signum, busy = self.ranks.max(self.signals.received or 0, int(self.store.busy))
        return signum, self.store.pending and not busy

    def _stop_on(self, signum: int, trainer: pl.Trainer, module: PowertrainModule, *, val_loss: float | None) -> None:
        if signum:
            self._begin(trainer, module, val_loss=val_loss)
            self.store.finish()
            raise TrainingInterrupted(signum, module.step)

"""What a user sees while a run trains: a live bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning.pytorch as pl
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from powertrain.training.length import amount
from powertrain.training.module import PowertrainModule


def duration(seconds: float) -> str:
    """Return a duration as 42s, 3m 05s, 2h 07m or 3d 4h."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m {seconds % 60:02d}s"
    if seconds < 86400:
        return f"{seconds // 3600}h {seconds % 3600 // 60:02d}m"
    return f"{seconds // 86400}d {seconds % 86400 // 3600}h"


class _Fields(ProgressColumn):
    """The numbers of the run, on as many columns as the terminal has."""

    def render(self, task: Task) -> Text:
        text = Text()
        for label, style in (("loss", "bold"), ("val", "bold green"), ("tok/s", "cyan"), ("left", "magenta")):
            value = task.fields.get(label)
            if value:
                text.append(f"  {label} ", style="dim")
                text.append(value, style=style)
        return text


class ProgressReport(pl.Callback):
    """Reports loss, validation loss, tokens/s and the time left of the whole run.

    Args:
        console: where to write; stderr unless given.
        every_seconds: least time between two plain lines where the console is no terminal.
    """

    def __init__(self, console: Console | None = None, every_seconds: float = 15.0) -> None:
        self.console = console or Console(file=sys.stderr)
        self.every_seconds = every_seconds
        self._bar: Progress | None = None
        self._task: Any = None
        self._quiet = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, PowertrainModule)
        self._quiet = not trainer.is_global_zero
        self._first_step = pl_module.step
        self._started = self._printed = time.monotonic()
        self._step_time: float | None = None
        if self._quiet or not self.console.is_terminal:
            return
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            TextColumn("{task.completed:.0f}/{task.total:.0f}", style="dim"),
            _Fields(table_column=Column(no_wrap=True)),
            console=self.console,
            expand=True,
        )
        self._task = self._bar.add_task("training", total=pl_module.last_step, completed=pl_module.step)
        self._bar.start()

    def _facts(self, module: PowertrainModule) -> dict[str, Any]:
        done = module.step - self._first_step
        elapsed = time.monotonic() - self._started
        facts: dict[str, Any] = {"loss": f"{module.loss:.3f}"}
        if module.counters.val_loss is not None:
            facts["val"] = f"{module.counters.val_loss:.3f}"
        tokens = done * module.schedule.length.tokens_per_step
        facts["tok/s"] = amount(module.tokens_per_second or tokens / max(elapsed, 1e-9))
        # Measured over the session, so that validations and checkpoints to come are counted at their share so far.
        facts["left"] = duration((module.last_step - module.step) * elapsed / max(1, done))
        return facts

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, PowertrainModule)
        if self._quiet or not pl_module.at_step_end:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=pl_module.step, **self._facts(pl_module))
        elif time.monotonic() - self._printed >= self.every_seconds or pl_module.step == self._first_step + 1:
            self._line(pl_module)

    def _line(self, module: PowertrainModule) -> None:
        self._printed = time.monotonic()
        facts = "  ".join(f"{label} {value}" for label, value in self._facts(module).items())
        self.console.print(f"step {module.step}/{module.last_step}  {facts}", highlight=False, soft_wrap=True)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description="validating")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, PowertrainModule)
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.update(self._task, description="training", **self._facts(pl_module))
        else:
            self._line(pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

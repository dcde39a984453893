"""The LightningModule: exact gradients over micro-batches and ranks, clipping, non-finite checks, and what is logged.

The optimizer step is the unit of truth: counters, schedule, logging, validation and checkpoints refer to the number of
finished steps, `PowertrainModule.step`. Lightning accumulates micro-batches, synchronises and steps.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from powertrain.ops.context_shard import ContextGroup
from powertrain.training.clock import Clock
from powertrain.training.config import OptimConfig, TrainerConfig
from powertrain.training.distribution import local_shards, total_norm
from powertrain.training.inputs import model_inputs, own_part
from powertrain.training.metrics import (
    IGNORE_INDEX,
    ValidationMetrics,
    bits_per_byte,
    perplexity,
    positions_in_context,
)
from powertrain.training.nonfinite import NonFiniteError, diagnose, first_fault, has_room, save_record
from powertrain.training.optim import build_optimizer
from powertrain.training.ranks import ALONE, Ranks
from powertrain.training.rng import capture_rng
from powertrain.training.schedules import Schedule


@dataclass
class Counters:
    """What a run has done so far; saved with every checkpoint."""

    step: int = 0  # finished optimizer steps, skipped updates included
    tokens: int = 0  # input tokens of those steps
    flops: float = 0.0  # algorithmic FLOPs of those steps, forward and backward
    seconds: float = 0.0  # wall-clock, restarts excluded
    skipped: int = 0  # updates skipped because something was not finite
    skipped_in_a_row: int = 0  # of those, the latest without a good one between
    val_loss: float | None = None  # of the latest validation, nats per token
    best_val_loss: float | None = None  # lowest so far
    best_step: int | None = None  # step of the lowest


class PowertrainModule(pl.LightningModule):
    """Trains a language model that follows the contract of docs/architecture.md.

    Args:
        model: takes `(input_ids, labels=, cu_seqlens=, loss_reduction=, collect_stats=)`; has `decay_parameters()`.
        schedule: the learning rate's multiplier, which also holds the length of the run.
        run_dir: where records of non-finite steps go.
        peak_flops: of one device in FLOP/s, for the MFU; None leaves it out.
        bytes_per_token: of the training text; None leaves out bits per byte where batches do not say it.
        overfit: train on the first global batch again and again.
        ranks: the processes that train together; alone unless given.
        context: those among them that share each sequence with this one.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        optim: OptimConfig,
        schedule: Schedule,
        trainer: TrainerConfig,
        run_dir: Path,
        peak_flops: float | None = None,
        bytes_per_token: float | None = None,
        overfit: bool = False,
        ranks: Ranks = ALONE,
        context: ContextGroup | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.optim = optim
        self.schedule = schedule
        self.config = trainer
        self.run_dir = run_dir
        self.peak_flops = peak_flops
        self.bytes_per_token = bytes_per_token
        self.overfit = overfit
        self.ranks = ranks
        self.context = context
        self.counters = Counters()
        self.clock = Clock()
        self.loss = float("nan")  # of the latest step, nats per token
        self.tokens_per_second: float | None = None  # since the latest training record
        self._micro_batches: list[dict[str, Tensor]] = []
        self._overfit_batches: list[dict[str, Tensor]] = []
        self._steps_since_record = 0

    # Steps

    @property
    def step(self) -> int:
        """Finished optimizer steps."""
        return self.counters.step

    @property
    def last_step(self) -> int:
        """Steps of the whole run."""
        return self.schedule.length.steps

    @property
    def at_step_end(self) -> bool:
        """True between the end of an optimizer step and the next micro-batch."""
        return not self._micro_batches

    def validates_after(self, step: int) -> bool:
        """Whether a validation follows the step that made the count `step`."""
        return step % self.config.val_every_steps == 0 or step == self.last_step

    def _records_after(self, step: int) -> bool:
        return step % self.config.log_every_steps == 0 or step == self.last_step

    def on_fit_start(self) -> None:
        # Ranks that accumulate differently would wait for each other for ever.
        counts = self.ranks.gather(self.trainer.accumulate_grad_batches)
        if len(set(counts)) > 1:
            raise ValueError(f"ranks chose different numbers of micro-batches {counts}: set trainer.micro_batch_size")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return build_optimizer(self.model, self.optim)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the micro-batch's share of the step's loss; see `configure_gradient_clipping` for the rest."""
        micro = batch_idx % self.trainer.accumulate_grad_batches
        if self.overfit:
            if len(self._overfit_batches) <= micro:
                self._overfit_batches.append(batch)
            batch = self._overfit_batches[micro]
        if micro == 0:
            # loss sum, labels, bytes of labels; fp64 on CUDA costs nothing here, and counts stay exact.
            self._sums = torch.zeros(3, dtype=torch.float64, device=batch["labels"].device)
            self._rng = capture_rng()
        self._micro_batches.append(batch)
        last = micro == self.trainer.accumulate_grad_batches - 1
        inputs = model_inputs(batch, self.context)
        collect_stats = last and self._records_after(self.step + 1)
        output = self.model(**inputs, loss_reduction="sum", collect_stats=collect_stats)
        self._stats = output.stats
        valid = (inputs["labels"] != IGNORE_INDEX).sum()
        parts = [output.loss.detach(), valid]
        if "label_bytes" in batch:
            parts.append(own_part(batch["label_bytes"], inputs).sum())
        self._sums[: len(parts)] += torch.stack([part.double() for part in parts])
        # Divided by the number of tokens that a full micro-batch has, so that micro-batches weigh by their labels;
        # Lightning divides by the number of micro-batches, and DDP and FSDP by that of ranks, of which those that share
        # sequences add up to one.
        return output.loss / (batch["labels"].numel() / (1 if self.context is None else self.context.size))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        lr = self.optim.lr * self.schedule.multiplier(self.step)
        for group in optimizer.param_groups:
            group["lr"] = lr

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Make the accumulated gradient that of the mean over all labels of the step, check it, and clip its norm."""
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = total_norm(gradients)
        sums = self._sums
        if self.trainer.world_size > 1:
            sums = self.trainer.strategy.reduce(sums, reduce_op="sum")
        # A process alone waits for the device only here; several do so again where they agree after the update, see
        # `Checkpointing`.
        loss_sum, labels, label_bytes, norm_value = torch.cat([sums, norm.double().reshape(1)]).tolist()
        finite = all(value - value == 0.0 for value in (loss_sum, norm_value))
        # Exactly 1 where every token has a label.
        scale = self.schedule.length.tokens_per_step / max(1.0, labels)
        self.loss = loss_sum / max(1.0, labels)
        self._label_bytes = label_bytes / max(1.0, labels)
        self._grad_norm = norm_value * scale
        if not finite:
            self._reject(optimizer)
            return
        self.counters.skipped_in_a_row = 0
        if self.config.grad_clip is not None:
            scale *= min(1.0, self.config.grad_clip / (self._grad_norm + 1e-6))
        if scale != 1.0:
            torch._foreach_mul_(local_shards(gradients), scale)

    def _reject(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep what replays the step, then stop, or empty the gradients so that the update changes nothing."""
        number = self.step + 1
        optimizer.zero_grad(set_to_none=True)
        # All ranks do the same and come to one answer, of whichever of them it began on, if that is known.
        rank, diagnosis = first_fault(
            self.ranks.gather(diagnose(self.model, self._micro_batches, self.config.precision, self.context))
        )
        config = getattr(self.model, "config", None)
        directory = self.run_dir / "nonfinite" / f"step-{number:08d}"
        kept = self.ranks.broadcast(has_room(directory))
        if kept:
            save_record(
                directory,
                self.ranks.rank,
                model=self.model,
                model_config=dataclasses.asdict(config) if dataclasses.is_dataclass(config) else None,  # type: ignore[arg-type]
                micro_batches=self._micro_batches,
                rng=self._rng,
                step=number,
                precision=self.config.precision,
                diagnosis=diagnosis,
            )
        self.counters.skipped += 1
        self.counters.skipped_in_a_row += 1
        what = "loss" if self.loss - self.loss != 0.0 else "gradient"
        if self.ranks.size == 1:
            rank, on = 0, ""
        else:
            on = "" if rank is None else f" on rank {rank}"
        record = directory / (f"rank-{rank}.pt" if rank is not None else "rank-*.pt")
        where = f"; replay it from {record}" if kept else ""
        sentence = f"step {number}: the {what} is not finite{on}: {diagnosis}; the update was not made{where}"
        if self.config.nonfinite == "stop":
            raise NonFiniteError(sentence)
        if self.counters.skipped_in_a_row >= self.config.nonfinite_patience:
            raise NonFiniteError(
                f"{sentence}; {self.counters.skipped_in_a_row} updates in a row were skipped"
                f" (trainer.nonfinite_patience={self.config.nonfinite_patience})"
            )
        self.print(sentence)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self._micro_batches = []
        counters, length = self.counters, self.schedule.length
        counters.step += 1
        counters.tokens = counters.step * length.tokens_per_step
        counters.flops = counters.step * length.flops_per_step
        self._steps_since_record += 1
        if self._records_after(counters.step):
            self._record_training()
        if counters.step == self.last_step:
            # Makes Lightning validate after this step, whatever the interval, and end.
            self.trainer.should_stop = True

    # Records

    def record(self, metrics: dict[str, float]) -> None:
        """Give metrics with the counters to every logger, under the current step."""
        counters = {
            "tokens": self.counters.tokens,
            "flops": self.counters.flops,
            "seconds": self.clock.seconds,
        }
        for logger in self.trainer.loggers:
            logger.log_metrics({**counters, **metrics}, step=self.step)

    def _record_training(self) -> None:
        seconds = self.clock.lap()
        length = self.schedule.length
        self.tokens_per_second = self._steps_since_record * length.tokens_per_step / seconds
        self._steps_since_record = 0
        metrics = {
            "train/loss": self.loss,
            "train/perplexity": perplexity(self.loss),
            "train/grad_norm": self._grad_norm,
            "train/lr": self.optim.lr * self.schedule.multiplier(self.step - 1),
            "train/tokens_per_second": self.tokens_per_second,
        }
        bytes_per_token = self._label_bytes or self.bytes_per_token
        if bytes_per_token:
            metrics["train/bits_per_byte"] = bits_per_byte(self.loss, bytes_per_token)
        if self.peak_flops:
            rate = self.tokens_per_second * length.flops_per_token
            metrics["train/mfu"] = rate / (self.peak_flops * self.trainer.world_size)
        if self.counters.skipped:
            metrics["train/skipped_updates"] = float(self.counters.skipped)
        if self._stats:
            values = torch.stack([value.detach().float() for value in self._stats.values()]).tolist()
            metrics.update(zip(self._stats, values, strict=True))
        self.record(metrics)

    def pause_clock(self) -> None:
        """Leave out of training time what follows, but not the work that the device has still to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.clock.pause()

    # Validation

    def on_validation_start(self) -> None:
        self.pause_clock()

    def on_validation_epoch_start(self) -> None:
        self._validation = ValidationMetrics(self.config.context_length, self.device)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        labels = batch["labels"]
        inputs = model_inputs(batch, self.context)
        output = self.model(**inputs, loss_reduction="none")
        cu_seqlens = batch.get("cu_seqlens")
        if cu_seqlens is None:
            cu_seqlens = torch.arange(0, labels.numel() + 1, labels.shape[1], device=labels.device)
        positions = own_part(positions_in_context(cu_seqlens, labels.numel()).view_as(labels), inputs)
        label_bytes = own_part(batch["label_bytes"], inputs) if "label_bytes" in batch else None
        self._validation.update(output.loss, inputs["labels"], positions, label_bytes)

    def on_validation_epoch_end(self) -> None:
        if self.trainer.world_size > 1:
            self._validation.sums = self.trainer.strategy.reduce(self._validation.sums, reduce_op="sum")
        metrics = self._validation.compute(self.bytes_per_token)
        counters = self.counters
        counters.val_loss = metrics["val/loss"]
        # Never of NaN, below which nothing would be.
        if counters.val_loss < (math.inf if counters.best_val_loss is None else counters.best_val_loss):
            counters.best_val_loss, counters.best_step = counters.val_loss, counters.step
        self.record(metrics)

    def on_validation_end(self) -> None:
        self.clock.resume()

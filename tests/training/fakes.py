"""A tiny model and datamodule under the contracts of docs/architecture.md, and a tiny run of them."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from powertrain.training.checkpoint import Checkpoint
from powertrain.training.config import (
    DebugConfig,
    LoggerConfig,
    OptimConfig,
    ScheduleConfig,
    TrainerConfig,
)
from powertrain.training.fit import FitResult, fit
from powertrain.training.length import TrainingLength

VOCAB = 64
CONTEXT = 64


class Output(NamedTuple):
    loss: Tensor | None
    logits: Tensor | None
    stats: dict[str, Tensor]


class TinyModel(nn.Module):
    """Embedding, two residual layers with dropout (so that the random state matters), head."""

    def __init__(self, d_model: int = 32, dropout: float = 0.1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, d_model)
        self.blocks = nn.ModuleList(nn.Linear(d_model, d_model) for _ in range(2))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(d_model, VOCAB, bias=False)

    def decay_parameters(self) -> frozenset[str]:
        return frozenset(name for name, p in self.named_parameters() if p.ndim == 2 and "embedding" not in name)

    def forward(
        self,
        input_ids: Tensor,
        *,
        labels: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        loss_reduction: str = "mean",
        collect_stats: bool = False,
    ) -> Output:
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = x + self.dropout(torch.tanh(block(x)))
        logits = self.head(x)
        stats = {"power/gate_half_life/0": x.detach().float().abs().mean()} if collect_stats else {}
        if labels is None:
            return Output(None, logits, stats)
        loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction=loss_reduction)
        return Output(loss.view_as(labels) if loss_reduction == "none" else loss, None, stats)


def make_batch(first_sample: int, rows: int, ignore: float = 0.2) -> dict[str, Tensor]:
    """Rows that are a function of their sample number; about a share `ignore` of labels is ignored, unequally."""
    tokens, labels = [], []
    for sample in range(first_sample, first_sample + rows):
        generator = torch.Generator().manual_seed(sample)
        row = torch.randint(0, VOCAB // 4, (CONTEXT + 1,), generator=generator) * 3
        row[1::2] = (row[:-1:2] + 1) % VOCAB
        mask = torch.rand(CONTEXT, generator=generator) < ignore * 2 * torch.rand((), generator=generator)
        tokens.append(row[:-1])
        labels.append(row[1:].masked_fill(mask, -100))
    offsets = torch.arange(0, rows * CONTEXT + 1, CONTEXT, dtype=torch.int32)
    return {"input_ids": torch.stack(tokens), "labels": torch.stack(labels), "cu_seqlens": offsets}


class Samples(IterableDataset):
    def __init__(self, data: FakeData, start: int) -> None:
        self.data, self.start = data, start

    def __iter__(self) -> Any:
        data = self.data
        rank, world = data.ranks
        index = 0
        while True:
            yield make_batch(self.start + (index * world + rank) * data.micro_batch_size, data.micro_batch_size)
            index += 1


class FakeData(pl.LightningDataModule):
    """Training samples numbered without end; a validation split of 8 rows with its bytes."""

    bytes_per_token = 2.0

    def __init__(self) -> None:
        super().__init__()
        self.micro_batch_size = 1
        self.global_batch_size = 4
        self.start = 0
        self.before = 0
        self._ranks: tuple[int, int] | None = None

    def set_ranks(self, rank: int, world_size: int) -> None:
        self._ranks = (rank, world_size)

    @property
    def ranks(self) -> tuple[int, int]:
        if self._ranks is not None:
            return self._ranks
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Samples(self, self.start), batch_size=None)

    def val_dataloader(self) -> DataLoader:
        batches = [make_batch(10**6 + i * 2, 2) for i in range(4)]
        for batch in batches:
            batch["label_bytes"] = torch.full_like(batch["labels"], 3, dtype=torch.int32)
        return DataLoader(batches, batch_size=None)

    def state_dict(self) -> dict[str, Any]:
        assert self.trainer is not None
        micro = self.trainer.fit_loop.epoch_loop.batch_progress.total.processed
        return {"consumed_samples": self.start + micro * self.micro_batch_size * self.ranks[1]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.start = state_dict["consumed_samples"]


def saved_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint, whole; everything that is saved of a run is fp32."""
    opened = Checkpoint(checkpoint)
    tensors = {name: torch.empty(shape) for name, shape in opened.shapes.items()}
    opened.read_into(tensors)
    return tensors


@contextlib.contextmanager
def locked_by_another(run_dir: Path) -> Iterator[None]:
    """Lock a run directory as another process does."""
    with (run_dir / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.write("process 9 on elsewhere\n")
        file.flush()
        yield


def run_tiny(
    run_dir: Path,
    *,
    steps: int = 10,
    model: nn.Module | None = None,
    data: pl.LightningDataModule | None = None,
    schedule: ScheduleConfig | None = None,
    logger: LoggerConfig | None = None,
    debug: DebugConfig | None = None,
    callbacks: list[pl.Callback] | None = None,
    **trainer: Any,
) -> FitResult:
    """Train the tiny model for `steps` steps of 4 sequences of 64 tokens, in micro-batches of 2."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "max_steps": steps,
        "context_length": CONTEXT,
        "global_batch_tokens": 4 * CONTEXT,
        "micro_batch_size": 2,
        "precision": "32-true",
        "accelerator": "cpu",
        "val_every_steps": 4,
        "log_every_steps": 1,
        "checkpoint_every_steps": 2,
    }
    config = TrainerConfig(**{**settings, **trainer})
    return fit(
        TinyModel() if model is None else model,
        FakeData() if data is None else data,
        optim=OptimConfig(lr=1e-2),
        schedule=schedule or ScheduleConfig(),
        trainer=config,
        length=TrainingLength(steps, config.global_batch_tokens, 1000.0, "test"),
        run_dir=run_dir,
        run_id=run_dir.name,
        logger=logger,
        debug=debug,
        run_config={"seed": 0},
        callbacks=callbacks,
    )

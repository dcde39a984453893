"""A catalog and an executor without models: cells cost what a formula says and lose what a law says, instantly."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

from powertrain.config import RunConfig
from powertrain.data.config import DataConfig
from powertrain.models.config import MixerConfig, ModelConfig
from powertrain.scaling.cells import Cell, Cost
from powertrain.scaling.records import CellRecord
from powertrain.training.config import TrainerConfig

from .synthetic import LAWS, SIZES, flops_per_token


class FakeCatalog:
    """Sizes and costs of `synthetic`, configurations that differ as real ones do."""

    def config(self, mixer: str, size: str, context: int) -> RunConfig:
        width = 64 + 8 * list(SIZES).index(size)
        # Heads that kernels take.
        model = ModelConfig(d_model=width, head_dim=32, vocab_size=256, mixer=MixerConfig(kind=mixer))
        return RunConfig(model=model, data=DataConfig(), trainer=TrainerConfig(context_length=context,
                         global_batch_tokens=context))  # fmt: skip

    def cost(self, mixer: str, size: str, context: int) -> Cost:
        n = SIZES[size]
        return Cost(flops_per_token(mixer, n), {"weights": 6 * n}, n, n + 1e5, 0.0)  # type: ignore[arg-type]


class FakeExecutor:
    """Returns a record that is a function of the cell alone, after `work(cell)`."""

    def __init__(self, work: Callable[[Cell], None] | float = 0.0) -> None:
        self.work = work
        self.ran: list[str] = []

    def run(self, cell: Cell) -> CellRecord:
        self.ran.append(cell.id)
        if callable(self.work):
            self.work(cell)
        else:
            time.sleep(self.work)
        return fake_record(cell)

    def recorded(self, cell: Cell) -> None:
        pass


def fake_record(cell: Cell) -> CellRecord:
    """The record of a cell: its law, a best learning-rate factor of 1, and a shift by seed."""
    loss = float(LAWS[cell.mixer](cell.cost.parameters, cell.tokens))
    loss += 0.05 * abs(cell.learning_rate_factor - 1.0) + 0.001 * cell.seed
    return CellRecord(
        cell=cell.id,
        sweep=cell.config.name,
        mixer=cell.mixer,
        size=cell.size,
        context=cell.context,
        budget=cell.budget,
        seed=cell.seed,
        learning_rate=cell.learning_rate,
        learning_rate_factor=cell.learning_rate_factor,
        batch_tokens=cell.batch_tokens,
        steps=cell.steps,
        tokens=cell.tokens,
        parameters=cell.cost.parameters,
        parameters_total=cell.cost.parameters_total,
        flops_per_token=dict(cell.cost.flops_per_token),
        flops_by_part=dict(cell.cost.flops_by_part),
        loss=loss,
        seconds=1.0,
        device="fake",
    )


def replace(cell: Cell, **changes: object) -> Cell:
    """Return a cell with some fields changed."""
    return dataclasses.replace(cell, **changes)  # type: ignore[arg-type]

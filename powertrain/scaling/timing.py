"""`powertrain sweep time`: how fast each mixer's winners train when they have the device to themselves.

A sweep fills a device best with several runners at once, whose clocks then say little about a mixer. Its speed is
measured apart: the same training for a few dozen steps, alone.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import statistics
import tempfile
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from powertrain.files import write_file
from powertrain.scaling.compare import compared, select
from powertrain.scaling.records import CellRecord, Place
from powertrain.scaling.resample import resample
from powertrain.schema import ConfigError, build
from powertrain.training.config import BudgetConfig

if TYPE_CHECKING:
    from powertrain.scaling.cells import Cell
    from powertrain.scaling.run import SweepState

# Steps between two readings; the first readings hold the start of everything and are left out.
READING_STEPS, SKIPPED_READINGS, READINGS = 8, 2, 6

Key = tuple[str, str, int, int, str, int]  # mixer, size, context, tokens of a step, device, number of devices


@dataclass(frozen=True)
class Timing:
    """The measured speed of one mixer and size on one kind of device."""

    mixer: str  # key in the recipe
    size: str  # key in the recipe
    context: int
    batch_tokens: int
    device: str
    devices: int
    tokens_per_second: float  # of all devices together; median of the readings
    readings: tuple[float, ...]  # tokens per second, in their order
    environment: dict[str, str]  # versions, commit

    def __post_init__(self) -> None:
        for name in ("tokens_per_second", "devices", "batch_tokens"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name):g} must be a number above 0")

    @property
    def key(self) -> Key:
        """What a timing and the records it speaks for have in common."""
        return self.mixer, self.size, self.context, self.batch_tokens, self.device, self.devices

    @property
    def name(self) -> str:
        """The name of its file."""
        device = re.sub(r"[^A-Za-z0-9]+", "-", self.device).strip("-")
        parts = (self.mixer, self.size, self.context, self.batch_tokens, self.devices, device)
        return "-".join(str(part).replace(" ", "_") for part in parts)


def key_of(record: CellRecord) -> Key:
    """Return the key of the timing that speaks for a record."""
    return record.mixer, record.size, record.context, record.batch_tokens, record.device, record.devices


def read(directory: Path) -> list[Timing]:
    """Return all timings of a sweep, in the order of their names.

    Errors:
        ConfigError: names the file that cannot be read.
    """
    timings = []
    for path in sorted(directory.glob("*.json")):
        try:
            timings.append(build(Timing, json.loads(path.read_text(encoding="utf-8"))))
        except ValueError as error:
            raise ConfigError(f"{path}: {error}") from error
    return timings


def write(directory: Path, timing: Timing) -> Path:
    """Write a timing, in the place of an earlier one of the same key."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{timing.name}.json"
    write_file(path, json.dumps(dataclasses.asdict(timing), indent=1, sort_keys=True) + "\n")
    return path


def with_timings(records: Iterable[CellRecord], timings: Iterable[Timing]) -> list[CellRecord]:
    """Return the records, their seconds those of the timings where there is one.

    Without one, a record keeps its own seconds if it had the device to itself, else it has none.
    """
    speeds = {t.key: t.devices / t.tokens_per_second for t in timings}
    timed = []
    for r in records:
        speed = speeds.get(key_of(r))
        seconds = r.tokens * speed if speed is not None else r.seconds if r.runners == 1 else None
        timed.append(dataclasses.replace(r, seconds=seconds))
    return timed


def winners(records: Sequence[CellRecord], asked: Mapping[Place, Set[str]]) -> list[CellRecord]:
    """Return a record of each configuration that the report selects, one for each mixer, size and context.

    Args:
        asked: see `plan.asked_for`.
    """
    used = compared(records, asked)
    found: dict[Key, CellRecord] = {}
    for context in sorted({r.context for r in used}):
        # Replicates make intervals, which a choice does not need.
        chosen = select(resample([r for r in used if r.context == context], replicates=1))
        for _, point in sorted(chosen.items()):
            found.setdefault(key_of(point.first), point.first)
    return list(found.values())


def measure(cell: Cell, directory: Path) -> Timing:
    """Train a cell for a few dozen steps in a temporary directory below `directory`, and return how fast it went."""
    import torch

    from powertrain.scaling.execute import device_name, environment_of
    from powertrain.train import run
    from powertrain.training.batching import resolve_devices
    from powertrain.training.records import read_metrics
    from powertrain.training.signals import Stopped

    steps = READING_STEPS * (SKIPPED_READINGS + READINGS)
    devices = resolve_devices(cell.config.trainer)
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix="timing-") as place:
        config = dataclasses.replace(
            cell.config,
            run_id="timing",
            schedule=dataclasses.replace(cell.config.schedule, kind="constant"),
            budget=BudgetConfig(kind="steps", value=steps),
            trainer=dataclasses.replace(cell.config.trainer, log_every_steps=READING_STEPS),
            data=dataclasses.replace(cell.config.data, max_val_tokens=cell.context),
            paths=dataclasses.replace(cell.config.paths, runs=place),
            # All timings have one run id.
            logger=dataclasses.replace(cell.config.logger, wandb=False),
        )
        result = run(config, command="powertrain sweep time")
        if result.fit.interrupted_by is not None:
            # Too few readings, and whoever sent the signal wants no further ones.
            raise Stopped(result.fit.interrupted_by)
        readings = [
            float(r["train/tokens_per_second"])
            for r in read_metrics(result.run_dir)
            if r.get("train/tokens_per_second") is not None
        ][SKIPPED_READINGS:]
        environment = environment_of(result.run_dir)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return Timing(
        mixer=cell.mixer,
        size=cell.size,
        context=cell.context,
        batch_tokens=cell.batch_tokens,
        device=device_name(devices.torch_device),
        devices=devices.world_size,
        tokens_per_second=statistics.median(readings),
        readings=tuple(readings),
        environment=environment,
    )


def run_timings(state: SweepState, directory: Path, log: Path, say: Any) -> list[Timing]:
    """Measure what is missing: every configuration that the report selects, on the device of this machine.

    A timing of another commit or other versions counts as missing, and is replaced. Edits without a commit all look
    alike: what was measured between two of them stays.

    Args:
        directory: of the timings.
        log: where the trainings print to.
        say: told one line for each.
    """
    from powertrain.scaling.cells import make_cell
    from powertrain.scaling.execute import device_name, environment_here, printing_to
    from powertrain.scaling.plan import asked_for, coverage
    from powertrain.training.batching import resolve_devices

    environment = environment_here()
    known = {t.key for t in read(directory) if t.environment == environment}
    made = []
    records = state.records()
    asked = asked_for(coverage(state.recipe, state.expand(), state.store.finished()))
    for record in winners(records, asked):
        factors = record.learning_rate_factor, record.batch_factor
        cell = make_cell(
            state.recipe, state.catalog, record.mixer, record.size, record.context, record.budget, record.seed, *factors
        )
        devices = resolve_devices(cell.config.trainer)
        here = (*key_of(record)[:4], device_name(devices.torch_device), devices.world_size)
        if here in known:
            continue
        known.add(here)
        with printing_to(log):
            timing = measure(cell, state.paths.root)
        write(directory, timing)
        say(f"{timing.mixer} {timing.size}: {timing.tokens_per_second:.4g} tokens per second on {timing.device}")
        made.append(timing)
    return made

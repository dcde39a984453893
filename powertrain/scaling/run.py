"""`powertrain sweep run`: execute what is missing, beside any number of other runners of the same sweep."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from powertrain.config import RunConfig
from powertrain.files import write_file
from powertrain.scaling.cells import Catalog, Cell, Expander, Expansion
from powertrain.scaling.claims import LEASE_SECONDS, Claims
from powertrain.scaling.recipe import Recipe
from powertrain.scaling.records import CellRecord, RecordStore
from powertrain.schema import ConfigError


class Interrupted(Exception):
    """A signal ended the training of a cell early; it resumes when the sweep is run again."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"signal {signum}")
        self.signum = signum


class Executor(Protocol):
    """What turns a cell into a record; resumes where an earlier attempt stopped."""

    def run(self, cell: Cell) -> CellRecord:
        """Train and evaluate one cell.

        Errors:
            Interrupted: a signal asked to stop.
            Exception: anything else is the cell's failure, and not the sweep's.
        """

    def recorded(self, cell: Cell) -> None:
        """Be told that the record of a cell is kept, and what its training left is needed no longer."""


@dataclass(frozen=True)
class SweepPaths:
    """Where a sweep lives."""

    root: Path

    @property
    def records(self) -> Path:
        """One file per finished cell; what one commits."""
        return self.root / "records"

    @property
    def timings(self) -> Path:
        """One file per mixer and size that was timed alone; committed as the records are."""
        return self.root / "timings"

    @property
    def claims(self) -> Path:
        """Who runs what."""
        return self.root / "claims"

    @property
    def failures(self) -> Path:
        """Why cells failed."""
        return self.root / "failures"

    @property
    def runs(self) -> Path:
        """Run directories of trunks and cells."""
        return self.root / "runs"

    @property
    def logs(self) -> Path:
        """What trainings print."""
        return self.root / "logs"

    @property
    def report(self) -> Path:
        """Page, figures and table."""
        return self.root / "report"


class Failures:
    """Failed cells: `<cell>.json` with the error; removed to try again."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def ids(self) -> set[str]:
        """Return the ids of failed cells."""
        return {path.stem for path in self.directory.glob("*.json")}

    def add(self, cell: Cell, error: BaseException) -> None:
        """Keep why a cell failed."""
        self.directory.mkdir(parents=True, exist_ok=True)
        text = "".join(traceback.format_exception(error))
        content = {"cell": cell.id, "error": f"{type(error).__name__}: {error}", "traceback": text}
        write_file(self.directory / f"{cell.id}.json", json.dumps(content, indent=1) + "\n")

    def message(self, cell: str) -> str:
        """Return one line on why a cell failed.

        Errors:
            ConfigError: names the file that cannot be read.
        """
        path = self.directory / f"{cell}.json"
        try:
            return str(json.loads(path.read_text())["error"]).splitlines()[0]
        except (ValueError, LookupError, TypeError) as error:
            raise ConfigError(f"{path}: does not say why the cell failed; --retry-failed removes it") from error

    def forget(self, cells: Iterable[str]) -> None:
        """Remove failures, so that these cells are tried again."""
        for cell in cells:
            (self.directory / f"{cell}.json").unlink(missing_ok=True)


@dataclass
class SweepState:
    """A sweep as its directory shows it."""

    recipe: Recipe
    catalog: Catalog
    paths: SweepPaths
    lease_seconds: float = LEASE_SECONDS
    store: RecordStore = field(init=False)
    failures: Failures = field(init=False)
    claims: Claims = field(init=False)

    def __post_init__(self) -> None:
        self.store = RecordStore(self.paths.records)
        self.failures = Failures(self.paths.failures)
        self.claims = Claims(self.paths.claims, self.lease_seconds)
        self._losses: dict[str, float] = {}
        self._made: dict[tuple, Cell] = {}

    def outcomes(self) -> dict[str, float]:
        """Return the loss of every finished cell; a record is read once, because it never changes."""
        new = self.store.finished() - self._losses.keys()
        if new:
            self._losses.update((cell, self.store.read_one(cell).loss) for cell in new)
        return dict(self._losses)

    def records(self) -> list[CellRecord]:
        """Return all records, ordered by cell id; `outcomes` then need not read them."""
        records = self.store.read()
        self._losses.update((record.cell, record.loss) for record in records)
        return records

    def expand(self) -> Expansion:
        """Return the cells that the recipe and the results so far amount to."""
        failed = self.failures.ids()
        return Expander(self.recipe, self.catalog, self.outcomes(), failed, self._made).expand()

    def shared_config(self) -> RunConfig:
        """Return a configuration that stands for all cells in what they share: data and devices."""
        recipe = self.recipe
        return self.catalog.config(next(iter(recipe.mixers)), next(iter(recipe.ladder)), recipe.contexts[0])

    def failed(self, expansion: Expansion) -> set[str]:
        """Return the cells of the recipe that failed and are not finished.

        Failures may be of other cells, of a recipe that has changed, or from before another runner finished the cell.
        """
        return self.failures.ids() & {c.id for c in expansion.cells} - self.store.finished()

    def trunk_steps(self, expansion: Expansion) -> dict[str, int]:
        """Return the newest checkpoint of each trunk that this directory has; records may have come without theirs."""
        from powertrain.training.checkpoint import CheckpointStore

        steps = {
            t: CheckpointStore(self.paths.runs / t / "checkpoints").steps() for t in {c.trunk for c in expansion.cells}
        }
        return {trunk: max(there) for trunk, there in steps.items() if there}

    def missing(self, expansion: Expansion) -> dict[str, list[Cell]]:
        """Return the cells that are neither finished nor failed, by trunk, each trunk's smallest budget first."""
        settled = self.store.finished() | self.failures.ids()
        trunks: dict[str, list[Cell]] = {}
        for cell in expansion.cells:
            if cell.id not in settled:
                trunks.setdefault(cell.trunk, []).append(cell)
        return {trunk: sorted(cells, key=lambda c: c.steps) for trunk, cells in trunks.items()}


@dataclass
class Outcome:
    """What one runner did."""

    finished: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    interrupted_by: int | None = None


def run(
    state: SweepState,
    executor: Executor,
    *,
    stop: Callable[[], bool] = lambda: False,
    wait: Callable[[float], None] | None = None,
    poll_seconds: float = 5.0,
    on_start: Callable[[Cell], None] = lambda cell: None,
    on_end: Callable[[Cell, BaseException | None], None] = lambda cell, error: None,
) -> Outcome:
    """Execute missing cells until none is left that this runner could do.

    Cells of one trunk run in one claim, smallest budget first, so that each branches off where the one before left the
    trunk. After every trunk the recipe is expanded again: results decide later stages.

    Args:
        stop: asked between cells; True ends the runner without starting another.
        wait: called while all missing cells are claimed by others; None ends the runner instead.
        on_start, on_end: told about each cell; the error is that of a failed cell.
    """
    outcome = Outcome()
    while not stop():
        missing = state.missing(state.expand())
        if not missing:
            return outcome
        worked = False
        for trunk, cells in missing.items():
            if stop():
                return outcome
            claim = state.claims.take(trunk)
            if claim is None:
                continue
            with claim:
                for cell in cells:
                    # Another runner may have finished it between the listing and the claim.
                    if cell.id in state.store or cell.id in state.failures.ids():
                        continue
                    if stop():
                        return outcome
                    worked = True
                    on_start(cell)
                    try:
                        record = executor.run(cell)
                        assert record.cell == cell.id, f"the record of {record.cell} came from cell {cell.id}"
                        state.store.append(record)
                        executor.recorded(cell)
                    except Interrupted as interrupted:
                        on_end(cell, interrupted)
                        outcome.interrupted_by = interrupted.signum
                        return outcome
                    except Exception as error:
                        state.failures.add(cell, error)
                        outcome.failed.append(cell.id)
                        on_end(cell, error)
                        continue
                    outcome.finished.append(cell.id)
                    on_end(cell, None)
            if worked:
                break
        if not worked:
            if wait is None:
                return outcome
            wait(poll_seconds)
    return outcome

"""A sweep's plan: every cell with its steps, tokens, FLOPs by part and estimated time, and how much of it there is."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from powertrain.scaling.cells import Cell, Expansion
from powertrain.scaling.pricing import Device, Estimate, Pricer
from powertrain.scaling.recipe import Recipe
from powertrain.scaling.records import CellRecord, Place
from powertrain.scaling.timing import Timing
from powertrain.wording import counted


@dataclass(frozen=True)
class Plan:
    """A sweep's cells with their estimates, and what the whole costs."""

    expansion: Expansion
    estimates: dict[str, Estimate]
    finished: frozenset[str]
    device: Device
    chosen: str = ""  # why this device, unless somebody asked for it

    @property
    def hours(self) -> float | None:
        """Device-hours of all cells not finished, pending ones at most, without `unpriced`; None where that is all."""
        seconds = [self.estimates[cell.id].seconds for cell in self.remaining]
        known = [s for s in seconds if s is not None]
        return sum(known) / 3600 if known or not seconds else None

    @property
    def unpriced(self) -> list[Cell]:
        """Cells that would run, but whose time is not known."""
        return [cell for cell in self.remaining if self.estimates[cell.id].seconds is None]

    @property
    def remaining(self) -> list[Cell]:
        """Cells that would run, candidates of pending stages included."""
        cells = {c.id: c for c in self.expansion.cells if c.id not in self.finished}
        for pending in self.expansion.pending:
            for c in pending.candidates:
                if c.id not in self.finished:
                    cells.setdefault(c.id, c)
        return list(cells.values())


def make_plan(
    expansion: Expansion,
    device: Device,
    records: Sequence[CellRecord] = (),
    finished: Iterable[str] = (),
    timings: Iterable[Timing] = (),
    chosen: str = "",
    trunk_steps: Mapping[str, int] | None = None,
) -> Plan:
    """Price an expansion on a device; `trunk_steps` as in `Pricer.estimate`."""
    done = frozenset(finished)
    candidates = [c for p in expansion.pending for c in p.candidates]
    cells = {c.id: c for c in [*expansion.cells, *candidates]}
    estimates = Pricer(device, records, timings).estimate(list(cells.values()), done, trunk_steps)
    return Plan(expansion, estimates, done, device, chosen)


@dataclass(frozen=True)
class Coverage:
    """How much of what a recipe asks for at one budget there is."""

    context: int
    budget: float
    mixer: str
    cells: frozenset[str]  # decided so far, finished and failed ones included
    finished: int
    failed: int
    later: int  # further cells at most, which await results

    @property
    def planned(self) -> int:
        """Number of cells decided so far."""
        return len(self.cells)

    @property
    def place(self) -> Place:
        """What it is about."""
        return self.context, self.budget, self.mixer

    @property
    def complete(self) -> bool:
        """Whether every cell is finished and none is to come."""
        return self.finished == self.planned and not self.later

    def __str__(self) -> str:
        text = f"{self.finished} of {counted(self.planned, 'cell')}" if self.planned else "nothing yet"
        failed = f", {self.failed} failed" if self.failed else ""
        return text + failed + (f", at most {self.later} more once these are known" if self.later else "")


def coverage(
    recipe: Recipe, expansion: Expansion, finished: Set[str], failed: Set[str] = frozenset()
) -> list[Coverage]:
    """Return one entry for each context, budget and mixer that has or will have cells, in the recipe's order."""
    result = []
    for context, budget, mixer in itertools.product(recipe.contexts, recipe.budgets, recipe.mixers):
        place = context, budget, mixer
        cells = {c.id for c in expansion.cells if (c.context, c.budget, c.mixer) == place}
        later = {
            c.id
            for pending in expansion.pending
            if (pending.context, pending.budget, pending.mixer) == place
            for c in pending.candidates
        } - cells
        if cells or later:
            counts = len(cells & finished), len(cells & failed), len(later)
            result.append(Coverage(*place, frozenset(cells), *counts))
    return result


def asked_for(parts: Iterable[Coverage]) -> dict[Place, frozenset[str]]:
    """Return the ids of the cells that a recipe asks for at every place that it has, as far as they are decided."""
    return {part.place: part.cells for part in parts}


def as_rows(plan: Plan) -> list[dict[str, Any]]:
    """Return one plain mapping per cell, for JSON."""
    rows = []
    decided = {c.id for c in plan.expansion.cells}
    cells = {c.id: c for c in plan.expansion.cells}
    cells.update({c.id: c for p in plan.expansion.pending for c in p.candidates if c.id not in decided})
    for cell in cells.values():
        estimate = plan.estimates[cell.id]
        state = "finished" if cell.id in plan.finished else "planned" if cell.id in decided else "at most"
        rows.append(
            {
                "cell": cell.id,
                "state": state,
                "trunk": cell.trunk,
                "mixer": cell.mixer,
                "size": cell.size,
                "context": cell.context,
                "budget": cell.budget,
                "seed": cell.seed,
                "learning_rate": cell.learning_rate,
                "batch_tokens": cell.batch_tokens,
                "steps": cell.steps,
                "new_steps": estimate.new_steps,
                "tokens": cell.tokens,
                "parameters": cell.cost.parameters,
                "flops": {c: f * cell.tokens for c, f in cell.cost.flops_per_token.items()},
                "flops_by_part": {part: f * cell.tokens for part, f in cell.cost.flops_by_part.items()},
                "device": plan.device.name,
                "seconds": estimate.seconds,
                "basis": estimate.basis,
                "measured_rate": estimate.measured,
            }
        )
    return rows

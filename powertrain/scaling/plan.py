"""`powertrain sweep plan`: every cell with its steps, tokens, FLOPs by part and estimated time; no GPU, in seconds."""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Literal

from powertrain.scaling.cells import Cell, Expansion
from powertrain.scaling.recipe import Recipe
from powertrain.scaling.records import CellRecord
from powertrain.scaling.timing import Timing, with_timings
from powertrain.schema import ConfigError

# Memory of one device in GiB as its driver reports it, by parts of its name; the first that is contained counts.
MEMORY_GIB = (
    ("B200", 178.0),
    ("H200", 139.0),
    ("H100 NVL", 93.0),
    ("H100", 79.0),
    ("A100-SXM4-40GB", 39.0),
    ("A100-PCIE-40GB", 39.0),
    ("A100", 79.0),
    ("L40S", 44.0),
    ("L40", 44.0),
    ("A40", 44.0),
    ("L4", 22.0),
    ("A10G", 22.0),
    ("RTX 4090", 23.0),
)
# In a reason to wait: how many cells besides the one that it names.
MORE = re.compile(r" and (\d+) more$")
# In a reason to drop a cell: the first one is what differs between sizes and budgets.
NUMBER = re.compile(r"(?<!\S)\d+(?:\.\d+)?(?:e[+-]\d+)?(?!\S)")
# Columns that a narrow terminal is spared, these together, first to last.
NARROW = (("weights", "head", "pairs", "state"), ("cell",), ("batch", "tokens"))
# Share of the peak that training reaches where nothing was measured yet: what 100m-sized models of this kind commonly
# reach on one GPU; small models reach less. The plan says when it rests on this.
ASSUMED_UTILISATION = 0.3
# Seconds that the forward and backward pass of a layer take at the least, however small: its kernels are launched one
# by one. An assumption as well, for models too small to fill a GPU.
LAYER_SECONDS = 2e-3
# Tokenisation apart, what a run spends before its first step and after its last: imports, compilation, evaluation.
OVERHEAD_SECONDS = 20.0


@dataclass(frozen=True)
class Device:
    """The device that a plan is priced for."""

    name: str
    peak_flops: float | None  # FLOP/s; None: unknown, and so are times
    memory_gib: float | None


def find_device(name: str) -> Device:
    """Return a device by its name or a part of it, `cpu` included.

    Errors:
        ConfigError: unknown, with the known ones.
    """
    from powertrain.schema import nearest
    from powertrain.training.hardware import PEAK_BF16_FLOPS

    if name.lower() == "cpu":
        return Device("cpu", None, None)
    known = {n.lower(): n for n, _ in PEAK_BF16_FLOPS}
    if name.lower() not in known:
        raise ConfigError(f"device {name!r} is not known: {nearest(name, [*known.values(), 'cpu'])}")
    full = known[name.lower()]
    return Device(full, dict(PEAK_BF16_FLOPS)[full], _memory_gib(full))


def recognised(driver_name: str) -> Device | None:
    """Return the device that a driver calls so, as records do; None where no data sheet says its peak."""
    from powertrain.training.hardware import PEAK_BF16_FLOPS

    known = ((n, peak) for n, peak in PEAK_BF16_FLOPS if n in driver_name)
    return next((Device(n, peak, _memory_gib(driver_name)) for n, peak in known), None)


def _memory_gib(name: str) -> float | None:
    return next((gib for part, gib in MEMORY_GIB if part in name), None)


def gpu_here() -> str | None:
    """Return what the driver calls this machine's first GPU; None without one."""
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def choose_device(records: Iterable[CellRecord], gpu: str | None) -> tuple[Device, str]:
    """Return the GPU that a plan is priced for where nobody says which, and why that one.

    Args:
        gpu: what the driver calls the one that is here.
    """
    if gpu is not None and (device := recognised(gpu)):
        return device, "the GPU here"
    counts = Counter(device for r in records if (device := recognised(r.device)))
    if counts:
        return max(counts, key=lambda d: (counts[d], d.name)), "the device of most records"
    return find_device("H200"), "no known GPU is here, and no record names one"


def without_kernels(cell: Cell) -> str | None:
    """Return why layers of a cell run without kernels on a GPU, where no share of the peak is a fair guess, or None."""
    from powertrain.ops.cuda_plan import unsupported_head

    model = cell.config.model
    for mixer in model.layer_mixers:
        if mixer.kind in ("power", "linear"):
            deg = mixer.deg if mixer.kind == "power" else 1
            reason = unsupported_head(model.head_dim, model.head_dim, deg)
            if reason is not None:
                return reason
    return None


# What a time rests on. alone: records of this size, of cells that had this device to themselves. bound: of cells that
# shared it, and would have been faster alone, or of another size. scaled: records of another device. assumed: a share
# of the peak.
Basis = Literal["alone", "bound", "scaled", "assumed", "unknown"]
# How the plan marks such a time, and what the mark means.
MARKS: dict[Basis, tuple[str, str]] = {
    "bound": ("<", "at most: from records of cells that shared the device or of other sizes"),
    "scaled": ("~", "assumed: from records of another device, in the ratio of the peaks"),
    "assumed": ("~", f"assumed: {ASSUMED_UTILISATION:.0%} of the peak, where nothing was measured"),
}


@dataclass(frozen=True)
class Estimate:
    """Time of one cell, alone on one device."""

    seconds: float | None  # None: nothing was measured, and the device's or the mixer's speed is not known
    new_steps: int  # steps that no other cell of its trunk has run before
    basis: Basis

    @property
    def measured(self) -> bool:
        """Whether it comes from records of this device."""
        return self.basis in ("alone", "bound")


@dataclass(frozen=True)
class Step:
    """How long a step took in a record, had it been on this device."""

    size: str
    parameters: float
    flops: float  # executed
    seconds: float  # device-seconds
    basis: Basis


class Pricer:
    """Estimates times from the steps that records hold, else from an assumed utilisation.

    Args:
        records: of earlier cells.
        timings: of their mixers and sizes, each alone on the device; they come before the records' own clocks.
    """

    def __init__(self, device: Device, records: Sequence[CellRecord] = (), timings: Iterable[Timing] = ()) -> None:
        self.device = device
        self.steps: dict[tuple[str, int], list[Step]] = defaultdict(list)
        for r, timed in zip(records, with_timings(records, timings), strict=True):
            theirs = find_device("cpu") if r.device == "cpu" else recognised(r.device)
            ratio = self._ratio(theirs) if theirs else None
            seconds = timed.seconds or r.seconds
            if theirs and seconds and ratio is not None:
                own: Basis = "alone" if timed.seconds else "bound"
                basis = own if theirs.name == device.name else "scaled"
                step = Step(r.size, r.parameters, r.flops("executed") / r.steps, seconds * ratio / r.steps, basis)
                self.steps[r.mixer, r.context].append(step)

    def _ratio(self, theirs: Device) -> float | None:
        """Return what times of a device are multiplied by; None: not known."""
        if theirs.name == self.device.name:
            return 1.0
        if theirs.peak_flops is None or self.device.peak_flops is None:
            return None
        return theirs.peak_flops / self.device.peak_flops

    def step_seconds(self, cell: Cell, layers: Mapping[tuple[str, str], int]) -> tuple[float | None, Basis]:
        """Return the time of a step, from records of the same mixer and context where there are any.

        Without one of the same size that was alone it is the least upper estimate. A larger model fills the device no
        worse: its steps take longer by its FLOPs at most. Only where all records are of larger ones, of the smallest:
        steps of small models are launches of kernels, fewer by the layers that are fewer.

        Args:
            layers: by mixer and size.
        """
        own, parameters = cell.config.model.n_layers, cell.cost.parameters
        flops = cell.batch_tokens * cell.cost.flops_per_token["executed"]
        if steps := self.steps.get((cell.mixer, cell.context)):
            least = max(min(s.parameters for s in steps), parameters)
            estimates = []
            for s in (s for s in steps if s.parameters <= least):
                growth = max(flops / s.flops, own / layers.get((cell.mixer, s.size), own))
                basis: Basis = "bound" if s.basis == "alone" and s.size != cell.size else s.basis
                estimates.append((("alone", "bound", "scaled").index(basis), s.seconds * growth, basis))
            return min(estimates)[1:]
        if self.device.peak_flops is None or without_kernels(cell) is not None:
            return None, "unknown"
        return max(flops / (self.device.peak_flops * ASSUMED_UTILISATION), own * LAYER_SECONDS), "assumed"

    def estimate(self, cells: Sequence[Cell]) -> dict[str, Estimate]:
        """Return an estimate per cell id; cells of one trunk pay for their shared steps once, smallest budget first."""
        reached: dict[str, int] = defaultdict(int)
        result: dict[str, Estimate] = {}
        layers = {(c.mixer, c.size): c.config.model.n_layers for c in cells}
        for cell in sorted(cells, key=lambda c: (c.trunk, c.steps)):
            new_steps = cell.steps - min(reached[cell.trunk], cell.decay_start)
            reached[cell.trunk] = max(reached[cell.trunk], cell.decay_start)
            step, basis = self.step_seconds(cell, layers)
            seconds = new_steps * step + OVERHEAD_SECONDS if step is not None else None
            result[cell.id] = Estimate(seconds, new_steps, basis)
        return result


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
) -> Plan:
    """Price an expansion on a device."""
    candidates = [c for p in expansion.pending for c in p.candidates]
    cells = {c.id: c for c in [*expansion.cells, *candidates]}
    estimates = Pricer(device, records, timings).estimate(list(cells.values()))
    return Plan(expansion, estimates, frozenset(finished), device, chosen)


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
    def complete(self) -> bool:
        """Whether every cell is finished and none is to come."""
        return self.finished == self.planned and not self.later

    def __str__(self) -> str:
        text = f"{self.finished} of {self.planned} cells" if self.planned else "nothing yet"
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


def duration(seconds: float | None) -> str:
    """Return a time a person reads: 43 s, 12 min, 3.4 h; ? where it is not known."""
    if seconds is None:
        return "?"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def render(plan: Plan, width: int, *, every: bool = False) -> list[Any]:
    """Return the plan as `rich` tables and lines.

    Args:
        width: of the terminal; columns that it has no room for are left out, by their names.
        every: finished cells too have a row each, not one for all of a budget, mixer and size.
    """
    from rich.table import Table
    from rich.text import Text

    rows = as_rows(plan)
    result: list[Any] = []
    for context in sorted({row["context"] for row in rows}):
        groups: dict[tuple, list[dict[str, Any]]] = defaultdict(list)
        for row in (r for r in rows if r["context"] == context):
            alike = row["budget"], row["mixer"], row["size"], row["batch_tokens"]
            groups[alike if row["state"] == "finished" and not every else (row["cell"],)].append(row)
        lines = [_columns(group) for group in groups.values()]
        wide = {name: 2 + max(len(name), *(len(line[name]) for line in lines)) for name in lines[0]}
        absent: list[str] = []
        for names in NARROW:
            if sum(wide[name] for name in wide if name not in absent) - 2 > width:
                absent += names
        title = f"context {context}" + (f" (no room for {', '.join(absent)}: --json has them)" if absent else "")
        table = Table(box=None, pad_edge=False, header_style="bold")
        shown = [name for name in wide if name not in absent]
        for name in shown:
            table.add_column(name, justify="left" if name in ("budget", "mixer", "size", "cell") else "right")
        for group, line in zip(groups.values(), lines, strict=True):
            table.add_row(*(line[name] for name in shown), style="dim" if group[0]["state"] != "planned" else None)
        result += [Text(title, style="italic"), table]
    result += [Text(line, style="dim") for line in later(plan.expansion)]
    result += [Text(line, style="yellow") for line in dropped(plan.expansion)]
    result.append(summary(plan))
    if plan.unpriced and plan.hours is not None:
        result.append(unpriced(plan))
    return result


def _columns(group: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the columns of a cell, or of several finished ones that differ in learning rate and seed."""
    row = group[0]
    parts, total = row["flops_by_part"], row["flops"]["algorithmic"]
    share = {"weights": parts["weights"], "head": parts["head"], "pairs": parts["intra_chunk"]}
    share["state"] = parts["state_update"] + parts["state_query"]
    finished, at_most = row["state"] == "finished", row["state"] == "at most"
    rates = {r["learning_rate"] for r in group}
    several = f"{len(group)} cells" if len(group) > 1 else row["cell"]
    return {
        "budget": f"{row['budget']:.3g}",
        "mixer": row["mixer"],
        "size": row["size"],
        "lr": "tuned" if at_most else f"{len(rates)} rates" if len(rates) > 1 else f"{row['learning_rate']:.3g}",
        "batch": f"{row['batch_tokens']}",
        "seed": ", ".join(str(seed) for seed in sorted({r["seed"] for r in group})),
        "steps": f"{row['steps']}",
        # The others are those of a smaller budget, whose run this one branches off.
        "new": "" if finished else f"{row['new_steps']}",
        "tokens": f"{row['tokens']:.3g}",
        **{part: f"{100 * flops / total:.0f} %" for part, flops in share.items()},
        "time": "done" if finished else MARKS.get(row["basis"], ("",))[0] + duration(row["seconds"]),
        # Which cells they will be follows from results: their learning rate is part of what an id stands for.
        "cell": "at most" if at_most else several,
    }


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _at(expansion: Expansion, context: int) -> str:
    contexts = {c.context for c in expansion.cells}
    return f", context {context}" if contexts != {context} else ""


def later(expansion: Expansion) -> list[str]:
    """Return what awaits results: a line for each stage, budget and choice, with all mixers that await it."""
    groups: dict[tuple[int, int, float, str], list[tuple[str, int, int]]] = defaultdict(list)
    for p in expansion.pending:
        choice, _, awaited = p.reason.partition(" awaits ")
        others = MORE.search(awaited)
        count = 1 + int(others[1]) if others else 1
        groups[p.context, p.stage, p.budget, choice].append((p.mixer, len(p.candidates), count))
    lines = []
    for (context, _, budget, choice), waiting in groups.items():
        cells = sum(count for _, count, _ in waiting)
        line = f"later: {choice} at {budget:.3g} FLOPs{_at(expansion, context)}, at most {_counted(cells, 'cell')}: "
        lines.append(line + ", ".join(f"{m} {count} after {_counted(n, 'other')}" for m, count, n in waiting))
    return lines


def dropped(expansion: Expansion) -> list[str]:
    """Return what will not run: a line for each mixer and reason, with all sizes and budgets and the number of each."""
    groups: dict[tuple[int, str, str], dict[float, list[tuple[str, str]]]] = defaultdict(lambda: defaultdict(list))
    for d in expansion.dropped:
        number = next(iter(NUMBER.findall(d.reason)), "")
        groups[d.context, d.mixer, NUMBER.sub("{}", d.reason, count=1)][d.budget].append((d.size, number))
    lines = []
    for (context, mixer, reason), budgets in groups.items():
        where = "; ".join(f"{', '.join(size for size, _ in own)} at {budget:.3g}" for budget, own in budgets.items())
        numbers = "; ".join(", ".join(number for _, number in own) for own in budgets.values())
        lines.append(f"dropped: {mixer} {where} FLOPs{_at(expansion, context)}: {reason.replace('{}', numbers, 1)}")
    return lines


def unpriced(plan: Plan) -> str:
    """Return which cells are not in the sum of times, in one line."""
    counts = Counter((cell.mixer, without_kernels(cell) if plan.device.peak_flops else None) for cell in plan.unpriced)
    cells = ", ".join(
        f"{_counted(count, 'cell')} of {mixer}" + (f" ({reason})" if reason else "")
        for (mixer, reason), count in counts.items()
    )
    return f"not in the sum, as their speed is not known before some are measured: {cells}"


def rounded_batches(recipe: Recipe, expansion: Expansion) -> str | None:
    """Return how whole sequences change what the recipe asks for as `batch_tokens`, in one line; None: not at all."""
    rounded = {}
    for c in (*expansion.cells, *(c for p in expansion.pending for c in p.candidates)):
        asked = recipe.batch_tokens.at(c.cost.parameters, c.batch_factor)
        if asked != c.batch_tokens:
            rounded[asked, c.context] = c.batch_tokens
    if not rounded:
        return None
    (asked, context), tokens = next(iter(rounded.items()))
    count = tokens // context
    sequences = "1 sequence" if count == 1 else f"{count} sequences"
    others = f", and so with {len(rounded) - 1} others" if len(rounded) > 1 else ""
    return f"batch_tokens={asked:.6g} becomes {tokens} ({sequences} of {context}){others}"


def summary(plan: Plan) -> str:
    """Return how many cells there are and what the rest costs, in one line."""
    remaining = plan.remaining
    flops = sum(
        plan.estimates[c.id].new_steps * c.batch_tokens * c.cost.flops_per_token["algorithmic"] for c in remaining
    )
    planned = len(plan.expansion.cells)
    at_most = len(remaining) - sum(c.id not in plan.finished for c in plan.expansion.cells)
    done = sum(c.id in plan.finished for c in plan.expansion.cells)
    hours = plan.hours
    cost = f"{hours:.2f} {plan.device.name}-hours" if hours is not None else f"time on {plan.device.name} unknown"
    bases = {plan.estimates[c.id].basis for c in remaining}
    chosen = f"{plan.chosen}; --device prices another" if plan.chosen else ""
    meaning = "; ".join(f"{mark} {text}" for basis, (mark, text) in MARKS.items() if basis in bases)
    notes = "; ".join(note for note in (chosen, meaning) if note)
    later = f" and at most {at_most} more once these are known" if at_most else ""
    return f"{planned} cells, {done} finished{later}; {flops:.3g} FLOPs to go, {cost}{f' ({notes})' if notes else ''}"

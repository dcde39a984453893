"""What `powertrain sweep plan` prints: tables and lines."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from powertrain.scaling.cells import Dropped, Expansion, Pending, Reason, least_memory
from powertrain.scaling.plan import Plan, as_rows
from powertrain.scaling.pricing import MARKS, without_kernels
from powertrain.scaling.recipe import Recipe
from powertrain.wording import counted

# Columns that a narrow terminal is spared, these together, first to last.
NARROW = (("weights", "head", "pairs", "state"), ("cell",), ("batch", "tokens"))


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
    result += [Text(line, style="yellow") for line in too_large(plan)]
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


def _at(expansion: Expansion, context: int) -> str:
    contexts = {c.context for c in expansion.cells}
    return f", context {context}" if contexts != {context} else ""


def later(expansion: Expansion) -> list[str]:
    """Return what awaits results: a line for each stage, budget and choice, with all mixers that await it."""
    groups: dict[tuple[int, int, float, str], list[Pending]] = defaultdict(list)
    for p in expansion.pending:
        groups[p.context, p.stage, p.budget, p.choice].append(p)
    lines = []
    for (context, _, budget, choice), waiting in groups.items():
        cells = sum(len(p.candidates) for p in waiting)
        line = f"later: {choice} at {budget:.3g} FLOPs{_at(expansion, context)}, at most {counted(cells, 'cell')}: "
        each = (f"{p.mixer} {len(p.candidates)} after {counted(len(p.awaits), 'other')}" for p in waiting)
        lines.append(line + ", ".join(each))
    return lines


def dropped(expansion: Expansion) -> list[str]:
    """Return what will not run: a line for each mixer and reason, with all sizes and budgets and the number of each."""
    groups: dict[tuple[int, str, str], dict[float, list[Dropped]]] = defaultdict(lambda: defaultdict(list))
    for d in expansion.dropped:
        groups[d.context, d.mixer, d.reason.phrase][d.budget].append(d)
    lines = []
    for (context, mixer, phrase), budgets in groups.items():
        where = "; ".join(f"{', '.join(d.size for d in own)} at {budget:.3g}" for budget, own in budgets.items())
        numbers = "; ".join(", ".join(d.reason.number for d in own) for own in budgets.values())
        lines.append(f"dropped: {mixer} {where} FLOPs{_at(expansion, context)}: {Reason(phrase, numbers)}")
    return lines


def too_large(plan: Plan) -> list[str]:
    """Return which cells to go need more memory than the device has, if its own is known: a line for mixer and size."""
    memory = plan.device.memory_gib
    needs: dict[tuple[str, str], float] = {}
    for cell in plan.remaining:
        needs[cell.mixer, cell.size] = max(least_memory(cell) / 2**30, needs.get((cell.mixer, cell.size), 0.0))
    return [
        f"too large: {mixer} {size} needs at least {need:.1f} GiB, and {plan.device.name} has {memory:.4g}: its cells "
        "fail there, unless limits.memory_gib drops them"
        for (mixer, size), need in needs.items()
        if memory is not None and need > memory
    ]


def unpriced(plan: Plan) -> str:
    """Return which cells are not in the sum of times, in one line."""
    counts = Counter((cell.mixer, without_kernels(cell) if plan.device.peak_flops else None) for cell in plan.unpriced)
    cells = ", ".join(
        f"{counted(count, 'cell')} of {mixer}" + (f" ({reason})" if reason else "")
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
    sequences = counted(tokens // context, "sequence")
    others = f", and so with {counted(len(rounded) - 1, 'other')}" if len(rounded) > 1 else ""
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
    cells = f"{counted(planned, 'cell')}, {done} finished{later}"
    return f"{cells}; {flops:.3g} FLOPs to go, {cost}{f' ({notes})' if notes else ''}"

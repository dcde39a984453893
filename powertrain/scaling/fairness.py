"""What makes a comparison unfair or a minimum doubtful, judged from the records and timings alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from powertrain.scaling.records import CellRecord
from powertrain.scaling.resample import Point, Sample
from powertrain.scaling.timing import key_of
from powertrain.wording import counted

if TYPE_CHECKING:
    from powertrain.scaling.isoflop import IsoFlop
    from powertrain.scaling.timing import Timing


@dataclass(frozen=True)
class Flag:
    """What the data do not bound: an optimum may lie beyond what was tried, or a loss be luck."""

    mixer: str
    budget: float
    kind: str  # learning rate, batch, size, seeds or loss
    size: str  # rung at which it was found
    text: str


@dataclass(frozen=True)
class Check:
    """One condition of a fair comparison, and whether the records meet it; None: they cannot say."""

    name: str
    passed: bool | None
    evidence: str


def _edge(values: Sequence[float], best: float, what: str) -> str | None:
    ordered = sorted(set(values))
    if len(ordered) < 2:
        return None
    if best == ordered[0]:
        return f"the lowest {what} tried, {best:.3g}, is the best"
    if best == ordered[-1]:
        return f"the highest {what} tried, {best:.3g}, is the best"
    return None


def flags(
    sample: Sample,
    selected: Mapping[tuple[str, float], Point],
    iso: Sequence[IsoFlop],
    others: Sequence[CellRecord] = (),
) -> list[Flag]:
    """Return what the data do not bound: a learning rate, batch or size that is best at the edge of what was tried or
    the only one; fewer learning rates than another mixer had; a selected configuration of one seed; a loss above that
    of a smaller budget.

    Args:
        selected: configuration by mixer and budget.
        others: records of settings that are not compared, whose learning rates were tried nevertheless.
    """
    found: list[Flag] = []
    groups: dict[tuple[str, float, str], list[Point]] = defaultdict(list)
    for point in sample.points:
        groups[point.mixer, point.budget, point.size].append(point)
    elsewhere: dict[tuple[str, float, str], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    measured_on = {p.first.data.get("evaluation") for p in sample.points}
    for r in (r for r in others if r.data.get("evaluation") in measured_on):
        elsewhere[r.mixer, r.budget, r.size][r.learning_rate].append(r.loss)
    for (mixer, budget, size), points in sorted(groups.items()):
        best = min(points, key=lambda p: p.loss)
        aside = {rate: sum(ls) / len(ls) for rate, ls in elsewhere[mixer, budget, size].items()}
        lower = {rate: loss for rate, loss in aside.items() if loss < best.loss}
        rates = {p.first.learning_rate for p in points} | set(aside)
        if lower:
            rate = min(lower, key=lambda r: (lower[r], r))
            text: str | None = f"{rate:.3g}, which is not compared, was lower ({lower[rate]:.4f})"
        elif len(rates) == 1:
            text = "only one was tried"
        else:
            text = _edge(list(rates), best.first.learning_rate, "learning rate")
        if text:
            found.append(Flag(mixer, budget, "learning rate", size, text))
        text = _edge([p.first.batch_tokens for p in points], best.first.batch_tokens, "batch")
        if text:
            found.append(Flag(mixer, budget, "batch", size, text))
    found += _fewer_rates(groups)
    found += [Flag(i.mixer, i.budget, "size", i.best.size, i.edge) for i in iso if i.edge is not None]
    for (mixer, budget), point in sorted(selected.items()):
        if len(point.records) == 1:
            found.append(Flag(mixer, budget, "seeds", point.size, "only one was run"))
        before = [p for (m, b), p in selected.items() if m == mixer and b < budget and p.loss < point.loss]
        if before:
            lowest = min(before, key=lambda p: p.loss)
            text = f"{point.loss:.4f}, above the {lowest.loss:.4f} of {lowest.size} at {lowest.budget:.3g} FLOPs"
            found.append(Flag(mixer, budget, "loss", point.size, text))
    return found


def _fewer_rates(groups: Mapping[tuple[str, float, str], Sequence[Point]]) -> list[Flag]:
    """Return a flag for each mixer that has fewer learning rates at its best size than another has at its own."""
    best: dict[tuple[float, str], tuple[float, str, int]] = {}
    for (mixer, budget, size), points in groups.items():
        found = min(p.loss for p in points), size, len({p.first.learning_rate_factor for p in points})
        best[budget, mixer] = min(best.get((budget, mixer), found), found)
    flags = []
    for (budget, mixer), (_, size, count) in sorted(best.items()):
        most = max(n for (b, _), (_, _, n) in best.items() if b == budget)
        if count < most:
            text = f"{count} tried at this budget, where another mixer had {most}"
            flags.append(Flag(mixer, budget, "learning rate", size, text))
    return flags


def fairness(records: Sequence[CellRecord], sample: Sample, timings: Sequence[Timing] = ()) -> list[Check]:
    """Return every condition of a fair comparison, judged from the records of one context and their timings.

    Args:
        timings: of the sweep; those that speak for none of the records are left out.
    """
    checks = [_same(records, key, name) for key, name in _FINGERPRINTS]
    documents = {r.document_tokens for r in records}
    lengths = {len(d) for d in documents}
    if lengths == {0}:
        checks.append(Check("same evaluation documents and positions", None, "no document losses in the records"))
    else:
        positions = {(r.position_bounds, r.position_tokens) for r in records}
        same = len(documents) == 1 and len(positions) == 1
        count = f"{sample.documents} {sample.unit}" if sample.documents else counted(min(lengths), "document")
        text = f"{count} in every cell" if same else f"{len(documents)} different sets of documents"
        checks.append(Check("same evaluation documents and positions", same, text))
    checks.append(_equal_effort(records))
    seeds: dict[str, set[int]] = defaultdict(set)
    for r in records:
        seeds[r.mixer].add(r.seed)
    noise = sample.seed_noise
    text = f"{noise.deviation:.2g} nats per token between seeds" if noise else "no configuration has a second seed"
    checks.append(
        Check(
            "same seeds for every mixer",
            len({tuple(sorted(s)) for s in seeds.values()}) == 1,
            "; ".join(f"{m}: {', '.join(map(str, sorted(s)))}" for m, s in sorted(seeds.items())) + f" ({text})",
        )
    )
    checks.append(_annealed(records))
    devices = {(r.devices, device) for r in records for device in {s.device for s in r.starts} | {r.device}}
    values = {f"{count} x {device}" for count, device in devices if device}
    text = ", ".join(sorted(values)) or "not recorded"
    checks.append(Check("one kind of device", None if not values else len(values) == 1, text))
    keys = {key_of(r) for r in records}
    checks.append(_one_version(records, [t for t in timings if t.key in keys]))
    return checks


def _one_version(records: Sequence[CellRecord], timings: Sequence[Timing]) -> Check:
    # Commit and versions alike; what one of them lacks, such as a commit outside of git, cannot differ.
    sources = {
        "records": [environment for r in records for environment in r.environments],
        "timings": [t.environment for t in timings],
    }
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for source, environments in sources.items():
        for environment in environments:
            for key, value in environment.items():
                found[key][source].add(value)
    different = {key: by_source for key, by_source in found.items() if len(set().union(*by_source.values())) > 1}
    name = "one version of the code"
    if different:
        parts = [
            f"{key} {', '.join(sorted(values))} ({source})"
            for key, by_source in sorted(different.items())
            for source, values in by_source.items()
        ]
        return Check(name, False, "; ".join(parts))
    if "commit" not in found:
        return Check(name, None, "not recorded")
    return Check(name, True, ", ".join(set().union(*found["commit"].values())))


_FINGERPRINTS = (
    ("tokens", "same training documents and tokenizer"),
    ("order", "same order of the data for every mixer of a seed"),
    ("evaluation", "same evaluation tokens"),
)


def _same(records: Sequence[CellRecord], key: str, name: str) -> Check:
    # The order depends on the seed, by intention; what is compared within a seed must agree.
    found: dict[int, set[str]] = defaultdict(set)
    for r in records:
        found[r.seed if key == "order" else 0].add(r.data.get(key, ""))
    values = set().union(*found.values())
    if "" in values:
        return Check(name, None, "not recorded")
    return Check(name, all(len(v) == 1 for v in found.values()), ", ".join(sorted(values)))


def _equal_effort(records: Sequence[CellRecord]) -> Check:
    # How many pairs of factors each mixer had at a budget and size. Which ones they are differs where they follow from
    # earlier results: that is the point of tuning.
    tried: dict[tuple[float, str], dict[str, set[tuple[float, float]]]] = defaultdict(lambda: defaultdict(set))
    for r in records:
        tried[r.budget, r.size][r.mixer].add((r.learning_rate_factor, r.batch_factor))
    name = "learning rate tuned with equal effort"
    if all(len(pairs) == 1 for by_mixer in tried.values() for pairs in by_mixer.values()):
        return Check(name, None, "one learning rate per size: nothing was tuned")
    unequal = [
        f"{size} at {budget:.3g}"
        for (budget, size), by_mixer in sorted(tried.items())
        if len({len(pairs) for pairs in by_mixer.values()}) > 1
    ]
    # By budget, each mixer's numbers of pairs: also over sizes that no rival has.
    counts: dict[float, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    for (budget, _), by_mixer in tried.items():
        for mixer, pairs in by_mixer.items():
            counts[budget][mixer].add(len(pairs))
    text = "; ".join(
        f"{budget:.3g}: {', '.join(map(str, sorted(set().union(*by_mixer.values()))))} per size"
        for budget, by_mixer in sorted(counts.items())
    )
    if unequal:
        text += f"; unequal for {', '.join(unequal)}"
    alike = all(len({frozenset(ns) for ns in by_mixer.values()}) == 1 for by_mixer in counts.values())
    return Check(name, not unequal and alike, text)


def _annealed(records: Sequence[CellRecord]) -> Check:
    unannealed = sum(not r.annealed for r in records)
    if unannealed == len(records):
        return Check("every compared loss is annealed", False, "no cell is annealed: only envelopes can be compared")
    text = counted(len(records) - unannealed, "annealed cell")
    others = f", {counted(unannealed, 'other')} left out" if unannealed else ""
    return Check("every compared loss is annealed", True, text + others)

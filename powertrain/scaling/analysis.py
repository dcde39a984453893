"""From records to findings: everything that the report states or draws, for one context at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from powertrain.scaling.compare import (
    Envelope,
    Frontier,
    Gain,
    GainInterval,
    Verdict,
    envelope,
    frontier_gains,
    frontiers,
    gains,
    judge,
    select,
    trunk_curve,
)
from powertrain.scaling.fairness import Check, Flag, fairness, flags
from powertrain.scaling.fit import LawFit, fit_law, optimum
from powertrain.scaling.isoflop import IsoFlop, isoflops
from powertrain.scaling.recipe import CONVENTIONS, Convention, Recipe
from powertrain.scaling.records import CellRecord
from powertrain.scaling.resample import Point, Sample, resample
from powertrain.scaling.timing import Timing

Array = NDArray[np.float64]


@dataclass(frozen=True)
class LawFinding:
    """The parametric law of one mixer, fitted without the largest budget, which then tests it."""

    mixer: str
    fit: LawFit | None
    reason: str  # why there is none
    held_out_budget: float | None
    held_out: tuple[tuple[str, float, float], ...]  # size, measured, predicted
    frontier: tuple[tuple[float, float], ...]  # FLOPs, loss at the law's optimum

    @property
    def held_out_error(self) -> float | None:
        """Root mean square of log(measured / predicted) at the largest budget."""
        if not self.held_out:
            return None
        return math.sqrt(sum(math.log(m / p) ** 2 for _, m, p in self.held_out) / len(self.held_out))


@dataclass(frozen=True)
class PositionCurve:
    """Loss by position in the context, of a mixer's selected configuration."""

    mixer: str
    budget: float
    bounds: Array  # (P,) upper bounds of the buckets
    loss: Array  # (P,)
    low: Array
    high: Array
    difference: Array  # (P,) to the baseline, paired over evaluation sequences
    difference_low: Array
    difference_high: Array


@dataclass(frozen=True)
class Findings:
    """All results at one context."""

    context: int
    records: tuple[CellRecord, ...]
    sample: Sample
    selected: dict[tuple[str, float], Point]
    verdicts: dict[Convention, list[Verdict]]
    frontiers: dict[Convention, dict[str, Frontier]]
    isoflops: tuple[IsoFlop, ...]
    laws: tuple[LawFinding, ...]
    envelopes: dict[str, Envelope]
    gains: tuple[GainInterval, ...]
    envelope_gains: dict[str, list[Gain]]
    positions: tuple[PositionCurve, ...]
    flags: tuple[Flag, ...]
    checks: tuple[Check, ...]

    def mixers(self, recipe: Recipe) -> list[str]:
        """The mixers that have records, in the recipe's order; those the recipe does not name come last."""
        present = {r.mixer for r in self.records}
        return [m for m in recipe.mixers if m in present] + sorted(present - set(recipe.mixers))

    def flips(self, recipe: Recipe, budget: float) -> list[tuple[Convention, str]]:
        """Return the conventions under which the subject's verdict at a budget differs from the recipe's convention."""
        outcome = {c: v.outcome for c, vs in self.verdicts.items() for v in vs if v.budget == budget}
        if recipe.convention not in outcome:
            return []
        return [(c, o) for c, o in outcome.items() if o != outcome[recipe.convention]]

    def not_comparable(self, budget: float) -> list[Convention]:
        """Return the conventions under which the mixers' prices at a budget are too different for a verdict."""
        return [c for c, vs in self.verdicts.items() if all(v.budget != budget for v in vs)]


def law(recipe: Recipe, mixer: str, iso: Sequence[IsoFlop]) -> LawFinding:
    """Fit the parametric law on all budgets but the largest, and predict that one."""
    own = sorted((i for i in iso if i.mixer == mixer), key=lambda i: i.budget)
    largest = own[-1].budget if len(own) > 1 else None
    used = [p for i in own if i.budget != largest for p in i.points]
    parameters = np.array([p.first.parameters for p in used])
    tokens = np.array([p.first.tokens for p in used])
    settings = recipe.analysis
    shifts = None
    if used:
        # What all points share when the evaluation documents change; the seeds' share is in the residuals already.
        replicates = np.stack([p.document_replicates for p in used], axis=1)[: settings.law_bootstrap]
        common = np.log(replicates / replicates.mean(axis=0)).mean(axis=1, keepdims=True)
        shifts = np.broadcast_to(common, replicates.shape)
    try:
        fit = fit_law(
            parameters,
            tokens,
            np.array([p.loss for p in used]),
            delta=settings.huber_delta,
            replicates=min(settings.law_bootstrap, settings.bootstrap),
            shifts=shifts,
        )
    except ValueError as error:
        return LawFinding(mixer, None, str(error), largest, (), ())
    held_out = tuple(
        (p.size, p.loss, float(fit.law(p.first.parameters, p.first.tokens)))
        for i in own
        if i.budget == largest
        for p in i.points
    )
    rungs = sorted({(p.first.parameters, p.first.flops_per_token[recipe.convention]) for i in own for p in i.points})
    log_n, log_f = np.log(np.array(rungs)).T

    def flops_per_token(n: Array) -> Array:
        return np.exp(np.interp(np.log(n), log_n, log_f))

    low, high = float(np.exp(log_n[0])), float(np.exp(log_n[-1]))
    budgets = np.geomspace(own[0].budget, own[-1].budget, 25)
    line = tuple((float(b), optimum(fit.law, float(b), flops_per_token, low, high).loss) for b in budgets)
    return LawFinding(mixer, fit, "", largest, held_out, line)


def positions(recipe: Recipe, selected: dict[tuple[str, float], Point]) -> list[PositionCurve]:
    """Return the loss by position at the largest budget that all mixers with positions share with the baseline.

    Evaluation sequences are resampled, the same ones for every mixer. Noise between seeds is known of the whole loss
    alone: it shifts all positions of a mixer alike.
    """
    usable = {key: p for key, p in selected.items() if p.first.position_loss}
    budgets = sorted({b for m, b in usable if m == recipe.baseline})
    if not budgets:
        return []
    mixers = {m for m, _ in usable}
    budget = max(budgets, key=lambda b: (sum((m, b) in usable for m in mixers), b))
    chosen = {m: p for (m, b), p in usable.items() if b == budget}
    base = chosen[recipe.baseline]
    chosen = {
        m: p
        for m, p in chosen.items()
        if p.first.position_bounds == base.first.position_bounds
        and p.first.position_tokens == base.first.position_tokens
    }
    counts = np.array(base.first.position_tokens, dtype=np.float64)
    rows = len(counts)
    rng = np.random.default_rng(0)
    weights = np.concatenate(
        [np.ones((1, rows)), rng.multinomial(rows, np.full(rows, 1 / rows), size=recipe.analysis.bootstrap)]
    )
    # A bucket that no resampled sequence reaches has no loss there; the whole sample decides which buckets exist.
    reached = counts.sum(axis=0) > 0
    denominator = weights @ counts[:, reached]
    bounds = np.array(base.first.position_bounds, dtype=np.float64)[reached]
    values: dict[str, Array] = {}
    for m, p in chosen.items():
        sums = np.mean([np.array(r.position_loss) for r in p.records], axis=0)
        with np.errstate(invalid="ignore", divide="ignore"):
            values[m] = (weights @ sums[:, reached]) / denominator
        values[m][1:] += (p.replicates - p.document_replicates)[:, None]
    tail = 100 * (1 - recipe.analysis.confidence) / 2

    def band(x: Array) -> tuple[Array, Array, Array]:
        low, high = np.nanpercentile(x[1:], [tail, 100 - tail], axis=0)
        return x[0], low, high

    return [
        PositionCurve(m, budget, bounds, *band(values[m]), *band(values[m] - values[recipe.baseline]))
        for m in sorted(values)
    ]


def analyse(
    recipe: Recipe,
    records: Sequence[CellRecord],
    context: int,
    timings: Sequence[Timing] = (),
    others: Sequence[CellRecord] = (),
) -> Findings:
    """Return all findings at one context; the records' order does not matter.

    Args:
        others: records of settings that are not compared: they add to the noise between seeds, and to the learning
            rates that are known to be worse.

    Errors:
        ValueError: no record at this context.
    """
    here = tuple(sorted((r for r in records if r.context == context), key=lambda r: r.cell))
    if not here:
        raise ValueError(f"no record at context {context}: allowed are {sorted({r.context for r in records})}")
    settings = recipe.analysis
    aside = [r for r in others if r.context == context]
    sample = resample(here, settings.bootstrap, others=aside)
    selected = select(sample)
    iso = isoflops(sample, settings.confidence)
    mixers = sorted({r.mixer for r in here})
    curves = {m: [trunk_curve(r, recipe.convention) for r in here if r.mixer == m and r.curve] for m in mixers}
    envelopes = {m: envelope(cs) for m, cs in curves.items() if any(c.size for c, _ in cs)}
    base = envelopes.get(recipe.baseline)
    lines = {c: frontiers(selected, c) for c in CONVENTIONS}
    return Findings(
        context=context,
        records=here,
        sample=sample,
        selected=selected,
        verdicts={c: judge(selected, recipe.subject, c, settings.confidence) for c in CONVENTIONS},
        frontiers=lines,
        isoflops=tuple(iso),
        laws=tuple(law(recipe, m, iso) for m in sorted({i.mixer for i in iso})),
        envelopes=envelopes,
        gains=tuple(frontier_gains(lines[recipe.convention], recipe.baseline, settings.confidence)),
        envelope_gains={
            m: gains(e.compute, e.loss, base.compute, base.loss)
            for m, e in envelopes.items()
            if base is not None and m != recipe.baseline
        },
        positions=tuple(positions(recipe, selected)),
        flags=tuple(flags(sample, selected, iso, aside)),
        checks=tuple(fairness(here, sample, timings)),
    )

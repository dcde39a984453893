"""Comparisons between mixers: frontiers, envelopes, compute-equivalent gain, and a verdict per budget."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from powertrain.scaling.recipe import Convention
from powertrain.scaling.records import CellRecord, Place
from powertrain.scaling.resample import NOISE, Noise, Point, Sample, interval

Array = NDArray[np.float64]
# unfinished: the subject is lowest, but a mixer that other budgets have was not measured at this one. no verdict: the
# noise between documents or between seeds was not measured, so that nobody knows what a difference is worth.
Outcome = Literal["wins", "loses", "inconclusive", "unfinished", "no verdict"]

# Beyond the measured budgets a frontier is continued along its last segment, but no further than this factor.
EXTRAPOLATION = 10**0.5
# Numbers of FLOPs that differ by no more are one: the loss falls by thousandths between them.
SAME_BUDGET = 1.02
# An envelope follows the lowest point, and would reward the noisier curve; so curves enter it as means over at least
# this ratio in FLOPs, which smooths late, and at least as many steps, which smooths early. One logged batch of
# `flops_65k` (a sequence of 65536 tokens) deviates by 0.37 nats per token; means over 25, 50, 100 and 200 steps, of
# which every fifth is logged, by 0.16, 0.12, 0.10 and 0.09: more steps would cost the short runs their curves for
# little. In `smoke` (512 tokens) it is 0.28 for one, and 0.04 over 50.
ENVELOPE_BIN = 1.1
ENVELOPE_STEPS = 50


@dataclass(frozen=True)
class Frontier:
    """The lowest loss of one mixer against compute: measured points, joined by straight lines in log compute."""

    compute: Array  # (P,) rising; FLOPs (or device-seconds)
    loss: Array  # (P,) nats per token
    replicates: Array  # (R, P)
    points: tuple[Point, ...]

    def weights(self, compute: float, same: float) -> Array | None:
        """Return (P,) weights of the points that give the loss at `compute`; None too far outside the range.

        Args:
            same: ratio up to which two numbers of FLOPs are one; see `same_budget`.
        """
        x, at = np.log(self.compute), math.log(compute)
        if x.size == 1:
            return np.ones(1) if abs(at - x[0]) <= math.log(same) else None
        if not x[0] - math.log(EXTRAPOLATION) <= at <= x[-1] + math.log(EXTRAPOLATION):
            return None
        right = int(np.clip(np.searchsorted(x, at), 1, x.size - 1))
        t = (at - x[right - 1]) / (x[right] - x[right - 1])
        weights = np.zeros(x.size)
        weights[right - 1], weights[right] = 1 - t, t
        return weights

    def measured(self, compute: float, same: float) -> bool:
        """Return whether `compute` lies within the measured range; `same` as in `weights`."""
        return bool(self.compute[0] / same <= compute <= self.compute[-1] * same)


def same_budget(points: Iterable[Point]) -> float:
    """Return the ratio up to which numbers of FLOPs are one at a budget, whose cells end on their last whole step."""
    return max(SAME_BUDGET, 1 + 1 / min(p.first.steps for p in points))


def compared(records: Sequence[CellRecord], asked: Mapping[Place, Set[str]]) -> list[CellRecord]:
    """Return the records that findings rest on: the recipe's own cells; others where a mixer has none of its own yet.

    Cells of other settings, such as those of a learning rate that was the tuned one before the grid was extended, would
    give their mixer a choice that its rivals do not have.

    Args:
        asked: see `plan.asked_for`.
    """
    own = {r.place for r in records if r.cell in asked.get(r.place, ())}
    return [r for r in records if r.place in asked and (r.cell in asked[r.place] or r.place not in own)]


def select(sample: Sample) -> dict[tuple[str, float], Point]:
    """Return each mixer's configuration at each budget: the lowest loss among those with the most seeds.

    Configurations that were confirmed with further seeds come first: the lowest of many single runs is partly luck.
    """
    candidates: dict[tuple[str, float], list[Point]] = defaultdict(list)
    for point in sample.points:
        candidates[point.mixer, point.budget].append(point)
    return {
        key: min(points, key=lambda p: (-len(p.records), p.loss, p.first.parameters, p.first.cell))
        for key, points in candidates.items()
    }


def frontiers(selected: Mapping[tuple[str, float], Point], convention: Convention) -> dict[str, Frontier]:
    """Return the frontier of every mixer under a FLOPs convention."""
    by_mixer: dict[str, list[Point]] = defaultdict(list)
    for (mixer, _), point in sorted(selected.items()):
        by_mixer[mixer].append(point)
    result = {}
    for mixer, points in by_mixer.items():
        points = sorted(points, key=lambda p: p.flops(convention))
        result[mixer] = Frontier(
            np.array([p.flops(convention) for p in points]),
            np.array([p.loss for p in points]),
            np.stack([p.replicates for p in points], axis=1),
            tuple(points),
        )
    return result


@dataclass(frozen=True)
class Duel:
    """The subject against one rival at equal compute; `difference` is the subject's loss minus the rival's.

    Its interval, like those of a verdict, holds the noise that is known; it is NaN where none is.
    """

    rival: str
    difference: float
    low: float
    high: float
    outcome: Outcome


@dataclass(frozen=True)
class Verdict:
    """Who has the lowest loss at one budget, under one FLOPs convention."""

    budget: float  # as in the recipe
    compute: float  # FLOPs compared at: the geometric mean, over mixers, of what the budget's cells cost
    convention: Convention
    losses: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    lowest: str
    runner_up: str
    margin: float  # loss of the runner-up minus the lowest
    margin_interval: tuple[float, float]
    lowest_share: float  # share of replicates in which `lowest` is lowest; NaN where no noise is known
    duels: tuple[Duel, ...]
    outcome: Outcome  # of the subject against its best rival
    extrapolated: tuple[str, ...]  # mixers whose loss lies outside their measured range
    unmeasured: tuple[str, ...]  # mixers that were measured at other budgets only
    unknown: tuple[Noise, ...]  # noise that was not measured


def outcome_of(low: float, high: float) -> Outcome:
    """Return what an interval of (subject - rival) says."""
    return "wins" if high < 0 else "loses" if low > 0 else "inconclusive"


def judge(
    selected: Mapping[tuple[str, float], Point], subject: str, convention: Convention, confidence: float
) -> list[Verdict]:
    """Return a verdict per budget at which the subject and at least one rival were measured.

    Another convention than the budgets' own prices each mixer's cells differently; the losses are then compared at the
    geometric mean of these prices, along each mixer's frontier.
    """
    lines = frontiers(selected, convention)
    verdicts = []
    for budget in sorted({b for _, b in selected}):
        mixers = sorted(m for m, b in selected if b == budget)
        if subject not in mixers or len(mixers) < 2:
            continue
        prices = [selected[m, budget].flops(convention) for m in mixers]
        same = same_budget(selected[m, budget] for m in mixers)
        compute = math.exp(sum(map(math.log, prices)) / len(prices))
        losses: dict[str, float] = {}
        replicates: dict[str, Array] = {}
        for mixer in mixers:
            weights = lines[mixer].weights(compute, same)
            if weights is not None:
                losses[mixer] = float(lines[mixer].loss @ weights)
                replicates[mixer] = lines[mixer].replicates @ weights
        if subject not in losses or len(losses) < 2:
            continue
        ranked = sorted(losses, key=lambda m: (losses[m], m))
        lowest, runner_up = ranked[:2]
        unknown = selected[subject, budget].unknown
        if unknown == NOISE:
            replicates = {m: np.full_like(values, math.nan) for m, values in replicates.items()}
        duels = []
        for rival in ranked:
            if rival != subject:
                low, high = interval(replicates[subject] - replicates[rival], confidence)
                found: Outcome = "no verdict" if unknown else outcome_of(low, high)
                duels.append(Duel(rival, losses[subject] - losses[rival], low, high, found))
        everyone = np.stack([replicates[m] for m in ranked])
        unmeasured = tuple(sorted({m for m, _ in selected} - losses.keys()))
        # `ranked` puts the best rival first among the duels.
        outcome = duels[0].outcome
        verdicts.append(
            Verdict(
                budget=budget,
                compute=compute,
                convention=convention,
                losses=losses,
                intervals={m: interval(replicates[m], confidence) for m in ranked},
                lowest=lowest,
                runner_up=runner_up,
                margin=losses[runner_up] - losses[lowest],
                margin_interval=interval(replicates[runner_up] - replicates[lowest], confidence),
                lowest_share=math.nan if unknown == NOISE else float(np.mean(everyone.argmin(axis=0) == 0)),
                duels=tuple(duels),
                outcome="unfinished" if unmeasured and outcome == "wins" else outcome,
                extrapolated=tuple(m for m in ranked if not lines[m].measured(compute, same)),
                unmeasured=unmeasured,
                unknown=unknown,
            )
        )
    return verdicts


@dataclass(frozen=True)
class Envelope:
    """The lowest loss that any training run of a mixer reached by some compute; vertices, falling in loss."""

    compute: Array
    loss: Array


def averaged(steps: Array, loss: Array) -> tuple[Array, Array]:
    """Average a curve over stretches of ENVELOPE_BIN and ENVELOPE_STEPS at least, and drop the rest at its end.

    Args:
        steps: (P,) rising and positive; each point is a mean over what was trained on since the point before.
        loss: (P,)
    Returns:
        Steps, as the geometric mean of a stretch's points, and loss, both per stretch.
    """
    means: list[tuple[float, float]] = []
    start, begin = 0, 0.0
    for stop, end in enumerate(steps, 1):
        if end - begin >= ENVELOPE_STEPS and end >= begin * ENVELOPE_BIN:
            means.append((float(np.exp(np.log(steps[start:stop]).mean())), float(loss[start:stop].mean())))
            start, begin = stop, end
    at, mean = np.array(means, dtype=np.float64).reshape(-1, 2).T
    return at, mean


def trunk_curve(record: CellRecord, convention: Convention) -> tuple[Array, Array]:
    """Return the unannealed training curve of a record as FLOPs and averaged loss; empty where the run is too short."""
    points = [p for p in record.curve if p.kind == "train" and not p.annealed and p.tokens > 0]
    steps = np.array([p.tokens / record.batch_tokens for p in points], dtype=np.float64)
    at, loss = averaged(steps, np.array([p.loss for p in points], dtype=np.float64))
    return at * record.batch_tokens * record.flops_per_token[convention], loss


def envelope(curves: Sequence[tuple[Array, Array]]) -> Envelope:
    """Return the lower envelope of training curves, each joined by straight lines in log compute."""
    compute = np.unique(np.concatenate([c for c, _ in curves]))
    # Between a curve's points its line counts: the first point of a large model is no minimum where the line of a small
    # one passes below.
    lines = [np.interp(np.log(compute), np.log(c), l, left=np.inf, right=np.inf) for c, l in curves if c.size]
    loss = np.min(lines, axis=0)
    new_minimum = loss < np.concatenate([[np.inf], np.minimum.accumulate(loss)[:-1]])
    return Envelope(compute[new_minimum], loss[new_minimum])


@dataclass(frozen=True)
class Gain:
    """Compute-equivalent gain: compute with which the baseline reaches the same loss, over the compute spent.

    `bound` says where the baseline never was as low ("at least") or never as high ("at most") as this loss.
    """

    compute: float
    loss: float
    gain: float
    bound: Literal["", "at least", "at most"] = ""


def needed(compute: Array, loss: Array, target: float) -> tuple[float, Literal["", "at least", "at most"]]:
    """Return the compute at which a falling curve first reaches `target`, interpolated in log compute.

    Args:
        compute: (P,) rising.
        loss: (P,); only its running minima count.
    Returns:
        The compute and, outside the curve, whether it is a lower or an upper bound.
    """
    lowest = np.minimum.accumulate(loss)
    if target < lowest[-1]:
        return float(compute[-1]), "at least"
    if target > lowest[0]:
        return float(compute[0]), "at most"
    right = int(np.argmax(lowest <= target))
    if right == 0 or lowest[right] == target:
        return float(compute[right]), ""
    # The last point that set the minimum before: a plateau of the running minimum is no progress.
    left = int(np.argmax(lowest == lowest[right - 1]))
    t = (lowest[left] - target) / (lowest[left] - lowest[right])
    return float(np.exp((1 - t) * np.log(compute[left]) + t * np.log(compute[right]))), ""


def gains(compute: Array, loss: Array, base_compute: Array, base_loss: Array) -> list[Gain]:
    """Return the gain over a baseline curve at every point of a curve."""
    result = []
    for c, l in zip(compute, loss, strict=True):
        at, bound = needed(base_compute, base_loss, float(l))
        result.append(Gain(float(c), float(l), at / float(c), bound))
    return result


@dataclass(frozen=True)
class GainInterval:
    """The gain of an annealed point with its interval; an end of it may be a bound."""

    mixer: str
    budget: float
    point: Gain
    low: float
    low_bound: bool  # the baseline was never as high as needed: the gain may be lower still
    high: float
    high_bound: bool  # the baseline was never as low as needed: the gain may be higher still
    censored_share: float  # share of replicates in which the gain is a bound


def frontier_gains(lines: Mapping[str, Frontier], baseline: str, confidence: float) -> list[GainInterval]:
    """Return the gain of every mixer's annealed points over the baseline's frontier, bootstrapped together."""
    if baseline not in lines:
        return []
    base = lines[baseline]
    result = []
    for mixer, line in lines.items():
        if mixer == baseline:
            continue
        for index, point in enumerate(gains(line.compute, line.loss, base.compute, base.loss)):
            drawn = [
                needed(base.compute, losses, float(own))
                for losses, own in zip(base.replicates, line.replicates[:, index], strict=True)
            ]
            low, high = interval(np.array([c for c, _ in drawn]) / line.compute[index], confidence)
            # The interval is around the point, also where nearly all replicates lie on one side of it.
            low, high = min(low, point.gain), max(high, point.gain)
            bounds = [bound for _, bound in drawn]
            tail = (1 - confidence) / 2 * len(bounds)
            result.append(
                GainInterval(
                    mixer=mixer,
                    budget=line.points[index].budget,
                    point=point,
                    low=low,
                    low_bound=point.bound == "at most" or bounds.count("at most") > tail,
                    high=high,
                    high_bound=point.bound == "at least" or bounds.count("at least") > tail,
                    censored_share=1 - bounds.count("") / len(bounds),
                )
            )
    return result

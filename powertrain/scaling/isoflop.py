"""The sizes of one mixer at one budget: which is best, and whether it is bracketed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from powertrain.scaling.fit import Parabola, fit_parabola
from powertrain.scaling.resample import NOISE, Point, Sample, interval

Array = NDArray[np.float64]


@dataclass(frozen=True)
class MinimumInterval:
    """Where the sizes' minimum lies in replicates; an end of it may be a bound, which is the last size measured."""

    low: float  # parameters
    low_bound: bool  # the smallest size was the best: the minimum may be smaller still
    high: float
    high_bound: bool  # the largest size was the best: the minimum may be larger still
    unbracketed_share: float  # share of replicates in which the sizes measured bracket no minimum


def _edge(parameters: Array, loss: Array, parabola: Parabola | None) -> str | None:
    best = int(np.argmin(loss))
    if parameters.size == 1:
        return "only one size was measured"
    if best == 0:
        return "the smallest size measured is the best"
    if best == parameters.size - 1:
        return "the largest size measured is the best"
    if parabola is not None and parabola.on_edge:
        return "the parabola's minimum lies outside the sizes it was fitted on"
    return None


@dataclass(frozen=True)
class IsoFlop:
    """The sizes of one mixer at one budget: best learning rate each, and the parabola through them."""

    mixer: str
    budget: float
    points: tuple[Point, ...]  # rising in parameters
    parabola: Parabola | None
    parameters_interval: MinimumInterval | None  # of `minimum`; None where no noise is known

    @property
    def best(self) -> Point:
        """The size of the lowest loss."""
        return min(self.points, key=lambda p: p.loss)

    @property
    def edge(self) -> str | None:
        """Why the best size may lie beyond those measured, or None."""
        return _edge(*_curve(self.points), self.parabola)

    @property
    def minimum(self) -> Parabola | None:
        """The parabola, where its minimum is among the sizes measured, with one at least that is worse on each side."""
        return self.parabola if self.edge is None else None


def _curve(points: Sequence[Point]) -> tuple[Array, Array]:
    return np.array([p.first.parameters for p in points]), np.array([p.loss for p in points])


def minimum_interval(parameters: Array, replicates: Array, minimum: float, confidence: float) -> MinimumInterval:
    """Return the interval around the minimum of a parabola.

    A replicate whose sizes bracket no minimum counts as the end of the sizes that is lower: beyond it there is no
    measurement, and a parabola's vertex may be anywhere.

    Args:
        parameters: (P,) rising.
        replicates: (R, P) losses.
    """
    ends = parameters[[0, -1]]
    drawn, sides = np.empty(len(replicates)), np.full(len(replicates), -1)
    for number, loss in enumerate(replicates):
        parabola = fit_parabola(parameters, loss)
        if parabola is not None and _edge(parameters, loss, parabola) is None:
            drawn[number] = parabola.parameters
        else:
            sides[number] = int(np.argmin(loss[[0, -1]]))
            drawn[number] = ends[sides[number]]
    low, high = interval(drawn, confidence)
    tail = (1 - confidence) / 2
    return MinimumInterval(
        # Around the minimum, also where nearly all replicates lie on one side of it.
        low=min(low, minimum),
        low_bound=bool(np.mean(sides == 0) > tail),
        high=max(high, minimum),
        high_bound=bool(np.mean(sides == 1) > tail),
        unbracketed_share=float(np.mean(sides >= 0)),
    )


def isoflops(sample: Sample, confidence: float) -> list[IsoFlop]:
    """Return the sizes per mixer and budget, each at its best learning rate and batch, with their parabola."""
    groups: dict[tuple[str, float], dict[str, Point]] = defaultdict(dict)
    for point in sample.points:
        sizes = groups[point.mixer, point.budget]
        best = sizes.get(point.size)
        if best is None or (-len(point.records), point.loss) < (-len(best.records), best.loss):
            sizes[point.size] = point
    result = []
    for (mixer, budget), sizes in sorted(groups.items()):
        points = tuple(sorted(sizes.values(), key=lambda p: p.first.parameters))
        parameters, losses = _curve(points)
        found = IsoFlop(mixer, budget, points, fit_parabola(parameters, losses), None)
        if found.minimum is not None and sample.unknown != NOISE:
            replicates = np.stack([p.replicates for p in points], axis=1)
            some = replicates[:: max(1, len(replicates) // 200)]
            spread = minimum_interval(parameters, some, found.minimum.parameters, confidence)
            found = replace(found, parameters_interval=spread)
        result.append(found)
    return result

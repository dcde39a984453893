"""The sizes of one mixer at one budget: which is best, and whether it is bracketed."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np

from powertrain.scaling.fit import Parabola, fit_parabola
from powertrain.scaling.resample import NOISE, Point, Sample, interval


@dataclass(frozen=True)
class IsoFlop:
    """The sizes of one mixer at one budget: best learning rate each, and the parabola through them."""

    mixer: str
    budget: float
    points: tuple[Point, ...]  # rising in parameters
    parabola: Parabola | None
    parameters_interval: tuple[float, float] | None  # of `minimum`

    @property
    def best(self) -> Point:
        """The size of the lowest loss."""
        return min(self.points, key=lambda p: p.loss)

    @property
    def edge(self) -> str | None:
        """Why the best size may lie beyond those measured, or None."""
        if len(self.points) == 1:
            return "only one size was measured"
        if self.best is self.points[0]:
            return "the smallest size measured is the best"
        if self.best is self.points[-1]:
            return "the largest size measured is the best"
        if self.parabola is not None and self.parabola.on_edge:
            return "the parabola's minimum lies outside the sizes it was fitted on"
        return None

    @property
    def minimum(self) -> Parabola | None:
        """The parabola, where its minimum is among the sizes measured, with one at least that is worse on each side."""
        return self.parabola if self.edge is None else None


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
        parameters = np.array([p.first.parameters for p in points])
        parabola = fit_parabola(parameters, np.array([p.loss for p in points]))
        found = IsoFlop(mixer, budget, points, parabola, None)
        if found.minimum is not None and sample.unknown != NOISE:
            replicates = np.stack([p.replicates for p in points], axis=1)
            fits = [fit_parabola(parameters, losses) for losses in replicates[:: max(1, len(replicates) // 200)]]
            minima = np.array([f.parameters for f in fits if f is not None])
            found = replace(found, parameters_interval=interval(minima, confidence))
        result.append(found)
    return result

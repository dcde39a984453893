"""The bootstrap over evaluation text and seeds: all mixers are resampled together, so comparisons are paired."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from powertrain.scaling.recipe import Convention
from powertrain.scaling.records import CellRecord

Array = NDArray[np.float64]
# Why a loss would be another one if all were done again.
Noise = Literal["documents", "seeds"]
NOISE: tuple[Noise, ...] = get_args(Noise)
# What is resampled for the noise between documents: the parts of documents that evaluation sequences hold, or the whole
# sequences, where records do not say which are of one document.
Unit = Literal["documents", "parts of documents", "sequences"]


@dataclass(frozen=True)
class Point:
    """One configuration at one budget: the mean over its seeds, and replicates of that mean."""

    mixer: str
    size: str
    context: int
    budget: float
    records: tuple[CellRecord, ...]  # one per seed, in the seeds' order
    loss: float
    replicates: Array  # (R,) over documents and seeds, as far as their noise is known
    document_replicates: Array  # (R,) over documents alone
    unknown: tuple[Noise, ...]  # noise that was not measured, and that replicates do not hold

    @property
    def first(self) -> CellRecord:
        """The record that stands for what all seeds share."""
        return self.records[0]

    def flops(self, convention: Convention) -> float:
        """Return the training FLOPs of one seed."""
        return self.first.flops(convention)

    @property
    def seconds(self) -> float | None:
        """Mean device-seconds over the seeds; None where any was not measured."""
        measured = [r.seconds for r in self.records]
        return None if any(s is None for s in measured) else sum(s for s in measured if s is not None) / len(measured)


@dataclass(frozen=True)
class SeedNoise:
    """Standard deviation of the loss between seeds of one configuration, pooled over all that have several."""

    deviation: float  # nats per token
    degrees: int  # degrees of freedom


@dataclass(frozen=True)
class Sample:
    """All points of a sweep, resampled together."""

    points: tuple[Point, ...]
    documents: int  # resampled; 0: the records do not hold losses of several, of the same text in all
    unit: Unit  # that these are
    seed_noise: SeedNoise | None  # None: no configuration has two seeds
    unknown: tuple[Noise, ...]  # noise that was not measured


def pooled_seed_noise(groups: Sequence[Sequence[float]]) -> SeedNoise | None:
    """Return the pooled standard deviation within groups, or None where no group has two members."""
    squares, degrees = 0.0, 0
    for losses in groups:
        if len(losses) > 1:
            squares += float(np.var(losses, ddof=1)) * (len(losses) - 1)
            degrees += len(losses) - 1
    return SeedNoise(float(np.sqrt(squares / degrees)), degrees) if degrees else None


def _configurations(records: Iterable[CellRecord]) -> dict[tuple[object, ...], list[CellRecord]]:
    """Return the annealed records, in the seeds' order, by all that they hold of how a configuration is trained."""
    groups: dict[tuple[object, ...], list[CellRecord]] = defaultdict(list)
    for r in sorted(records, key=lambda r: (r.mixer, r.budget, r.parameters, r.cell)):
        if r.annealed:
            trained = r.learning_rate, r.batch_tokens, r.steps, r.data.get("tokens")
            groups[(*r.place, r.size, *trained, r.data.get("evaluation"))].append(r)
    return {key: sorted(rs, key=lambda r: r.seed) for key, rs in groups.items()}


def _one_per_seed(records: Sequence[CellRecord]) -> bool:
    return len({r.seed for r in records}) == len(records)


def _seeds(records: Sequence[CellRecord]) -> list[Sequence[CellRecord]]:
    """Return a configuration's records as those that differ in the seed alone.

    Where two are of one seed they differ in what records do not hold, such as the warmup: each is by itself.
    """
    return [records] if _one_per_seed(records) else [[r] for r in records]


def _seed_noise(records: Iterable[CellRecord], others: Iterable[CellRecord]) -> SeedNoise | None:
    own, aside = _configurations(records), _configurations(others)
    groups: list[Sequence[CellRecord]] = []
    for key in own | aside:
        parts = own.get(key, []), aside.get(key, [])
        together = [*parts[0], *parts[1]]
        groups += [together] if _one_per_seed(together) else [g for part in parts for g in _seeds(part)]
    return pooled_seed_noise([[r.loss for r in rs] for rs in groups])


def resample(
    records: Sequence[CellRecord], replicates: int, seed: int = 0, others: Sequence[CellRecord] = ()
) -> Sample:
    """Group annealed records by configuration and resample documents and seeds.

    Documents: each replicate draws as many as there are, with replacement, the *same* ones for every cell; a document
    that reaches over several evaluation sequences is one, if any record says so.
    Seeds: a handful cannot be resampled (two seeds have three distinct means), so each replicate adds Student-t noise
    with the pooled deviation and degrees of freedom, over the root of the number of seeds, per configuration.

    Args:
        records: of one context; unannealed ones are ignored.
        replicates: R.
        seed: of the bootstrap.
        others: records of the same context that are no points, but of which several seeds of a configuration say as
            well how much seeds differ.
    """
    members = [rs for found in _configurations(records).values() for rs in _seeds(found)]
    rng = np.random.default_rng(seed)
    used = [r for rs in members for r in rs]
    texts = {(r.document_tokens, r.data.get("evaluation")) for r in used}
    numbers = {r.document_numbers for r in used if r.document_numbers}
    weights: Array | None = None
    documents = 0
    unit: Unit = "parts of documents"
    if all(len(r.document_tokens) == len(r.position_tokens) for r in used):
        unit = "sequences"
    if len(texts) == 1 and len(numbers) <= 1:
        parts = np.array(used[0].document_tokens, dtype=np.float64)
        index = np.arange(parts.size)
        if numbers:
            unit = "documents"
            index = np.unique(np.array(numbers.pop()), return_inverse=True)[1]
        tokens = np.bincount(index, parts)
        if tokens.size > 1:
            documents = tokens.size
            drawn = rng.multinomial(documents, np.full(documents, 1 / documents), size=replicates)
            weights = (drawn / (drawn @ tokens)[:, None])[:, index]
    noise = _seed_noise(records, others)
    measured = {"documents": documents > 0, "seeds": noise is not None}
    unknown = tuple(source for source in NOISE if not measured[source])
    points = []
    for rs in members:
        loss = float(np.mean([r.loss for r in rs]))
        values = np.full(replicates, loss)
        if weights is not None:
            values = weights @ np.mean([r.document_loss for r in rs], axis=0)
        by_documents = values
        if noise is not None:
            values = values + rng.standard_t(noise.degrees, size=replicates) * noise.deviation / np.sqrt(len(rs))
        r = rs[0]
        points.append(Point(r.mixer, r.size, r.context, r.budget, tuple(rs), loss, values, by_documents, unknown))
    return Sample(tuple(points), documents, unit, noise, unknown)


def comparison_intervals(replicates: Array, confidence: float) -> Array:
    """Return intervals for comparing several mixers, without the shift that all of them share.

    A hard draw of documents raises every loss; that shift says nothing about which mixer is lower, and would drown the
    difference. Within-subject intervals: Cousineau 2005, with the correction of Morey 2008.

    Args:
        replicates: (M, R), resampled together.
    Returns:
        (M, 2) lower and upper percentiles; of the replicates as they are for M = 1.
    """
    count = len(replicates)
    if count > 1:
        means = replicates.mean(axis=1, keepdims=True)
        own = replicates - means - (replicates - means).mean(axis=0)
        replicates = means + own * np.sqrt(count / (count - 1))
    tail = (1 - confidence) / 2
    return np.quantile(replicates, [tail, 1 - tail], axis=1).T


def interval(replicates: Array, confidence: float) -> tuple[float, float]:
    """Return the percentile interval of replicates (R,)."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(replicates, [tail, 1 - tail])
    return float(low), float(high)

"""Records of sweeps whose truth is known: laws per mixer, seed noise, document noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from powertrain.scaling.fit import Law
from powertrain.scaling.recipe import Recipe, Rule, Stage, Variant
from powertrain.scaling.records import CellRecord, CurvePoint

BUDGETS = (1e15, 3e15, 1e16, 3e16)
SIZES = {"1m": 1e6, "3m": 3e6, "8m": 8e6, "20m": 2e7, "60m": 6e7}

# A crossing as one expects at long contexts: the subject is better at all budgets, by less and less; the baseline
# spends much of its FLOPs on attention.
LAWS = {
    "power": Law(E=1.10, A=160.0, alpha=0.33, B=420.0, beta=0.33),
    "softmax": Law(E=1.05, A=160.0, alpha=0.33, B=420.0, beta=0.33),
    "linear": Law(E=1.40, A=160.0, alpha=0.33, B=420.0, beta=0.33),
    "window": Law(E=1.25, A=160.0, alpha=0.33, B=420.0, beta=0.33),
}
ATTENTION = {"power": 0.8, "softmax": 6.0, "linear": 0.2, "window": 0.4}  # FLOPs of mixing, of those of a 10m model


def recipe(name: str = "synthetic", **changes: object) -> Recipe:
    """A recipe that fits the synthetic records."""
    values: dict = {
        "name": name,
        "question": "Which mixer has the lowest perplexity at each budget?",
        "contexts": (65536,),
        "mixers": {
            "power": Variant(("mixer=power",), "power, deg 2"),
            "softmax": Variant(("mixer=softmax",), "softmax"),
            "linear": Variant(("mixer=linear",), "linear"),
            "window": Variant(("mixer=window",), "window"),
        },
        "ladder": {size: Variant((f"model={size}",)) for size in SIZES},
        "subject": "power",
        "baseline": "softmax",
        "stages": (Stage(BUDGETS, "all", "grid"),),
        "learning_rate": Rule(1e-3, grid=(0.5, 1.0, 2.0)),
        "batch_tokens": Rule(65536),
    }
    return Recipe(**{**values, **changes})  # type: ignore[arg-type]


def flops_per_token(mixer: str, parameters: float) -> dict[str, float]:
    """Costs that differ between conventions, as real ones do."""
    body = 6 * parameters
    mixing = 6 * 1e7 * ATTENTION[mixer] * math.sqrt(parameters / 1e7)
    head = 6 * 8192 * 20 * math.sqrt(parameters / 1e6)
    executed = body + 1.5 * mixing + head
    return {
        "algorithmic": body + mixing + head,
        "algorithmic, no head": body + mixing,
        "executed": executed,
        "executed, no head": executed - head,
    }


def make_records(
    laws: Mapping[str, Law] = LAWS,
    budgets: Sequence[float] = BUDGETS,
    sizes: Mapping[str, float] = SIZES,
    seeds: Sequence[int] = (0,),
    factors: Sequence[float] = (0.5, 1.0, 2.0),
    noise: float = 0.004,
    documents: int = 200,
    document_spread: float = 0.6,
    rng_seed: int = 0,
    curves: bool = True,
    context: int = 65536,
) -> list[CellRecord]:
    """Return one record per combination; `noise` is the deviation between seeds, in nats per token."""
    rng = np.random.default_rng(rng_seed)
    # The documents are the same for all records, whatever the seed of their noise.
    fixed = np.random.default_rng(1234)
    lengths = fixed.integers(500, 8000, size=documents)
    difficulty = fixed.lognormal(0, document_spread, size=documents)
    difficulty /= (difficulty * lengths).sum() / lengths.sum()
    bounds = tuple(2**i for i in range(6, 17))
    rows = 16
    tokens_by_bucket = np.diff([0, *bounds])
    records = []
    for mixer, law in laws.items():
        for budget in budgets:
            for size, n in sizes.items():
                for factor in factors:
                    for seed in seeds:
                        cost = flops_per_token(mixer, n)
                        d = budget / cost["algorithmic"]
                        truth = float(law(n, d)) + 0.03 * math.log2(factor) ** 2 + rng.normal(0, noise)
                        own = rng.normal(0, 0.01, size=documents)
                        per_document = truth * difficulty * np.exp(own) * lengths
                        loss = float(per_document.sum() / lengths.sum())
                        shape = np.array(bounds, dtype=float) ** -0.06
                        shape /= (shape * tokens_by_bucket).sum() / tokens_by_bucket.sum()
                        by_row = rng.lognormal(0, 0.1, size=(rows, 1)) * shape * tokens_by_bucket * loss
                        points = np.geomspace(d / 200, d, 120) if curves else np.array([])
                        curve = [
                            CurvePoint(float(t), float(law(n, t)) + 0.05 + rng.normal(0, 0.01), float(t / 1e5), False)
                            for t in points
                        ]
                        records.append(
                            CellRecord(
                                cell=f"synthetic-{mixer}-{budget:.0e}-{size}-{factor:g}-{seed}",
                                sweep="synthetic",
                                mixer=mixer,
                                size=size,
                                context=context,
                                budget=budget,
                                seed=seed,
                                learning_rate=1e-3 * factor,
                                learning_rate_factor=factor,
                                batch_tokens=65536,
                                steps=int(d / 65536),
                                tokens=d,
                                parameters=n,
                                parameters_total=n + 8192 * 100,
                                flops_per_token=cost,
                                flops_by_part={
                                    "weights": 6 * n,
                                    "head": cost["algorithmic"] - cost["algorithmic, no head"],
                                    "intra_chunk": 0.3 * (cost["algorithmic, no head"] - 6 * n),
                                    "state_update": 0.35 * (cost["algorithmic, no head"] - 6 * n),
                                    "state_query": 0.35 * (cost["algorithmic, no head"] - 6 * n),
                                },
                                state_size=0.0 if mixer == "softmax" else 1e5 * ATTENTION[mixer],
                                loss=loss,
                                seconds=d * cost["executed"] / 2e14,
                                device="NVIDIA H200",
                                document_loss=tuple(float(x) for x in per_document),
                                document_tokens=tuple(int(x) for x in lengths),
                                position_bounds=bounds,
                                position_loss=tuple(tuple(float(x) for x in row) for row in by_row),
                                position_tokens=tuple(tuple(int(x) for x in tokens_by_bucket) for _ in range(rows)),
                                curve=tuple(curve),
                                data={"tokens": "a", "order": f"b{seed}", "evaluation": "c"},
                                environment={"commit": "0" * 12},
                            )
                        )
    return records

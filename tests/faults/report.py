"""The figures of a campaign: faults tried, survived and lost, by kind."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from powertrain.cluster.snapshot import code_version
from tests.faults.campaign import ALONE, Chain, Outcome, References
from tests.faults.run import CHECKPOINT_EVERY, STEPS


@dataclasses.dataclass
class Report:
    """Collects what became of the faults."""

    references: References
    seed: int
    command: str
    outcomes: list[Outcome] = dataclasses.field(default_factory=list)
    missed: int = 0  # faults of which the run had ended before
    not_tried: int = 0  # full disks where none can be mounted
    moves: int = 0  # restarts in another layout
    deviation: float = 0.0  # largest, of losses of runs whose layout changed, nats
    seconds: float = 0.0

    def add(self, outcome: Outcome) -> None:
        """Take one fault."""
        self.outcomes.append(outcome)

    def add_chain(self, chain: Chain) -> None:
        """Take all faults of a chain."""
        self.outcomes += chain.outcomes
        self.missed += chain.missed
        self.moves += chain.moves
        if len(chain.layouts) > 1:
            self.deviation = max(self.deviation, chain.deviation)

    @property
    def lost(self) -> int:
        """Faults that were not survived."""
        return sum(not outcome.survived for outcome in self.outcomes)

    def kinds(self) -> dict[str, dict[str, int]]:
        """Return the number of faults tried, survived and lost by kind."""
        counts: dict[str, dict[str, int]] = {}
        for outcome in self.outcomes:
            count = counts.setdefault(outcome.kind, {"tried": 0, "survived": 0, "lost": 0})
            count["tried"] += 1
            count["survived" if outcome.survived else "lost"] += 1
        return counts

    def table(self) -> str:
        """Return the figures for people."""
        total = {"tried": len(self.outcomes), "survived": len(self.outcomes) - self.lost, "lost": self.lost}
        rows = [*self.kinds().items(), ("all", total)]
        lines = [f"{'fault':<52} {'tried':>6} {'survived':>9} {'lost':>5}"]
        lines += [f"{kind:<52} {c['tried']:>6} {c['survived']:>9} {c['lost']:>5}" for kind, c in rows]
        lines += [
            f"{self.moves} restarts in another layout (ranks, strategy); losses then within {self.deviation:.1e} nats "
            f"(allowed {self.references.tolerance()[-1]:.1e}), else bit for bit",
            f"{self.missed} faults came too late for their run, {self.not_tried} could not be tried here; "
            f"seed {self.seed}, {self.seconds:.0f} s",
        ]
        return "\n".join(lines)

    def values(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            "command": self.command,
            "code": code_version(),
            "seed": self.seed,
            "seconds": round(self.seconds),
            "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__},
            "run": {
                "steps": STEPS,
                "checkpoint_every": CHECKPOINT_EVERY,
                "token_order_sha256": self.references.by_layout[ALONE].order_hash,
                "layouts": [str(layout) for layout in self.references.by_layout],
            },
            "faults": {"tried": len(self.outcomes), "survived": len(self.outcomes) - self.lost, "lost": self.lost},
            "by_kind": self.kinds(),
            "missed": self.missed,
            "not_tried": self.not_tried,
            "restarts_in_another_layout": self.moves,
            "loss_deviation_after_another_layout": {
                "largest_nats": self.deviation,
                "allowed_nats_at_the_end": self.references.tolerance()[-1],
            },
            "each": [
                {key: value for key, value in dataclasses.asdict(outcome).items() if value is not None}
                for outcome in self.outcomes
            ],
        }

    def write(self, path: Path) -> None:
        """Write the figures as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.values(), indent=1) + "\n")

"""The learning rate as a pure function of progress: it has no state to save, and a plot of it needs no training."""

from __future__ import annotations

import math
from dataclasses import dataclass

from powertrain.training.config import ScheduleConfig
from powertrain.training.length import TrainingLength


@dataclass(frozen=True)
class Schedule:
    """Multiplier of the peak learning rate over a run of known length.

    Warm-up and decay are held in steps (not rounded), because tokens and FLOPs per step are constant within a run.

    Errors:
        ValueError: warm-up and decay together are longer than the run.
    """

    config: ScheduleConfig
    length: TrainingLength

    def __post_init__(self) -> None:
        if self.warmup_steps + self.decay_steps > self.length.steps * (1 + 1e-9):
            parts = f"schedule.warmup {self.config.warmup:g}"
            parts += f" and schedule.decay {self.config.decay:g}" if self.config.kind == "wsd" else ""
            raise ValueError(
                f"{parts} in {self.config.unit} take {self.warmup_steps + self.decay_steps:.6g} steps, but the run has"
                f" only {self.length.steps}; shorten them, or give fractions of the run (at most 1)."
            )

    def _steps(self, amount: float) -> float:
        if amount <= 1.0:
            return amount * self.length.steps
        per_step = {
            "steps": 1.0,
            "tokens": float(self.length.tokens_per_step),
            "flops": self.length.flops_per_step,
        }
        return amount / per_step[self.config.unit]

    @property
    def warmup_steps(self) -> float:
        """Length of the warm-up in steps."""
        return self._steps(self.config.warmup)

    @property
    def decay_steps(self) -> float:
        """Length of the decay in steps; 0 for schedules without a decay of their own length."""
        return self._steps(self.config.decay) if self.config.kind == "wsd" else 0.0

    def multiplier(self, step: int) -> float:
        """Return the multiplier for the update that follows `step` finished updates (0 <= step < length.steps).

        The first update already has a rate above 0, and the final fraction is what an update after the last would have.
        """
        warmup, total = self.warmup_steps, float(self.length.steps)
        if step + 1 < warmup:
            return (step + 1) / warmup
        final = self.config.final
        if self.config.kind == "cosine":
            x = min(1.0, max(0.0, step - warmup) / max(1.0, total - warmup))
            return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * x))
        if self.config.kind == "wsd" and step > total - self.decay_steps:
            x = min(1.0, (step - (total - self.decay_steps)) / self.decay_steps)
            fall = x if self.config.shape == "linear" else math.sqrt(x)
            return 1.0 - (1.0 - final) * fall
        return 1.0

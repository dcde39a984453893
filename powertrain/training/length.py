"""How long a run is: one budget (steps, tokens or FLOPs) turned into whole optimizer steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

from powertrain.training.config import BudgetConfig, DebugConfig, TrainerConfig
from powertrain.wording import counted

# Training tokens per parameter that minimise the loss for a given compute (Hoffmann et al., 2022, section 3).
TOKENS_PER_PARAMETER = 20
# Up to so many epochs a repeated token is worth about as much as a new one, and from so many on nothing (Muennighoff et
# al., 2023, figure 1).
MANY_EPOCHS = 4
WORTHLESS_EPOCHS = 40


@dataclass(frozen=True)
class TrainingLength:
    """The length of a run in steps, and what a step costs."""

    steps: int  # optimizer steps
    tokens_per_step: int  # input tokens of one step over all devices
    flops_per_token: float  # algorithmic FLOPs of one token, forward and backward
    reason: str  # what decided the number of steps, for the user
    given: bool = True  # whether the configuration says how long; False where it follows from the model's size

    @property
    def flops_per_step(self) -> float:
        """Algorithmic FLOPs of one step, forward and backward."""
        return self.flops_per_token * self.tokens_per_step

    @property
    def tokens(self) -> int:
        """Tokens of the whole run."""
        return self.steps * self.tokens_per_step

    @property
    def flops(self) -> float:
        """Algorithmic FLOPs of the whole run, forward and backward."""
        return self.steps * self.flops_per_step


def resolve_length(
    trainer: TrainerConfig,
    budget: BudgetConfig,
    debug: DebugConfig,
    *,
    flops_per_token: float,
    num_parameters: int,
) -> TrainingLength:
    """Turn the one budget that is given into steps, rounded up; without any, train 20 tokens per parameter.

    Args:
        flops_per_token: algorithmic FLOPs of one token, forward and backward, as `models.flops` counts them.
        num_parameters: of the model, for the length that is chosen where none is given.
    Errors:
        ValueError: more than one of trainer.max_steps, trainer.max_tokens and budget.value is given.
    """
    given = {
        "trainer.max_steps": trainer.max_steps,
        "trainer.max_tokens": trainer.max_tokens,
        "budget.value": budget.value,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) > 1:
        raise ValueError(f"{' and '.join(f'{k}={v:g}' for k, v in given.items())} are all given; give one budget.")
    is_given = bool(given)
    tokens_per_step = trainer.global_batch_tokens
    per_step = {"steps": 1.0, "tokens": float(tokens_per_step), "flops": flops_per_token * tokens_per_step}
    if trainer.max_steps is not None:
        unit, amount, reason = "steps", float(trainer.max_steps), "trainer.max_steps"
    elif trainer.max_tokens is not None:
        unit, amount, reason = "tokens", float(trainer.max_tokens), "trainer.max_tokens"
    elif budget.value is not None:
        unit, amount, reason = budget.kind, float(budget.value), f"budget.value in {budget.kind}"
    else:
        unit, amount = "tokens", float(TOKENS_PER_PARAMETER * num_parameters)
        reason = f"no budget given: {TOKENS_PER_PARAMETER} tokens per parameter"
    # Budgets that are whole multiples of a step must not gain one by rounding of the division.
    steps = max(1, math.ceil(amount / per_step[unit] * (1 - 1e-12)))
    if debug.max_steps is not None and debug.max_steps < steps:
        steps, reason, is_given = debug.max_steps, "debug.max_steps", True
    return TrainingLength(steps, tokens_per_step, flops_per_token, reason, is_given)


def check_epochs(length: TrainingLength, train_tokens: int) -> None:
    """Refuse a length that nobody gave where the data are far too few for it; one that was given `plan_lines` warns of.

    Args:
        train_tokens: of one epoch.
    Errors:
        ValueError: no budget is given, and the run would repeat its data more than `WORTHLESS_EPOCHS` times.
    """
    epochs = length.tokens / train_tokens
    if length.given or epochs <= WORTHLESS_EPOCHS:
        return
    # Whole steps, since a budget is rounded up to them.
    one, many = (max(1, n * train_tokens // length.tokens_per_step) * length.tokens_per_step for n in (1, MANY_EPOCHS))
    raise ValueError(
        f"no budget is given, and {TOKENS_PER_PARAMETER} tokens per parameter would be {epochs:.0f} epochs of the "
        f"{amount(train_tokens)} training tokens: give trainer.max_tokens={one} for one epoch, "
        f"trainer.max_tokens={many} for {MANY_EPOCHS}, or more text"
    )


def amount(value: float) -> str:
    """Return a number with three digits and a unit prefix: 950, 12.3k, 4.56M, 1.2G."""
    for limit, suffix in ((1e3, ""), (1e6, "k"), (1e9, "M"), (1e12, "G"), (1e15, "T")):
        if value < limit * 0.9995:
            return f"{value / (limit / 1e3):.3g}{suffix}"
    return f"{value:.2e}"


def plan_lines(length: TrainingLength, train_tokens: int | None) -> list[str]:
    """Return what a run will do, for the user, and a warning where it repeats its data many times.

    Args:
        train_tokens: of one epoch; None where the data are not prepared.
    """
    epochs = None if train_tokens is None else length.tokens / train_tokens
    repeats = "data not prepared yet, so epochs not known" if epochs is None else f"{epochs:.2f} epochs"
    lines = [
        f"plan    {counted(length.steps, 'step')} of {counted(length.tokens_per_step, 'token')} = "
        f"{amount(length.tokens)} tokens "
        f"({repeats}), {length.flops:.3g} FLOPs ({length.reason})"
    ]
    if epochs is not None and epochs > MANY_EPOCHS:
        lines.append(
            f"warning the run goes {epochs:.1f} times over its data, and past {MANY_EPOCHS} times it learns ever less "
            f"from them: give it more text or fewer tokens"
        )
    return lines

"""From a recipe to cells: which runs there are, what each costs, which are infeasible, which await other results."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from powertrain.config import RunConfig
from powertrain.scaling.recipe import Convention, Recipe, Stage
from powertrain.schema import ConfigError
from powertrain.training.config import BudgetConfig

Choice = TypeVar("Choice", bound=Hashable)

# The compute-optimal size grows about as the square root of the budget (Hoffmann et al. 2022, table 2: 0.46 to 0.50).
# Only where the frontier is searched depends on it, not what is found there.
OPTIMUM_EXPONENT = 0.5

# fp32 weight, gradient and the two moments of AdamW.
BYTES_PER_PARAMETER = 16
# bf16 numbers that the backward pass of a block needs per token and channel, at the least (Korthikanti et al. 2022,
# arXiv:2205.05198, equation 2: 34 bytes without attention scores); with checkpointing only the block's input.
BLOCK_BYTES, CHECKPOINTED_BYTES = 34, 2


@dataclass(frozen=True)
class Cost:
    """FLOPs per token (forward and backward), parameters and state of a model at one context."""

    flops_per_token: dict[Convention, float]
    flops_by_part: dict[str, float]  # algorithmic; one entry per part, summing to the convention `algorithmic`
    parameters: float  # without the embeddings
    parameters_total: float
    state_size: float  # numbers that hold a sequence's history, over all layers; 0: they grow with the context


class Catalog(Protocol):
    """Where configurations and costs come from."""

    def config(self, mixer: str, size: str, context: int) -> RunConfig:
        """Return the configuration before learning rate, batch, length and seed are set."""

    def cost(self, mixer: str, size: str, context: int) -> Cost:
        """Return what a token of training costs."""


@dataclass(frozen=True)
class Cell:
    """One run of a sweep, completely determined; `id` hashes its resolved configuration."""

    id: str
    trunk: str  # equal for cells that share their run up to the anneal: they differ in budget alone
    mixer: str
    size: str
    context: int
    budget: float  # FLOPs asked for
    seed: int
    learning_rate: float
    learning_rate_factor: float
    batch_factor: float
    batch_tokens: int
    steps: int
    decay_steps: int
    cost: Cost
    config: RunConfig

    @property
    def tokens(self) -> float:
        """Tokens of the whole run."""
        return float(self.steps * self.batch_tokens)

    @property
    def decay_start(self) -> int:
        """The step after which the learning rate falls."""
        return self.steps - self.decay_steps


@dataclass(frozen=True)
class Reason:
    """Why a cell will not run: a phrase, and what stands in it for {}, which differs between cells of one phrase."""

    phrase: str
    number: str = ""

    def __str__(self) -> str:
        return self.phrase.replace("{}", self.number)


@dataclass(frozen=True)
class Dropped:
    """A cell that will not run, and why."""

    mixer: str
    size: str
    context: int
    budget: float
    reason: Reason

    def __str__(self) -> str:
        return f"{self.mixer}, {self.size}, {self.budget:.3g} FLOPs, context {self.context}: {self.reason}"


@dataclass(frozen=True)
class Pending:
    """Cells that depend on results not there yet; `candidates` cost what they will at most."""

    stage: int
    mixer: str
    context: int
    budget: float
    choice: str  # what is not decided
    awaits: tuple[str, ...]  # ids of the cells that decide it
    candidates: tuple[Cell, ...]


@dataclass(frozen=True)
class Expansion:
    """What a recipe and the results so far amount to."""

    cells: tuple[Cell, ...]
    pending: tuple[Pending, ...]
    dropped: tuple[Dropped, ...]


def make_cell(
    recipe: Recipe,
    catalog: Catalog,
    mixer: str,
    size: str,
    context: int,
    budget: float,
    seed: int = 0,
    learning_rate_factor: float = 1.0,
    batch_factor: float = 1.0,
) -> Cell:
    """Return the cell of one combination, feasible or not.

    Errors:
        ConfigError: the configuration contradicts itself.
    """
    cost = catalog.cost(mixer, size, context)
    sequences = max(1, round(recipe.batch_tokens.at(cost.parameters, batch_factor) / context))
    batch_tokens = sequences * context
    steps = max(1, int(budget / (cost.flops_per_token[recipe.convention] * batch_tokens)))
    decay_steps = max(2, round(recipe.decay_fraction * steps))
    # Six digits: a learning rate is no more exact than that, and its hash must not depend on a machine's `pow`.
    learning_rate = float(f"{recipe.learning_rate.at(cost.parameters, learning_rate_factor):.6g}")
    base = catalog.config(mixer, size, context)
    trainer = replace(
        base.trainer, max_steps=None, max_tokens=None, context_length=context, global_batch_tokens=batch_tokens
    )
    if trainer.micro_batch_size is not None and sequences % trainer.micro_batch_size:
        trainer = replace(trainer, micro_batch_size=math.gcd(sequences, trainer.micro_batch_size))
    config = replace(
        base,
        name=recipe.name,
        run_id=None,
        seed=seed,
        optim=replace(base.optim, lr=learning_rate),
        schedule=replace(base.schedule, kind="wsd", warmup=recipe.warmup_steps, decay=decay_steps, unit="steps"),
        trainer=trainer,
        budget=BudgetConfig(kind="steps", value=steps),
        logger=replace(base.logger, wandb_group=recipe.name, wandb_job_type="cell", wandb_tags=(mixer, size)),
    )
    trunk = config.identity()
    del trunk["budget"], trunk["schedule"]["decay"]
    digest = hashlib.sha256(json.dumps(trunk, sort_keys=True).encode()).hexdigest()[:8]
    return Cell(
        id=config.resolved_run_id(),
        trunk=f"trunk-{digest}",
        mixer=mixer,
        size=size,
        context=context,
        budget=budget,
        seed=seed,
        learning_rate=learning_rate,
        learning_rate_factor=learning_rate_factor,
        batch_factor=batch_factor,
        batch_tokens=batch_tokens,
        steps=steps,
        decay_steps=decay_steps,
        cost=cost,
        config=config,
    )


def least_memory(cell: Cell) -> float:
    """Return a lower bound of a device's memory in bytes: weights, gradients, optimizer, one sequence's blocks."""
    model = cell.config.model
    per_channel = CHECKPOINTED_BYTES if model.activation_checkpointing else BLOCK_BYTES
    activations = per_channel * model.d_model * model.n_layers * cell.context
    return BYTES_PER_PARAMETER * cell.cost.parameters_total + activations


def infeasible(recipe: Recipe, cell: Cell) -> Reason | None:
    """Return why a cell should not run, or None; the same on every machine."""
    limits = recipe.limits
    memory = limits.memory_gib
    per_parameter = cell.tokens / cell.cost.parameters
    least, most = limits.min_tokens_per_parameter, limits.max_tokens_per_parameter
    if cell.steps < limits.min_steps:
        return Reason(f"{{}} steps of {cell.batch_tokens} tokens, fewer than {limits.min_steps}", f"{cell.steps}")
    if limits.max_tokens is not None and cell.tokens > limits.max_tokens:
        return Reason(f"{{}} tokens, more than the {limits.max_tokens:.3g} of the data", f"{cell.tokens:.3g}")
    if per_parameter < least:
        return Reason(f"{{}} tokens per parameter, fewer than {least:g}", f"{per_parameter:.3g}")
    if most is not None and per_parameter > most:
        return Reason(f"{{}} tokens per parameter, more than {most:g}", f"{per_parameter:.3g}")
    if memory is not None and least_memory(cell) > memory * 2**30:
        return Reason(f"needs at least {{}} GiB of a device's {memory:.4g} GiB", f"{least_memory(cell) / 2**30:.1f}")
    return None


class Undecided(Exception):
    """A choice depends on cells that are neither finished nor failed."""

    def __init__(self, cells: Iterable[str]) -> None:
        self.cells = tuple(dict.fromkeys(cells))
        super().__init__(", ".join(self.cells))


class Expander:
    """Expands the stages of a recipe, given the losses of finished cells; a pure function of its arguments.

    Args:
        outcomes: loss by cell id, of finished cells.
        failed: ids of cells that failed for good; they count as settled, and as no candidate for any optimum.
        made: cells that earlier expansions of the same recipe and catalog made; filled here.
    """

    def __init__(
        self,
        recipe: Recipe,
        catalog: Catalog,
        outcomes: Mapping[str, float],
        failed: Set[str] = frozenset(),
        made: dict[tuple, Cell] | None = None,
    ) -> None:
        self.recipe, self.catalog, self.outcomes, self.failed = recipe, catalog, outcomes, failed
        self._made = made if made is not None else {}

    def cell(self, *key: object) -> Cell:
        """Return the cell of a combination, made once."""
        if key not in self._made:
            self._made[key] = make_cell(self.recipe, self.catalog, *key)  # type: ignore[arg-type]
        return self._made[key]

    def reason(self, cell: Cell) -> Reason | None:
        """Return why a cell is infeasible, or None."""
        return infeasible(self.recipe, cell)

    def feasible_sizes(self, mixer: str, context: int, budget: float) -> list[str]:
        """Return the rungs on which the budget can be spent, in the ladder's order."""
        return [s for s in self.recipe.ladder if self.reason(self.cell(mixer, s, context, budget)) is None]

    def grid(self) -> list[tuple[float, float]]:
        """Return every pair of learning-rate and batch factor."""
        return [(lr, b) for b in self.recipe.batch_tokens.grid for lr in self.recipe.learning_rate.grid]

    def losses(self, choices: Mapping[Choice, list[Cell]]) -> dict[Choice, float]:
        """Return the mean loss over the seeds of each choice, without those of which no cell finished.

        Errors:
            Undecided: cells are neither finished nor failed.
        """
        cells = [c.id for seeds in choices.values() for c in seeds]
        undecided = [c for c in cells if c not in self.outcomes and c not in self.failed]
        if undecided:
            raise Undecided(undecided)
        done = {key: [self.outcomes[c.id] for c in seeds if c.id in self.outcomes] for key, seeds in choices.items()}
        return {key: sum(losses) / len(losses) for key, losses in done.items() if losses}

    def choices(
        self, stages: Iterable[int], mixer: str, context: int, budget: float
    ) -> dict[tuple[int, str, float, float], list[Cell]]:
        """Return the cells, one for each seed, of every stage, size and pair of factors that has the budget.

        Errors:
            Undecided, ConfigError: as `sizes` and `factors`.
        """
        found = {}
        for index in stages:
            stage = self.recipe.stages[index]
            if budget not in stage.budgets:
                continue
            for size in self.sizes(index, mixer, context, budget):
                for lr, batch in self.factors(index, mixer, size, context, budget):
                    cells = [self.cell(mixer, size, context, budget, seed, lr, batch) for seed in stage.seeds]
                    found[index, size, lr, batch] = cells
        return found

    def tuned(self, stage: int, mixer: str, size: str, context: int, budget: float) -> tuple[float, float]:
        """Return the best pair of factors at the nearest budget with several, of this size or the nearest tried there.

        Args:
            stage: index of the stage that asks; those before it are looked at.

        Errors:
            Undecided: these cells are not settled.
            ConfigError: every one of them failed.
        """
        before = list(enumerate(self.recipe.stages[:stage]))
        at = max(b for _, s in before if s.tunes for b in s.budgets if b <= budget)
        choices = self.choices((index for index, s in before if s.tunes), mixer, context, at)
        ladder = list(self.recipe.ladder)
        here = ladder.index(size)
        sizes = sorted(
            {tried for _, tried, *_ in choices}, key=lambda t: (abs(ladder.index(t) - here), ladder.index(t))
        )
        for nearest in sizes:
            losses = self.losses({key: cells for key, cells in choices.items() if key[1] == nearest})
            if losses:
                return min(losses, key=lambda key: (losses[key], key))[2:]
        raise ConfigError(f"no cell that tunes {mixer}'s learning rate at {at:g} FLOPs finished")

    def best_size(self, before: int, mixer: str, context: int, budget: float) -> str:
        """Return the rung of the lowest loss at a budget, over the stages before `before`.

        Errors:
            Undecided: a cell there is not settled.
            ConfigError: all of them failed, or none is feasible.
        """
        stages = enumerate(self.recipe.stages[:before])
        choices = self.choices((index for index, stage in stages if stage.sizes != "best"), mixer, context, budget)
        losses = self.losses(choices)
        if not losses:
            raise ConfigError(f"no cell of {mixer} at {budget:g} FLOPs finished")
        ladder = list(self.recipe.ladder)
        return min(losses, key=lambda choice: (losses[choice], ladder.index(choice[1])))[1]

    def sizes(self, index: int, mixer: str, context: int, budget: float) -> list[str]:
        """Return the feasible rungs of a stage at a budget; see `Stage.sizes`.

        Errors:
            Undecided, ConfigError: as `best_size`.
        """
        stage = self.recipe.stages[index]
        feasible = self.feasible_sizes(mixer, context, budget)
        if stage.sizes == "all":
            return feasible
        if stage.sizes == "best":
            return [self.best_size(index, mixer, context, budget)]
        before = max(b for s in self.recipe.stages[:index] if s.sizes != "best" for b in s.budgets if b < budget)
        best = self.best_size(index, mixer, context, before)
        ladder = list(self.recipe.ladder)
        parameters = [math.log(self.catalog.cost(mixer, s, context).parameters) for s in ladder]
        wanted = parameters[ladder.index(best)] + OPTIMUM_EXPONENT * math.log(budget / before)
        nearest = sorted(feasible, key=lambda s: (abs(parameters[ladder.index(s)] - wanted), ladder.index(s)))
        return [s for s in feasible if s in nearest[: stage.rungs]]

    def factors(self, index: int, mixer: str, size: str, context: int, budget: float) -> list[tuple[float, float]]:
        """Return the pairs of factors that a stage runs; see `Stage.learning_rates`.

        Errors:
            Undecided, ConfigError: as `tuned`.
        """
        stage = self.recipe.stages[index]
        if stage.learning_rates == "grid":
            return self.grid()
        lr, batch = self.tuned(index, mixer, size, context, budget)
        return [(lr * factor, batch) for factor in stage.factors]

    def expand(self) -> Expansion:
        """Return all cells that are decided, what is pending and what was dropped, in the recipe's order.

        Errors:
            ConfigError: two mixers, sizes or budgets are the same run.
        """
        cells: dict[str, Cell] = {}
        pending: list[Pending] = []
        dropped: dict[Dropped, None] = {}
        for context, index, stage, budget, mixer in self._groups():
            for size in self.recipe.ladder if stage.sizes == "all" else ():
                reason = self.reason(self.cell(mixer, size, context, budget))
                if reason is not None:
                    dropped[Dropped(mixer, size, context, budget, reason)] = None
            try:
                sizes = self.sizes(index, mixer, context, budget)
            except Undecided as undecided:
                # What a budget costs hardly depends on the rung, and small rungs use a device least: an upper estimate.
                count = 1 if stage.sizes == "best" else stage.rungs
                sizes = self.feasible_sizes(mixer, context, budget)[:count]
                candidates = self._candidates(stage, mixer, sizes, context, budget)
                choice = f"sizes={stage.sizes}"
                pending.append(Pending(index, mixer, context, budget, choice, undecided.cells, candidates))
                continue
            except ConfigError as error:
                dropped[Dropped(mixer, stage.sizes, context, budget, Reason(str(error)))] = None
                continue
            for size in sizes:
                try:
                    pairs = self.factors(index, mixer, size, context, budget)
                except Undecided as undecided:
                    candidates = self._candidates(stage, mixer, [size], context, budget)
                    choice = f"learning rate of {size}"
                    pending.append(Pending(index, mixer, context, budget, choice, undecided.cells, candidates))
                    continue
                except ConfigError as error:
                    dropped[Dropped(mixer, size, context, budget, Reason(str(error)))] = None
                    continue
                for seed in stage.seeds:
                    for lr, batch in pairs:
                        cell = self.cell(mixer, size, context, budget, seed, lr, batch)
                        first = cells.setdefault(cell.id, cell)
                        if (first.mixer, first.size, first.budget) != (mixer, size, budget):
                            raise ConfigError(
                                f"{first.mixer} {first.size} at {first.budget:.6g} FLOPs and {mixer} {size} at "
                                f"{budget:.6g} are the same run, {cell.id}: each mixer, size and budget must be another"
                            )
        return Expansion(tuple(cells.values()), tuple(pending), tuple(dropped))

    def _groups(self) -> Iterator[tuple[int, int, Stage, float, str]]:
        for context in self.recipe.contexts:
            for index, stage in enumerate(self.recipe.stages):
                for budget in stage.budgets:
                    for mixer in self.recipe.mixers:
                        yield context, index, stage, budget, mixer

    def _candidates(self, stage: Stage, mixer: str, sizes: list[str], context: int, budget: float) -> tuple[Cell, ...]:
        pairs = self.grid() if stage.learning_rates == "grid" else [(factor, 1.0) for factor in stage.factors]
        return tuple(
            self.cell(mixer, size, context, budget, seed, lr, batch)
            for size in sizes
            for seed in stage.seeds
            for lr, batch in pairs
        )

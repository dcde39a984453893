"""The recipe of a sweep: the only source of what is trained, how it is tuned, and which figures come out."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, get_args

from powertrain.config import share_dir
from powertrain.schema import ConfigError, build, nearest

Figure = Literal["envelope", "isoflop", "perplexity", "position", "seconds", "gain", "state_size"]
FIGURES: tuple[Figure, ...] = get_args(Figure)

# A cell's FLOPs under one convention: what is counted (the products that the mathematics needs, or those the
# implementation executes) and whether the vocabulary head belongs to the model.
Convention = Literal["algorithmic", "executed", "algorithmic, no head", "executed, no head"]
CONVENTIONS: tuple[Convention, ...] = get_args(Convention)

# Sizes of a stage: every rung of the ladder; the rungs around the best of the budget before; the best of this budget.
Sizes = Literal["all", "frontier", "best"]
# Learning rates of a stage: the whole grid; the best of the same mixer at the nearest lower budget that had several (or
# at this one, if an earlier stage had), of the same size or the nearest one tried there, times the stage's factors.
Rates = Literal["grid", "tuned"]


# Beyond it numbers are no floats, or nearly none.
LARGEST_LOG = 700.0
# What a sweep sets in every cell, and the field of the recipe that decides it: as an override it would be replaced.
DECIDED = {
    "name": "name",
    "run_id": "name",
    "seed": "stages.seeds",
    "optim.lr": "learning_rate",
    "schedule": "warmup_steps and decay_fraction",
    "schedule.kind": "decay_fraction",
    "schedule.warmup": "warmup_steps",
    "schedule.decay": "decay_fraction",
    "schedule.unit": "warmup_steps and decay_fraction",
    "budget": "stages.budgets",
    "budget.kind": "stages.budgets",
    "budget.value": "stages.budgets",
    "trainer.max_steps": "stages.budgets",
    "trainer.max_tokens": "stages.budgets",
    "trainer.context_length": "contexts",
    "trainer.global_batch_tokens": "batch_tokens",
    "data.max_val_tokens": "evaluation.tokens",
    "logger.wandb_group": "name",
    "logger.wandb_job_type": "name",
    "logger.wandb_tags": "mixers and ladder",
    "paths.runs": "--directory",
}


def _positive(numbers: Iterable[float]) -> bool:
    return all(0 < n < math.inf for n in numbers)


@dataclass(frozen=True)
class Variant:
    """One rung of the ladder, or one mixer: a label and the overrides of `powertrain train` that make it."""

    overrides: tuple[str, ...]  # such as `model=10m` or `mixer.deg=4`
    label: str = ""  # text in figures and tables; empty: its key in the recipe


@dataclass(frozen=True)
class Rule:
    """A hyperparameter as a power law of the number of parameters, times each factor of a grid.

    `value * (parameters / reference_parameters) ** exponent * factor`, parameters without the embeddings.
    """

    value: float  # at `reference_parameters`
    reference_parameters: float = 1e7  # non-embedding parameters
    exponent: float = 0.0  # 0: the same for every size
    grid: tuple[float, ...] = (1.0,)  # every mixer gets all factors: equal effort by construction

    def __post_init__(self) -> None:
        if not _positive((self.value, self.reference_parameters)) or not math.isfinite(self.exponent):
            raise ValueError(
                f"value={self.value:g} and reference_parameters={self.reference_parameters:g} must be numbers above 0, "
                f"and exponent={self.exponent:g} a finite one"
            )
        if not self.grid or not _positive(self.grid) or list(self.grid) != sorted(set(self.grid)):
            raise ValueError(f"grid={list(self.grid)} must be factors above 0, each once, in rising order")

    def at(self, parameters: float, factor: float = 1.0) -> float:
        """Return the value for a model of `parameters` non-embedding parameters.

        Errors:
            ConfigError: no float is as large or as small.
        """
        log = math.log(self.value) + math.log(factor) + self.exponent * math.log(parameters / self.reference_parameters)
        if abs(log) > LARGEST_LOG:
            raise ConfigError(
                f"value={self.value:g} and exponent={self.exponent:g} give e^{log:.0f} at {parameters:.3g} parameters"
            )
        return self.value * (parameters / self.reference_parameters) ** self.exponent * factor


@dataclass(frozen=True)
class Stage:
    """One round of cells; later stages may depend on what earlier ones found, the same way for every mixer."""

    budgets: tuple[float, ...]  # FLOPs, under the recipe's convention
    sizes: Sizes = "all"  # all, frontier (the rungs nearest to where the optimum should be) or best
    learning_rates: Rates = "tuned"  # grid or tuned
    factors: tuple[float, ...] = (1.0,)  # tuned only: what the best learning rate is multiplied by, each a cell
    seeds: tuple[int, ...] = (0,)  # seed of initialisation and data order; the same for every mixer
    rungs: int = 3  # frontier only: how many of those on which the budget can be spent

    def __post_init__(self) -> None:
        if not self.budgets or not _positive(self.budgets) or list(self.budgets) != sorted(set(self.budgets)):
            raise ValueError(f"budgets={list(self.budgets)} must be FLOPs above 0, each once, in rising order")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds={list(self.seeds)} must be whole numbers of at least 0, each once")
        if not self.factors or not _positive(self.factors) or list(self.factors) != sorted(set(self.factors)):
            raise ValueError(f"factors={list(self.factors)} must be above 0, each once, in rising order")
        if self.learning_rates == "grid" and self.factors != (1.0,):
            raise ValueError(f"factors={list(self.factors)} are for learning_rates=tuned: the grid has its own")
        if self.rungs < 1:
            raise ValueError(f"rungs={self.rungs} must be at least 1")

    @property
    def tunes(self) -> bool:
        """Whether later stages take their learning rates from here."""
        return self.sizes != "best" and (self.learning_rates == "grid" or len(self.factors) > 1)


@dataclass(frozen=True)
class Limits:
    """What makes a cell infeasible; it is then dropped with the reason, never trained badly."""

    min_steps: int = 100  # optimizer steps below which a schedule has no room
    max_tokens: float | None = None  # tokens beyond which the data would repeat; null: no limit
    min_tokens_per_parameter: float = 0.0  # below it a size is too large for the budget to matter
    max_tokens_per_parameter: float | None = None  # above it a size is too small for the budget to matter
    memory_gib: float | None = None  # memory of one device; null: no limit

    def __post_init__(self) -> None:
        if self.min_steps < 1:
            raise ValueError(f"min_steps={self.min_steps} must be at least 1")
        for name in ("max_tokens", "max_tokens_per_parameter", "memory_gib"):
            value = getattr(self, name)
            if value is not None and not _positive([value]):
                raise ValueError(f"{name}={value:g} must be a number above 0, or null")
        most = self.max_tokens_per_parameter
        if not 0 <= self.min_tokens_per_parameter < (math.inf if most is None else most):
            raise ValueError(
                f"min_tokens_per_parameter={self.min_tokens_per_parameter:g} must be at least 0 and below "
                f"max_tokens_per_parameter={most}"
            )


@dataclass(frozen=True)
class Evaluation:
    """How a finished cell is measured: the same documents and positions for every mixer."""

    tokens: int = 2**20  # validation tokens, read in order from the start of the validation split
    position_buckets: int = 12  # buckets of the loss by position, each twice as far as the one before

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.position_buckets < 1:
            raise ValueError(f"tokens={self.tokens} and position_buckets={self.position_buckets} must be at least 1")


@dataclass(frozen=True)
class Analysis:
    """How records become intervals and verdicts."""

    bootstrap: int = 2000  # replicates over documents and seeds
    confidence: float = 0.95  # of every interval
    huber_delta: float = 1e-3  # of the parametric law, in log loss (Hoffmann et al. 2022, section 3.3)
    law_bootstrap: int = 200  # replicates of the law's fit

    def __post_init__(self) -> None:
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence={self.confidence} must lie between 0 and 1, both excluded")
        if self.bootstrap < 100 or self.law_bootstrap < 20:
            raise ValueError(
                f"bootstrap={self.bootstrap} must be at least 100 and law_bootstrap={self.law_bootstrap} at least 20"
            )
        if not _positive([self.huber_delta]):
            raise ValueError(f"huber_delta={self.huber_delta} must be a number above 0")


@dataclass(frozen=True)
class Recipe:
    """A sweep: which mixers at which sizes and budgets, tuned how, measured how, drawn how."""

    name: str  # of the sweep: its directory, and the group of its runs in W&B
    question: str  # one sentence: what the figures answer
    contexts: tuple[int, ...]  # tokens of a sequence; figures are drawn per context
    mixers: dict[str, Variant]
    ladder: dict[str, Variant]  # model sizes, in rising order
    subject: str  # the mixer that the verdict is about
    baseline: str  # the mixer that gains are relative to
    stages: tuple[Stage, ...]
    learning_rate: Rule
    batch_tokens: Rule  # tokens of an optimizer step, rounded to whole sequences
    overrides: tuple[str, ...] = ()  # common to all cells: data, schedule, precision, ...
    warmup_steps: int = 50  # the same for all budgets of a trunk
    decay_fraction: float = 0.2  # share of a cell's steps over which the learning rate anneals to zero
    convention: Convention = "algorithmic"  # of the budgets
    limits: Limits = field(default_factory=Limits)
    evaluation: Evaluation = field(default_factory=Evaluation)
    analysis: Analysis = field(default_factory=Analysis)
    figures: tuple[Figure, ...] = ("envelope", "isoflop", "perplexity", "position", "seconds", "gain")
    notes: tuple[str, ...] = ()  # sentences printed on the report: what is smaller than, or differs from, a publication

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.name):
            raise ValueError(f"name={self.name!r} must be letters, digits, '_', '.' and '-' (it names a directory)")
        if not self.contexts or min(self.contexts) < 1:
            raise ValueError(f"contexts={list(self.contexts)} must be at least one number of tokens above 0")
        for name, values in (("contexts", self.contexts), ("figures", self.figures)):
            if len(set(values)) < len(values):
                raise ValueError(f"{name}={list(values)} must be each once")
        for name, keys in (("mixers", self.mixers), ("ladder", self.ladder)):
            for key in keys:
                if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_. ]*", key):
                    raise ValueError(
                        f"{name}: the key {key!r} must be letters, digits, '_', '.' and spaces (it names files)"
                    )
            files = {key.replace(" ", "_"): key for key in keys}
            if len(files) < len(keys):
                first, second = next((k, files[k.replace(" ", "_")]) for k in keys if k not in files.values())
                raise ValueError(f"{name}: the keys {first!r} and {second!r} must not name the same files")
        variants = [*self.mixers.values(), *self.ladder.values()]
        for override in itertools.chain(self.overrides, *(variant.overrides for variant in variants)):
            key = override.partition("=")[0].lstrip("+~")
            if key in DECIDED:
                raise ValueError(
                    f"the override {override} would be replaced in every cell: give {DECIDED[key]} instead"
                )
        for option in ("subject", "baseline"):
            chosen = getattr(self, option)
            if chosen not in self.mixers:
                raise ValueError(f"{option}={chosen!r} is not one of the mixers: {nearest(chosen, self.mixers)}")
        if self.subject == self.baseline:
            raise ValueError(f"subject and baseline are both {self.subject!r}: there is nothing to compare")
        if not self.ladder or not self.stages:
            raise ValueError("ladder and stages must each have at least one entry")
        if self.stages[0].sizes != "all" or self.stages[0].learning_rates != "grid":
            raise ValueError("the first stage must have sizes=all and learning_rates=grid: nothing is known before it")
        for index, stage in enumerate(self.stages[1:], start=1):
            before = [s for s in self.stages[:index] if s.sizes != "best"]
            for budget in stage.budgets:
                if stage.sizes == "best" and not any(budget in s.budgets for s in before):
                    raise ValueError(f"stages[{index}]: sizes=best at {budget:g} FLOPs needs an earlier stage there")
                if stage.sizes == "frontier" and not any(b < budget for s in before for b in s.budgets):
                    raise ValueError(
                        f"stages[{index}]: sizes=frontier at {budget:g} FLOPs needs a smaller budget before"
                    )
                tuned_at = [b for s in before if s.learning_rates == "grid" for b in s.budgets]
                if stage.learning_rates == "tuned" and not any(b <= budget for b in tuned_at):
                    raise ValueError(
                        f"stages[{index}]: learning_rates=tuned at {budget:g} FLOPs needs a grid there or below"
                    )
        if not 0 < self.decay_fraction < 1:
            raise ValueError(f"decay_fraction={self.decay_fraction} must lie between 0 and 1, both excluded")
        if self.warmup_steps < 2:
            # The schedule reads amounts up to 1 as fractions of the run, which differ between the budgets of a trunk.
            raise ValueError(f"warmup_steps={self.warmup_steps} must be at least 2")
        if (1 - self.decay_fraction) * self.limits.min_steps <= self.warmup_steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} does not end before the decay of the shortest cell allowed "
                f"(limits.min_steps={self.limits.min_steps}): raise min_steps or lower warmup_steps"
            )

    @property
    def budgets(self) -> tuple[float, ...]:
        """Every budget of any stage, rising."""
        return tuple(sorted({b for stage in self.stages for b in stage.budgets}))

    def label(self, mixer: str) -> str:
        """The text that stands for a mixer in figures and tables; records may hold mixers that the recipe does not."""
        return (self.mixers[mixer].label if mixer in self.mixers else "") or mixer

    def fingerprint(self) -> str:
        """Return sixteen digits of the hash of the whole recipe."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


def recipe_path(name_or_path: str) -> Path:
    """Return the file of a recipe, given its path or the name of one that ships with the project.

    Errors:
        ConfigError: no such file, with the nearest shipped name.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    shipped = {p.stem: p for p in sorted(share_dir("recipes").glob("*.yaml"))}
    if name_or_path in shipped:
        return shipped[name_or_path]
    raise ConfigError(f"recipe {name_or_path!r} is neither a file nor a shipped recipe: {nearest(path.stem, shipped)}")


def load_recipe(name_or_path: str) -> Recipe:
    """Read and check a recipe.

    Errors:
        ConfigError: one sentence that names the file, what was given and what is allowed.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    path = recipe_path(name_or_path)
    try:
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from error
    try:
        return build(Recipe, values)  # type: ignore[arg-type]
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error

"""Configuration of training: plain frozen dataclasses, importable without torch.

Every class judges what it can see alone; what needs several of them (context against data, chunk against context) is
judged by `powertrain.config`. Counts accept whole floats, because YAML and the command line read `1e9` as one.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from powertrain.divisors import divisors
from powertrain.wording import counted

SCHEDULES = ("wsd", "cosine", "constant")
DECAY_SHAPES = ("linear", "1-sqrt")
UNITS = ("tokens", "steps", "flops")
PRECISIONS = ("auto", "bf16-mixed", "32-true")
ACCELERATORS = ("auto", "cpu", "gpu")
STRATEGIES = ("auto", "ddp", "fsdp")
FSDP_ACCUMULATIONS = ("auto", "whole", "sharded")
NONFINITE_POLICIES = ("stop", "skip")
WANDB_MODES = ("auto", "online", "offline", "disabled")
PROFILERS = ("simple", "pytorch")


def _one_of(name: str, value: object, allowed: Collection[object]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed are {', '.join(map(repr, allowed))}.")


def _number(name: str, value: Any, low: float, high: float = math.inf, *, exclusive: bool = False) -> None:
    valid = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not (valid and (low < value if exclusive else low <= value) and value <= high):
        bound = f"{'above' if exclusive else 'at least'} {low:g}" + (
            f" and at most {high:g}" if high < math.inf else ""
        )
        raise ValueError(f"{name} is {value!r}; it must be a number {bound}.")


def _whole(config: object, name: str, label: str, *, low: int = 1) -> None:
    """Check that a field is None or a whole number of at least `low`, and store it as an int."""
    value = getattr(config, name)
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1 or value < low:
        raise ValueError(f"{label}.{name} is {value!r}; it must be a whole number of at least {low}.")
    object.__setattr__(config, name, int(value))


def _flags(config: object, label: str, *names: str) -> None:
    for name in names:
        if not isinstance(getattr(config, name), bool):
            raise ValueError(f"{label}.{name} is {getattr(config, name)!r}; it must be true or false.")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW (Loshchilov and Hutter, 2019): decay applies to matrices only, never to norms, biases or gates' offsets."""

    lr: float = 1e-3  # peak learning rate; the schedule multiplies it
    betas: tuple[float, float] = (0.9, 0.95)  # decay of the first and second moment
    eps: float = 1e-8  # added to the root of the second moment
    weight_decay: float = 0.1  # decoupled; multiplied by the learning rate
    fused: bool = True  # one fused kernel for the update, where the device has it

    def __post_init__(self) -> None:
        _number("optim.lr", self.lr, 0.0, exclusive=True)
        if len(self.betas) != 2 or not all(isinstance(b, int | float) and 0 <= b < 1 for b in self.betas):
            raise ValueError(f"optim.betas is {self.betas!r}; it must be two numbers of at least 0 and below 1.")
        object.__setattr__(self, "betas", tuple(float(b) for b in self.betas))
        _number("optim.eps", self.eps, 0.0, exclusive=True)
        _number("optim.weight_decay", self.weight_decay, 0.0)
        _flags(self, "optim", "fused")


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate as a function of progress.

    `warmup` and `decay` are fractions of the run where they are at most 1, else amounts in `unit`.
    """

    kind: str = "wsd"  # wsd (warm-up, stable, decay; Hu et al., 2024), cosine (Loshchilov and Hutter, 2017) or constant
    warmup: float = 0.02  # length of the linear rise from 0 to the peak
    decay: float = 0.2  # wsd only: length of the fall at the end
    final: float = 0.0  # learning rate at the very end, as a fraction of the peak
    shape: str = "1-sqrt"  # wsd only: form of the fall, linear or 1-sqrt (Hägele et al., 2024)
    unit: str = "tokens"  # unit of warmup and decay above 1: tokens, steps or flops

    def __post_init__(self) -> None:
        _one_of("schedule.kind", self.kind, SCHEDULES)
        _one_of("schedule.shape", self.shape, DECAY_SHAPES)
        _one_of("schedule.unit", self.unit, UNITS)
        _number("schedule.warmup", self.warmup, 0.0)
        _number("schedule.decay", self.decay, 0.0)
        _number("schedule.final", self.final, 0.0, 1.0)
        if self.kind == "wsd" and self.warmup <= 1 and self.decay <= 1 and self.warmup + self.decay > 1:
            raise ValueError(
                f"schedule.warmup {self.warmup:g} and schedule.decay {self.decay:g} are fractions of the run"
                " and together exceed 1; lower one of them."
            )


@dataclass(frozen=True)
class TrainerConfig:
    """How long, on what, in which pieces and with which safeguards a run trains."""

    max_steps: int | None = None  # optimizer steps of the whole run; one budget at most (see BudgetConfig)
    max_tokens: int | None = None  # tokens of the whole run, rounded up to whole steps
    context_length: int = 1024  # tokens of a sequence
    global_batch_tokens: int = 16384  # tokens of one optimizer step over all devices and micro-batches
    micro_batch_size: int | None = None  # sequences of one forward pass on one device; None chooses what fits
    # bf16-mixed (fp32 weights, bf16 autocast), 32-true, or auto: what the run directory records, else bf16-mixed on a
    # GPU that computes in bf16, and 32-true on others and on CPUs.
    precision: str = "auto"
    grad_clip: float | None = 1.0  # largest global L2 norm of the gradient; None does not clip
    accelerator: str = "auto"  # auto (a GPU where there is one), cpu or gpu
    devices: int | str = "auto"  # processes on this node; auto is every GPU, or one process on a CPU
    num_nodes: int = 1  # machines
    # How processes share the model: ddp (each has all of it), fsdp (FSDP2: parameters, gradients and optimizer are
    # divided over them; gradients of several micro-batches by the next option) or auto (ddp). One process alone needs
    # none.
    strategy: str = "auto"
    # What a process holds from one micro-batch of an fsdp step to the next: sharded (its part of the gradients; each
    # micro-batch gathers and reduces), whole (all gradients and gathered weights; a step gathers and reduces once) or
    # auto (whole where that takes at most a tenth of the smallest GPU, and on CPUs).
    fsdp_accumulation: str = "auto"
    context_parallel: int = 1  # processes that share each sequence, which divides into as many slices; 1 shares none
    # Seconds with nothing finished after which all processes show their stacks and end; at most a week.
    hang_timeout: float = 1800.0
    compile: bool = False  # torch.compile of the model
    val_every_steps: int = 100  # steps between validations; the last step always validates
    log_every_steps: int = 10  # steps between training records; the last step always records
    checkpoint_every_steps: int | None = None  # steps between checkpoints; None saves with every validation
    keep_checkpoints: int = 2  # newest checkpoints kept; the best by validation loss is kept besides
    nonfinite: str = "stop"  # on a non-finite loss or gradient: stop, or skip the update
    nonfinite_patience: int = 5  # skip only: stop after so many skipped updates in a row
    deterministic: bool = True  # deterministic kernels where there are any, a warning where there are none
    peak_flops: float | None = None  # FLOP/s of one device for the MFU; None looks it up (no MFU for unknown devices)

    def __post_init__(self) -> None:
        for name in ("max_steps", "max_tokens", "micro_batch_size", "checkpoint_every_steps"):
            _whole(self, name, "trainer")
        for name in (
            "context_length",
            "global_batch_tokens",
            "num_nodes",
            "context_parallel",
            "val_every_steps",
            "log_every_steps",
            "keep_checkpoints",
            "nonfinite_patience",
        ):
            if getattr(self, name) is None:
                raise ValueError(f"trainer.{name} is None; it must be a whole number of at least 1.")
            _whole(self, name, "trainer")
        _one_of("trainer.precision", self.precision, PRECISIONS)
        _one_of("trainer.accelerator", self.accelerator, ACCELERATORS)
        _one_of("trainer.strategy", self.strategy, STRATEGIES)
        _one_of("trainer.fsdp_accumulation", self.fsdp_accumulation, FSDP_ACCUMULATIONS)
        _one_of("trainer.nonfinite", self.nonfinite, NONFINITE_POLICIES)
        _flags(self, "trainer", "compile", "deterministic")
        if self.devices != "auto":
            if isinstance(self.devices, str):
                raise ValueError(
                    f"trainer.devices is {self.devices!r}; it must be 'auto' or a whole number of at least 1."
                )
            _whole(self, "devices", "trainer")
        _number("trainer.hang_timeout", self.hang_timeout, 0.0, 7 * 86400.0, exclusive=True)
        if self.grad_clip is not None:
            _number("trainer.grad_clip", self.grad_clip, 0.0, exclusive=True)
        if self.peak_flops is not None:
            _number("trainer.peak_flops", self.peak_flops, 0.0, exclusive=True)
        if self.global_batch_tokens % self.context_length:
            below = self.global_batch_tokens // self.context_length * self.context_length
            raise ValueError(
                f"trainer.global_batch_tokens is {self.global_batch_tokens}, which is not a multiple of"
                f" trainer.context_length {self.context_length}; allowed are"
                f" {' and '.join(str(n) for n in (below, below + self.context_length) if n)}, for example."
            )
        if self.context_parallel > self.context_length:
            raise ValueError(
                f"trainer.context_parallel is {self.context_parallel}, more than the {self.context_length} tokens of"
                " trainer.context_length; every process needs at least one token of a sequence."
            )
        rows = self.global_batch_tokens // self.context_length
        if self.micro_batch_size is not None and rows % self.micro_batch_size:
            raise ValueError(
                f"trainer.micro_batch_size is {self.micro_batch_size}, which does not divide the"
                f" {counted(rows, 'sequence')} of a global batch ({self.global_batch_tokens} tokens of context"
                f" {self.context_length});"
                f" allowed are {', '.join(map(str, divisors(rows)))}."
            )
        if self.max_steps is not None and self.max_tokens is not None:
            raise ValueError(
                f"trainer.max_steps {self.max_steps} and trainer.max_tokens {self.max_tokens} are both given;"
                " give one budget, and set the other to null where an experiment gives it."
            )


@dataclass(frozen=True)
class BudgetConfig:
    """Length of the run in a unit of choice; an alternative to trainer.max_steps and trainer.max_tokens."""

    kind: str = "tokens"  # unit of value: tokens, steps or flops (algorithmic, forward and backward)
    value: float | None = None  # amount; None leaves the length to the trainer, or to 20 tokens per parameter

    def __post_init__(self) -> None:
        _one_of("budget.kind", self.kind, UNITS)
        if self.value is not None:
            _number("budget.value", self.value, 0.0, exclusive=True)


@dataclass(frozen=True)
class LoggerConfig:
    """Where metrics go besides the run directory's metrics.jsonl, which is always written."""

    wandb: bool = False  # Weights & Biases, with the run's own id
    tensorboard: bool = False  # TensorBoard event files (needs the extra `tensorboard`)
    csv: bool = False  # one metrics.csv
    wandb_mode: str = "auto"  # auto (online where there is a key, else offline), online, offline or disabled
    wandb_project: str = "powertrain"  # project of the W&B run
    wandb_entity: str | None = None  # user or team; None is the key's default
    wandb_group: str | None = None  # group of the W&B run
    wandb_job_type: str = "train"  # job type of the W&B run
    wandb_tags: tuple[str, ...] = ()  # tags of the W&B run

    def __post_init__(self) -> None:
        _flags(self, "logger", "wandb", "tensorboard", "csv")
        _one_of("logger.wandb_mode", self.wandb_mode, WANDB_MODES)
        if isinstance(self.wandb_tags, str) or not all(isinstance(tag, str) for tag in self.wandb_tags):
            raise ValueError(f"logger.wandb_tags is {self.wandb_tags!r}; it must be a list of texts.")
        object.__setattr__(self, "wandb_tags", tuple(self.wandb_tags))


@dataclass(frozen=True)
class DebugConfig:
    """Switches for finding faults; all off in a real run."""

    max_steps: int | None = None  # end after so many steps, whatever the budget
    val_batches: int | None = None  # batches of one validation, whatever data.max_val_tokens
    overfit: bool = False  # train on the first global batch again and again
    detect_anomaly: bool = False  # torch.autograd anomaly detection (slow)
    profiler: str | None = None  # simple (time by hook) or pytorch (a trace); written to the run directory

    def __post_init__(self) -> None:
        _whole(self, "max_steps", "debug")
        _whole(self, "val_batches", "debug")
        _flags(self, "debug", "overfit", "detect_anomaly")
        if self.profiler is not None:
            _one_of("debug.profiler", self.profiler, PROFILERS)

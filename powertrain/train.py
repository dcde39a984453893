"""A run, from its configuration: validate -> instantiate -> fit; and its plan, which does none of it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import platform
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from powertrain.cluster.queue import current_job_id
from powertrain.cluster.snapshot import code_version
from powertrain.config import RunConfig, changes, compose, planned_vocabulary, read_config, to_values
from powertrain.divisors import divisors
from powertrain.files import write_file
from powertrain.processes import is_rank_zero
from powertrain.run_status import StatusReport
from powertrain.schema import ConfigError
from powertrain.wording import counted

if TYPE_CHECKING:
    from powertrain.data.datamodule import TokenDataModule
    from powertrain.models.config import ModelConfig
    from powertrain.models.gpt import GPT
    from powertrain.training.fit import FitResult
    from powertrain.training.length import TrainingLength
    from powertrain.training.signals import StopSignals

# What another call of the same run_id may change: how long the run is, and how the learning rate gets there.
EXTENDABLE = ("trainer.max_steps", "trainer.max_tokens", "budget.", "schedule.")


@dataclass(frozen=True)
class RunResult:
    """How a call of `run` ended."""

    run_id: str
    run_dir: Path
    fit: FitResult
    metrics: dict[str, float | None]  # latest record of every key of metrics.jsonl; None for what is not finite
    length: TrainingLength
    config: RunConfig  # with the run id, and the precision that it trains in

    @property
    def val_loss(self) -> float:
        """Latest validation loss, nats per token; NaN where none was made, or it is not finite."""
        loss = self.metrics.get("val/loss")
        return float("nan") if loss is None else loss


def run(config: RunConfig, *, command: str = "", signals: StopSignals | None = None) -> RunResult:
    """Train the run that `config` describes, continuing what its run directory holds.

    Args:
        config: see `powertrain.config.compose`.
        command: what the user typed, for the record.
        signals: see `powertrain.training.fit.fit`.
    Returns:
        How it ended, its run directory and its latest metrics.
    Errors:
        ConfigError: the configuration contradicts the data, the machine, or the run that its directory holds, or asks
            for a dry run, which `plan` makes.
        CheckpointError, NonFiniteError, RunLockedError: see `powertrain.training.fit.fit`.
    """
    import lightning.pytorch as pl
    import torch
    from lightning.pytorch.utilities.seed import isolate_rng

    from powertrain.models.gpt import GPT
    from powertrain.training.batching import with_precision
    from powertrain.training.fit import fit
    from powertrain.training.loggers import read_metrics
    from powertrain.training.status import TellProgress

    if config.cluster.dry_run:
        raise ConfigError(
            "cluster.dry_run=true is for `powertrain train`, and run() trains: leave it out, or call "
            "powertrain.train.plan(config), which returns what the run amounts to"
        )
    run_id = config.resolved_run_id()
    run_dir = Path(config.paths.runs) / run_id
    config = check_same_run(run_dir, config)
    # The id is that of what was asked for: what is decided here may have another.
    config = dataclasses.replace(config, run_id=run_id, trainer=with_precision(config.trainer))
    datamodule = _datamodule(config)
    model_config = _model_config(config, datamodule)
    length = _length(config, model_config)
    _check_data(config, datamodule, length)
    with _claimed(run_dir, config) as report, isolate_rng():
        if is_rank_zero():
            _describe_run(run_dir, config, command)
            datamodule.tokenizer.save(run_dir / "tokenizer")
        pl.seed_everything(config.seed, workers=True, verbose=False)
        # Sharded, no process may ever hold all of it: `fit` makes the weights.
        with torch.device("meta") if config.trainer.strategy == "fsdp" else contextlib.nullcontext():
            model = GPT(model_config)
        _introduce(config, run_dir, datamodule, model, length)
        result = fit(
            model,
            datamodule,
            optim=config.optim,
            schedule=config.schedule,
            trainer=config.trainer,
            length=length,
            run_dir=run_dir,
            run_id=run_id,
            logger=config.logger,
            debug=config.debug,
            run_config=to_values(config),
            callbacks=[TellProgress(report.update)],
            signals=signals,
            on_hang=report.failed,
        )
        if result.interrupted_by is not None:
            report.interrupted(signal.Signals(result.interrupted_by).name)
    latest: dict[str, float | None] = {}
    for record in read_metrics(run_dir):
        latest.update(record)
    return RunResult(run_id, run_dir, result, latest, length, config)


def say(text: str = "") -> None:
    """Print a line for the user, in the main process only."""
    if is_rank_zero():
        print(text, flush=True)


def check_same_run(run_dir: Path, config: RunConfig) -> RunConfig:
    """Reject a run directory that holds another run, by a ConfigError; what it holds stays as it is.

    Returns:
        The configuration; where its precision is `auto`, in the one that the run directory records.
    """
    saved = run_dir / "config.yaml"
    if not saved.exists():
        return config
    recorded = read_config(saved)
    if config.trainer.precision == "auto":
        trainer = dataclasses.replace(config.trainer, precision=recorded.trainer.precision)
        config = dataclasses.replace(config, trainer=trainer)
    changed = [change for change in changes(recorded, config) if not change[0].startswith(EXTENDABLE)]
    if changed:
        listed = ", ".join(f"{key} was {old!r}, now {new!r}" for key, old, new in changed[:3])
        raise ConfigError(
            f"{run_dir} holds another run ({listed}{', ...' if len(changed) > 3 else ''}): "
            f"restore these values, or give this run another run_id"
        )
    return config


@contextlib.contextmanager
def _claimed(run_dir: Path, config: RunConfig) -> Iterator[StatusReport]:
    """Make this process the only one that writes in the run directory, before it writes anything."""
    from powertrain.training.fit import sole_writer

    if not is_rank_zero():
        yield StatusReport(run_dir, enabled=False)
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    with sole_writer(run_dir):
        # Another start may have begun a run here while this one prepared its data.
        check_same_run(run_dir, config)
        with StatusReport(run_dir, job_id=current_job_id()) as report:
            yield report


def _describe_run(run_dir: Path, config: RunConfig, command: str) -> None:
    """Write the resolved configuration and the environment into the run directory."""
    import yaml

    for name, text in (
        ("config.yaml", yaml.safe_dump(to_values(config), sort_keys=False)),
        ("environment.json", json.dumps(environment(command), indent=2) + "\n"),
    ):
        write_file(run_dir / name, text)


def environment(command: str = "") -> dict[str, Any]:
    """Return what a run's numbers may depend on besides its configuration: versions, devices, the code's commit."""
    import torch

    versions = {}
    for name in ("powertrain", "torch", "lightning", "hydra-core", "datasets", "tokenizers", "wandb", "triton"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "command": command,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "threads": torch.get_num_threads(),
        **code_version(),
    }


def _length(config: RunConfig, model_config: ModelConfig) -> TrainingLength:
    from powertrain.models.flops import model_flops, num_parameters
    from powertrain.training.length import resolve_length

    flops = model_flops(model_config, config.trainer.context_length).algorithmic
    return resolve_length(
        config.trainer,
        config.budget,
        config.debug,
        flops_per_token=flops.total,
        num_parameters=sum(num_parameters(model_config).values()),
    )


def plan(config: RunConfig, *, here: bool = True, without_data: bool = True) -> list[str]:
    """Return what the run that `config` describes amounts to, in lines for the user; nothing is prepared or written.

    Args:
        here: whether it would train on this machine; where a job trains, data may be that are not here.
        without_data: False returns no lines, and imports no torch, where the data are not prepared here.
    Errors:
        ValueError, OSError, ShardError: the configuration contradicts the data, or they are not there or damaged.
    """
    from powertrain.data.prepare import prepared
    from powertrain.training.length import plan_lines

    try:
        is_prepared = prepared(config.data, config.paths.cache) is not None
    except (ValueError, OSError) as error:
        if here:
            raise
        return [f"plan    not known here: {error}"] if without_data else []
    if not is_prepared and not without_data:
        return []
    if is_prepared:
        datamodule = _datamodule(config)
        model = _model_config(config, datamodule)
        length = _length(config, model)
        _check_data(config, datamodule, length)
        return [_model_line(config, model), *plan_lines(length, datamodule.train_tokens)]
    try:
        model = _planned_model_config(config)
    except ConfigError as error:
        return [f"plan    not known: {error}"]
    known = config.data.tokenizer.kind == "bytes" and config.model.vocab_size is None
    assumed = "" if known else f", vocabulary {model.vocab_size:,} (assumed: the data say when they are prepared)"
    return [_model_line(config, model) + assumed, *plan_lines(_length(config, model), None)]


def long_on_cpu(config: RunConfig) -> str | None:
    """Return a line for a run on a CPU whose length nobody gave, in terms of the quickstart's; None for a shorter one.

    How fast a CPU is, is not known before the first step. FLOPs are.
    """
    from powertrain.training.length import TOKENS_PER_PARAMETER, amount

    try:
        length, quickstart = map(_planned_length, (config, compose(["experiment=quickstart"])))
    except ConfigError:
        return None  # a tokenizer whose size is not known yet
    times = length.flops / quickstart.flops
    if length.given or times < 2:
        return None
    return (
        f"note    no budget is given, so {config.name} trains {amount(length.tokens)} tokens ({TOKENS_PER_PARAMETER} "
        f"per parameter) on a CPU: {times:,.0f} times the FLOPs of `powertrain train experiment=quickstart`, which "
        f"takes minutes"
    )


def _model_config(config: RunConfig, datamodule: TokenDataModule) -> ModelConfig:
    """Return the model with the vocabulary of the data; refuse another by a ConfigError."""
    given, found = config.model.vocab_size, datamodule.vocab_size
    if given not in (None, found):
        raise ConfigError(
            f"model.vocab_size={given} contradicts the data, whose tokenizer has {found} entries: leave it out"
        )
    return dataclasses.replace(config.model, vocab_size=found)


def _planned_length(config: RunConfig) -> TrainingLength:
    return _length(config, _planned_model_config(config))


def _planned_model_config(config: RunConfig) -> ModelConfig:
    return dataclasses.replace(config.model, vocab_size=planned_vocabulary(config))


def _model_line(config: RunConfig, model: ModelConfig) -> str:
    from powertrain.models.flops import num_parameters
    from powertrain.training.length import amount

    kinds = ", ".join(model.mixer.kinds) + (" in turn" if len(model.mixer.kinds) > 1 else "")
    return (
        f"model   {amount(sum(num_parameters(model).values()))} parameters: {counted(model.n_layers, 'layer')} of "
        f"{kinds}, width {model.d_model}, {counted(model.n_heads, 'head')} of {model.head_dim}, "
        f"context {config.trainer.context_length:,}"
    )


def _datamodule(config: RunConfig) -> TokenDataModule:
    from powertrain.data.datamodule import TokenDataModule

    return TokenDataModule(
        config.data,
        context_length=config.trainer.context_length,
        micro_batch_size=1,  # until fit() knows what fits
        seed=config.seed,
        cache_dir=config.paths.cache,
    )


def _check_data(config: RunConfig, datamodule: TokenDataModule, length: TrainingLength) -> None:
    """Reject a context that the data cannot fill, and a length that nobody gave and they are far too few for."""
    from powertrain.training.length import check_epochs

    try:
        _ = datamodule.train_windows, datamodule.val_windows
    except ValueError as error:
        fits = _longest_context(config, min(datamodule.splits.values()))
        shorter = "" if fits is None else f", or trainer.context_length={fits}"
        raise ConfigError(f"trainer.context_length={config.trainer.context_length}: {error}{shorter}") from error
    if config.debug.overfit:
        return  # one batch, again and again
    try:
        check_epochs(length, datamodule.train_tokens)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _longest_context(config: RunConfig, limit: int) -> int | None:
    """Return the longest context of at most `limit` tokens that all else in `config` allows; None without one."""
    batch = config.trainer.global_batch_tokens
    for context in (n for n in reversed(divisors(batch)) if n <= limit):
        with contextlib.suppress(ValueError):
            trainer = dataclasses.replace(config.trainer, context_length=context)
            dataclasses.replace(config, trainer=trainer)
            return context
    return None


def _introduce(
    config: RunConfig, run_dir: Path, datamodule: TokenDataModule, model: GPT, length: TrainingLength
) -> None:
    """Say in a few lines what is about to be trained, on what, where and for how long."""
    from powertrain.training.batching import resolve_devices
    from powertrain.training.checkpoint import CheckpointStore
    from powertrain.training.length import amount, plan_lines

    devices = resolve_devices(config.trainer)
    kind = "CPU"
    if devices.accelerator == "gpu":
        import torch

        kind = torch.cuda.get_device_name(0)
    where = kind
    if devices.world_size > 1:
        strategy = "fsdp" if config.trainer.strategy == "fsdp" else "ddp"
        shared = f", {devices.context_parallel} to a sequence" if devices.context_parallel > 1 else ""
        where = f"{devices.world_size} x {kind} ({strategy}{shared})"
    say(f"run     {run_dir}")
    say(f"device  {where}, {config.trainer.precision}")
    say(
        f"data    {config.data.source}: {datamodule.documents}, "
        f"{amount(datamodule.train_tokens)} training tokens, vocabulary {datamodule.vocab_size:,}"
    )
    say(_model_line(config, model.config))
    for line in plan_lines(length, datamodule.train_tokens):
        say(line)
    if 0 < (step := max(CheckpointStore(run_dir / "checkpoints").steps(), default=0)) < length.steps:
        say(f"found   a checkpoint of step {step:,} to go on from")

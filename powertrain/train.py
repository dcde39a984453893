"""`powertrain train`: compose -> validate -> instantiate -> fit."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import shlex
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from powertrain.cluster.queue import SlurmError, current_job_id
from powertrain.cluster.snapshot import code_version
from powertrain.config import (
    GROUPS,
    RunConfig,
    changes,
    compose,
    from_values,
    options,
    planned_vocabulary,
    share_dir,
    to_values,
)
from powertrain.run_status import RunBusyError, StatusReport
from powertrain.schema import ConfigError

if TYPE_CHECKING:
    from powertrain.data.datamodule import TokenDataModule
    from powertrain.models.config import ModelConfig
    from powertrain.models.gpt import GPT
    from powertrain.training.fit import FitResult
    from powertrain.training.length import TrainingLength
    from powertrain.training.signals import StopSignals

EXAMPLES = """\
examples:
  powertrain train experiment=quickstart
  powertrain train model=124m mixer=softmax data=text data.files='corpus/*.txt' trainer.max_tokens=1e9
  powertrain train model=10m budget=flops budget.value=1e15 logger=wandb
  powertrain train cluster=slurm cluster.nodes=2 cluster.gpus_per_node=8 model=1.3b data=text data.files='corpus/*.txt'
  powertrain train experiment=quickstart --cfg job      print the composed configuration; nothing runs
  powertrain train experiment=quickstart cluster.dry_run=true   print size, tokens, steps and FLOPs; nothing runs

The same command again resumes the run. Ctrl-C saves, and says how to resume.
"""

# What another call of the same run_id may change: how long the run is, and how the learning rate gets there.
EXTENDABLE = ("trainer.max_steps", "trainer.max_tokens", "budget.", "schedule.")


@dataclass(frozen=True)
class RunResult:
    """How a call of `run` ended."""

    run_id: str
    run_dir: Path
    fit: FitResult
    metrics: dict[str, float]  # latest record of every key of metrics.jsonl
    length: TrainingLength

    @property
    def val_loss(self) -> float:
        """Latest validation loss, nats per token; NaN where none was made."""
        return self.metrics.get("val/loss", float("nan"))


def parser(directories: list[Path]) -> argparse.ArgumentParser:
    """Return the parser of `powertrain train`; its help lists every group and its options."""
    groups = "\n".join(f"  {g + '=':<12} {', '.join(options(g, directories))}" for g in GROUPS)
    result = argparse.ArgumentParser(
        prog="powertrain train",
        usage="powertrain train [group=option ...] [key=value ...] [--cfg job] [--config-dir DIR]",
        description="Train a language model from configuration.",
        epilog=f"groups and their options:\n{groups}\n\n{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("overrides", nargs="*", help="Hydra overrides; `--cfg job` shows every key and its value")
    result.add_argument("--cfg", choices=["job"], help="print the composed, validated configuration and stop")
    result.add_argument("--config-dir", type=Path, help="directory of your own groups, as experiment/mine.yaml")
    result.add_argument(
        "--config", type=Path, help="a saved config.yaml, run here exactly as it is; a submitted job runs its own so"
    )
    return result


def main(argv: list[str]) -> int:
    """Run `powertrain train`.

    Returns:
        The exit code: 0 finished, submitted, planned, or interrupted and queued again; 1 stopped with an error;
        128 + signal when interrupted (130 for Ctrl-C) and saved.
    Errors:
        ConfigError: bad input, before anything else happens.
    """
    arguments = parser([share_dir("conf")]).parse_intermixed_args(argv)
    config = _configuration(arguments)
    if arguments.cfg:
        import yaml

        print(yaml.safe_dump(to_values(config), sort_keys=False), end="")
        return 0

    # A job that was submitted trains with --config.
    submits = config.cluster.kind == "slurm" and arguments.config is None
    if config.cluster.dry_run:
        return _dry_run(config, submits=submits)
    if submits:
        from powertrain.cluster import submit

        _check_same_run(Path(config.paths.runs) / config.resolved_run_id(), config)
        return submit.main(config)
    from powertrain.training.signals import StopSignals

    with StopSignals() as signals:
        return _train_here(config, arguments, argv, signals)


def _configuration(arguments: argparse.Namespace) -> RunConfig:
    if arguments.config is None:
        return compose(arguments.overrides, arguments.config_dir)
    import yaml

    if arguments.overrides or arguments.config_dir:
        raise ConfigError("--config runs a saved configuration exactly as it is: give no overrides and no --config-dir")
    if not arguments.config.is_file():
        raise ConfigError(f"--config {arguments.config} is not a file")
    return from_values(yaml.safe_load(arguments.config.read_text()))


def _dry_run(config: RunConfig, *, submits: bool) -> int:
    """Print what the run amounts to, and the script of a job; refuse what the same command would refuse to begin."""
    from powertrain.data.shards import ShardError
    from powertrain.training.batching import resolve_devices

    if not submits:
        resolve_devices(config.trainer)
    _check_same_run(Path(config.paths.runs) / config.resolved_run_id(), config)
    try:
        lines = plan(config, here=not submits)
    except ShardError as error:
        print(f"powertrain train: {error}", file=sys.stderr)
        return 1
    # Of a job, its script alone is the output.
    print("\n".join(lines), file=sys.stderr if submits else sys.stdout)
    if not submits:
        return 0
    from powertrain.cluster import submit

    return submit.main(config)


def _train_here(config: RunConfig, arguments: argparse.Namespace, argv: list[str], signals: StopSignals) -> int:
    from powertrain.training.batching import resolve_devices
    from powertrain.training.launch import end_with_launcher, launch, launcher
    from powertrain.training.signals import Stopped

    devices = resolve_devices(config.trainer)
    if devices.torch_device.type == "cuda":
        from powertrain.ops.cuda import library_problem

        library_problem()  # builds the kernels, with progress, before any process waits for another
    if devices.per_node > 1 and launcher() is None:
        again = [sys.executable, "-m", "powertrain", "train", *argv]
        return launch(again, devices.per_node, num_nodes=devices.num_nodes)
    command, again_as = (shlex.join([program, "train", *argv]) for program in ("powertrain", _program()))
    end_with_launcher()
    try:
        result = run(config, command=command, signals=signals)
        if result.fit.interrupted_by is not None:
            step = result.fit.counters.step
            saved = f"Everything is saved at step {step}" if result.fit.checkpoint else "No step was under way"
            return _interrupted(config, result.fit.interrupted_by, saved, again_as)
        _report(config, result, arguments.overrides if arguments.config is None else None)
    except Stopped as stop:
        return _interrupted(config, stop.signum, "No step was under way", again_as)
    except Exception as error:
        if devices.world_size > 1:
            _end_rank(error)
        if not isinstance(error, _expected_errors()):
            raise
        print(f"powertrain train: {error}", file=sys.stderr)
        return 1
    return 0


def _expected_errors() -> tuple[type[Exception], ...]:
    """Errors whose message is one sentence for the user, all that there is to say."""
    from powertrain.data.shards import ShardError
    from powertrain.training.checkpoint import CheckpointError
    from powertrain.training.fit import RunLockedError
    from powertrain.training.nonfinite import NonFiniteError

    return (CheckpointError, NonFiniteError, RunLockedError, RunBusyError, ShardError)


def _end_rank(error: Exception) -> NoReturn:
    """Report the error of one of several processes in the order of causes, and end it; see `training.launch`."""
    from powertrain.training.launch import LOST_PEER_DELAY, OTHER_RANK_DELAY, is_lost_peer

    # The launcher ends those whose error is only the echo of another's.
    for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, signal.SIG_DFL)
    if is_lost_peer(error):
        time.sleep(LOST_PEER_DELAY)
    elif not _is_main_process():
        time.sleep(OTHER_RANK_DELAY)
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID", "0")
    # Errors that all ranks agree on speak for all of them.
    agreed = isinstance(error, _expected_errors())
    known = agreed or isinstance(error, ValueError | OSError)
    text = f"powertrain train: {error if known else f'{type(error).__name__}: {error}'}\n"
    if not (agreed and _is_main_process()):
        text = text.replace(": ", f": rank {rank}: ", 1)
    if not known or os.environ.get("POWERTRAIN_TRACEBACK", "0") not in ("", "0"):
        text += "".join(traceback.format_exception(error))
    sys.stderr.write(text)
    sys.stderr.flush()
    sys.stdout.flush()
    # Python's own way out would wait for threads and collectives that wait for others.
    os._exit(2 if isinstance(error, ValueError | OSError) else 1)


def _interrupted(config: RunConfig, signum: int, saved: str, command: str) -> int:
    """Say how to resume, or in a Slurm job see to it that the run resumes by itself; return the exit code."""
    if current_job_id() is None or signum == signal.SIGINT:
        _say(f"\nInterrupted. {saved}; resume with:\n  {command}")
        return 128 + signum
    # Of all ranks, since any other code would have srun end rank 0 before it has asked for another attempt.
    if not _is_main_process():
        return 0
    from powertrain.cluster.requeue import requeue

    _say(f"\nInterrupted by {signal.Signals(signum).name}. {saved}.")
    try:
        answer = requeue(Path(config.paths.runs) / config.resolved_run_id(), signum)
    except SlurmError as error:
        print(f"powertrain train: {error}", file=sys.stderr, flush=True)
        return 1
    _say(answer.sentence)
    return 0 if answer.queued else 128 + signum


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
    _check_same_run(run_dir, config)
    datamodule = _datamodule(config)
    model_config = dataclasses.replace(config.model, vocab_size=datamodule.vocab_size)
    length = _length(config, model_config)
    _check_data(config, datamodule, length)
    with _claimed(run_dir, config) as report, isolate_rng():
        if _is_main_process():
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
    latest: dict[str, float] = {}
    for record in read_metrics(run_dir):
        latest.update(record)
    return RunResult(run_id, run_dir, result, latest, length)


def _is_main_process() -> bool:
    from lightning.pytorch.utilities import rank_zero_only

    return getattr(rank_zero_only, "rank", 0) == 0


def _say(text: str = "") -> None:
    if _is_main_process():
        print(text, flush=True)


def _check_same_run(run_dir: Path, config: RunConfig) -> None:
    """Reject a run directory that holds another run; what it holds stays as it is."""
    import yaml

    saved = run_dir / "config.yaml"
    if not saved.exists():
        return
    changed = [
        change
        for change in changes(from_values(yaml.safe_load(saved.read_text())), config)
        if not change[0].startswith(EXTENDABLE)
    ]
    if changed:
        listed = ", ".join(f"{key} was {old!r}, now {new!r}" for key, old, new in changed[:3])
        raise ConfigError(
            f"{run_dir} holds another run ({listed}{', ...' if len(changed) > 3 else ''}): "
            f"restore these values, or give this run another run_id"
        )


@contextlib.contextmanager
def _claimed(run_dir: Path, config: RunConfig) -> Iterator[StatusReport]:
    """Make this process the only one that writes in the run directory, before it writes anything."""
    from powertrain.training.fit import sole_writer

    if not _is_main_process():
        yield StatusReport(run_dir, enabled=False)
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    with sole_writer(run_dir):
        # Another start may have begun a run here while this one prepared its data.
        _check_same_run(run_dir, config)
        with StatusReport(run_dir, job_id=current_job_id()) as report:
            yield report


def _describe_run(run_dir: Path, config: RunConfig, command: str) -> None:
    """Write the resolved configuration and the environment into the run directory."""
    import yaml

    for name, text in (
        ("config.yaml", yaml.safe_dump(to_values(config), sort_keys=False)),
        ("environment.json", json.dumps(environment(command), indent=2) + "\n"),
    ):
        temporary = run_dir / f".{name}.tmp"
        temporary.write_text(text)
        temporary.replace(run_dir / name)


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


def plan(config: RunConfig, *, here: bool = True) -> list[str]:
    """Return what the run that `config` describes amounts to, in lines for the user; nothing is prepared or written.

    Args:
        here: whether it would train on this machine; where a job trains, data may be that are not here.
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
        return [f"plan    not known here: {error}"]
    datamodule = _datamodule(config) if is_prepared else None
    try:
        vocab_size = datamodule.vocab_size if datamodule else planned_vocabulary(config)
    except ConfigError as error:
        return [f"plan    not known: {error}"]
    model = dataclasses.replace(config.model, vocab_size=vocab_size)
    length = _length(config, model)
    if datamodule is not None:
        _check_data(config, datamodule, length)
    return [_model_line(config, model), *plan_lines(length, datamodule.train_tokens if datamodule else None)]


def _model_line(config: RunConfig, model: ModelConfig) -> str:
    from powertrain.models.flops import num_parameters
    from powertrain.training.length import amount

    kinds = ", ".join(dict.fromkeys(model.mixer.kinds))
    return (
        f"model   {amount(sum(num_parameters(model).values()))} parameters: {model.n_layers} layers of {kinds}, width "
        f"{model.d_model}, {model.n_heads} heads of {model.head_dim}, context {config.trainer.context_length:,}"
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
    try:
        check_epochs(length, datamodule.train_tokens)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _longest_context(config: RunConfig, limit: int) -> int | None:
    """Return the longest context of at most `limit` tokens that all else in `config` allows; None without one."""
    batch = config.trainer.global_batch_tokens
    for context in (n for n in range(min(limit, batch), 0, -1) if batch % n == 0):
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
    _say(f"run     {run_dir}")
    _say(f"device  {where}, {config.trainer.precision}")
    _say(
        f"data    {config.data.source}: {datamodule.num_documents:,} documents, "
        f"{amount(datamodule.train_tokens)} training tokens, vocabulary {datamodule.vocab_size:,}"
    )
    _say(_model_line(config, model.config))
    for line in plan_lines(length, datamodule.train_tokens):
        _say(line)


def _program() -> str:
    """Return how this command is called from here: by its name where the shell finds it, else by its path."""
    called = Path(sys.argv[0])
    if shutil.which("powertrain") is not None or called.name != "powertrain":
        return "powertrain"
    return os.path.relpath(called) if called.is_relative_to(Path.cwd()) else str(called)


def _report(config: RunConfig, result: RunResult, overrides: list[str] | None) -> None:
    """Show what came out: losses, the curve, a sample, and how to go on."""
    if not _is_main_process():
        return
    from powertrain.inference.generate import generate_text, load_run
    from powertrain.training.batching import resolve_devices
    from powertrain.training.plots import plot_curve

    m = result.metrics
    if result.fit.resumed_step >= result.length.steps:
        _say(f"The run was finished already, at step {result.fit.counters.step:,}.")
    _say()
    if "val/loss" in m:
        per_byte = f", {m['val/bits_per_byte']:.3f} bits per byte" if "val/bits_per_byte" in m else ""
        _say(f"validation loss {m['val/loss']:.4f} nats per token, perplexity {m['val/perplexity']:.2f}{per_byte}")
    _say(f"loss curve      {plot_curve(result.run_dir)}")
    if config.sample.max_new_tokens:
        model, tokenizer = load_run(result.run_dir, resolve_devices(config.trainer).torch_device)
        pieces = generate_text(
            model,
            tokenizer,
            config.sample.prompt,
            max_new_tokens=config.sample.max_new_tokens,
            temperature=config.sample.temperature,
            top_k=config.sample.top_k,
            seed=config.seed,
        )
        text = config.sample.prompt + "".join(pieces)
        (result.run_dir / "sample.txt").write_text(text)
        rule = "-" * 72
        _say(f"\nA sample of {config.sample.max_new_tokens} tokens:\n{rule}\n{text}\n{rule}")
    _say()
    if overrides is not None:
        kept = [o for o in overrides if not o.startswith((*EXTENDABLE, "budget=", "run_id="))]
        further = f"run_id={result.run_id} trainer.max_tokens={2 * result.length.tokens}"
        if config.trainer.max_steps is not None:
            further += " trainer.max_steps=null"
        if config.budget.value is not None:
            further += " budget.value=null"
        _say(f"Train it twice as long:  {shlex.join([_program(), 'train', *kept])} {further}")
        if config.schedule.kind != "constant":
            _say("                         (its learning rate rises again, and the loss with it at first)")
    prompt = shlex.quote(config.sample.prompt)
    _say(f"Generate from it:        {shlex.join([_program(), 'generate', str(result.run_dir)])} --prompt {prompt}")

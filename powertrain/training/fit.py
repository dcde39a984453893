"""One call that trains a model on a datamodule in a run directory, resuming what is there."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import lightning.pytorch as pl
import torch
from torch import nn

from powertrain.locks import take_lock
from powertrain.training.batching import Devices, choose_micro_batch_size, resolve_devices, with_precision
from powertrain.training.checkpoint import CheckpointStore
from powertrain.training.checkpointing import Checkpointing, TrainingInterrupted
from powertrain.training.config import DebugConfig, LoggerConfig, OptimConfig, ScheduleConfig, TrainerConfig
from powertrain.training.distribution import (
    compile_model,
    context_group,
    launcher_environment,
    lightning_strategy,
    materialize,
    process_group,
    shard_model,
)
from powertrain.training.hardware import peak_flops
from powertrain.training.length import TrainingLength
from powertrain.training.loggers import build_loggers
from powertrain.training.module import Counters, PowertrainModule
from powertrain.training.nonfinite import fp32_products
from powertrain.training.progress import ProgressReport
from powertrain.training.ranks import ALONE, Ranks
from powertrain.training.records import truncate_metrics
from powertrain.training.schedules import Schedule
from powertrain.training.signals import StopSignals
from powertrain.training.state import RestoreTraining, restore_before_fit, seed_loop_counters
from powertrain.training.watchdog import HangWatch


@dataclass(frozen=True)
class FitResult:
    """How a call of `fit` ended."""

    counters: Counters  # of the whole run
    resumed_step: int  # step at which this call began; 0 for a new run
    finished: bool  # whether the run has all its steps
    interrupted_by: int | None  # number of the signal that ended it early
    checkpoint: Path | None  # the newest


class RunLockedError(RuntimeError):
    """Another process trains in this run directory."""


_locks: dict[Path, int] = {}  # run directories that this process writes, and descriptors of their lock files


def _leave_locks_to_the_parent() -> None:
    # Data workers outlive a killed parent by some seconds, and must not hold its lock for it.
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in _locks.values():
        os.dup2(nothing, descriptor)
    os.close(nothing)
    _locks.clear()


os.register_at_fork(after_in_child=_leave_locks_to_the_parent)


def _lock(file: TextIO, run_dir: Path) -> str | None:
    """Lock the file and write into it who does; where another process has it, return a sentence that says so."""
    locked = take_lock(file)
    if locked is False:
        file.seek(0)
        return (
            f"the run in {run_dir} is being trained by another process ({file.read().strip() or 'unknown'});"
            " stop that one, or give this run another run_id"
        )
    if locked is None:
        warnings.warn(
            f"the file system of {run_dir} has no locks: only the heartbeat in status.json keeps a second process out",
            stacklevel=2,
        )
    file.truncate(0)
    file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
    file.flush()
    return None


@contextlib.contextmanager
def sole_writer(run_dir: Path, ranks: Ranks = ALONE) -> Iterator[None]:
    """Hold the run directory's lock on rank 0, for all; the operating system frees it however the process ends.

    A process that holds it already goes on holding it. Where the file system has no locks, a warning says so.

    Errors:
        RunLockedError: on every rank, where a process of another run holds it.
    """
    with contextlib.ExitStack() as stack:
        fault = None
        held = run_dir.resolve()
        if ranks.is_main and held not in _locks:
            file = stack.enter_context((run_dir / ".lock").open("a+"))
            fault = _lock(file, run_dir)
            if fault is None:
                _locks[held] = file.fileno()
                stack.callback(_locks.pop, held)
        fault = ranks.broadcast(fault)
        if fault is not None:
            raise RunLockedError(fault)
        yield


@contextlib.contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Silence what Lightning says about choices that were made on purpose here."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        for message in (
            ".*does not have many workers.*",
            ".*`IterableDataset` has `__len__` defined.*",
            ".*GPU available but not used.*",
            ".*no value for `max_epochs`.*",
            ".*Checkpoint directory.*exists and is not empty.*",
            ".*`srun` command is available.*",
            ".*LeafSpec.*is deprecated.*",
        ):
            warnings.filterwarnings("ignore", message)
        try:
            yield
        finally:
            logger.setLevel(level)


@contextlib.contextmanager
def _new_memory_as_it_is() -> Iterator[None]:
    """Deterministic torch would fill new memory: every kernel here writes the whole of its outputs."""
    before = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = before  # type: ignore[attr-defined]


def _profiler(debug: DebugConfig, run_dir: Path) -> Any:
    if debug.profiler is None:
        return None
    from lightning.pytorch.profilers import PyTorchProfiler, SimpleProfiler

    kind = SimpleProfiler if debug.profiler == "simple" else PyTorchProfiler
    directory = run_dir / "profile"
    directory.mkdir(exist_ok=True)
    return kind(dirpath=directory, filename=debug.profiler)


def build_trainer(
    config: TrainerConfig,
    debug: DebugConfig,
    *,
    model: nn.Module,
    devices: Devices,
    ranks: Ranks,
    run_dir: Path,
    max_steps: int,
    accumulation: int,
    callbacks: list[pl.Callback],
    loggers: list[Any],
) -> pl.Trainer:
    """Return Lightning's Trainer for a run; what Lightning would do by epoch or on its own is switched off."""
    environment = launcher_environment(devices)
    return pl.Trainer(
        accelerator=devices.accelerator,
        devices=devices.per_node,
        num_nodes=devices.num_nodes,
        strategy=lightning_strategy(model, ranks, config),
        precision=config.precision,  # type: ignore[arg-type]
        logger=loggers,
        callbacks=callbacks,
        max_steps=max_steps,
        max_epochs=-1,
        accumulate_grad_batches=accumulation,
        val_check_interval=config.val_every_steps * accumulation,
        check_val_every_n_epoch=None,
        limit_val_batches=debug.val_batches,
        num_sanity_val_steps=0,
        # Inference tensors are another kind for torch.compile, which would compile the model again.
        inference_mode=False,
        use_distributed_sampler=False,
        deterministic="warn" if config.deterministic else False,
        detect_anomaly=debug.detect_anomaly,
        profiler=_profiler(debug, run_dir),
        plugins=[environment] if environment is not None else [],
        default_root_dir=run_dir,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def fit(
    model: nn.Module,
    datamodule: pl.LightningDataModule,
    *,
    optim: OptimConfig,
    schedule: ScheduleConfig,
    trainer: TrainerConfig,
    length: TrainingLength,
    run_dir: str | Path,
    run_id: str,
    logger: LoggerConfig | None = None,
    debug: DebugConfig | None = None,
    run_config: dict[str, Any] | None = None,
    callbacks: list[pl.Callback] | None = None,
    progress: ProgressReport | None = None,
    signals: StopSignals | None = None,
    on_hang: Callable[[str], None] = lambda _: None,
) -> FitResult:
    """Train to the end of `length`, or to a signal; where the run directory has a checkpoint, continue from it.

    Args:
        model: see `PowertrainModule`; its weights are replaced by those of the checkpoint where there is one. Built on
            the meta device it gets its weights here, by `init_weights()`: with fsdp no process ever holds all of them.
        datamodule: `powertrain.data.TokenDataModule`, or what has its attributes; its micro-batch size is set here.
        run_dir: exists, or is made.
        run_config: plain values of the whole configuration, for checkpoints and W&B.
        callbacks: of the caller, besides those of a run.
        signals: of the caller, who learns from them of a signal that came after the last step, or before an error.
        on_hang: called with a sentence before a hang ends this process; see `HangWatch`.
    Returns:
        How it ended; the process's exit code after a signal is 128 plus its number (130 for Ctrl-C).
    Errors:
        NonFiniteError: a loss or gradient was not finite, by policy.
        CheckpointError: a checkpoint could not be written, or none of several could be read.
        RunLockedError: another process trains in this run directory.
        ValueError: the configuration contradicts the machine, the data or the checkpoint.
    """
    logger, debug, run_dir, run_config = (
        logger or LoggerConfig(),
        debug or DebugConfig(),
        Path(run_dir),
        run_config or {},
    )
    signals = signals or StopSignals()
    run_dir.mkdir(parents=True, exist_ok=True)
    plan = Schedule(schedule, length)
    devices = resolve_devices(trainer)
    with (
        _quiet_lightning(),
        signals.deferred(),
        HangWatch(trainer.hang_timeout, run_dir, on_hang) as watch,
        process_group(trainer, devices, signals) as ranks,
        sole_writer(run_dir, ranks),
    ):
        watch.start(ranks)  # which writes in the run directory too
        # One for all, where GPUs differ.
        trainer = replace(trainer, precision=ranks.broadcast(with_precision(trainer).precision))
        store = CheckpointStore(run_dir / "checkpoints", trainer.keep_checkpoints, ranks)
        checkpoint = store.latest()
        watch.beat()
        micro_batch_size = choose_micro_batch_size(model, trainer, devices)
        watch.beat()
        rows = trainer.global_batch_tokens // trainer.context_length
        accumulation = rows // (micro_batch_size * devices.data_parallel)
        datamodule.micro_batch_size = micro_batch_size  # type: ignore[attr-defined]
        datamodule.global_batch_size = rows  # type: ignore[attr-defined]
        context = context_group(ranks, devices.context_parallel)
        if context is not None:
            datamodule.set_ranks(ranks.rank // context.size, devices.data_parallel)  # type: ignore[attr-defined]
        if trainer.strategy == "fsdp" and ranks.size > 1:
            shard_model(model, ranks, trainer.precision)
        materialize(model, ranks.device)
        watch.beat()
        on_gpu = devices.accelerator == "gpu"
        device_name = torch.cuda.get_device_name(ranks.device) if on_gpu else "cpu"
        module = PowertrainModule(
            model,
            optim=optim,
            schedule=plan,
            trainer=trainer,
            run_dir=run_dir,
            peak_flops=trainer.peak_flops or peak_flops(device_name, trainer.precision),
            bytes_per_token=getattr(datamodule, "bytes_per_token", None),
            overfit=debug.overfit,
            ranks=ranks,
            context=context,
        )
        start = 0
        if checkpoint is not None:
            restore_before_fit(checkpoint, module, datamodule)
            start = module.step
            assert start == checkpoint.step
            watch.beat()
        if ranks.is_main:
            truncate_metrics(run_dir, start)
        if start >= length.steps:
            return FitResult(module.counters, start, True, None, store.path(start))
        # To verify and restore may have taken minutes, and the next agreement is after a step.
        (signum,) = ranks.max(signals.received or 0)
        if signum:
            signals.learn(signum)
            return FitResult(module.counters, start, False, signum, store.path(start) if start else None)
        if trainer.compile:
            compile_model(model)
        lightning = build_trainer(
            trainer,
            debug,
            model=model,
            devices=devices,
            ranks=ranks,
            run_dir=run_dir,
            max_steps=length.steps,
            accumulation=accumulation,
            callbacks=[
                watch,
                RestoreTraining(checkpoint),
                Checkpointing(
                    store,
                    every_steps=trainer.checkpoint_every_steps or trainer.val_every_steps,
                    run_config=run_config,
                    signals=signals,
                    ranks=ranks,
                    patience=trainer.hang_timeout,
                ),
                progress or ProgressReport(),
                *(callbacks or []),
            ],
            loggers=build_loggers(logger, run_dir, run_id, run_config, start_step=start),
        )
        # Lightning's handler of SIGTERM runs a collective inside the handler.
        lightning._signal_connector.register_signal_handlers = signals.install  # type: ignore[method-assign]
        seed_loop_counters(lightning, start, accumulation)
        interrupted = None
        try:
            with fp32_products(trainer.precision, devices.torch_device.type), _new_memory_as_it_is():
                lightning.fit(module, datamodule=datamodule)
        except TrainingInterrupted as stop:
            interrupted = stop.signum
            signals.learn(interrupted)
        watch.beat()
        module.counters.seconds = module.clock.seconds
    newest = store.path(module.step)
    return FitResult(
        module.counters, start, module.step >= length.steps, interrupted, newest if newest.exists() else None
    )

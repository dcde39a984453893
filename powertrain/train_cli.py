"""`powertrain train`: what is typed, from its arguments to the exit code and the closing report."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from powertrain.cluster.queue import SlurmError, current_job_id
from powertrain.config import GROUPS, RunConfig, compose, options, read_config, share_dir, to_values
from powertrain.processes import global_rank, is_rank_zero, launcher
from powertrain.run_status import RunBusyError
from powertrain.schema import ConfigError
from powertrain.train import RunResult, check_same_run, long_on_cpu, plan, run, say
from powertrain.wording import counted

if TYPE_CHECKING:
    from powertrain.training.batching import Devices
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
    if config.cluster.dry_run or submits:
        return _plan(config, submits=submits)
    from powertrain.training.signals import StopSignals

    with StopSignals() as signals:
        return _train_here(config, arguments, argv, signals)


def _configuration(arguments: argparse.Namespace) -> RunConfig:
    if arguments.config is None:
        return compose(arguments.overrides, arguments.config_dir)
    if arguments.overrides or arguments.config_dir:
        raise ConfigError("--config runs a saved configuration exactly as it is: give no overrides and no --config-dir")
    if not arguments.config.is_file():
        raise ConfigError(f"--config {arguments.config} is not a file")
    return read_config(arguments.config)


def _plan(config: RunConfig, *, submits: bool) -> int:
    """Print what the run amounts to, and submit the job or, in a dry run, print its script; refuse what the run would
    refuse to begin, as far as this machine knows.
    """
    note = None
    if not submits:
        from powertrain.training.batching import resolve_devices

        if resolve_devices(config.trainer).torch_device.type == "cpu":
            note = long_on_cpu(config)
    check_same_run(Path(config.paths.runs) / config.resolved_run_id(), config)
    from powertrain.data.shards import ShardError

    try:
        # A submission without the data knows no more than its configuration, and should be quick.
        lines = plan(config, here=not submits, without_data=config.cluster.dry_run)
    except ShardError as error:
        print(f"powertrain train: {error}", file=sys.stderr)
        return 1
    # Of a job, its script or its id alone is the output.
    for line in lines if note is None else [*lines, note]:
        print(line, file=sys.stderr if submits else sys.stdout)
    if not submits:
        return 0
    from powertrain.cluster import submit

    return submit.main(config)


def _train_here(config: RunConfig, arguments: argparse.Namespace, argv: list[str], signals: StopSignals) -> int:
    from powertrain.training.signals import Stopped

    again_as = _command("train", *argv)
    try:
        _load(signals, "training.batching", "training.launch")
        from powertrain.training.batching import resolve_devices
        from powertrain.training.launch import end_with_launcher, launch

        devices = resolve_devices(config.trainer)
        if devices.torch_device.type == "cuda":
            _load(signals, "ops.cuda")
            from powertrain.ops.cuda import library_problem

            library_problem()  # builds the kernels, with progress, before any process waits for another
        if devices.per_node > 1 and launcher() is None:
            again = [sys.executable, "-m", "powertrain", "train", *argv]
            return launch(again, devices.per_node, num_nodes=devices.num_nodes)
        end_with_launcher()
        _load(signals, "training.fit", "training.loggers", "training.status", "data.datamodule")
        return _train_as_rank(config, arguments, argv, signals, devices)
    except Stopped as stop:
        return _interrupted(config, stop.signum, "No step was under way", again_as)


def _load(signals: StopSignals, *modules: str) -> None:
    """Import modules of powertrain; a signal waits for them.

    An exception in the midst of an import may be lost, or leave half a module.
    """
    with signals.deferred(b"stopping once all is loaded"):
        for module in modules:
            import_module(f"powertrain.{module}")
    signals.raise_received()


def _train_as_rank(
    config: RunConfig, arguments: argparse.Namespace, argv: list[str], signals: StopSignals, devices: Devices
) -> int:
    """Train as one of the processes that `devices` counts, and report."""
    again_as = _command("train", *argv)
    # Before the data are prepared, which may take long as well.
    if devices.torch_device.type == "cpu" and (note := long_on_cpu(config)):
        say(note)
    try:
        result = run(config, command=shlex.join(["powertrain", "train", *argv]), signals=signals)
        if result.fit.interrupted_by is not None:
            step = result.fit.counters.step
            saved = f"Everything is saved at step {step}" if result.fit.checkpoint else "No step was under way"
            return _interrupted(config, result.fit.interrupted_by, saved, again_as)
        _report(config, result, arguments)
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
    elif not is_rank_zero():
        time.sleep(OTHER_RANK_DELAY)
    # Errors that all ranks agree on speak for all of them.
    agreed = isinstance(error, _expected_errors())
    known = agreed or isinstance(error, ValueError | OSError)
    text = f"powertrain train: {error if known else f'{type(error).__name__}: {error}'}\n"
    if not (agreed and is_rank_zero()):
        text = text.replace(": ", f": rank {global_rank()}: ", 1)
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
        say(f"\nInterrupted. {saved}; resume with:\n  {command}")
        return 128 + signum
    # Of all ranks, since any other code would have srun end rank 0 before it has asked for another attempt.
    if not is_rank_zero():
        return 0
    from powertrain.cluster.requeue import requeue

    say(f"\nInterrupted by {signal.Signals(signum).name}. {saved}.")
    try:
        answer = requeue(Path(config.paths.runs) / config.resolved_run_id(), signum)
    except SlurmError as error:
        print(f"powertrain train: {error}", file=sys.stderr, flush=True)
        return 1
    say(answer.sentence)
    return 0 if answer.queued else 128 + signum


def _report(config: RunConfig, result: RunResult, arguments: argparse.Namespace) -> None:
    """Show what came out: losses, the curve, a sample, and how to go on."""
    if not is_rank_zero():
        return
    from powertrain.inference.generate import generate_text, load_run
    from powertrain.training.batching import resolve_devices
    from powertrain.training.plots import plot_curve

    loss, perplexity, per_byte = (result.metrics.get(f"val/{key}") for key in ("loss", "perplexity", "bits_per_byte"))
    if result.fit.resumed_step >= result.length.steps:
        say(f"The run was finished already, at step {result.fit.counters.step:,}.")
    say()
    if loss is not None:
        shown = "not finite" if perplexity is None else f"{perplexity:.2f}"
        bits = "" if per_byte is None else f", {per_byte:.3f} bits per byte"
        say(f"validation loss {loss:.4f} nats per token, perplexity {shown}{bits}")
    elif "val/loss" in result.metrics:
        say("validation loss not finite")
    say(f"loss curve      {plot_curve(result.run_dir)}")
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
        try:
            text = config.sample.prompt + "".join(pieces)
        except ValueError as error:  # the model has diverged
            say(f"\nNo sample: {error}")
        else:
            (result.run_dir / "sample.txt").write_text(text)
            rule = "-" * 72
            say(f"\nA sample of {counted(config.sample.max_new_tokens, 'token')}:\n{rule}\n{text}\n{rule}")
    say()
    if arguments.config is None and config.debug.max_steps is None:
        lengths = ("trainer.max_steps=", "trainer.max_tokens=", "budget.", "budget=", "run_id=")
        kept = [o for o in arguments.overrides if not o.startswith(lengths)]
        if arguments.config_dir is not None:
            kept = ["--config-dir", str(arguments.config_dir), *kept]
        trained = max(result.length.tokens, result.fit.counters.tokens)
        further = f"run_id={result.run_id} trainer.max_tokens={2 * trained}"
        if config.trainer.max_steps is not None:
            further += " trainer.max_steps=null"
        if config.budget.value is not None:
            further += " budget.value=null"
        say(f"Train it twice as long:  {_command('train', *kept)} {further}")
        if config.schedule.kind != "constant":
            say("                         (its learning rate rises again, and the loss with it at first)")
    prompt = f" --prompt {shlex.quote(config.sample.prompt)}" if config.sample.prompt else ""
    top_k = "" if config.sample.top_k is None else f" --top-k {config.sample.top_k}"
    say(f"Generate from it:        {_command('generate', str(result.run_dir))}{top_k}{prompt}")


def _command(*arguments: str) -> str:
    """Return a command of this program for the shell, on as many threads as this one where the user said how many."""
    threads = None if launcher() or current_job_id() else os.environ.get("OMP_NUM_THREADS")
    set_threads = f"OMP_NUM_THREADS={shlex.quote(threads)} " if threads else ""
    return set_threads + shlex.join([_program(), *arguments])


def _program() -> str:
    """Return how this command is called from here: by its name where the shell finds it, else by its path."""
    called = Path(sys.argv[0])
    if shutil.which("powertrain") is not None or called.name != "powertrain":
        return "powertrain"
    return os.path.relpath(called) if called.is_relative_to(Path.cwd()) else str(called)

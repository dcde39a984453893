"""`powertrain sweep plan | prepare | run | status | time | report RECIPE`."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from powertrain.wording import counted

if TYPE_CHECKING:
    from rich.status import Status

    from powertrain.scaling.cells import Expansion
    from powertrain.scaling.recipe import Recipe
    from powertrain.scaling.records import CellRecord
    from powertrain.scaling.run import Outcome, SweepState
    from powertrain.training.signals import StopSignals

DIRECTORY = Path("sweeps")
# What these print may be read in part; in the others a broken pipe is a failure of what they do.
PRINTING = ("plan", "status", "report")
READING = "reading records, composing cells"

DESCRIPTION = """\
From FLOPs budgets to perplexity curves: a recipe says which mixers, sizes and budgets; `plan` says what that costs,
`run` trains what is missing, `report` fits and draws what the records hold.
"""

EXAMPLES = """\
examples:
  powertrain sweep plan smoke                    the cells with their steps, tokens, FLOPs and time; nothing runs
  powertrain sweep run smoke                     run what is missing, here; the same command again continues
  powertrain sweep run flops_65k --gpus 0,1,2,3  one runner per GPU
  powertrain sweep run flops_65k --gpus 0 --per-gpu 6   small models fill a GPU only together
  powertrain sweep time flops_65k                measure the winners' speed, each alone on the device
  powertrain sweep run flops_65k --slurm 16 --cluster gpus_per_node=1
                                                 an array of 16 runners, and a report when they are done
  powertrain sweep status flops_65k              what is finished, running, failed
  powertrain sweep report flops_65k              figures, page and table, from the records alone

RECIPE is a path, or the name of one that ships with powertrain (recipes/). Several runners, on any machines that share
the directory, divide one sweep among themselves.
"""


def parser() -> argparse.ArgumentParser:
    """Return the parser of `powertrain sweep`."""
    result = argparse.ArgumentParser(
        prog="powertrain sweep",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = result.add_subparsers(
        dest="command", required=True, metavar="plan | prepare | run | status | time | report"
    )
    plan = commands.add_parser("plan", help="print the cells and what they cost")
    prepare = commands.add_parser("prepare", help="prepare the data, which the first runner would else do")
    run = commands.add_parser("run", help="train what is missing")
    status = commands.add_parser("status", help="say what is finished, running and failed")
    timing = commands.add_parser("time", help="measure how fast the winners train, each alone on the device")
    report = commands.add_parser("report", help="fit and draw what the records hold")
    for command in (plan, prepare, run, status, timing, report):
        command.add_argument("recipe", metavar="RECIPE", help="path or shipped name")
        command.add_argument(
            "--directory", type=Path, default=DIRECTORY, help="holds one directory per sweep (default: sweeps)"
        )
    plan.add_argument(
        "--device",
        help="what to price for, such as H100, or cpu (default: cpu for recipes that train there, else the GPU here, "
        "the device of most records, or H200)",
    )
    plan.add_argument(
        "--all", action="store_true", help="a row for each finished cell too, instead of one per budget, mixer and size"
    )
    plan.add_argument(
        "--json", action="store_true", help="one JSON object per cell, finished or not, instead of tables"
    )
    where = run.add_mutually_exclusive_group()
    where.add_argument("--gpus", help="one runner per GPU of this list, such as 0,1,2,3, or `all`")
    run.add_argument(
        "--per-gpu",
        type=int,
        default=1,
        metavar="N",
        help="with --gpus: runners that share a GPU (default 1); with several, `time` measures speeds afterwards",
    )
    # How many runners share this one's GPU, itself included: what --gpus tells those it starts.
    run.add_argument("--shared-by", type=int, default=1, help=argparse.SUPPRESS)
    where.add_argument("--slurm", type=int, metavar="N", help="submit an array of N runners, and a dependent report")
    run.add_argument(
        "--cluster",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="with --slurm: options of conf/cluster, such as gpus_per_node=1 or time=4:00:00",
    )
    run.add_argument("--dry-run", action="store_true", help="with --slurm: print the scripts, submit nothing")
    run.add_argument(
        "--requeue",
        type=int,
        metavar="SECONDS",
        help="in a Slurm job that is signalled SECONDS before its limit: ask for another attempt when interrupted",
    )
    run.add_argument("--retry-failed", action="store_true", help="try failed cells again")
    run.add_argument("--no-wait", action="store_true", help="end while others still run, instead of waiting for them")
    run.add_argument("--max-hours", type=float, help="start no further cell after this time")
    run.add_argument("--keep-checkpoints", action="store_true", help="keep the last checkpoint of every cell")
    run.add_argument("--wandb", action="store_true", help="log every cell to W&B, offline where there is no key")
    run.add_argument("--quiet", action="store_true", help="one line per cell instead of a live table")
    report.add_argument("--output", type=Path, help="directory of the report (default: <directory>/<sweep>/report)")
    report.add_argument("--wandb", action="store_true", help="log the report as a W&B artifact too")
    return result


def main(argv: list[str]) -> int:
    """Run `powertrain sweep` and return its exit code: 0 done, 1 cells have failed, 2 bad input, 130 interrupted."""
    from powertrain.scaling.recipe import load_recipe

    arguments = parser().parse_args(argv)
    recipe = load_recipe(arguments.recipe)
    commands = {
        "plan": _plan,
        "prepare": _prepare,
        "run": _run,
        "status": _status,
        "time": _time,
        "report": _report,
    }
    try:
        code = commands[arguments.command](recipe, arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        if arguments.command not in PRINTING:
            raise
        # Whoever read the output, as `head` does, has read enough; at its end Python would write the rest once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1  # as `rich` does for what it prints
    return code


def _busy(doing: str) -> Status:
    """Say on standard error what takes a while, until it is done; only where that is a terminal."""
    from rich.console import Console

    return Console(stderr=True).status(doing)


def _hint(command: str, arguments: argparse.Namespace) -> str:
    """Return the command line of another command on the same sweep."""
    import shlex

    words = ["powertrain", "sweep", command, arguments.recipe]
    if arguments.directory != DIRECTORY:
        words += ["--directory", str(arguments.directory)]
    return shlex.join(words)


def _state(recipe: Recipe, directory: Path) -> SweepState:
    """Return the sweep as its directory shows it."""
    from powertrain.scaling.catalog import ComposedCatalog
    from powertrain.scaling.run import SweepPaths, SweepState

    return SweepState(recipe, ComposedCatalog(recipe), SweepPaths(directory / recipe.name))


def _cells_within_limits(state: SweepState) -> Expansion:
    """Return what the recipe amounts to; `ConfigError` where that is nothing."""
    from powertrain.schema import ConfigError

    expansion = state.expand()
    if not expansion.cells:
        first, *others = expansion.dropped
        more = f"; and {len(others)} more" if others else ""
        raise ConfigError(f"no cell of {state.recipe.name} is within its limits: {first}{more}")
    return expansion


def _records(state: SweepState, arguments: argparse.Namespace) -> list[CellRecord]:
    """Return all records; `ConfigError` where there are none."""
    from powertrain.schema import ConfigError

    records = state.records()
    if not records:
        raise ConfigError(f"sweep {state.recipe.name!r} has no records yet: {_hint('run', arguments)}")
    return records


def _plan(recipe: Recipe, arguments: argparse.Namespace) -> int:
    from powertrain.scaling import timing
    from powertrain.scaling.plan import as_rows, make_plan
    from powertrain.scaling.plan_text import render, rounded_batches
    from powertrain.scaling.pricing import choose_device, find_device, gpu_here

    state = _state(recipe, arguments.directory)
    with _busy(READING):
        on_cpu = state.shared_config().trainer.accelerator == "cpu"
        records, timings = state.records(), timing.read(state.paths.timings)
        if arguments.device or on_cpu:
            device = find_device(arguments.device or "cpu")
            chosen = "" if arguments.device else "the recipe trains there"
        else:
            device, chosen = choose_device(records, gpu_here())
        expansion, finished = _cells_within_limits(state), state.store.finished()
        plan = make_plan(expansion, device, records, finished, timings, chosen, state.trunk_steps(expansion))
    if arguments.json:
        for row in as_rows(plan):
            print(json.dumps(row))
        return 0
    from rich.console import Console
    from rich.table import Table

    # Where the output is no terminal: wide enough for every column, and one line for what is one.
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    for item in render(plan, console.width, every=arguments.all):
        console.print(item, soft_wrap=not console.is_terminal and not isinstance(item, Table))
    batches = rounded_batches(recipe, plan.expansion)
    if batches is not None:
        console.print(batches, highlight=False)
    return 0


def _prepare(recipe: Recipe, arguments: argparse.Namespace) -> int:
    from powertrain.data.prepare import prepare

    config = _state(recipe, arguments.directory).shared_config()
    print(f"data: {prepare(config.data, config.paths.cache).directory}")
    return 0


def _run(recipe: Recipe, arguments: argparse.Namespace) -> int:
    from powertrain.schema import ConfigError

    if arguments.per_gpu < 1:
        raise ConfigError(f"--per-gpu {arguments.per_gpu} is not allowed: it must be at least 1")
    if arguments.per_gpu > 1 and arguments.gpus is None:
        raise ConfigError(
            f"--per-gpu {arguments.per_gpu} needs --gpus, such as `--gpus all`: without it one runner runs here, "
            "and with --slurm one in each task"
        )
    if arguments.max_hours is not None and not arguments.max_hours >= 0:
        raise ConfigError(f"--max-hours {arguments.max_hours:g} is not allowed: it must be at least 0")
    if arguments.slurm is not None:
        return _submit(recipe, arguments)
    if arguments.dry_run:
        raise ConfigError(f"--dry-run needs --slurm: `{_hint('plan', arguments)}` says what would run here")
    if arguments.cluster:
        raise ConfigError(f"--cluster {arguments.cluster[0]} needs --slurm: it is an option of the jobs of an array")
    state = _state(recipe, arguments.directory)
    failed_earlier = state.failed(_cells_within_limits(state))
    if arguments.retry_failed:
        state.failures.forget(state.failures.ids())
        failed_earlier = set()
    code = _run_on_gpus(state, arguments) if arguments.gpus is not None else _run_here(state, arguments)
    if not arguments.quiet:
        _print_status(state)
    expansion = state.expand()
    failed = state.failed(expansion)
    if failed:
        print(
            f"{counted(len(failed), 'cell')} failed"
            f"{' earlier' if failed <= failed_earlier else ''}: see `{_hint('status', arguments)}`; "
            f"--retry-failed tries {'it' if len(failed) == 1 else 'them'} again"
        )
        return code or 1
    if not arguments.quiet and not state.missing(expansion):
        print(f"next: {_hint('report', arguments)}")
    return code


def _run_here(state: SweepState, arguments: argparse.Namespace) -> int:
    from powertrain.cluster.queue import SlurmError, current_job_id
    from powertrain.cluster.requeue import requeue_job
    from powertrain.scaling.run import Outcome
    from powertrain.training.signals import Stopped, StopSignals

    with StopSignals() as signals:
        try:
            outcome = _run_cells(state, arguments, signals)
        except Stopped as stop:
            outcome = Outcome(interrupted_by=stop.signum)
        if outcome.interrupted_by is None:
            return 0
        print("Interrupted. Everything is saved; the same command continues.")
        if arguments.requeue is not None and outcome.interrupted_by != signal.SIGINT and current_job_id() is not None:
            try:
                print(requeue_job(outcome.interrupted_by, arguments.requeue).sentence)
            except SlurmError as error:
                print(f"powertrain sweep: {error}", file=sys.stderr)
                return 1
        return 128 + outcome.interrupted_by


def _run_cells(state: SweepState, arguments: argparse.Namespace, signals: StopSignals) -> Outcome:
    from rich.console import Console

    from powertrain.scaling.display import LiveStatus, deadline
    from powertrain.scaling.execute import TrainingExecutor, check
    from powertrain.scaling.run import run

    check(state)
    executor = TrainingExecutor(
        state.recipe,
        state.paths,
        wandb=arguments.wandb,
        keep_checkpoints=arguments.keep_checkpoints,
        runners=arguments.shared_by,
        signals=signals,
    )
    # The terminal itself: what a training prints is sent to its log, and would take these lines with it.
    console = Console(file=sys.stdout)
    with LiveStatus(state, console, live=not arguments.quiet) as display:
        late = deadline(arguments.max_hours)
        outcome = run(
            state,
            executor,
            # Python drops what a handler raises within a finalizer; the flag remains.
            stop=lambda: late() or signals.received is not None,
            wait=None if arguments.no_wait else time.sleep,
            on_start=display.cell_started,
            on_end=display.cell_ended,
        )
    outcome.interrupted_by = outcome.interrupted_by or signals.received
    return outcome


def _of_runners(arguments: argparse.Namespace) -> list[str]:
    """Return the flags that hold for every runner that this process starts or submits."""
    flags = [f"--{f.replace('_', '-')}" for f in ("no_wait", "keep_checkpoints", "wandb") if getattr(arguments, f)]
    return flags + ([] if arguments.max_hours is None else ["--max-hours", str(arguments.max_hours)])


def _run_on_gpus(state: SweepState, arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from powertrain.scaling.display import LiveStatus
    from powertrain.scaling.execute import check
    from powertrain.scaling.launch import run_on_gpus, visible_gpus

    gpus = visible_gpus(arguments.gpus)
    check(state, devices=False)
    passed_on = ["sweep", "run", arguments.recipe, "--directory", str(arguments.directory), "--quiet"]
    passed_on += ["--shared-by", str(arguments.per_gpu)]
    passed_on += _of_runners(arguments)
    with LiveStatus(state, Console(file=sys.stdout), live=not arguments.quiet):
        return run_on_gpus(passed_on, gpus, state.paths.logs, arguments.per_gpu)


def _submit(recipe: Recipe, arguments: argparse.Namespace) -> int:
    from powertrain.cluster.config import ClusterConfig
    from powertrain.scaling.launch import scripts, slurm_jobs, submit
    from powertrain.schema import ConfigError, build

    values = {}
    for text in arguments.cluster:
        key, separator, value = text.partition("=")
        if not separator:
            raise ConfigError(f"--cluster {text}: write KEY=VALUE, such as gpus_per_node=1")
        values[key] = int(value) if value.isdigit() else value
    cluster = build(ClusterConfig, {"kind": "slurm", **values}, "cluster")
    several = "nodes" if cluster.nodes > 1 else "tasks_per_node" if cluster.tasks_per_node else "gpus_per_node"
    if cluster.processes > 1:
        raise ConfigError(
            f"--cluster {several}={getattr(cluster, several)} is not allowed: a job of the array is one runner, and "
            f"that one process; --slurm {arguments.slurm} says how many there are"
        )
    state = _state(recipe, arguments.directory)
    _cells_within_limits(state)
    trainer = state.shared_config().trainer
    if trainer.accelerator == "gpu" and not cluster.gpus_per_node:
        raise ConfigError(f"{recipe.name} trains on GPUs: give --cluster gpus_per_node=1")
    flags = ["--requeue", str(cluster.signal_seconds), *_of_runners(arguments)]
    array, report = slurm_jobs(arguments.recipe, arguments.directory, state.paths, arguments.slurm, flags)
    if arguments.dry_run:
        print(scripts(cluster, array, report), end="")
        return 0
    if arguments.retry_failed:
        state.failures.forget(state.failures.ids())
    array_id, report_id = submit(cluster, array, report, state.paths)
    print(f"submitted runners {array_id}[0-{arguments.slurm - 1}] and report {report_id}; logs in {array.log_dir}")
    print(f"follow: {_hint('status', arguments)}")
    return 0


def _print_status(state: SweepState) -> None:
    from rich.console import Console

    from powertrain.scaling.display import status_table

    console = Console()
    with _busy(READING):
        table = status_table(state, bar=console.is_terminal)
    console.print(table)


def _status(recipe: Recipe, arguments: argparse.Namespace) -> int:
    _print_status(_state(recipe, arguments.directory))
    return 0


def _time(recipe: Recipe, arguments: argparse.Namespace) -> int:
    from powertrain.scaling.timing import run_timings

    state = _state(recipe, arguments.directory)
    _records(state, arguments)
    made = run_timings(state, state.paths.timings, state.paths.logs / "timings.log", print)
    timed = "everything that won is timed on this device"
    print(f"{counted(len(made), 'timing')} in {state.paths.timings}" if made else timed)
    return 0


def _report(recipe: Recipe, arguments: argparse.Namespace) -> int:
    from powertrain.scaling import timing
    from powertrain.scaling.plan import coverage
    from powertrain.scaling.report import build, write

    state = _state(recipe, arguments.directory)
    paths = state.paths
    with _busy(READING):
        records = _records(state, arguments)
        expansion = state.expand()
        parts = coverage(recipe, expansion, state.store.finished(), state.failed(expansion))
    output = arguments.output or paths.report
    with _busy("fitting and drawing"):
        write(build(recipe, records, parts, timing.read(paths.timings)), output)
    print(f"report: {output / 'README.md'}")
    if arguments.wandb:
        from powertrain.scaling.artifact import log_report

        print(log_report(recipe, state.shared_config().logger, output, paths.root))
    return 0

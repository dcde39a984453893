import dataclasses
import io
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from powertrain import __version__
from powertrain.cli import main
from powertrain.scaling.catalog import ComposedCatalog
from powertrain.scaling.cli import parser
from powertrain.scaling.display import status_table
from powertrain.scaling.launch import run_on_gpus, visible_gpus
from powertrain.scaling.plan import coverage
from powertrain.scaling.recipe import Analysis, Limits, Stage, load_recipe
from powertrain.scaling.records import table
from powertrain.scaling.report import build
from powertrain.scaling.run import Failures, Interrupted, SweepPaths, SweepState, run
from powertrain.schema import ConfigError

from . import synthetic
from .fakes import FakeCatalog, FakeExecutor
from .test_execute import recipe_in

RECIPE = synthetic.recipe(
    stages=(
        Stage((1e15,), "all", "grid"),
        Stage((3e15,), "frontier", "tuned"),
        Stage((3e15,), "best", "tuned", seeds=(1,)),
    ),
    limits=Limits(min_steps=20),
    warmup_steps=5,
    analysis=Analysis(bootstrap=100, law_bootstrap=20),
    figures=("perplexity",),
)


def state_in(root, recipe=RECIPE):
    return SweepState(recipe, FakeCatalog(), SweepPaths(root), lease_seconds=5.0)


def rows(state):
    return table(state.store.read()).to_pylist()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The table of a sweep that nobody disturbed."""
    state = state_in(tmp_path_factory.mktemp("unbroken"))
    run(state, FakeExecutor())
    return rows(state)


def test_a_sweep_runs_every_cell_once_and_then_nothing(tmp_path, unbroken):
    state, executor = state_in(tmp_path), FakeExecutor()
    outcome = run(state, executor)
    assert sorted(executor.ran) == sorted(outcome.finished) == sorted(r["cell"] for r in unbroken)
    assert len(set(executor.ran)) == len(executor.ran)
    assert {r["budget"] for r in unbroken} == {1e15, 3e15}
    assert {r["seed"] for r in unbroken} == {0, 1}
    again = FakeExecutor()
    run(state_in(tmp_path), again)
    assert again.ran == []


def test_a_failed_cell_is_reported_and_the_rest_goes_on(tmp_path):
    state = state_in(tmp_path)
    broken = state.expand().cells[4].id

    def work(cell):
        if cell.id == broken:
            raise RuntimeError("out of memory")

    ended = []
    outcome = run(state, FakeExecutor(work), on_end=lambda cell, error: ended.append((cell.id, error)))
    assert outcome.failed == [broken]
    assert state.failures.message(broken) == "RuntimeError: out of memory"
    assert not state.missing(state.expand())
    assert any(cell == broken and isinstance(error, RuntimeError) for cell, error in ended)
    executor = FakeExecutor()
    run(state_in(tmp_path), executor)
    assert executor.ran == [], "a failed cell is not tried again by itself"
    Failures(state.paths.failures).forget([broken])
    run(state_in(tmp_path), executor)
    assert broken in executor.ran


def test_a_cell_that_another_runner_finished_has_not_failed(tmp_path):
    state = state_in(tmp_path)
    run(state, FakeExecutor())
    expansion = state.expand()
    for cell in expansion.cells[:2]:
        state.failures.add(cell, RuntimeError("out of memory"))
    state.store.path(expansion.cells[0].id).unlink()
    assert state.failed(expansion) == {expansion.cells[0].id}


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff"])
def test_a_failure_that_says_nothing_is_named(tmp_path, content):
    failures = Failures(tmp_path)
    (tmp_path / "synthetic-0.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"synthetic-0\.json: does not say why"):
        failures.message("synthetic-0")


def test_an_interrupted_cell_leaves_nothing_behind_but_its_progress(tmp_path, unbroken):
    state = state_in(tmp_path)

    def work(cell):
        if len(executor.ran) == 3:
            raise Interrupted(signal.SIGTERM)

    executor = FakeExecutor(work)
    outcome = run(state, executor)
    assert outcome.interrupted_by == signal.SIGTERM
    assert len(outcome.finished) == 2
    assert not list(state.paths.claims.glob("*.claim"))
    assert not state.failures.ids()
    run(state_in(tmp_path), FakeExecutor())
    assert rows(state) == unbroken


def test_stop_ends_between_cells(tmp_path):
    state, executor = state_in(tmp_path), FakeExecutor()
    run(state, executor, stop=lambda: len(executor.ran) >= 5)
    assert len(executor.ran) == 5


def _runner(root, seconds):
    run(state_in(root), FakeExecutor(seconds), wait=time.sleep, poll_seconds=0.05)


def _start(root, seconds):
    process = multiprocessing.get_context("spawn").Process(target=_runner, args=(root, seconds))
    process.start()
    return process


def test_two_runners_share_a_sweep_without_running_a_cell_twice(tmp_path, unbroken):
    """Each records who ran what; the union is the whole sweep, and the parts are disjoint."""
    processes = [_start(tmp_path, 0.02) for _ in range(2)]
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    assert rows(state_in(tmp_path)) == unbroken
    assert not list((tmp_path / "claims").glob("*.claim"))


def test_killed_at_random_and_resumed_the_table_is_identical(tmp_path, unbroken):
    """SIGKILL at random times, alone and beside another runner, until the sweep is done."""
    rng = random.Random(0)
    state = state_in(tmp_path)
    kills = 0
    while state.missing(state.expand()) and kills < 12:
        before = len(state.store.finished())
        process = _start(tmp_path, 0.01)
        deadline = time.monotonic() + 60
        # Wait until it works, so that the kill meets it in the middle of a cell or of a record.
        while len(state.store.finished()) == before and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(rng.uniform(0.0, 0.15))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
    assert kills >= 3, "the sweep was over before it could be disturbed"
    run(state, FakeExecutor())
    assert not state.missing(state.expand())
    assert rows(state) == unbroken


def test_a_sweep_cut_short_reports_what_there_is_and_what_is_missing(tmp_path):
    """Records that came from a machine that is gone, its claims and runs with it, are enough to go on."""
    state, executor = state_in(tmp_path / "first"), FakeExecutor()
    run(state, executor, stop=lambda: len(executor.ran) >= 20)
    first = coverage(RECIPE, state.expand(), state.store.finished())
    assert next(c.finished for c in first if c.budget == 1e15) > 0
    assert not all(c.complete for c in first)
    assert any(c.later for c in first if c.budget == 3e15)
    files = build(RECIPE, state.store.read(), first)
    text = files["README.md"].decode()
    assert f"So far: 20 of {sum(c.planned for c in first)} cells and further ones to come." in text
    missing = text.split("### What is missing")[1].split("###")[0]
    for part in first:
        row = f"| {part.budget:.3g} | {RECIPE.label(part.mixer)} | {part} |"
        assert (row in missing) is not part.complete
    doubts = [line for line in text.splitlines() if line.startswith("- 1e+15 FLOPs: ") and "incomplete:" in line]
    lacking = {str(part) for part in first if part.budget == 1e15 and not part.complete}
    assert len(doubts) == (len(lacking) if "### Verdict" in text else 0)

    second = state_in(tmp_path / "second")
    second.paths.root.mkdir()
    shutil.copytree(state.paths.records, second.paths.records)
    resumed = FakeExecutor()
    run(second, resumed)
    assert not set(resumed.ran) & set(executor.ran)
    done = coverage(RECIPE, second.expand(), second.store.finished())
    assert all(c.complete for c in done)
    whole = build(RECIPE, second.store.read(), done)["README.md"].decode()
    assert "What is missing" not in whole
    assert "So far" not in whole


@pytest.mark.parametrize("where", [[], ["--slurm", "2", "--dry-run"]])
def test_runners_share_a_gpu_only_where_gpus_are_named(tmp_path, capsys, where):
    """One runner that called itself several would lose its times."""
    command = ["sweep", "run", "smoke", "--directory", str(tmp_path), "--per-gpu", "2", *where]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "--per-gpu 2 needs --gpus" in error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("*.txt", "*.none", "no file matches data.files"),
        ("accelerator=cpu", "accelerator=gpu", "on this machine, which has none"),
        ("tokenizer.kind=bytes", "tokenizer.vocab_size=300", "cells are planned with 300"),
    ],
)
def test_what_would_fail_every_cell_is_said_once_before_any(tmp_path, capsys, monkeypatch, old, new, words):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    path = recipe_in(tmp_path)
    path.write_text(path.read_text().replace(old, new))
    assert main(["sweep", "run", str(path), "--directory", str(tmp_path / "sweeps"), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert error.count(words) == 1
    assert not (tmp_path / "sweeps").exists(), "nothing was claimed, and nothing failed"


def test_failed_cells_are_named_until_they_are_tried_again(tmp_path, capsys):
    path = recipe_in(tmp_path)
    here = ["--directory", str(tmp_path / "my sweeps")]
    recipe = load_recipe(str(path))
    state = SweepState(recipe, ComposedCatalog(recipe), SweepPaths(tmp_path / "my sweeps" / recipe.name))
    cells = state.expand().cells
    for cell in cells:
        state.failures.add(cell, RuntimeError("out of memory"))
    for quiet in ([], ["--quiet"]):
        assert main(["sweep", "run", str(path), *here, *quiet]) == 1
        (line,) = [x for x in capsys.readouterr().out.splitlines() if "--retry-failed" in x]
        assert line == (
            f"{len(cells)} cells failed earlier: see `powertrain sweep status {path} --directory "
            f"'{tmp_path / 'my sweeps'}'`; --retry-failed tries them again"
        )
    state.failures.forget(state.failures.ids())
    # Of a recipe that has changed since.
    state.failures.add(dataclasses.replace(cells[0], id="tiny-0"), RuntimeError("out of memory"))
    assert main(["sweep", "run", str(path), *here, "--quiet", "--max-hours", "0"]) == 0


@pytest.mark.parametrize("command", [["plan"], ["run"], ["run", "--slurm", "2", "--dry-run"]])
def test_a_sweep_without_a_cell_within_its_limits_is_refused(tmp_path, capsys, command):
    path = recipe_in(tmp_path)
    path.write_text(path.read_text().replace("min_steps: 5", "min_steps: 5000"))
    name, *flags = command
    assert main(["sweep", name, str(path), "--directory", str(tmp_path / "sweeps"), *flags]) == 2
    error = capsys.readouterr().err
    assert "no cell of tiny is within its limits: power, one, 6e+07 FLOPs, context 32: " in error
    assert "fewer than 5000; and 3 more" in error


@pytest.mark.parametrize("command", ["report", "time"])
def test_what_needs_records_names_the_command_that_makes_them(tmp_path, capsys, command):
    here = [str(recipe_in(tmp_path)), "--directory", str(tmp_path / "sweeps")]
    assert main(["sweep", command, *here]) == 2
    assert f"sweep 'tiny' has no records yet: powertrain sweep run {' '.join(here)}\n" in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("command", ["plan", "status"])
def test_what_takes_a_while_is_said_on_a_terminal_only(tmp_path, monkeypatch, capsys, command):
    monkeypatch.setenv("TERM", "xterm")
    here = [str(recipe_in(tmp_path)), "--directory", str(tmp_path / "sweeps")]
    assert main(["sweep", command, *here]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal := Terminal())
        assert main(["sweep", command, *here]) == 0
    assert "reading records, composing cells" in terminal.getvalue()
    assert capsys.readouterr().out == said.out


def test_records_that_are_read_give_the_losses_as_well(tmp_path, monkeypatch):
    run(state_in(tmp_path), FakeExecutor())
    expected = state_in(tmp_path).outcomes()
    state = state_in(tmp_path)
    assert {r.cell: r.loss for r in state.records()} == expected
    monkeypatch.setattr(state.store, "read_one", None)
    assert state.outcomes() == expected


def test_status_ends_its_last_line_and_draws_a_bar_on_a_terminal_only(tmp_path):
    state = state_in(tmp_path)
    for terminal in (False, True):
        console = Console(file=io.StringIO(), width=100, force_terminal=terminal)
        console.print(status_table(state, bar=terminal))
        text = console.file.getvalue()
        assert text.endswith("\n")
        assert ("━" in text) is terminal
        assert "0.0% of the sweep's FLOPs" in text


def test_the_status_of_four_mixers_is_whole_on_a_terminal_of_80_columns(tmp_path):
    grid, seeds = Stage((1e15,), "all", "grid"), Stage((1e15,), "best", "tuned", seeds=(1, 2))
    state = state_in(tmp_path, dataclasses.replace(RECIPE, stages=(grid, seeds)))
    run(state, FakeExecutor())
    planned = {m: [c.id for c in state.expand().cells if c.mixer == m and not c.seed] for m in RECIPE.mixers}
    for cells in planned.values():
        state.store.path(cells[0]).unlink()
    state = state_in(tmp_path, state.recipe)
    console = Console(file=io.StringIO(), width=80)
    console.print(status_table(state, bar=False))
    header, counts, best, _ = (line.split() for line in console.file.getvalue().splitlines())
    assert header == ["FLOPs", *RECIPE.mixers]
    assert counts == ["1e+15", *" ".join(f"{len(c) - 1}/{len(c)} +2 later" for c in planned.values()).split()]
    losses = [min(state.outcomes()[c] for c in cells[1:]) for cells in planned.values()]
    assert best == " ".join(f"lowest {loss:.4f}" for loss in losses).split()


@pytest.mark.parametrize(("name", "flags"), [("plan", []), ("plan", ["--json"]), ("status", [])])
def test_whoever_stops_reading_ends_the_command_quietly(tmp_path, name, flags):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "powertrain", "sweep", name, str(recipe_in(tmp_path)), *flags]
    ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (1, "")


@pytest.mark.parametrize("name", ["prepare", "run", "time"])
def test_a_pipe_that_breaks_within_the_work_is_a_failure(monkeypatch, capsys, name):
    def work(*_):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(f"powertrain.scaling.cli._{name}", work)
    assert main(["sweep", name, "smoke"]) == 2
    assert "powertrain sweep: [Errno 32] Broken pipe\n" in capsys.readouterr().err


def test_gpus_that_torch_does_not_see_are_refused(tmp_path, capsys, monkeypatch):
    command = ["sweep", "run", "smoke", "--directory", str(tmp_path), "--quiet", "--gpus"]
    for there, given, words in (
        (0, "all", "this machine has no GPU that torch can see"),
        (0, "0,1", "this machine has no GPU that torch can see"),
        (2, "1,2", "torch sees 2 here; allowed are 0, 1, or `all`"),
        (2, "1,1", "each once"),
    ):
        monkeypatch.setattr("torch.cuda.device_count", lambda there=there: there)
        assert main([*command, given]) == 2
        assert f"--gpus {given}" in (error := capsys.readouterr().err)
        assert words in error
    assert not list(tmp_path.iterdir())
    assert visible_gpus("all") == ["0", "1"]
    assert visible_gpus("1") == ["1"]


def test_of_the_gpus_that_a_process_sees_a_runner_sees_one(tmp_path, monkeypatch):
    started = []

    def start(command, *, env, **_):
        started.append(env["CUDA_VISIBLE_DEVICES"])
        return SimpleNamespace(poll=lambda: 0, returncode=0)

    monkeypatch.setattr("subprocess.Popen", start)
    monkeypatch.setattr("powertrain.scaling.launch.STAGGER_SECONDS", 0.0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    run_on_gpus([], ["0", "1"], tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-5f")
    run_on_gpus([], ["0", "1"], tmp_path)
    assert started == ["0", "1", "2", "GPU-5f"]


def test_those_who_share_a_gpu_are_told_how_many_they_are(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("powertrain.scaling.launch.run_on_gpus", lambda *given: started.append(given) or 0)
    recipe, place = str(recipe_in(tmp_path)), str(tmp_path / "sweeps")
    command = ["sweep", "run", recipe, "--directory", place, "--quiet", "--gpus", "0,1", "--per-gpu", "3"]
    assert main(command) == 0
    ((passed_on, gpus, _, per_gpu),) = started
    assert (gpus, per_gpu) == (["0", "1"], 3)
    child = parser().parse_args(passed_on[1:])
    assert (child.shared_by, child.per_gpu, child.gpus) == (3, 1, None)


def test_an_array_that_trains_on_gpus_asks_for_them(tmp_path, capsys):
    command = ["sweep", "run", "flops_65k", "--directory", str(tmp_path), "--slurm", "16", "--dry-run"]
    assert main(command) == 2
    assert "flops_65k trains on GPUs: give --cluster gpus_per_node=1" in capsys.readouterr().err
    assert main([*command, "--cluster", "gpus_per_node=1"]) == 0
    assert "#SBATCH --gpus-per-node=1" in capsys.readouterr().out
    assert main([*command, "--cluster", "gpus_per_node=1", "--cluster", "signal_seconds=60"]) == 0
    script = capsys.readouterr().out
    assert "#SBATCH --signal=USR1@60" in script
    assert " --requeue 60 " in script
    assert main(["sweep", "run", "smoke", *command[3:]]) == 0
    (example,) = [line for line in parser().format_help().splitlines() if "--slurm" in line]
    assert main([*example.split()[1:], "--directory", str(tmp_path), "--dry-run"]) == 0


def test_a_job_of_an_array_is_one_runner(tmp_path, capsys):
    """Several tasks of a job would be taken for ranks of one training."""
    command = ["sweep", "run", "smoke", "--directory", str(tmp_path), "--slurm", "3", "--dry-run"]
    for given in ("nodes=2", "tasks_per_node=2", "gpus_per_node=4"):
        assert main([*command, "--cluster", given]) == 2
        assert f"--cluster {given} is not allowed: a job of the array is one runner" in capsys.readouterr().err


def test_what_is_for_jobs_alone_is_refused_without_them(tmp_path, capsys):
    command = ["sweep", "run", "smoke", "--directory", str(tmp_path)]
    for given, words in (
        (["--dry-run"], f"--dry-run needs --slurm: `powertrain sweep plan smoke --directory {tmp_path}`"),
        (["--cluster", "time=1:00:00"], "--cluster time=1:00:00 needs --slurm"),
        (["--max-hours", "-1"], "--max-hours -1 is not allowed: it must be at least 0"),
        (["--max-hours", "nan", "--slurm", "1"], "--max-hours nan is not allowed"),
    ):
        assert main([*command, *given]) == 2
        assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir()), "nothing was trained"


def test_the_runners_of_an_array_get_the_flags_of_every_runner(tmp_path, capsys):
    flags = ["--no-wait", "--keep-checkpoints", "--wandb", "--max-hours", "1.5"]
    assert main(["sweep", "run", "smoke", "--directory", str(tmp_path), "--slurm", "2", "--dry-run", *flags]) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "sweep run" in x]
    assert "--no-wait --keep-checkpoints --wandb --max-hours 1.5" in line


def test_an_array_tries_failed_cells_again_where_asked(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("powertrain.scaling.launch.submit", lambda *_: ("1", "2"))
    failures = Failures(tmp_path / "smoke" / "failures")
    failures.directory.mkdir(parents=True)
    (failures.directory / "smoke-0.json").write_text("{}")
    command = ["sweep", "run", "smoke", "--directory", str(tmp_path), "--slurm", "2"]
    assert main([*command, "--retry-failed", "--dry-run"]) == 0
    assert main(command) == 0
    assert failures.ids() == {"smoke-0"}
    assert main([*command, "--retry-failed"]) == 0
    assert not failures.ids()
    assert f"follow: powertrain sweep status smoke --directory {tmp_path}\n" in capsys.readouterr().out


def test_runners_share_a_gpu(tmp_path):
    """Each has a log of its own; what they do with one sweep is tested above."""
    assert run_on_gpus(["--version"], ["0", "3"], tmp_path, per_gpu=2) == 0
    logs = sorted(tmp_path.glob("*.log"))
    assert [log.name for log in logs] == [f"runner-{gpu}-{n}.log" for gpu in (0, 3) for n in (0, 1)]
    assert all(__version__ in log.read_text() for log in logs)

import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from types import SimpleNamespace

import pytest

from powertrain.config import read_config
from powertrain.data.datamodule import TokenDataModule
from powertrain.models.gpt import GPT
from powertrain.scaling.catalog import ComposedCatalog
from powertrain.scaling.evaluate import documents_of, measure, position_bounds, sum_by_document, training_curve
from powertrain.scaling.execute import TrainingExecutor, branch, read_starts, trunk_config
from powertrain.scaling.recipe import load_recipe
from powertrain.scaling.records import table
from powertrain.scaling.run import SweepPaths, SweepState, run
from powertrain.training.signals import StopSignals

from .fakes import fake_record

RECIPE = """
name: tiny
question: Does a sweep survive?
contexts: [32]
subject: power
baseline: softmax
mixers:
  power: {{overrides: [mixer=power, mixer.chunk_size=16]}}
  softmax: {{overrides: [mixer=softmax]}}
ladder:
  one: {{overrides: [model=1m, model.n_layers=1, model.d_model=16, model.n_heads=2, model.n_kv_heads=2, model.head_dim=8, model.d_ff=32]}}
stages:
  - {{budgets: [6.0e+7, 1.2e+8], sizes: all, learning_rates: grid}}
learning_rate: {{value: 1.0e-2}}
batch_tokens: {{value: 64}}
overrides:
  - data=text
  - data.files='{files}'
  - data.tokenizer.kind=bytes
  - data.val_fraction=0.2
  - data.num_workers=0
  - trainer.accelerator=cpu
  - trainer.precision=32-true
  - trainer.val_every_steps=100000
  - trainer.checkpoint_every_steps=3
  - trainer.log_every_steps=1
  - paths.cache='{cache}'
warmup_steps: 3
limits: {{min_steps: 5}}
evaluation: {{tokens: 512, position_buckets: 3}}
"""  # noqa: E501

# Everything but what a clock measures.
TIMES = ("seconds",)


def recipe_in(directory):
    texts = directory / "texts"
    texts.mkdir(parents=True)
    rng = random.Random(0)
    for i in range(40):
        (texts / f"{i:02d}.txt").write_text(
            " ".join(rng.choices(["the", "cat", "sat", "on", "a", "mat", "and", "ran"], k=150))
        )
    path = directory / "tiny.yaml"
    path.write_text(RECIPE.format(files=f"{texts}/*.txt", cache=directory / "cache"))
    return path


def state_in(path, root):
    recipe = load_recipe(str(path))
    return SweepState(recipe, ComposedCatalog(recipe), SweepPaths(root / recipe.name))


def rows(state):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in table(state.store.read()).to_pylist()]


def test_a_trunk_is_the_cell_without_its_fall(tmp_path):
    cell = state_in(recipe_in(tmp_path), tmp_path).expand().cells[0]
    trunk = trunk_config(cell)
    assert trunk.schedule.kind == "constant"
    assert trunk.budget.value == cell.decay_start
    assert trunk.resolved_run_id() == cell.trunk
    assert dataclasses.replace(trunk.optim) == cell.config.optim


def test_a_branch_without_a_trunk_starts_at_the_beginning(tmp_path):
    assert branch(tmp_path / "none", tmp_path / "cell", 10) == 0
    assert not (tmp_path / "cell").exists()


def test_documents_and_positions_are_summed_exactly():
    import numpy as np

    losses = np.arange(8.0)
    counted = np.array([1, 1, 1, 0, 1, 1, 1, 1], dtype=bool)
    documents = sum_by_document(losses, counted, np.array([0, 3, 6]), (2, 4, 8))
    assert documents[0].tolist() == [0 + 1 + 2, 4 + 5, 6 + 7]
    assert documents[1].tolist() == [3, 2, 2]
    # Positions 0 and 1 of each document, then 2 and 3.
    assert documents[2].tolist() == [0 + 1 + 4 + 6 + 7, 2 + 5, 0]
    assert documents[3].tolist() == [5, 2, 0]


def test_a_document_keeps_its_number_over_the_sequences_that_it_reaches():
    import numpy as np

    starts = np.array([0, 5, 20, 22])
    # Sequences of eight, the second of which lies within document 1.
    assert documents_of(starts, 0, 8, np.array([0, 5])) == [0, 1]
    assert documents_of(starts, 8, 8, np.array([0])) == [1]
    assert documents_of(starts, 16, 8, np.array([0, 4, 6])) == [1, 2, 3]
    # Without a document mask a sequence is one part.
    assert documents_of(starts, 0, 8, np.array([0])) == [0]
    assert documents_of(starts, 4, 8, np.array([0])) == [1]


def test_measured_parts_are_of_the_documents_that_the_split_holds(tmp_path):
    import torch

    recipe = load_recipe(str(recipe_in(tmp_path)))
    config = ComposedCatalog(recipe).config("softmax", "one", 32)
    data = TokenDataModule(config.data, context_length=32, micro_batch_size=1, cache_dir=config.paths.cache)
    measured = measure(GPT(config.model).eval(), data, precision="32-true", device=torch.device("cpu"), buckets=3)
    lengths = [len(data.val_windows.stream.document(n)) + 1 for n in range(data.val_windows.stream.num_documents)]
    tokens = Counter()
    for number, count in zip(measured.document_numbers, measured.document_tokens, strict=True):
        tokens[number] += count
    assert data.num_val_windows < len(data.val_windows), "spread over the split"
    assert len(measured.document_tokens) > len(tokens) > 3
    assert all(count <= lengths[number] for number, count in tokens.items())


def test_position_bounds_end_with_the_context():
    assert position_bounds(65536, 3) == (16384, 32768, 65536)
    assert position_bounds(4, 12) == (1, 2, 4)


def test_a_curve_says_which_points_are_annealed():
    metrics = [
        {"step": s, "tokens": 100 * s, "seconds": s / 10, "train/loss": 5.0 - s / 100} for s in range(1, 101)
    ] + [{"step": 100, "tokens": 10_000, "seconds": 10.0, "val/loss": 3.9}]
    curve = training_curve(metrics, 80, devices=2)
    assert [p.tokens for p in curve] == sorted(p.tokens for p in curve)
    assert all(p.annealed == (p.tokens > 8000) for p in curve)
    assert curve[-1].seconds == 20.0
    assert {p.kind for p in curve} == {"train", "val"}
    assert sum(p.kind == "train" for p in curve) < 100, "neighbouring steps are averaged"


@pytest.mark.slow
def test_a_branch_equals_the_unbroken_run(tmp_path):
    """Trunk, branch, longer trunk, branch: each cell's weights and losses are those of its run from the start."""
    from powertrain.train import run as train

    path = recipe_in(tmp_path)
    state = state_in(path, tmp_path / "sweeps")
    run(state, TrainingExecutor(state.recipe, state.paths))
    assert not state.failures.ids()
    records = {r.cell: r for r in state.store.read()}
    for cell in state.expand().cells:
        alone = dataclasses.replace(
            cell.config, paths=dataclasses.replace(cell.config.paths, runs=str(tmp_path / "alone"))
        )
        result = train(alone)
        curve = training_curve_of(result.run_dir, cell.decay_start)
        record = records[cell.id]
        assert [(p.tokens, p.loss, p.annealed) for p in record.curve if p.kind == "train"] == curve
        assert record.annealed
        assert (state.paths.runs / cell.trunk).is_dir() or cell.budget == max(state.recipe.budgets)


def test_a_cell_trains_and_is_measured_in_the_precision_of_its_trunk(tmp_path, monkeypatch):
    """Where the recipe leaves it to the device, and the trunk met another."""
    path = recipe_in(tmp_path)
    path.write_text(path.read_text().replace("trainer.precision=32-true", "trainer.precision=auto"))
    state = state_in(path, tmp_path / "sweeps")
    executor = TrainingExecutor(state.recipe, state.paths)
    cell = min(state.expand().cells, key=lambda cell: cell.budget)
    trunk = trunk_config(cell)
    in_bf16 = dataclasses.replace(trunk, trainer=dataclasses.replace(trunk.trainer, precision="bf16-mixed"))
    executor._train(executor._local(in_bf16))
    precisions = []

    def watched(*args, precision, **options):
        precisions.append(precision)
        return measure(*args, precision=precision, **options)

    monkeypatch.setattr("powertrain.scaling.evaluate.measure", watched)
    executor.run(cell)
    assert read_starts(state.paths.runs / cell.id)[1].from_step == cell.decay_start
    for run_dir in (state.paths.runs / cell.trunk, state.paths.runs / cell.id):
        assert read_config(run_dir / "config.yaml").trainer.precision == "bf16-mixed"
    assert precisions == ["bf16-mixed"]


def training_curve_of(run_dir, decay_start):
    from powertrain.training.records import read_metrics

    points = training_curve(read_metrics(run_dir), decay_start, 1)
    return [(p.tokens, p.loss, p.annealed) for p in points if p.kind == "train"]


@pytest.mark.slow
def test_killed_at_random_a_real_sweep_ends_with_the_identical_table(tmp_path):
    path = recipe_in(tmp_path)
    unbroken = state_in(path, tmp_path / "unbroken")
    run(unbroken, TrainingExecutor(unbroken.recipe, unbroken.paths))
    state = state_in(path, tmp_path / "killed")
    command = [sys.executable, "-m", "powertrain", "sweep", "run", str(path), "--directory", str(tmp_path / "killed")]
    rng = random.Random(1)
    kills = 0
    for _ in range(6):
        process = subprocess.Popen([*command, "--quiet"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before = progress(state)
        deadline = time.monotonic() + 120
        while progress(state) == before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(rng.uniform(0.0, 1.0))
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills >= 2
    done = subprocess.run([*command, "--quiet"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert rows(state) == rows(unbroken)


def test_a_record_names_every_process_that_trained_it(tmp_path, monkeypatch):
    """A trunk of two processes, one of whose steps were lost; a branch of the second; another process goes on."""
    store = "powertrain.training.checkpoint.CheckpointStore"
    monkeypatch.setattr(f"{store}.fault", lambda self, step: None)
    monkeypatch.setattr(f"{store}.adopt", lambda self, source, step: self.path(step).mkdir(parents=True))
    state = state_in(recipe_in(tmp_path), tmp_path / "sweeps")
    cell = state.expand().cells[0]
    trunk, own = state.paths.runs / cell.trunk, state.paths.runs / cell.id

    def train(config, commit, runners, reaches):
        def run(config, *, command, signals):
            run_dir = state.paths.runs / config.run_id
            for name in ("metrics.jsonl", "config.yaml"):
                (run_dir / name).touch()
            (run_dir / "checkpoints" / f"step-{reaches:08d}").mkdir(parents=True)
            return SimpleNamespace(fit=SimpleNamespace(interrupted_by=None), run_dir=run_dir)

        monkeypatch.setattr("powertrain.train.run", run)
        monkeypatch.setattr("powertrain.scaling.execute.environment_here", lambda: {"commit": commit})
        with StopSignals() as signals:
            TrainingExecutor(state.recipe, state.paths, runners=runners, signals=signals)._train(config)

    def starts(run_dir):
        return [(s.from_step, s.runners, s.environment["commit"]) for s in read_starts(run_dir)]

    config = trunk_config(cell)
    train(config, "a", 1, 2)
    train(config, "b", 3, 4)
    shutil.rmtree(trunk / "checkpoints" / "step-00000004")
    train(config, "c", 1, 5)
    assert starts(trunk) == [(0, 1, "a"), (2, 1, "c")], "what b trained was lost"
    assert branch(trunk, own, 5) == 5
    train(dataclasses.replace(cell.config, run_id=cell.id), "d", 2, 9)
    assert starts(own) == [(0, 1, "a"), (2, 1, "c"), (5, 2, "d")]


def test_checkpoints_are_removed_after_the_record_is_kept(tmp_path, monkeypatch):
    state = state_in(recipe_in(tmp_path), tmp_path / "sweeps")
    cell = state.expand().cells[0]
    for keep in (True, False):
        checkpoints = state.paths.runs / cell.id / "checkpoints"
        checkpoints.mkdir(parents=True, exist_ok=True)
        executor = TrainingExecutor(state.recipe, state.paths, keep_checkpoints=keep)
        monkeypatch.setattr(executor, "run", fake_record)

        def append(record):
            raise OSError("No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(state.store, "append", append)
            run(state, executor)
        assert checkpoints.is_dir(), "of a record that could not be written"
        state.failures.forget(state.failures.ids())
        run(state, executor)
        assert checkpoints.is_dir() is keep
        for path in state.paths.records.glob("*"):
            path.unlink()


def progress(state):
    """What changes while a sweep makes progress: lines of metrics and finished cells."""
    lines = sum(len(p.read_bytes()) for p in state.paths.runs.glob("*/metrics.jsonl"))
    return lines, len(state.store.finished())


def test_what_fails_after_a_signal_is_interrupted(tmp_path, monkeypatch):
    """In training, where the signal is a flag, after the last step, and in between."""
    state = state_in(recipe_in(tmp_path), tmp_path / "sweeps")
    cell = state.expand().cells[0]

    def fail(config, *, command, signals):
        with signals.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            raise RuntimeError("a process that the signal ended first")

    def finish(config, *, command, signals):
        with signals.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
        return SimpleNamespace(fit=SimpleNamespace(interrupted_by=None))

    def between(config, *, command, signals):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal ends what is no training")

    for training in (fail, finish, between):
        monkeypatch.setattr("powertrain.train.run", training)
        with StopSignals() as signals:
            executor = TrainingExecutor(state.recipe, state.paths, signals=signals)
            outcome = run(state, executor)
            # Its repetition changes nothing.
            os.kill(os.getpid(), signal.SIGTERM)
        assert outcome.interrupted_by == signal.SIGTERM
        assert not state.failures.ids()
    assert "a process that the signal ended first" in (state.paths.logs / f"{cell.id}.log").read_text()


def test_a_signal_to_all_processes_of_a_sweep_interrupts_what_runs_and_starts_nothing(tmp_path):
    """As `timeout` and Slurm send it: to the parent, the runners and their data workers at once."""
    path = recipe_in(tmp_path)
    path.write_text(
        path.read_text()
        .replace("num_workers=0", "num_workers=1")
        # Minutes for a cell, many times what a step takes.
        .replace("6.0e+7, 1.2e+8", "6.0e+10, 1.2e+11")
    )
    # Its runners train on the CPU, but the parent wants the GPU that it is told to use.
    parent = "import sys, torch; torch.cuda.device_count = lambda: 1; from powertrain.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", parent, "sweep", "run", str(path), "--directory", str(tmp_path / "sweeps")]
    command += ["--gpus", "0", "--per-gpu", "2", "--quiet"]
    process = subprocess.Popen(command, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    state = state_in(path, tmp_path / "sweeps")
    try:
        deadline = time.monotonic() + 240
        while len(list(state.paths.runs.glob("*/checkpoints/step-*"))) < 2 or len(trained(state)) < 2:
            assert process.poll() is None, (state.paths.logs / "runner-0-0.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    logs = [log.read_text() for log in sorted(state.paths.logs.glob("runner-*.log"))]
    assert [(log.count("start "), log.count("stopped "), log.count("Interrupted.")) for log in logs] == [(1, 1, 1)] * 2
    assert not state.failures.ids()
    assert not list(state.paths.claims.glob("*.claim"))
    assert len(trained(state)) == 2
    for run_dir in trained(state):
        status = json.loads((run_dir / "status.json").read_text())
        assert (status["state"], status["message"]) == ("interrupted", "SIGTERM")
        assert (run_dir / "checkpoints" / f"step-{status['step']:08d}").is_dir()


def trained(state):
    """Return the runs that have made steps."""
    return sorted(path.parent for path in state.paths.runs.glob("*/metrics.jsonl") if path.stat().st_size)

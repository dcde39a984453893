"""A run that was interrupted, killed or damaged continues as if nothing had happened, bit for bit."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NoReturn
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch

from powertrain.training.checkpoint import Checkpoint, CheckpointError
from powertrain.training.config import ScheduleConfig
from powertrain.training.fit import RunLockedError, sole_writer
from powertrain.training.records import read_metrics
from powertrain.training.signals import end_at_once
from tests.forked import Forked
from tests.training.fakes import FakeData, TinyModel, locked_by_another, run_tiny, saved_tensors

NOT_REPRODUCIBLE = ("seconds", "train/tokens_per_second")


def history(run_dir):
    return [{k: v for k, v in record.items() if k not in NOT_REPRODUCIBLE} for record in read_metrics(run_dir)]


def assert_same_run(a, b):
    assert history(a) == history(b)
    mine, theirs = (saved_tensors(run / "checkpoints" / "last") for run in (a, b))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


class Crash(RuntimeError):
    pass


class Do(pl.Callback):
    """Calls `what` at the end of a step, before it could be saved or after it was."""

    def __init__(self, step, what):
        self.step, self.what = step, what

    def on_train_batch_end(self, trainer, pl_module, *_):
        if pl_module.at_step_end and pl_module.step == self.step:
            self.what()


def crash():
    raise Crash


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    directory = tmp_path_factory.mktemp("unbroken")
    for precision in ("32-true", "bf16-mixed"):
        run_tiny(directory / precision, steps=10, precision=precision)
    return directory


def test_an_unbroken_run_records_each_step_once_and_validates_at_the_interval_and_the_end(unbroken):
    records = history(unbroken / "32-true")
    assert [r["step"] for r in records if "train/loss" in r] == list(range(1, 11))
    assert [r["step"] for r in records if "val/loss" in r] == [4, 8, 10]
    assert [r["tokens"] for r in records if "val/loss" in r] == [4 * 256, 8 * 256, 10 * 256]
    losses = [r["train/loss"] for r in records if "train/loss" in r]
    assert losses[-1] < losses[0] - 1
    # Warm-up, plateau and decay of the schedule, as the optimizer had them.
    assert records[0]["train/lr"] == pytest.approx(1e-2)
    assert records[-2]["train/lr"] < 1e-2


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("step", [3, 4, 7])
def test_a_crash_then_the_same_call_equals_the_unbroken_run(tmp_path, unbroken, step, precision):
    with pytest.raises(Crash):
        run_tiny(tmp_path / "run", steps=10, precision=precision, callbacks=[Do(step, crash)])
    assert history(tmp_path / "run")[-1]["step"] == step
    torch.rand(7)  # the state of the generators at the restart must not matter
    result = run_tiny(tmp_path / "run", steps=10, precision=precision)
    assert result.resumed_step == {3: 2, 4: 2, 7: 6}[step]
    assert result.finished
    assert_same_run(tmp_path / "run", unbroken / precision)


def test_kill_nine_then_the_same_call_equals_the_unbroken_run(tmp_path, unbroken):
    code = (
        "import os, signal, sys, torch; from pathlib import Path; torch.set_num_threads(1);"
        "from tests.training.fakes import run_tiny; from tests.training.test_resume import Do;"
        "run_tiny(Path(sys.argv[1]), steps=10, callbacks=[Do(7, lambda: os.kill(os.getpid(), signal.SIGKILL))])"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], env=environment, timeout=240)
    assert done.returncode == -signal.SIGKILL
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "train/lo')
    result = run_tiny(tmp_path / "run", steps=10)
    # The save of step 6 was in flight.
    assert result.resumed_step in (4, 6)
    assert_same_run(tmp_path / "run", unbroken / "32-true")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [4, 5])
def test_a_signal_saves_after_the_step_and_says_so(tmp_path, unbroken, signum, step, capfd):
    handler = signal.getsignal(signum)
    result = run_tiny(tmp_path / "run", steps=10, callbacks=[Do(step, lambda: os.kill(os.getpid(), signum))])
    assert result.interrupted_by == signum
    assert not result.finished
    # At once, to whoever waits at a terminal.
    assert ("stopping after this step" in capfd.readouterr().err) is (signum == signal.SIGINT)
    # The step in which the signal came, or the next, where the callback ran after the check.
    assert result.counters.step in (step, step + 1)
    assert result.checkpoint is not None
    assert result.checkpoint.name == f"step-{result.counters.step:08d}"
    assert signal.getsignal(signum) is handler
    again = run_tiny(tmp_path / "run", steps=10)
    assert again.resumed_step == result.counters.step
    assert_same_run(tmp_path / "run", unbroken / "32-true")


def interrupt_twice() -> int:
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    torch.set_num_threads(1)
    run_tiny(Path(sys.argv[1]), steps=10, callbacks=[Do(2, twice)])
    return 0


def test_a_second_signal_ends_at_once_with_one_line(tmp_path):
    process = Forked(interrupt_twice, [str(tmp_path / "run")], os.environ, tmp_path / "errors")
    assert process.wait(240) == 130
    *_, last = said = (tmp_path / "errors").read_text().splitlines()
    assert last == "powertrain: ended at once; what was saved before is kept"
    assert "powertrain: stopping after this step, and saving; Ctrl-C again ends it at once" in said
    assert not any("Traceback" in line for line in said)
    assert run_tiny(tmp_path / "run", steps=10).finished


def end_with_children_unknown() -> NoReturn:
    with mock.patch("multiprocessing.active_children", side_effect=RuntimeError):
        end_at_once()


def test_nothing_keeps_a_process_from_ending_at_once(tmp_path):
    process = Forked(end_with_children_unknown, [], os.environ, tmp_path / "errors")
    assert process.wait(60) == 130
    assert "Traceback" not in (tmp_path / "errors").read_text()


def test_a_damaged_checkpoint_costs_only_the_steps_since_the_one_before(tmp_path, unbroken):
    with pytest.raises(Crash):
        run_tiny(tmp_path / "run", steps=10, callbacks=[Do(7, crash)])
    newest = tmp_path / "run" / "checkpoints" / "step-00000006" / "rank-00000.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="falling back to step 4"):
        result = run_tiny(tmp_path / "run", steps=10)
    assert result.resumed_step == 4
    assert_same_run(tmp_path / "run", unbroken / "32-true")
    assert (tmp_path / "run" / "checkpoints" / "damaged-step-00000006").is_dir()


def test_a_finished_run_is_left_alone(tmp_path):
    run_tiny(tmp_path / "run", steps=4)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    result = run_tiny(tmp_path / "run", steps=4)
    assert result.finished
    assert result.resumed_step == 4
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_longer_budget_continues_a_finished_run(tmp_path):
    constant = ScheduleConfig(kind="constant", warmup=2, unit="steps")
    run_tiny(tmp_path / "run", steps=4, schedule=constant)
    result = run_tiny(tmp_path / "run", steps=8, schedule=constant)
    assert result.resumed_step == 4
    run_tiny(tmp_path / "whole", steps=8, schedule=constant)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_checkpoint_holds_what_is_promised(unbroken):
    saved = Checkpoint(unbroken / "32-true" / "checkpoints" / "last")
    names = set(TinyModel().state_dict())
    moments = {f"optimizer.{key}.{name}" for key in ("exp_avg", "exp_avg_sq", "step") for name in names}
    assert set(saved.shapes) == {f"model.{name}" for name in names} | moments
    assert set(saved.values) == {"counters", "data", "config"}
    assert saved.step == saved.values["counters"]["step"] == 10
    assert saved.values["data"] == {"consumed_samples": 40}
    assert saved.values["config"] == {"seed": 0}
    assert set(saved.rng(0)) >= {"python", "numpy", "torch"}
    assert saved.rng(1) is None
    best = Checkpoint(unbroken / "32-true" / "checkpoints" / "best")
    values = {r["step"]: r["val/loss"] for r in history(unbroken / "32-true") if "val/loss" in r}
    assert best.step == min(values, key=values.get)


def test_another_model_is_refused_in_one_sentence(tmp_path):
    run_tiny(tmp_path / "run", steps=2)
    with pytest.raises(CheckpointError, match=r"of another model: size mismatch for model\.embedding"):
        run_tiny(tmp_path / "run", steps=4, model=TinyModel(d_model=16))


def test_a_full_disk_stops_with_one_message_and_the_run_can_continue(tmp_path, unbroken, monkeypatch):
    import shutil

    def full(path):
        free = 0 if (tmp_path / "run/checkpoints/step-00000004").exists() else 10**9
        return type("Usage", (), {"free": free})()

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", full)
        with pytest.raises(CheckpointError, match=r"step 6 .* the disk is full .* the checkpoint of step 4 is intact"):
            run_tiny(tmp_path / "run", steps=10)
    assert run_tiny(tmp_path / "run", steps=10).resumed_step == 4
    assert_same_run(tmp_path / "run", unbroken / "32-true")


def test_two_processes_do_not_train_one_run(tmp_path):
    with (
        locked_by_another(tmp_path),
        pytest.raises(RunLockedError, match=r"by another process \(process 9 on elsewhere"),
    ):
        run_tiny(tmp_path, steps=1)
    run_tiny(tmp_path, steps=1)


def test_a_process_that_holds_the_lock_goes_on_holding_it(tmp_path):
    with sole_writer(tmp_path):
        run_tiny(tmp_path, steps=1)
        with (tmp_path / ".lock").open() as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with locked_by_another(tmp_path):
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_trains_with_one_warning(tmp_path, monkeypatch, number):
    def fails(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fails)
    said = "has no locks: only the heartbeat"
    with pytest.warns(UserWarning, match=said) as warned, sole_writer(tmp_path), sole_writer(tmp_path):
        pass
    assert len(warned) == 1


def test_children_of_a_killed_run_do_not_hold_its_lock(tmp_path):
    """As data workers that have not yet seen that their parent is gone."""
    script = f"""
import os, signal, time
from pathlib import Path
from powertrain.training.fit import sole_writer
with sole_writer(Path({str(tmp_path)!r})):
    if os.fork() == 0:
        os.setsid()
        print(os.getpid(), flush=True)
        time.sleep(60)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        try:
            with pytest.raises(RunLockedError), sole_writer(tmp_path):
                pass
            process.kill()
            process.wait()
            with sole_writer(tmp_path):
                os.kill(child, 0)  # is still there
        finally:
            os.kill(child, signal.SIGKILL)


def test_compiled_runs_keep_the_models_own_keys_and_resume_uncompiled(tmp_path, monkeypatch):
    original = torch.compile
    calls = []

    def compile_eagerly(function):
        calls.append(function)
        return original(function, backend="eager")

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    run_tiny(tmp_path / "run", steps=2, compile=True, model=TinyModel(dropout=0.0))
    assert len(calls) == 2
    saved = Checkpoint(tmp_path / "run" / "checkpoints" / "last").shapes
    assert {name for name in saved if name.startswith("model.")} == {f"model.{n}" for n in TinyModel().state_dict()}
    assert run_tiny(tmp_path / "run", steps=4, model=TinyModel(dropout=0.0)).resumed_step == 2


def test_the_position_in_the_data_is_that_of_the_steps(tmp_path):
    seen = []

    class Watched(FakeData):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            if self.trainer.training:
                seen.append(batch["input_ids"].clone())
            return batch

    with pytest.raises(Crash):
        run_tiny(tmp_path / "run", steps=6, data=Watched(), callbacks=[Do(5, crash)])
    first, seen = seen, []
    run_tiny(tmp_path / "run", steps=6, data=Watched())
    from tests.training.fakes import make_batch

    assert len(first) == 10
    assert len(seen) == 4
    for number, batch in enumerate(seen):
        assert torch.equal(batch, make_batch(4 * 4 + 2 * number, 2)["input_ids"])


def test_records_are_lines_of_json(unbroken):
    for line in (unbroken / "32-true" / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert {"step", "tokens", "flops", "seconds"} <= set(record)

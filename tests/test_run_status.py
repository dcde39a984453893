import json
import os
import subprocess
import sys
import time

import pytest

from powertrain import run_status
from powertrain.run_status import (
    LOST_AFTER_SECONDS,
    RunBusyError,
    RunStatus,
    StatusReport,
    check_free,
    read_status,
    write_status,
)

HERE = os.uname().nodename


def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_block_that_ends_well_is_a_finished_run(tmp_path):
    before = time.time()
    with StatusReport(tmp_path, job_id="7") as report:
        status = read_status(tmp_path)
        assert (status.state, status.host, status.pid, status.job_id) == ("running", HERE, os.getpid(), "7")
        assert before <= status.started <= status.updated <= time.time()
        report.update(step=3, total_steps=9, loss=2.5, val_loss=2.25)
    status = read_status(tmp_path)
    assert (status.state, status.step, status.total_steps) == ("finished", 3, 9)
    assert (status.loss, status.val_loss, status.message) == (2.5, 2.25, None)
    assert [p.name for p in tmp_path.iterdir()] == ["status.json"]


@pytest.mark.parametrize(
    ("error", "state", "message"),
    [
        (ValueError("a\n  b"), "failed", "ValueError: a b"),
        (SystemExit(), "failed", "SystemExit"),
        (KeyboardInterrupt(), "interrupted", "Ctrl-C"),
        (KeyboardInterrupt("SIGUSR1"), "interrupted", "SIGUSR1"),
    ],
)
def test_how_a_block_ended_is_said(tmp_path, error, state, message):
    with pytest.raises(type(error)), StatusReport(tmp_path):
        raise error
    status = read_status(tmp_path)
    assert (status.state, status.message) == (state, message)


def test_an_interruption_on_purpose_is_no_failure(tmp_path):
    with StatusReport(tmp_path) as report:
        report.interrupted("SIGUSR1")
    assert (read_status(tmp_path).state, read_status(tmp_path).message) == ("interrupted", "SIGUSR1")


def test_a_process_that_ends_inside_its_block_can_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(run_status, "HEARTBEAT_SECONDS", 0.01)
    code = (
        "import os, sys; from powertrain.run_status import StatusReport\n"
        "with StatusReport(sys.argv[1]) as report: report.failed('hang: here'); os._exit(70)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == 70
    assert (read_status(tmp_path).state, read_status(tmp_path).message) == ("failed", "hang: here")


def test_progress_reaches_the_file_with_the_heartbeat(tmp_path, monkeypatch):
    monkeypatch.setattr(run_status, "HEARTBEAT_SECONDS", 0.01)
    with StatusReport(tmp_path) as report:
        report.update(step=1, total_steps=2)
        deadline = time.monotonic() + 10
        while read_status(tmp_path).step == 0:
            assert time.monotonic() < deadline
        first = read_status(tmp_path).updated
        while read_status(tmp_path).updated == first:
            assert time.monotonic() < deadline


def test_what_an_earlier_attempt_has_seen_stays_until_there_is_news(tmp_path):
    with StatusReport(tmp_path) as report:
        report.update(step=5, total_steps=9, loss=2.0, val_loss=3.0)
    with StatusReport(tmp_path) as report:
        assert (read_status(tmp_path).step, read_status(tmp_path).loss) == (5, 2.0)
        report.update(step=4, total_steps=9)
    status = read_status(tmp_path)
    assert (status.step, status.loss, status.val_loss) == (4, 2.0, 3.0)


def test_other_ranks_write_nothing(tmp_path):
    with StatusReport(tmp_path, enabled=False) as report:
        report.update(step=1, total_steps=2)
    assert not list(tmp_path.iterdir())


def test_a_loss_that_json_cannot_hold_is_left_out(tmp_path):
    write_status(tmp_path, RunStatus("running", loss=float("nan"), val_loss=float("inf")))
    values = json.loads((tmp_path / "status.json").read_text(), parse_constant=pytest.fail)
    assert (values["loss"], values["val_loss"]) == (None, None)


def test_a_status_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_status, "write_status", full)
    with pytest.warns(UserWarning, match="No space left on device") as warned, StatusReport(tmp_path):
        pass
    assert len(warned) == 1


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "{}", '{"state": "dancing"}'])
def test_an_unreadable_status_is_none(tmp_path, text):
    (tmp_path / "status.json").write_text(text)
    assert read_status(tmp_path) is None


def test_a_status_of_a_later_version_is_read(tmp_path):
    (tmp_path / "status.json").write_text('{"state": "running", "step": 3, "mood": "good"}')
    assert read_status(tmp_path).step == 3


def test_who_is_lost():
    now = time.time()
    assert not RunStatus("running", host=HERE, pid=os.getpid(), updated=now).is_lost()
    assert RunStatus("running", host=HERE, pid=dead_pid(), updated=now).is_lost()
    assert not RunStatus("running", host="elsewhere", pid=dead_pid(), updated=now).is_lost()
    assert RunStatus("running", host="elsewhere", pid=1, updated=now).is_lost(now + LOST_AFTER_SECONDS + 1)
    assert not RunStatus("finished", host=HERE, pid=dead_pid(), updated=0).is_lost()


def test_a_run_in_work_is_not_free_but_for_the_next_attempt_of_its_job(tmp_path):
    check_free(tmp_path)
    write_status(tmp_path, RunStatus("running", job_id="7", host="elsewhere", pid=9, updated=time.time()))
    with pytest.raises(RunBusyError, match=r"by process 9 on elsewhere \(job 7\)"):
        check_free(tmp_path)
    with pytest.raises(RunBusyError), StatusReport(tmp_path, job_id="8"):
        pass
    assert read_status(tmp_path).pid == 9
    check_free(tmp_path, "7")
    write_status(tmp_path, RunStatus("running", host=HERE, pid=dead_pid(), updated=time.time()))
    check_free(tmp_path)


def test_a_killed_process_leaves_a_run_that_is_lost(tmp_path):
    code = (
        "import os, sys, signal; from powertrain.run_status import StatusReport\n"
        "with StatusReport(sys.argv[1]): os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)])
    status = read_status(tmp_path)
    assert status.state == "running"
    assert status.is_lost()

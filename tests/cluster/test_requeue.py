import itertools
import json
import signal
import time

import pytest

from powertrain.cli import main as powertrain
from powertrain.cluster.queue import SlurmError
from powertrain.cluster.requeue import MAX_FRUITLESS_ATTEMPTS, UNANSWERED_FILE, main, requeue
from powertrain.run_status import RunStatus, write_status
from powertrain.scaling.run import Outcome


@pytest.fixture
def in_job(monkeypatch, stub):
    """Return a function that makes this process one of a job in a state, and returns the calls of scontrol."""

    def enter(state, reason="None", preempted=None, restarts=0):
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "5")
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
        return stub(
            "scontrol", f"JobId=7 JobState={state} Reason={reason} Restarts={restarts} PreemptTime={preempted}\n"
        )

    return enter


def requeued(calls):
    return [c["argv"] for c in map(json.loads, calls.read_text().splitlines()) if c["argv"][0] == "requeue"]


@pytest.mark.parametrize(
    ("signum", "state", "reason", "preempted"),
    [
        (signal.SIGUSR1, "RUNNING", "None", None),
        (signal.SIGUSR2, "RUNNING", "None", None),
        (signal.SIGUSR1, "COMPLETING", "TimeLimit", None),
        (signal.SIGTERM, "COMPLETING", "TimeLimit", None),
        (signal.SIGTERM, "TIMEOUT", "TimeLimit", None),
        (signal.SIGTERM, "RUNNING", "None", "2026-01-01T00:00:00"),
    ],
)
def test_a_job_that_would_be_gone_is_queued_again_by_the_id_of_its_task(
    in_job, tmp_path, signum, state, reason, preempted
):
    calls = in_job(state, reason, preempted)
    answer = requeue(tmp_path, signum)
    assert answer == (True, "job 5_2 is queued again and will continue from what is saved")
    assert requeued(calls) == [["requeue", "5_2"]]


@pytest.mark.parametrize(
    ("signum", "state"),
    [
        # srun ends the others of a process that failed.
        (signal.SIGTERM, "RUNNING"),
        (signal.SIGTERM, "COMPLETING"),
        (signal.SIGUSR1, "COMPLETING"),
        (signal.SIGTERM, "CANCELLED"),
        (signal.SIGTERM, "PENDING"),
        (signal.SIGTERM, "PREEMPTED"),
    ],
)
def test_a_job_that_failed_is_cancelled_or_queued_already_is_left_alone(in_job, tmp_path, signum, state):
    calls = in_job(state)
    assert requeue(tmp_path, signum) == (False, f"job 5_2 is {state}: no other attempt is asked for")
    assert requeued(calls) == []


@pytest.mark.parametrize(
    ("restarts", "before", "signum"),
    [
        # The one that asked was ended with the job before it heard; Slurm preempted it, or lost a machine.
        (1, None, signal.SIGUSR1),
        (1, None, signal.SIGTERM),
        (4, "3", signal.SIGTERM),
    ],
)
def test_a_job_that_slurm_has_queued_again_is_said_to_be(in_job, tmp_path, monkeypatch, restarts, before, signum):
    if before is not None:
        monkeypatch.setenv("SLURM_RESTART_COUNT", before)
    calls = in_job("COMPLETING", restarts=restarts)
    assert requeue(tmp_path, signum) == (True, "job 5_2 is queued again and will continue from what is saved")
    assert requeued(calls) == []


def test_a_job_that_is_cancelled_while_it_asks_is_not_said_to_be_queued_again(flaky, tmp_path):
    (tmp_path / "stubs" / "scontrol").write_text(CANCELLED_MEANWHILE.format(directory=tmp_path))
    answer = requeue(tmp_path, signal.SIGUSR1)
    assert answer == (False, "job 5_2 is COMPLETING: no other attempt is asked for")


@pytest.fixture
def attempt(tmp_path, monkeypatch):
    """Return a function that ends the next attempt of the job with a checkpoint of this step as the newest."""
    number = itertools.count()

    def end(saved):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(next(number)))
        last = tmp_path / "checkpoints" / "last"
        last.parent.mkdir(exist_ok=True)
        last.unlink(missing_ok=True)
        if saved:
            last.symlink_to(f"step-{saved:08d}")
        return requeue(tmp_path, signal.SIGUSR1).queued

    return end


def test_attempts_that_save_nothing_new_end_after_some(in_job, attempt):
    calls = in_job("RUNNING")
    assert all(attempt(4) for _ in range(MAX_FRUITLESS_ATTEMPTS))
    message = f"each of its last {MAX_FRUITLESS_ATTEMPTS} attempts ended with no later step saved than when the one"
    with pytest.raises(SlurmError, match=rf"{message} before it ended \(now step 4\)"):
        attempt(4)
    assert len(requeued(calls)) == MAX_FRUITLESS_ATTEMPTS
    # Progress makes good for all of them.
    assert all(attempt(5) for _ in range(MAX_FRUITLESS_ATTEMPTS))
    with pytest.raises(SlurmError):
        attempt(5)


def test_attempts_that_save_nothing_at_all_count_from_the_first(in_job, attempt):
    in_job("RUNNING")
    assert all(attempt(None) for _ in range(MAX_FRUITLESS_ATTEMPTS - 1))
    with pytest.raises(SlurmError, match="now step 0"):
        attempt(None)


def test_a_run_that_was_set_back_is_judged_by_what_it_gains_from_there(in_job, attempt):
    in_job("RUNNING")
    assert all(attempt(saved) for saved in (10000, 5200, 5400, 5600, 5800, 6000))


def test_steps_that_were_made_and_never_saved_are_no_progress(in_job, attempt, tmp_path):
    in_job("RUNNING")
    for step in (60, 70, 80):
        write_status(tmp_path, RunStatus("running", step=step))
        assert attempt(50)
    write_status(tmp_path, RunStatus("running", step=90))
    with pytest.raises(SlurmError, match="now step 50"):
        attempt(50)


def test_an_attempt_that_asks_often_counts_once(in_job, attempt, tmp_path):
    in_job("RUNNING")
    assert attempt(4)
    assert attempt(4)
    assert all(requeue(tmp_path, signal.SIGUSR1).queued for _ in range(2 * MAX_FRUITLESS_ATTEMPTS))


def test_a_job_submitted_anew_begins_anew(in_job, attempt, monkeypatch):
    in_job("RUNNING")
    assert all(attempt(4) for _ in range(MAX_FRUITLESS_ATTEMPTS))
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "6")
    assert all(attempt(4) for _ in range(MAX_FRUITLESS_ATTEMPTS))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"job": "5_2", "restarts": 0, "saved": null, "fruitless": 9}'])
def test_a_damaged_record_of_attempts_begins_anew(in_job, attempt, tmp_path, content):
    in_job("RUNNING")
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "attempts.json").write_text(content)
    assert attempt(None)
    record = json.loads((tmp_path / "slurm" / "attempts.json").read_text())
    assert record == {"job": "5_2", "restarts": 0, "saved": 0, "fruitless": 1}


def test_a_record_that_cannot_be_written_stops_no_run(in_job, attempt, tmp_path):
    in_job("RUNNING")
    (tmp_path / "slurm").touch()
    assert attempt(4)


@pytest.fixture
def signal_seconds(tmp_path):
    """Return a function that writes a configuration into the run directory."""
    return lambda value: (tmp_path / "config.yaml").write_text(f"cluster: {{signal_seconds: {value}}}\n")


def test_the_batch_script_gets_a_sentence_and_a_code(in_job, tmp_path, capsys, stub, signal_seconds):
    in_job("COMPLETING", "TimeLimit")
    assert main([str(tmp_path)]) == 0
    signal_seconds(0)
    stub("scontrol", code=1, error="slurm_load_jobs error: Unable to contact slurm controller")
    assert main([str(tmp_path)]) == 1
    assert "Unable to contact slurm controller" in capsys.readouterr().err


CANCELLED_MEANWHILE = """\
#!/bin/sh
if [ "$1" = requeue ]; then touch {directory}/asked; echo "Socket timed out" >&2; exit 1; fi
[ -e {directory}/asked ] && state=COMPLETING || state=RUNNING
echo "JobState=$state Reason=None Restarts=0 PreemptTime=None"
"""
FLAKY = """\
#!/bin/sh
echo "$1 $2" >> {directory}/asked
if [ "$(wc -l < {directory}/asked)" -le {failures} ]; then
  echo "Socket timed out on send/recv operation" >&2
  exit 1
fi
echo "JobState=RUNNING Reason=None PreemptTime=None"
"""


@pytest.fixture
def flaky(in_job, tmp_path, monkeypatch):
    """Return a function that makes scontrol fail so many times, and one that lists what it was asked."""
    in_job("RUNNING")
    monkeypatch.setattr("powertrain.cluster.queue.FIRST_PAUSE_SECONDS", 0.01)

    def put(failures):
        (tmp_path / "stubs" / "scontrol").write_text(FLAKY.format(directory=tmp_path, failures=failures))

    return put, lambda: [line.split()[0] for line in (tmp_path / "asked").read_text().splitlines()]


def test_a_controller_that_does_not_answer_at_first_is_asked_again(flaky, tmp_path):
    put, asked = flaky
    put(failures=2)
    assert requeue(tmp_path, signal.SIGUSR1).queued
    assert asked() == ["--oneliner", "--oneliner", "--oneliner", "requeue"]
    assert not (tmp_path / "slurm" / UNANSWERED_FILE).exists()


def test_where_it_never_answers_the_batch_script_asks_again_for_the_same_signal(
    flaky, tmp_path, capsys, signal_seconds
):
    put, asked = flaky
    signal_seconds(1)
    put(failures=1000)
    started = time.monotonic()
    with pytest.raises(SlurmError, match=r"is not queued again, since Slurm gave no answer for 1 s .*Socket timed out"):
        requeue(tmp_path, signal.SIGUSR1)
    assert time.monotonic() - started > 0.7
    assert len(asked()) > 2
    put(failures=0)
    # Of a running job TERM alone, which the script would otherwise stand for, is no reason to queue it again.
    assert main([str(tmp_path)]) == 0
    assert "is queued again and will continue" in capsys.readouterr().err
    assert asked()[-1] == "requeue"


def test_what_slurm_refuses_is_not_asked_again(in_job, stub, tmp_path):
    in_job("RUNNING")
    calls = stub("scontrol", code=1, error="Requested operation is presently disabled for job 7")
    with pytest.raises(SlurmError, match="presently disabled"):
        requeue(tmp_path, signal.SIGUSR1)
    assert len(calls.read_text().splitlines()) == 1
    assert not (tmp_path / "slurm" / UNANSWERED_FILE).exists()


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """Return a function that has a signal end a runner of a sweep, and returns the exit code."""

    def end(signum, seconds=300):
        monkeypatch.setattr("powertrain.scaling.cli._run_cells", lambda *_: Outcome(interrupted_by=signum))
        command = ["sweep", "run", "smoke", "--directory", str(tmp_path), "--quiet", "--requeue", str(seconds)]
        return powertrain(command)

    return end


@pytest.mark.parametrize(
    ("signum", "preempted", "again"),
    [
        (signal.SIGUSR1, None, True),
        (signal.SIGTERM, "2026-01-01T00:00:00", True),
        (signal.SIGTERM, None, False),
        (signal.SIGINT, None, False),
    ],
)
def test_a_runner_of_a_sweep_is_queued_again_as_a_run_is(in_job, sweep, signum, preempted, again):
    calls = in_job("RUNNING", preempted=preempted)
    assert sweep(signum) == 128 + signum
    assert (calls.exists() and requeued(calls) == [["requeue", "5_2"]]) is again


def test_a_runner_of_a_sweep_asks_a_controller_that_does_not_answer_again(flaky, sweep, capsys):
    put, asked = flaky
    put(failures=2)
    assert sweep(signal.SIGUSR1) == 128 + signal.SIGUSR1
    assert asked() == ["--oneliner", "--oneliner", "--oneliner", "requeue"]
    put(failures=1000)
    assert sweep(signal.SIGUSR1, seconds=1) == 1
    printed = capsys.readouterr()
    assert "the same command continues" in printed.out
    assert printed.err.startswith("powertrain sweep: job 5_2 is not queued again, since Slurm gave no answer for 1 s (")
    assert len(printed.err.splitlines()) == 1

import json
import os
import subprocess
import sys
import time

import pytest

from powertrain.cli import main
from powertrain.cluster.queue import QueuedJob
from powertrain.run_status import RunStatus, write_status
from powertrain.runs import run_state

HERE = os.uname().nodename


def make_run(directory, name, status=None, job_id=None):
    run_dir = directory / name
    (run_dir / "slurm").mkdir(parents=True)
    (run_dir / "config.yaml").touch()
    if status is not None:
        write_status(run_dir, status)
    if job_id is not None:
        (run_dir / "slurm" / "job.json").write_text(json.dumps({"job_id": job_id}))
    return run_dir


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """Return a function that sets what squeue prints."""
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    monkeypatch.setenv("PATH", str(bin_dir), prepend=os.pathsep)

    def put(text, code=0):
        path = bin_dir / "squeue"
        path.write_text(f"#!/bin/sh\nprintf '{text}'\nexit {code}\n")
        path.chmod(0o755)

    return put


@pytest.mark.parametrize(
    ("status", "job_id", "job_state", "state"),
    [
        (None, None, None, "lost"),
        (None, "7", "PENDING", "pending"),
        (None, "7", "CONFIGURING", "starting"),
        (None, "7", "RUNNING", "starting"),
        (None, "7", "COMPLETING", "failed"),
        (None, "7", None, "failed"),
        ("running", "7", "RUNNING", "running"),
        ("running", None, None, "running"),
        ("finished", "7", "RUNNING", "finished"),
        ("finished", "7", None, "finished"),
        ("failed", "7", "COMPLETING", "failed"),
        # It asks Slurm for another attempt, and waits for it.
        ("interrupted", "7", "RUNNING", "interrupted"),
        ("interrupted", "7", "COMPLETING", "interrupted"),
        ("interrupted", "7", "PENDING", "pending"),
        ("interrupted", "7", "REQUEUED", "pending"),
        ("interrupted", "7", None, "interrupted"),
        # Submitted again: what the job before said is over.
        ("failed", "8", "PENDING", "pending"),
        ("failed", "8", "RUNNING", "starting"),
    ],
)
def test_the_state_is_what_the_run_says_corrected_by_the_queue(status, job_id, job_state, state):
    own = RunStatus(status, job_id="7", host=HERE, pid=os.getpid(), updated=time.time()) if status else None
    job = QueuedJob(job_state, time.time() - 100) if job_state else None
    assert run_state(own, job_id, job)[0] == state


@pytest.mark.parametrize("status", ["running", "interrupted", "failed"])
def test_what_the_attempt_before_said_is_over_when_the_job_starts_again(status):
    """`running` is what it says for ever where its machine has failed."""
    now = time.time()
    own = RunStatus(status, job_id="7", host="dead-node", pid=1, updated=now - 120)
    assert run_state(own, "7", QueuedJob("RUNNING", now - 90)) == ("starting", None)
    assert run_state(own, "7", QueuedJob("RUNNING", now - 3600))[0] == ("lost" if status == "running" else status)


def test_the_table_shows_state_progress_loss_and_job(tmp_path, queue, capsys):
    runs = tmp_path / "runs"
    now = time.time()
    make_run(
        runs,
        "a",
        RunStatus(
            "running", step=30, total_steps=120, loss=2.5, val_loss=2.625, job_id="7", host="n1", updated=now - 5
        ),
        "7",
    )
    make_run(runs, "b", RunStatus("failed", step=2, host="n2", updated=now - 7200, message="ValueError: x"))
    make_run(runs, "c", job_id="9_1")
    (runs / "no-run").mkdir()
    queue(f"7|RUNNING|{now - 60:.0f}\\n9_1|PENDING|N/A\\n")
    assert main(["runs", str(runs)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        ["run", "state", "step", "loss", "val", "loss", "job", "host", "updated"],
        ["c", "pending", "9_1"],
        ["a", "running", "30/120", "25%", "2.5000", "2.6250", "7", "n1", "5s", "ago"],
        ["b", "failed", "2", "n2", "2h", "ago", "ValueError:", "x"],
    ]


def test_rows_as_json(tmp_path, capsys):
    make_run(tmp_path, "a", RunStatus("finished", step=4, total_steps=4, loss=1.5, updated=3.0))
    assert main(["runs", str(tmp_path), "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["run"], row["state"], row["step"], row["loss"], row["updated"]) == ("a", "finished", 4, 1.5, 3.0)


def test_a_queue_that_does_not_answer_leaves_what_the_runs_say(tmp_path, queue, capsys):
    runs = tmp_path / "runs"
    make_run(runs, "a", RunStatus("interrupted", job_id="7", updated=1.0, message="SIGUSR1"), "7")
    queue("", code=1)
    assert main(["runs", str(runs)]) == 0
    printed = capsys.readouterr()
    assert "squeue --noheader failed" in printed.err
    assert "interrupted" in printed.out


def test_local_runs_ask_no_queue(tmp_path, queue, capsys):
    runs = tmp_path / "runs"
    make_run(runs, "a", RunStatus("interrupted", updated=1.0))
    queue("", code=1)
    assert main(["runs", str(runs)]) == 0
    assert capsys.readouterr().err == ""


def test_a_directory_without_runs_and_none_at_all(tmp_path, capsys):
    assert main(["runs", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"no runs in {tmp_path}\n"
    assert main(["runs", str(tmp_path / "absent")]) == 2
    assert "is not a directory; give the one that paths.runs named" in capsys.readouterr().err


def test_the_table_comes_without_heavy_imports(tmp_path):
    probe = (
        f"import sys; from powertrain.cli import main; main(['runs', {str(tmp_path)!r}])\n"
        "sys.exit(any(m in sys.modules for m in ('torch', 'lightning', 'hydra', 'wandb')))"
    )
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True).returncode == 0

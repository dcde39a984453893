"""Signals while a run starts: whatever its ranks are doing, they end together and the job is queued again."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from powertrain.run_status import read_status
from tests.forked import Forked
from tests.training import paused_train
from tests.training.test_launch import OPTIONS, complaints, corpus  # noqa: F401  `corpus` is a fixture, which the tests below name ...


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


class Start:
    """A run on two processes of a Slurm job, the second of which pauses at a place of its start-up."""

    def __init__(self, place: str, corpus: Path, directory: Path) -> None:  # noqa: F811  ... as a parameter
        self.directory = directory / place
        self.directory.mkdir()
        environment = {
            **os.environ,
            **{"OMP_NUM_THREADS": "1", "SLURM_JOB_ID": "7"},
            **{"WORLD_SIZE": "2", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()},
        }
        paths = [f"data.files={corpus}/*.py", f"paths.cache={corpus / 'cache'}", f"paths.runs={self.directory}"]
        options = [*OPTIONS, *paths, "run_id=run", "trainer.max_steps=100000"]
        self.errors = [self.directory / f"rank-{rank}.err" for rank in range(2)]
        self.ranks = [
            Forked(
                paused_train.main,
                [f"{place}:1", str(self.directory), *options],
                {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                errors,
            )
            for rank, errors in enumerate(self.errors)
        ]

    def wait_until_paused(self) -> None:
        """Wait until the second process pauses and the first has begun its run."""
        deadline = time.monotonic() + 240
        while not ((self.directory / "paused").exists() and read_status(self.directory / "run")):
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def interrupt(self, signum: int, *ranks: int) -> None:
        for rank in ranks:
            self.ranks[rank].send_signal(signum)

    def go(self) -> None:
        """End the pause."""
        (self.directory / "go").touch()

    def ends(self) -> list[tuple[int, list[str]]]:
        try:
            codes = [process.wait(60) for process in self.ranks]
            return [(code, complaints(path.read_text())) for code, path in zip(codes, self.errors, strict=True)]
        finally:
            for process in self.ranks:
                process.send_signal(signal.SIGKILL)


@pytest.mark.slow
def test_a_signal_while_a_rank_is_late_queues_the_job_again(corpus, tmp_path, stub):  # noqa: F811  the same
    calls = stub("scontrol", "JobId=7 JobState=RUNNING Reason=None PreemptTime=2026-01-01T00:00:00\n")
    # One at a time would take four times as long.
    starts = {place: Start(place, corpus, tmp_path) for place in ("data", "meeting", "restore", "train_start")}
    for start in starts.values():
        start.wait_until_paused()
    time.sleep(2)  # until the first waits for the second
    starts["data"].interrupt(signal.SIGUSR1, 0, 1)
    starts["meeting"].interrupt(signal.SIGTERM, 0, 1)
    # All learn of a signal to one.
    starts["restore"].interrupt(signal.SIGUSR1, 1)
    starts["train_start"].interrupt(signal.SIGTERM, 1)
    time.sleep(0.5)
    for start in starts.values():
        start.go()
    for place, start in starts.items():
        assert start.ends() == [(0, []), (0, [])], place
        assert read_status(start.directory / "run").state == "interrupted", place
    requeued = [c["argv"] for c in map(json.loads, calls.read_text().splitlines()) if c["argv"][0] == "requeue"]
    assert requeued == [["requeue", "7"]] * len(starts)


# Sends itself the signal as it begins to import the first argument, which it tells by a line.
SIGNALLED = """\
import os, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            print("signalled", flush=True)
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGUSR1)

sys.meta_path.insert(0, Finder())
from powertrain.cli import main
sys.exit(main(sys.argv[2:]))
"""


# An exception in the midst of numpy's own imports is lost in those of torch, and leaves half a numpy.
@pytest.mark.parametrize(
    "module", ["numpy.lib", "numpy.linalg", "lightning.pytorch.trainer", "powertrain.data.datamodule"]
)
def test_a_signal_in_the_midst_of_an_import_is_not_lost(corpus, tmp_path, stub, module):  # noqa: F811
    calls = stub("scontrol", "JobState=RUNNING Reason=None Restarts=0 PreemptTime=None\n")
    options = [*OPTIONS, f"data.files={corpus}/*.py", f"paths.cache={corpus / 'cache'}", f"paths.runs={tmp_path}"]
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED, module, "train", *options, "trainer.devices=1", "run_id=run"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "SLURM_JOB_ID": "7"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    said = done.stdout.splitlines()
    assert said[0] == "signalled", done.stderr
    assert said[-1] == "job 7 is queued again and will continue from what is saved", done.stderr
    assert done.returncode == 0
    assert [json.loads(line)["argv"][0] for line in calls.read_text().splitlines()] == ["--oneliner", "requeue"]

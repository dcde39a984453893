"""Processes of `tests.forked` are as new interpreters are."""

import multiprocessing
import os
import signal
import subprocess
import sys

from tests import forked


def _killed_with_a_lock() -> int:
    lock = multiprocessing.RLock()
    with lock:
        os.kill(os.getpid(), signal.SIGKILL)
    return 0


def _kill_one() -> None:
    """Of an interpreter whose end, with that of its server and tracker, can be waited for."""
    # The server need not hold all that a training imports; its type has that many entries.
    forked.PRELOAD = ()  # type: ignore[assignment]
    killed = forked.Forked(_killed_with_a_lock, [], dict(os.environ))
    assert killed.wait(60) == -signal.SIGKILL


def test_a_killed_process_leaves_no_lock_behind():
    command = [sys.executable, "-c", "from tests.test_forked import _kill_one; _kill_one()"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")

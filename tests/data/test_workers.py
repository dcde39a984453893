"""Data workers whose signals are blocked end with the process that started them."""

import subprocess
import sys


def test_workers_that_nobody_has_ended_do_not_keep_their_process() -> None:
    """As when a signal or an error leaves a loader's iterator alive until the interpreter ends."""
    script = """
import time
from powertrain.data.workers import WorkerContext
worker = WorkerContext().Process(target=time.sleep, args=(600,), daemon=True)
worker.start()
print(worker.pid)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip().isdigit()

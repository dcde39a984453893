"""Start the processes of one machine, pass signals on to them, and end them all when one fails.

`powertrain train trainer.devices=8` runs itself eight times through `launch`; torchrun and srun do the same across
machines. Which process's error is the cause is decided by time: a process reports its own error at once (rank 0) or
after a moment (others, so that what all ranks say is said once), and the loss of another process last of all.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from types import FrameType
from typing import Any

import torch

from powertrain.processes import LAUNCHER

# Seconds that the others get to end by themselves, once one has failed.
GRACE = 10.0
# Seconds that a process waits before it reports an error, by kind; the launcher ends it earlier where it can.
OTHER_RANK_DELAY = 1.0
LOST_PEER_DELAY = 15.0
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_PR_SET_PDEATHSIG = 1


def launch(command: list[str], processes: int, *, num_nodes: int = 1) -> int:
    """Run `command` once for each of `processes` ranks of this machine and wait for all of them.

    Args:
        num_nodes: machines; with several, NODE_RANK, MASTER_ADDR and MASTER_PORT say which this is and where to meet.
    Returns:
        0, or the exit code of the process that failed first: 128 + signal where one ended it, or came before any began.
    Errors:
        ValueError: several machines, and nothing says where they meet.
    """
    missing = [name for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if num_nodes > 1 and missing:
        raise ValueError(
            f"trainer.num_nodes={num_nodes} needs a launcher that knows the other machines: use torchrun or"
            f" cluster=slurm, or set {', '.join(missing)} on each."
        )
    node, address, port = 0, "127.0.0.1", str(_free_port())
    if num_nodes > 1:
        node, address, port = int(os.environ["NODE_RANK"]), os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    shared = {
        **os.environ,
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
        "NODE_RANK": str(node),
        "WORLD_SIZE": str(processes * num_nodes),
        LAUNCHER: str(os.getpid()),
        # More threads than cores would fight for them.
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // processes)),
    }
    running: dict[int, subprocess.Popen[bytes]] = {}
    received: list[int] = []  # and not passed on yet

    def take(signum: int, frame: FrameType | None) -> None:
        received.append(signum)

    previous: dict[int, Any] = {signum: signal.signal(signum, take) for signum in _FORWARDED}
    try:
        for local in range(processes):
            if received:
                break
            environment = {**shared, "LOCAL_RANK": str(local), "RANK": str(node * processes + local)}
            # A session of its own: a terminal's Ctrl-C comes once, from here.
            running[local] = subprocess.Popen(command, env=environment, start_new_session=True)
        if not running:
            return 128 + received[0]
        return _supervise(running, node * processes, received)
    finally:
        _send(running, signal.SIGKILL)
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _send(running: dict[int, subprocess.Popen[bytes]], signum: int) -> None:
    for process in list(running.values()):
        process.send_signal(signum)


def _supervise(running: dict[int, subprocess.Popen[bytes]], first_rank: int, received: list[int]) -> int:
    """Pass signals on and wait until all processes have ended; from the first failure on, `GRACE` seconds at most."""
    code, deadline = 0, None
    while running:
        while received:
            _send(running, received.pop(0))
        for local, process in list(running.items()):
            result = process.poll()
            if result is None:
                continue
            del running[local]
            if result == 0 or code != 0:
                continue
            code = result if result > 0 else 128 - result
            if result < 0:
                # Nobody else can say this.
                name = signal.Signals(-result).name
                print(
                    f"powertrain: rank {first_rank + local} (process {process.pid}) was ended by {name}"
                    f"{' (out of memory?)' if -result == signal.SIGKILL else ''}; the other processes are stopped",
                    file=sys.stderr,
                    flush=True,
                )
            deadline = time.monotonic() + GRACE
            if result < 128:
                _send(running, signal.SIGTERM)  # else a signal ended it in good order, as it will the others
        if deadline is not None and time.monotonic() > deadline:
            _send(running, signal.SIGKILL)
        time.sleep(0.05)
    return code


def end_with_launcher() -> None:
    """Ask the kernel to send SIGTERM to this process when its launcher dies; nothing for other processes (Linux)."""
    launcher = os.environ.get(LAUNCHER)
    if launcher is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(launcher):
        os.kill(os.getpid(), signal.SIGTERM)


def is_lost_peer(error: BaseException) -> bool:
    """Whether `error` says no more than that another process is gone, whose own error is the cause."""
    if isinstance(error, torch.distributed.DistError):
        return True
    # gloo raises plain RuntimeErrors.
    signs = ("Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe", "[gloo")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)

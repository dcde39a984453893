"""Attempts: one start of `powertrain train` on some ranks, which can be hit while it runs.

A process needs seconds for its imports and one for its training, so most ranks are forked from a server that has
imported everything and has no threads; the environment they find is torchrun's. A command starts its ranks by itself,
each in an interpreter of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from tests.faults.process import VARIABLE, Plan, main
from tests.forked import Forked

ROOT = Path(__file__).resolve().parents[2]
# torchrun gives the others 30 s after one has failed; these have nothing to do that takes longer than a step.
GRACE_SECONDS = 5.0
# No attempt of these sizes takes a tenth of it, even where six share a core.
LIMIT_SECONDS = 180.0


class Layout(NamedTuple):
    """How a run is spread over processes."""

    ranks: int
    strategy: str = "ddp"

    @property
    def overrides(self) -> list[str]:
        """What `powertrain train` is told of it."""
        return [f"trainer.devices={self.ranks}", f"trainer.strategy={self.strategy}"]

    def __str__(self) -> str:
        return "1 rank" if self.ranks == 1 else f"{self.ranks} ranks, {self.strategy}"


class Hung(AssertionError):
    """Processes did not end within `LIMIT_SECONDS`."""


class _Process(Protocol):
    pid: int

    def poll(self) -> int | None: ...


class _Command:
    def __init__(self, argv: list[str], environment: dict[str, str], output: Path) -> None:
        with output.open("ab") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.process", *argv],
                env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
            )
        self.pid = self._process.pid
        self._mark = f"{VARIABLE}={environment[VARIABLE]}".encode()

    def poll(self) -> int | None:
        """The exit code, once the ranks that it has started are gone as well."""
        code = self._process.poll()
        return code if code is None or not self._has_ranks() else None

    def _has_ranks(self) -> bool:
        for entry in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if self._mark in entry.read_bytes():
                    return True
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Attempt:
    """A start of `powertrain train`, each of its processes with an output of its own.

    Args:
        overrides: of the run, without its layout.
        directory: for outputs, made here.
        plan: what happens inside.
        as_command: one command that starts the other ranks itself, instead of forked processes.
    """

    def __init__(
        self, overrides: Sequence[str], layout: Layout, directory: Path, plan: Plan, *, as_command: bool = False
    ) -> None:
        directory.mkdir(parents=True)
        self.layout = layout
        self.directory = directory
        self.plan = plan
        argv = ["train", *overrides, *layout.overrides]
        environment = {VARIABLE: json.dumps(dataclasses.asdict(plan)), "OMP_NUM_THREADS": "1"}
        count = 1 if as_command else layout.ranks
        port = _free_port()
        self._processes: list[_Process] = []
        for rank in range(count):
            output = self._output(rank)
            if as_command:
                self._processes.append(_Command(argv, environment, output))
            else:
                place = {} if layout.ranks == 1 else _torchrun(rank, layout.ranks, port)
                found = {**os.environ, **environment, **place}
                self._processes.append(Forked(main, argv, found, output, output))

    def _output(self, rank: int) -> Path:
        return self.directory / f"rank-{rank}.log"

    def said(self, rank: int = 0) -> str:
        """Return what a rank has printed."""
        path = self._output(rank)
        return path.read_text(errors="replace") if path.exists() else ""

    def send(self, signum: int, rank: int | None = None) -> None:
        """Send a signal to one rank, or to all of them."""
        for process in self._processes if rank is None else [self._processes[rank]]:
            if process.poll() is None:
                # It may end in this moment.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signum)

    def codes(self) -> list[int | None]:
        """Return the exit code of each process; None where it runs, minus the signal where one killed it."""
        return [process.poll() for process in self._processes]

    @property
    def running(self) -> bool:
        return None in self.codes()

    def wait(self, *, end_others: bool = True) -> list[int]:
        """Wait until every process has ended; return their exit codes.

        Args:
            end_others: as torchrun does, end the others when one has failed; else they have to end by themselves.
        Errors:
            Hung: they did not; they are killed.
        """
        deadline = time.monotonic() + LIMIT_SECONDS
        failed_at: float | None = None
        while self.running:
            now = time.monotonic()
            # One that a signal ended in good order says 128 + signal, as the others will.
            failed = any(code is not None and code != 0 and code < 128 for code in self.codes())
            if end_others and failed_at is None and failed:
                failed_at = now
                self.send(signal.SIGTERM)
            if failed_at is not None and now - failed_at > GRACE_SECONDS:
                self.send(signal.SIGKILL)
            if now > deadline:
                codes = self.codes()
                self.send(signal.SIGKILL)
                raise Hung(f"after {LIMIT_SECONDS:.0f} s the ranks have exit codes {codes}: {self.directory}")
            time.sleep(0.01)
        return [code for code in self.codes() if code is not None]


def _torchrun(rank: int, ranks: int, port: int) -> dict[str, Any]:
    """Return what torchrun tells a rank of one machine."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "faults",
    }

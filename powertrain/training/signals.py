"""What the signals of users and schedulers do to a process that trains."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from powertrain.processes import is_rank_zero

POLL = 0.1  # seconds between two looks at what may have come


def _say(line: bytes) -> None:
    """Write a line to the terminal from within a handler, on rank 0 alone."""
    if is_rank_zero():
        os.write(2, b"\npowertrain: " + line + b"\n")


def end_at_once() -> NoReturn:
    """End this process on a second Ctrl-C, with one line of rank 0, whatever it does.

    An exception would be reported by whoever meets it: workers, threads, other processes that lose their peer.
    `status.json` stays at `running`, as that of a killed process, which counts as lost when its heartbeat is old.
    """
    try:
        _say(b"ended at once; what was saved before is kept")
        # Workers of the data would look only every few seconds whether this process is still there.
        for child in multiprocessing.active_children():
            child.kill()
    finally:
        os._exit(128 + signal.SIGINT)


class Stopped(KeyboardInterrupt):
    """A signal that asks a process to end came outside of the steps, where nothing of the run needs saving."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class StopSignals:
    """Takes the signals that ask a process to end while its block runs; blocks of one object may be nested.

    The first raises `Stopped`, and within `deferred()` it is a flag that is looked at between steps. What follows the
    first while the process ends changes nothing, as its saves must survive it: Slurm sends TERM twice at a time limit,
    after the USR1 that it sends before, and a process group gets what its parent passes on too. Only a second Ctrl-C
    ends the process at once.
    """

    def __init__(
        self, signals: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    ) -> None:
        self.signals = signals
        self.received: int | None = None
        self._previous: list[dict[int, Any]] = []
        self._deferred = False
        self._promise = b""
        self._ending = False

    def __enter__(self) -> StopSignals:
        self._previous.append({signum: signal.getsignal(signum) for signum in self.signals})
        self.install()
        return self

    def install(self) -> None:
        """Take the signals, also from whoever took them since; Python allows it in the main thread only."""
        if threading.current_thread() is threading.main_thread():
            for signum in self.signals:
                signal.signal(signum, self._handle)

    def __exit__(self, *_: object) -> None:
        previous = self._previous.pop()
        if threading.current_thread() is threading.main_thread():
            for signum, handler in previous.items():
                signal.signal(signum, handler)

    @contextmanager
    def deferred(self, promise: bytes = b"stopping after this step, and saving") -> Iterator[None]:
        """Make a signal within the block a flag, `received`.

        Saving inside a handler would interrupt collectives of the step, and deadlock against the other ranks.

        Args:
            promise: what a Ctrl-C leads to.
        """
        with self:
            self._deferred, self._promise = True, promise
            try:
                yield
            finally:
                self._ending = self.received is not None
                self._deferred = False

    def learn(self, signum: int) -> None:
        """Take over a signal that another process got: all end together, whether or not one comes here as well."""
        self.received = self.received or signum

    def raise_received(self) -> None:
        """Raise `Stopped` for a signal that was deferred, and that came too late for a step to look at it."""
        if self.received is not None:
            self._ending = True
            raise Stopped(self.received)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.received is not None and signum == signal.SIGINT:
            end_at_once()
        if self.received is None and self._deferred and signum == signal.SIGINT:
            _say(self._promise + b"; Ctrl-C again ends it at once")
        self.received = self.received or signum
        if not self._deferred and not self._ending:
            self._ending = True
            raise Stopped(signum)

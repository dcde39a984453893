"""Notice that training no longer advances, show where every process stands, and end it."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import lightning.pytorch as pl
import torch

from powertrain.training.ranks import ALONE, Ranks

EXIT_CODE = 70  # EX_SOFTWARE of sysexits.h
_REPORT_SECONDS = 60.0  # for what a process that ends has to write, on a file system that may be the cause


class HangWatch(pl.Callback):
    """Ends all processes when one has finished nothing for too long; watches from `start` until its block is left.

    Finished is a batch, or what `beat` is called after: a phase of the start, such as a restore.

    Each process writes the stacks of its threads to `<run_dir>/hang/rank-R.txt` and to stderr. The first that notices
    tells the others through the store, so that those that only wait show where, before any of them ends.

    Args:
        timeout: seconds without anything finished.
        on_hang: called with a sentence, once the stacks are written and before the process ends.
    """

    def __init__(self, timeout: float, run_dir: Path, on_hang: Callable[[str], None] = lambda _: None) -> None:
        self.timeout = timeout
        self.directory = run_dir / "hang"
        self.on_hang = on_hang
        self.ranks = ALONE
        self._store: torch.distributed.Store | None = None
        self._interval = min(max(timeout / 10, 0.05), 5.0)
        self._stop = threading.Event()
        self._beat = time.monotonic()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> HangWatch:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()

    def start(self, ranks: Ranks) -> None:
        """Begin to watch this process, one of `ranks`."""
        self.ranks = ranks
        # A connection of its own: who waits for a key has the other one for himself.
        self._store = ranks.store.clone() if ranks.store is not None else None  # type: ignore[attr-defined]
        self.beat()
        self._thread.start()

    def beat(self, *_: Any, **__: Any) -> None:
        """Say that something was finished."""
        self._beat = time.monotonic()

    on_train_start = on_train_batch_start = on_train_batch_end = on_train_end = beat
    on_validation_start = on_validation_batch_end = on_validation_end = beat

    def _watch(self) -> None:
        path = self.directory / f"rank-{self.ranks.rank}.txt"
        with self._report(path) as file:
            while not self._stop.wait(self._interval):
                # Where native code holds Python's lock this thread stands too, and faulthandler's own takes over.
                faulthandler.dump_traceback_later(self.timeout + 10 * self._interval, exit=True, file=file)
                idle = time.monotonic() - self._beat
                if idle > self.timeout or self._told():
                    self._end(idle, file)
            faulthandler.cancel_dump_traceback_later()
        with contextlib.suppress(OSError):
            path.unlink()
            self.directory.rmdir()

    def _report(self, path: Path) -> IO[str]:
        """Open the file of the stacks; where that fails, one that only stderr shows. The watch must not end for it."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return path.open("w+")
        except OSError:
            return tempfile.TemporaryFile("w+")

    def _told(self) -> bool:
        try:
            return self._store is not None and self._store.check(["hang"])
        except RuntimeError:
            return False  # rank 0 is gone, and with it the store

    def _end(self, idle: float, file: Any) -> None:
        faulthandler.dump_traceback_later(_REPORT_SECONDS, exit=True)
        if self._store is not None and not self._told():
            with contextlib.suppress(RuntimeError):
                self._store.set("hang", str(self.ranks.rank))
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        who = f"rank {self.ranks.rank}: " if self.ranks.size > 1 else ""
        sentence = f"{who}nothing was finished for {idle:.1f} s (trainer.hang_timeout={self.timeout:g})"
        sys.stderr.write(
            f"powertrain train: {sentence}; the run is stopped, and this process stood here ({file.name}):\n"
            f"{file.read()}"
        )
        sys.stderr.flush()
        self.on_hang(f"hang: {sentence}")
        # The others need a moment to notice and to write.
        time.sleep(3 * self._interval + 1.0)
        os._exit(EXIT_CODE)

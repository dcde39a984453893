"""Notice that training no longer advances, show where every process stands, and end it."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from powertrain.training.ranks import Ranks

EXIT_CODE = 70  # EX_SOFTWARE of sysexits.h


class HangWatch(pl.Callback):
    """Ends all processes when one has not finished a batch for too long; as a context, it watches while it is open.

    Each process writes the stacks of its threads to `<run_dir>/hang/rank-R.txt` and to stderr. The first that notices
    tells the others through the store, so that those that only wait show where, before any of them ends.

    Args:
        timeout: seconds without a finished batch.
    """

    def __init__(self, timeout: float, run_dir: Path, ranks: Ranks) -> None:
        self.timeout = timeout
        self.path = run_dir / "hang" / f"rank-{ranks.rank}.txt"
        self.ranks = ranks
        self._interval = min(max(timeout / 10, 0.05), 5.0)
        self._stop = threading.Event()
        self._beat = time.monotonic()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> HangWatch:
        self._beat = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def beat(self, *_: Any, **__: Any) -> None:
        """Say that something was finished."""
        self._beat = time.monotonic()

    on_train_start = on_train_batch_start = on_train_batch_end = on_train_end = beat
    on_validation_start = on_validation_batch_end = on_validation_end = beat

    def _watch(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("w") as file:
            while not self._stop.wait(self._interval):
                # Where native code holds Python's lock this thread stands too, and faulthandler's own takes over.
                faulthandler.dump_traceback_later(self.timeout + 10 * self._interval, exit=True, file=file)
                idle = time.monotonic() - self._beat
                if idle > self.timeout or self._told():
                    self._end(idle, file)
            faulthandler.cancel_dump_traceback_later()
        self.path.unlink()
        with contextlib.suppress(OSError):
            self.path.parent.rmdir()

    def _told(self) -> bool:
        try:
            return self.ranks.store is not None and self.ranks.store.check(["hang"])
        except RuntimeError:
            return False  # rank 0 is gone, and with it the store

    def _end(self, idle: float, file: Any) -> None:
        faulthandler.cancel_dump_traceback_later()
        if self.ranks.store is not None and not self._told():
            with contextlib.suppress(RuntimeError):
                self.ranks.store.set("hang", str(self.ranks.rank))
        faulthandler.dump_traceback(file, all_threads=True)
        file.flush()
        who = f"rank {self.ranks.rank}: " if self.ranks.size > 1 else ""
        sys.stderr.write(
            f"powertrain train: {who}no batch was finished for {idle:.1f} s (trainer.hang_timeout={self.timeout:g});"
            f" the run is stopped, and this process stood here ({self.path}):\n{self.path.read_text()}"
        )
        sys.stderr.flush()
        # The others need a moment to notice and to write.
        time.sleep(3 * self._interval + 1.0)
        os._exit(EXIT_CODE)

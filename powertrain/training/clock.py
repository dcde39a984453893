"""Wall-clock of a run over its restarts, and of training alone."""

from __future__ import annotations

import time


class Clock:
    """Counts seconds since the run began (restarts excluded), and seconds of training since the last reading.

    Pauses (validation, checkpoints) count for the former only.
    """

    def __init__(self) -> None:
        self.start()

    def start(self, seconds: float = 0.0) -> None:
        """Begin or continue counting at `seconds`."""
        self._started = self._lap_started = time.perf_counter()
        self._before, self._lap, self._paused = seconds, 0.0, False

    @property
    def seconds(self) -> float:
        """Seconds that the run has taken, pauses included."""
        return self._before + time.perf_counter() - self._started

    def pause(self) -> None:
        """Leave out of training time what follows."""
        assert not self._paused
        self._lap += time.perf_counter() - self._lap_started
        self._paused = True

    def resume(self) -> None:
        """End a pause."""
        assert self._paused
        self._lap_started, self._paused = time.perf_counter(), False

    def lap(self) -> float:
        """Return the seconds of training since the last call, and begin anew."""
        assert not self._paused
        now = time.perf_counter()
        lap, self._lap, self._lap_started = self._lap + now - self._lap_started, 0.0, now
        return lap

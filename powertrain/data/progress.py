"""How far a preparation is, on the terminal of rank 0."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Self

from powertrain.processes import is_rank_zero

_REFRESH_BYTES = 1 << 18


def say(message: str) -> None:
    """Print one line to standard error on rank 0."""
    if is_rank_zero():
        print(message, file=sys.stderr, flush=True)


class Progress:
    """A bar over the bytes of documents read; `total_bytes` is None where a source does not know its size."""

    def __init__(self, total_bytes: int | None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
        from rich.progress import Progress as Bar

        console = Console(stderr=True)
        self._total = total_bytes
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not (is_rank_zero() and console.is_terminal),
        )

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def watch(self, pieces: Iterator[tuple[str, str]], stage: str) -> Iterator[tuple[str, str]]:
        """Yield `pieces` of (split, text), moving the bar of `stage` by the bytes of each text."""
        task = self._bar.add_task(stage, total=self._total)
        pending = 0
        for split, text in pieces:
            yield split, text
            # Characters stand for bytes here: close enough for a bar, and free.
            pending += len(text)
            if pending >= _REFRESH_BYTES:
                self._bar.advance(task, pending)
                pending = 0
        self._bar.update(task, advance=pending)
        self._bar.stop_task(task)

    def describe(self, stage: str) -> None:
        """Add a stage of unknown length."""
        self._bar.add_task(stage, total=None)

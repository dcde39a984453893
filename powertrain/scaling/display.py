"""What a user sees of a running sweep: a live table from the sweep's directory, whoever runs its cells."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from powertrain.scaling.cells import Cell, Expansion
from powertrain.scaling.run import Interrupted, SweepState

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

# Reading a directory of records and metrics is cheap, but not free on a network file system.
REFRESH_SECONDS = 2.0


def last_record(run_dir: Path) -> dict[str, Any]:
    """Return the newest record of a run's metrics.jsonl, or an empty mapping."""
    from json import JSONDecodeError, loads

    path = run_dir / "metrics.jsonl"
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 8192))
            lines = file.read().splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            record = loads(line)
        except (JSONDecodeError, UnicodeDecodeError):
            continue
        return record if isinstance(record, dict) else {}
    return {}


def progress_of(state: SweepState, cell: Cell) -> tuple[float, float | None]:
    """Return the share of a cell's steps that its trunk and its own run have made, and the latest training loss."""
    records = [last_record(state.paths.runs / name) for name in (cell.id, cell.trunk)]
    steps = [min(r.get("step", 0), limit) for r, limit in zip(records, (cell.steps, cell.decay_start), strict=True)]
    newest = records[0] if records[0] else records[1]
    return max(steps) / cell.steps, newest.get("train/loss")


def _done_share(state: SweepState, expansion: Expansion, progress: dict[str, float]) -> float:
    finished = state.store.finished()
    total = sum(c.budget for c in expansion.cells) + sum(c.budget for p in expansion.pending for c in p.candidates)
    done = sum(c.budget if c.id in finished else c.budget * progress.get(c.id, 0.0) for c in expansion.cells)
    return done / total if total else 1.0


def status_table(state: SweepState, *, bar: bool) -> RenderableType:
    """Return the sweep's progress: cells per mixer and budget, what is running where, and failures.

    Args:
        bar: draw the share that is done, for a terminal.
    """
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    expansion = state.expand()
    finished, failed = state.store.finished(), state.failed(expansion)
    holders = {t: state.claims.holder(t) for t in {c.trunk for c in expansion.cells if c.id not in finished}}
    running: dict[str, str] = {}
    for trunk, cells in state.missing(expansion).items():
        holder = holders.get(trunk)
        if holder:
            # A runner takes a trunk's cells one after the other, smallest budget first.
            running[cells[0].id] = holder
    cells_by_id = {c.id: c for c in expansion.cells}
    seen = {cell: progress_of(state, cells_by_id[cell]) for cell in running}
    table = Table(box=None, pad_edge=False, header_style="bold")
    # A context that all share is no column, for the width of a terminal.
    several = len(state.recipe.contexts) > 1
    for name in (*(["context"] if several else []), "FLOPs"):
        table.add_column(name, justify="right")
    for name in state.recipe.mixers:
        table.add_column(name)
    outcomes = state.outcomes()
    for context in state.recipe.contexts:
        for budget in state.recipe.budgets:
            row = [*([str(context)] if several else []), f"{budget:.3g}"]
            for mixer in state.recipe.mixers:
                own = [c for c in expansion.cells if (c.mixer, c.budget, c.context) == (mixer, budget, context)]
                later = sum(
                    len(p.candidates)
                    for p in expansion.pending
                    if (p.mixer, p.budget, p.context) == (mixer, budget, context)
                )
                done = [outcomes[c.id] for c in own if c.id in outcomes]
                # Lines of their own: four mixers side by side are wider than a terminal.
                counts = ([f"{len(done)}/{len(own)}"] if own else []) + ([f"+{later} later"] if later else [])
                parts = [" ".join(counts) or "-"]
                if done:
                    parts.append(f"lowest {min(done):.4f}")
                if bad := sum(c.id in failed for c in own):
                    parts.append(f"[red]{bad} failed[/red]")
                row.append("\n".join(parts))
            table.add_row(*row)
    share = _done_share(state, expansion, {cell: fraction for cell, (fraction, _) in seen.items()})
    lines: list[Any] = [table]
    for cell, holder in sorted(running.items()):
        c, (fraction, loss) = cells_by_id[cell], seen[cell]
        loss_text = f", loss {loss:.3f}" if loss is not None else ""
        what = f"{c.mixer} {c.size} {c.budget:.3g}, lr {c.learning_rate:.3g}, seed {c.seed}"
        lines.append(Text(f"running {cell}  {what}: {fraction:.0%}{loss_text}  ({holder})", style="cyan"))
    for cell in sorted(failed):
        c = cells_by_id[cell]
        text = f"failed  {cell}  {c.mixer} {c.size} {c.budget:.3g}: {state.failures.message(cell)}"
        lines.append(Text(text, style="red", overflow="ellipsis", no_wrap=True))
    lines.append(Text(f"{share:.1%} of the sweep's FLOPs", style="bold"))
    if bar:
        # A row of a table ends its line; a bar by itself does not.
        line = Table.grid()
        line.add_row(ProgressBar(total=1.0, completed=share, width=60))
        lines.append(line)
    return Group(*lines)


class LiveStatus:
    """Shows `status_table` while a sweep runs: live on a terminal, one line per finished cell elsewhere."""

    def __init__(self, state: SweepState, console: Console, *, live: bool) -> None:
        self.state, self.console = state, console
        self._live = live and console.is_terminal
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._started: dict[str, float] = {}

    def __enter__(self) -> LiveStatus:
        if self._live:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._stop.set()
            self._thread.join()

    def _watch(self) -> None:
        from rich.live import Live

        # A state of its own: the runner's is used by another thread.
        state = SweepState(self.state.recipe, self.state.catalog, self.state.paths, self.state.lease_seconds)
        with Live(console=self.console, auto_refresh=False) as live:
            while True:
                ended = self._stop.wait(0 if not self._started else REFRESH_SECONDS)
                live.update(status_table(state, bar=True), refresh=True)
                if ended:
                    return
                self._stop.wait(REFRESH_SECONDS)

    def cell_started(self, cell: Cell) -> None:
        """Note the start of a cell."""
        self._started[cell.id] = time.monotonic()
        if not self._live:
            self._line(f"start   {cell.id}  {_describe(cell)}")

    def cell_ended(self, cell: Cell, error: BaseException | None) -> None:
        """Say how a cell ended."""
        if self._live:
            return
        seconds = time.monotonic() - self._started[cell.id]
        if error is None:
            loss = self.state.outcomes()[cell.id]
            self._line(f"done    {cell.id}  {_describe(cell)}: loss {loss:.4f} in {seconds:.0f} s")
        elif isinstance(error, Interrupted):
            self._line(f"stopped {cell.id}  {_describe(cell)}: {error} after {seconds:.0f} s")
        else:
            message = str(error).splitlines()[0] if str(error) else type(error).__name__
            self._line(f"failed  {cell.id}  {_describe(cell)}: {message}")

    def _line(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def _describe(cell: Cell) -> str:
    return f"{cell.mixer} {cell.size} {cell.budget:.3g} FLOPs, lr {cell.learning_rate:.3g}, seed {cell.seed}"


def deadline(hours: float | None) -> Callable[[], bool]:
    """Return whether so many hours have passed since now."""
    if hours is None:
        return lambda: False
    end = time.monotonic() + 3600 * hours
    return lambda: time.monotonic() >= end

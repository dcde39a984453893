"""Faults at random moments: chains of attempts of one run, each ended by a fault, the last one whole.

After every fault the next attempt is held against the unbroken run: where it went on, which tokens it trained on, what
it recorded. A fault counts as survived when that holds for every attempt after it until the run is finished.
"""

from __future__ import annotations

import dataclasses
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.launch import Attempt, Hung, Layout
from tests.faults.process import read_trace
from tests.faults.run import (
    CHECKPOINT_EVERY,
    STEPS,
    Mismatch,
    Run,
    Unbroken,
    saved_at,
    saved_for_certain,
    signal_name,
    write_corpus,
)

KILL = "SIGKILL of a rank at a random moment"
PREEMPT = "preemption (SIGUSR1, SIGTERM) at a random moment"
SAVE = "SIGKILL during a save"
READ = "SIGKILL while a checkpoint is read"
PREPARE = "SIGKILL during data preparation"
COMMAND = "SIGKILL of the command that started the ranks"
ALONE = Layout(1)
LAYOUTS = (ALONE, Layout(2), Layout(2, "fsdp"), Layout(4))
# Losses of a run whose layout changed: see `tolerance`.
ROUNDING_FACTOR = 4.0
# Only the fault is timed; a step takes milliseconds, and the rest of a random moment is scheduling.
MOMENT_SECONDS = 0.03


@dataclasses.dataclass
class Outcome:
    """What became of one fault."""

    kind: str
    run: str
    layout: str  # of the attempt that it hit
    what: str  # the fault in detail
    step: int  # last step recorded when it hit
    ended: str = ""  # how the ranks ended
    continued_from: int | None = None  # step at which the next attempt went on; None where it was hit before its first
    continued_on: str | None = None  # layout of the next attempt
    survived: bool | None = None  # None until the run is finished
    reason: str | None = None  # why not
    message: str | None = None  # what the user was told, where a fault ends with a message


@dataclasses.dataclass(frozen=True)
class References:
    """The unbroken runs, and what follows from them."""

    by_layout: dict[Layout, Unbroken]
    fp64: Unbroken
    read_operations: int  # on files of checkpoints, when a run starts that has one

    @property
    def save_operations(self) -> int:
        """File operations of one save, about."""
        return max(1, self.by_layout[ALONE].operations["checkpoints"] // (STEPS // CHECKPOINT_EVERY))

    def tolerance(self) -> list[float]:
        """Return how far each loss of a run whose layout changed may be from that of one unbroken process, in nats.

        The error of an unbroken run is its distance from the same run in fp64. A run whose layout changes adds in the
        order of one of them at each step, so it errs as they do; what is allowed is `ROUNDING_FACTOR` times the largest
        error up to that loss: twice for the errors of both runs, twice because few runs were there to take the largest
        of.
        """
        allowed, largest = [], 0.0
        for exact, *rounded in zip(self.fp64.losses(), *(u.losses() for u in self.by_layout.values()), strict=True):
            largest = max(largest, *(abs(value - exact) for value in rounded))
            allowed.append(ROUNDING_FACTOR * largest)
        return allowed


@dataclasses.dataclass
class Workshop:
    """Where runs are made, and what they are held against."""

    directory: Path
    corpus: Path
    cache: Path  # prepared data, shared by the runs that do not prepare it themselves
    references: References

    def run(self, name: str, *, own_cache: bool = False, settings: tuple[str, ...] = ()) -> Run:
        """Return a new run."""
        return Run(self.directory / name, self.corpus, None if own_cache else self.cache, settings)


def prepare(directory: Path, layouts: tuple[Layout, ...] = LAYOUTS) -> Workshop:
    """Train the unbroken runs, which have to agree among each other.

    Errors:
        Mismatch: the token order depends on the layout.
    """
    corpus = directory / "corpus"
    write_corpus(corpus)
    first = Run(directory / "unbroken", corpus)
    by_layout = {ALONE: first.unbroken(ALONE)}
    again = first.start(ALONE, count_under=(str(first.checkpoints),))
    again.wait()
    reads = next(line["counts"] for line in read_trace(again.directory / "trace.jsonl") if "counts" in line)
    for layout in layouts:
        if layout != ALONE:
            name = f"unbroken-{layout.ranks}-{layout.strategy}"
            by_layout[layout] = Run(directory / name, corpus, first.cache).unbroken(layout)
    fp64 = Run(directory / "unbroken-fp64", corpus, first.cache).unbroken(ALONE, fp64=True)
    for reference in (*by_layout.values(), fp64):
        if reference.order_hash != by_layout[ALONE].order_hash:
            raise Mismatch(f"the token order on {reference.layout} is another one than on one rank")
    return Workshop(directory, corpus, first.cache, References(by_layout, fp64, max(1, *reads.values())))


def wait_for(attempt: Attempt, condition: Callable[[], bool]) -> bool:
    """Wait until `condition` holds; return whether it did before the attempt ended."""
    while not condition():
        if not attempt.running:
            return False
        time.sleep(0.002)
    return True


class Chain:
    """One run, hit by `kinds` one after the other and then left to finish.

    Args:
        layouts: of its attempts; several are taken in random turn, never the same twice in a row.
    """

    def __init__(
        self, shop: Workshop, name: str, layouts: tuple[Layout, ...], kinds: list[str], generator: random.Random
    ) -> None:
        self.shop = shop
        self.name = name
        self.layouts = layouts
        self.kinds = kinds
        self.random = generator
        self.run = shop.run(name, own_cache=PREPARE in kinds)
        self.outcomes: list[Outcome] = []
        self.missed = 0  # faults that the run outran
        self.moves = 0  # attempts in another layout than the one before them
        self.deviation = 0.0
        self._at_least = 0  # step of a checkpoint that is there for certain
        self._previous: Layout | None = None

    @property
    def reference(self) -> Unbroken:
        """The unbroken run in the same layout; of one process, where it changes."""
        return self.shop.references.by_layout[self.layouts[0] if len(self.layouts) == 1 else ALONE]

    def _next_layout(self) -> Layout:
        choices = [layout for layout in self.layouts if layout != self._previous] or list(self.layouts)
        layout = self.random.choice(choices)
        self.moves += self._previous not in (None, layout)
        self._previous = layout
        return layout

    def execute(self) -> list[Outcome]:
        """Go through all faults and finish the run; return what became of them."""
        try:
            for number, kind in enumerate(self.kinds):
                outcome = self._strike(kind, remaining=len(self.kinds) - number)
                self._check()
                if outcome is None:
                    self.missed += 1
                    if self.run.finished(self.reference):
                        break
                else:
                    self.outcomes.append(outcome)
            if not self.run.finished(self.reference):
                attempt = self.run.start(self._next_layout())
                codes = attempt.wait(end_others=False)
                self._check()
                if any(codes) or not self.run.finished(self.reference):
                    raise Mismatch(
                        f"the last attempt ended with {codes} at step {self.run.step}: {attempt.said()[-800:]}"
                    )
            self.deviation = self.run.deviation(self.reference)
        except (Mismatch, Hung) as error:
            # Of the fault before the attempt that shows it; the others before it had gone well.
            for outcome in self.outcomes[-1:]:
                outcome.survived, outcome.reason = False, str(error)
            if not self.outcomes:
                raise
        for outcome in self.outcomes:
            if outcome.survived is None:
                outcome.survived = True
        return self.outcomes

    def _check(self) -> None:
        tolerance = None if len(self.layouts) == 1 else self.shop.references.tolerance()
        attempt = self.run.attempts[-1]
        resumed = self.run.check(self.reference, tolerance, self._at_least)
        for outcome in self.outcomes[-1:]:
            outcome.continued_from = resumed if resumed >= 0 else None
            outcome.continued_on = str(attempt.layout)
        saved = saved_at(attempt.said())
        certain = saved_for_certain(self.run.step) if resumed >= 0 else 0
        self._at_least = max(self._at_least, resumed, certain, saved or 0)

    def _strike(self, kind: str, remaining: int) -> Outcome | None:
        references = self.shop.references
        if kind == PREPARE:
            return self._kill_by_operation(
                kind, self.run.cache, 1, references.by_layout[ALONE].operations["cache"], delay=0.3
            )
        if kind == READ:
            return self._kill_by_operation(kind, self.run.checkpoints, 1, references.read_operations, delay=0.005)
        if kind == SAVE and self.random.random() < 0.5:
            first, last = references.read_operations + 1, references.read_operations + 2 * references.save_operations
            return self._kill_by_operation(kind, self.run.checkpoints, first, last, delay=0.01)
        if kind == SAVE:
            return self._kill_on_sight(kind)
        before = self.run.step
        spread = max(1, 2 * (STEPS - 4 - before) // (remaining + 1))
        target = min(STEPS - 4, before + 1 + self.random.randrange(spread))
        layout = self._next_layout()
        if kind == COMMAND:
            attempt = self.run.start(layout, as_command=True)
            what, signum, rank = "of the command", signal.SIGKILL, None
        else:
            attempt = self.run.start(layout)
            signum = signal.SIGKILL if kind == KILL else self.random.choice([signal.SIGUSR1, signal.SIGTERM])
            rank = self.random.randrange(layout.ranks) if kind == KILL or self.random.random() < 0.5 else None
            what = f"{signum.name} to {'all ranks' if rank is None else f'rank {rank}'}"
        if wait_for(attempt, lambda: self.run.step >= target):
            time.sleep(self.random.uniform(0, MOMENT_SECONDS))
            attempt.send(signum, rank)
        return self._outcome(kind, attempt, what, signum)

    def _kill_by_operation(self, kind: str, directory: Path, first: int, last: int, *, delay: float) -> Outcome | None:
        number = self.random.randint(first, last)
        seconds = self.random.choice([0.0, self.random.uniform(0, delay)])
        attempt = self.run.start(
            self._next_layout(), kill_rank=0, kill_under=str(directory), kill_at=number, kill_delay=seconds
        )
        place = f"{'before' if not seconds else f'{seconds * 1e3:.1f} ms after'} file operation {number}"
        return self._outcome(kind, attempt, f"{place} in {directory.name}", signal.SIGKILL)

    def _kill_on_sight(self, kind: str) -> Outcome | None:
        """Kill a rank as soon as anything changes among the checkpoints, however they are written."""
        attempt = self.run.start(self._next_layout())
        start = self.run.step
        rank = self.random.randrange(attempt.layout.ranks)
        # A step of this attempt: what changes from then on is a save.
        wait_for(attempt, lambda: self.run.step > start)
        before = _listing(self.run.checkpoints)
        if wait_for(attempt, lambda: _listing(self.run.checkpoints) != before):
            time.sleep(self.random.uniform(0, 0.01))
            attempt.send(signal.SIGKILL, rank)
        return self._outcome(kind, attempt, f"SIGKILL to rank {rank} when files changed in checkpoints", signal.SIGKILL)

    def _outcome(self, kind: str, attempt: Attempt, what: str, signum: int) -> Outcome | None:
        codes = attempt.wait()
        expected = -signum if signum == signal.SIGKILL else 128 + signum
        if expected not in codes:
            if any(codes):
                raise Mismatch(f"{what}: the ranks ended with {codes}: {attempt.said()[-800:]}")
            return None
        # A kill by time may come when the data are prepared already.
        if kind == PREPARE and any("prepared " in attempt.said(rank) for rank in range(attempt.layout.ranks)):
            kind = KILL
        ended = ", ".join(dict.fromkeys(signal_name(code) for code in codes))
        return Outcome(kind, self.name, str(attempt.layout), what, self.run.step, ended)


def _listing(directory: Path) -> list[Any]:
    """Return names and sizes of all files under a directory that others are changing."""
    found = []
    for path in sorted(directory.rglob("*")):
        try:
            found.append((str(path), path.lstat().st_size))
        except OSError:
            continue
    return found


def chains(shop: Workshop, count: int, seed: int) -> list[Chain]:
    """Return `count` chains: in each layout in turn, and then in layouts that change."""
    result = []
    turns = [*((layout,) for layout in LAYOUTS), LAYOUTS]
    for number in range(count):
        generator = random.Random(f"{seed}/{number}")
        layouts = turns[number % len(turns)]
        kinds = [KILL, KILL, PREEMPT, SAVE, SAVE]
        if layouts[0].ranks > 1:
            kinds.append(COMMAND)
        generator.shuffle(kinds)
        # A checkpoint can be read when there is one, which is certain after a signal.
        kinds.insert(generator.randint(kinds.index(PREEMPT) + 1, len(kinds)), READ)
        label = "changing" if len(layouts) > 1 else f"{layouts[0].ranks}-{layouts[0].strategy}"
        result.append(Chain(shop, f"chain-{number:02d}-{label}", layouts, [PREPARE, *kinds], generator))
    return result

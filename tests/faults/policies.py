"""Faults that end a run with one clear message, or that it gets over by policy; then it goes on as if nothing had been.

A full disk is a real one: a small tmpfs, which needs root. Where it cannot be mounted these faults are not tried.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.faults.campaign import Outcome, Workshop, wait_for
from tests.faults.launch import Attempt, Hung, Layout
from tests.faults.run import CHECKPOINT_EVERY, STEPS, Mismatch, Run, signal_name

DISK = "full disk"
SHARD = "unreadable shard"
CHECKPOINT = "damaged checkpoint"
NAN = "NaN gradient on one rank of two"
# Enough for two checkpoints of these runs and not for three.
CHECKPOINTS_BYTES = 700 << 10
RUN_BYTES = 8 << 20


def the_message(attempt: Attempt) -> str:
    """Return the one sentence with which all ranks of an attempt have ended.

    Errors:
        Mismatch: a rank ended well, or they say nothing, several things, or a traceback.
    """
    codes = attempt.wait()
    said = [attempt.said(rank) for rank in range(attempt.layout.ranks)]
    if 0 in codes:
        raise Mismatch(f"the ranks ended with {codes}: {said[0][-800:]}")
    sentences = dict.fromkeys(
        match[1]
        for text in said
        for match in re.finditer(r"^powertrain train: (?:rank \d+: )?(.*)", text, re.MULTILINE)
    )
    if len(sentences) != 1 or any("Traceback" in text for text in said):
        raise Mismatch(f"the ranks said {list(sentences)}: {' // '.join(text[-600:] for text in said)}")
    return next(iter(sentences))


def public(message: str, directory: Path) -> str:
    """Return a message without the paths of this machine."""
    return message.replace(str(directory), "...")


@contextlib.contextmanager
def small_disk(directory: Path, size: int) -> Iterator[None]:
    """Put a file system of `size` bytes at `directory`.

    Errors:
        PermissionError: this process may not mount one.
    """
    directory.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise PermissionError(done.stderr.strip())
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def fill(path: Path) -> None:
    """Write a file that takes all that is left of its file system."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1 << 6, 1):
            with contextlib.suppress(OSError):
                while file.write(b"x" * size):
                    pass


class Case:
    """One fault of a kind, on so many ranks."""

    def __init__(self, shop: Workshop, kind: str, name: str, ranks: int, generator: random.Random) -> None:
        self.shop = shop
        self.kind = kind
        self.name = name
        self.layout = Layout(ranks)
        self.random = generator
        self.reference = shop.references.by_layout[self.layout]

    def run(self, suffix: str = "", **options: object) -> Run:
        """Return a new run."""
        slug = re.sub(r"[^a-z0-9]+", "-", f"{self.kind}-{self.name}-{self.layout.ranks}{suffix}".lower())
        return self.shop.run(slug, **options)  # type: ignore[arg-type]

    def until(self, run: Run, attempt: Attempt, low: int = 1, high: int = STEPS - 8) -> int:
        """Let the attempt come to a random step; return it."""
        target = self.random.randint(low, high)
        if not wait_for(attempt, lambda: run.step >= target):
            raise Mismatch(f"it ended with {attempt.codes()} before step {target}: {attempt.said()[-800:]}")
        return target

    def finish(self, run: Run, at_least: int = 0) -> int:
        """Go on without the fault, to the end of the unbroken run; return the step at which it went on."""
        attempt = run.start(self.layout)
        codes = attempt.wait()
        if any(codes):
            raise Mismatch(f"without the fault it ended with {codes}: {attempt.said()[-800:]}")
        resumed = run.check(self.reference, at_least=at_least)
        if not run.finished(self.reference):
            raise Mismatch(f"it ended at step {run.step}")
        return resumed

    def outcome(self, run: Run, attempt: Attempt, step: int, message: str, resumed: int | None) -> Outcome:
        """Return the record of a fault that was survived."""
        ended = ", ".join(dict.fromkeys(signal_name(code) if code else "finished" for code in attempt.wait()))
        return Outcome(
            self.kind, self.name, str(self.layout), self.name, step, ended, resumed, str(self.layout), True, None,
            public(message, self.shop.directory),
        )  # fmt: skip


def disk_of_checkpoints(case: Case) -> Outcome:
    """The disk holds two checkpoints of the run and not the third."""
    run = case.run()
    with small_disk(run.checkpoints, CHECKPOINTS_BYTES):
        attempt = run.start(case.layout)
        message = the_message(attempt)
        step = run.step
        run.check(case.reference)
        _expect(message, "the disk is full", "is intact")
        # What had been saved is there for whoever makes room.
        saved = case.shop.directory / f"{run.directory.name}-saved"
        shutil.copytree(run.checkpoints, saved, symlinks=True)
    shutil.copytree(saved, run.checkpoints, symlinks=True, dirs_exist_ok=True)
    return case.outcome(run, attempt, step, message, case.finish(run, at_least=CHECKPOINT_EVERY))


def disk_of_run(case: Case) -> Outcome:
    """Somebody else fills the disk of the run directory in the middle of a step."""
    run = case.run()
    with small_disk(run.run_dir.parent, RUN_BYTES):
        attempt = run.start(case.layout)
        step = case.until(run, attempt, low=2 * CHECKPOINT_EVERY + 1)
        ballast = run.run_dir.parent / "ballast"
        fill(ballast)
        message = the_message(attempt)
        ballast.unlink()
        _expect(message, "space|full")
        return case.outcome(run, attempt, step, message, case.finish(run, at_least=CHECKPOINT_EVERY))


def disk_of_cache(case: Case) -> Outcome:
    """The disk has no room for prepared data."""
    run = case.run(own_cache=True)
    with small_disk(run.cache, 32 << 10):
        attempt = run.start(case.layout)
        message = the_message(attempt)
        _expect(message, "no space is left for prepared tokens")
    return case.outcome(run, attempt, 0, message, case.finish(run))


def _own_shard(case: Case, run: Run) -> Path:
    shutil.copytree(case.shop.cache, run.cache)
    return max(run.cache.rglob("*.bin"), key=lambda path: path.stat().st_size)


def shard_while_training(case: Case) -> Outcome:
    """A token shard loses its end while the run reads it."""
    run = case.run(own_cache=True)
    shard = _own_shard(case, run)
    attempt = run.start(case.layout)
    step = case.until(run, attempt)
    whole = shard.read_bytes()
    os.truncate(shard, len(whole) // 2)
    message = the_message(attempt)
    _expect(message, shard.name)
    run.check(case.reference)
    shard.write_bytes(whole)
    return case.outcome(run, attempt, step, message, case.finish(run))


def shard_at_start(case: Case) -> Outcome:
    """A run is to continue, and a token shard holds other bytes than were written."""
    run = case.run(own_cache=True)
    shard = _own_shard(case, run)
    step = _preempt(case, run)
    whole = shard.read_bytes()
    position = case.random.randrange(len(whole))
    shard.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
    attempt = run.start(case.layout)
    message = the_message(attempt)
    _expect(message, shard.name)
    shard.write_bytes(whole)
    return case.outcome(run, attempt, step, message, case.finish(run, at_least=step))


def _preempt(case: Case, run: Run) -> int:
    attempt = run.start(case.layout)
    case.until(run, attempt, low=2 * CHECKPOINT_EVERY + 1)
    attempt.send(signal.SIGTERM)
    attempt.wait()
    run.check(case.reference)
    return run.step


def _newest_checkpoints(run: Run) -> list[list[Path]]:
    """Return the files of each checkpoint, newest first: what has one number in its name belongs together."""
    groups: dict[int, list[Path]] = {}
    for entry in run.checkpoints.iterdir():
        number = re.search(r"\d{4,}", entry.name)
        if number and not entry.name.startswith("."):
            files = [p for p in entry.rglob("*") if p.is_file()] if entry.is_dir() else [entry]
            groups.setdefault(int(number[0]), []).extend(files)
    return [groups[step] for step in sorted(groups, reverse=True)]


def _cut(files: list[Path]) -> None:
    largest = max(files, key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


def newest_checkpoint(case: Case) -> Outcome:
    """The newest checkpoint is cut in half: the run goes on from the one before, and says so."""
    run = case.run()
    step = _preempt(case, run)
    _cut(_newest_checkpoints(run)[0])
    resumed = case.finish(run, at_least=CHECKPOINT_EVERY)
    attempt = run.attempts[-1]
    if resumed >= step:
        raise Mismatch(f"it went on from step {resumed}, whose checkpoint is cut in half")
    said = [
        line for rank in range(case.layout.ranks) for line in attempt.said(rank).splitlines() if "not usable" in line
    ]
    if len(said) != 1:
        raise Mismatch(f"it says {len(said)} times that a checkpoint is not usable: {attempt.said()[:800]}")
    return case.outcome(run, attempt, step, re.sub(r"^.*Warning: ", "", said[0]), resumed)


def every_checkpoint(case: Case) -> Outcome:
    """All checkpoints are cut in half: nothing is trained and nothing overwritten, until one is restored."""
    run = case.run()
    step = _preempt(case, run)
    saved = case.shop.directory / f"{run.directory.name}-saved"
    shutil.copytree(run.checkpoints, saved, symlinks=True)
    for files in _newest_checkpoints(run):
        _cut(files)
    attempt = run.start(case.layout)
    message = the_message(attempt)
    _expect(message, "no whole checkpoint is left")
    shutil.rmtree(run.checkpoints)
    shutil.copytree(saved, run.checkpoints, symlinks=True)
    return case.outcome(run, attempt, step, message, case.finish(run, at_least=step))


def nan_that_stops(case: Case) -> Outcome:
    """The default policy: every rank ends before the update, and the run goes on where the cause is gone."""
    run = case.run()
    step = case.random.randint(CHECKPOINT_EVERY + 2, STEPS - 4)
    attempt = run.start(case.layout, nan_step=step, nan_rank=case.layout.ranks - 1)
    message = the_message(attempt)
    # Gone in the replay, and summed before it is seen: whose it was is not known.
    _expect(message, f"step {step}: the gradient is not finite: a replay of the batch was finite")
    if run.step != step - 1:
        raise Mismatch(f"step {run.step} is recorded, and the gradient of step {step} was NaN")
    return case.outcome(run, attempt, run.step, message, case.finish(run, at_least=0))


def nan_that_is_skipped(case: Case) -> Outcome:
    """The policy skip: no rank makes the update, whichever it was that had the NaN."""
    step = case.random.randint(CHECKPOINT_EVERY + 2, STEPS - 4)
    finished = []
    for rank in range(case.layout.ranks):
        run = case.run(f"-rank-{rank}", settings=("trainer.nonfinite=skip",))
        finished.append((run, run.unbroken(case.layout, nan_step=step, nan_rank=rank)))
    run, (first, *others) = finished[-1][0], [unbroken.records for _, unbroken in finished]
    if any(other != first for other in others):
        raise Mismatch("the losses depend on the rank that had the NaN")
    losses, expected = ([r for r in of if "train/loss" in r] for of in (first, case.reference.records))
    if losses[: step - 1] != expected[: step - 1] or losses[-1].get("train/skipped_updates") != 1:
        raise Mismatch(f"the records after a skipped update of step {step} are {losses[step - 2 : step + 1]}")
    said = [line for line in run.attempts[-1].said().splitlines() if "not finite" in line]
    if len(said) != 1:
        raise Mismatch(f"it says {len(said)} times that a gradient is not finite: {said}")
    return case.outcome(run, run.attempts[-1], step, said[0], None)


def _expect(message: str, *patterns: str) -> None:
    for pattern in patterns:
        if not re.search(pattern, message):
            raise Mismatch(f"the message does not say {pattern!r}: {message}")


CASES: tuple[tuple[str, str, tuple[int, ...], Callable[[Case], Outcome]], ...] = (
    (DISK, "checkpoints do not fit", (1, 2), disk_of_checkpoints),
    (DISK, "filled up in mid-step", (1, 2), disk_of_run),
    (DISK, "prepared data do not fit", (1, 2), disk_of_cache),
    (SHARD, "cut while it is read", (1, 2), shard_while_training),
    (SHARD, "another byte at a restart", (1, 2), shard_at_start),
    (CHECKPOINT, "the newest is cut in half", (1, 2), newest_checkpoint),
    (CHECKPOINT, "all are cut in half", (1, 2), every_checkpoint),
    (NAN, "nonfinite=stop", (2,), nan_that_stops),
    (NAN, "nonfinite=skip", (2,), nan_that_is_skipped),
)


def may_mount(directory: Path) -> bool:
    """Return whether this process may mount a small file system, as the full disks need."""
    if shutil.which("mount") is None:
        return False
    try:
        with small_disk(directory / "probe", 1 << 16):
            return True
    except OSError as error:
        if error.errno not in (None, errno.EPERM, errno.EACCES):
            raise
        return False


def cases(shop: Workshop, seed: int) -> list[tuple[Case, Callable[[Case], Outcome]]]:
    """Return every case that can be tried here, and what acts it out."""
    mountable = may_mount(shop.directory)
    return [
        (Case(shop, kind, name, ranks, random.Random(f"{seed}/{kind}/{name}/{ranks}")), act)
        for kind, name, numbers, act in CASES
        for ranks in numbers
        if mountable or kind != DISK
    ]


def not_tried(shop: Workshop) -> int:
    """Return the number of cases that cannot be tried here."""
    return sum(len(numbers) for _, _, numbers, _ in CASES) - len(cases(shop, 0))


def attempt_case(case: Case, act: Callable[[Case], Outcome]) -> Outcome:
    """Act one case out; one that is not survived says why."""
    try:
        return act(case)
    except (Mismatch, Hung) as error:
        reason = public(str(error), case.shop.directory)
        return Outcome(case.kind, case.name, str(case.layout), case.name, -1, survived=False, reason=reason)


def execute(shop: Workshop, seed: int) -> Iterator[Outcome]:
    """Act every case out, one after the other."""
    for case, act in cases(shop, seed):
        yield attempt_case(case, act)

"""One run directory through its attempts, held against the run that nothing broke.

What is looked at is public: the run's `metrics.jsonl`, the exit codes and what is printed. The order of tokens comes
from the hashes that each process notes of what it trains on (see `process.py`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import signal
from pathlib import Path
from typing import Any

from powertrain.training.records import read_metrics
from tests.faults.launch import Attempt, Layout
from tests.faults.process import Plan, read_trace

STEPS = 60
CHECKPOINT_EVERY = 5
VALIDATE_EVERY = 20
ROWS = 4  # sequences of a step
CONTEXT = 64
# A run's own wall-clock, which no two runs share.
NOT_REPRODUCIBLE = ("seconds", "train/tokens_per_second")
LOSSES = ("train/loss", "val/loss")

SETTINGS = (
    "model=1m", "model.n_layers=1", "model.d_model=32", "model.n_heads=1", "model.n_kv_heads=1", "model.head_dim=32",
    "model.d_ff=64", "data=text", "data.tokenizer.kind=bytes", "data.max_val_tokens=256", "data.num_workers=0",
    "data.val_fraction=0.2", f"trainer.context_length={CONTEXT}", f"trainer.global_batch_tokens={ROWS * CONTEXT}",
    "trainer.micro_batch_size=1", "trainer.precision=32-true", "trainer.accelerator=cpu", "trainer.log_every_steps=1",
    f"trainer.max_steps={STEPS}", f"trainer.val_every_steps={VALIDATE_EVERY}",
    f"trainer.checkpoint_every_steps={CHECKPOINT_EVERY}", "sample.max_new_tokens=0",
)  # fmt: skip


class Mismatch(AssertionError):
    """A run is not what it would have been without its faults; the message says where."""


def write_corpus(directory: Path) -> None:
    """Write sixty small documents with a little structure, so that losses fall and differ from step to step."""
    directory.mkdir(parents=True)
    for index in range(60):
        words = " ".join(str((index * 7919 + i * i * (index + 3)) % 1000) for i in range(150))
        (directory / f"{index:02d}.txt").write_text(f"document {index}: {words}\n")


@dataclasses.dataclass(frozen=True)
class Unbroken:
    """What a run gives without faults."""

    layout: Layout
    records: list[dict[str, Any]]  # of metrics.jsonl, without NOT_REPRODUCIBLE
    rows: dict[int, list[str]]  # hash of each sequence of each step, in global order
    operations: dict[str, int]  # file operations of rank 0 under the directories that were counted

    @property
    def order_hash(self) -> str:
        """Hash of the token order of the whole run."""
        return hashlib.sha256("".join(h for step in sorted(self.rows) for h in self.rows[step]).encode()).hexdigest()

    def losses(self) -> list[float]:
        """Return every training and validation loss, in order."""
        return [record[key] for record in self.records for key in LOSSES if key in record]


def read_records(run_dir: Path) -> list[dict[str, Any]]:
    """Return what a run has recorded, without what no two runs share."""
    return [{k: v for k, v in record.items() if k not in NOT_REPRODUCIBLE} for record in read_metrics(run_dir)]


def rows_by_step(trace: list[dict[str, Any]]) -> dict[int, dict[int, str]]:
    """Return the hashes of the sequences of each step, by their position in the global batch."""
    steps: dict[int, dict[int, str]] = {}
    for line in trace:
        if "rows" in line:
            first = (line["micro"] * line["world"] + line["rank"]) * len(line["rows"])
            steps.setdefault(line["step"], {}).update({first + i: row for i, row in enumerate(line["rows"])})
    return steps


class Run:
    """A run directory and its attempts so far.

    Args:
        directory: of this run alone: its runs, its cache of prepared data unless `cache` is given, its outputs.
        corpus: the text files.
        cache: of prepared data; shared between runs, or None for one that this run has to prepare.
    """

    def __init__(
        self, directory: Path, corpus: Path, cache: Path | None = None, settings: tuple[str, ...] = ()
    ) -> None:
        self.directory = directory
        self.run_dir = directory / "runs" / "run"
        self.cache = cache or directory / "cache"
        self.checkpoints = self.run_dir / "checkpoints"
        self.overrides = [
            *SETTINGS, f"data.files={corpus}/*.txt", f"paths.runs={directory / 'runs'}", f"paths.cache={self.cache}",
            "run_id=run", *settings,
        ]  # fmt: skip
        self.attempts: list[Attempt] = []
        self.resumed: list[int] = []  # step at which each attempt that reached a step went on

    def start(self, layout: Layout, *, as_command: bool = False, **plan: Any) -> Attempt:
        """Start the next attempt; `plan` as in `process.Plan`, without the trace."""
        directory = self.directory / f"attempt-{len(self.attempts):02d}"
        attempt = Attempt(
            self.overrides,
            layout,
            directory,
            Plan(trace=str(directory / "trace.jsonl"), **plan),
            as_command=as_command,
        )
        self.attempts.append(attempt)
        return attempt

    @property
    def step(self) -> int:
        """The last step that is recorded."""
        records = read_metrics(self.run_dir)
        return int(records[-1]["step"]) if records else 0

    def unbroken(self, layout: Layout, **plan: Any) -> Unbroken:
        """Train from beginning to end in one attempt."""
        count_under = (str(self.checkpoints), str(self.cache))
        attempt = self.start(layout, count_under=count_under, **plan)
        codes = attempt.wait(end_others=False)
        if any(codes):
            raise Mismatch(f"the unbroken run on {layout} ended with {codes}: {attempt.said()[-2000:]}")
        trace = read_trace(attempt.directory / "trace.jsonl")
        rows = {step: [found[i] for i in sorted(found)] for step, found in rows_by_step(trace).items()}
        operations = next(line["counts"] for line in trace if "counts" in line and line["rank"] == 0)
        return Unbroken(
            layout,
            read_records(self.run_dir),
            rows,
            {"checkpoints": operations[count_under[0]], "cache": operations[count_under[1]]},
        )

    def check(self, reference: Unbroken, tolerance: list[float] | None = None, at_least: int = 0) -> int:
        """Hold the latest attempt, and all that the run has recorded, against the unbroken run.

        Args:
            tolerance: largest deviation of each of `reference.losses()`; None wants every record bit for bit.
            at_least: the step of which a checkpoint was known to exist when the attempt began.
        Returns:
            The step at which the attempt went on; -1 where it was ended before its first step.
        Errors:
            Mismatch: anything differs, or work was lost that a checkpoint held.
        """
        seen = rows_by_step(read_trace(self.attempts[-1].directory / "trace.jsonl"))
        for step, rows in seen.items():
            for position, row in rows.items():
                if reference.rows[step][position] != row:
                    raise Mismatch(f"step {step} trained on other tokens at position {position} of its batch")
        resumed = min(seen) - 1 if seen else -1
        if seen:
            if resumed < at_least:
                raise Mismatch(f"it went on from step {resumed}, and there was a checkpoint of step {at_least}")
            if sorted(seen) != list(range(resumed + 1, max(seen) + 1)):
                raise Mismatch(f"steps are missing between {resumed + 1} and {max(seen)}")
            self.resumed.append(resumed)
        records = read_records(self.run_dir)
        if tolerance is None:
            for mine, theirs in zip(records, reference.records, strict=False):
                if mine != theirs:
                    raise Mismatch(f"a record is {mine} instead of {theirs}")
        else:
            self._check_losses(records, reference, tolerance)
        if len(records) > len(reference.records):
            raise Mismatch(f"there are {len(records)} records instead of {len(reference.records)}")
        return resumed

    def _check_losses(self, records: list[dict[str, Any]], reference: Unbroken, tolerance: list[float]) -> None:
        keys = [[(r["step"], key) for r in of for key in LOSSES if key in r] for of in (records, reference.records)]
        if keys[0] != keys[1][: len(keys[0])]:
            raise Mismatch(f"losses were recorded at {keys[0][-3:]} and not as in the unbroken run")
        values = [r[key] for r in records for key in LOSSES if key in r]
        for place, value, expected, allowed in zip(keys[0], values, reference.losses(), tolerance, strict=False):
            if not abs(value - expected) <= allowed:
                raise Mismatch(
                    f"{place} is {value}, {abs(value - expected):.1e} from {expected}; allowed {allowed:.1e}"
                )

    def deviation(self, reference: Unbroken) -> float:
        """Return the largest deviation of a finished run's losses from those of the unbroken run, in nats."""
        values = [r[key] for r in read_records(self.run_dir) for key in LOSSES if key in r]
        return max(abs(a - b) for a, b in zip(values, reference.losses(), strict=True))

    def finished(self, reference: Unbroken) -> bool:
        """Return whether every record of the unbroken run has one here."""
        return len(read_records(self.run_dir)) == len(reference.records)


def saved_for_certain(last_step: int) -> int:
    """Return the step of a checkpoint that is whole for certain once `last_step` is recorded.

    A save may still be under way in the background when the next ones of the steps are made, and is over when the next
    save begins.
    """
    return max(0, ((last_step - 1) // CHECKPOINT_EVERY - 1) * CHECKPOINT_EVERY)


def saved_at(output: str) -> int | None:
    """Return the step at which a run says that everything is saved; None where it does not."""
    match = re.search(r"Everything is saved at step (\d+)", output)
    return int(match[1]) if match else None


def signal_name(code: int) -> str:
    """Return how a process ended, for people."""
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"

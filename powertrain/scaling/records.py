"""Records of finished cells: append-only files, one per cell, and the only thing that a report reads."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from powertrain.files import write_new_file
from powertrain.scaling.recipe import CONVENTIONS, Convention
from powertrain.schema import ConfigError, build

# Raised when a field changes its meaning; records of another version are refused, never reinterpreted.
VERSION = 1


@dataclass(frozen=True)
class CurvePoint:
    """The loss somewhere along a training run."""

    tokens: float  # trained on so far
    loss: float  # nats per token
    seconds: float | None = None  # device-seconds so far
    annealed: bool = False  # measured after the learning rate fell, not on the trunk
    kind: str = "train"  # train (mean since the point before) or val (evaluation documents)


@dataclass(frozen=True)
class Start:
    """A process that trained steps of a run."""

    from_step: int  # the last step of those before it
    device: str
    runners: int  # that shared the device
    environment: dict[str, str]  # versions, commit


Place = tuple[int, float, str]  # context, budget, mixer

_ABOVE_ZERO = (
    *("context", "budget", "learning_rate", "learning_rate_factor", "batch_tokens", "batch_factor", "steps", "tokens"),
    *("parameters", "parameters_total", "loss", "devices", "runners"),
)


@dataclass(frozen=True)
class CellRecord:
    """What one finished cell was, cost and reached; losses in nats per token, FLOPs forward and backward."""

    cell: str  # run id: the sweep's name and the hash of the resolved config
    sweep: str
    mixer: str  # key in the recipe
    size: str  # key in the recipe
    context: int
    budget: float  # FLOPs asked for, under the recipe's convention
    seed: int
    learning_rate: float
    learning_rate_factor: float  # factor of the recipe's grid
    batch_tokens: int
    steps: int
    tokens: float
    parameters: float  # without the embeddings
    parameters_total: float
    flops_per_token: dict[str, float]  # by convention
    loss: float  # mean over all evaluation tokens, after annealing where `annealed`
    annealed: bool = True
    batch_factor: float = 1.0  # factor of the recipe's grid
    flops_by_part: dict[str, float] = field(default_factory=dict)  # per token, algorithmic
    state_size: float = (
        0.0  # numbers that a sequence's history is held in, over all layers; 0: it grows with the context
    )
    bits_per_byte: float | None = None
    seconds: float | None = None  # device-seconds of training, over the trunk and this branch
    device: str = ""
    devices: int = 1
    runners: int = 1  # that shared the device, at most; with several, `seconds` is no measure of the mixer's speed
    # Summed nats of each part of a document that an evaluation sequence holds, in their order; of each whole sequence
    # where data.document_mask=false.
    document_loss: tuple[float, ...] = ()
    document_tokens: tuple[int, ...] = ()  # evaluated tokens of each of these
    # Number in the validation split of the document that each of these is of, or most of it; empty: not recorded.
    document_numbers: tuple[int, ...] = ()
    position_bounds: tuple[int, ...] = ()  # upper bounds of the position buckets, exclusive
    position_loss: tuple[tuple[float, ...], ...] = ()  # summed nats, (evaluation sequence, bucket)
    position_tokens: tuple[tuple[int, ...], ...] = ()  # tokens, (evaluation sequence, bucket)
    curve: tuple[CurvePoint, ...] = ()
    data: dict[str, str] = field(default_factory=dict)  # fingerprints: of the tokens, their order, the evaluation
    environment: dict[str, str] = field(default_factory=dict)  # versions, commit; of the last process
    # The processes that trained it, its part of the trunk too, in their order; empty: not recorded.
    starts: tuple[Start, ...] = ()

    def __post_init__(self) -> None:
        optional = {k: v for k in ("seconds", "bits_per_byte") if (v := getattr(self, k)) is not None}
        for name, value in {**{k: getattr(self, k) for k in _ABOVE_ZERO}, **optional, **self.flops_per_token}.items():
            if not 0 < value < math.inf:
                raise ValueError(f"{name}={value:g} must be a number above 0")
        missing = set(CONVENTIONS) - set(self.flops_per_token)
        if missing:
            raise ValueError(f"flops_per_token lacks {', '.join(sorted(missing))}")
        if len(self.document_loss) != len(self.document_tokens):
            raise ValueError(
                f"document_loss has {len(self.document_loss)} entries and document_tokens {len(self.document_tokens)}"
            )
        if self.document_numbers and len(self.document_numbers) != len(self.document_tokens):
            raise ValueError(
                f"document_numbers has {len(self.document_numbers)} entries and document_tokens "
                f"{len(self.document_tokens)}"
            )
        total = sum(self.document_tokens)
        if min(self.document_tokens, default=1) < 1:
            raise ValueError("document_tokens must be at least 1 each")
        if total and not abs(sum(self.document_loss) / total - self.loss) <= 1e-5 * self.loss:
            raise ValueError(
                f"loss={self.loss:g} is not the mean {sum(self.document_loss) / total:g} over the documents' tokens"
            )
        if len(self.position_loss) != len(self.position_tokens):
            raise ValueError(
                f"position_loss has {len(self.position_loss)} rows and position_tokens {len(self.position_tokens)}"
            )
        if {len(row) for row in (*self.position_loss, *self.position_tokens)} - {len(self.position_bounds)}:
            raise ValueError(f"position_loss and position_tokens must have {len(self.position_bounds)} columns")
        points = [x for p in self.curve for x in (p.tokens, p.loss, p.seconds or 0.0)]
        if not all(map(math.isfinite, itertools.chain(self.document_loss, *self.position_loss, points))):
            raise ValueError("losses must be finite, and so must be the curve's tokens and seconds")

    @property
    def environments(self) -> list[dict[str, str]]:
        """Versions and commit of every process that is known."""
        return [s.environment for s in self.starts] or [self.environment]

    @property
    def place(self) -> Place:
        """Context, budget and mixer: what a recipe asks cells for."""
        return self.context, self.budget, self.mixer

    def flops(self, convention: Convention) -> float:
        """Return the training FLOPs of the cell under one convention."""
        return self.tokens * self.flops_per_token[convention]


def to_json(record: CellRecord) -> str:
    """Return one line of JSON that `from_json` reads back to an equal record."""
    values = dataclasses.asdict(record)
    # Columns instead of one object per point: a curve is most of a record's size.
    values["curve"] = {f.name: [getattr(p, f.name) for p in record.curve] for f in dataclasses.fields(CurvePoint)}
    return json.dumps({"version": VERSION, **values}, sort_keys=True, separators=(",", ":"), allow_nan=False)


def from_json(text: str) -> CellRecord:
    """Read a record.

    Errors:
        ConfigError: not JSON, another version, unknown or missing fields.
    """
    try:
        values: Mapping[str, Any] = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"not a record: {error}") from error
    if not isinstance(values, dict) or values.get("version") != VERSION:
        found = values.get("version") if isinstance(values, dict) else None
        raise ConfigError(f"record version {found!r} cannot be read: this program reads version {VERSION}")
    values = {key: value for key, value in values.items() if key != "version"}
    columns = values.get("curve", {})
    try:
        values["curve"] = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError("curve must be lists of one length, by their names") from error
    return build(CellRecord, values)


class RecordStore:
    """The records of one sweep in a directory: `<cell>.json`, created once and never changed.

    One file per cell, so that two machines' records merge by copying (or by git), and so that creation is exclusive on
    any file system, network ones included.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def path(self, cell: str) -> Path:
        """Return where the record of a cell is, or would be."""
        return self.directory / f"{cell}.json"

    def __contains__(self, cell: str) -> bool:
        return self.path(cell).is_file()

    def finished(self) -> set[str]:
        """Return the ids of all cells that have a record."""
        return {path.stem for path in self.directory.glob("*.json")}

    def append(self, record: CellRecord) -> bool:
        """Write a record durably, unless the cell has one already.

        Returns:
            False where another runner's record was there first; that one stays.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        return write_new_file(self.path(record.cell), to_json(record) + "\n")

    def read_one(self, cell: str) -> CellRecord:
        """Return the record of a cell.

        Errors:
            ConfigError: names the file that cannot be read.
        """
        path = self.path(cell)
        try:
            record = from_json(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{path}: {error}") from error
        if record.cell != cell:
            raise ConfigError(f"{path}: holds the record of cell {record.cell!r}")
        return record

    def read(self) -> list[CellRecord]:
        """Return all records, ordered by cell id; errors as `read_one`."""
        return [self.read_one(cell) for cell in sorted(self.finished())]


# One row per cell; what `table.parquet` holds.
_COLUMNS = (
    *("cell", "sweep", "mixer", "size", "context", "budget", "seed", "learning_rate", "learning_rate_factor"),
    *("batch_tokens", "batch_factor", "steps", "tokens", "parameters", "parameters_total", "state_size", "annealed"),
    *("loss", "bits_per_byte", "seconds", "device", "devices"),
)


def table(records: Iterable[CellRecord]) -> Any:
    """Return records as a `pyarrow.Table`, one row per cell in order of context, mixer, budget, parameters and cell."""
    import pyarrow

    ordered = sorted(records, key=lambda r: (r.context, r.mixer, r.budget, r.parameters, r.cell))
    columns: dict[str, list[Any]] = {name: [getattr(r, name) for r in ordered] for name in _COLUMNS}
    columns["perplexity"] = [math.exp(r.loss) for r in ordered]
    for convention in CONVENTIONS:
        columns[f"flops ({convention})"] = [r.flops(convention) for r in ordered]
    parts = sorted({part for r in ordered for part in r.flops_by_part})
    for part in parts:
        columns[f"flops per token: {part}"] = [r.flops_by_part.get(part) for r in ordered]
    return pyarrow.table(columns)

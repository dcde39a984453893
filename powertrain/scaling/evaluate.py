"""How a finished cell is measured: losses by document and by position, of the same tokens for every cell."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from powertrain.scaling.records import CurvePoint

if TYPE_CHECKING:
    from powertrain.data.datamodule import TokenDataModule
    from powertrain.data.packing import Windows
    from powertrain.models.gpt import GPT

# Training losses are averaged over this ratio in tokens: finer than a line in a figure, coarser than a step.
CURVE_BIN = 1.03
# Samples whose order identifies the order of all: the permutation is a function of its seed alone.
ORDER_SAMPLES = 4096


@dataclass(frozen=True)
class Measurement:
    """Sums over evaluation tokens, in nats."""

    document_loss: tuple[float, ...]
    document_tokens: tuple[int, ...]
    document_numbers: tuple[int, ...]
    position_bounds: tuple[int, ...]
    position_loss: tuple[tuple[float, ...], ...]
    position_tokens: tuple[tuple[int, ...], ...]
    bytes: int
    fingerprint: str

    @property
    def loss(self) -> float:
        """Mean over all tokens, nats per token."""
        return math.fsum(self.document_loss) / sum(self.document_tokens)

    @property
    def bits_per_byte(self) -> float | None:
        """Bits per UTF-8 byte of the evaluated text."""
        return math.fsum(self.document_loss) / math.log(2) / self.bytes if self.bytes else None


def position_bounds(context: int, buckets: int) -> tuple[int, ...]:
    """Return upper bounds (exclusive) of position buckets, each half of the next, the last one the context."""
    bounds = [context]
    while len(bounds) < buckets and bounds[0] > 1:
        bounds.insert(0, -(-bounds[0] // 2))
    return tuple(bounds)


def sum_by_document(
    losses: NDArray[np.float64], counted: NDArray[np.bool_], offsets: NDArray[np.int64], bounds: tuple[int, ...]
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
    """Sum the losses of one sequence by document and by position in the document.

    Args:
        losses: (T,) nats.
        counted: (T,) whether a token has a label.
        offsets: (M,) starts of the documents, rising from 0, below T.
        bounds: upper bounds of the position buckets.
    Returns:
        loss and tokens by document (M,), loss and tokens by bucket (P,).
    """
    index = np.arange(losses.size)
    document = np.searchsorted(offsets, index, side="right") - 1
    bucket = np.minimum(np.searchsorted(bounds, index - offsets[document], side="right"), len(bounds) - 1)
    values = np.where(counted, losses, 0.0)
    return (
        np.bincount(document, values, len(offsets)).astype(np.float64),
        np.bincount(document, counted, len(offsets)).astype(np.int64),
        np.bincount(bucket, values, len(bounds)).astype(np.float64),
        np.bincount(bucket, counted, len(bounds)).astype(np.int64),
    )


def document_starts(windows: Windows) -> NDArray[np.int64]:
    """Return where the documents of a split begin in its stream, (D,) rising from 0, as far as its windows reach."""
    context = windows.context_length
    return np.concatenate([number * context + windows[number].begins for number in range(len(windows))])


def documents_of(starts: NDArray[np.int64], first: int, length: int, offsets: NDArray[np.int64]) -> list[int]:
    """Return the number of the document that each part of a sequence is of, or most of it.

    Args:
        starts: see `document_starts`.
        first: position of the sequence in the stream.
        length: of the sequence.
        offsets: (M,) where its parts begin, rising from 0.
    """
    number = np.searchsorted(starts, first + np.arange(length), side="right") - 1
    return [int(part[0] + np.bincount(part - part[0]).argmax()) for part in np.split(number, offsets[1:])]


def measure(model: GPT, data: TokenDataModule, *, precision: str, device: Any, buckets: int) -> Measurement:
    """Evaluate a model on the evaluation tokens of `data`, one sequence at a time.

    Args:
        model: in evaluation mode, on `device`.
        data: its validation split, up to `data.max_val_tokens`.
        precision: as in training, so that evaluation is what training saw.
        buckets: of the position in the document.
    Errors:
        ValueError: a loss is not finite.
    """
    import torch

    from powertrain.training.metrics import IGNORE_INDEX
    from powertrain.training.nonfinite import autocast

    bounds = position_bounds(data.context_length, buckets)
    data.micro_batch_size = 1
    digest = hashlib.sha256()
    document_loss: list[float] = []
    document_tokens: list[int] = []
    document_numbers: list[int] = []
    position_loss: list[tuple[float, ...]] = []
    position_tokens: list[tuple[int, ...]] = []
    total_bytes = 0
    starts = document_starts(data.val_windows)
    for sequence, batch in enumerate(data.val_dataloader()):
        on_device = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        with torch.no_grad(), autocast(precision, torch.device(device).type):
            output = model(
                on_device["input_ids"],
                labels=on_device["labels"],
                cu_seqlens=on_device["cu_seqlens"],
                loss_reduction="none",
            )
        losses = output.loss.float().cpu().numpy().astype(np.float64).reshape(-1)
        labels = batch["labels"].numpy().reshape(-1)
        offsets = np.unique(batch["cu_seqlens"].numpy().astype(np.int64))
        offsets = offsets[offsets < labels.size]
        counted = labels != IGNORE_INDEX
        if not np.isfinite(losses[counted]).all():
            raise ValueError("the trained model's loss on evaluation text is not finite")
        by_document, tokens, by_bucket, bucket_tokens = sum_by_document(losses, counted, offsets, bounds)
        window = sequence * len(data.val_windows) // data.num_val_windows
        inputs = batch["input_ids"].numpy().reshape(-1)
        assert np.array_equal(data.val_windows[window].tokens[:-1], inputs), "the loader takes other windows"
        numbers = documents_of(starts, window * data.context_length, labels.size, offsets)
        for loss, count, number in zip(by_document.tolist(), tokens.tolist(), numbers, strict=True):
            if count:
                document_loss.append(loss)
                document_tokens.append(count)
                document_numbers.append(number)
        position_loss.append(tuple(by_bucket.tolist()))
        position_tokens.append(tuple(bucket_tokens.tolist()))
        total_bytes += int(batch["label_bytes"].sum())
        digest.update(inputs.tobytes())
        digest.update(offsets.tobytes())
    return Measurement(
        tuple(document_loss),
        tuple(document_tokens),
        tuple(document_numbers),
        bounds,
        tuple(position_loss),
        tuple(position_tokens),
        total_bytes,
        digest.hexdigest()[:16],
    )


def order_fingerprint(data: TokenDataModule) -> str:
    """Return what identifies the order of training samples: the first ones' windows, and the data they are of."""
    from powertrain.data.order import SampleOrder

    order = SampleOrder(len(data.train_windows), data.seed)
    windows = [order.window(sample) for sample in range(ORDER_SAMPLES)]
    text = f"{data.fingerprint} {data.context_length} {windows}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def training_curve(metrics: list[dict[str, Any]], decay_start: int, devices: int) -> tuple[CurvePoint, ...]:
    """Return the losses along a run: training losses averaged over 3 % more tokens each, validation losses as they are.

    Args:
        metrics: records of the run's metrics.jsonl.
        decay_start: last step before the learning rate falls.
        devices: seconds are counted on each.
    """
    groups: dict[tuple[bool, int], list[tuple[float, float, float]]] = {}
    points: list[CurvePoint] = []
    for record in metrics:
        tokens, annealed = float(record["tokens"]), record["step"] > decay_start
        seconds = float(record["seconds"]) * devices
        if record.get("train/loss") is not None:
            key = annealed, math.floor(math.log(tokens) / math.log(CURVE_BIN))
            groups.setdefault(key, []).append((tokens, float(record["train/loss"]), seconds))
        if record.get("val/loss") is not None:
            points.append(CurvePoint(tokens, float(record["val/loss"]), seconds, annealed, "val"))
    for (annealed, _), members in groups.items():
        tokens, loss, seconds = (math.fsum(column) / len(members) for column in zip(*members, strict=True))
        points.append(CurvePoint(tokens, loss, seconds, annealed, "train"))
    return tuple(sorted(points, key=lambda p: (p.tokens, p.kind)))

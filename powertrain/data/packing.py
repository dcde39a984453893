"""Sequences cut from a stream of documents, and batches made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from .shards import TokenStream

IGNORE = -100
Batch = dict[str, torch.Tensor]


class Window(NamedTuple):
    """T inputs with their next tokens: tokens (T + 1,) int64, and the inputs that begin a document, (M,) int64."""

    tokens: np.ndarray
    begins: np.ndarray


class Windows:
    """The windows of a split: window i holds inputs i T .. i T + T of the stream; a shorter rest is left out.

    The end-of-document id stands once between two documents: as the label of the last token of one, and as the first
    input of the next, where it tells nothing of what came before. So every token of a document and its end are
    predicted once, nothing crosses a boundary, and no position is without a label.
    """

    def __init__(self, stream: TokenStream, context_length: int) -> None:
        self.stream = stream
        self.context_length = context_length

    def __len__(self) -> int:
        return self.stream.num_tokens // self.context_length

    def __getitem__(self, index: int) -> Window:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = index * self.context_length
        tokens, begins = self.stream.read(start, start + self.context_length + 1)
        return Window(tokens, begins[begins < self.context_length])


def make_batch(
    rows: Sequence[Window | None],
    context_length: int,
    *,
    document_mask: bool,
    token_bytes: np.ndarray | None = None,
) -> Batch:
    """Return the batch of `rows` (see docs/architecture.md).

    A row that is None fills the batch: its labels are all ignored. `token_bytes` (vocab_size,) adds `label_bytes`.
    Without `document_mask`, only row starts are boundaries.
    """
    tokens = np.zeros((len(rows), context_length + 1), dtype=np.int64)
    begins = [np.arange(len(rows), dtype=np.int64) * context_length]
    for number, row in enumerate(rows):
        if row is not None:
            tokens[number] = row.tokens
            if document_mask:
                begins.append(row.begins + number * context_length)
    # Contiguous copies: views of one array would travel to a GPU twice.
    inputs, labels = tokens[:, :-1].copy(), tokens[:, 1:].copy()
    labels[[row is None for row in rows]] = IGNORE
    batch = {
        "input_ids": torch.from_numpy(inputs),
        "labels": torch.from_numpy(labels),
        "cu_seqlens": torch.from_numpy(_offsets(np.concatenate(begins), inputs.size)),
    }
    if token_bytes is not None:
        label_bytes = np.where(labels == IGNORE, 0, token_bytes[np.maximum(labels, 0)])
        batch["label_bytes"] = torch.from_numpy(label_bytes.astype(np.int32))
    return batch


def _offsets(begins: np.ndarray, total: int) -> np.ndarray:
    """Return sorted distinct offsets closed by `total`, padded with it to a power of two, (M,) int32."""
    unique = np.unique(begins)
    # Few distinct lengths, so that a compiled model meets few shapes.
    size = 1 << len(unique).bit_length()
    offsets = np.full(size, total, dtype=np.int32)
    offsets[: len(unique)] = unique
    return offsets

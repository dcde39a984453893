from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch

from powertrain.data.config import DataConfig
from powertrain.data.packing import IGNORE, Window, Windows, make_batch
from powertrain.data.prepare import prepare
from powertrain.data.shards import TokenStream

T = 512


@pytest.fixture
def stream(text_config: Callable[..., DataConfig]) -> TokenStream:
    return prepare(text_config(shard_tokens=500)).split("train")


@pytest.mark.parametrize("length", [1, 32, T])
def test_windows_tile_the_stream(stream: TokenStream, length: int) -> None:
    windows = Windows(stream, length)
    assert len(windows) == stream.num_tokens // length
    documents = [stream.document(n).tolist() for n in range(stream.num_documents)]
    expected = [t for document in documents for t in [stream.eod_id, *document]] + [stream.eod_id]
    joined = []
    for i in range(len(windows)):
        tokens, begins = windows[i]
        assert tokens.tolist() == expected[i * length : i * length + length + 1]
        assert begins.tolist() == [p for p in range(length) if tokens[p] == stream.eod_id]
        joined += tokens[:-1].tolist()
    assert joined == expected[: len(windows) * length]
    for wrong in (-1, len(windows)):
        with pytest.raises(IndexError):
            windows[wrong]


def test_last_window_may_end_with_the_last_document(stream: TokenStream) -> None:
    windows = Windows(stream, stream.num_tokens)
    assert len(windows) == 1
    assert windows[0].tokens[-1] == stream.eod_id
    assert len(windows[0].begins) == stream.num_documents
    assert len(Windows(stream, stream.num_tokens + 1)) == 0


def batch_of(stream: TokenStream, rows: int, **options: bool) -> dict[str, torch.Tensor]:
    windows = Windows(stream, T)
    mask = {"document_mask": True, **options}
    return make_batch([windows[i] for i in range(rows)], T, **mask)  # type: ignore[arg-type]


def test_contract(stream: TokenStream) -> None:
    batch = batch_of(stream, 6)
    assert set(batch) == {"input_ids", "labels", "cu_seqlens"}
    for name in ("input_ids", "labels"):
        assert batch[name].shape == (6, T)
        assert batch[name].dtype == torch.int64
        assert batch[name].is_contiguous()
    assert (batch["labels"][:, :-1] == batch["input_ids"][:, 1:]).all()
    offsets = batch["cu_seqlens"]
    assert offsets.dtype == torch.int32
    assert offsets[0] == 0
    assert offsets[-1] == 6 * T
    assert (offsets.diff() >= 0).all()
    assert set(range(0, 6 * T, T)) <= set(offsets.tolist())
    inner = set(offsets.tolist()) - {6 * T}
    begins = torch.nonzero(batch["input_ids"].flatten() == stream.eod_id).flatten().tolist()
    assert inner == set(range(0, 6 * T, T)) | set(begins)
    # Padding is at the end only, to a power of two.
    assert len(offsets) & (len(offsets) - 1) == 0
    distinct = offsets.unique()
    assert (offsets[: len(distinct)] == distinct).all()
    assert len(offsets) < 2 * len(distinct)


def test_every_token_of_a_document_and_its_end_are_predicted_inside_it(stream: TokenStream) -> None:
    """Labels of a segment, read off cu_seqlens, are one document and its end (or a part of it at a row's edge)."""
    batch = batch_of(stream, 8)
    inputs, labels = batch["input_ids"].flatten(), batch["labels"].flatten()
    offsets = batch["cu_seqlens"].unique().tolist()
    whole = {tuple(stream.document(n).tolist()) for n in range(stream.num_documents)}
    found = 0
    for start, stop in itertools.pairwise(offsets):
        segment = labels[start:stop].tolist()
        assert stream.eod_id not in inputs[start + 1 : stop]
        assert stream.eod_id not in segment[:-1]
        if inputs[start] == stream.eod_id and segment[-1] == stream.eod_id:
            assert tuple(segment[:-1]) in whole
            found += 1
    assert found > 0


def test_without_document_mask_only_rows_are_boundaries(stream: TokenStream) -> None:
    masked, plain = batch_of(stream, 6), batch_of(stream, 6, document_mask=False)
    assert plain["cu_seqlens"].unique().tolist() == list(range(0, 6 * T + 1, T))
    for name in ("input_ids", "labels"):
        assert (plain[name] == masked[name]).all()


def test_documents_of_one_token() -> None:
    row = Window(np.array([9, 1, 9, 2, 9]), np.array([0, 2]))
    batch = make_batch([row], 4, document_mask=True)
    assert batch["cu_seqlens"].tolist() == [0, 2, 4, 4]


def test_filling_rows_count_for_nothing(stream: TokenStream) -> None:
    row = Windows(stream, T)[0]
    token_bytes = np.ones(257, dtype=np.int32)
    token_bytes[256] = 0
    batch = make_batch([row, None, None], T, document_mask=True, token_bytes=token_bytes)
    assert (batch["labels"][1:] == IGNORE).all()
    assert (batch["label_bytes"][1:] == 0).all()
    assert batch["label_bytes"].dtype == torch.int32
    assert batch["label_bytes"][0].tolist() == [0 if t == 256 else 1 for t in row.tokens[1:]]
    assert {0, T, 2 * T, 3 * T} <= set(batch["cu_seqlens"].tolist())
    only = make_batch([None], T, document_mask=True, token_bytes=token_bytes)
    assert only["label_bytes"].sum() == 0

"""From documents to token shards: prepared once per corpus and tokenizer, by one process, whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from powertrain.cache_directory import cache_directory
from powertrain.files import fsync
from powertrain.processes import local_rank
from powertrain.wording import counted

from .config import DataConfig
from .progress import Progress, say
from .shards import FORMAT, MANIFEST, SPLITS, ShardWriter, TokenStore
from .sources import Source, open_source
from .tokenizers import Tokenizer, byte_tokenizer, pretrained_identity, pretrained_tokenizer, train_bpe

# Characters that are tokenized at once: enough for all cores also of long documents, and little memory.
_BATCH_CHARACTERS = 16 << 20
# How long other local ranks let rank 0, whose terminal shows progress, take the lock first.
_HEAD_START_SECONDS = 10.0

# Split and text, or None with a part of a text that is not its last.
_Piece: TypeAlias = tuple[str, str] | None


def prepare(config: DataConfig, cache_dir: str | Path | None = None) -> TokenStore:
    """Return the tokens of the corpus that `config` describes, prepared now or by an earlier call.

    Any number of processes may call it at once: one prepares, the others wait. `ValueError` for a source without
    documents; `ShardError` when tokens on disk are damaged.
    """
    source = open_source(config)
    directory = _directory(config, source, cache_dir)
    if (directory / MANIFEST).exists():
        return TokenStore(directory)
    root = directory.parent
    root.mkdir(parents=True, exist_ok=True)
    _give_rank_zero_a_head_start(directory)
    with _lock(directory.with_suffix(".lock")):
        if not (directory / MANIFEST).exists():
            _remove_leftovers(directory)
            _prepare(config, source, directory)
    return TokenStore(directory)


def prepared(config: DataConfig, cache_dir: str | Path | None = None) -> TokenStore | None:
    """Return what `prepare` has made of this corpus earlier, without preparing it; None where it has not."""
    directory = _directory(config, open_source(config), cache_dir)
    return TokenStore(directory) if (directory / MANIFEST).exists() else None


def _directory(config: DataConfig, source: Source, cache_dir: str | Path | None) -> Path:
    root = Path(cache_dir or cache_directory()).expanduser() / "data"
    return root / f"{config.source}-{_key(config, source)}"


def _key(config: DataConfig, source: Source) -> str:
    """Return the name of prepared tokens: a hash of all that decides their content."""
    tokenizer = asdict(config.tokenizer)
    if config.tokenizer.kind == "pretrained":
        tokenizer = {"pretrained": pretrained_identity(config.tokenizer), "eod": config.tokenizer.eod}
    elif config.tokenizer.kind == "bytes":
        tokenizer = {"bytes": True}
    content = {
        "format": FORMAT,
        "source": source.identity,
        "tokenizer": tokenizer,
        "split": [config.split, config.val_fraction, config.split_seed],
        "deduplicate": config.deduplicate,
        "shard_tokens": config.shard_tokens,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _give_rank_zero_a_head_start(directory: Path) -> None:
    if local_rank() == 0:
        return
    until = time.monotonic() + _HEAD_START_SECONDS
    lock = directory.with_suffix(".lock")
    while time.monotonic() < until and not lock.exists() and not (directory / MANIFEST).exists():
        time.sleep(0.05)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold the lock file `path`; the operating system releases it when its holder dies."""
    import filelock

    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        say(f"waiting for another process that prepares these data (lock {path})")
        lock.acquire(timeout=-1, poll_interval=0.2)
    try:
        yield
    finally:
        lock.release()


def _remove_leftovers(directory: Path) -> None:
    """Remove what killed preparations left; only the holder of the lock may call it."""
    for leftover in directory.parent.glob(f"{directory.name}.tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    if directory.exists():
        shutil.rmtree(directory)


def _prepare(config: DataConfig, source: Source, directory: Path) -> None:
    temporary = directory.parent / f"{directory.name}.tmp-{os.getpid()}"
    temporary.mkdir()
    start = time.monotonic()
    try:
        manifest = _write(config, source, temporary)
        os.replace(temporary, directory)
        fsync(directory.parent)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OSError(
                errno.ENOSPC, f"no space is left for prepared tokens in {directory.parent}; set paths.cache"
            ) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    total = {
        name: sum(split[name] for split in manifest["splits"].values()) for name in ("bytes", "tokens", "duplicates")
    }
    left_out = {**manifest["skipped"], "duplicate": total["duplicates"]}
    reasons = "".join(f", {count:,} {reason} left out" for reason, count in sorted(left_out.items()) if count)
    say(
        f"prepared {documents_in(manifest)}, {total['bytes'] / 1e6:,.1f} MB, "
        f"{counted(total['tokens'], 'token')} in {time.monotonic() - start:.1f} s{reasons}: {directory}"
    )


def documents_in(manifest: Mapping[str, Any]) -> str:
    """Return in words how many documents the splits hold; those of `data.split=tail` hold parts of them."""
    train, validation = (manifest["splits"][split]["documents"] for split in SPLITS)
    if manifest["config"]["split"] == "document":
        return counted(train + validation, "document")
    return f"{counted(train, 'beginning')} and {counted(validation, 'end')} of documents"


def _write(config: DataConfig, source: Source, directory: Path) -> dict[str, Any]:
    """Write the whole corpus into `directory`; return its manifest."""
    with Progress(source.total_bytes) as progress:
        tokenizer = _make_tokenizer(config, source, progress)
        lengths = tokenizer.token_bytes
        text_bytes = token_bytes = 0
        writer = ShardWriter(directory, tokenizer, config.shard_tokens)
        for split, text, tokens in _encoded(tokenizer, progress.watch(_pieces(config, source), "tokenizing")):
            data = text.encode()
            digest = hashlib.blake2b(data, digest_size=16).digest()
            text_bytes += len(data)
            token_bytes += int(lengths[tokens].sum())
            writer.add(split, digest, tokens, len(data))
        _check_splits(config, source, writer.num_documents)
        if token_bytes != text_bytes:
            say(
                f"the tokenizer changes text: its tokens stand for {token_bytes:,} of {text_bytes:,} bytes, "
                "so bits per byte is not that of the original text"
            )
        progress.describe("finishing")
        record = {
            "config": asdict(config),
            "source": {k: v for k, v in source.identity.items() if k != "files"},
            "skipped": dict(source.skipped),
        }
        return writer.finish(deduplicate=config.deduplicate, record=record)


def _check_splits(config: DataConfig, source: Source, documents: dict[str, int]) -> None:
    total = sum(documents.values())
    if total == 0:
        left_out = ", ".join(f"{count} {reason}" for reason, count in sorted(source.skipped.items())) or "none left out"
        raise ValueError(f"data.source={config.source} has no document with text ({left_out})")
    for split, count in documents.items():
        if count == 0:
            raise ValueError(
                f"the {split} split is empty: {counted(total, 'document')} with "
                f"data.val_fraction={config.val_fraction:g}; choose another share, or data.split=tail to "
                "validate on the end of each document"
            )


def _make_tokenizer(config: DataConfig, source: Source, progress: Progress) -> Tokenizer:
    wanted = config.tokenizer
    if wanted.kind == "bytes":
        return byte_tokenizer()
    if wanted.kind == "pretrained":
        assert wanted.path is not None
        return pretrained_tokenizer(wanted.path, revision=wanted.revision, eod=wanted.eod)
    pieces = progress.watch(_pieces(config, source), "training the tokenizer")
    return train_bpe(_limited(pieces, wanted.train_bytes), wanted.vocab_size)


def _limited(pieces: Iterator[tuple[str, str]], num_bytes: int) -> Iterator[str]:
    """Yield the texts of the training split until they hold `num_bytes`; one that alone is longer is cut there."""
    left = num_bytes
    for split, text in pieces:
        if split == "train":
            data = text.encode()
            yield text if len(data) <= num_bytes else data[:num_bytes].decode(errors="ignore")
            left -= len(data)
            if left <= 0:
                return


def _pieces(config: DataConfig, source: Source) -> Iterator[tuple[str, str]]:
    """Yield (split, text) for every document that is not empty."""
    for text in source:
        if not text:
            source.skipped["empty"] += 1
        elif config.split == "document":
            yield split_of(text, config.val_fraction, config.split_seed), text
        else:
            cut = round(len(text) * (1 - config.val_fraction))
            yield from ((s, t) for s, t in (("train", text[:cut]), ("validation", text[cut:])) if t)


def split_of(text: str, val_fraction: float, seed: int) -> str:
    """Return the split of a document: a function of its words and the seed alone, so copies never straddle."""
    # Copies of one text often differ in white space only; they count as one text here.
    words = " ".join(text.split()).encode()
    digest = hashlib.blake2b(words, digest_size=8, key=seed.to_bytes(8, "little")).digest()
    return "validation" if int.from_bytes(digest, "little") < val_fraction * 2**64 else "train"


def _encoded(tokenizer: Tokenizer, pieces: Iterator[tuple[str, str]]) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yield (split, text, tokens) in order; one batch is tokenized on all cores while its neighbours are read and
    written on one.
    """
    tokens: list[np.ndarray] = []
    for piece, part in _encoded_parts(tokenizer, pieces):
        tokens.append(part)
        if piece is not None:
            yield *piece, part if len(tokens) == 1 else np.concatenate(tokens)
            tokens = []


def _encoded_parts(tokenizer: Tokenizer, pieces: Iterator[tuple[str, str]]) -> Iterator[tuple[_Piece, np.ndarray]]:
    """Yield the tokens of each part of each piece, with the last part the piece."""
    waiting: list[_Piece] = []
    with ThreadPoolExecutor(1) as pool:
        encoding: Future[list[np.ndarray]] | None = None
        for batch in _batches(_parts(tokenizer, pieces)):
            following = pool.submit(tokenizer.encode_batch, [part for _, part in batch])
            if encoding is not None:
                yield from zip(waiting, encoding.result(), strict=True)
            waiting, encoding = [piece for piece, _ in batch], following
        if encoding is not None:
            yield from zip(waiting, encoding.result(), strict=True)


def _parts(tokenizer: Tokenizer, pieces: Iterator[tuple[str, str]]) -> Iterator[tuple[_Piece, str]]:
    for piece in pieces:
        *parts, last = tokenizer.parts(piece[1])
        yield from ((None, part) for part in parts)
        yield piece, last


def _batches(parts: Iterator[tuple[_Piece, str]]) -> Iterator[list[tuple[_Piece, str]]]:
    batch: list[tuple[_Piece, str]] = []
    characters = 0
    for piece, part in parts:
        batch.append((piece, part))
        characters += len(part)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch

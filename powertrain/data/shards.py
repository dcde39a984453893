"""Token shards on disk: written once, whole or not at all, and read through memory maps.

A directory holds `tokens-00000.bin`, ... (raw little-endian uint16 or uint32; each document is the end-of-document id
followed by its tokens), one index per split, the tokenizer, and `manifest.json`, which is written last and names every
file with its size and checksum.

An index is a (4, D + 1) int64 array, its columns the D documents of the split in reading order, its rows: position of
the document's first token in the split, shard number, offset in the shard in tokens, and UTF-8 bytes of the text. The
last column closes it: total tokens, then zeros, then total bytes.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from array import array
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from powertrain.files import fsync, sha256_file, write_file

from .tokenizers import Tokenizer, load_tokenizer

FORMAT = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "validation")
# Reading this much to compare checksums costs well under a second; above it only sizes are compared on opening.
_VERIFY_BYTES = 256 << 20
# Shards of a split that are open at once, each by one descriptor, of which a process often may have 1,024.
_OPEN_SHARDS = 256


class ShardError(RuntimeError):
    """Prepared tokens that cannot be trusted: missing, truncated or changed since they were written."""


def _damaged(path: Path, what: str) -> ShardError:
    return ShardError(f"prepared tokens are damaged: {path} {what}; delete {path.parent} to prepare them again")


@dataclass
class _SplitColumns:
    """What is known of one split's documents, in the order they were written."""

    digests: bytearray
    shard: array[int]
    offset: array[int]
    length: array[int]
    num_bytes: array[int]


class ShardWriter:
    """Writes documents into `directory`, one shard file after another; `finish` makes the directory whole."""

    def __init__(self, directory: Path, tokenizer: Tokenizer, shard_tokens: int) -> None:
        self.directory = directory
        self.tokenizer = tokenizer
        self.shard_tokens = shard_tokens
        self.dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
        self._eod = np.array([tokenizer.eod_id], dtype=self.dtype).tobytes()
        self._columns = {split: _SplitColumns(bytearray(), *(array("q") for _ in range(4))) for split in SPLITS}
        self._shard = -1
        self._used = 0
        self._file: IO[bytes] | None = None

    def add(self, split: str, digest: bytes, tokens: np.ndarray, num_bytes: int) -> None:
        """Append one document: its 16-byte content digest, ids (n,) and the UTF-8 bytes of its text."""
        if self._file is None or self._used >= self.shard_tokens:
            self._close_shard()
            self._shard += 1
            self._file = open(self.directory / f"tokens-{self._shard:05d}.bin", "wb")  # noqa: SIM115 - closed later
            self._used = 0
        self._file.write(self._eod)
        self._file.write(tokens.astype(self.dtype).tobytes())
        columns = self._columns[split]
        columns.digests += digest
        columns.shard.append(self._shard)
        columns.offset.append(self._used)
        columns.length.append(len(tokens) + 1)
        columns.num_bytes.append(num_bytes)
        self._used += len(tokens) + 1

    @property
    def num_documents(self) -> dict[str, int]:
        return {split: len(columns.length) for split, columns in self._columns.items()}

    def _close_shard(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def finish(self, *, deduplicate: bool, record: dict[str, Any]) -> dict[str, Any]:
        """Write indexes, tokenizer and, last, the manifest with `record` in it; return it when all is on disk."""
        self._close_shard()
        content = hashlib.sha256(f"{FORMAT}/{self.tokenizer.fingerprint}".encode())
        splits = {split: self._write_index(split, deduplicate, content) for split in SPLITS}
        self.tokenizer.save(self.directory)
        files = {}
        for path in sorted(self.directory.iterdir()):
            fsync(path)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        manifest = {
            "format": FORMAT,
            "fingerprint": content.hexdigest()[:32],
            "dtype": self.dtype.name,
            "vocab_size": self.tokenizer.vocab_size,
            "eod_id": self.tokenizer.eod_id,
            "num_shards": self._shard + 1,
            "splits": splits,
            "files": files,
            **record,
        }
        write_file(self.directory / MANIFEST, json.dumps(manifest, indent=1))
        fsync(self.directory)
        return manifest

    def _write_index(self, split: str, deduplicate: bool, content: Any) -> dict[str, int]:
        columns = self._columns[split]
        keys = np.frombuffer(bytes(columns.digests), dtype=">u8").reshape(-1, 2)
        # Reading order is the order of content digests: it depends on the documents, not on how they were listed.
        order = np.lexsort((keys[:, 1], keys[:, 0]))
        duplicates = 0
        if deduplicate and len(order):
            fresh = np.ones(len(order), dtype=bool)
            fresh[1:] = (keys[order[1:]] != keys[order[:-1]]).any(axis=1)
            duplicates = int((~fresh).sum())
            order = order[fresh]
        length = np.frombuffer(columns.length, dtype=np.int64)[order]
        num_bytes = np.frombuffer(columns.num_bytes, dtype=np.int64)[order]
        index = np.zeros((4, len(order) + 1), dtype=np.int64)
        index[0, 1:] = np.cumsum(length)
        index[1, :-1] = np.frombuffer(columns.shard, dtype=np.int64)[order]
        index[2, :-1] = np.frombuffer(columns.offset, dtype=np.int64)[order]
        index[3, :-1] = num_bytes
        index[3, -1] = num_bytes.sum()
        np.save(self.directory / f"{split}.index.npy", index)
        content.update(split.encode() + keys[order].tobytes() + length.tobytes())
        return {
            "documents": len(order),
            "tokens": int(index[0, -1]),
            "bytes": int(index[3, -1]),
            "duplicates": duplicates,
        }


class TokenStore:
    """Prepared tokens of one corpus: counts, the tokenizer, and both splits as streams of tokens."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.manifest = _read_manifest(self.directory)
        _verify(self.directory, self.manifest)
        self.vocab_size: int = self.manifest["vocab_size"]
        self.eod_id: int = self.manifest["eod_id"]
        self.fingerprint: str = self.manifest["fingerprint"]

    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.directory)

    def split(self, name: str) -> TokenStream:
        assert name in SPLITS
        return TokenStream(self.directory, self.manifest, name)


class TokenStream:
    """The documents of one split, one after another: the end-of-document id, then tokens, and so on."""

    def __init__(self, directory: Path, manifest: dict[str, Any], split: str) -> None:
        self.directory = directory
        self.manifest = manifest
        self.split = split
        self.vocab_size: int = manifest["vocab_size"]
        self.eod_id: int = manifest["eod_id"]
        counts = manifest["splits"][split]
        self.num_documents: int = counts["documents"]
        self.num_tokens: int = counts["tokens"]
        self.num_bytes: int = counts["bytes"]
        self._dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
        path = directory / f"{split}.index.npy"
        try:
            # Plain views: indexing a np.memmap itself is many times slower.
            self._index = np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
        except (FileNotFoundError, ValueError) as error:
            raise _damaged(path, f"cannot be read ({error})") from error
        self._shards: OrderedDict[int, tuple[mmap.mmap, np.ndarray, Path, int]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        # Workers that are spawned reopen the files; only their place travels.
        return {"directory": self.directory, "manifest": self.manifest, "split": self.split}

    def __setstate__(self, state: dict[str, Any]) -> None:
        TokenStream.__init__(self, **state)

    def document(self, number: int) -> np.ndarray:
        """Return the tokens of one document in reading order, (n,) uint16 or uint32, without the leading id."""
        position = self._index[0]
        return self._slice(number, 1, int(position[number + 1] - position[number]))

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens start..stop of the stream, (stop - start,) int64, and where in it documents begin, (M,) int64.

        One token past the end is the end-of-document id that closes the last document.
        """
        assert 0 <= start < stop <= self.num_tokens + 1
        position = self._index[0]
        tokens = np.empty(stop - start, dtype=np.int64)
        tokens[self.num_tokens - start :] = self.eod_id
        end = min(stop, self.num_tokens)
        number = int(np.searchsorted(position, np.int64(start), side="right")) - 1
        at, begins = start, []
        while at < end:
            first, last = int(position[number]), int(position[number + 1])
            if at == first:
                begins.append(at - start)
            upto = min(last, end)
            tokens[at - start : upto - start] = self._slice(number, at - first, upto - first)
            at, number = upto, number + 1
        if tokens.max() >= self.vocab_size:
            raise _damaged(self.directory, f"holds token {tokens.max()} for a vocabulary of {self.vocab_size}")
        return tokens, np.array(begins, dtype=np.int64)

    def _slice(self, number: int, start: int, stop: int) -> np.ndarray:
        shard, offset = int(self._index[1, number]), int(self._index[2, number])
        opened, tokens, path, size = self._opened_shard(shard)
        # Reading a map beyond the end of its file kills the process without a word (SIGBUS); asking first costs 1 us.
        actual = opened.size()
        if actual != size:
            raise _damaged(path, f"changed from {size} to {actual} bytes while in use")
        return tokens[offset + start : offset + stop]

    def _opened_shard(self, shard: int) -> tuple[mmap.mmap, np.ndarray, Path, int]:
        if shard in self._shards:
            self._shards.move_to_end(shard)
        else:
            if len(self._shards) == _OPEN_SHARDS:
                self._shards.popitem(last=False)
            self._shards[shard] = self._open_shard(shard)
        return self._shards[shard]

    def _open_shard(self, shard: int) -> tuple[mmap.mmap, np.ndarray, Path, int]:
        path = self.directory / f"tokens-{shard:05d}.bin"
        try:
            with open(path, "rb") as file:  # the map has a descriptor of its own
                opened = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            return opened, np.frombuffer(opened, dtype=self._dtype), path, self.manifest["files"][path.name]["bytes"]
        except (FileNotFoundError, ValueError) as error:
            raise _damaged(path, f"cannot be read ({error})") from error


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise ShardError(
                f"{directory} holds tokens of format {manifest['format']}, this version reads {FORMAT}; delete it"
            )
    except (FileNotFoundError, ValueError, KeyError) as error:
        raise _damaged(path, f"cannot be read ({error})") from error
    return manifest


def _verify(directory: Path, manifest: dict[str, Any]) -> None:
    """Compare every file with the manifest: sizes always, checksums where that takes no time."""
    files = manifest["files"]
    check_content = sum(entry["bytes"] for entry in files.values()) <= _VERIFY_BYTES
    for name, entry in files.items():
        path = directory / name
        try:
            size = path.stat().st_size
            if size != entry["bytes"]:
                raise _damaged(path, f"holds {size} bytes instead of {entry['bytes']}")
            if check_content and sha256_file(path) != entry["sha256"]:
                raise _damaged(path, "does not have the content that was written")
        except FileNotFoundError as error:
            raise _damaged(path, f"cannot be read ({error.strerror})") from error

"""What the user can say about data and tokenizer; no heavy imports, so that a config is checked at once."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

SOURCES = ("python_stdlib", "python_packages", "text", "json", "parquet", "hub")
TOKENIZERS = ("bytes", "bpe", "pretrained")
SPLITS = ("document", "tail")

# 256 bytes and the end-of-document token: below this a byte-level vocabulary cannot spell every text.
MIN_BPE_VOCAB = 257
# Far beyond any in use; `tokenizers` reserves memory for all ids, and ends the process where it gets none.
MAX_BPE_VOCAB = 1 << 24


def _check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(allowed)}")


def _check_at_least(name: str, value: Any, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name}={value!r} has to be an integer of at least {low}")


def _check_at_most(name: str, value: int, high: int) -> None:
    if value > high:
        raise ValueError(f"{name}={value!r} has to be an integer of at most {high}")


@dataclass(frozen=True)
class TokenizerConfig:
    """How text becomes token ids."""

    # `bytes`: 256 byte values; `bpe`: byte-level BPE trained on the corpus; `pretrained`: an existing tokenizer.json.
    kind: str = "bpe"
    # Ids of a `bpe` tokenizer with the end-of-document token; a small corpus may yield fewer.
    vocab_size: int = 4096
    # Text that a `bpe` tokenizer is trained on, in UTF-8 bytes: the first documents of the training split that hold it.
    train_bytes: int = 256_000_000
    # `pretrained` only: a tokenizer.json, a directory that holds one, or a Hugging Face Hub name.
    path: str | None = None
    # `pretrained` only: branch, tag or commit of a Hub name.
    revision: str = "main"
    # `pretrained` only: the token that ends a document; None takes the first well-known one that the tokenizer has.
    eod: str | None = None

    def __post_init__(self) -> None:
        _check_choice("data.tokenizer.kind", self.kind, TOKENIZERS)
        _check_at_least("data.tokenizer.vocab_size", self.vocab_size, MIN_BPE_VOCAB)
        _check_at_most("data.tokenizer.vocab_size", self.vocab_size, MAX_BPE_VOCAB)
        _check_at_least("data.tokenizer.train_bytes", self.train_bytes, 1)
        if self.kind == "pretrained" and not self.path:
            raise ValueError(
                "data.tokenizer.kind=pretrained needs data.tokenizer.path: tokenizer.json, its directory or a Hub name"
            )
        if self.kind != "pretrained" and (self.path or self.eod):
            raise ValueError(
                f"data.tokenizer.path={self.path!r} and data.tokenizer.eod={self.eod!r} belong to "
                f"data.tokenizer.kind=pretrained, but data.tokenizer.kind={self.kind!r}"
            )


@dataclass(frozen=True)
class DataConfig:
    """Which documents to train on, how they are split, tokenized, packed and read."""

    # Where documents come from: python_stdlib, python_packages, text, json, parquet or hub.
    source: str = "python_stdlib"
    # Glob patterns (`**` recurses), file names or URLs for text, json and parquet; for hub, files inside the dataset.
    files: tuple[str, ...] = ()
    # The field (column) of a json, parquet or hub row that holds the document's text.
    field: str = "text"
    # python_* sources: join the files of one package, in the order of their paths, into documents of about so many
    # UTF-8 bytes, each file under its name; None keeps every file a document of its own.
    document_bytes: int | None = None
    # Encoding of `text` files.
    encoding: str = "utf-8"
    # hub: dataset name on the Hugging Face Hub, or a local dataset directory.
    hub_path: str | None = None
    # hub: configuration (subset) of the dataset.
    hub_name: str | None = None
    # hub: split that documents are taken from.
    hub_split: str = "train"
    # hub: branch, tag or commit; a commit makes a run reproducible, a branch is looked up when data are prepared.
    hub_revision: str | None = None
    # hub: read rows as they arrive (True) or have `datasets` download and cache the whole split first (False).
    streaming: bool = True
    # Use only the first so many documents of the source; None uses all.
    max_documents: int | None = None
    # Keep one copy of documents with identical text.
    deduplicate: bool = True
    # `document`: whole documents train or validate; `tail`: the end of every document validates (few, long documents).
    split: str = "document"
    # Share of documents (of each document's characters with split=tail) that validates, between 0 and 1.
    val_fraction: float = 0.02
    # Chooses which documents validate.
    split_seed: int = 0
    # Tokens of the validation split that one evaluation reads (whole sequences spread evenly over it); None reads all.
    max_val_tokens: int | None = 131_072
    # True: attention and state restart at document boundaries (cu_seqlens); False: only at each row's start.
    document_mask: bool = True
    # Size at which a shard of tokens is closed, in tokens; a document is never cut in two.
    shard_tokens: int = 134_217_728
    # Processes that load batches beside the training process; 0 loads in the training process.
    num_workers: int = 2
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)

    def __post_init__(self) -> None:
        files = (self.files,) if isinstance(self.files, str) else tuple(self.files or ())
        object.__setattr__(self, "files", files)
        _check_choice("data.source", self.source, SOURCES)
        _check_choice("data.split", self.split, SPLITS)
        if self.source in ("text", "json", "parquet") and not files:
            raise ValueError(f"data.source={self.source} needs data.files, for example data.files='corpus/*'")
        if self.source.startswith("python_") and files:
            raise ValueError(f"data.files={files!r} belongs to text, json, parquet or hub, not to {self.source}")
        if self.document_bytes is not None and not self.source.startswith("python_"):
            raise ValueError(
                f"data.document_bytes={self.document_bytes!r} joins the files of Python packages, not documents of "
                f"{self.source}"
            )
        if self.source == "hub" and not self.hub_path:
            raise ValueError("data.source=hub needs data.hub_path: a dataset name on the Hub or a dataset directory")
        if self.source != "hub" and self.hub_path:
            raise ValueError(f"data.hub_path={self.hub_path!r} belongs to data.source=hub, not to {self.source}")
        try:
            "".encode(self.encoding)
        except (LookupError, ValueError) as error:
            raise ValueError(
                f"data.encoding={self.encoding!r} is no encoding of text that Python knows, such as utf-8 or latin-1"
            ) from error
        if not 0.0 < self.val_fraction < 1.0:
            raise ValueError(f"data.val_fraction={self.val_fraction!r} has to lie between 0 and 1, both excluded")
        for name, low in (("shard_tokens", 1), ("num_workers", 0), ("split_seed", 0)):
            _check_at_least(f"data.{name}", getattr(self, name), low)
        _check_at_most("data.split_seed", self.split_seed, (1 << 64) - 1)
        for name in ("document_bytes", "max_documents", "max_val_tokens"):
            if getattr(self, name) is not None:
                _check_at_least(f"data.{name}", getattr(self, name), 1)

"""Tokenizers: bytes, byte-level BPE trained on the corpus, or a pretrained tokenizer.json, behind one class.

Each knows an end-of-document token and how many UTF-8 bytes every id stands for, so that bits per byte is exact.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from powertrain.files import write_file

from .config import TokenizerConfig

if TYPE_CHECKING:
    import tokenizers

EOD = "<|endoftext|>"
# What published tokenizers call the token between two documents, the most specific name first.
KNOWN_EOD = (EOD, "<|end_of_text|>", "<|end▁of▁sentence|>", "<eos>", "</s>", "<|eos|>", "[EOS]")
_FILE = "tokenizer.json"
_META = "tokenizer_meta.json"
# Long texts are tokenized in parts of about so many characters, which end with a word: byte-level BPE splits a text
# there in any case, before it looks for tokens.
_PART_CHARACTERS = 1 << 16
_WORD_END = re.compile(r"\S(?=[ \n])")


def _hf() -> Any:
    """Import `tokenizers`, its threads configured before their first use."""
    # Unset, every DataLoader worker forked later prints a warning about the threads; workers never tokenize.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    import tokenizers

    return tokenizers


def byte_alphabet() -> list[str]:
    """Return the character that stands for each byte value in byte-level vocabularies (GPT-2's `bytes_to_unicode`)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {b: chr(b) for b in printable}
    rest = (b for b in range(256) if b not in alphabet)
    alphabet.update({b: chr(256 + n) for n, b in enumerate(rest)})
    return [alphabet[b] for b in range(256)]


class Tokenizer:
    """Text to ids and back.

    `encode` returns uint32 arrays without any special token; text that looks like a special token is encoded as text,
    so a document can never contain the end-of-document id.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, kind: str, eod: str) -> None:
        backend.encode_special_tokens = True
        backend.no_padding()
        backend.no_truncation()
        self.backend = backend
        self.kind = kind
        self.eod = eod
        eod_id = backend.token_to_id(eod)
        if eod_id is None:
            added = sorted(token.content for token in backend.get_added_tokens_decoder().values())
            raise ValueError(
                f"the end-of-document token {eod!r} is not in the tokenizer, whose added tokens are {added}"
            )
        self.eod_id: int = eod_id

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id, the end-of-document token included."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes that each id decodes to, (vocab_size,) int32; 0 for special tokens."""
        return _token_bytes(self.backend, self.vocab_size)

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of `text`, (n,) uint32."""
        return self.encode_batch([text])[0]

    def parts(self, text: str) -> Iterator[str]:
        """Yield `text` in parts of which the tokens, one after another, are those of the whole.

        A pretrained tokenizer may join any two characters, so its texts stay whole; for bytes parts save nothing.
        """
        start = 0
        while self.kind == "bpe" and len(text) - start > _PART_CHARACTERS:
            cut = _WORD_END.search(text, start + _PART_CHARACTERS)
            if cut is None:
                break
            yield text[start : cut.end()]
            start = cut.end()
        yield text[start:]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text, (n,) uint32, using all cores."""
        if self.kind == "bytes":
            return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32) for text in texts]
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of `ids`; bytes that are not whole UTF-8 characters become U+FFFD."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def decode_stream(self) -> Callable[[int], str | None]:
        """Return a function that takes one id after another, and returns the text that each makes whole, or None.

        Nothing ends within a character: text waits for the ids that complete it. Special tokens have no text.
        """
        stream = _hf().decoders.DecodeStream(skip_special_tokens=True)
        return lambda i: stream.step(self.backend, i)

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the vocabulary, its rules and the end-of-document token, as hexadecimal digits."""
        rules = json.dumps([self.backend.to_str(), self.eod], sort_keys=True)
        return hashlib.sha256(rules.encode()).hexdigest()[:32]

    def save(self, directory: str | Path) -> None:
        """Write `tokenizer.json` (readable by any Hugging Face tool) and its metadata into `directory`.

        Each file appears whole or not at all; one that holds the same already is left as it is.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        meta = json.dumps({"kind": self.kind, "eod": self.eod}) + "\n"
        for name, content in ((_FILE, self.backend.to_str(pretty=True).encode()), (_META, meta.encode())):
            path = directory / name
            if not path.exists() or path.read_bytes() != content:
                write_file(path, content)


def byte_tokenizer() -> Tokenizer:
    """Return the tokenizer whose ids are the 256 byte values, and 256 for the end of a document."""
    hf = _hf()
    vocab = {char: byte for byte, char in enumerate(byte_alphabet())}
    backend = hf.Tokenizer(hf.models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = hf.decoders.ByteLevel()
    backend.add_special_tokens([EOD])
    return Tokenizer(backend, kind="bytes", eod=EOD)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Return a byte-level BPE tokenizer of at most `vocab_size` ids, trained on `texts` in any order."""
    hf = _hf()
    backend = hf.Tokenizer(hf.models.BPE())
    backend.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOD], initial_alphabet=byte_alphabet(), show_progress=False
    )
    backend.train_from_iterator(_chunks(texts), trainer=trainer)
    return Tokenizer(backend, kind="bpe", eod=EOD)


def _chunks(texts: Iterable[str], size: int = 256) -> Iterator[list[str]]:
    chunk: list[str] = []
    for text in texts:
        chunk.append(text)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def pretrained_tokenizer(path: str, *, revision: str = "main", eod: str | None = None) -> Tokenizer:
    """Return the tokenizer of a tokenizer.json, of a directory that holds one, or of a Hugging Face Hub name."""
    hf = _hf()
    file = _local_file(path)
    try:
        backend = hf.Tokenizer.from_file(str(file)) if file else hf.Tokenizer.from_pretrained(path, revision=revision)
    except Exception as error:  # tokenizers raises bare Exception for every cause
        where = f"file {file}" if file else f"name {path!r} (revision {revision!r}) on the Hugging Face Hub"
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"no usable tokenizer.json under the {where}: {first}") from error
    if eod is None:
        eod = next((name for name in KNOWN_EOD if backend.token_to_id(name) is not None), None)
        if eod is None:
            added = sorted(token.content for token in backend.get_added_tokens_decoder().values())
            raise ValueError(f"which token of {path!r} ends a document? Set data.tokenizer.eod to one of {added}")
    return Tokenizer(backend, kind="pretrained", eod=eod)


def pretrained_identity(config: TokenizerConfig) -> str:
    """Return what names a pretrained tokenizer: the hash of a local file, or a Hub name and revision."""
    assert config.path is not None
    file = _local_file(config.path)
    return hashlib.sha256(file.read_bytes()).hexdigest() if file else f"{config.path}@{config.revision}"


def _local_file(path: str) -> Path | None:
    local = Path(path).expanduser()
    if local.is_dir():
        local = local / _FILE
        if not local.is_file():
            raise ValueError(f"data.tokenizer.path={path!r} is a directory without a {_FILE}")
    if local.is_file():
        return local
    if path.endswith(".json") or path.startswith((".", "/", "~")):
        raise ValueError(f"data.tokenizer.path={path!r} does not exist")
    return None


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """Return the tokenizer that `Tokenizer.save` wrote into `directory`."""
    directory = Path(directory)
    try:
        meta = json.loads((directory / _META).read_text(encoding="utf-8"))
        kind, eod = meta["kind"], meta["eod"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{directory} does not hold a saved tokenizer ({_META}): {error}") from error
    try:
        backend = _hf().Tokenizer.from_file(str(directory / _FILE))
    except Exception as error:  # tokenizers raises bare Exception for every cause
        raise ValueError(f"{directory} does not hold a saved tokenizer ({_FILE}): {error}") from error
    return Tokenizer(backend, kind=kind, eod=eod)


def _token_bytes(backend: tokenizers.Tokenizer, vocab_size: int) -> np.ndarray:
    """Return the bytes of every id, read off the decoder that joins tokens to text."""
    decoder = json.loads(backend.to_str())["decoder"] or {}
    steps = decoder.get("decoders", [decoder])
    kinds = {step.get("type") for step in steps}
    characters = set(byte_alphabet())
    lengths = np.zeros(vocab_size, dtype=np.int32)
    special = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
    added = {i: token.content for i, token in backend.get_added_tokens_decoder().items() if not token.special}
    for token, i in backend.get_vocab(with_added_tokens=True).items():
        if i in special:
            continue
        if i in added:
            lengths[i] = len(added[i].encode())
        elif "ByteLevel" in kinds:
            # One character of the byte alphabet is one byte; anything else is text as it stands.
            lengths[i] = len(token) if characters.issuperset(token) else len(token.encode())
        elif kinds & {"Metaspace", "ByteFallback"}:
            is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
            lengths[i] = 1 if is_byte else len(token.replace("▁", " ").encode())
        else:
            raise ValueError(
                f"a tokenizer with decoder {sorted(str(kind) for kind in kinds)} has no byte count per token; "
                "supported are ByteLevel, Metaspace and ByteFallback decoders"
            )
    return lengths

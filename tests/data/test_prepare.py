from __future__ import annotations

import contextlib
import errno
import json
import os
import pickle
import pty
import random
import resource
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from powertrain.cache_directory import cache_directory
from powertrain.data.config import DataConfig, TokenizerConfig
from powertrain.data.prepare import _limited, prepare, split_of
from powertrain.data.shards import SPLITS, ShardError, ShardWriter, TokenStore
from powertrain.data.sources import PythonFiles
from powertrain.data.tokenizers import Tokenizer, train_bpe

from .conftest import make_texts, write_texts

Build = Callable[..., DataConfig]
BPE = TokenizerConfig(kind="bpe", vocab_size=300)


def texts_of(store: TokenStore, split: str) -> list[str]:
    stream, tokenizer = store.split(split), store.tokenizer()
    return [tokenizer.decode(stream.document(number)) for number in range(stream.num_documents)]


def prepare_texts(directory: Path, texts: list[str], **options: object) -> TokenStore:
    settings = {"tokenizer": TokenizerConfig(kind="bytes"), "val_fraction": 0.2, **options}
    return prepare(DataConfig(source="text", files=write_texts(directory, texts), **settings))  # type: ignore[arg-type]


# What is prepared


@pytest.mark.parametrize("tokenizer", [TokenizerConfig(kind="bytes"), BPE], ids=["bytes", "bpe"])
def test_every_document_comes_back(text_config: Build, tokenizer: TokenizerConfig) -> None:
    store = prepare(text_config(tokenizer=tokenizer))
    expected = make_texts(60)
    found = {split: texts_of(store, split) for split in SPLITS}
    assert sorted(found["train"] + found["validation"]) == sorted(expected)
    for split in SPLITS:
        assert all(split_of(text, 0.2, 0) == split for text in found[split])
        assert len(found[split]) > 3
        stream = store.split(split)
        assert stream.num_bytes == sum(len(text.encode()) for text in found[split])
        tokens, begins = stream.read(0, stream.num_tokens + 1)
        lengths = store.tokenizer().token_bytes
        assert lengths[tokens].sum() == stream.num_bytes
        assert (np.flatnonzero(tokens[:-1] == store.eod_id) == begins).all()
        assert tokens[-1] == store.eod_id


def test_pretrained_tokenizer_is_not_trained_again(text_config: Build, tmp_path: Path) -> None:
    trained = prepare(text_config(tokenizer=BPE))
    trained.tokenizer().save(tmp_path / "tokenizer")
    other = prepare(text_config(tokenizer=TokenizerConfig(kind="pretrained", path=str(tmp_path / "tokenizer"))))
    assert other.directory != trained.directory
    assert other.fingerprint == trained.fingerprint


def another_validation_text(text: str) -> str:
    longer = (f"{text} {'Q' * count}" for count in range(1, 1000))
    return next(candidate for candidate in longer if split_of(candidate, 0.2, 0) == "validation")


def test_bpe_sees_the_training_split_only(tmp_path: Path) -> None:
    texts = make_texts(40)
    store = prepare_texts(tmp_path / "a", texts, tokenizer=BPE)
    changed = [text if split_of(text, 0.2, 0) == "train" else another_validation_text(text) for text in texts]
    other = prepare_texts(tmp_path / "b", changed, tokenizer=BPE)
    assert other.tokenizer().fingerprint == store.tokenizer().fingerprint
    assert other.fingerprint != store.fingerprint


def test_tokenizer_is_trained_on_the_first_bytes(tmp_path: Path) -> None:
    texts = make_texts(40)
    train = [text for text in texts if split_of(text, 0.2, 0) == "train"]
    limit = sum(len(text.encode()) for text in train[:10])
    limited = TokenizerConfig(kind="bpe", vocab_size=300, train_bytes=limit)
    store = prepare_texts(tmp_path / "a", texts, tokenizer=limited)
    assert store.tokenizer().fingerprint == train_bpe(train[:10], 300).fingerprint
    assert store.tokenizer().fingerprint != train_bpe(train[:11], 300).fingerprint


def test_a_document_longer_than_the_tokenizer_is_trained_on_is_cut() -> None:
    assert list(_limited(iter([("validation", "v"), ("train", "é" * 1000), ("train", "b")]), 11)) == ["é" * 5]
    assert list(_limited(iter([("train", "a" * 6), ("train", "b" * 6), ("train", "c")]), 11)) == ["a" * 6, "b" * 6]


def test_long_documents_are_tokenized_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for tokenizing is that of a batch, not of a document, and tokens are those of the whole document."""
    texts = ["\n".join(make_texts(30, seed)) for seed in range(10)]
    whole = prepare_texts(tmp_path / "a", texts, tokenizer=BPE)
    monkeypatch.setattr("powertrain.data.tokenizers._PART_CHARACTERS", 100)
    monkeypatch.setattr("powertrain.data.prepare._BATCH_CHARACTERS", 1000)
    longest = []
    encode_batch = Tokenizer.encode_batch

    def spy(self: Tokenizer, parts: list[str]) -> list[np.ndarray]:
        longest.append(max(map(len, parts)))
        return encode_batch(self, parts)

    monkeypatch.setattr(Tokenizer, "encode_batch", spy)
    parts = prepare_texts(tmp_path / "b", texts, tokenizer=BPE)
    assert parts.fingerprint == whole.fingerprint
    for split in SPLITS:
        assert texts_of(parts, split) == texts_of(whole, split)
    assert max(longest) < 200 < min(map(len, texts))


def test_large_vocabularies_take_four_bytes(text_config: Build, tmp_path: Path) -> None:
    base = prepare(text_config(tokenizer=BPE)).tokenizer()
    base.backend.add_tokens([f"<extra {i}>" for i in range(1 << 16)])
    base.save(tmp_path / "large")
    store = prepare(text_config(tokenizer=TokenizerConfig(kind="pretrained", path=str(tmp_path / "large"))))
    assert store.manifest["dtype"] == "uint32"
    assert prepare(text_config()).manifest["dtype"] == "uint16"
    assert sorted(texts_of(store, "train") + texts_of(store, "validation")) == sorted(make_texts(60))


def test_shards_are_closed_at_their_size(text_config: Build) -> None:
    whole, parts = prepare(text_config()), prepare(text_config(shard_tokens=1000))
    assert whole.manifest["num_shards"] == 1
    assert parts.manifest["num_shards"] > 5
    assert parts.fingerprint == whole.fingerprint
    for split in SPLITS:
        a, b = whole.split(split), parts.split(split)
        assert (a.read(0, a.num_tokens)[0] == b.read(0, b.num_tokens)[0]).all()


def test_order_of_the_source_does_not_matter(tmp_path: Path) -> None:
    texts = make_texts(50)
    first = prepare_texts(tmp_path / "a", texts)
    random.Random(1).shuffle(texts)
    second = prepare_texts(tmp_path / "b", texts)
    assert second.directory != first.directory
    assert second.fingerprint == first.fingerprint
    assert texts_of(second, "train") == texts_of(first, "train")
    third = prepare_texts(tmp_path / "c", [*texts, "one more"])
    assert third.fingerprint != first.fingerprint
    for split in SPLITS:
        assert set(texts_of(first, split)) <= set(texts_of(third, split))


def test_split_is_of_the_words() -> None:
    texts = make_texts(2000, longest=10)
    share = sum(split_of(text, 0.1, 0) == "validation" for text in texts) / len(texts)
    assert abs(share - 0.1) < 4 * (0.1 * 0.9 / 2000) ** 0.5
    assert any(split_of(text, 0.5, 0) != split_of(text, 0.5, 1) for text in texts)
    for text in texts[:100]:
        copy = "\n" + text.replace(" ", "\r\n") + "  "
        assert split_of(copy, 0.5, 0) == split_of(text, 0.5, 0)
        # A larger share keeps what validated already.
        if split_of(text, 0.1, 0) == "validation":
            assert split_of(text, 0.3, 0) == "validation"


def test_duplicates_and_empty_documents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [*make_texts(30), *make_texts(30), "", ""]
    store = prepare_texts(tmp_path / "a", texts)
    assert sum(split["documents"] for split in store.manifest["splits"].values()) == 30
    assert sum(split["duplicates"] for split in store.manifest["splits"].values()) == 30
    assert store.manifest["skipped"] == {"empty": 2}
    assert "30 duplicate left out, 2 empty left out" in capsys.readouterr().err
    assert store.fingerprint == prepare_texts(tmp_path / "b", make_texts(30)).fingerprint
    kept = prepare_texts(tmp_path / "c", texts, deduplicate=False)
    assert sorted(texts_of(kept, "train") + texts_of(kept, "validation")) == sorted(texts[:-2])


def test_it_says_how_many_documents_there_are_and_of_which_it_holds_parts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare_texts(tmp_path / "a", ["0123456789" * 10], split="tail")
    assert "prepared 1 beginning and 1 end of documents, " in capsys.readouterr().err
    # A document of one character has no end.
    prepare_texts(tmp_path / "b", ["0123456789" * 10, "9876543210" * 10, "x"], split="tail")
    assert "prepared 3 beginnings and 2 ends of documents, " in capsys.readouterr().err
    texts = make_texts(60)
    prepare_texts(tmp_path / "c", texts)
    assert f"prepared {len(texts)} documents, " in capsys.readouterr().err


def test_tail_split(tmp_path: Path) -> None:
    text = " ".join(make_texts(30))
    store = prepare_texts(tmp_path / "a", [text], split="tail")
    (train,), (validation,) = texts_of(store, "train"), texts_of(store, "validation")
    assert train + validation == text
    assert abs(len(validation) / len(text) - 0.2) < 0.01


def test_corpora_that_cannot_be_split(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no document with text"):
        prepare_texts(tmp_path / "a", ["", ""])
    with pytest.raises(ValueError, match=r"data\.split=tail"):
        prepare_texts(tmp_path / "b", ["only one document"])
    assert not [p for p in (cache_directory() / "data").iterdir() if p.is_dir()]


def test_lossy_tokenizer_warns(text_config: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import tokenizers as hf

    base = prepare(text_config(tokenizer=BPE)).tokenizer()
    base.backend.normalizer = hf.normalizers.Lowercase()
    base.backend.normalizer = hf.normalizers.Replace("the ", "")
    base.save(tmp_path / "lossy")
    capsys.readouterr()
    prepare(text_config(tokenizer=TokenizerConfig(kind="pretrained", path=str(tmp_path / "lossy"))))
    assert "bits per byte" in capsys.readouterr().err


# The cache


def test_prepared_once(text_config: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    store = prepare(text_config())
    monkeypatch.setattr(ShardWriter, "add", None)
    assert prepare(text_config()).directory == store.directory
    assert prepare(text_config(num_workers=3, max_val_tokens=7, document_mask=False)).directory == store.directory


def test_whatever_decides_the_content_decides_the_directory(text_config: Build, corpus: str) -> None:
    configs = [
        text_config(),
        text_config(tokenizer=BPE),
        text_config(tokenizer=TokenizerConfig(kind="bpe", vocab_size=301)),
        text_config(val_fraction=0.3),
        text_config(split_seed=1),
        text_config(split="tail"),
        text_config(deduplicate=False),
        text_config(max_documents=50),
    ]
    assert len({prepare(config).directory for config in configs}) == len(configs)
    first = next(Path(corpus).parent.glob("*.txt"))
    first.write_text("changed")
    assert prepare(configs[0]).directory not in {prepare(config).directory for config in configs[1:]}
    assert "changed" in texts_of(prepare(configs[0]), split_of("changed", 0.2, 0))


@pytest.mark.parametrize("pattern", ["zip://*.txt::{}", "zip://*.txt::file://{}"])
def test_a_changed_archive_is_prepared_again(text_config: Build, tmp_path: Path, pattern: str) -> None:
    path = tmp_path / "corpus.zip"
    config = text_config(files=(pattern.format(path),), split="tail", val_fraction=0.5)
    directories = set()
    for text in ("of before", "of after!"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.txt", text)
        store = prepare(config)
        assert "".join(texts_of(store, split)[0] for split in SPLITS) == text
        assert prepare(config).directory == store.directory
        directories.add(store.directory)
    assert len(directories) == 2


def test_a_changed_file_behind_a_url_is_prepared_again(text_config: Build, corpus: str) -> None:
    config = text_config(files=(f"file://{corpus}",))
    before = prepare(config).directory
    next(Path(corpus).parent.glob("*.txt")).write_text("changed")
    assert prepare(config).directory != before


# Damage


def damage(path: Path, how: str) -> None:
    if how == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    elif how == "missing":
        path.unlink()
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0x55
        path.write_bytes(content)


@pytest.mark.parametrize("how", ["truncated", "missing", "flipped"])
@pytest.mark.parametrize("name", ["tokens-00000.bin", "train.index.npy", "tokenizer.json"])
def test_damaged_files_are_named(text_config: Build, name: str, how: str) -> None:
    store = prepare(text_config())
    damage(store.directory / name, how)
    with pytest.raises(ShardError, match=f"prepared tokens are damaged: .*{name} .*; delete ") as error:
        prepare(text_config())
    assert "\n" not in str(error.value)


def test_damaged_manifest(text_config: Build) -> None:
    store = prepare(text_config())
    damage(store.directory / "manifest.json", "truncated")
    with pytest.raises(ShardError, match=r"manifest\.json cannot be read"):
        prepare(text_config())


def test_other_format(text_config: Build) -> None:
    store = prepare(text_config())
    manifest = json.loads((store.directory / "manifest.json").read_text())
    (store.directory / "manifest.json").write_text(json.dumps({**manifest, "format": 0}))
    with pytest.raises(ShardError, match="format 0, this version reads 1"):
        prepare(text_config())


def test_shard_truncated_while_in_use(text_config: Build) -> None:
    """Not a crash of the process, as reading a map beyond its file's end would be."""
    stream = prepare(text_config()).split("train")
    stream.read(0, 10)
    os.truncate(stream.directory / "tokens-00000.bin", 2)
    with pytest.raises(ShardError, match=r"tokens-00000\.bin changed from \d+ to 2 bytes while in use"):
        stream.read(0, 10)


def test_any_number_of_shards_takes_few_descriptors(tmp_path: Path) -> None:
    texts = make_texts(400, longest=2)
    store = prepare_texts(tmp_path / "a", texts, shard_tokens=1)
    assert store.manifest["num_shards"] == len(texts)
    stream = store.split("train")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        tokens, begins = stream.read(0, stream.num_tokens)
        assert len(begins) == stream.num_documents > 300
        assert 200 < len(os.listdir("/proc/self/fd")) - before <= 256
    whole = prepare_texts(tmp_path / "b", texts).split("train")
    assert (tokens == whole.read(0, whole.num_tokens)[0]).all()


def test_lack_of_descriptors_is_no_damage(text_config: Build) -> None:
    store = prepare(text_config())
    stream = store.split("train")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        for read in (
            lambda: stream.read(0, 10),
            lambda: store.split("validation"),
            lambda: TokenStore(store.directory),
        ):
            with pytest.raises(OSError, match="Too many open files"):
                read()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    stream.read(0, 10)


def test_tokens_outside_the_vocabulary(text_config: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large corpora are not compared with their checksums on opening; an impossible token still has a name."""
    monkeypatch.setattr("powertrain.data.shards._VERIFY_BYTES", 0)
    stream = prepare(text_config()).split("train")
    path = stream.directory / "tokens-00000.bin"
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(ShardError, match="token 65535 for a vocabulary of 257"):
        stream.read(0, 10)


def test_streams_travel_to_other_processes(text_config: Build) -> None:
    stream = prepare(text_config()).split("train")
    expected = stream.read(5, 500)
    for a, b in zip(pickle.loads(pickle.dumps(stream)).read(5, 500), expected, strict=True):
        assert (a == b).all()


def test_full_disk(text_config: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ShardWriter, "add", full)
    with pytest.raises(OSError, match=r"no space is left for prepared tokens in .*; set paths\.cache"):
        prepare(text_config())
    assert not [p for p in (cache_directory() / "data").iterdir() if p.is_dir()]
    monkeypatch.undo()


# Several processes, and their deaths

# A preparation that stops at a chosen place, says so, and waits to be killed (or goes on after a while).
CHILD = """
import sys, time
from pathlib import Path
import powertrain.data.prepare as module
from powertrain.data.config import DataConfig, TokenizerConfig
from powertrain.data.sources import PythonFiles

directory, place, seconds = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
module.open_source = lambda config: PythonFiles([directory])

def pause_before(owner, name, count=1):
    original, calls = getattr(owner, name), [0]
    def wrapper(*args, **kwargs):
        calls[0] += 1
        if calls[0] == count:
            print("paused", flush=True)
            time.sleep(seconds)
        return original(*args, **kwargs)
    setattr(owner, name, wrapper)

if place == "tokens":
    pause_before(module.ShardWriter, "add", count=30)
elif place == "finish":
    pause_before(module.ShardWriter, "finish")
elif place == "rename":
    pause_before(module.os, "replace")
tokenizer = TokenizerConfig(kind="bytes")
config = DataConfig(val_fraction=0.2, tokenizer=tokenizer)
print("fingerprint", module.prepare(config).fingerprint, flush=True)
"""


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of Python files that `prepare` takes for its source: children then need not import `datasets`."""
    directory = tmp_path / "sources"
    directory.mkdir()
    for number, text in enumerate(make_texts(60)):
        (directory / f"{number}.py").write_text(text, encoding="utf-8")
    monkeypatch.setattr("powertrain.data.prepare.open_source", lambda config: PythonFiles([directory]))
    return directory


PYTHON_CONFIG = DataConfig(val_fraction=0.2, tokenizer=TokenizerConfig(kind="bytes"))


def start(sources: Path, place: str, seconds: float, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(sources), place, str(seconds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize("place", ["tokens", "finish", "rename"])
def test_killed_preparation_leaves_nothing_that_looks_whole(sources: Path, place: str) -> None:
    with start(sources, place, 60) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "paused\n"
        child.send_signal(signal.SIGKILL)
    root = cache_directory() / "data"
    (left,) = [path for path in root.iterdir() if path.is_dir()]
    assert ".tmp-" in left.name
    assert list(left.iterdir())

    store = prepare(PYTHON_CONFIG)
    assert [path for path in root.iterdir() if path.is_dir()] == [store.directory]
    assert sorted(texts_of(store, "train") + texts_of(store, "validation")) == sorted(make_texts(60))


def test_one_prepares_and_the_others_wait(sources: Path) -> None:
    with start(sources, "tokens", 1.5) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "paused\n"
        with start(sources, "none", 0) as second, start(sources, "none", 0, RANK="1", LOCAL_RANK="1") as third:
            outputs = [child.communicate(timeout=60) for child in (first, second, third)]
            assert [child.returncode for child in (first, second, third)] == [0, 0, 0]
    store = prepare(PYTHON_CONFIG)
    assert {output for output, _ in outputs} == {f"fingerprint {store.fingerprint}\n"}
    errors = [error for _, error in outputs]
    assert "prepared 60 documents" in errors[0]
    assert "waiting for another process" in errors[1]
    assert "prepared" not in errors[1].replace("prepares", "")
    # Only rank 0 talks.
    assert errors[2] == ""


def test_progress_is_shown_on_the_terminal_of_rank_zero(sources: Path, tmp_path: Path) -> None:
    def terminal_output(**environment: str) -> str:
        here, there = pty.openpty()
        environment = {"POWERTRAIN_CACHE": str(tmp_path / environment["RANK"]), "TERM": "xterm", **environment}
        command = [sys.executable, "-c", CHILD, str(sources), "finish", "0.2"]
        subprocess.run(command, stderr=there, stdout=subprocess.DEVNULL, env={**os.environ, **environment}, check=True)
        os.close(there)
        chunks = []
        # Reading after the last writer closed fails on Linux instead of returning nothing.
        with contextlib.suppress(OSError):
            while chunk := os.read(here, 65536):
                chunks.append(chunk)
        os.close(here)
        return b"".join(chunks).decode()

    shown = terminal_output(RANK="0", LOCAL_RANK="0")
    assert "tokenizing" in shown
    assert "prepared 60 documents" in shown
    assert terminal_output(RANK="1", LOCAL_RANK="1") == ""


def test_the_next_in_line_takes_over_from_the_dead(sources: Path) -> None:
    with start(sources, "tokens", 60) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "paused\n"
        with start(sources, "none", 0) as second:
            assert second.stderr is not None
            assert "waiting for another process" in second.stderr.readline()
            first.kill()
            output, _ = second.communicate(timeout=60)
    assert output == f"fingerprint {prepare(PYTHON_CONFIG).fingerprint}\n"


def test_other_local_ranks_wait_for_the_lock_only_so_long(text_config: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr("powertrain.data.prepare._HEAD_START_SECONDS", 0.2)
    begin = time.monotonic()
    prepare(text_config())
    assert 0.2 <= time.monotonic() - begin < 30

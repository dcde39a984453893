from __future__ import annotations

import errno
import json
import random
from pathlib import Path

import numpy as np
import pytest

from powertrain.data.tokenizers import (
    EOD,
    Tokenizer,
    byte_alphabet,
    byte_tokenizer,
    load_tokenizer,
    pretrained_tokenizer,
    train_bpe,
)

from .conftest import make_texts

HOSTILE = [
    "",
    "plain",
    " leading and trailing  ",
    "line\r\nends\rand\n\n\ttabs",
    "ünïcödé 日本語 🙂👩‍👩‍👧 \u200b\ufeff e\u0301",
    "\x00\x01\x7f\x80\xff",
    f"text that says {EOD} and <|endoftext|>",
    "\U0010ffff",
]


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe(make_texts(50), vocab_size=350)


@pytest.fixture(scope="module", params=["bytes", "bpe", "pretrained"])
def tokenizer(request: pytest.FixtureRequest, bpe: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    if request.param == "bytes":
        return byte_tokenizer()
    if request.param == "bpe":
        return bpe
    directory = tmp_path_factory.mktemp("pretrained")
    bpe.save(directory)
    return pretrained_tokenizer(str(directory / "tokenizer.json"))


@pytest.mark.parametrize("text", HOSTILE + make_texts(5))
def test_round_trip_and_exact_bytes(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert tokenizer.eod_id not in ids


@pytest.mark.parametrize("size", [1, 2, 7, 50])
def test_tokens_of_parts_are_those_of_the_whole(bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr("powertrain.data.tokenizers._PART_CHARACTERS", size)
    rng = random.Random(size)
    characters = [*"abst1'. \n\r\t", "'s ", "  ", "\u3000", "\xa0", "é", "日", "e\u0301", "🙂"]
    texts = ["".join(rng.choices(characters, k=rng.randint(0, 60))) for _ in range(1000)]
    for text in [*texts, *HOSTILE, *make_texts(20)]:
        parts = list(bpe.parts(text))
        assert "".join(parts) == text
        assert np.concatenate(bpe.encode_batch(parts)).tolist() == bpe.encode(text).tolist()
    # Letters of whatever script: memory follows the longest part.
    for word in ("word ", "слово ", "字字字。\n", "(x) "):
        text = word * 100
        parts = list(bpe.parts(text))
        assert len(parts) > 1
        assert np.concatenate(bpe.encode_batch(parts)).tolist() == bpe.encode(text).tolist()


def test_vocabulary(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_bytes.shape == (tokenizer.vocab_size,)
    assert tokenizer.token_bytes[tokenizer.eod_id] == 0
    assert np.delete(tokenizer.token_bytes, tokenizer.eod_id).min() == 1
    assert tokenizer.vocab_size == {"bytes": 257, "bpe": 350, "pretrained": 350}[tokenizer.kind]
    assert tokenizer.decode([tokenizer.eod_id]) == ""
    assert tokenizer.decode([tokenizer.eod_id], skip_special_tokens=False) == EOD


def test_save_and_load(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert (loaded.vocab_size, loaded.eod_id, loaded.kind) == (tokenizer.vocab_size, tokenizer.eod_id, tokenizer.kind)
    for text in HOSTILE:
        assert (loaded.encode(text) == tokenizer.encode(text)).all()


def test_saving_leaves_no_half_and_writes_nothing_twice(
    bpe: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    byte_tokenizer().save(tmp_path)
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        bpe.save(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint == byte_tokenizer().fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_meta.json"]
    byte_tokenizer().save(tmp_path)  # the same: nothing is written


@pytest.mark.parametrize(
    ("name", "content"),
    [("tokenizer.json", '{"version"'), ("tokenizer_meta.json", "{}"), ("tokenizer_meta.json", "[]")],
)
def test_half_a_tokenizer_is_one_sentence(bpe: Tokenizer, tmp_path: Path, name: str, content: str) -> None:
    bpe.save(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"does not hold a saved tokenizer \({name}\): ") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_batches_equal_single_texts(tokenizer: Tokenizer) -> None:
    for text, ids in zip(HOSTILE, tokenizer.encode_batch(HOSTILE), strict=True):
        assert (ids == tokenizer.encode(text)).all()
        assert ids.dtype == np.uint32


def test_bytes_are_bytes_for_hugging_face_too() -> None:
    tokenizer = byte_tokenizer()
    for text in HOSTILE:
        assert tokenizer.encode(text).tolist() == list(text.encode())
        assert tokenizer.backend.encode(text, add_special_tokens=False).ids == list(text.encode())


def test_byte_alphabet_is_gpt2s() -> None:
    from tokenizers import pre_tokenizers

    assert len(set(byte_alphabet())) == 256
    assert set(byte_alphabet()) == set(pre_tokenizers.ByteLevel.alphabet())


def test_training_ignores_order(bpe: Tokenizer) -> None:
    assert train_bpe(reversed(make_texts(50)), vocab_size=350).fingerprint == bpe.fingerprint
    assert train_bpe(make_texts(51, seed=1), vocab_size=350).fingerprint != bpe.fingerprint


def test_small_corpus_gives_a_small_vocabulary() -> None:
    assert train_bpe(["ab"], vocab_size=1000).vocab_size == 258  # 256 bytes, the end of a document, one merge


def sentencepiece_like(tmp_path: Path) -> Path:
    """Write a tokenizer of the kind Llama 2 has: ▁ for a space, <0xNN> for what the vocabulary lacks."""
    import tokenizers as hf

    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab |= {f"<0x{b:02X}>": 3 + b for b in range(256)}
    for token in ["▁", "a", "b", "é", "ab", "▁a"]:
        vocab[token] = len(vocab)
    model = hf.models.BPE(
        vocab=vocab, merges=[("a", "b"), ("▁", "a")], unk_token="<unk>", byte_fallback=True, fuse_unk=True
    )
    backend = hf.Tokenizer(model)
    backend.normalizer = hf.normalizers.Replace(" ", "▁")
    backend.decoder = hf.decoders.Sequence(
        [hf.decoders.Replace("▁", " "), hf.decoders.ByteFallback(), hf.decoders.Fuse()]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    file = tmp_path / "tokenizer.json"
    backend.save(str(file))
    return file


def test_sentencepiece_bytes(tmp_path: Path) -> None:
    tokenizer = pretrained_tokenizer(str(sentencepiece_like(tmp_path)))
    assert tokenizer.eod == "</s>"
    for text in ["ab a", " é", "日本 z"]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes[ids].sum() == len(text.encode())


def test_unknown_decoder_is_refused(tmp_path: Path) -> None:
    import tokenizers as hf

    backend = hf.Tokenizer(hf.models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    backend.decoder = hf.decoders.WordPiece()
    backend.add_special_tokens(["</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"WordPiece.*supported are ByteLevel"):
        _ = pretrained_tokenizer(str(tmp_path)).token_bytes


def test_end_of_document_token(bpe: Tokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path)
    with pytest.raises(ValueError, match=r"'<eot>' is not in the tokenizer.*<\|endoftext\|>"):
        pretrained_tokenizer(str(tmp_path), eod="<eot>")
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    content["added_tokens"] = []
    content["model"]["vocab"] = {("<other>" if k == EOD else k): v for k, v in content["model"]["vocab"].items()}
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"data\.tokenizer\.eod"):
        pretrained_tokenizer(str(tmp_path))


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.tokenizer\.path=.*absent\.json' does not exist"):
        pretrained_tokenizer(str(tmp_path / "absent.json"))
    with pytest.raises(ValueError, match=r"a directory without a tokenizer\.json"):
        pretrained_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"no usable tokenizer\.json under the file"):
        pretrained_tokenizer(str(tmp_path))
    with pytest.raises(ValueError, match="does not hold a saved tokenizer"):
        load_tokenizer(tmp_path)

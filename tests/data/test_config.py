from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from powertrain.data.config import SOURCES, DataConfig, TokenizerConfig


def test_defaults_are_usable() -> None:
    assert DataConfig().source == "python_stdlib"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"source": "texts"}, ["data.source='texts'", "python_stdlib", "parquet"]),
        ({"source": "text"}, ["data.source=text", "data.files"]),
        ({"source": "hub"}, ["data.hub_path"]),
        ({"source": "text", "files": "*", "hub_path": "x"}, ["data.hub_path='x'", "data.source=hub"]),
        ({"files": "*.txt"}, ["*.txt", "python_stdlib"]),
        ({"val_fraction": 0.0}, ["data.val_fraction=0.0", "between 0 and 1"]),
        ({"val_fraction": 1.0}, ["data.val_fraction=1.0"]),
        ({"split": "random"}, ["data.split='random'", "document, tail"]),
        ({"num_workers": -1}, ["data.num_workers=-1", "at least 0"]),
        ({"num_workers": True}, ["data.num_workers=True"]),
        ({"max_documents": 0}, ["data.max_documents=0", "at least 1"]),
        ({"document_bytes": 0}, ["data.document_bytes=0", "at least 1"]),
        ({"source": "text", "files": "*", "document_bytes": 9}, ["data.document_bytes=9", "text"]),
        ({"shard_tokens": 0}, ["data.shard_tokens=0"]),
        ({"split_seed": 2**64}, ["data.split_seed=18446744073709551616", f"at most {2**64 - 1}"]),
        ({"encoding": "foo"}, ["data.encoding='foo'", "utf-8"]),
        ({"encoding": "hex"}, ["data.encoding='hex'"]),
        ({"encoding": "a\0b"}, ["data.encoding='a\\x00b'"]),
    ],
)
def test_contradictions_are_one_sentence(options: dict, words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"^data\.") as error:
        DataConfig(**options)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "wordpiece"}, ["data.tokenizer.kind='wordpiece'", "bytes, bpe, pretrained"]),
        ({"vocab_size": 256}, ["data.tokenizer.vocab_size=256", "257"]),
        ({"vocab_size": 10**12}, ["data.tokenizer.vocab_size=1000000000000", "at most 16777216"]),
        ({"kind": "pretrained"}, ["data.tokenizer.path"]),
        ({"kind": "bpe", "path": "gpt2"}, ["data.tokenizer.path='gpt2'", "pretrained"]),
    ],
)
def test_tokenizer_contradictions(options: dict, words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"data\.tokenizer") as error:
        TokenizerConfig(**options)
    for word in words:
        assert word in str(error.value)


def test_one_pattern_is_a_list_of_one() -> None:
    assert DataConfig(source="text", files="a/*.txt").files == ("a/*.txt",)  # type: ignore[arg-type]
    assert DataConfig(source="text", files=["a", "b"]).files == ("a", "b")  # type: ignore[arg-type]


def test_config_needs_no_heavy_import() -> None:
    code = (
        "import sys, powertrain.data.config; "
        "heavy = {'torch', 'lightning', 'datasets', 'tokenizers', 'numpy', 'pyarrow'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_source_has_its_yaml_and_no_unknown_key() -> None:
    yaml = pytest.importorskip("yaml")
    files = {path.stem: path for path in Path("conf/data").glob("*.yaml")}
    assert set(files) == set(SOURCES)
    needed = {"text": {"files": "*"}, "json": {"files": "*"}, "parquet": {"files": "*"}, "hub": {"hub_path": "x"}}
    for name, path in files.items():
        values = yaml.safe_load(path.read_text())
        tokenizer = TokenizerConfig(**values.pop("tokenizer"))
        assert DataConfig(**{**values, **needed.get(name, {}), "tokenizer": tokenizer}).source == name

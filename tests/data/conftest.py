from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from powertrain.data.config import DataConfig, TokenizerConfig

WORDS = [
    "the",
    "state",
    "of",
    "power",
    "wide",
    "exact",
    "über",
    "日本語",
    "🙂",
    "naïve",
    "=",
    "self.x",
    "1\n",
    "{}",
    "\t#",
]


def make_texts(count: int, seed: int = 0, longest: int = 120) -> list[str]:
    """Return `count` different documents of 1 to `longest` words."""
    rng = random.Random(seed)
    return [f"{i} " + " ".join(rng.choices(WORDS, k=rng.randint(1, longest))) for i in range(count)]


def write_texts(directory: Path, texts: list[str]) -> str:
    """Write one file per text; return the glob that finds them."""
    directory.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(texts):
        (directory / f"{number:04d}.txt").write_bytes(text.encode())
    return f"{directory}/*.txt"


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    return write_texts(tmp_path / "corpus", make_texts(60))


@pytest.fixture
def text_config(corpus: str) -> Callable[..., DataConfig]:
    def build(**changes: object) -> DataConfig:
        options: dict = {
            "source": "text",
            "files": corpus,
            "val_fraction": 0.2,
            "num_workers": 0,
            "tokenizer": TokenizerConfig(kind="bytes"),
        }
        return DataConfig(**{**options, **changes})

    return build


@pytest.fixture(autouse=True)
def _private_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what tests prepare, and what `datasets` caches, out of the user's caches."""
    import datasets

    monkeypatch.setenv("POWERTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")

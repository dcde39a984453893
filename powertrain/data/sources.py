"""Sources of documents: what they are (their identity) and their texts, one document at a time."""

from __future__ import annotations

import glob
import itertools
import os
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .config import DataConfig
from .progress import is_rank_zero

_NOT_SOURCES = frozenset({"__pycache__", "site-packages", "dist-packages"})


class Source:
    """Documents in a fixed order; iterating again reads them again.

    `identity` is what distinguishes this source's content from another's without reading it; `total_bytes` the size of
    its files, None where unknown; `skipped` counts, after an iteration, documents left out and why.
    """

    identity: dict[str, Any]
    total_bytes: int | None = None

    def __init__(self) -> None:
        self.skipped: Counter[str] = Counter()

    def __iter__(self) -> Iterator[str]:
        raise NotImplementedError


def open_source(config: DataConfig) -> Source:
    """Return the source that `config` names; `ValueError` where it has no files or no such field."""
    if config.source == "python_stdlib":
        source: Source = PythonFiles([Path(sysconfig.get_paths()["stdlib"])], config.document_bytes)
    elif config.source == "python_packages":
        source = PythonFiles(_site_directories(), config.document_bytes)
    elif config.source == "hub":
        source = HubDataset(config)
    else:
        source = DataFiles(config)
    return source if config.max_documents is None else _First(source, config.max_documents)


class _First(Source):
    """The first `count` documents of another source."""

    def __init__(self, source: Source, count: int) -> None:
        self.source = source
        self.count = count
        self.identity = {**source.identity, "max_documents": count}
        self.skipped = source.skipped

    def __iter__(self) -> Iterator[str]:
        return itertools.islice(iter(self.source), self.count)


def _site_directories() -> list[Path]:
    """Return the directories on sys.path that installers write packages to."""
    paths = (Path(entry).resolve() for entry in sys.path if entry)
    found = dict.fromkeys(p for p in paths if p.name in ("site-packages", "dist-packages") and p.is_dir())
    return list(found)


class PythonFiles(Source):
    """The Python files below some directories, packages installed below them excluded.

    One document is a file, or with `document_bytes` a run of neighbouring files of one package that ends with the file
    that reaches so many bytes: what a reader of the package would have before them, and long enough for long contexts.
    """

    def __init__(self, roots: list[Path], document_bytes: int | None = None) -> None:
        super().__init__()
        self.document_bytes = document_bytes
        # Sorted by path inside the root, so that a listing does not depend on the file system.
        self._placed = [(root, file) for root in roots for file in sorted(_python_files(root))]
        self.files = [file for _, file in self._placed]
        if not self.files:
            raise ValueError(f"no Python sources below {', '.join(map(str, roots)) or 'any directory of sys.path'}")
        stats = [file.stat() for file in self.files]
        self.total_bytes = sum(stat.st_size for stat in stats)
        self.identity = {"files": _listing(self.files, stats)}
        if document_bytes is not None:
            self.identity["document_bytes"] = document_bytes

    def __iter__(self) -> Iterator[str]:
        self.skipped.clear()
        if self.document_bytes is None:
            yield from (text for file in self.files if (text := self._read(file)) is not None)
        else:
            for _, placed in itertools.groupby(self._placed, _package):
                yield from self._joined(placed, self.document_bytes)

    def _joined(self, placed: Iterable[tuple[Path, Path]], document_bytes: int) -> Iterator[str]:
        """Yield the files of one package, each under a comment with its name, in documents of `document_bytes`."""
        parts: list[str] = []
        size = 0
        for root, file in placed:
            text = self._read(file)
            if text is None:
                continue
            if not text:
                self.skipped["empty"] += 1
                continue
            parts.append(f"# {file.relative_to(root).as_posix()}\n{text}")
            size += len(parts[-1].encode())
            if size >= document_bytes:
                yield "\n".join(parts)
                parts, size = [], 0
        if parts:
            yield "\n".join(parts)

    def _read(self, file: Path) -> str | None:
        try:
            return file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            # A source in another encoding (a test of one, mostly) is left out rather than guessed.
            self.skipped["undecodable"] += 1
        except OSError:
            self.skipped["unreadable"] += 1
        return None


def _package(placed: tuple[Path, Path]) -> tuple[Path, str]:
    root, file = placed
    return root, file.relative_to(root).parts[0]


def _python_files(root: Path) -> Iterator[Path]:
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = [name for name in subdirectories if name not in _NOT_SOURCES]
        for name in names:
            path = Path(directory, name)
            if name.endswith(".py") and path.is_file():
                yield path


def _listing(files: list[Path], stats: list[os.stat_result]) -> list[list[Any]]:
    return [[str(f), s.st_size, s.st_mtime_ns] for f, s in zip(files, stats, strict=True)]


class _Rows(Source):
    """Rows of a dataset that the `datasets` library loads; one document a row."""

    def __init__(self, config: DataConfig, text_field: str) -> None:
        super().__init__()
        self.config = config
        self.text_field = text_field

    def _load(self) -> Iterator[Any]:
        raise NotImplementedError

    def __iter__(self) -> Iterator[str]:
        self.skipped.clear()
        for row in self._load():
            if self.text_field not in row:
                raise ValueError(
                    f"data.field={self.text_field!r} is not in the data, whose fields are {', '.join(map(str, row))}"
                )
            text = row[self.text_field]
            if text is None:
                self.skipped["empty"] += 1
            elif not isinstance(text, str):
                raise ValueError(f"data.field={self.text_field!r} holds {type(text).__name__} values instead of text")
            else:
                yield text


class DataFiles(_Rows):
    """Text, JSON (Lines) or parquet files found by glob patterns."""

    def __init__(self, config: DataConfig) -> None:
        super().__init__(config, "text" if config.source == "text" else config.field)
        self.files = _expand(config.files)
        local = [Path(file) for file in self.files if "://" not in file]
        stats = [file.stat() for file in local]
        if len(local) == len(self.files):
            self.total_bytes = sum(stat.st_size for stat in stats)
        self.identity = {
            "builder": config.source,
            "field": self.text_field,
            "encoding": config.encoding,
            "files": _listing(local, stats),
            "urls": [file for file in self.files if "://" in file],
        }

    def _load(self) -> Iterator[Any]:
        options: dict[str, Any] = {}
        if self.config.source == "text":
            options = {"sample_by": "document", "encoding": self.config.encoding}
        rows = _read_dataset(
            self.config.source, data_files=self.files, split="train", streaming=self.config.streaming, **options
        )
        return _naming_undecodable(rows, self.files, self.config) if self.config.source == "text" else rows


def _expand(patterns: tuple[str, ...]) -> list[str]:
    files: dict[str, None] = {}
    for pattern in patterns:
        if "://" in pattern:
            files[pattern] = None
            continue
        matches = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
        found = [os.path.abspath(match) for match in matches if os.path.isfile(match)]
        if matches and not found:
            raise ValueError(f"data.files={pattern!r} is a directory; give its files, such as '{pattern}/*.txt'")
        if not found:
            raise ValueError(f"no file matches data.files={pattern!r} (looked from {os.getcwd()})")
        files.update(dict.fromkeys(found))
    return list(files)


def _naming_undecodable(rows: Iterator[Any], files: list[str], config: DataConfig) -> Iterator[Any]:
    """Yield `rows`; an undecodable file, which `datasets` does not name, becomes one sentence that does."""
    try:
        yield from rows
    except ValueError:
        for file in files:
            try:
                if "://" not in file:
                    _decode(file, config.encoding)
            except UnicodeDecodeError as error:
                raise ValueError(f"{file} is not {config.encoding} text ({error}); set data.encoding") from error
        raise


def _decode(file: str, encoding: str) -> None:
    with open(file, encoding=encoding) as stream:
        while stream.read(1 << 20):
            pass


class HubDataset(_Rows):
    """A dataset of the Hugging Face Hub or a local dataset directory; code shipped with a dataset is never run.

    `datasets` 4 and later have no way to run a dataset's own code, so there is no option that allows it.
    """

    def __init__(self, config: DataConfig) -> None:
        super().__init__(config, config.field)
        assert config.hub_path is not None
        self.identity = {
            "builder": "hub",
            "path": config.hub_path,
            "name": config.hub_name,
            "split": config.hub_split,
            "revision": config.hub_revision,
            "data_files": list(config.files),
            "field": config.field,
        }
        directory = Path(config.hub_path).expanduser()
        if directory.is_dir():
            files = sorted(file for file in directory.rglob("*") if file.is_file())
            self.identity["files"] = _listing(files, [file.stat() for file in files])

    def _load(self) -> Iterator[Any]:
        config = self.config
        return _read_dataset(
            os.path.expanduser(config.hub_path or ""),
            name=config.hub_name,
            split=config.hub_split,
            revision=config.hub_revision,
            data_files=list(config.files) or None,
            streaming=config.streaming,
        )


def _read_dataset(path: str, **options: Any) -> Iterator[Any]:
    """Yield the rows of `datasets.load_dataset(path, **options)`; its failures become one sentence."""
    import datasets

    if not is_rank_zero():
        datasets.disable_progress_bars()
    try:
        yield from datasets.load_dataset(path, **options)
    except Exception as error:  # datasets has no common base class for what can go wrong
        cause: BaseException = error
        while cause.__cause__ is not None:  # the outermost often says no more than that there was an error
            cause = cause.__cause__
        first = next(iter(str(cause).splitlines()), type(cause).__name__)
        raise ValueError(f"`datasets` cannot read {path!r} with {_set_options(options)}: {first}") from error


def _set_options(options: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in options.items() if value is not None)

"""Sources of documents: what they are (their identity) and their texts, one document at a time."""

from __future__ import annotations

import glob
import itertools
import json
import os
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from powertrain.processes import is_rank_zero

from .config import DataConfig

_NOT_SOURCES = frozenset({"__pycache__", "site-packages", "dist-packages"})
# What no single file is in: opened as a file, the first of them or the archive's own bytes would be the text.
_ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
# Rows of JSON that may lack the field with the text before the field counts as absent from the data.
_ROWS_WITHOUT_FIELD = 1000
# Rows of parquet in memory at once.
_PARQUET_ROWS = 1000


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
    """Rows of a dataset; one document a row."""

    def __init__(self, config: DataConfig, text_field: str) -> None:
        super().__init__()
        self.config = config
        self.text_field = text_field

    def _load(self) -> Iterator[Any]:
        raise NotImplementedError

    def __iter__(self) -> Iterator[str]:
        self.skipped.clear()
        others: dict[str, None] = {}
        found = False
        for number, row in enumerate(self._load(), start=1):
            if self.text_field in row:
                found = True
            elif not found:  # a row of JSON may lack a field that others have
                others.update(dict.fromkeys(row))
                if number == _ROWS_WITHOUT_FIELD:
                    break
            text = row.get(self.text_field)
            if text is None:
                self.skipped["empty"] += 1
            elif not isinstance(text, str):
                raise ValueError(f"data.field={self.text_field!r} holds {type(text).__name__} values instead of text")
            else:
                yield text
        if others and not found:
            raise self._no_field(others)

    def _no_field(self, others: Iterable[str]) -> ValueError:
        return ValueError(f"data.field={self.text_field!r} is not in the data, whose fields are {', '.join(others)}")


class DataFiles(_Rows):
    """Text, JSON (Lines) or parquet files found by glob patterns, or behind URLs; compressed ones by their ending."""

    def __init__(self, config: DataConfig) -> None:
        super().__init__(config, "text" if config.source == "text" else config.field)
        self.files = _expand(config.files)
        local = [Path(file) for file in self.files if "://" not in file]
        stats = [file.stat() for file in local]
        urls = [file for file in self.files if "://" in file]
        if not urls:
            self.total_bytes = sum(stat.st_size for stat in stats)
        archives = [Path(file) for file in dict.fromkeys(file for url in urls for file in _local_files_of(url))]
        self.identity = {
            "builder": config.source,
            "field": self.text_field,
            "encoding": config.encoding,
            "files": _listing(local + archives, stats + [file.stat() for file in archives]),
            "urls": urls,
        }
        if config.source == "json":
            self.identity["reader"] = 2  # the first one rewrote what looked like a date

    def _load(self) -> Iterator[Any]:
        for file in self.files:
            try:
                yield from self._read(file)
            except UnicodeDecodeError as error:
                advice = "; set data.encoding" if self.config.source == "text" else ""
                raise ValueError(f"{file} is not {error.encoding} text ({error}){advice}") from error
            except FileNotFoundError as error:
                raise ValueError(f"{file} does not exist") from error
            except Exception as error:  # the readers have no common base class for what can go wrong
                raise ValueError(f"{file} cannot be read as {self.config.source}: {_first_line(error)}") from error

    def _read(self, file: str) -> Iterator[Any]:
        import fsspec

        source, url = self.config.source, "://" in file
        options: dict[str, Any] = {"mode": "rb"}
        if source == "text":
            options = {"mode": "rt", "compression": "infer", "encoding": self.config.encoding}
        elif source == "json":
            options = {"mode": "rt", "compression": "infer", "encoding": "utf-8-sig", "newline": "\n"}
        # A local path is a list of one, which is never taken for a pattern.
        opened = fsspec.open_files(file if url else [file], expand=url, **options)
        if not opened:
            raise ValueError("no file matches")
        for part in opened:
            with part as stream:
                if source == "text":
                    yield {"text": stream.read()}
                    continue
                empty = True
                for row in self._json_rows(stream) if source == "json" else self._parquet_rows(stream):
                    empty = False
                    yield row
                if empty:
                    self.skipped["file(s) without rows"] += 1

    def _json_rows(self, stream: IO[str]) -> Iterator[dict[str, Any]]:
        """Yield the rows of JSON Lines one by one; where the first line is no value, the file is read at once."""
        # Not by `datasets` or pyarrow: they take a block of strings that look like dates for dates, and rewrite them.
        begun = False
        for number, line in enumerate(stream, start=1):
            if line.isspace():
                continue
            try:
                value = json.loads(line)
                rows = iter(value if isinstance(value, list) else (value,))
            except json.JSONDecodeError as error:
                if begun:
                    raise ValueError(f"line {number}: {error.msg}") from error
                rows = _json_values(line + stream.read(), number)
            begun = True
            for row in rows:
                if isinstance(row, str):
                    row = {"text": row}
                if not isinstance(row, dict):
                    raise ValueError(f"a row is an object or a string, not {json.dumps(row)[:40]}")
                if isinstance(text := row.get(self.text_field), str):
                    text.encode()  # half of a surrogate pair, which JSON can spell, is no text
                yield row

    def _parquet_rows(self, stream: IO[bytes]) -> Iterator[dict[str, Any]]:
        import pyarrow.parquet as pq

        file = pq.ParquetFile(stream)
        if self.text_field not in file.schema_arrow.names:
            if file.metadata.num_rows:  # pandas writes no fields where it has no rows
                raise self._no_field(file.schema_arrow.names)
            return
        for batch in file.iter_batches(_PARQUET_ROWS, columns=[self.text_field]):
            yield from batch.to_pylist()


def _json_values(text: str, first_line: int) -> Iterator[Any]:
    """Yield the values that `text` holds one after another, of an array its items."""
    decoder, text, at = json.JSONDecoder(), text.strip(), 0
    while at < len(text):
        try:
            value, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {first_line + error.lineno - 1}: {error.msg}") from error
        yield from value if isinstance(value, list) else (value,)
        at = next((place for place in range(end, len(text)) if not text[place].isspace()), len(text))


def _expand(patterns: tuple[str, ...]) -> list[str]:
    files: dict[str, None] = {}
    for pattern in patterns:
        if "://" in pattern:
            files[pattern] = None
            continue
        found = _files_matching(pattern)
        if not found and glob.glob(os.path.expanduser(pattern), recursive=True):
            raise ValueError(f"data.files={pattern!r} is a directory; give its files, such as '{pattern}/*.txt'")
        if not found:
            raise ValueError(f"no file matches data.files={pattern!r} (looked from {os.getcwd()})")
        files.update(dict.fromkeys(found))
    for file in files:
        if "://" not in file and "::" in file:
            raise ValueError(f"{file} has '::' in its name, which is for files inside others; rename it")
        if "::" not in file and file.endswith(_ARCHIVES):
            kind = "zip" if file.endswith(".zip") else "tar"
            raise ValueError(f"{file} is an archive; give the files inside it, such as '{kind}://**/*.txt::{file}'")
    return list(files)


def _files_matching(pattern: str) -> list[str]:
    path = os.path.expanduser(pattern)
    matches = [path] if os.path.isfile(path) else sorted(glob.glob(path, recursive=True))
    return [os.path.abspath(match) for match in matches if os.path.isfile(match)]


def _local_files_of(url: str) -> list[str]:
    """Return the files of this machine that a URL names, of one like `zip://*.txt::corpus.zip` the archive."""
    protocol, _, path = url.rpartition("::")[2].rpartition("://")
    return _files_matching(path) if protocol in ("", "file", "local") else []


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
        raise ValueError(
            f"`datasets` cannot read {path!r} with {_set_options(options)}: {_first_line(cause)}"
        ) from error


def _set_options(options: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in options.items() if value is not None)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)

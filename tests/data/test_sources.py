from __future__ import annotations

import gzip
import json
import os
import sys
import sysconfig
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from powertrain.data.config import DataConfig
from powertrain.data.sources import PythonFiles, open_source

from .conftest import make_texts, write_texts


def documents(**options: object) -> list[str]:
    return list(open_source(DataConfig(**options)))  # type: ignore[arg-type]


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# Python sources


def test_stdlib_is_the_running_interpreters() -> None:
    source = open_source(DataConfig())
    assert isinstance(source, PythonFiles)
    root = Path(sysconfig.get_paths()["stdlib"])
    assert root / "argparse.py" in source.files
    assert all(file.is_relative_to(root) and file.suffix == ".py" for file in source.files)
    parts = {part for file in source.files for part in file.relative_to(root).parts}
    assert not parts & {"site-packages", "dist-packages", "__pycache__"}
    assert source.files == sorted(source.files)
    assert source.total_bytes is not None
    assert source.total_bytes > 5e6


def test_packages_are_the_installed_ones() -> None:
    source = open_source(DataConfig(source="python_packages"))
    assert isinstance(source, PythonFiles)
    import torch

    assert Path(torch.__file__).resolve() in source.files
    assert not any("__pycache__" in file.parts for file in source.files)
    assert Path(sysconfig.get_paths()["stdlib"]) / "argparse.py" not in source.files


def test_undecodable_python_is_counted(tmp_path: Path) -> None:
    (tmp_path / "pkg" / "__pycache__").mkdir(parents=True)
    (tmp_path / "pkg" / "good.py").write_text("x = 'é'\n", encoding="utf-8")
    (tmp_path / "pkg" / "windows.py").write_bytes(b"\xef\xbb\xbfa = 1\r\nb = 2\r\n")
    (tmp_path / "pkg" / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\nx = '\xe9'\n")
    (tmp_path / "pkg" / "__pycache__" / "no.py").write_text("cached")
    (tmp_path / "pkg" / "notes.txt").write_text("text")
    (tmp_path / "pkg" / "dangling.py").symlink_to(tmp_path / "absent.py")
    source = PythonFiles([tmp_path])
    for _ in range(2):  # counts start anew
        assert list(source) == ["x = 'é'\n", "a = 1\nb = 2\n"]
        assert source.skipped == {"undecodable": 1}


def test_files_of_one_package_are_joined(tmp_path: Path) -> None:
    """Neighbours of a package share a document until it is long enough; packages never do."""
    for name, text in {
        "a/one.py": "x = 1\n",
        "a/sub/two.py": "y = 2\n" * 10,
        "a/three.py": "z = 3\n",
        "a/empty.py": "",
        "a/bad.py": "",
        "b.py": "single = 1\n",
        "c/four.py": "w = 4\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "a" / "bad.py").write_bytes(b"\xe9")
    source = PythonFiles([tmp_path], document_bytes=70)
    for _ in range(2):
        assert list(source) == [
            "# a/one.py\nx = 1\n\n# a/sub/two.py\n" + "y = 2\n" * 10,
            "# a/three.py\nz = 3\n",
            "# b.py\nsingle = 1\n",
            "# c/four.py\nw = 4\n",
        ]
        assert source.skipped == {"undecodable": 1, "empty": 1}
    assert source.identity != PythonFiles([tmp_path]).identity != PythonFiles([tmp_path], 71).identity
    assert source.total_bytes == PythonFiles([tmp_path]).total_bytes


def test_no_python_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no Python sources below"):
        PythonFiles([tmp_path])


# Files by glob


def test_text_files_are_whole_documents(tmp_path: Path) -> None:
    texts = ["one\n\ntwo\n", "日本語 🙂", "no newline at the end", "", "  \n"]
    pattern = write_texts(tmp_path / "a", texts)
    assert documents(source="text", files=pattern) == texts


def test_text_files_with_windows_line_ends(tmp_path: Path) -> None:
    pattern = write_texts(tmp_path / "a", ["a\r\nb\r\n", "a\nb\n"])
    assert documents(source="text", files=pattern) == ["a\nb\n", "a\nb\n"]


def test_globs_recurse_sort_and_do_not_repeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_texts(tmp_path / "b" / "deep", ["3", "4"])
    write_texts(tmp_path / "a", ["1", "2"])
    monkeypatch.chdir(tmp_path)
    assert documents(source="text", files="**/*.txt") == ["1", "2", "3", "4"]
    assert documents(source="text", files=("b/**/*.txt", "**/*.txt")) == ["3", "4", "1", "2"]
    assert documents(source="text", files="**/*.txt", max_documents=3) == ["1", "2", "3"]


def test_undecodable_text_file_is_named(tmp_path: Path) -> None:
    pattern = write_texts(tmp_path / "a", ["good"])
    bad = tmp_path / "a" / "zz.txt"
    bad.write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match=r"zz\.txt is not utf-8 text .*set data\.encoding"):
        documents(source="text", files=pattern)
    assert documents(source="text", files=str(bad), encoding="latin-1") == ["é"]


def test_no_file_matches(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no file matches data\.files='.*\*\.txt' \(looked from "):
        documents(source="text", files=f"{tmp_path}/*.txt")
    with pytest.raises(ValueError, match="is a directory; give its files"):
        documents(source="text", files=str(tmp_path))


@pytest.mark.parametrize("source", ["text", "json", "parquet"])
def test_names_with_special_characters(tmp_path: Path, source: str) -> None:
    """Each file is read once, whatever its name would match as a pattern."""
    names = sorted(["a[1]", "a1", "q?", "qa", "*", "#", "x{1,2}", "d[a]/b", "da/b"])
    for name in names:
        path = tmp_path / f"{name}.x"
        path.parent.mkdir(exist_ok=True)
        if source == "parquet":
            pq.write_table(pa.table({"text": [name]}), path)
        else:
            path.write_text(name if source == "text" else json.dumps({"text": name}))
    assert sorted(documents(source=source, files=f"{tmp_path}/**/*.x")) == names
    for name in names:
        assert documents(source=source, files=f"{tmp_path}/{name}.x") == [name]


def test_names_that_are_not_of_one_file(tmp_path: Path) -> None:
    (tmp_path / "a::b.txt").write_text("a")
    with pytest.raises(ValueError, match=r"a::b\.txt has '::' in its name, .*; rename it"):
        documents(source="text", files=f"{tmp_path}/*.txt")
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        archive.writestr("1.txt", "one")
        archive.writestr("2.txt", "two")
    with pytest.raises(ValueError, match=r"c\.zip is an archive; give the files inside it, such as 'zip://.*::/"):
        documents(source="text", files=f"{tmp_path}/*.zip")
    assert documents(source="text", files=f"zip://**/*.txt::{tmp_path}/c.zip") == ["one", "two"]


def test_compressed_files_and_urls(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "a.txt.gz", "wt") as stream:
        stream.write("text")
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as stream:
        stream.write('{"text": "row"}\n')
    assert documents(source="text", files=f"{tmp_path}/*.txt.gz") == ["text"]
    assert documents(source="json", files=f"file://{tmp_path}/*.jsonl.gz") == ["row"]
    with pytest.raises(ValueError, match=r"file:///.*/none\.txt does not exist"):
        documents(source="text", files=f"file://{tmp_path}/none.txt")
    with pytest.raises(ValueError, match=r"file:///.*\*\.csv cannot be read as text: no file matches"):
        documents(source="text", files=f"file://{tmp_path}/*.csv")
    with pytest.raises(ValueError, match=r"none://x cannot be read as json: Protocol not known: none"):
        documents(source="json", files="none://x")


def test_json_rows(tmp_path: Path) -> None:
    texts = ["a\r\nb", "日本語 🙂 \u2028", "", 'tab\t "quoted"']
    write_jsonl(tmp_path / "x.jsonl", [{"id": i, "content": text} for i, text in enumerate(texts)])
    write_jsonl(tmp_path / "y.jsonl", [{"id": 9, "content": None}])
    options = {"source": "json", "field": "content"}
    # Strings of rows are taken as they stand, carriage returns too.
    assert documents(files=str(tmp_path / "x.jsonl"), **options) == texts
    source = open_source(DataConfig(files=f"{tmp_path}/*.jsonl", **options))  # type: ignore[arg-type]
    assert list(source) == texts
    assert source.skipped == {"empty": 1}


def test_json_strings_that_look_like_dates(tmp_path: Path) -> None:
    texts = ["2020-01-01", "2020-01-01T00:00:00Z", "2020-01-01 00:00:00"] * 10
    write_jsonl(tmp_path / "x.jsonl", [{"text": text} for text in texts])
    assert documents(source="json", files=str(tmp_path / "x.jsonl")) == texts


@pytest.mark.parametrize("indent", [None, 1])
def test_json_arrays_and_objects_over_many_lines(tmp_path: Path, indent: int | None) -> None:
    rows = [{"text": "a", "of": {"text": ["nested"]}}, {"text": "b"}]
    for name, content in {
        "array": json.dumps(rows, indent=indent),
        "lines": "\ufeff" + "\n\n".join(json.dumps(row, indent=indent) for row in rows) + "\r\n",
        "strings": json.dumps(["a", "b"], indent=indent),
        "after a space": " " + json.dumps(rows, indent=indent),
        "on one line": " ".join(json.dumps(row) for row in rows),
        "from the second line on": '{"text": "a",\n "x": 1}\n{"text": "b"}',
        "by carriage returns": "\r".join(json.dumps(row) for row in rows),
    }.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
        assert documents(source="json", files=str(tmp_path / name)) == ["a", "b"], name


def test_json_rows_that_lack_the_field(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "x.jsonl", [{"id": 1}, {"id": 2, "text": "a"}, {"id": 3}])
    source = open_source(DataConfig(source="json", files=f"{tmp_path}/x.jsonl"))  # type: ignore[arg-type]
    assert list(source) == ["a"]
    assert source.skipped == {"empty": 2}
    rows: list[dict] = [{"id": 1}] * 1000
    write_jsonl(tmp_path / "y.jsonl", [*rows, {"text": "too late"}])
    with pytest.raises(ValueError, match=r"data\.field='text' is not in the data, whose fields are id$"):
        documents(source="json", files=f"{tmp_path}/y.jsonl")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"text": "a"}\n{"text": \n', r"line 2: Expecting value"),
        ('{"text": "a"}\n5\n', r"a row is an object or a string, not 5"),
        ('{"text": "a \\ud800 b"}\n', r"surrogates not allowed"),
        ("[" * 100_000, r"recursion"),
        ('\n[{"text": "a"},\n{"text": }]\n', r"line 3: Expecting value"),
    ],
)
def test_json_that_does_not_parse(tmp_path: Path, content: str, words: str) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": "good"}])
    (tmp_path / "b.jsonl").write_text(content)
    with pytest.raises(ValueError, match=rf"^/.*b\.jsonl cannot be read as json: .*{words}") as error:
        documents(source="json", files=f"{tmp_path}/*.jsonl")
    assert "\n" not in str(error.value)
    assert "a.jsonl" not in str(error.value)


def test_files_without_rows_are_left_out(tmp_path: Path) -> None:
    import pandas as pd

    (tmp_path / "a.jsonl").touch()
    write_jsonl(tmp_path / "b.jsonl", [{"text": "b"}])
    (tmp_path / "c.json").write_text("[]")
    pd.DataFrame({"text": []}).to_parquet(tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["b"]}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "c.parquet")
    pd.DataFrame({}).to_parquet(tmp_path / "d.parquet")
    for kind, count in (("json", 2), ("parquet", 3)):
        source = open_source(DataConfig(source=kind, files=f"{tmp_path}/*.{kind}*"))  # type: ignore[arg-type]
        assert list(source) == ["b"]
        assert source.skipped == {"file(s) without rows": count}


def test_parquet_rows(tmp_path: Path) -> None:
    texts = make_texts(20)
    pq.write_table(pa.table({"text": texts[:9], "n": list(range(9))}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": texts[9:], "n": list(range(11))}), tmp_path / "b.parquet")
    assert documents(source="parquet", files=f"{tmp_path}/*.parquet") == texts


def test_missing_field_names_the_others(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "x.jsonl", [{"id": 1, "body": "a"}])
    with pytest.raises(ValueError, match=r"data\.field='text' is not in the data, whose fields are id, body"):
        documents(source="json", files=str(tmp_path / "x.jsonl"))
    pq.write_table(pa.table({"id": [1], "body": ["a"]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"x\.parquet .*data\.field='text' is not in the data, .* are id, body"):
        documents(source="parquet", files=str(tmp_path / "x.parquet"))


def test_field_that_is_no_text(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "x.jsonl", [{"id": 1, "text": "a"}])
    with pytest.raises(ValueError, match=r"data\.field='id' holds int values instead of text"):
        documents(source="json", files=str(tmp_path / "x.jsonl"), field="id")


def test_broken_file_is_one_sentence(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["good"]}), tmp_path / "a.parquet")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 but not for long")
    with pytest.raises(ValueError, match=r"^/.*x\.parquet cannot be read as parquet: ") as error:
        documents(source="parquet", files=f"{tmp_path}/*.parquet")
    assert "\n" not in str(error.value)
    assert "a.parquet" not in str(error.value)


# Hub, on local dataset directories


@pytest.fixture
def dataset_directory(tmp_path: Path) -> tuple[Path, list[str]]:
    """A dataset repository as on the Hub: a card that names two subsets, one of them with a test split."""
    directory = tmp_path / "dataset"
    texts = make_texts(10)
    write_jsonl(directory / "small" / "train.jsonl", [{"text": text} for text in texts[:6]])
    write_jsonl(directory / "small" / "test.jsonl", [{"text": text} for text in texts[6:8]])
    write_jsonl(directory / "large" / "a.jsonl", [{"text": text} for text in texts[:5]])
    write_jsonl(directory / "large" / "b.jsonl", [{"text": text} for text in texts[5:]])
    (directory / "README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: small\n  data_files:\n"
        "  - {split: train, path: small/train.jsonl}\n  - {split: test, path: small/test.jsonl}\n"
        "- config_name: large\n  data_files:\n  - {split: train, path: large/*.jsonl}\n"
        "---\n"
    )
    return directory, texts


@pytest.mark.parametrize("streaming", [True, False])
def test_hub_subsets_and_splits(dataset_directory: tuple[Path, list[str]], streaming: bool) -> None:
    directory, texts = dataset_directory
    options = {"source": "hub", "hub_path": str(directory), "streaming": streaming}
    assert documents(hub_name="small", **options) == texts[:6]
    assert documents(hub_name="small", hub_split="test", **options) == texts[6:8]
    assert documents(hub_name="large", **options) == texts
    assert documents(files="large/b.jsonl", **options) == texts[5:]
    with pytest.raises(ValueError, match=r"`datasets` cannot read .*name='medium'.*small"):
        documents(hub_name="medium", **options)
    with pytest.raises(ValueError, match=r"`datasets` cannot read .*split='validation'"):
        documents(hub_name="small", hub_split="validation", **options)
    with pytest.raises(ValueError, match=r"data\.field='body' is not in the data, whose fields are text"):
        documents(hub_name="small", field="body", **options)


@pytest.mark.parametrize("streaming", [True, False])
def test_hub_parquet_directory(tmp_path: Path, streaming: bool) -> None:
    texts = make_texts(10)
    directory = tmp_path / "dataset"
    directory.mkdir()
    pq.write_table(pa.table({"text": texts[:4], "n": list(range(4))}), directory / "train-00000-of-00002.parquet")
    pq.write_table(pa.table({"text": texts[4:], "n": list(range(6))}), directory / "train-00001-of-00002.parquet")
    assert documents(source="hub", hub_path=str(directory), streaming=streaming) == texts


def test_code_in_a_dataset_is_never_run(tmp_path: Path) -> None:
    """A directory with a loading script is refused, with or without data files; the script does not run."""
    directory = tmp_path / "scripted"
    write_jsonl(directory / "train.jsonl", [{"text": "a"}])
    witness = tmp_path / "witness"
    script = directory / "scripted.py"
    script.write_text(f"open({str(witness)!r}, 'w').close()\n")
    for path in (script, directory):
        with pytest.raises(ValueError, match="Dataset scripts are no longer supported"):
            documents(source="hub", hub_path=str(path))
    assert not witness.exists()


# Identity


def test_identity_follows_the_files(tmp_path: Path) -> None:
    pattern = write_texts(tmp_path / "a", ["one", "two"])

    def identity(**options: object) -> dict:
        return open_source(DataConfig(source="text", files=pattern, **options)).identity  # type: ignore[arg-type]

    first = identity()
    assert identity() == first
    assert identity(max_documents=1) != first
    assert identity(encoding="latin-1") != first
    os.utime(tmp_path / "a" / "0001.txt", ns=(1, 1))
    assert identity() != first


def test_editing_a_dataset_directory_changes_its_identity(dataset_directory: tuple[Path, list[str]]) -> None:
    directory, _ = dataset_directory
    config = DataConfig(source="hub", hub_path=str(directory), hub_name="small")
    first = open_source(config).identity
    assert open_source(config).identity == first
    write_jsonl(directory / "small" / "train.jsonl", [{"text": "other"}])
    assert open_source(config).identity != first


def test_sources_are_imported_lazily() -> None:
    import subprocess

    code = (
        "import sys, powertrain.data.sources, powertrain.data.prepare; "
        "heavy = {'torch', 'lightning', 'datasets', 'tokenizers'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

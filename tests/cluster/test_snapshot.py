import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from powertrain.cluster import snapshot
from powertrain.cluster.snapshot import PARTS, code_version, copy_code, copy_path


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A small checkout that powertrain seems to run from."""
    root = tmp_path / "checkout"
    for name in ("powertrain/__pycache__", "powertrain/ops", "conf", "kernels/src"):
        (root / name).mkdir(parents=True)
    for name in (
        "pyproject.toml",
        "powertrain/__init__.py",
        "powertrain/ops/a.py",
        "conf/config.yaml",
        "kernels/src/k.cu",
    ):
        (root / name).write_text(name)
    (root / "powertrain/__pycache__/a.pyc").write_text("x")
    (root / "conf/.hidden").write_text("x")
    (root / "README.md").write_text("x")
    monkeypatch.setattr(snapshot, "_root", lambda: root)
    return root


def test_a_copy_holds_what_a_run_reads_and_says_where_it_came_from(checkout, tmp_path):
    for command in (
        ["init", "-q"],
        ["add", "."],
        ["-c", "user.name=n", "-c", "user.email=e@e", "commit", "-q", "-m", "m"],
    ):
        subprocess.run(["git", *command], cwd=checkout, check=True)
    (checkout / "conf/config.yaml").write_text("edited")
    copy = copy_code(tmp_path / "code")
    assert copy == copy_path(tmp_path / "code")
    files = {p.relative_to(copy).as_posix() for p in copy.rglob("*") if p.is_file()}
    assert files == {
        "pyproject.toml",
        "powertrain/__init__.py",
        "powertrain/ops/a.py",
        "conf/config.yaml",
        "kernels/src/k.cu",
        "code.json",
    }
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True).stdout.strip()
    assert code_version() == {"git_commit": head, "git_modified": True}
    version = json.loads((copy / "code.json").read_text())
    assert version == {"git_commit": head, "git_modified": True, "code_digest": copy.name}
    assert [p.name for p in (tmp_path / "code").iterdir()] == [copy.name]


def test_the_same_content_is_copied_once_and_other_content_beside_it(checkout, tmp_path):
    first = copy_code(tmp_path / "code")
    marker = first / "untouched"
    marker.touch()
    assert copy_code(tmp_path / "code") == first
    assert marker.exists()
    (checkout / "powertrain/ops/a.py").write_text("new")
    second = copy_code(tmp_path / "code")
    assert second != first
    assert (first / "powertrain/ops/a.py").read_text() == "powertrain/ops/a.py"
    assert (second / "powertrain/ops/a.py").read_text() == "new"


def test_an_installed_package_is_not_copied(checkout, tmp_path):
    (checkout / "powertrain" / "_share").mkdir()  # pyproject.toml may lie beside it, by another package's mistake
    assert copy_code(tmp_path / "code") is None
    assert copy_path(tmp_path / "code") is None
    assert not (tmp_path / "code").exists()


def test_jobs_import_the_copy_even_where_the_working_directory_is_a_checkout(tmp_path):
    copy = copy_code(tmp_path / "code")
    root = Path(snapshot.__file__).resolve().parents[2]
    assert {p.name for p in copy.iterdir()} <= {*PARTS, "code.json"}
    probe = tmp_path / "probe.py"
    code = "import powertrain.cluster.snapshot as s, json; print(json.dumps([str(s._root()), s.code_version()]))"
    probe.write_text(code)
    done = subprocess.run(
        [sys.executable, "-P", str(probe)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
        check=True,
    )
    where, version = json.loads(done.stdout)
    assert where == str(copy)
    assert version["code_digest"] == copy.name

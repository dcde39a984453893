"""The code that a submitted job runs: copied into the run directory, out of reach of edits made while the job waits."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import powertrain

VERSION_FILE = "code.json"
# What a run reads of a checkout; an installed package carries these inside itself.
PARTS = ("powertrain", "conf", "recipes", "kernels", "pyproject.toml")
SKIPPED = ("__pycache__", "build")


def _root() -> Path:
    return Path(powertrain.__file__).resolve().parent.parent


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def code_version() -> dict[str, Any]:
    """Return which code this is: `git_commit`, and `git_modified` (edits that no commit holds); None outside of git.

    A copy made by `copy_code` says what the checkout was, and the `code_digest` of what was copied.
    """
    root = _root()
    try:
        return dict(json.loads((root / VERSION_FILE).read_text()))
    except FileNotFoundError:
        pass
    if not (root / ".git").exists():
        return {"git_commit": None, "git_modified": False}
    modified = _git(root, "status", "--porcelain", "--untracked-files=no")
    return {"git_commit": _git(root, "rev-parse", "HEAD"), "git_modified": bool(modified)}


def _files(root: Path) -> Iterator[Path]:
    for part in PARTS:
        source = root / part
        if source.is_file():
            yield source
        for directory, folders, names in os.walk(source):
            folders[:] = sorted(name for name in folders if name not in SKIPPED and not name.startswith("."))
            paths = (Path(directory, name) for name in sorted(names) if not name.startswith("."))
            yield from (path for path in paths if path.is_file())  # not links that lead nowhere


def _digest(root: Path) -> str:
    digest = hashlib.sha256()
    for path in _files(root):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]


def copy_path(directory: Path) -> Path | None:
    """Return where `copy_code` puts the copy: `directory/<digest of the files>`; None where it makes none."""
    root = _root()
    return None if (root / "powertrain" / "_share").is_dir() else directory / _digest(root)


def copy_code(directory: Path) -> Path | None:
    """Copy the checkout that this code runs from to `copy_path(directory)`, once per content.

    Returns:
        The copy, to be put on PYTHONPATH; None where powertrain is an installed package, which nobody edits.
    """
    root = _root()
    target = copy_path(directory)
    if target is None or target.exists():
        return target
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".copy-", dir=directory) as temporary:
        work = Path(temporary) / "code"
        for path in _files(root):
            copy = work / path.relative_to(root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        # Files may have been edited since: what was copied has its own name.
        target = directory / _digest(work)
        version = {**code_version(), "code_digest": target.name}
        (work / VERSION_FILE).write_text(json.dumps(version, indent=2) + "\n")
        try:
            os.rename(work, target)
        except OSError:
            # Another submission put the same content there meanwhile.
            if not target.exists():
                raise
    return target

"""Files that appear under their names whole or not at all. Any part of powertrain may import it; it imports none.

What is written lies beside its place, under a name that no other writer has, until it is whole; then one call of the
file system puts it there. So a reader finds the file of before or that of after, a writer that fails changes nothing,
and any number of processes may write one file: the last one's stays. Permissions are those that the umask gives.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

# Longer than any writer takes, and than the clocks of machines that share files differ.
ABANDONED_SECONDS = 24 * 3600.0
_cleaned: set[Path] = set()  # where this process has looked for what killed writers left


def write_file(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Write a file, in the place of the one before; text as UTF-8.

    Args:
        durable: its content is on the disk before it has its name, so that a power cut leaves a whole file, too.
    Errors:
        OSError: it cannot be written; the file of before is as it was.
    """
    with replacing_file(path, durable=durable) as temporary:
        temporary.write_bytes(_encoded(content))


def write_new_file(path: Path, content: str | bytes, *, durable: bool = True) -> bool:
    """Write a file unless there is one of that name; False where there is. Otherwise as `write_file`."""
    with _beside(path) as temporary:
        temporary.write_bytes(_encoded(content))
        if durable:
            fsync(temporary)
        try:
            # A hard link fails where the name exists, which a rename does not.
            os.link(temporary, path)
        except FileExistsError:
            return False
    return True


@contextlib.contextmanager
def replacing_file(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield the name of a file to write, which takes the place of `path` when the block ends well; see `write_file`."""
    with _beside(path) as temporary:
        yield temporary
        if durable:
            fsync(temporary)
        os.replace(temporary, path)


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Return when the content of a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_abandoned(directory: Path, pattern: str) -> None:
    """Remove the files and directories of that pattern that nobody has written to for a day: what was killed left them.

    Younger ones may be those of a process that runs, here or on another machine.
    """
    found: list[Path] = []
    with contextlib.suppress(OSError):
        found = list(directory.glob(pattern))
    for path in found:
        with contextlib.suppress(OSError):  # another process was faster, or they are another user's
            if time.time() - path.stat().st_mtime <= ABANDONED_SECONDS:
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    if path not in _cleaned:  # a directory may be long, and on a file system that is slow to list it
        remove_abandoned(path.parent, f".{glob.escape(path.name)}.*.tmp")
        _cleaned.add(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _encoded(content: str | bytes) -> bytes:
    return content.encode() if isinstance(content, str) else content

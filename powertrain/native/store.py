"""Where built libraries live: one folder per content key, written whole or not at all, checked before it is loaded."""

import contextlib
import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from powertrain.cache_directory import cache_directory
from powertrain.files import remove_abandoned, write_file
from powertrain.locks import take_lock
from powertrain.native.errors import KernelsUnavailable


@dataclass(frozen=True)
class Manifest:
    """What is written beside a built library (`manifest.json`)."""

    key: str  # content key of sources and flags
    sha256: str  # of the library file
    size: int  # bytes
    compiler: str  # name and release
    targets: dict[str, list[str]]  # the kernels' -gencode values by source folder; of the binding the torch release
    seconds: float  # time the build took, objects taken from the cache not counted

    @staticmethod
    def read(path: Path) -> "Manifest":
        return Manifest(**json.loads(path.read_text()))


def cache_root() -> Path:
    """`kernels` in the `cache_directory`; absolute, because the build runs in a directory of its own.

    Raises:
        KernelsUnavailable: there is no cache directory.
    """
    try:
        return cache_directory() / "kernels"
    except ValueError as error:
        raise KernelsUnavailable(str(error)) from error


def find(name: str, key: str, folders: tuple[Path, ...]) -> Path | None:
    """The library `name` of content `key` in the first of `folders` that holds it with its manifest; None without."""
    for folder in folders:
        if (folder / name).is_file() and _manifest_matches(folder, key):
            return folder / name
    return None


def publish(
    content: bytes, folder: Path, name: str, *, key: str, compiler: str, targets: dict[str, list[str]], seconds: float
) -> None:
    """Writes a built library and its manifest into `folder`."""
    manifest = Manifest(
        key=key,
        sha256=hashlib.sha256(content).hexdigest(),
        size=len(content),
        compiler=compiler,
        targets=targets,
        seconds=round(seconds, 1),
    )
    folder.mkdir(parents=True, exist_ok=True)
    # The manifest goes first: a crash between the two leaves a library that fails its check, never one unchecked.
    write_file(folder / "manifest.json", json.dumps(asdict(manifest), indent=2))
    write_file(folder / name, content)
    say(f"built {folder / name} in {manifest.seconds:.0f} s")


def copy_out(library: Path, output: Path) -> None:
    """Copies a built library and its manifest into the folder `output`."""
    output.mkdir(parents=True, exist_ok=True)
    for name in (library.name, "manifest.json"):
        write_file(output / name, (library.parent / name).read_bytes())


def verify_library(library: Path) -> Manifest:
    """Checks a library against the digest in its manifest.

    Raises:
        KernelsUnavailable: the file is not what was built (truncated, or written over).
    """
    manifest = Manifest.read(library.parent / "manifest.json")
    content = library.read_bytes()
    if len(content) != manifest.size or hashlib.sha256(content).hexdigest() != manifest.sha256:
        raise KernelsUnavailable(
            f"{library} is damaged ({len(content)} bytes where {manifest.size} were built, or other content): "
            "`powertrain kernels build --force` builds it anew."
        )
    return manifest


@contextlib.contextmanager
def building() -> Iterator[None]:
    """Only one process builds at a time; the others wait, and find what it built.

    Where the file system has no locks several may build at once, each the same: `publish` puts it there as a whole.
    """
    path = cache_root() / "lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as handle:
        if take_lock(handle) is False:
            say("another process builds the CUDA kernels; waiting for it")
            take_lock(handle, wait=True)
        # Of builds that were killed. Where there are no locks, or not across machines, others may run.
        remove_abandoned(path.parent, ".*-*")
        remove_abandoned(path.parent / "objects", "*.part")
        yield


def say(line: str) -> None:
    """Reports progress on stderr."""
    print(f"[powertrain kernels] {line}", file=sys.stderr, flush=True)


def _manifest_matches(folder: Path, key: str) -> bool:
    try:
        return Manifest.read(folder / "manifest.json").key == key
    except (OSError, ValueError, TypeError):
        return False

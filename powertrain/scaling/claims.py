"""Claims with leases on a shared file system: several runners, on one machine or many, never train the same cell.

A claim is a file that is created exclusively and whose modification time its owner renews. A claim that was not
renewed for a lease, or whose owner is a process of this machine that no longer lives, may be taken over. Should two
runners ever hold one claim (a machine slept for longer than the lease), nothing is lost: records are created
exclusively too.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from powertrain.files import write_new_file
from powertrain.schema import build

# Longer than any file system's caches and pauses, short enough that a lost machine does not hold up a sweep.
LEASE_SECONDS = 120.0


def machine() -> str:
    """Return what identifies this machine's process table: host, boot and namespace (containers share host names)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        boot = namespace = ""
    return f"{socket.gethostname()}/{boot}/{namespace}"


@dataclass(frozen=True)
class Owner:
    """Who holds a claim."""

    token: str
    machine: str
    pid: int
    who: str  # for people: host, process, Slurm job

    def dead(self) -> bool:
        """Return whether the owner is a process of this machine that has ended; False where it cannot be known."""
        if self.machine != machine():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return False


def _this_process() -> Owner:
    job = os.environ.get("SLURM_JOB_ID")
    who = f"{socket.gethostname()}, process {os.getpid()}" + (f", Slurm job {job}" if job else "")
    return Owner(uuid.uuid4().hex, machine(), os.getpid(), who)


class Claim:
    """A claim that this process holds; renewed in the background until it is released."""

    def __init__(self, path: Path, owner: Owner, lease_seconds: float) -> None:
        self.path, self.owner = path, owner
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, args=(lease_seconds / 4,), daemon=True)
        self._thread.start()

    def _renew(self, interval: float) -> None:
        while not self._stop.wait(interval):
            try:
                if read_owner(self.path) == self.owner:
                    os.utime(self.path)
            except OSError:
                # The file system may come back; until then the lease runs on.
                continue

    def release(self) -> None:
        """Give the claim up, unless another runner took it over."""
        self._stop.set()
        self._thread.join()
        if read_owner(self.path) == self.owner:
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> Claim:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def read_owner(path: Path) -> Owner | None:
    """Return who holds a claim; None where nobody does, or the file does not say who."""
    try:
        return build(Owner, json.loads(path.read_text()))
    except (FileNotFoundError, ValueError):
        return None


class Claims:
    """The claims of one sweep.

    Args:
        directory: on a file system that all runners share.
        lease_seconds: time without renewal after which a claim may be taken over.
    """

    def __init__(self, directory: Path, lease_seconds: float = LEASE_SECONDS) -> None:
        self.directory, self.lease_seconds = directory, lease_seconds

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}.claim"

    def _now(self) -> float:
        # The file system's clock, which also stamped the claims; machines' clocks differ.
        probe = self.directory / f".clock-{uuid.uuid4().hex}"
        probe.touch()
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def _expired(self, path: Path, owner: Owner | None, now: Callable[[], float]) -> bool:
        if owner is not None and owner.dead():
            return True
        try:
            return now() - path.stat().st_mtime > self.lease_seconds
        except FileNotFoundError:
            return False

    def holder(self, name: str) -> str | None:
        """Return who holds a claim that has not expired, in words; None where it is free. Writes nothing."""
        path = self._path(name)
        owner = read_owner(path)
        if not path.exists() or self._expired(path, owner, time.time):
            return None
        return owner.who if owner is not None else "unknown"

    def take(self, name: str) -> Claim | None:
        """Claim a name; None where another runner holds it."""
        self.directory.mkdir(parents=True, exist_ok=True)
        path, owner = self._path(name), _this_process()
        if path.exists():
            previous = read_owner(path)
            if not self._expired(path, previous, self._now) or not self._evict(path, previous):
                return None
        # Not durable: what a power cut ends holds no claim.
        if not write_new_file(path, json.dumps(owner.__dict__), durable=False):
            return None
        return Claim(path, owner, self.lease_seconds)

    def _evict(self, path: Path, previous: Owner | None) -> bool:
        """Remove an expired claim; False where another runner was faster."""
        aside = path.with_name(f".expired-{uuid.uuid4().hex}")
        try:
            os.rename(path, aside)
        except FileNotFoundError:
            return False
        try:
            if read_owner(aside) == previous:
                return True
            # Between our look and our rename another runner had taken it over: give it back.
            with contextlib.suppress(FileExistsError):
                os.link(aside, path)
            return False
        finally:
            aside.unlink(missing_ok=True)

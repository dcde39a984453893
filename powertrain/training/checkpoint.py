"""A directory of checkpoints in which a crash, a full disk or a damaged file never costs the one before.

step-00000100/                  a whole checkpoint: it gets this name when everything in it is on the disk
    rank-00000.safetensors      the tensors that process 0 wrote, and its random state; see checkpoint_files.py
    manifest.json               every file with its size and SHA-256, which tensors are where, and all plain values
last, best                      links to the newest, and to the one with the lowest validation loss
damaged-step-00000200/          what a run did not go on from; nothing reads it again, and the newest of these is kept

Training only waits while its tensors are copied to host memory. A thread of each process writes them; that of rank 0
waits for all, and makes the directory a checkpoint.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from powertrain.files import fsync, sha256_file, write_file
from powertrain.training.checkpoint_files import (
    CheckpointError,
    HostCopies,
    Piece,
    PieceReader,
    metadata_of,
    pieces_to_write,
    write_pieces,
)
from powertrain.training.ranks import ALONE, Ranks

FORMAT = 3
MANIFEST = "manifest.json"
WEIGHTS = "model."  # the model's tensors are saved under this and their own names
_NAME = re.compile(r"step-(\d{8,})")
_DAMAGED = re.compile(r"damaged-step-(\d{8,})(?:\.(\d+))?")
_POLL = 0.02  # seconds between looks at what other processes have written
_RETRIES = (1.0, 2.0, 4.0)  # seconds before each further attempt to read what a network file system does not give

T = TypeVar("T")


class UnreadableError(CheckpointError):
    """A checkpoint cannot be read here and now, which says nothing about what it holds."""


def _patiently(path: Path, read: Callable[[], T]) -> T:
    """Return what `read` gives of a checkpoint's file, in several attempts.

    Errors:
        UnreadableError: the file system does not give it.
        CheckpointError: the checkpoint lacks it.
    """
    for delay in _RETRIES:
        with contextlib.suppress(OSError):
            return read()
        time.sleep(delay)
        # NFS remembers which names it did not find, until the directory is opened.
        with contextlib.suppress(OSError):
            os.listdir(path.parent)
    try:
        return read()
    except OSError as error:
        if not isinstance(error, FileNotFoundError):
            raise UnreadableError(f"{path} cannot be read ({error.strerror})") from error
        if not os.path.isdir(path.parent):
            raise UnreadableError(f"{path.parent} is not there") from error
        raise CheckpointError(f"{path.name} is missing") from error


def _file_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _digest(manifest: Mapping[str, Any]) -> str:
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _seal(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the manifest as JSON holds it (keys are text, tuples are lists), with the digest that a reader finds."""
    held = json.loads(json.dumps(manifest))
    return {**held, "sha256": _digest(held)}


def _read_manifest(directory: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint's directory; a CheckpointError says what is wrong with it."""
    path = directory / MANIFEST
    content = _patiently(path, path.read_bytes)
    try:
        manifest = json.loads(content)
        stated = manifest["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"its manifest is damaged ({error})") from error
    if _digest(manifest) != stated:
        raise CheckpointError("its manifest is not the one it was written with")
    if manifest["format"] != FORMAT:
        raise CheckpointError(f"it has format {manifest['format']!r}; this version reads {FORMAT}")
    return manifest


def _check_size(path: Path, stated: Mapping[str, Any]) -> None:
    size = _patiently(path, path.stat).st_size
    if size != stated["bytes"]:
        raise CheckpointError(f"{path.name} has {size} bytes instead of {stated['bytes']}")


def _check_files(directory: Path, files: Mapping[str, Mapping[str, Any]], share: tuple[int, int] = (0, 1)) -> None:
    """Read the files r, r + n, ... of a checkpoint, for a share (r, n); a CheckpointError says what is wrong."""
    for name in sorted(files)[share[0] :: share[1]]:
        path = directory / name
        _check_size(path, files[name])
        if _patiently(path, partial(sha256_file, path)) != files[name]["sha256"]:
            raise CheckpointError(f"the SHA-256 of {name} is not the one it was written with")


def _best(val_losses: Mapping[int, float | None]) -> int | None:
    """Return the step with the lowest validation loss (the first of equals), or None."""
    losses = {step: loss for step, loss in val_losses.items() if loss is not None and loss == loss}
    return min(losses, key=lambda step: (losses[step], step)) if losses else None


class Checkpoint:
    """A checkpoint on the disk: its plain values, and its tensors where they are asked for.

    Args:
        directory: `.../checkpoints/step-00000100`, or a link to one.
        verify: read every file once to compare its size and SHA-256 with the manifest's.
    Errors:
        CheckpointError: the directory is no checkpoint, its manifest or a file is damaged, or it cannot be read.
    """

    def __init__(self, directory: str | Path, *, verify: bool = True) -> None:
        self.directory = Path(directory)
        try:
            manifest = _read_manifest(self.directory)
            if verify:
                _check_files(self.directory, manifest["files"])
        except CheckpointError as error:
            raise CheckpointError(f"{self.directory} is not a usable checkpoint: {error}") from error
        self.step: int = manifest["step"]
        self.val_loss: float | None = manifest["val_loss"]  # at exactly this step, nats per token
        self.values: dict[str, Any] = manifest["values"]  # as they were given to CheckpointStore.begin
        self.shapes: dict[str, list[int]] = manifest["tensors"]  # of whole tensors, by name
        self._reader = PieceReader(self.directory, {name: facts["pieces"] for name, facts in manifest["files"].items()})
        self._ranks = len(manifest["files"])

    def read_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill tensors, whole or sharded, in place with those of the same names; see `PieceReader.read_into`."""
        self._reader.read_into(tensors)

    def rng(self, rank: int) -> dict[str, Any] | None:
        """Return the random state of a process, or None for one that there was not."""
        if rank >= self._ranks:
            return None
        return json.loads(metadata_of(self.directory / _file_name(rank))["rng"])


def read_weights(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Fill the weights of `model`, whole or sharded, in place.

    Errors:
        CheckpointError: the checkpoint is of another model, or cannot be read.
    """
    weights = {WEIGHTS + name: tensor for name, tensor in model.state_dict().items()}
    saved = {name: shape for name, shape in checkpoint.shapes.items() if name.startswith(WEIGHTS)}
    faults = [f"{name} is missing" for name in sorted(weights.keys() - saved.keys())]
    faults += [f"{name} is unknown" for name in sorted(saved.keys() - weights.keys())]
    faults += [
        f"size mismatch for {name}: {saved[name]}, now {list(tensor.shape)}"
        for name, tensor in weights.items()
        if name in saved and saved[name] != list(tensor.shape)
    ]
    if faults:
        raise CheckpointError(f"{checkpoint.directory} is of another model: {'; '.join(faults[:2])}")
    checkpoint.read_into(weights)


@dataclass
class _Save:
    """A save that was begun."""

    step: int
    thread: threading.Thread | None = None
    error: str | None = None  # of this process or, on rank 0, of the first that failed


class CheckpointStore:
    """Saves, verifies, finds and prunes checkpoints under one directory, for all processes of a run together.

    Args:
        directory: created by the first save.
        keep: newest checkpoints kept; the best one is kept besides.
        ranks: the processes; alone unless given.
    """

    def __init__(self, directory: str | Path, keep: int = 2, ranks: Ranks = ALONE) -> None:
        assert keep >= 1
        self.directory = Path(directory)
        self.keep = keep
        self.ranks = ranks
        self.pause_seconds = 0.0  # that the latest save kept its caller waiting before it returned
        self.save_seconds = 0.0  # from its beginning until it was a checkpoint
        self._copies = HostCopies()
        self._save: _Save | None = None
        self._number = 0
        self._attempt = secrets.token_hex(4)  # of this process until the first save, then that of rank 0
        self._attempt_agreed = ranks.size == 1

    def path(self, step: int) -> Path:
        """Return the directory of a step."""
        return self.directory / f"step-{step:08d}"

    def _temporary(self, step: int) -> Path:
        # A process that outlived its attempt writes beside what the next attempt writes, never into it.
        return self.directory / f".step-{step:08d}.{self._attempt}.tmp"

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, ascending; whether they are undamaged is not looked at."""
        if not self.directory.is_dir():
            return []
        matches = (_NAME.fullmatch(entry.name) for entry in self.directory.iterdir() if entry.is_dir())
        return sorted(int(match[1]) for match in matches if match)

    def fault(self, step: int) -> str | None:
        """Return what is wrong with the checkpoint of a step, or None when it is whole.

        Errors:
            UnreadableError: it cannot be read.
        """
        fault = self._examine(step)
        if isinstance(fault, UnreadableError):
            raise fault
        return None if fault is None else str(fault)

    def _examine(self, step: int, share: tuple[int, int] = (0, 1)) -> CheckpointError | None:
        """Return what keeps a run from going on with the checkpoint of a step, by its files r, r + n, ... of (r, n)."""
        try:
            _check_files(self.path(step), _read_manifest(self.path(step))["files"], share)
        except CheckpointError as error:
            return error
        return None

    # Saving

    @property
    def busy(self) -> bool:
        """Whether a save of this process is still being written (on rank 0: is not yet a checkpoint)."""
        return self._save is not None and self._save.thread is not None and self._save.thread.is_alive()

    @property
    def pending(self) -> bool:
        """Whether a save was begun and not yet finished by `finish`; the same on all ranks."""
        return self._save is not None

    def begin(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        values: Mapping[str, Any],
        *,
        rng: Mapping[str, Any] | None = None,
        val_loss: float | None = None,
    ) -> None:
        """Copy what is to be saved, and write it while the caller goes on; a collective.

        Args:
            tensors: of the whole run, each whole and the same on all ranks, or sharded over them.
            values: plain values (what JSON holds), the same on all ranks.
            rng: plain values of this process.
            val_loss: validation loss at exactly this step, in nats per token.
        Errors:
            CheckpointError: of the save before, which is waited for.
        """
        started = time.monotonic()
        self.finish()
        if not self._attempt_agreed:
            self._attempt, self._attempt_agreed = self.ranks.broadcast(self._attempt), True
        pieces = self._copies.take(pieces_to_write(tensors, self.ranks.rank, self.ranks.size))
        manifest = {
            "format": FORMAT,
            "step": step,
            "val_loss": val_loss,
            "values": dict(values),
            "tensors": {name: list(tensor.shape) for name, tensor in tensors.items()},
        }
        self._number += 1
        save = _Save(step)
        save.thread = threading.Thread(
            target=self._write, args=(save, pieces, manifest, dict(rng or {}), started), daemon=True
        )
        self._save = save
        save.thread.start()
        self.pause_seconds = time.monotonic() - started

    def finish(self) -> None:
        """Wait until the save that was begun is a checkpoint; a collective, and nothing where none was begun.

        Errors:
            CheckpointError: on every rank, where any could not write; earlier checkpoints are untouched.
        """
        if self._save is None:
            return
        save, self._save = self._save, None
        assert save.thread is not None
        save.thread.join()
        error = self.ranks.broadcast(save.error)
        if error is not None:
            raise CheckpointError(error)

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        values: Mapping[str, Any],
        *,
        rng: Mapping[str, Any] | None = None,
        val_loss: float | None = None,
    ) -> Path:
        """`begin`, then `finish`."""
        self.begin(step, tensors, values, rng=rng, val_loss=val_loss)
        self.finish()
        return self.path(step)

    def settle(self, seconds: float) -> None:
        """Let the save that was begun come to its end, for a while at most; no collective, for a process that fails."""
        if self._save is not None and self._save.thread is not None:
            self._save.thread.join(seconds)

    def _write(
        self, save: _Save, pieces: list[Piece], manifest: dict[str, Any], rng: dict[str, Any], started: float
    ) -> None:
        """Write the pieces of this process and, on rank 0, the checkpoint; runs in the save's own thread."""
        try:
            entry: dict[str, Any] = self._write_pieces(save.step, pieces, rng)
        except Exception as error:
            entry = {"error": self._explain(save.step, pieces, error)}
        try:
            entries = self._exchange(entry)
            if self.ranks.is_main:
                self._commit(save, pieces, manifest, entries)
                self.save_seconds = time.monotonic() - started
        except Exception as error:
            save.error = self._explain(save.step, pieces, error)

    def _write_pieces(self, step: int, pieces: list[Piece], rng: dict[str, Any]) -> dict[str, Any]:
        temporary = self._temporary(step)
        temporary.mkdir(parents=True, exist_ok=True)
        needed = sum(piece.local.nbytes for piece in pieces)
        if shutil.disk_usage(self.directory).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_pieces(temporary / _file_name(self.ranks.rank), pieces, {"rng": json.dumps(rng)})

    def _exchange(self, entry: dict[str, Any]) -> list[dict[str, Any]]:
        """Tell rank 0 what this process has written, and return there what all have."""
        store = self.ranks.store
        if store is None:
            return [entry]
        # Not by a collective: the main thread's may be under way.
        key = f"save/{self._number}"
        store.set(f"{key}/{self.ranks.rank}", json.dumps(entry))
        if not self.ranks.is_main:
            return []
        entries = []
        for rank in range(self.ranks.size):
            while not store.check([f"{key}/{rank}"]):
                time.sleep(_POLL)
            entries.append(json.loads(store.get(f"{key}/{rank}")))
            store.delete_key(f"{key}/{rank}")
        return entries

    def _commit(
        self, save: _Save, pieces: list[Piece], manifest: dict[str, Any], entries: list[dict[str, Any]]
    ) -> None:
        """Make the directory that all have written into the checkpoint of its step, and prune older ones."""
        temporary, target = self._temporary(save.step), self.path(save.step)
        save.error = next((entry["error"] for entry in entries if "error" in entry), None)
        if save.error is not None:
            shutil.rmtree(temporary, ignore_errors=True)
            return
        try:
            manifest["files"] = {_file_name(rank): entry for rank, entry in enumerate(entries)}
            write_file(temporary / MANIFEST, json.dumps(_seal(manifest)))
            fsync(temporary)
            # What no reader would take must not replace or prune what one would.
            _read_manifest(temporary)
            for rank, entry in enumerate(entries):
                self._check_shared(temporary, rank, entry)
            # The run did not go on from these: another process made them since `latest` looked.
            for later in [s for s in self.steps() if s >= save.step]:
                kept = self._set_aside(later)
                warnings.warn(
                    f"{self.path(later)} is not of this attempt of the run; it is set aside as {kept}", stacklevel=2
                )
            os.rename(temporary, target)
            fsync(self.directory)
        except (OSError, TypeError, ValueError, CheckpointError) as error:
            save.error = self._explain(save.step, pieces, error)
            shutil.rmtree(temporary, ignore_errors=True)
            return
        best = self._link_to(save.step)
        for step in self.steps()[: -self.keep]:
            if step not in best:
                self._remove(self.path(step))
        for aside in self._superseded(save.step):
            try:
                self._remove(aside)
            except OSError as error:  # likeliest where a disk damages files, and no reason to end a run
                warnings.warn(f"{aside} could not be removed: {error}", stacklevel=2)

    @staticmethod
    def _check_shared(directory: Path, rank: int, entry: Mapping[str, Any]) -> None:
        """Check that the file of a rank is in rank 0's directory: each writes where its node has paths.runs."""
        try:
            _check_size(directory / _file_name(rank), entry)
        except UnreadableError:
            raise
        except CheckpointError as error:
            raise CheckpointError(
                f"rank 0 does not find what rank {rank} wrote ({error}): paths.runs must be one directory that all"
                " nodes share"
            ) from error

    def _link_to(self, last: int) -> set[int]:
        """Have the links name the newest checkpoint and the best; return the steps that are or might be the best."""
        self._link("last", self.path(last))
        try:
            best = _best(self._val_losses())
        except UnreadableError as error:
            warnings.warn(
                f"{error}: until it can be read, `best` stays as it is and no checkpoint is removed", stacklevel=2
            )
            return set(self.steps())
        if best is None:
            return set()
        self._link("best", self.path(best))
        return {best}

    def _link(self, name: str, path: Path) -> None:
        temporary = self.directory / f".{name}.tmp"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(path.name)
        os.replace(temporary, self.directory / name)
        fsync(self.directory)

    def _explain(self, step: int, pieces: list[Piece], error: BaseException) -> str:
        needed = sum(piece.local.nbytes for piece in pieces)
        free = shutil.disk_usage(self.directory).free if self.directory.is_dir() else 0
        code = getattr(error, "errno", None)
        full = code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        cause = f"the disk is full ({needed} bytes needed, {free} free)" if full else str(error).splitlines()[0]
        earlier = [s for s in self.steps() if s != step]
        kept = f"the checkpoint of step {earlier[-1]} is intact" if earlier else "there is no earlier checkpoint"
        return f"the checkpoint of step {step} could not be written to {self.directory}: {cause}; {kept}"

    def _remove(self, path: Path) -> None:
        # Under another name first: a part of a checkpoint must not look like a damaged one.
        doomed = self.directory / f".removed-{path.name}.tmp"
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def _superseded(self, step: int) -> list[Path]:
        """Return what was set aside of steps before `step`, which the run has passed again, without the newest of all.

        That one is kept for whoever asks what went wrong; a disk that damages again and again must not fill with them.
        """
        found = {}
        for entry in self.directory.iterdir():
            if match := _DAMAGED.fullmatch(entry.name):
                found[int(match[1]), int(match[2] or 1)] = entry
        return [found[key] for key in sorted(found)[:-1] if key[0] < step]

    def _set_aside(self, step: int) -> str:
        """Give what the run does not go on from a name of no checkpoint, and return it."""
        damaged = f"damaged-{self.path(step).name}"
        names = chain([damaged], (f"{damaged}.{number}" for number in count(2)))
        name = next(name for name in names if not (self.directory / name).exists())
        os.rename(self.path(step), self.directory / name)
        return name

    def _val_losses(self) -> dict[int, float | None]:
        """Return the validation loss of each checkpoint whose manifest is whole, by step.

        Errors:
            UnreadableError: one cannot be read; it might be the best.
        """
        losses = {}
        for step in self.steps():
            try:
                losses[step] = _read_manifest(self.path(step))["val_loss"]
            except UnreadableError:
                raise
            except CheckpointError:
                continue
        return losses

    # Finding

    def latest(self) -> Checkpoint | None:
        """Return the newest whole checkpoint, or None where there is none; a collective, before the first save.

        Every file is read once to verify it, by one of the ranks. Damaged newer checkpoints are passed over, each with
        a warning, and kept under another name. What an interrupted save left over is removed.

        Errors:
            UnreadableError: a rank cannot read one, and nobody knows whether it is whole.
            CheckpointError: there are checkpoints, and none of them is whole.
        """
        steps = self.ranks.broadcast(self._clean_steps() if self.ranks.is_main else [])
        faults: dict[int, CheckpointError] = {}
        for step in reversed(steps):
            found = self.ranks.gather(self._examine(step, (self.ranks.rank, self.ranks.size)))
            for rank, error in enumerate(found):
                if isinstance(error, UnreadableError):
                    raise UnreadableError(
                        f"{error} on rank {rank}; nothing was changed: start the run again when every rank can read"
                        " it, or move that checkpoint away to go on from the one before"
                    )
            fault = next((f for f in found if f is not None), None)
            if fault is None:
                refused = self.ranks.broadcast(self._go_on_from(step, faults) if self.ranks.is_main else None)
                if refused is not None:
                    raise CheckpointError(refused)
                return Checkpoint(self.path(step), verify=False)  # just now, by all ranks together
            faults[step] = fault
        if faults:
            damaged = "; ".join(self._not_usable(step, fault) for step, fault in faults.items())
            raise CheckpointError(f"{damaged}; no whole checkpoint is left: restore one, or remove the directory")
        if any(self.directory.glob("step-*.ckpt")):
            raise CheckpointError(
                f"{self.directory} holds checkpoints of an earlier format, and this version reads {FORMAT}: finish the"
                " run with the version that began it, or remove the directory"
            )
        return None

    def _not_usable(self, step: int, fault: CheckpointError) -> str:
        return f"the checkpoint {self.path(step)} is not usable: {fault}"

    def _go_on_from(self, step: int, faults: Mapping[int, CheckpointError]) -> str | None:
        """Set aside what is damaged, and have the links name what is left; return why that is not possible."""
        try:
            for damaged, fault in faults.items():
                kept = self._set_aside(damaged)
                message = f"{self._not_usable(damaged, fault)}; it is set aside as {kept}; falling back to step {step}"
                warnings.warn(message, stacklevel=3)
            # Also where nothing was passed over: an attempt may have been killed between a rename and its links.
            self._link_to(step)
        except OSError as error:
            return f"the run cannot go on from {self.path(step)}: {error}"
        return None

    def _clean_steps(self) -> list[int]:
        for entry in self.directory.glob(".*.tmp"):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)
        return self.steps()

    def adopt(self, other: CheckpointStore, step: int) -> None:
        """Take over another store's checkpoint of a step, by hard links where the file system has them.

        Checkpoints are never changed in place, so that one file may have two names.
        """
        temporary = self._temporary(step)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for file in other.path(step).iterdir():
            try:
                os.link(file, temporary / file.name)
            except OSError:
                shutil.copyfile(file, temporary / file.name)
        os.rename(temporary, self.path(step))

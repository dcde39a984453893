"""A directory of checkpoints in which a crash, a full disk or a damaged file never costs the one before.

step-00000100.ckpt        everything a run needs to continue, for `torch.load(weights_only=True)`
step-00000100.ckpt.json   its size, SHA-256 and validation loss; written after it, so that it vouches for a whole file
last, best                links to the newest, and to the one with the lowest validation loss
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

_NAME = re.compile(r"step-(\d{8,})\.ckpt")
_HASH_BLOCK = 1 << 22


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message is one sentence for the user."""


def _fsync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(temporary: Path, target: Path) -> None:
    """Rename over `target` so that a crash leaves the old or the new file, never a part."""
    os.replace(temporary, target)
    _fsync_directory(target.parent)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


class CheckpointStore:
    """Saves, verifies, finds and prunes checkpoints under one directory; for one writing process.

    Args:
        directory: created by the first save.
        keep: newest checkpoints kept; the best one is kept besides.
    """

    def __init__(self, directory: str | Path, keep: int = 2) -> None:
        assert keep >= 1
        self.directory = Path(directory)
        self.keep = keep

    def path(self, step: int) -> Path:
        """Return the file of a step."""
        return self.directory / f"step-{step:08d}.ckpt"

    def _sidecar(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}.ckpt.json"

    def steps(self) -> list[int]:
        """Return the steps of which a checkpoint file exists, ascending; whether they are whole is not looked at."""
        if not self.directory.is_dir():
            return []
        matches = (_NAME.fullmatch(entry.name) for entry in self.directory.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def fault(self, step: int) -> str | None:
        """Return what is wrong with the checkpoint of a step, or None when it is whole."""
        path = self.path(step)
        try:
            stated = json.loads(self._sidecar(step).read_text())
            if path.stat().st_size != stated["bytes"]:
                return f"it has {path.stat().st_size} bytes instead of {stated['bytes']}"
            if _sha256(path) != stated["sha256"]:
                return "its SHA-256 is not the one it was written with"
        except FileNotFoundError:
            return "its writing was interrupted"
        except (OSError, ValueError, KeyError, TypeError) as error:
            return f"it cannot be read ({error})"
        return None

    def save(self, step: int, state: dict[str, Any], *, val_loss: float | None = None) -> Path:
        """Write a checkpoint, point `last` (and `best`) at it, and prune older ones.

        Args:
            state: tensors, numbers, texts, and lists, tuples and dicts of these.
            val_loss: validation loss at exactly this step, in nats per token.
        Errors:
            CheckpointError: the disk is full or fails; earlier checkpoints are untouched.
        """
        path, sidecar = self.path(step), self._sidecar(step)
        temporary = self.directory / f".{path.name}.{os.getpid()}.tmp"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()
            # A damaged file of the same step must not be vouched for by the sidecar of the new one, nor the reverse.
            sidecar.unlink(missing_ok=True)
            self._write(temporary, state)
            facts = {
                "step": step,
                "bytes": temporary.stat().st_size,
                "sha256": _sha256(temporary),
                "val_loss": val_loss,
            }
            _replace(temporary, path)
            self._write_text(sidecar, json.dumps(facts))
            # Later steps were damaged, or the run would have continued from them; now they are the past's future.
            for later in [s for s in self.steps() if s > step]:
                self._remove(later)
            self._link("last", path)
            best = self.best_step()
            if best is not None:
                self._link("best", self.path(best))
        except (OSError, RuntimeError) as error:
            temporary.unlink(missing_ok=True)
            raise CheckpointError(self._explain(step, state, error)) from error
        self._prune()
        return path

    def _write(self, temporary: Path, state: dict[str, Any]) -> None:
        needed = sum(tensor.untyped_storage().nbytes() for tensor in _tensors(state))
        if shutil.disk_usage(self.directory).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())

    def _write_text(self, target: Path, text: str) -> None:
        temporary = self.directory / f".{target.name}.{os.getpid()}.tmp"
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        _replace(temporary, target)

    def _link(self, name: str, path: Path) -> None:
        temporary = self.directory / f".{name}.{os.getpid()}.tmp"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(path.name)
        _replace(temporary, self.directory / name)

    def _explain(self, step: int, state: dict[str, Any], error: BaseException) -> str:
        needed = sum(tensor.untyped_storage().nbytes() for tensor in _tensors(state))
        free = shutil.disk_usage(self.directory).free if self.directory.is_dir() else 0
        # torch reports a failed write as a RuntimeError about its archive.
        codes = [getattr(e, "errno", None) for e in (error, error.__cause__, error.__context__)]
        full = free < needed or any(code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) for code in codes)
        cause = f"the disk is full ({needed} bytes needed, {free} free)" if full else str(error).splitlines()[0]
        earlier = [s for s in self.steps() if s != step and self._sidecar(s).exists()]
        kept = f"the checkpoint of step {earlier[-1]} is intact" if earlier else "there is no earlier checkpoint"
        return f"the checkpoint of step {step} could not be written to {self.directory}: {cause}; {kept}"

    def _remove_leftovers(self) -> None:
        for entry in self.directory.glob(".*.tmp"):
            entry.unlink(missing_ok=True)

    def val_losses(self) -> dict[int, float]:
        """Return the validation loss of each checkpoint that has one, by step."""
        losses = {}
        for step in self.steps():
            try:
                value = json.loads(self._sidecar(step).read_text())["val_loss"]
            except (OSError, ValueError, KeyError, TypeError):
                continue
            if value is not None and value == value:
                losses[step] = float(value)
        return losses

    def best_step(self) -> int | None:
        """Return the step with the lowest validation loss (the first of equals), or None."""
        losses = self.val_losses()
        return min(losses, key=lambda step: (losses[step], step)) if losses else None

    def _prune(self) -> None:
        best = self.best_step()
        for step in self.steps()[: -self.keep]:
            if step != best:
                self._remove(step)

    def _remove(self, step: int) -> None:
        # The sidecar first: what it vouches for must exist.
        self._sidecar(step).unlink(missing_ok=True)
        self.path(step).unlink(missing_ok=True)

    def load_latest(self) -> tuple[dict[str, Any], int] | None:
        """Load the newest whole checkpoint to CPU memory, or return None where there is none.

        Returns:
            The state and its step. Damaged or interrupted newer ones are passed over, each with a warning.
        Errors:
            CheckpointError: there are checkpoints, and none of them is whole.
        """
        faults: list[str] = []
        for step in reversed(self.steps()):
            fault = self.fault(step)
            if fault is None:
                for message in faults:
                    warnings.warn(f"{message}; falling back to step {step}", stacklevel=2)
                return torch.load(self.path(step), map_location="cpu", weights_only=True), step
            faults.append(f"the checkpoint {self.path(step)} is not usable: {fault}")
        # Only the file of a first save that was killed: a run without progress, which starts anew.
        if faults and any(self._sidecar(step).exists() for step in self.steps()):
            raise CheckpointError(
                f"{'; '.join(faults)}; no whole checkpoint is left: restore one, or remove the directory"
            )
        return None

"""`status.json` of a run directory: what the run does at this moment, written while it trains and read by anyone.

Metrics and checkpoints are the record of a run; this file only says whether somebody works on it, and how far it is.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import threading
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from powertrain.files import write_file

STATUS_FILE = "status.json"
STATES = ("running", "finished", "interrupted", "failed")
HEARTBEAT_SECONDS = 10.0
# Six missed beats: a loaded file server delays some.
LOST_AFTER_SECONDS = 60.0


@dataclass(frozen=True)
class RunStatus:
    """One state of a run."""

    state: str  # one of STATES
    step: int = 0  # finished optimizer steps
    total_steps: int | None = None  # of the whole run; None until it is known
    loss: float | None = None  # latest training loss, nats per token
    val_loss: float | None = None  # latest validation loss, nats per token
    job_id: str | None = None  # Slurm's, as 17 or 17_3 in an array
    host: str = ""  # where rank 0 is
    pid: int = 0  # of rank 0
    started: float = 0.0  # of this attempt, seconds since 1970
    updated: float = 0.0  # of this record, seconds since 1970
    message: str | None = None  # why it failed, or what interrupted it

    def is_lost(self, now: float | None = None) -> bool:
        """Return whether the run says it is running and nobody is: a power cut, SIGKILL, a node that died."""
        if self.state != "running":
            return False
        if (time.time() if now is None else now) - self.updated > LOST_AFTER_SECONDS:
            return True
        if self.host != os.uname().nodename:
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass  # somebody else's, and alive
        return False


def read_status(run_dir: str | Path) -> RunStatus | None:
    """Return what a run directory says of its run; None where it says nothing or nothing readable."""
    try:
        values = json.loads((Path(run_dir) / STATUS_FILE).read_text())
        known = {field.name for field in dataclasses.fields(RunStatus)}
        # A later version may say more.
        status = RunStatus(**{key: value for key, value in values.items() if key in known})
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    return status if status.state in STATES else None


def write_status(run_dir: str | Path, status: RunStatus) -> None:
    """Replace `status.json` at once, so that a reader never sees half of it."""
    values = dataclasses.asdict(status)
    for key in ("loss", "val_loss"):
        if values[key] is not None and not math.isfinite(values[key]):
            values[key] = None  # JSON has no NaN
    # Not durable: a disk that is busy with a checkpoint would hold up the heartbeat.
    write_file(Path(run_dir) / STATUS_FILE, json.dumps(values) + "\n", durable=False)


class RunBusyError(ValueError):
    """Somebody works on the run already; the message says who and where."""


def check_free(run_dir: str | Path, job_id: str | None = None) -> None:
    """Check that nobody works on a run.

    The file system's lock on the run directory decides; this says it before a job is submitted, and where a file
    system has no locks, or has them for each machine alone.

    Args:
        job_id: of the Slurm job that asks; its own earlier attempt does not count.
    Errors:
        RunBusyError: another process wrote a heartbeat within `LOST_AFTER_SECONDS`.
    """
    status = read_status(run_dir)
    if status is None or status.state != "running" or status.is_lost():
        return
    if (status.host, status.pid) == (os.uname().nodename, os.getpid()) or (job_id and job_id == status.job_id):
        return
    job = f" (job {status.job_id})" if status.job_id else ""
    raise RunBusyError(
        f"the run in {run_dir} is being trained by process {status.pid} on {status.host}{job}: end that one first, or "
        f"give this run another run_id (where it is gone without a word, try again in {LOST_AFTER_SECONDS:.0f} s)"
    )


class StatusReport:
    """Keeps `status.json` up to date while a block runs: a heartbeat from a thread, and how the block ended.

    `with StatusReport(run_dir) as status:` writes `running` at once. Leaving the block writes `finished`, or `failed`
    with the error's sentence, or `interrupted` (a signal, or after `interrupted()`). A file that cannot be written is a
    warning: the run is worth more than its status.

    Args:
        run_dir: exists.
        job_id: Slurm's, where there is one.
        enabled: False on all ranks but one, where everything here does nothing.
    Errors:
        RunBusyError: on entering; see `check_free`.
    """

    def __init__(self, run_dir: str | Path, *, job_id: str | None = None, enabled: bool = True) -> None:
        self.run_dir = Path(run_dir)
        self.enabled = enabled
        before = read_status(run_dir) if enabled else None
        now = time.time()
        # What an earlier attempt had done stays visible until this one has restored it.
        self._status = RunStatus(
            "running",
            step=before.step if before else 0,
            total_steps=before.total_steps if before else None,
            loss=before.loss if before else None,
            val_loss=before.val_loss if before else None,
            job_id=job_id,
            host=os.uname().nodename,
            pid=os.getpid(),
            started=now,
            updated=now,
        )
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="status", daemon=True)
        self._interruption: str | None = None
        self._warned = False

    def update(self, *, step: int, total_steps: int, loss: float | None = None, val_loss: float | None = None) -> None:
        """Take over the progress of the run; it reaches the file with the next heartbeat."""
        with self._lock:
            before = self._status
            self._status = dataclasses.replace(
                before,
                step=step,
                total_steps=total_steps,
                # None is unknown so far, and what an earlier attempt has seen stays.
                loss=before.loss if loss is None else loss,
                val_loss=before.val_loss if val_loss is None else val_loss,
            )

    def interrupted(self, reason: str) -> None:
        """Note that the block ends early and on purpose, with everything saved."""
        self._interruption = reason

    def failed(self, reason: str) -> None:
        """Write that the run failed, for a process that ends without leaving the block."""
        if self.enabled:
            self._end_beat()
            self._write("failed", reason)

    def __enter__(self) -> StatusReport:
        if self.enabled:
            check_free(self.run_dir, self._status.job_id)
            self._write("running", None)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.enabled:
            return
        self._end_beat()
        if kind is None and self._interruption is None:
            self._write("finished", None)
        elif kind is None or issubclass(kind, KeyboardInterrupt):
            self._write("interrupted", self._interruption or str(error) or "Ctrl-C")
        else:
            assert error is not None
            sentence = " ".join(str(error).split())[:500]
            self._write("failed", f"{kind.__name__}: {sentence}" if sentence else kind.__name__)

    def _end_beat(self) -> None:
        self._ended.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            self._write("running", None)

    def _write(self, state: str, message: str | None) -> None:
        with self._lock:
            self._status = dataclasses.replace(self._status, state=state, message=message, updated=time.time())
            status = self._status
        try:
            write_status(self.run_dir, status)
        except OSError as error:
            if not self._warned:
                warnings.warn(f"{self.run_dir / STATUS_FILE} cannot be written: {error}", stacklevel=2)
            self._warned = True

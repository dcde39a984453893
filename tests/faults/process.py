"""One training process with a fault built in: `powertrain`, watched from inside.

    POWERTRAIN_FAULT='{"trace": "FILE"}' python -m tests.faults.process train OVERRIDES...

It runs `powertrain` with these arguments. Each training micro-batch is noted in the trace with a hash of each of its
sequences. What else happens is said by `Plan`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

VARIABLE = "POWERTRAIN_FAULT"
# Python's audit events by which the content of a directory changes or is read; their first arguments are paths.
OPERATIONS = frozenset({"open", "os.listdir", "os.scandir", "os.mkdir", "os.rmdir", "os.remove", "os.truncate"})
OPERATIONS_OF_TWO = frozenset({"os.rename", "os.link", "os.symlink"})


@dataclasses.dataclass(frozen=True)
class Plan:
    """What happens in the processes of one attempt."""

    trace: str  # every rank appends lines of JSON to it
    kill_rank: int | None = None  # this rank kills itself with SIGKILL ...
    kill_under: str = ""  # ... at an operation on a file under this directory,
    kill_at: int = 1  # the so many-th of them,
    kill_delay: float = 0.0  # and so many seconds after it began; 0 before it
    nan_step: int | None = None  # the gradient of this step is NaN ...
    nan_rank: int = 0  # ... on this rank
    count_under: tuple[str, ...] = ()  # directories whose operations are counted, for the trace
    fp64: bool = False  # weights and arithmetic in double precision: the oracle of rounding


def own_rank() -> int:
    """Return the rank that the launcher gave this process."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))


class Trace:
    """Appends lines of JSON to a file, each at once: those of several processes and of killed ones stay whole."""

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def write(self, **values: Any) -> None:
        os.write(self._descriptor, (json.dumps(values) + "\n").encode())


def watch_operations(directory: str, act: Callable[[], None]) -> None:
    """Call `act` before each operation on a file under `directory`, for the rest of this process.

    The events are Python's own, so that nothing needs to be known of how files are written there.
    """
    prefix = os.path.join(os.path.abspath(directory), "")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in OPERATIONS:
            paths = arguments[:1]
        elif event in OPERATIONS_OF_TWO:
            paths = arguments[:2]
        else:
            return
        for path in paths:
            if isinstance(path, str | os.PathLike) and os.path.join(os.path.abspath(path), "").startswith(prefix):
                act()
                return

    sys.addaudithook(hook)


def _arrange_death(plan: Plan) -> None:
    seen = 0

    def die() -> None:
        time.sleep(plan.kill_delay)
        os.kill(os.getpid(), signal.SIGKILL)

    def act() -> None:
        nonlocal seen
        seen += 1
        if seen == plan.kill_at:
            if plan.kill_delay:
                threading.Thread(target=die, daemon=True).start()
            else:
                die()

    watch_operations(plan.kill_under, act)


def _trace_tokens(trace: Trace, rank: int) -> None:
    from powertrain.training.module import PowertrainModule

    training_step = PowertrainModule.training_step

    def traced(module: Any, batch: dict[str, Any], batch_idx: int) -> Any:
        rows = [
            hashlib.sha256(row.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()[:16]
            for row, labels in zip(batch["input_ids"], batch["labels"], strict=True)
        ]
        micro = batch_idx % module.trainer.accumulate_grad_batches
        trace.write(step=module.step + 1, micro=micro, rank=rank, world=module.trainer.world_size, rows=rows)
        return training_step(module, batch, batch_idx)

    PowertrainModule.training_step = traced  # type: ignore[method-assign]


def _spoil_gradient(step: int) -> None:
    import torch

    from powertrain.training.module import PowertrainModule

    training_step = PowertrainModule.training_step

    def spoiled(module: Any, batch: dict[str, Any], batch_idx: int) -> Any:
        loss = training_step(module, batch, batch_idx)
        if module.step + 1 == step and batch_idx % module.trainer.accumulate_grad_batches == 0:
            loss.register_hook(lambda gradient: torch.full_like(gradient, float("nan")))
        return loss

    PowertrainModule.training_step = spoiled  # type: ignore[method-assign]


def _stay_in_ranks() -> None:
    """Have the ranks that this process launches start here as well, and not in `powertrain`."""
    from powertrain.training import launch

    start = launch.launch

    def launched(command: list[str], *args: Any, **kwargs: Any) -> int:
        interpreter, _, module, *arguments = command
        assert module == "powertrain"
        return start([interpreter, "-m", "tests.faults.process", *arguments], *args, **kwargs)

    launch.launch = launched  # type: ignore[assignment]


def _compute_in_fp64() -> None:
    from powertrain.models.gpt import GPT

    build = GPT.__init__

    def built(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        self.double()

    GPT.__init__ = built  # type: ignore[method-assign]


def main() -> int:
    """Run `powertrain` under the plan of the environment; return its exit code."""
    values = json.loads(os.environ[VARIABLE])
    plan = Plan(**{**values, "count_under": tuple(values.get("count_under", ()))})
    rank = own_rank()
    trace = Trace(plan.trace)
    counts = dict.fromkeys(plan.count_under, 0)
    for directory in counts:

        def count(directory: str = directory) -> None:
            counts[directory] += 1

        watch_operations(directory, count)
    if plan.kill_rank == rank:
        _arrange_death(plan)
    _stay_in_ranks()
    _trace_tokens(trace, rank)
    if plan.nan_step is not None and plan.nan_rank == rank:
        _spoil_gradient(plan.nan_step)
    if plan.fp64:
        _compute_in_fp64()
    from powertrain.cli import main as powertrain

    code = powertrain(sys.argv[1:])
    if counts:
        trace.write(rank=rank, counts=counts)
    return code


def read_trace(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a trace."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


if __name__ == "__main__":
    sys.exit(main())

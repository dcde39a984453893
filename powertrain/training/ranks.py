"""This process among those that train together, and what they agree on."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch

from powertrain.training.signals import POLL, Stopped, StopSignals

T = TypeVar("T")
CPU = torch.device("cpu")
# Seconds that the process that keeps the store stays for those that have not yet read why all end.
PARTING = 5.0


@dataclass(frozen=True)
class Ranks:
    """The rank of this process; where it is alone, every agreement is its own answer."""

    rank: int = 0
    size: int = 1
    device: torch.device = CPU
    store: torch.distributed.Store | None = None  # small values between processes, also from threads

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes what all share."""
        return self.rank == 0

    def max(self, *values: int) -> list[int]:
        """Return the largest of each value over all ranks; a collective."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, device=self.device)
        torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
        return tensor.tolist()

    def broadcast(self, value: T) -> T:
        """Return rank 0's value, which pickles; a collective."""
        if self.size == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, which pickles, in their order; a collective."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value)
        return values


ALONE = Ranks()


def agree_to_start(
    store: torch.distributed.Store, size: int, signals: StopSignals, timeout: timedelta, *, keeps_store: bool
) -> None:
    """Wait until all of `size` processes are here and begin together, or end together where one gets a signal before.

    To be called within `signals.deferred()`. What the store holds first decides: once all begin, the others count on
    this process, and its signal is agreed on like those between steps.

    Args:
        keeps_store: the store ends with this process, so that it leaves last of those that are here.
    Errors:
        Stopped: a process got a signal before all were here.
        TimeoutError: some did not come.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    try:
        last = store.add("here", 1) == size
        while not store.check(["start"]):
            if last or signals.received is not None:
                store.compare_set("start", "", str(signals.received or 0))
            elif time.monotonic() > deadline:
                here = store.add("here", 0)
                raise TimeoutError(f"{here} of {size} processes have come within {timeout.total_seconds():g} s")
            else:
                time.sleep(POLL)
        signum = int(store.get("start"))
        if signum:
            signals.learn(signum)
            store.add("left", 1)
    except torch.distributed.DistError:
        # The process that keeps the store got the signal too, and has not waited for this one.
        signals.raise_received()
        raise
    if signum:
        deadline = time.monotonic() + PARTING
        while keeps_store and store.add("left", 0) < store.add("here", 0) and time.monotonic() < deadline:
            time.sleep(POLL)
        raise Stopped(signum)

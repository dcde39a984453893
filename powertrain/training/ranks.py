"""This process among those that train together, and what they agree on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch

T = TypeVar("T")
CPU = torch.device("cpu")


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

"""The share of each sequence that one rank of a context-parallel group holds, and what ranks exchange.

Every rank holds a contiguous slice of every row: rank r of N the tokens floor(r T / N) to floor((r + 1) T / N) - 1, so
that T need not be a multiple of N. All ranks know the offsets of all documents; only tensors that depend on the model
travel.

Shape legend: N ranks, B rows, T tokens of a whole row, L tokens of a slice.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from powertrain.ops.layout import compute_dtype
from powertrain.ops.validation import shape_text


@dataclass(frozen=True)
class ContextGroup:
    """The processes that share sequences, and the place of this one among them."""

    group: dist.ProcessGroup
    rank: int  # this process holds the slice number `rank` of each sequence
    size: int

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> "ContextGroup":
        return cls(group, dist.get_rank(group), dist.get_world_size(group))

    def shard(self, rows: int, tokens: int, cu_seqlens: Tensor | None = None) -> "ContextShard":
        """Return this rank's share of `rows` sequences of `tokens` tokens.

        cu_seqlens: document offsets `(M,)` over the flattened whole rows, as in `power_retention`; None: a row is one
        document.

        Raises:
            ValueError: there are fewer tokens than ranks.
        """
        return ContextShard(self, rows, tokens, cu_seqlens)


@dataclass(frozen=True, eq=False)
class ContextShard:
    """This rank's slice of a batch of rows; see `ContextGroup.shard`."""

    ranks: ContextGroup
    rows: int  # B
    tokens: int  # T, of a whole row
    whole_cu_seqlens: Tensor | None  # (M,) over the B * T flattened tokens
    entered: dict[Any, Any] | None = None  # by layer, what entered this slice; see `remembering`

    def __post_init__(self) -> None:
        if self.tokens < self.ranks.size:
            raise ValueError(
                f"a context of {self.tokens} tokens cannot be shared by {self.ranks.size} ranks; "
                "every rank needs at least one token"
            )

    def remembering(self) -> "ContextShard":
        """Return this shard for one forward pass whose layers run again in the backward pass: activation checkpointing.

        Layers that name themselves exchange states once, and find them the second time.
        """
        return replace(self, entered={})

    @cached_property
    def bounds(self) -> list[int]:
        """First token of each rank's slice, and T: N + 1 numbers."""
        return [rank * self.tokens // self.ranks.size for rank in range(self.ranks.size + 1)]

    @property
    def start(self) -> int:
        """The first token of this slice."""
        return self.bounds[self.ranks.rank]

    @property
    def stop(self) -> int:
        """One past the last token of this slice."""
        return self.bounds[self.ranks.rank + 1]

    def take(self, x: Tensor) -> Tensor:
        """Return this rank's slice `(B or 1, L, ...)` of `x (B or 1, T, ...)`.

        Raises:
            ValueError: x is not of T tokens.
        """
        if x.ndim < 2 or x.shape[1] != self.tokens:
            raise ValueError(f"the whole rows have {self.tokens} tokens; got a tensor of shape {shape_text(x)}")
        return x[:, self.start : self.stop].contiguous()

    @cached_property
    def cu_seqlens(self) -> Tensor | None:
        """Document offsets `(M,)` over the B * L flattened tokens of this slice; documents elsewhere are empty."""
        return self.offsets_from(self.start)

    def offsets_from(self, first: int) -> Tensor | None:
        """Return the document offsets `(M,)` over the tokens `first` up to this slice's last one of every row."""
        if self.whole_cu_seqlens is None:
            return None
        length = self.stop - first
        row = self.whole_cu_seqlens // self.tokens
        return row * length + (self.whole_cu_seqlens % self.tokens - first).clamp(0, length)

    @cached_property
    def _documents_at_ends(self) -> tuple[Tensor, Tensor] | None:
        """Numbers `(N, B)` of the documents of each slice's first and last token."""
        if self.whole_cu_seqlens is None:
            return None
        # On the device: a copy from the host would wait for it.
        device = self.whole_cu_seqlens.device
        bounds = torch.arange(self.ranks.size + 1, device=device) * self.tokens // self.ranks.size
        rows = torch.arange(self.rows, device=device) * self.tokens
        ends = torch.stack([bounds[:-1, None] + rows, bounds[1:, None] + rows - 1])
        first, last = torch.bucketize(ends, self.whole_cu_seqlens.long(), right=True)
        return first, last

    def continues(self, rank: int) -> Tensor | None:
        """Return `(B,)`: whether a rank's slice goes on with the document of the token before it; None: all do."""
        assert rank > 0, "nothing comes before the first slice"
        if self._documents_at_ends is None:
            return None
        first, last = self._documents_at_ends
        return first[rank] == last[rank - 1]

    def unbroken(self, rank: int) -> Tensor | None:
        """Return `(B,)`: whether a rank's slice lies within one document; None: all do."""
        if self._documents_at_ends is None:
            return None
        first, last = self._documents_at_ends
        return first[rank] == last[rank]

    def all_gather(self, x: Tensor) -> Tensor:
        """Return `(N, ...)`: x of every rank, of one shape on all of them."""
        result = x.new_empty(self.ranks.size, *x.shape)
        dist.all_gather(list(result), x.contiguous(), group=self.ranks.group)
        return result

    def minimum(self, x: Tensor) -> Tensor:
        """Return the least over the ranks of x, without gradient."""
        result = x.detach().clone()
        dist.all_reduce(result, dist.ReduceOp.MIN, group=self.ranks.group)
        return result

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum over the ranks of x, without gradient."""
        result = x.detach().clone()
        dist.all_reduce(result, dist.ReduceOp.SUM, group=self.ranks.group)
        return result

    def preceding(self, x: Tensor, tokens: int) -> Tensor:
        """Return the up to `tokens` tokens before this slice, `(B, min(start, tokens), ...)`, for x `(B, L, ...)`.

        One all-gather of the last tokens of each slice; the backward pass is one reduce-scatter, in fp32 at least.
        """
        if tokens == 0:
            return x[:, :0]
        return _Preceding.apply(x, self, tokens)


class _Preceding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: ContextShard, tokens: int) -> Tensor:
        bounds = shard.bounds
        lengths = [stop - start for start, stop in itertools.pairwise(bounds)]
        sent = min(tokens, max(lengths))
        ctx.shard, ctx.sent = shard, sent
        # A slice of fewer tokens than are sent is the end of what it sends.
        tail = x[:, -sent:] if x.shape[1] >= sent else torch.nn.functional.pad(x, _front(x, sent - x.shape[1]))
        ctx.pieces = _pieces(bounds, shard.ranks.rank, tokens)
        ctx.shape = x.shape
        received = shard.all_gather(tail)
        pieces = [received[rank][:, sent - count :] for rank, count in ctx.pieces]
        return torch.cat(pieces, dim=1) if pieces else x.new_empty(x.shape[0], 0, *x.shape[2:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        shard, sent = ctx.shard, ctx.sent
        rows, length, *rest = ctx.shape
        dtype = compute_dtype(grad.dtype)
        shares = grad.new_zeros(shard.ranks.size, rows, sent, *rest, dtype=dtype)
        at = 0
        for rank, count in ctx.pieces:
            shares[rank][:, sent - count :] = grad[:, at : at + count]
            at += count
        own = torch.empty_like(shares[0])
        dist.reduce_scatter(own, list(shares), group=shard.ranks.group)
        result = grad.new_zeros(ctx.shape)
        kept = min(sent, length)
        result[:, length - kept :] = own[:, sent - kept :].to(grad.dtype)
        return result, None, None


def _front(x: Tensor, count: int) -> list[int]:
    """Return the padding of `count` tokens before those of x `(B, L, ...)`, as `torch.nn.functional.pad` takes it."""
    return [0, 0] * (x.ndim - 2) + [count, 0]


def _pieces(bounds: Sequence[int], rank: int, tokens: int) -> list[tuple[int, int]]:
    """Return (rank, how many of its last tokens) for the ranks that hold the `tokens` tokens before slice `rank`."""
    first = max(0, bounds[rank] - tokens)
    counts = [(other, bounds[other + 1] - max(first, bounds[other])) for other in range(rank)]
    return [(other, count) for other, count in counts if count > 0]

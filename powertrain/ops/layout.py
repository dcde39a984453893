"""Public `(B, T, H, D)` tensors as batches of sequences, one per key head and row, and back; and the dtype of the
arithmetic.
"""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from powertrain.ops.plan import Segment
from powertrain.ops.validation import autocasts

P = ParamSpec("P")
Result = TypeVar("Result")


def without_autocast(function: Callable[P, Result]) -> Callable[P, Result]:
    """Run the body of an op outside autocast, which would otherwise cast the products inside it, too."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> Result:
        first = next(x for x in args if isinstance(x, Tensor))
        if not autocasts(first):
            return function(*args, **kwargs)
        with torch.autocast(first.device.type, enabled=False):
            return function(*args, **kwargs)

    return wrapped


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the arithmetic and of the state for inputs of `dtype`: fp32, or fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def by_sequence(x: Tensor) -> Tensor:
    """`(B, T, Hk, ...)` to `(B * Hk, T, ...)`."""
    return x.transpose(1, 2).flatten(0, 1)


def from_sequence(x: Tensor, B: int) -> Tensor:
    """`(B * Hk, T, ...)` to `(B, T, Hk, ...)`."""
    return x.unflatten(0, (B, -1)).transpose(1, 2)


def by_query_head(x: Tensor, Hk: int) -> Tensor:
    """`(B, T, Hq, D)` to `(B * Hk, R, T, D)` with R = Hq / Hk query heads per key head."""
    return x.unflatten(2, (Hk, -1)).permute(0, 2, 3, 1, 4).flatten(0, 1)


def from_query_head(x: Tensor, B: int) -> Tensor:
    """`(B * Hk, R, T, D)` to `(B, T, Hq, D)`."""
    return x.unflatten(0, (B, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def tokens_last(x: Tensor) -> Tensor:
    """`(B, T, H, D)` to contiguous `(B * H, D, T)`."""
    B, T, H, D = x.shape
    if x.device.type != "cpu":
        return x.flatten(2).mT.contiguous().view(B * H, D, T)
    out = x.new_empty(B, H * D, T)
    # Transposed copies of whole matrices: PyTorch does them 4 times faster on CPU than the same as a permutation.
    for of_row, row in zip(out, x.flatten(2).contiguous(), strict=True):
        of_row.copy_(row.T)
    return out.view(B * H, D, T)


def from_tokens_last(x: Tensor, B: int) -> Tensor:
    """`(B * H, D, T)` to contiguous `(B, T, H, D)`, the inverse of `tokens_last`."""
    rows = x.contiguous().view(B, -1, x.shape[-1])
    if x.device.type != "cpu":
        return rows.mT.contiguous().unflatten(-1, (-1, x.shape[1]))
    out = x.new_empty(B, x.shape[-1], rows.shape[1])
    for of_row, row in zip(out, rows, strict=True):
        of_row.copy_(row.T)
    return out.unflatten(-1, (-1, x.shape[1]))


def query_rows(x: Tensor, Hk: int) -> Tensor:
    """`(B, T, Hq, D)` to contiguous `(B * Hk, D, R, T)` with R = Hq / Hk query heads per key head."""
    return tokens_last(x).unflatten(0, (x.shape[0] * Hk, -1)).transpose(1, 2).contiguous()


def from_query_rows(x: Tensor, B: int) -> Tensor:
    """`(B * Hk, D, R, T)` to contiguous `(B, T, Hq, D)`."""
    return from_tokens_last(x.transpose(1, 2).flatten(0, 1), B)


def cut(x: Tensor, segment: Segment) -> Tensor:
    """View `(N, D, ..., T)` as the segment's chunks `(N, chunks, D, ..., chunk_size)`."""
    tokens = x.narrow(-1, segment.start, segment.stop - segment.start)
    if segment.chunks == 1:
        return tokens.unsqueeze(1)
    return tokens.unfold(-1, segment.chunk_size, segment.stride).movedim(-2, 1)


def join(x: Tensor) -> Tensor:
    """`(N, chunks, D, ..., chunk_size)` to `(N, D, ..., chunks * chunk_size)`."""
    return x.movedim(1, -2).flatten(-2)

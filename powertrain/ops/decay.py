"""Gates and document boundaries as factors in [0, 1], accurate however strong the gates are.

Every factor is exp(G_i - G_j) for two positions of one sequence, G the inclusive cumulative sum of log_G, and 0 where a
document starts in (j, i]. G is kept in fp64 and only differences are rounded: in fp32 a run of strong gates (log_G =
-50 over 512 tokens) would leave an absolute error of 2e-3 in the exponent of every later pair.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from powertrain.ops.layout import cut
from powertrain.ops.plan import Segment

# exp(-1000) is 0 in every dtype; the bound keeps log_G = -inf (a closed gate) from turning differences into NaN.
_MIN_LOG_GATE = -1000.0


@dataclass(frozen=True)
class Decay:
    """Cumulative log gates `G` (fp64) and document numbers `document` (int64) at some positions, of one shape; None
    where there are none.
    """

    G: Tensor | None
    document: Tensor | None

    @classmethod
    def make(cls, log_g: Tensor | None, document: Tensor | None) -> "Decay":
        """Return the `(N, T+1)` positions of N sequences from `log_g (N, T)` and `document (N, T)`.

        Index 0 is the place before the first token: the one of the initial state, which belongs to the first document.
        """
        G = None
        if log_g is not None:
            G = torch.nn.functional.pad(_cumsum(log_g.double().clamp(min=_MIN_LOG_GATE)), (1, 0))
        if document is not None:
            document = torch.cat([document[:, :1], document], dim=-1)
        return cls(G, document)

    @property
    def is_trivial(self) -> bool:
        return self.G is None and self.document is None

    def __getitem__(self, index: Any) -> "Decay":
        return Decay(None if self.G is None else self.G[index], None if self.document is None else self.document[index])

    def opens(self, *, has_state: bool) -> Tensor:
        """`(N, T)`: whether a token starts its sequence or document, for the positions of `make`; without an initial
        state before it, a gate there has no effect.
        """
        positions = self.G if self.document is None else self.document
        assert positions is not None
        result = torch.zeros_like(positions[:, 1:], dtype=torch.bool)
        result[:, 0] = not has_state
        if self.document is not None:
            result |= self.document[:, 1:] != self.document[:, :-1]
        return result

    def cut(self, segment: Segment) -> "Decay":
        """`(N, T)` to the segment's chunks `(N, chunks, chunk_size)`."""
        return Decay(*(None if x is None else cut(x, segment) for x in (self.G, self.document)))

    def flatten_chunks(self) -> "Decay":
        """`(N, chunks, chunk_size)` to `(N * chunks, chunk_size)`."""
        return Decay(*(None if x is None else x.flatten(0, 1) for x in (self.G, self.document)))

    def chunks(self, segment: Segment) -> "ChunkDecay":
        """Return the positions of the segment's chunks, for the positions of `make`: tokens `(N, chunks, chunk_size)`
        and the places before them `(N, chunks, 1)`.
        """
        before = Segment(segment.start, segment.chunks, 1, segment.stride)
        return ChunkDecay(tokens=self[:, 1:].cut(segment), before=self.cut(before))


@torch.library.custom_op("powertrain::cumsum", mutates_args=())
def _cumsum(x: Tensor) -> Tensor:
    """Return `x.cumsum(-1)`, as an op of its own: what torch.compile (2.11) makes of it in fp64 on a GPU may fail."""
    return x.contiguous().cumsum(-1)


@_cumsum.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class ChunkDecay:
    """Factors of a batch of chunks; each is None where there are neither gates nor documents."""

    tokens: Decay
    before: Decay

    def from_start(self, dtype: torch.dtype) -> Tensor | None:
        """`(N, chunks, chunk_size)`: from before the chunk to each token."""
        return factor(self.tokens, self.before, dtype)

    def to_end(self, dtype: torch.dtype) -> Tensor | None:
        """`(N, chunks, chunk_size)`: from each token to the end of the chunk."""
        return factor(self.tokens[..., -1:], self.tokens, dtype)

    def across(self, dtype: torch.dtype) -> Tensor | None:
        """`(N, chunks)`: over the whole chunk."""
        whole = factor(self.tokens[..., -1:], self.before, dtype)
        return None if whole is None else whole[..., 0]

    def of_start(self) -> Tensor | None:
        """`(N, chunks, chunk_size)`: whether a token is of the document before the chunk; None without documents."""
        return same_document(self.tokens, self.before)

    def of_end(self) -> Tensor | None:
        """`(N, chunks, chunk_size)`: whether a token is of the document at the end of the chunk."""
        return same_document(self.tokens[..., -1:], self.tokens)


def factor(later: Decay, earlier: Decay, dtype: torch.dtype) -> Tensor | None:
    """Return exp(G_later - G_earlier), 0 across a document boundary, for positions that broadcast; None where there is
    no decay.
    """
    result = None
    if later.G is not None and earlier.G is not None:
        result = (later.G - earlier.G).to(dtype).exp_()
    if later.document is not None and earlier.document is not None:
        same = later.document == earlier.document
        result = same.to(dtype) if result is None else result.mul_(same)
    return result


def same_document(later: Decay, earlier: Decay) -> Tensor | None:
    """Return whether positions that broadcast are of one document; None without documents."""
    if later.document is None or earlier.document is None:
        return None
    return later.document == earlier.document


def kept(x: Tensor, where: Tensor | None) -> Tensor:
    """Return x `where` that is True (None: everywhere), and 0 elsewhere even of infinity and NaN, which times a factor
    of 0 are NaN. By its bits: masked_fill takes a CPU five times as long.
    """
    if where is None:
        return x
    bits = torch.int64 if x.dtype == torch.float64 else torch.int32
    return (x.view(bits) & where.to(bits).neg()).view(x.dtype)


def causal_factors(tokens: Decay, length: int, like: Tensor) -> Tensor:
    """Return the factors from each token (second axis) to each later one (last axis) of every row of `tokens (M,
    length)`, `(M, length, length)`, 0 below the diagonal; `(1, length, length)` without decay.
    """
    document = tokens.document
    same = None if document is None else (document[:, None] == document[..., None]).to(like.dtype)
    if tokens.G is None:
        return like.new_ones(1, length, length).triu_() if same is None else same.triu_()
    difference = (tokens.G[:, None] - tokens.G[..., None]).to(like.dtype)
    # Below the diagonal differences are positive and may overflow, and 0 times infinity is not 0: mask before the
    # exponential, by a sum, which is the fastest way.
    acausal = like.new_full((length, length), -torch.inf).tril_(-1)
    factors = difference.add_(acausal).exp_()
    return factors if same is None else factors.mul_(same)


def scan_documents_from_end(x: Tensor, document: Tensor | None) -> Tensor:
    """Return, for `x (..., T)`, the sum of x over each token and all later tokens of its document.

    Pairwise doubling: log2(T) passes in which values of different documents never meet, so that zero stays exactly zero
    beside any other document.
    """
    x = x.clone()
    length, shift = x.shape[-1], 1
    while shift < length:
        later = x[..., shift:]
        if document is not None:
            later = torch.where(document[..., shift:] == document[..., :-shift], later, 0.0)
        # The right-hand side reads the values of the last pass only: adding in place would let a step read what it has
        # already written.
        x = torch.cat([x[..., :-shift] + later, x[..., -shift:]], dim=-1)
        shift *= 2
    return x


def document_of_each_token(cu_seqlens: Tensor, rows: int, tokens: int) -> Tensor:
    """Return the `(rows, tokens)` int64 document numbers for offsets `cu_seqlens (M,)` over the flattened tokens."""
    positions = torch.arange(rows * tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.bucketize(positions, cu_seqlens, right=True).view(rows, tokens)

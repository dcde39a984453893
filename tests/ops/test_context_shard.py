"""Which tokens and documents a rank holds, without processes: nothing here is exchanged."""

import itertools

import pytest
import torch

from powertrain.ops.context_parallel import _entering, _leaving, _passes
from powertrain.ops.context_shard import ContextGroup, ContextShard, _pieces
from powertrain.ops.decay import document_of_each_token
from tests.models.small import small_model, tokens

B, T = 2, 13
# Row 0: documents of 3, 4, 0, 5 and 1 tokens; row 1: one.
OFFSETS = torch.tensor([0, 3, 7, 7, 12, 13, 26, 26], dtype=torch.int32)


def shard_of(
    rank: int, size: int, cu_seqlens: torch.Tensor | None = OFFSETS, batch: int = B, tokens: int = T
) -> ContextShard:
    # No process group, which the type demands: a shard's numbers are found without one.
    return ContextGroup(None, rank, size).shard(batch, tokens, cu_seqlens)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 13])
def test_slices_cover_every_token_once_and_keep_the_documents(size: int) -> None:
    x = torch.arange(B * T).view(B, T)
    whole = document_of_each_token(OFFSETS, B, T)
    shards = [shard_of(rank, size) for rank in range(size)]
    assert torch.equal(torch.cat([shard.take(x) for shard in shards], dim=1), x)
    for shard in shards:
        length = shard.stop - shard.start
        assert length in (T // size, T // size + 1)
        assert shard.cu_seqlens is not None
        assert shard.cu_seqlens.dtype == OFFSETS.dtype
        assert (shard.cu_seqlens[0], shard.cu_seqlens[-1]) == (0, B * length)
        # Same documents: equal for two tokens exactly where they are in the whole.
        mine, expected = document_of_each_token(shard.cu_seqlens, B, length), shard.take(whole)
        assert torch.equal(mine[:, :, None] == mine[:, None], expected[:, :, None] == expected[:, None])


@pytest.mark.parametrize("size", [2, 3, 4, 13])
def test_what_passes_from_slice_to_slice(size: int) -> None:
    whole = document_of_each_token(OFFSETS, B, T)
    shard = shard_of(0, size)
    for rank, (start, stop) in enumerate(itertools.pairwise(shard.bounds)):
        unbroken = shard.unbroken(rank)
        assert unbroken is not None
        assert torch.equal(unbroken, whole[:, start] == whole[:, stop - 1])
        if rank > 0:
            continues = shard.continues(rank)
            assert continues is not None
            assert torch.equal(continues, whole[:, start] == whole[:, start - 1])


def test_nothing_passes_a_boundary_whatever_the_gates_are() -> None:
    gates = torch.full((3, B, 1), torch.nan)
    passes = _passes(gates, shard_of(0, 3))
    # Row 0 begins documents in each slice, row 1 none.
    assert torch.equal(passes[1:, 0], torch.zeros(2, 1))
    assert passes[1:, 1].isnan().all()


def test_a_slice_of_nan_gates_reaches_no_document_that_begins_after_it() -> None:
    # One row, whose second document begins with slice 2; slice 1 is all of the first, and its gates are NaN.
    offsets = torch.tensor([0, 8, 12], dtype=torch.int32)
    states = torch.ones(3, 1, 1, 4)
    gates = torch.zeros(3, 1, 1)
    gates[1] = torch.nan
    for rank, of_states in ((2, _entering), (0, _leaving)):
        shard = shard_of(rank, 3, offsets, batch=1, tokens=12)
        passes = _passes(gates, shard)
        assert passes[1].isnan().all()
        assert of_states(states, passes, shard).isfinite().all()


def test_rows_without_offsets_are_one_document() -> None:
    shard = shard_of(1, 3, None)
    assert shard.cu_seqlens is None
    assert shard.continues(1) is None
    assert shard.unbroken(1) is None


def test_tokens_before_a_slice_come_from_the_ranks_that_hold_them() -> None:
    bounds = [0, 4, 8, 13]
    assert _pieces(bounds, 0, 5) == []
    assert _pieces(bounds, 2, 3) == [(1, 3)]
    assert _pieces(bounds, 2, 6) == [(0, 2), (1, 4)]
    assert _pieces(bounds, 2, 100) == [(0, 4), (1, 4)]


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="a context of 13 tokens cannot be shared by 14 ranks"):
        shard_of(0, 14)
    with pytest.raises(ValueError, match=r"the whole rows have 13 tokens; got a tensor of shape \(2, 12\)"):
        shard_of(0, 2).take(torch.zeros(2, 12))
    model, ids, shard = small_model(), tokens(B, 6), shard_of(0, 2)
    with pytest.raises(ValueError, match=r"shape \(2, 5\); rank 0 of 2 holds a slice of shape \(2, 6\)"):
        model(ids[:, 1:], shard=shard)
    with pytest.raises(ValueError, match="cu_seqlens and shard are both given"):
        model(ids, cu_seqlens=OFFSETS, shard=shard)
    with pytest.raises(ValueError, match="'mean' is not defined for a slice"):
        model(ids, labels=ids, shard=shard)

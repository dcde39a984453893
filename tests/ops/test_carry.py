"""Sums handed on from chunk to chunk, in as many passes as chunks and by products over blocks of chunks."""

import pytest
import torch

from powertrain.ops import carry, linear_attention, power_retention
from powertrain.ops.carry import carried_sums
from tests.ops.accuracy import evaluate, make_inputs, relative_error


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What a GPU takes for small states; holds the number of chunks of each call."""
    calls: list[int] = []
    by_blocks = carry._by_blocks

    def counted(x, initial, factors):
        calls.append(x.shape[1])
        return by_blocks(x, initial, factors)

    monkeypatch.setattr(carry, "_LAUNCH_ELEMENTS", {"cpu": 1 << 20, "cuda": 1 << 20})
    monkeypatch.setattr(carry, "_by_blocks", counted)
    monkeypatch.setattr(carry, "_BLOCK", 3)  # 13 chunks: a block that is not full, and blocks of blocks
    return calls


@pytest.mark.parametrize("chunks", [1, 2, 3, 8, 13])
@pytest.mark.parametrize("given", ["nothing", "initial", "factors", "both"])
@pytest.mark.parametrize("from_end", [False, True])
def test_both_ways_agree(
    blocks: list[int], monkeypatch: pytest.MonkeyPatch, from_end: bool, chunks: int, given: str
) -> None:
    generator = torch.Generator().manual_seed(chunks)
    x, initial = (torch.randn(2, *shape, 3, 4, generator=generator, dtype=torch.float64) for shape in ((chunks,), ()))
    factors = torch.rand(2, chunks, 1, 1, generator=generator, dtype=torch.float64)
    factors[0, chunks // 2] = 0.0  # a document begins
    unbroken = factors != 0
    initial_, factors_ = (
        initial if given in ("initial", "both") else None,
        factors if given in ("factors", "both") else None,
    )
    total, expected = torch.zeros_like(initial) if initial_ is None else initial_, [initial] * chunks
    for c in reversed(range(chunks)) if from_end else range(chunks):
        total = expected[c] = total * (1.0 if factors_ is None else factors_[:, c]) + x[:, c]
    for elements in ({"cpu": 1 << 20}, {}):
        monkeypatch.setattr(carry, "_LAUNCH_ELEMENTS", elements)
        sums = carried_sums(x.clone(), initial_, factors_, unbroken if factors_ is factors else None, from_end=from_end)
        torch.testing.assert_close(sums, torch.stack(expected, dim=1), rtol=1e-14, atol=1e-14)
    assert blocks == ([chunks] if chunks > 2 else [])


@pytest.mark.parametrize("documents", [True, False])
def test_the_ops_hand_on_the_same_sums(blocks: list[int], monkeypatch: pytest.MonkeyPatch, documents: bool) -> None:
    """Forward, states formed again and their gradients, on a path that only a GPU takes."""
    inputs = make_inputs(1, 200, 2, 1, 4, 4, dtype=torch.float64)
    inputs.keywords["chunk_size"] = 16
    if documents:
        inputs.keywords["cu_seqlens"] = torch.tensor([0, 30, 31, 120, 200])
    for op in (linear_attention, power_retention):
        ours, cotangents = evaluate(op, inputs)
        assert blocks
        blocks.clear()
        with monkeypatch.context() as patch:
            patch.setattr(carry, "_LAUNCH_ELEMENTS", {})
            theirs, _ = evaluate(op, inputs, cotangents)
        assert not blocks
        for name, value in theirs.items():
            assert relative_error(ours[name], value) < 1e-12, name

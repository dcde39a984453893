"""Decoding from the cache equals the full forward pass, for every mixer, however the tokens are cut."""

import pytest
import torch

from powertrain.inference.cache import DecodeCache, TokenBuffer
from powertrain.models.config import MixerConfig
from tests.models.counting import flop_counter
from tests.models.small import MIXERS, small_model, tokens

# The other power layers fold their keys into the state after 64 tokens or more: these do so within 40.
FOLDING = MixerConfig(kind="power", switch_over_seq_len=5, gate_init=0.9)
UNGATED_FOLDING = MixerConfig(kind="power", switch_over_seq_len=5, gated=False)
ALL = {**MIXERS, "power_folding": FOLDING, "power_ungated_folding": UNGATED_FOLDING}


@torch.no_grad()
@pytest.mark.parametrize("mixer", ALL)
@pytest.mark.parametrize(
    "cuts", [[1] * 40, [17] + [1] * 23, [40], [3, 1, 1, 20, 1, 14]], ids=["tokens", "prefill", "whole", "mixed"]
)
def test_cached_equals_full(mixer: str, cuts: list[int]):
    model, ids = small_model(ALL[mixer]), tokens(2, 40)
    cache = DecodeCache(model.config)
    parts = [model(part, cache=cache).logits for part in ids.split(cuts, dim=1)]
    assert cache.position == 40
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids).logits, rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("mixer", ["power", "softmax", "window", "linear", "hybrid"])
def test_cached_equals_full_in_bf16(mixer: str):
    model, ids = small_model(mixer), tokens(2, 40)
    cache = DecodeCache(model.config)
    with torch.autocast("cpu", torch.bfloat16):
        parts = [model(part, cache=cache).logits for part in ids.split([17] + [1] * 23, dim=1)]
    expected = model(ids).logits
    assert (torch.cat(parts, dim=1) - expected).norm() < 0.05 * expected.norm()


@torch.no_grad()
@pytest.mark.parametrize(
    "mixer", [FOLDING, MIXERS["window"], MIXERS["linear"], MIXERS["softmax"]], ids=lambda m: m.kind
)
def test_cost_per_token(mixer: MixerConfig):
    """Products of a decoding step: the same at any context (and phase of the folding), but for softmax."""
    model = small_model(mixer)
    cache = DecodeCache(model.config)

    def step_flops(position: int) -> int:
        model(tokens(1, position - cache.position), cache=cache, logits_to_keep=1)
        # A prefill leaves no key waiting; 4 more steps reach the same phase in both calls.
        for _ in range(4):
            model(tokens(1, 1), cache=cache)
        with flop_counter() as counter:
            model(tokens(1, 1), cache=cache)
        return counter.get_total_flops()

    short, long = step_flops(50), step_flops(3000)
    if mixer.kind == "softmax":
        # 4 query heads, 2 layers, K + V = 16.
        assert long - short == 2 * 4 * 2 * 16 * 2950
    else:
        assert long == short


def test_cache_refuses_labels_and_documents():
    model = small_model()
    cache = DecodeCache(model.config)
    for arguments in ({"labels": tokens(1, 3)}, {"cu_seqlens": torch.tensor([0, 3], dtype=torch.int32)}):
        with pytest.raises(ValueError, match="one sequence per row"):
            model(tokens(1, 3), cache=cache, **arguments)
    assert cache.position == 0


@pytest.mark.parametrize("limit", [None, 1, 5, 300])
@pytest.mark.parametrize("gated", [False, True])
def test_token_buffer_keeps_the_last_tokens(limit: int | None, gated: bool):
    buffer, generator = TokenBuffer(limit), torch.Generator().manual_seed(0)
    seen: list[torch.Tensor] = []
    for size in [1, 1, 3, 7, 1, 400, 1, 2] + [1] * 700:
        k = torch.rand(2, size, 3, 4, generator=generator)
        seen.append(k)
        buffer.append(k, k + 1, k[..., 0] if gated else None)
        if len(seen) % 50 > 8:
            continue
        expected = torch.cat(seen, dim=1)
        expected = expected if limit is None else expected[:, -limit:]
        kept_k, kept_v, kept_log_G = buffer.tokens()
        assert len(buffer) == expected.shape[1]
        assert torch.equal(kept_k, expected)
        assert torch.equal(kept_v, expected + 1)
        assert (kept_log_G is None) != gated
        assert kept_log_G is None or torch.equal(kept_log_G, expected[..., 0])
        # Memory follows the tokens kept.
        assert kept_k.untyped_storage().nbytes() <= 4 * 2 * 12 * (1.5 * max(len(buffer), limit or 0) + 700)
    buffer.clear()
    assert len(buffer) == 0

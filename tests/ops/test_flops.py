"""FLOP counts in closed form, against sums over the blocks that the implementation cuts its work into."""

import pytest

from powertrain.ops.flops import power_retention_flops, softmax_attention_flops
from powertrain.ops.plan import attention_row_blocks, make_plan


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize("queries", [None, 1, 300, 1000])
@pytest.mark.parametrize("window", [None, 1, 64, 100, 257, 900])
def test_attention_counts_the_blocks_that_are_computed(window, queries, device_type):
    for tokens in (1000, 1024, 1025):
        first_row = 0 if queries is None else tokens - queries
        blocks = attention_row_blocks(tokens, window or tokens, device_type, first_row=first_row)
        pairs = sum((rows.stop - rows.start) * (columns.stop - columns.start) for rows, columns in blocks)
        flops = softmax_attention_flops(
            batch=1, tokens=tokens, query_heads=1, key_dim=1, value_dim=1, executed=True, window=window,
            queries=queries, device_type=device_type,
        )  # fmt: skip
        assert flops.forward.intra_chunk == 4 * pairs


@pytest.mark.parametrize("executed", [True, False])
@pytest.mark.parametrize("chunk_size", [1, 64, 100, 1000])
def test_power_counts_the_chunks_that_are_computed(chunk_size, executed):
    for tokens in (1, 99, 1000, 6400):
        sizes = {"batch": 1, "tokens": tokens, "key_heads": 1, "key_dim": 8, "value_dim": 8, "deg": 2}
        sizes["chunk_size"] = chunk_size
        flops = power_retention_flops(**sizes, query_heads=1, executed=executed)
        plan = make_plan(**sizes, query_heads_per_key_head=1, device_type="cpu")
        segments = plan.segments()
        chunks = [segment.chunk_size for segment in segments for _ in range(segment.chunks)]
        block = plan.block_size if executed else 1
        pairs = sum(
            min(block, size - start) * (start + min(block, size - start))
            for size in chunks
            for start in range(0, size, block)
        )
        states = 2 * 36 * 9
        again = sum((segment.chunks - 1) * segment.chunk_size for segment in segments) if executed else 0
        assert flops.forward.intra_chunk == 2 * (8 + 9) * pairs
        assert flops.forward.state_query == states * (tokens - chunks[0])
        assert flops.forward.state_update == states * (tokens - chunks[-1])
        assert flops.backward.state_update == states * (2 * (tokens - chunks[-1]) + again)

"""FLOPs of one call of each op, by part: the counts that `models/flops.py` adds up and that `FlopCounterMode` reports.

A multiply-add is 2 FLOPs and only matrix products count, as in `torch.utils.flop_counter`. *Algorithmic* counts what
the mathematics needs (exact F, causal pairs only, nothing computed twice); *executed* counts the products that the
PyTorch implementation runs: whole diagonal blocks, states between two saved ones formed again in the backward pass.
"""

from dataclasses import dataclass, fields

from powertrain.ops.plan import Plan, attention_block_rows, make_plan
from powertrain.ops.sympow import phi_dimension


@dataclass(frozen=True)
class OpFlops:
    """FLOPs of one pass of an op over all rows, heads and tokens."""

    intra_chunk: int = 0  # products over pairs of tokens (all of softmax and window attention)
    state_update: int = 0  # phi(k)^T v into states, and its adjoints
    state_query: int = 0  # phi(q) times states, and its adjoints

    @property
    def total(self) -> int:
        return self.intra_chunk + self.state_update + self.state_query

    def __add__(self, other: "OpFlops") -> "OpFlops":
        return OpFlops(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class OpPassFlops:
    """Forward and backward FLOPs of one op call; the backward pass does not include a recomputation of the forward by
    the caller.
    """

    forward: OpFlops
    backward: OpFlops


def power_retention_flops(
    *,
    batch: int,
    tokens: int,
    query_heads: int,
    key_heads: int,
    key_dim: int,
    value_dim: int,
    deg: int,
    chunk_size: int,
    executed: bool,
    initial_state: bool = False,
    final_state: bool = False,
    device_type: str = "cpu",
) -> OpPassFlops:
    """Return the FLOPs of `power_retention` (or of `linear_attention`, with deg 1) on `(batch, tokens, heads, dim)`
    inputs with `chunk_size` resolved.

    Per token and query head, algorithmic and for one key head per query head: forward 4 F (V+1) + (chunk_size + 1)(K +
    V + 1), backward twice and 2.5 times those; the first chunk reads no state unless there is an initial one, the last
    writes none unless it is asked for.
    """
    W, F = value_dim + 1, phi_dimension(key_dim, deg)
    plan = make_plan(
        batch=batch,
        key_heads=key_heads,
        tokens=tokens,
        query_heads_per_key_head=query_heads // key_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        deg=deg,
        chunk_size=chunk_size,
        device_type=device_type,
    )
    whole, rest = divmod(tokens, plan.chunk_size)
    if executed:
        pairs = whole * _executed_pairs(plan.chunk_size, plan) + _executed_pairs(rest, plan)
    else:
        pairs = whole * _causal_pairs(plan.chunk_size, plan.chunk_size) + _causal_pairs(rest, rest)
    reading = tokens - (0 if initial_state else plan.chunk_size)
    writing = tokens - (0 if final_state else rest or plan.chunk_size)
    query_rows, key_rows = batch * query_heads, batch * key_heads
    update, query = 2 * F * W * writing * key_rows, 2 * F * W * reading * query_rows
    recomputed = 0
    if executed:
        # States inside a segment are formed again from the one saved at its start.
        again = whole - -(-whole // plan.chunks_per_segment)
        recomputed = 2 * F * W * again * plan.chunk_size * key_rows
    return OpPassFlops(
        forward=OpFlops(intra_chunk=2 * (key_dim + W) * pairs * query_rows, state_update=update, state_query=query),
        backward=OpFlops(
            # Scores again, then the gradients of weights, v, q and k.
            intra_chunk=2 * (3 * key_dim + 2 * W) * pairs * query_rows,
            state_update=2 * update + recomputed,
            state_query=2 * query,
        ),
    )


def softmax_attention_flops(
    *,
    batch: int,
    tokens: int,
    query_heads: int,
    key_dim: int,
    value_dim: int,
    executed: bool,
    window: int | None = None,
    queries: int | None = None,
    blocked: bool = True,
    device_type: str = "cpu",
) -> OpPassFlops:
    """Return the FLOPs of `softmax_attention` or, with a window, of `window_attention`, all of them under
    `intra_chunk`.

    `queries` of the tokens, the last ones, have queries (None: all). `blocked` says that our blocked implementation
    runs (windows, documents, gates); otherwise PyTorch's SDPA does, whose registered formula counts all pairs, masked
    or not. Executed counts take no credit for columns of other documents.
    """
    window = tokens if window is None else min(window, tokens)
    first_row = 0 if queries is None else tokens - queries
    if not executed:
        pairs = _causal_pairs(tokens, window) - _causal_pairs(first_row, window)
    elif blocked:
        pairs = _attention_pairs(tokens, window, device_type, first_row)
    else:
        pairs = (tokens - first_row) * tokens
    rows = batch * query_heads
    return OpPassFlops(
        forward=OpFlops(intra_chunk=2 * pairs * rows * (key_dim + value_dim)),
        # Scores again, then the gradients of weights, v, q and k.
        backward=OpFlops(intra_chunk=2 * pairs * rows * (3 * key_dim + 2 * value_dim)),
    )


def _executed_pairs(chunk_size: int, plan: Plan) -> int:
    whole, rest = divmod(chunk_size, plan.block_size)
    diagonal = whole * plan.block_size**2 + rest**2
    before = plan.block_size**2 * whole * (whole - 1) // 2 + rest * whole * plan.block_size
    return diagonal + before


def _causal_pairs(tokens: int, window: int) -> int:
    window = min(window, tokens)
    return window * (window + 1) // 2 + (tokens - window) * window


def _attention_pairs(tokens: int, window: int, device_type: str, first_row: int) -> int:
    """The pairs of `plan.attention_row_blocks`, whose number grows with the tokens, without forming them."""
    size = attention_block_rows(device_type)
    whole, rest = divmod(tokens - first_row, size)
    # Of the blocks that begin within the window each sees all columns before its end, and each later one as many.
    early = min(whole, max(0, -(-(window - first_row) // size)))
    pairs = early * size * first_row + size**2 * early * (early + 1) // 2
    pairs += (whole - early) * size * (size + window - 1)
    return pairs + rest * (tokens - max(0, tokens - rest - window + 1))

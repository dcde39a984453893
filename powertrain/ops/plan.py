"""How the chunked PyTorch implementation cuts its work: a function of shapes alone, shared by the implementation and by
its FLOP count.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from powertrain.ops.sympow import phi_dimension

# Tokens of the diagonal blocks inside a chunk, of whose work half is masked out. On CPU 128 is the smallest at which
# the matrix products run at full speed; on a GPU fewer, larger launches win.
_BLOCK_SIZE = {"cpu": 128, "cuda": 256}
# Elements of one working buffer: a tile of attention weights, or the monomials of a segment. CPU: the last-level cache;
# GPU: enough to fill the chip.
_TILE_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}
_PHI_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 27}
_CHUNK_SIZES = (64, 128, 256, 512, 1024)
# Passes over a chunk's state (weighting, decay, scan, boundary terms; forward and backward) are bound by memory: their
# cost per state element, in FLOPs of a matrix product. An estimate; `powertrain bench op --chunk-size` measures it.
_STATE_PASS_FLOPS = 400.0
# A FLOP of the state path costs this many of the quadratic path, because it also forms and contracts phi. An estimate.
_STATE_PATH_COST = 1.5


@dataclass(frozen=True)
class Segment:
    """`chunks` consecutive chunks of `chunk_size` tokens that start at token `start`, processed as one batch."""

    start: int
    chunks: int
    chunk_size: int

    @property
    def stop(self) -> int:
        return self.start + self.chunks * self.chunk_size


@dataclass(frozen=True)
class Plan:
    """The cut of `sequences` x `tokens` into groups of sequences, segments of chunks, and blocks inside a chunk.

    One sequence is one key head of one batch row. A state is saved for the backward pass at each segment start, so
    memory falls with `chunks_per_segment`.
    """

    sequences: int
    tokens: int
    chunk_size: int
    block_size: int
    sequences_per_group: int
    chunks_per_segment: int
    phi_columns: int  # tokens (of all sequences, chunks and query heads in a batch) whose monomials exist at once
    tile_elements: int

    def groups(self) -> Iterator[slice]:
        for start in range(0, self.sequences, self.sequences_per_group):
            yield slice(start, min(start + self.sequences_per_group, self.sequences))

    def segments(self) -> list[Segment]:
        whole, rest = self.tokens // self.chunk_size, self.tokens % self.chunk_size
        segments = [
            Segment(first * self.chunk_size, min(self.chunks_per_segment, whole - first), self.chunk_size)
            for first in range(0, whole, self.chunks_per_segment)
        ]
        if rest:
            segments.append(Segment(whole * self.chunk_size, 1, rest))
        return segments

    def blocks(self, chunk_size: int) -> Iterator[slice]:
        for start in range(0, chunk_size, self.block_size):
            yield slice(start, min(start + self.block_size, chunk_size))


def make_plan(
    *,
    sequences: int,
    tokens: int,
    query_heads_per_key_head: int,
    key_dim: int,
    deg: int,
    chunk_size: int,
    device_type: str,
) -> Plan:
    """Return the plan for `sequences` key heads over all rows, cut at `chunk_size`; buffers are bounded whatever the
    shapes.
    """
    device_type = device_type if device_type in _BLOCK_SIZE else "cuda"
    chunk_size = min(chunk_size, max(tokens, 1))
    phi_columns = max(1, _PHI_ELEMENTS[device_type] // phi_dimension(key_dim, deg))
    chunks = -(-tokens // chunk_size)
    # Long sequences are batched over chunks first, because that also spaces out the saved states.
    chunks_at_once = max(1, phi_columns // (query_heads_per_key_head * chunk_size))
    chunks_per_segment = max(1, min(chunks_at_once, chunks))
    if chunks == 1:
        row_elements = query_heads_per_key_head * min(_BLOCK_SIZE[device_type], chunk_size) * chunk_size
        sequences_per_group = max(1, _TILE_ELEMENTS[device_type] // row_elements)
    else:
        sequences_per_group = max(1, chunks_at_once // chunks_per_segment)
    return Plan(
        sequences=sequences,
        tokens=tokens,
        chunk_size=chunk_size,
        block_size=_BLOCK_SIZE[device_type],
        sequences_per_group=min(sequences_per_group, max(sequences, 1)),
        chunks_per_segment=chunks_per_segment,
        phi_columns=phi_columns,
        tile_elements=_TILE_ELEMENTS[device_type],
    )


def attention_row_blocks(
    tokens: int, window: int, device_type: str, first_column: list[int] | None = None, first_row: int = 0
) -> Iterator[tuple[slice, slice]]:
    """Yield (rows, columns) of blocked softmax attention: the columns that some row of the block can see.

    `first_column` optionally holds, for each token, the first token of its document; rows start at token `first_row`.
    """
    block_size = _BLOCK_SIZE.get(device_type, _BLOCK_SIZE["cuda"])
    for start in range(first_row, tokens, block_size):
        first = max(0, start - window + 1)
        if first_column is not None:
            first = max(first, first_column[start])
        stop = min(start + block_size, tokens)
        yield slice(start, stop), slice(first, stop)


def attention_sequences_per_group(*, tokens: int, window: int, query_heads_per_key_head: int, device_type: str) -> int:
    """Return how many key heads blocked softmax attention takes at once, so that the scores of one block of rows fit a
    tile.
    """
    rows = _BLOCK_SIZE.get(device_type, _BLOCK_SIZE["cuda"])
    elements = query_heads_per_key_head * rows * min(tokens, window + rows)
    return max(1, _TILE_ELEMENTS.get(device_type, _TILE_ELEMENTS["cuda"]) // elements)


def choose_chunk_size(
    *, tokens: int, key_dim: int, value_dim: int, deg: int, query_heads_per_key_head: int = 1, has_state: bool = False
) -> int:
    """Return the chunk size of least cost for these shapes; `tokens` (one chunk: the quadratic form) where no state
    pays.
    """
    state_elements = phi_dimension(key_dim, deg) * (value_dim + 1)

    def cost(chunk_size: int) -> float:
        """FLOPs per token of one query head, forward."""
        chunks = -(-tokens // chunk_size)
        read = (chunks - 1 + has_state) / chunks
        written = (chunks - 1) / chunks / query_heads_per_key_head
        return (
            (chunk_size + 1) * (key_dim + value_dim)
            + _STATE_PATH_COST * 2 * state_elements * (read + written)
            + _STATE_PASS_FLOPS * state_elements / chunk_size / query_heads_per_key_head * (chunks > 1)
        )

    best, least = tokens, cost(tokens)
    for size in _CHUNK_SIZES:
        if size < tokens and cost(size) < least:
            best, least = size, cost(size)
    return best

"""How the chunked PyTorch implementation cuts its work: a function of shapes alone, shared by the implementation and by
its FLOP count.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from powertrain.ops.sympow import phi_dimension

# Tokens of the diagonal blocks inside a chunk, of whose work half is masked out. On CPU 64 is the smallest at which the
# matrix products run at full speed; on a GPU fewer, larger launches win.
_DIAGONAL_BLOCK = {"cpu": 64, "cuda": 256}
# Rows of a block of softmax attention, each with all its columns.
_ROW_BLOCK = {"cpu": 128, "cuda": 256}
# Elements of one working buffer: a tile of attention weights, or of monomials. CPU: measured; smaller ones stay in a
# core's own cache, larger ones cost fewer calls. GPU: enough to fill the chip.
_TILE_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 26}
_PHI_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 27}
# Rows of monomials in a tile, if tokens may be traded for them: as many as make a matrix product efficient. GPU: all.
_PHI_ROWS = {"cpu": 512, "cuda": 1 << 30}
# Floats of a state saved for the backward pass, per float of a chunk's keys and values. A state at every chunk saves
# forming it again, which costs an eighth of the time; this bounds what it takes in memory.
_SAVED_STATE_RATIO = 4
_CHUNK_SIZES = (64, 128, 256, 512, 1024)
# Passes over a chunk's state (weighting, decay, scan, boundary terms; forward and backward) are bound by memory: their
# cost per state element, in FLOPs of a matrix product. This and the next from times on CPU (8 heads of 64, forward and
# backward, 4096 tokens: one chunk 1.16 s, chunks of 1024 1.32 s, of 512 1.26 s; `powertrain bench op --chunk-size`).
_STATE_PASS_FLOPS = 200.0
# A FLOP of the state path costs this many of the quadratic path, because it also forms and contracts phi.
_STATE_PATH_COST = 1.1


@dataclass(frozen=True)
class Segment:
    """`chunks` chunks of `chunk_size` tokens, one every `stride` tokens from `start` on, processed as one batch."""

    start: int
    chunks: int
    chunk_size: int
    stride: int

    @property
    def stop(self) -> int:
        return self.start + (self.chunks - 1) * self.stride + self.chunk_size


@dataclass(frozen=True)
class Group:
    """Sequences processed at once: some key heads of one batch row, or all key heads of some rows."""

    rows: slice
    heads: slice
    sequences: slice  # the same, counted over rows and heads


@dataclass(frozen=True)
class Rectangles:
    """Pairs of tokens inside chunks: of `rows` with all `columns` of the same number; `before` is the place from which
    on the rows come, with all columns up to it.
    """

    rows: Segment
    columns: Segment
    before: Segment


@dataclass(frozen=True)
class Plan:
    """The cut of `batch` x `key_heads` sequences of `tokens` into groups of sequences, segments of chunks, and tiles
    inside a chunk.

    One sequence is one key head of one batch row. A state is saved for the backward pass at each segment start, so
    memory falls with `chunks_per_segment`.
    """

    batch: int
    key_heads: int
    tokens: int
    chunk_size: int
    block_size: int
    sequences_per_group: int
    chunks_per_segment: int
    phi_columns: int  # tokens (of all sequences, chunks and query heads in a batch) of a tile of monomials
    phi_elements: int  # of a tile of monomials
    tile_elements: int  # of a tile of attention weights

    def groups(self) -> Iterator[Group]:
        if self.sequences_per_group < self.key_heads:
            for row in range(self.batch):
                for start in range(0, self.key_heads, self.sequences_per_group):
                    stop = min(start + self.sequences_per_group, self.key_heads)
                    first = row * self.key_heads
                    yield Group(slice(row, row + 1), slice(start, stop), slice(first + start, first + stop))
            return
        rows = self.sequences_per_group // self.key_heads
        for start in range(0, self.batch, rows):
            stop = min(start + rows, self.batch)
            sequences = slice(start * self.key_heads, stop * self.key_heads)
            yield Group(slice(start, stop), slice(0, self.key_heads), sequences)

    def groups_at_once(self, threads: int) -> int:
        """Return how many groups to process at the same time, each in one of `threads` CPU threads; 1: one group after
        another, each in all of them.

        All threads share a group well where its products are large batches: many sequences of a single chunk. (Two
        threads, 8 heads of 64, forward and backward: 1024 tokens 51 ms, and 61 ms in threads of their own, which
        compete with PyTorch's that still spin after the operation before; 4096 tokens, one sequence to a group, 0.93 s
        and 0.51 s; chunks of 256 at 1024 tokens 0.27 s and 0.13 s.)
        """
        is_batch = self.chunk_size >= self.tokens and self.sequences_per_group >= threads
        return 1 if is_batch else threads

    def segments(self) -> list[Segment]:
        size = self.chunk_size
        whole, rest = self.tokens // size, self.tokens % size
        segments = [
            Segment(first * size, min(self.chunks_per_segment, whole - first), size, size)
            for first in range(0, whole, self.chunks_per_segment)
        ]
        if rest:
            segments.append(Segment(whole * size, 1, rest, rest))
        return segments

    def diagonal_blocks(self, chunk_size: int, batch: int) -> Iterator[Segment]:
        """Yield the diagonal blocks of each of `batch` chunks (times query heads), as many at once as fit a tile."""
        size = self.block_size
        whole, rest = chunk_size // size, chunk_size % size
        at_once = max(1, self.tile_elements // (batch * size * size))
        for first in range(0, whole, at_once):
            yield Segment(first * size, min(at_once, whole - first), size, size)
        if rest:
            yield Segment(whole * size, 1, rest, rest)

    def rectangles(self, chunk_size: int, batch: int) -> Iterator[Rectangles]:
        """Yield the rest of the pairs of each of `batch` chunks (times query heads), in pieces that fit a tile.

        The causal triangle less its diagonal blocks is a square, rows of its second half with columns of its first,
        and two triangles of half the size: squares of one size are one batch, and gates need one factor for each row
        and column of them.
        """
        tile_elements = max(1, self.tile_elements // batch)
        half = self.block_size
        while half < chunk_size:
            whole, rest = chunk_size // (2 * half), max(0, chunk_size % (2 * half) - half)
            at_once = max(1, tile_elements // half**2)
            for first in range(0, whole, at_once):
                yield from self._pieces(2 * half * first, min(at_once, whole - first), half, half, tile_elements)
            if rest:
                yield from self._pieces(2 * half * whole, 1, half, rest, tile_elements)
            half *= 2

    def _pieces(self, start: int, count: int, columns: int, rows: int, elements: int) -> Iterator[Rectangles]:
        height = max(1, math.isqrt(elements // count) // self.block_size) * self.block_size
        width = max(1, elements // (count * height) // self.block_size) * self.block_size
        stride, middle = columns + rows, start + columns
        for row in range(0, rows, height):
            for column in range(0, columns, width):
                yield Rectangles(
                    rows=Segment(middle + row, count, min(height, rows - row), stride),
                    columns=Segment(start + column, count, min(width, columns - column), stride),
                    before=Segment(middle - 1, count, 1, stride),
                )


def make_plan(
    *,
    batch: int,
    key_heads: int,
    tokens: int,
    query_heads_per_key_head: int,
    key_dim: int,
    value_dim: int,
    deg: int,
    chunk_size: int,
    device_type: str,
) -> Plan:
    """Return the plan for these shapes, cut at `chunk_size`; buffers are bounded whatever they are."""
    device_type = device_type if device_type in _DIAGONAL_BLOCK else "cuda"
    chunk_size = min(chunk_size, max(tokens, 1))
    state_rows = phi_dimension(key_dim, deg)
    phi_columns = max(1, _PHI_ELEMENTS[device_type] // min(state_rows, _PHI_ROWS[device_type]))
    chunks = -(-tokens // chunk_size)
    chunks_at_once = max(1, phi_columns // (query_heads_per_key_head * chunk_size))
    if chunks == 1:
        row_elements = query_heads_per_key_head * min(_DIAGONAL_BLOCK[device_type], chunk_size) * chunk_size
        chunks_at_once = max(1, _TILE_ELEMENTS[device_type] // row_elements)
    # Sequences come first, because more chunks of one in a batch cost forming states again.
    sequences_per_group = max(1, min(chunks_at_once, batch * key_heads))
    saved_floats = state_rows * (value_dim + 1)
    chunks_per_save = -(-saved_floats // (_SAVED_STATE_RATIO * chunk_size * (key_dim + value_dim)))
    chunks_per_segment = max(1, min(max(chunks_at_once // sequences_per_group, chunks_per_save), chunks))
    return Plan(
        batch=batch,
        key_heads=key_heads,
        tokens=tokens,
        chunk_size=chunk_size,
        block_size=_DIAGONAL_BLOCK[device_type],
        sequences_per_group=sequences_per_group,
        chunks_per_segment=chunks_per_segment,
        phi_columns=phi_columns,
        phi_elements=_PHI_ELEMENTS[device_type],
        tile_elements=_TILE_ELEMENTS[device_type],
    )


def attention_block_rows(device_type: str) -> int:
    """Return how many rows a block of softmax attention has."""
    return _ROW_BLOCK.get(device_type, _ROW_BLOCK["cuda"])


def attention_row_blocks(
    tokens: int, window: int, device_type: str, first_column: list[int] | None = None, first_row: int = 0
) -> Iterator[tuple[slice, slice]]:
    """Yield (rows, columns) of blocked softmax attention: the columns that some row of the block can see.

    `first_column` optionally holds, for each token, the first token of its document; rows start at token `first_row`.
    """
    block_size = attention_block_rows(device_type)
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
    rows = attention_block_rows(device_type)
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

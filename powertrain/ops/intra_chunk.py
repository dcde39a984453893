"""The quadratic part: causal power attention inside each chunk, without normalisation.

o[t] = sum_{s <= t} (q[t] . k[s])^deg * decay(s -> t) * u[s]. Off the diagonal blocks, decay is a factor of the row
times a factor of the column, so that gates cost no exponential per pair; both factors refer to one place between them,
which keeps them at most 1. A factor of 0 would leave infinity NaN: what no pair of one document joins is set to 0.

Tokens lie along the last axis of every tensor, and weights are kept transposed, (columns s, rows t): then each matrix
product has its many tokens where a BLAS is fast, and the awkward W = V + 1 where it costs nothing.

Shape legend: M chunks in a batch, R query heads per key head, C chunk, K key dim, W rows of u.
"""

import torch
from torch import Tensor

from powertrain.ops.decay import Decay, causal_factors, factor, kept, same_document
from powertrain.ops.layout import cut
from powertrain.ops.plan import Plan, Rectangles, Segment


def intra_chunk_fwd(q: Tensor, k: Tensor, u: Tensor, decay: Decay, *, deg: int, plan: Plan) -> Tensor:
    """Return o `(M, W, R, C)` for q `(M, K, R, C)`, k `(M, K, C)`, u `(M, W, C)` and the decay's token positions `(M,
    C)`.
    """
    M, _, R, C = q.shape
    out = u.new_empty(M, u.shape[1], R, C)
    for blocks in plan.diagonal_blocks(C, M * R):
        mask = _diagonal_mask(decay, blocks, q)
        q_rows, k_columns, u_columns = _batch(q, blocks), _batch(k, blocks), _batch(u, blocks)
        weights = _mask_(_power_(torch.bmm(k_columns.mT, q_rows), deg), mask)
        cut(out, blocks).copy_(_unbatch(torch.bmm(u_columns, weights), out, blocks))
    for pairs in plan.rectangles(C, M * R):
        row_factor, column_factor = _factors(decay, pairs, q.dtype)
        of_rows, of_columns = _of_document(decay, pairs)
        q_rows, k_columns = _batch(q, pairs.rows), _batch(k, pairs.columns, where=of_columns)
        weights = _power_(torch.bmm(k_columns.mT, q_rows), deg)
        u_columns = _batch(u, pairs.columns, column_factor)
        _add(torch.bmm(u_columns, weights), out, pairs.rows, row_factor, of_rows)
    return out


def intra_chunk_bwd(
    q: Tensor, k: Tensor, u: Tensor, decay: Decay, grad_out: Tensor, *, deg: int, plan: Plan
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and u for `grad_out (M, W, R, C)`."""
    M, _, R, C = q.shape
    grad_q, grad_k, grad_u = q.new_empty(q.shape), k.new_empty(k.shape), u.new_empty(u.shape)
    for blocks in plan.diagonal_blocks(C, M * R):
        mask = _diagonal_mask(decay, blocks, q)
        q_rows, grad_rows = _batch(q, blocks), _batch(grad_out, blocks)
        k_columns, u_columns = _batch(k, blocks), _batch(u, blocks)
        power, slope = _power_and_slope_(torch.bmm(k_columns.mT, q_rows), deg)
        cut(grad_u, blocks).copy_(_unbatch(torch.bmm(grad_rows, _mask_(power, mask).mT), grad_u, blocks))
        grad_weights = torch.bmm(u_columns.mT, grad_rows, out=power)
        grad_scores = _mask_(grad_weights if slope is None else slope.mul_(grad_weights), mask)
        cut(grad_k, blocks).copy_(_unbatch(torch.bmm(q_rows, grad_scores.mT), grad_k, blocks))
        cut(grad_q, blocks).copy_(_unbatch(torch.bmm(k_columns, grad_scores), grad_q, blocks))
    for pairs in plan.rectangles(C, M * R):
        row_factor, column_factor = _factors(decay, pairs, q.dtype)
        of_rows, of_columns = _of_document(decay, pairs)
        q_rows, k_columns = _batch(q, pairs.rows, where=of_rows), _batch(k, pairs.columns, where=of_columns)
        grad_rows, u_columns = _batch(grad_out, pairs.rows, row_factor), _batch(u, pairs.columns, column_factor)
        power, slope = _power_and_slope_(torch.bmm(k_columns.mT, q_rows), deg)
        _add(torch.bmm(grad_rows, power.mT), grad_u, pairs.columns, column_factor)
        grad_weights = torch.bmm(u_columns.mT, grad_rows, out=power)
        grad_scores = grad_weights if slope is None else slope.mul_(grad_weights)
        _add(torch.bmm(q_rows, grad_scores.mT), grad_k, pairs.columns)
        _add(torch.bmm(k_columns, grad_scores), grad_q, pairs.rows)
    return (grad_q, grad_k, grad_u) if deg == 1 else (grad_q.mul_(deg), grad_k.mul_(deg), grad_u)


def _batch(x: Tensor, segment: Segment, factor: Tensor | None = None, where: Tensor | None = None) -> Tensor:
    """Return the segment's chunks of `x (M, D, [R,] C)`, times `factor (M, chunks, size)` and 0 but `where (M, chunks,
    size)`, as a batch `(M * chunks, D, R * size)`.
    """
    chunks = cut(x, segment)
    if factor is not None:
        chunks = chunks * _beside(factor, chunks)
    if where is not None:
        chunks = kept(chunks, _beside(where, chunks))
    return chunks.flatten(3).flatten(0, 1) if chunks.ndim > 4 else chunks.flatten(0, 1)


def _unbatch(x: Tensor, like: Tensor, segment: Segment) -> Tensor:
    """`(M * chunks, D, R * size)` to `(M, chunks, D, [R,] size)` for a result in `like (M, D, [R,] C)`."""
    return x.view(like.shape[0], segment.chunks, *like.shape[1:-1], segment.chunk_size)


def _add(x: Tensor, total: Tensor, segment: Segment, factor: Tensor | None = None, where: Tensor | None = None) -> None:
    """Add the batch x, times `factor (M, chunks, size)` and `where (M, chunks, size)`, to the segment's chunks of
    `total`.
    """
    chunks, x = cut(total, segment), _unbatch(x, total, segment)
    if where is not None:
        x = kept(x, _beside(where, x))
    if factor is None:
        chunks.add_(x)
    else:
        chunks.addcmul_(x, _beside(factor, x))


def _beside(factor: Tensor, chunks: Tensor) -> Tensor:
    """View `factor (M, chunks, size)` so that it broadcasts with `chunks (M, chunks, D, [R,] size)`."""
    return factor.view(*factor.shape[:2], *[1] * (chunks.ndim - 3), -1)


def _power_(x: Tensor, deg: int) -> Tensor:
    """Overwrite x with x^deg; deg is 1 or even."""
    if deg == 1:
        return x
    x.mul_(x)
    return x if deg == 2 else x.pow_(deg // 2)


def _power_and_slope_(x: Tensor, deg: int) -> tuple[Tensor, Tensor | None]:
    """Return (x^deg, x^(deg-1)), None for a slope of ones; may overwrite x. The factor deg of the slope comes last, on
    gradients that are smaller than tiles.
    """
    if deg == 1:
        return x, None
    slope = x if deg == 2 else x.pow(deg - 1)
    return slope * x, slope


def _diagonal_mask(decay: Decay, blocks: Segment, like: Tensor) -> Tensor:
    """`(M * blocks or 1, columns, 1, rows)`: decay inside a diagonal block, 0 for columns after their row."""
    return causal_factors(decay.cut(blocks).flatten_chunks(), blocks.chunk_size, like)[:, :, None]


def _mask_(weights: Tensor, mask: Tensor) -> Tensor:
    """Return `weights (P, columns, R * rows)`, which are overwritten, times the mask; 0 where that is 0."""
    return kept(weights.unflatten(-1, (-1, mask.shape[-1])).mul_(mask), mask != 0).flatten(2)


def _of_document(decay: Decay, pairs: Rectangles) -> tuple[Tensor | None, Tensor | None]:
    """Return whether each row and each column is of the document at `pairs.before`: `(M, chunks, size)`."""
    before = decay.cut(pairs.before)
    return same_document(decay.cut(pairs.rows), before), same_document(before, decay.cut(pairs.columns))


def _factors(decay: Decay, pairs: Rectangles, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Return the decays from `pairs.before` to each row, and from each column to there: `(M, chunks, size)`."""
    before = decay.cut(pairs.before)
    return factor(decay.cut(pairs.rows), before, dtype), factor(before, decay.cut(pairs.columns), dtype)

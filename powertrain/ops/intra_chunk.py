"""The quadratic part: causal power attention inside each chunk, in blocks of rows, without normalisation.

o[t] = sum_{s <= t} (q[t] . k[s])^deg * decay(s -> t) * v[s]. Columns before the diagonal block take their decay as a
factor of the row times a factor of the column, so that gates cost no exponential per pair; both factors refer to the
start of the row block, which keeps them at most 1.

Shape legend: M chunks in a batch, R query heads per key head, C chunk, K key dim, W columns of v.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from powertrain.ops.decay import Decay, causal_factors, factor
from powertrain.ops.plan import Plan


def intra_chunk_fwd(q: Tensor, k: Tensor, v: Tensor, decay: Decay, *, deg: int, plan: Plan) -> Tensor:
    """Return o `(M, R, C, W)` for q `(M, R, C, K)`, k `(M, C, K)`, v `(M, C, W)` and the decay's token positions `(M,
    C)`.
    """
    out = v.new_empty(*q.shape[:3], v.shape[-1])
    for rows in plan.blocks(q.shape[2]):
        q_rows = _flatten_rows(q, rows)
        weights = _power_(torch.bmm(q_rows, k[:, rows].mT), deg)
        total = torch.bmm(_masked_(weights, _diagonal_mask(weights, decay, rows)), v[:, rows])
        row_factor = _row_factor(q, decay, rows)
        before = None
        for columns in _columns_before(q, rows, plan):
            weights = _power_(torch.bmm(q_rows, k[:, columns].mT), deg)
            before = _accumulate(before, weights, _scaled(v, decay, rows, columns))
        if before is not None:
            total += before if row_factor is None else before.mul_(row_factor)
        out[:, :, rows] = total.view(q.shape[0], q.shape[1], -1, v.shape[-1])
    return out


def intra_chunk_bwd(
    q: Tensor, k: Tensor, v: Tensor, decay: Decay, grad_out: Tensor, *, deg: int, plan: Plan
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v for `grad_out (M, R, C, W)`."""
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for rows in plan.blocks(q.shape[2]):
        q_rows, grad_rows = _flatten_rows(q, rows), _flatten_rows(grad_out, rows)
        scores = torch.bmm(q_rows, k[:, rows].mT)
        slope, power = _slope_and_power(scores, deg)
        mask = _diagonal_mask(scores, decay, rows)
        grad_v[:, rows].baddbmm_(_masked_(power, mask).mT, grad_rows)
        slope = _masked_(slope, mask).mul_(torch.bmm(grad_rows, v[:, rows].mT))
        grad_k[:, rows].baddbmm_(slope.mT, q_rows)
        grad_q_rows = torch.bmm(slope, k[:, rows])

        row_factor = _row_factor(q, decay, rows)
        if row_factor is not None:
            grad_rows = grad_rows * row_factor
        for columns in _columns_before(q, rows, plan):
            slope, power = _slope_and_power(torch.bmm(q_rows, k[:, columns].mT), deg)
            column_factor = _column_factor(decay, rows, columns, v.dtype)
            grad_columns = torch.bmm(power.mT, grad_rows)
            grad_v[:, columns] += grad_columns if column_factor is None else grad_columns.mul_(column_factor)
            slope.mul_(torch.bmm(grad_rows, _scaled(v, decay, rows, columns).mT))
            grad_k[:, columns].baddbmm_(slope.mT, q_rows)
            grad_q_rows.baddbmm_(slope, k[:, columns])
        grad_q[:, :, rows] = grad_q_rows.view(q.shape[0], q.shape[1], -1, q.shape[-1])
    return grad_q, grad_k, grad_v


def _columns_before(q: Tensor, rows: slice, plan: Plan) -> Iterator[slice]:
    M, R = q.shape[:2]
    width = max(plan.block_size, plan.tile_elements // (M * R * (rows.stop - rows.start)))
    for start in range(0, rows.start, width):
        yield slice(start, min(start + width, rows.start))


def _flatten_rows(x: Tensor, rows: slice) -> Tensor:
    return x[:, :, rows].reshape(x.shape[0], -1, x.shape[-1])


def _accumulate(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    return torch.bmm(a, b) if total is None else total.baddbmm_(a, b)


def _power_(x: Tensor, deg: int) -> Tensor:
    """Overwrite x with x^deg; deg is 1 or even."""
    if deg == 1:
        return x
    x.mul_(x)
    return x if deg == 2 else x.pow_(deg // 2)


def _slope_and_power(x: Tensor, deg: int) -> tuple[Tensor, Tensor]:
    """Return (deg * x^(deg-1), x^deg); may overwrite x."""
    if deg == 1:
        return torch.ones_like(x), x
    if deg == 2:
        power = x * x
        return x.mul_(2), power
    lower = x.pow(deg - 1)
    return lower * deg, x.mul_(lower)


def _diagonal_mask(scores: Tensor, decay: Decay, rows: slice) -> Tensor:
    """`(1 or M, 1, rows, rows)`: decay inside a diagonal block, 0 above the diagonal."""
    return causal_factors(decay[:, rows], scores)[:, None]


def _masked_(weights: Tensor, mask: Tensor) -> Tensor:
    """Multiply `weights (M, R*rows, rows)` by the mask in place."""
    weights.view(weights.shape[0], -1, *mask.shape[-2:]).mul_(mask)
    return weights


def _row_factor(q: Tensor, decay: Decay, rows: slice) -> Tensor | None:
    """`(M, R*rows, 1)`: decay from before the row block to each of its rows."""
    if rows.start == 0:
        return None
    by_row = factor(decay[:, rows], decay[:, rows.start - 1 : rows.start], q.dtype)
    return None if by_row is None else by_row.repeat(1, q.shape[1])[..., None]


def _column_factor(decay: Decay, rows: slice, columns: slice, dtype: torch.dtype) -> Tensor | None:
    """`(M, columns, 1)`: decay from each column to the place before the row block."""
    by_column = factor(decay[:, rows.start - 1 : rows.start], decay[:, columns], dtype)
    return None if by_column is None else by_column[..., None]


def _scaled(v: Tensor, decay: Decay, rows: slice, columns: slice) -> Tensor:
    column_factor = _column_factor(decay, rows, columns, v.dtype)
    return v[:, columns] if column_factor is None else v[:, columns] * column_factor

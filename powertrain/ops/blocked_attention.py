"""Causal softmax attention in blocks of rows with a window, documents and gates: time O(T * window), memory linear in
T, explicit forward and backward.

    w_ij = exp(scale q_i.k_j + G_i - G_j)  for i - window < j <= i in one document
    out_i = sum_j w_ij v_j / sum_j w_ij

Shape legend: N = B * Hk sequences, R query heads per key head, T tokens, Tq <= T of them with queries (the last ones),
K key dim, V value dim.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from powertrain.ops.decay import Decay, document_of_each_token, scan_documents_from_end
from powertrain.ops.flops import OpPassFlops, softmax_attention_flops
from powertrain.ops.layout import (
    by_query_head,
    by_sequence,
    compute_dtype,
    from_query_head,
    from_sequence,
    without_autocast,
)
from powertrain.ops.plan import attention_row_blocks, attention_sequences_per_group


class _Problem:
    """Inputs as sequences, and the scores of one block of rows."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_g: Tensor | None,
        cu_seqlens: Tensor | None,
        scale: float,
        window: int,
    ) -> None:
        B, Tq, Hq, _ = q.shape
        T, Hk, dtype = k.shape[1], k.shape[2], compute_dtype(q.dtype)
        self.first_query = T - Tq
        self.q, self.k, self.v = by_query_head(q, Hk).to(dtype), by_sequence(k).to(dtype), by_sequence(v).to(dtype)
        document = None if cu_seqlens is None else document_of_each_token(cu_seqlens, B, T).repeat_interleave(Hk, dim=0)
        self.decay = Decay.make(None if log_g is None else by_sequence(log_g), document)
        self.tokens = self.decay[:, 1:]
        self.scale, self.window = scale, window
        per_group = attention_sequences_per_group(
            tokens=T, window=window, query_heads_per_key_head=Hq // Hk, device_type=q.device.type
        )
        self.groups = [slice(n, n + per_group) for n in range(0, B * Hk, per_group)]
        self.row_blocks = list(
            attention_row_blocks(T, window, q.device.type, self._first_column(), first_row=self.first_query)
        )

    def _first_column(self) -> list[int] | None:
        """Return for each token the start of its document, the earliest over rows; None on a GPU, where reading it
        would wait.
        """
        if self.decay.document is None or self.decay.document.device.type != "cpu":
            return None
        opens = self.decay.opens(has_state=False)
        starts = torch.arange(opens.shape[1]) * opens
        return starts.cummax(-1).values.amin(0).tolist()

    def queries(self, rows: slice) -> slice:
        """Return where the queries of tokens `rows` stand among the queries."""
        return slice(rows.start - self.first_query, rows.stop - self.first_query)

    def scores(self, group: slice, rows: slice, columns: slice) -> Tensor:
        """Return `(N, R * rows, columns)`, minus infinity where masked."""
        q_rows = self.q[group, :, self.queries(rows)].flatten(1, 2)
        scores = torch.bmm(q_rows, self.k[group, columns].mT).mul_(self.scale)
        by_head = scores.unflatten(1, (self.q.shape[1], -1))
        tokens = self.tokens[group]
        if tokens.G is not None:
            # Before the block, the row's and the column's distances to its start add up, and what fp32 loses is small
            # against a gate that is closed anyway. Inside the block they could cancel: there the difference is taken in
            # fp64.
            start, near = tokens.G[:, rows.start, None], rows.start - columns.start
            before = tokens.G[:, columns.start : rows.start]
            by_head[..., :near] += (tokens.G[:, rows] - start).to(scores.dtype)[:, None, :, None]
            by_head[..., :near] += (start - before).to(scores.dtype)[:, None, None, :]
            inside = tokens.G[:, rows]
            by_head[..., near:] += (inside[:, :, None] - inside[:, None, :]).to(scores.dtype)[:, None]
        row, column = (torch.arange(x.start, x.stop, device=scores.device) for x in (rows, columns))
        distance = row[:, None] - column[None, :]
        masked = (distance < 0) | (distance >= self.window)
        if tokens.document is None:
            by_head.masked_fill_(masked, -math.inf)
        else:
            other = tokens.document[:, rows, None] != tokens.document[:, None, columns]
            by_head.masked_fill_((masked | other)[:, None], -math.inf)
        return scores


@torch.library.custom_op("powertrain::blocked_attention", mutates_args=())
@without_autocast
def blocked_attention_op(
    q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None, cu_seqlens: Tensor | None, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    """Return out `(B, Tq, Hq, V)` in the dtype of q, and the log-sum-exp of the scores `(B * Hk, R, Tq)`."""
    problem = _Problem(q, k, v, log_g, cu_seqlens, scale, window)
    out = problem.q.new_empty(*problem.q.shape[:3], v.shape[-1])
    lse = problem.q.new_empty(problem.q.shape[:3])
    for group in problem.groups:
        for rows, columns in problem.row_blocks:
            scores = problem.scores(group, rows, columns)
            normalizer = scores.logsumexp(-1, keepdim=True)
            weights = scores.sub_(normalizer).exp_()
            shape, queries = (problem.q.shape[1], -1), problem.queries(rows)
            out[group, :, queries] = torch.bmm(weights, problem.v[group, columns]).unflatten(1, shape)
            lse[group, :, queries] = normalizer[..., 0].unflatten(1, shape)
    return from_query_head(out, q.shape[0]).to(q.dtype).contiguous(), lse


@blocked_attention_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None, cu_seqlens: Tensor | None, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    B, T, Hq, _ = q.shape
    Hk = k.shape[2]
    return q.new_empty(B, T, Hq, v.shape[-1]), q.new_empty(B * Hk, Hq // Hk, T, dtype=compute_dtype(q.dtype))


@torch.library.custom_op("powertrain::blocked_attention_bwd", mutates_args=())
@without_autocast
def blocked_attention_bwd_op(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    cu_seqlens: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v and log_g (of size 0 without gates)."""
    B, Hk = q.shape[0], k.shape[2]
    problem = _Problem(q, k, v, log_g, cu_seqlens, scale, window)
    grad_y, y = (by_query_head(x, Hk).to(problem.q.dtype) for x in (grad_out, out))
    delta = (grad_y * y).sum(-1)
    grad_q, grad_k, grad_v = torch.empty_like(problem.q), torch.zeros_like(problem.k), torch.zeros_like(problem.v)
    grad_G = problem.k.new_zeros(problem.k.shape[:2], dtype=torch.float64)
    for group in problem.groups:
        for rows, columns in problem.row_blocks:
            queries = problem.queries(rows)
            q_rows, grad_rows = problem.q[group, :, queries].flatten(1, 2), grad_y[group, :, queries].flatten(1, 2)
            weights = problem.scores(group, rows, columns).sub_(lse[group, :, queries].flatten(1, 2)[..., None]).exp_()
            grad_v[group, columns].baddbmm_(weights.mT, grad_rows)
            grad_scores = torch.bmm(grad_rows, problem.v[group, columns].mT)
            grad_scores.sub_(delta[group, :, queries].flatten(1, 2)[..., None]).mul_(weights)
            if log_g is not None:
                # Row sums vanish but for rounding (of `out`, above all), and are kept because the sum over later tokens
                # would pile that up.
                grad_G[group, rows] += grad_scores.sum(-1).unflatten(1, (problem.q.shape[1], -1)).sum(1)
                grad_G[group, columns] -= grad_scores.sum(1)
            grad_k[group, columns].baddbmm_(grad_scores.mT, q_rows)
            grad_q[group, :, queries] = torch.bmm(grad_scores, problem.k[group, columns]).unflatten(
                1, (problem.q.shape[1], -1)
            )
    grad_log_g = q.new_empty(0)
    if log_g is not None:
        summed = scan_documents_from_end(grad_G, problem.tokens.document)
        summed = summed.masked_fill(problem.decay.opens(has_state=False), 0.0)
        grad_log_g = from_sequence(summed, B).to(log_g.dtype).contiguous()
    return (
        from_query_head(grad_q.mul_(scale), B).to(q.dtype).contiguous(),
        from_sequence(grad_k.mul_(scale), B).to(k.dtype).contiguous(),
        from_sequence(grad_v, B).to(v.dtype).contiguous(),
        grad_log_g,
    )


@blocked_attention_bwd_op.register_fake
def _(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    cu_seqlens: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_log_g = q.new_empty(0) if log_g is None else log_g.new_empty(log_g.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), grad_log_g


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.window = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(*tensors, out, lse)


def _backward(ctx: Any, grad_out: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    # Unpacked once: activation checkpointing allows no second time.
    saved = ctx.saved_tensors
    log_g = saved[3]
    grad_q, grad_k, grad_v, grad_log_g = blocked_attention_bwd_op(grad_out, *saved, ctx.scale, ctx.window)
    return grad_q, grad_k, grad_v, None if log_g is None else grad_log_g, None, None, None


blocked_attention_op.register_autograd(_backward, setup_context=_setup_context)


def _call_flops(q: Tensor, v: Tensor, window: int) -> OpPassFlops:
    return softmax_attention_flops(
        batch=q.shape[0],
        tokens=v.shape[1],
        queries=q.shape[1],
        query_heads=q.shape[2],
        key_dim=q.shape[3],
        value_dim=v.shape[3],
        window=window,
        executed=True,
        device_type=q.device.type,
    )


@register_flop_formula(torch.ops.powertrain.blocked_attention, get_raw=True)
def _formula(
    q: Any, k: Any, v: Any, log_g: Any, cu_seqlens: Any, scale: float, window: int, *args: Any, **kwargs: Any
) -> int:
    return _call_flops(q, v, window).forward.total


@register_flop_formula(torch.ops.powertrain.blocked_attention_bwd, get_raw=True)
def _bwd_formula(
    grad_out: Any, q: Any, k: Any, v: Any, log_g: Any, cu_seqlens: Any, out: Any, lse: Any, scale: float, window: int,
    *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    return _call_flops(q, v, window).backward.total

"""The edges of power retention: from public tensors to sequences with a column of ones, and the division by the
normaliser, forward and backward.

With u = [v, 1] the bilinear attention returns o = [n, d] and y = n / d. Its gradient is the only place where the
division appears:

    grad_o = [grad_y / d, -(grad_y . y) / d],   so that grad_o . o = 0: gates get no gradient from the query side
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from powertrain.ops.chunked import chunked_bwd, chunked_fwd
from powertrain.ops.decay import Decay, document_of_each_token
from powertrain.ops.layout import by_query_head, by_sequence, compute_dtype, from_query_head, from_sequence
from powertrain.ops.plan import Plan, make_plan

# Below this the normaliser counts as zero (an all-zero query, say): y = n / floor, which is at most max |v|, and d has
# no gradient. Far below any normaliser that carries information in fp32, and far enough above its smallest number that
# 1 / floor times a finite gradient is finite.
NORMALIZER_FLOOR = 1e-20


@dataclass(frozen=True)
class _Sequences:
    """Inputs as N = B * Hk sequences, in the dtype of the arithmetic."""

    q: Tensor  # (N, R, T, K), scaled
    k: Tensor  # (N, T, K)
    u: Tensor  # (N, T, V + 1)
    decay: Decay
    state: Tensor | None  # (N, F, V + 1)
    plan: Plan

    @classmethod
    def make(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_g: Tensor | None,
        state: Tensor | None,
        sum_of_keys: Tensor | None,
        cu_seqlens: Tensor | None,
        *,
        scale: float,
        deg: int,
        chunk_size: int,
    ) -> "_Sequences":
        B, T, Hq, K = q.shape
        Hk, dtype = k.shape[2], compute_dtype(q.dtype)
        values = by_sequence(v).to(dtype)
        return cls(
            q=by_query_head(q, Hk).to(dtype) * scale,
            k=by_sequence(k).to(dtype),
            u=torch.cat([values, values.new_ones(*values.shape[:2], 1)], dim=-1),
            decay=decay_by_sequence(log_g, cu_seqlens, rows=B, tokens=T, key_heads=Hk),
            state=None if state is None or sum_of_keys is None else _join_state(state, sum_of_keys, dtype),
            plan=make_plan(
                sequences=B * Hk,
                tokens=T,
                query_heads_per_key_head=Hq // Hk,
                key_dim=K,
                deg=deg,
                chunk_size=chunk_size,
                device_type=q.device.type,
            ),
        )


def decay_by_sequence(
    log_g: Tensor | None, cu_seqlens: Tensor | None, *, rows: int, tokens: int, key_heads: int
) -> Decay:
    """Return the positions `(rows * key_heads, tokens + 1)` of `Decay.make` for log_g `(rows, tokens, key_heads)`."""
    document = None
    if cu_seqlens is not None:
        document = document_of_each_token(cu_seqlens, rows, tokens).repeat_interleave(key_heads, dim=0)
    return Decay.make(None if log_g is None else by_sequence(log_g), document)


def _join_state(state: Tensor, sum_of_keys: Tensor, dtype: torch.dtype) -> Tensor:
    """`(B, Hk, F, V)` and `(B, Hk, F)` to `(B * Hk, F, V + 1)`."""
    return torch.cat([state, sum_of_keys[..., None]], dim=-1).flatten(0, 1).to(dtype)


def normalized_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    state: Tensor | None,
    sum_of_keys: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    deg: int,
    chunk_size: int,
    final_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return out `(B, T, Hq, V)`, its normaliser `(B, T, Hq)`, state, sum_of_keys (both of size 0 unless asked for) and
    the states saved for the backward pass.
    """
    B, V = q.shape[0], v.shape[-1]
    x = _Sequences.make(
        q, k, v, log_g, state, sum_of_keys, cu_seqlens, scale=scale, deg=deg, chunk_size=chunk_size
    )  # fmt: skip
    result = chunked_fwd(x.q, x.k, x.u, x.decay, x.state, deg=deg, plan=x.plan, final_state=final_state)
    normalizer = result.out[..., V]
    out = result.out[..., :V] / guarded(normalizer)[..., None]
    state_dtype = compute_dtype(q.dtype) if state is None else state.dtype
    if result.final_state is None:
        new_state, new_sum = q.new_empty(0, dtype=state_dtype), q.new_empty(0, dtype=state_dtype)
    else:
        joined = result.final_state.unflatten(0, (B, -1)).to(state_dtype)
        new_state, new_sum = joined[..., :V].contiguous(), joined[..., V].contiguous()
    return (
        from_query_head(out, B).to(q.dtype).contiguous(),
        from_query_head(normalizer[..., None], B)[..., 0].contiguous(),
        new_state,
        new_sum,
        result.saved_states,
    )


def normalized_bwd(
    grad_out: Tensor,
    grad_state: Tensor | None,
    grad_sum_of_keys: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    state: Tensor | None,
    sum_of_keys: Tensor | None,
    cu_seqlens: Tensor | None,
    out: Tensor,
    normalizer: Tensor,
    saved_states: Tensor,
    scale: float,
    deg: int,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v, log_g, state and sum_of_keys; of size 0 for those that were not given."""
    B, Hk, V = q.shape[0], k.shape[2], v.shape[-1]
    x = _Sequences.make(
        q, k, v, log_g, state, sum_of_keys, cu_seqlens, scale=scale, deg=deg, chunk_size=chunk_size
    )  # fmt: skip
    dtype = x.q.dtype
    grad_o, grad_o_dot_o = through_division(
        *(by_query_head(x, Hk).to(dtype) for x in (grad_out, out, normalizer[..., None]))
    )
    grad_final = None
    if grad_state is not None and grad_sum_of_keys is not None:
        grad_final = _join_state(grad_state, grad_sum_of_keys, dtype)
    grads = chunked_bwd(
        x.q,
        x.k,
        x.u,
        x.decay,
        x.state,
        saved_states,
        grad_o,
        grad_o_dot_o.sum((1, 3)),
        grad_final,
        deg=deg,
        plan=x.plan,
    )
    grad_log_g, grad_initial, grad_initial_sum = (q.new_empty(0) for _ in range(3))
    if log_g is not None:
        assert grads.log_g is not None
        # A gate at the start of a sequence or document discounts nothing: exactly zero rather than the rounding of a
        # sum that cancels.
        opens = x.decay.opens(has_state=state is not None)
        grad_log_g = from_sequence(grads.log_g.masked_fill(opens, 0.0), B).to(log_g.dtype).contiguous()
    if state is not None and sum_of_keys is not None:
        assert grads.state is not None
        joined = grads.state.unflatten(0, (B, Hk))
        grad_initial, grad_initial_sum = (
            joined[..., :V].to(state.dtype).contiguous(),
            joined[..., V].to(sum_of_keys.dtype).contiguous(),
        )
    return (
        from_query_head(grads.q.mul_(scale), B).to(q.dtype).contiguous(),
        from_sequence(grads.k, B).to(k.dtype).contiguous(),
        from_sequence(grads.u[..., :V], B).to(v.dtype).contiguous(),
        grad_log_g,
        grad_initial,
        grad_initial_sum,
    )


def through_division(grad_y: Tensor, y: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Return grad_o `(..., V + 1)` and grad_o . o `(..., 1)`, which is 0 but where d is floored, for d `(..., 1)`."""
    is_floored = d.abs() < NORMALIZER_FLOOR
    grad_y_dot_y = (grad_y * y).sum(-1, keepdim=True)
    divisor = guarded(d)
    grad_o = torch.cat([grad_y / divisor, torch.where(is_floored, 0.0, -grad_y_dot_y / divisor)], dim=-1)
    return grad_o, torch.where(is_floored, grad_y_dot_y, 0.0)


def guarded(normalizer: Tensor) -> Tensor:
    """Return the normaliser with values that count as zero replaced by NORMALIZER_FLOOR."""
    return torch.where(normalizer.abs() < NORMALIZER_FLOOR, NORMALIZER_FLOOR, normalizer)

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
from powertrain.ops.decay import Decay, document_of_each_token, kept
from powertrain.ops.layout import (
    by_sequence,
    compute_dtype,
    from_query_rows,
    from_sequence,
    from_tokens_last,
    query_rows,
    tokens_last,
)
from powertrain.ops.parallel import for_each
from powertrain.ops.plan import Group, Plan, make_plan
from powertrain.ops.sympow import phi_dimension

# Below this the normaliser counts as zero (an all-zero query, say): y = n / floor, which is at most max |v|, and d has
# no gradient. Far below any normaliser that carries information in fp32, and far enough above its smallest number that
# 1 / floor times a finite gradient is finite.
NORMALIZER_FLOOR = 1e-20


@dataclass(frozen=True)
class _Sequences:
    """The inputs of a group of N sequences, in the dtype of the arithmetic."""

    q: Tensor  # (N, K, R, T), scaled
    k: Tensor  # (N, K, T)
    u: Tensor  # (N, V + 1, T)
    state: Tensor | None  # (N, V + 1, F)


@dataclass(frozen=True)
class _Problem:
    """The inputs of one call; groups of sequences are brought into their layout one after another, so that what a
    group works on stays in the cache.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    state: Tensor | None
    sum_of_keys: Tensor | None
    scale: float
    decay: Decay  # of all B * Hk sequences
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
    ) -> "_Problem":
        B, T, Hq, K = q.shape
        Hk = k.shape[2]
        decay = decay_by_sequence(log_g, cu_seqlens, rows=B, tokens=T, key_heads=Hk)
        plan = make_plan(
            batch=B,
            key_heads=Hk,
            tokens=T,
            query_heads_per_key_head=Hq // Hk,
            key_dim=K,
            value_dim=v.shape[3],
            deg=deg,
            chunk_size=chunk_size,
            device_type=q.device.type,
        )
        return cls(q, k, v, state, sum_of_keys, scale, decay, plan)

    @property
    def dtype(self) -> torch.dtype:
        return compute_dtype(self.q.dtype)

    @property
    def groups_at_once(self) -> int:
        return self.plan.groups_at_once(torch.get_num_threads()) if self.q.device.type == "cpu" else 1

    def of_keys(self, x: Tensor, group: Group) -> Tensor:
        """View the group's part of `x (B, T, Hk, ...)`."""
        return x[group.rows, :, group.heads]

    def of_queries(self, x: Tensor, group: Group) -> Tensor:
        """View the group's part of `x (B, T, Hq, ...)`."""
        per_key = self.q.shape[2] // self.k.shape[2]
        return x[group.rows, :, group.heads.start * per_key : group.heads.stop * per_key]

    def query_rows(self, x: Tensor, group: Group) -> Tensor:
        """Return the group's part of `x (B, T, Hq, D)` as `(N, D, R, T)`."""
        heads = group.heads.stop - group.heads.start
        return query_rows(self.of_queries(x, group).to(self.dtype), heads)

    def sequences(self, group: Group) -> _Sequences:
        state = None
        if self.state is not None and self.sum_of_keys is not None:
            state = _join_state(self.state, self.sum_of_keys, group, self.dtype)
        return _Sequences(
            q=self.query_rows(self.q, group).mul_(self.scale),
            k=tokens_last(self.of_keys(self.k, group).to(self.dtype)),
            u=with_ones(tokens_last(self.of_keys(self.v, group).to(self.dtype))),
            state=state,
        )


def decay_by_sequence(
    log_g: Tensor | None, cu_seqlens: Tensor | None, *, rows: int, tokens: int, key_heads: int
) -> Decay:
    """Return the positions `(rows * key_heads, tokens + 1)` of `Decay.make` for log_g `(rows, tokens, key_heads)`."""
    document = None
    if cu_seqlens is not None:
        document = document_of_each_token(cu_seqlens, rows, tokens).repeat_interleave(key_heads, dim=0)
    return Decay.make(None if log_g is None else by_sequence(log_g), document)


def with_ones(v: Tensor) -> Tensor:
    """Return u = [v, 1], `(N, V + 1, T)`, for v `(N, V, T)`."""
    return torch.cat([v, v.new_ones(v.shape[0], 1, v.shape[2])], dim=1)


def _join_state(state: Tensor, sum_of_keys: Tensor, group: Group, dtype: torch.dtype) -> Tensor:
    """`(B, Hk, F, V)` and `(B, Hk, F)` to `(N, V + 1, F)` of the group."""
    parts = [state[group.rows, group.heads].mT, sum_of_keys[group.rows, group.heads, None]]
    return torch.cat(parts, dim=2).flatten(0, 1).to(dtype)


def _write_state(joined: Tensor, state: Tensor, sum_of_keys: Tensor, group: Group) -> None:
    """Write `(N, V + 1, F)` of the group into `(B, Hk, F, V)` and `(B, Hk, F)`."""
    by_row = joined.unflatten(0, (group.rows.stop - group.rows.start, -1))
    state[group.rows, group.heads] = by_row[:, :, :-1].mT
    sum_of_keys[group.rows, group.heads] = by_row[:, :, -1]


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
    (B, T, Hq, key_dim), (Hk, V) = q.shape, v.shape[2:]
    F = phi_dimension(key_dim, deg)
    x = _Problem.make(
        q, k, v, log_g, state, sum_of_keys, cu_seqlens, scale=scale, deg=deg, chunk_size=chunk_size
    )  # fmt: skip
    out, normalizer = q.new_empty(B, T, Hq, V), q.new_empty(B, T, Hq, dtype=x.dtype)
    state_dtype = x.dtype if state is None else state.dtype
    new_state = q.new_empty((B, Hk, F, V) if final_state else 0, dtype=state_dtype)
    new_sum = q.new_empty((B, Hk, F) if final_state else 0, dtype=state_dtype)
    saved_states = q.new_empty(B * Hk, len(x.plan.segments()) - 1, V + 1, F, dtype=x.dtype)

    def run_group(group: Group) -> None:
        inputs = x.sequences(group)
        result = chunked_fwd(
            inputs.q, inputs.k, inputs.u, x.decay[group.sequences], inputs.state, saved_states[group.sequences],
            deg=deg, plan=x.plan, final_state=final_state,
        )  # fmt: skip
        rows, d = group.rows.stop - group.rows.start, result.out[:, V]
        x.of_queries(out, group).copy_(from_query_rows(result.out[:, :V] / guarded(d)[:, None], rows))
        x.of_queries(normalizer, group).copy_(from_query_rows(d[:, None], rows)[..., 0])
        if result.final_state is not None:
            _write_state(result.final_state, new_state, new_sum, group)

    for_each(run_group, x.plan.groups(), x.groups_at_once)
    return out, normalizer, new_state, new_sum, saved_states


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
    V = v.shape[-1]
    x = _Problem.make(
        q, k, v, log_g, state, sum_of_keys, cu_seqlens, scale=scale, deg=deg, chunk_size=chunk_size
    )  # fmt: skip
    grad_q, grad_k, grad_v = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    grad_log_g, grad_initial, grad_initial_sum = (
        q.new_empty(0) if given is None else given.new_empty(given.shape) for given in (log_g, state, sum_of_keys)
    )
    grad_y_dot_y = (grad_out.to(x.dtype) * out.to(x.dtype)).sum(-1, keepdim=True)

    def run_group(group: Group) -> None:
        inputs = x.sequences(group)
        grad_o, grad_o_dot_o = through_division(
            *(x.query_rows(rows, group) for rows in (grad_out, grad_y_dot_y, normalizer[..., None]))
        )
        grad_final = None
        if grad_state is not None and grad_sum_of_keys is not None:
            grad_final = _join_state(grad_state, grad_sum_of_keys, group, x.dtype)
        grads = chunked_bwd(
            inputs.q, inputs.k, inputs.u, x.decay[group.sequences], inputs.state, saved_states[group.sequences],
            grad_o, grad_o_dot_o.sum(1), grad_final, deg=deg, plan=x.plan,
        )  # fmt: skip
        rows = group.rows.stop - group.rows.start
        x.of_queries(grad_q, group).copy_(from_query_rows(grads.q.mul_(scale), rows))
        x.of_keys(grad_k, group).copy_(from_tokens_last(grads.k, rows))
        x.of_keys(grad_v, group).copy_(from_tokens_last(grads.u[:, :V], rows))
        if grads.log_g is not None:
            x.of_keys(grad_log_g, group).copy_(from_sequence(grads.log_g, rows))
        if grads.state is not None:
            _write_state(grads.state, grad_initial, grad_initial_sum, group)

    for_each(run_group, x.plan.groups(), x.groups_at_once)
    if log_g is not None:
        # A gate at the start of a sequence or document discounts nothing: exactly zero rather than the rounding of a
        # sum that cancels.
        grad_log_g.masked_fill_(from_sequence(x.decay.opens(has_state=state is not None), q.shape[0]), 0.0)
    return grad_q, grad_k, grad_v, grad_log_g, grad_initial, grad_initial_sum


def through_division(grad_y: Tensor, grad_y_dot_y: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Return grad_o `(N, V + 1, R, T)` and grad_o . o `(N, R, T)`, which is 0 but where d is floored, for grad_y `(N,
    V, R, T)` and `(N, 1, R, T)` of the others. Outputs without gradient have none, even those that are not finite.
    """
    is_floored, divisor = d.abs() < NORMALIZER_FLOOR, guarded(d)
    grad_o = torch.cat([grad_y / divisor, torch.where(is_floored, 0.0, -grad_y_dot_y / divisor)], dim=1)
    grad_o = kept(grad_o, grad_y.abs().amax(1, keepdim=True) != 0)
    return grad_o, torch.where(is_floored, grad_y_dot_y, 0.0)[:, 0]


def guarded(normalizer: Tensor) -> Tensor:
    """Return the normaliser with values that count as zero replaced by NORMALIZER_FLOOR."""
    return torch.where(normalizer.abs() < NORMALIZER_FLOOR, NORMALIZER_FLOOR, normalizer)

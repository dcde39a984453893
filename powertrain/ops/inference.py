"""Decoding: a state for the folded past, and the keys and values not yet folded; the cost of a token does not depend on
the context.
"""

import math

import torch
from torch import Tensor

from powertrain.ops import validation
from powertrain.ops.api import positive_feature_map, power_retention
from powertrain.ops.layout import by_query_head, by_sequence, compute_dtype, from_query_head, without_autocast
from powertrain.ops.normalized import guarded
from powertrain.ops.sympow import phi

# Tokens whose phi, or weights, exist at once: bounds the memory of many queries, and of folding many keys.
_BLOCK = 256


def power_retention_inference(
    Q: Tensor,
    K: Tensor | None,
    V: Tensor | None,
    log_G: Tensor | None = None,
    initial_state: Tensor | None = None,
    sum_of_keys: Tensor | None = None,
    deg: int = 2,
    scale: float | None = None,
    switch_over_seq_len: int | None = 512,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Compute power retention of the newest tokens from a state and the keys and values not yet folded into it.

    The first call gives K and V. Whenever their length reaches switch_over_seq_len, the returned state contains them,
    and the next call gives only the keys after them; until then the state is returned as it came (None, at first) and
    the next call gives them again, with the new ones appended.

    Args:
        Q: queries `(B, Tq, Hq, K)` of the last Tq tokens, fp16, bf16, fp32 or fp64; cast to the autocast dtype under
            autocast, like K and V.
        K: keys `(B, Tk, Hk, K)` that the state does not contain, Tk >= Tq; None together with V reads the state alone.
        V: values `(B, Tk, Hk, V)`.
        log_G: log gates `(B, Tk, Hk)` of those keys, fp32, at most 0.
        initial_state: `(B, Hk, F, V)`, F = binom(K + deg - 1, deg); needs sum_of_keys.
        sum_of_keys: `(B, Hk, F)`.
        deg: as in `power_retention`.
        scale: as in `power_retention`.
        switch_over_seq_len: Tk from which on the keys are folded; None: never.

    Returns:
        out `(B, Tq, Hq, V)` in the dtype of Q, state and sum_of_keys (both None as long as there is none; fp32, or the
        dtype of initial_state).

    Raises:
        ValueError: for inputs that do not fit together, or where there is neither a state nor K and V.
    """
    if K is None and V is None:
        (Q,) = validation.autocast(Q=Q)
    elif K is not None and V is not None:
        Q, K, V = validation.autocast(Q=Q, K=K, V=V)
    else:
        raise ValueError(f"K and V belong together; {'K' if K is None else 'V'} is None")
    _check(Q, K, V, log_G, initial_state, sum_of_keys, deg, scale, switch_over_seq_len)
    scale = 1.0 / math.sqrt(Q.shape[3]) if scale is None else float(scale)
    if K is not None and V is not None and Q.shape[1] == K.shape[1] > 1:
        return _prefill(Q, K, V, log_G, initial_state, sum_of_keys, deg, scale, switch_over_seq_len)
    return _decode(Q, K, V, log_G, initial_state, sum_of_keys, deg, scale, switch_over_seq_len)


@without_autocast
def _decode(
    Q: Tensor,
    K: Tensor | None,
    V: Tensor | None,
    log_G: Tensor | None,
    initial_state: Tensor | None,
    sum_of_keys: Tensor | None,
    deg: int,
    scale: float,
    switch_over_seq_len: int | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    dtype = compute_dtype(Q.dtype)
    if deg == 1:
        Q = positive_feature_map(Q)
    Hk = K.shape[2] if K is not None else _required(initial_state).shape[1]
    q = by_query_head(Q, Hk).to(dtype) * scale  # (N, R, Tq, K)
    k = u = G = None
    if K is not None and V is not None:
        k = by_sequence(positive_feature_map(K) if deg == 1 else K).to(dtype)
        v = by_sequence(V).to(dtype)
        u = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
        G = None if log_G is None else by_sequence(log_G).double().clamp(min=-1000.0).cumsum(-1)
    older = 0 if k is None else k.shape[1] - q.shape[2]
    outputs = []
    for start in range(0, q.shape[2], _BLOCK):
        stop = min(start + _BLOCK, q.shape[2])
        k_seen, u_seen, G_seen = (None if x is None else x[:, : older + stop] for x in (k, u, G))
        outputs.append(_read(q[:, :, start:stop], k_seen, u_seen, G_seen, initial_state, sum_of_keys, deg))
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
    out = from_query_head(out, Q.shape[0]).to(Q.dtype)
    if k is not None and u is not None and switch_over_seq_len is not None and k.shape[1] >= switch_over_seq_len:
        initial_state, sum_of_keys = _fold(k, u, G, initial_state, sum_of_keys, deg, Q.shape[0])
    return out, initial_state, sum_of_keys


def _check(
    Q: Tensor,
    K: Tensor | None,
    V: Tensor | None,
    log_G: Tensor | None,
    initial_state: Tensor | None,
    sum_of_keys: Tensor | None,
    deg: int,
    scale: float | None,
    switch_over_seq_len: int | None,
) -> None:
    validation.check_deg(deg)
    validation.check_scale(scale)
    validation.check_positive("switch_over_seq_len", switch_over_seq_len)
    if K is None or V is None:
        validation.check_tensor("initial_state", initial_state, optional=True)
        validation.check_tensor("log_G", log_G, optional=True)
        if initial_state is None:
            raise ValueError("K, V and initial_state are all None; inference needs keys and values, or a state")
        if log_G is not None:
            raise ValueError(f"log_G {validation.shape_text(log_G)} belongs to keys, and K is None")
        if initial_state.ndim != 4:
            raise ValueError(f"initial_state has shape {validation.shape_text(initial_state)}; expected (B, Hk, F, V)")
        # Stand-ins of the sizes that the state implies, for the same checks and messages.
        K = Q.new_empty(*Q.shape[:1], 1, initial_state.shape[1], *Q.shape[-1:])
        V = Q.new_empty(*Q.shape[:1], 1, initial_state.shape[1], initial_state.shape[3])
        validation.check_qkv(Q, K, V, same_length=False)
    else:
        validation.check_qkv(Q, K, V, same_length=False)
        if K.shape[1] < Q.shape[1]:
            raise ValueError(
                f"Q has {Q.shape[1]} tokens, K {K.shape[1]}; queries are the last tokens of the keys: K needs as many"
            )
        validation.check_log_gates(log_G, K)
        validation.check_values(log_G, None, K)
    validation.check_state(
        initial_state,
        sum_of_keys,
        batch=Q.shape[0],
        key_heads=K.shape[2],
        key_dim=Q.shape[3],
        value_dim=V.shape[3],
        deg=deg,
        device=Q.device,
    )


def _required(x: Tensor | None) -> Tensor:
    assert x is not None
    return x


@without_autocast
def _prefill(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    log_G: Tensor | None,
    initial_state: Tensor | None,
    sum_of_keys: Tensor | None,
    deg: int,
    scale: float,
    switch_over_seq_len: int | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Many queries at once are the training problem."""
    folds = switch_over_seq_len is not None and K.shape[1] >= switch_over_seq_len
    result = power_retention(
        Q, K, V, log_G, initial_state, return_final_state=folds, deg=deg, scale=scale, sum_of_keys=sum_of_keys
    )
    if isinstance(result, tuple):
        return result
    return result, initial_state, sum_of_keys


def _read(
    q: Tensor,
    k: Tensor | None,
    u: Tensor | None,
    G: Tensor | None,
    state: Tensor | None,
    sum_of_keys: Tensor | None,
    deg: int,
) -> Tensor:
    """Return the output `(N, R, Tq, V)` of q `(N, R, Tq, K)`, of the last keys, on all keys and the state."""
    parts = []
    if k is not None and u is not None:
        parts.append(_read_keys(q, k, u, G, deg))
    if state is not None:
        from_state = _read_state(q.flatten(1, 2), state, _required(sum_of_keys), deg)
        if G is not None:
            decay = G[:, -q.shape[2] :].exp().to(q.dtype)  # (N, Tq)
            from_state = from_state * decay.repeat(1, q.shape[1])[..., None]
        parts.append(from_state)
    total = sum(parts[1:], start=parts[0])
    return (total[..., :-1] / guarded(total[..., -1:])).unflatten(1, q.shape[1:3])


def _read_keys(q: Tensor, k: Tensor, u: Tensor, G: Tensor | None, deg: int) -> Tensor:
    """Return the un-normalised output `(N, R * Tq, V + 1)` of q `(N, R, Tq, K)` over the keys `(N, Tk, K)`."""
    Tq, Tk = q.shape[2], k.shape[1]
    weights = torch.bmm(q.flatten(1, 2), k.mT).unflatten(1, q.shape[1:3]) ** deg
    if G is not None:
        weights = weights * (G[:, -Tq:, None] - G[:, None, :]).clamp(max=0.0).to(q.dtype).exp()[:, None]
    return torch.bmm(weights.tril(Tk - Tq).flatten(1, 2), u)


def _read_state(rows: Tensor, state: Tensor, sum_of_keys: Tensor, deg: int) -> Tensor:
    """Return the un-normalised output `(N, rows, V + 1)` of `rows (N, rows, K)` on the state."""
    features = phi(rows, deg)
    values = torch.bmm(features, state.flatten(0, 1).to(rows.dtype))
    normalizer = torch.bmm(features, sum_of_keys.flatten(0, 1).to(rows.dtype)[..., None])
    return torch.cat([values, normalizer], dim=-1)


def _fold(
    k: Tensor, u: Tensor, G: Tensor | None, state: Tensor | None, sum_of_keys: Tensor | None, deg: int, B: int
) -> tuple[Tensor, Tensor]:
    """Return the state after the keys."""
    update: Tensor | None = None
    if G is not None:
        u = u * (G[:, -1:] - G).exp().to(u.dtype)[..., None]
    for start in range(0, k.shape[1], _BLOCK):
        span = slice(start, start + _BLOCK)
        part = torch.bmm(phi(k[:, span], deg).mT, u[:, span])
        update = part if update is None else update + part
    joined = _required(update).unflatten(0, (B, -1))
    new_state, new_sum = joined[..., :-1], joined[..., -1]
    if state is None or sum_of_keys is None:
        return new_state.contiguous(), new_sum.contiguous()
    decay = None if G is None else G[:, -1].exp().to(u.dtype).unflatten(0, (B, -1))[..., None]
    old_state, old_sum = state.to(u.dtype), sum_of_keys.to(u.dtype)
    if decay is not None:
        old_state, old_sum = old_state * decay[..., None], old_sum * decay
    return (old_state + new_state).to(state.dtype), (old_sum + new_sum).to(sum_of_keys.dtype)

"""Oracles of power retention: the quadratic and the recurrent form, each a direct transcription of its formula,
differentiated by autograd, in any dtype.

Their arguments and results are those of `power_retention`, without defaults chosen for speed: all pairs, or one token
after another.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from powertrain.ops.api import positive_feature_map
from powertrain.ops.decay import document_of_each_token
from powertrain.ops.normalized import guarded
from powertrain.ops.sympow import phi, phi_dimension


def power_retention_quadratic(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    log_G: Tensor | None = None,
    initial_state: Tensor | None = None,
    deg: int = 2,
    scale: float | None = None,
    *,
    sum_of_keys: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `(out, state, sum_of_keys)` from the matrix of all weights, computed and kept in the dtype of Q."""
    Q, K, V, scale = _prepared(Q, K, V, deg, scale)
    ratio = Q.shape[2] // K.shape[2]
    decay, from_start, to_end = _decay_factors(log_G, K, cu_seqlens)
    pairs = torch.einsum("bihd,bjhd->bhij", Q * scale, K.repeat_interleave(ratio, dim=2)) ** deg
    weights = pairs * decay.repeat_interleave(ratio, dim=1)
    numerator = torch.einsum("bhij,bjhv->bihv", weights, V.repeat_interleave(ratio, dim=2))
    normalizer = weights.sum(-1).transpose(1, 2)
    keys = phi(K, deg) * to_end[..., None]
    state, new_sum = torch.einsum("bjhf,bjhv->bhfv", keys, V), keys.sum(1)
    if initial_state is not None and sum_of_keys is not None:
        queries = phi(Q * scale, deg) * from_start.repeat_interleave(ratio, dim=2)[..., None]
        numerator = numerator + torch.einsum("bihf,bhfv->bihv", queries, initial_state.repeat_interleave(ratio, dim=1))
        normalizer = normalizer + torch.einsum("bihf,bhf->bih", queries, sum_of_keys.repeat_interleave(ratio, dim=1))
        state = state + initial_state * from_start[:, -1, :, None, None]
        new_sum = new_sum + sum_of_keys * from_start[:, -1, :, None]
    return numerator / guarded(normalizer)[..., None], state, new_sum


def power_retention_recurrent(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    log_G: Tensor | None = None,
    initial_state: Tensor | None = None,
    deg: int = 2,
    scale: float | None = None,
    *,
    sum_of_keys: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `(out, state, sum_of_keys)` from the state's recurrence, token by token, in the dtype of Q."""
    Q, K, V, scale = _prepared(Q, K, V, deg, scale)
    B, T, _, key_dim = Q.shape
    Hk, F = K.shape[2], phi_dimension(key_dim, deg)
    state = V.new_zeros(B, Hk, F, V.shape[3]) if initial_state is None else initial_state
    total = V.new_zeros(B, Hk, F) if sum_of_keys is None else sum_of_keys
    gates = torch.ones_like(K[..., 0]) if log_G is None else log_G.to(Q.dtype).exp()
    if cu_seqlens is not None:
        document = document_of_each_token(cu_seqlens, B, T)
        starts = torch.zeros_like(document, dtype=torch.bool)
        starts[:, 1:] = document[:, 1:] != document[:, :-1]
        gates = gates.masked_fill(starts[..., None], 0.0)
    outputs = []
    for t in range(T):
        key = phi(K[:, t], deg)
        state = state * gates[:, t, :, None, None] + key[..., None] * V[:, t, :, None, :]
        total = total * gates[:, t, :, None] + key
        query = phi(Q[:, t] * scale, deg).unflatten(1, (Hk, -1))
        numerator = torch.einsum("bhrf,bhfv->bhrv", query, state)
        normalizer = torch.einsum("bhrf,bhf->bhr", query, total)
        outputs.append((numerator / guarded(normalizer)[..., None]).flatten(1, 2))
    return torch.stack(outputs, dim=1), state, total


ORACLES: dict[str, Callable[..., tuple[Tensor, Tensor, Tensor]]] = {
    "quadratic": power_retention_quadratic,
    "recurrent": power_retention_recurrent,
}


def _prepared(Q: Tensor, K: Tensor, V: Tensor, deg: int, scale: float | None) -> tuple[Tensor, Tensor, Tensor, float]:
    scale = 1.0 / math.sqrt(Q.shape[3]) if scale is None else scale
    return (positive_feature_map(Q), positive_feature_map(K), V, scale) if deg == 1 else (Q, K, V, scale)


def _decay_factors(log_G: Tensor | None, K: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the decays between tokens `(B, Hk, T, T)`, from the start to each token and from each token to the end
    `(B, T, Hk)`.
    """
    B, T, Hk, _ = K.shape
    log_gates = torch.zeros(B, T, Hk, device=K.device) if log_G is None else log_G
    G = log_gates.double().cumsum(1).transpose(1, 2)
    causal = torch.ones(T, T, dtype=torch.bool, device=K.device).tril()
    from_start = G.exp()
    if cu_seqlens is not None:
        document = document_of_each_token(cu_seqlens, B, T)[:, None]
        causal = causal & (document[..., :, None] == document[..., None, :])
        from_start = from_start * (document == document[..., :1])
    between = (G[..., :, None] - G[..., None, :]).masked_fill(~causal, -math.inf).exp().to(K.dtype)
    return between, from_start.to(K.dtype).transpose(1, 2), between[..., -1, :].transpose(1, 2)

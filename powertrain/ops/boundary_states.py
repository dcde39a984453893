"""The states at the two ends of a stretch of tokens, without its outputs.

Both are one sum over the tokens, phi(x)^T y, with the decays to that end: x = k and y = [v, 1] to the last token for
the final state, x = q and y = grad_o to the first for the gradient of the initial state. So each costs 2 F (V + 1)
FLOPs per token and head, the state update of the chunked form and nothing else of it. Context parallelism exchanges
them between ranks before the outputs, which need them, can be computed (docs/context-parallel.md).
"""

from torch import Tensor

from powertrain.ops.chunked import chunk_state
from powertrain.ops.decay import factor, kept, same_document
from powertrain.ops.layout import compute_dtype, query_rows, tokens_last, without_autocast
from powertrain.ops.monomials import public_state
from powertrain.ops.normalized import decay_by_sequence, through_division, with_ones
from powertrain.ops.plan import make_plan


@without_autocast
def final_state(
    k: Tensor, v: Tensor, log_g: Tensor | None, cu_seqlens: Tensor | None, deg: int
) -> tuple[Tensor, Tensor]:
    """Return the state `(B, Hk, F, V)` and sum_of_keys `(B, Hk, F)` after the last token, from an empty state.

    They are those of `normalized.normalized_fwd`, fp32 (fp64 for fp64 inputs), for k `(B, T, Hk, K)`, v `(B, T, Hk,
    V)`, log_g `(B, T, Hk)` and the offsets of documents.
    """
    B, T, Hk, _ = k.shape
    dtype = compute_dtype(k.dtype)
    u = with_ones(tokens_last(v.to(dtype)))
    decay = decay_by_sequence(log_g, cu_seqlens, rows=B, tokens=T, key_heads=Hk)
    to_end, of_end = factor(decay[:, -1:], decay[:, 1:], dtype), same_document(decay[:, -1:], decay[:, 1:])
    if to_end is not None:
        u = u * to_end[:, None]
    x = kept(tokens_last(k.to(dtype)), None if of_end is None else of_end[:, None])
    return _boundary_state(x, u, deg, B)


@without_autocast
def initial_state_grad(
    grad_out: Tensor,
    q: Tensor,
    log_g: Tensor | None,
    cu_seqlens: Tensor | None,
    out: Tensor,
    normalizer: Tensor,
    key_heads: int,
    scale: float,
    deg: int,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the initial state `(B, Hk, F, V)` and sum_of_keys `(B, Hk, F)` through the outputs.

    They are those of `normalized.normalized_bwd` without a gradient of the final state: grad_out and out `(B, T, Hq,
    V)`, normalizer `(B, T, Hq)`, q `(B, T, Hq, K)`.
    """
    B, T, _, _ = q.shape
    dtype = compute_dtype(q.dtype)
    grad_y = grad_out.to(dtype)
    rows = (grad_y, (grad_y * out.to(dtype)).sum(-1, keepdim=True), normalizer[..., None])
    grad_o, _ = through_division(*(query_rows(x, key_heads) for x in rows))
    decay = decay_by_sequence(log_g, cu_seqlens, rows=B, tokens=T, key_heads=key_heads)
    from_start, of_start = factor(decay[:, 1:], decay[:, :1], dtype), same_document(decay[:, 1:], decay[:, :1])
    if from_start is not None:
        grad_o = grad_o * from_start[:, None, None]
    x = query_rows(q.to(dtype), key_heads).mul_(scale)
    x = kept(x, None if of_start is None else of_start[:, None, None])
    return _boundary_state(x.flatten(2), grad_o.flatten(2), deg, B)


def _boundary_state(x: Tensor, y: Tensor, deg: int, B: int) -> tuple[Tensor, Tensor]:
    """Return the public state and sum of sum_t phi(x_t) y_t^T for x `(B * Hk, K, L)` and y `(B * Hk, V + 1, L)`."""
    N, K, L = x.shape
    plan = make_plan(
        batch=B,
        key_heads=N // B,
        tokens=L,
        query_heads_per_key_head=1,
        key_dim=K,
        value_dim=y.shape[1] - 1,
        deg=deg,
        chunk_size=L,
        device_type=x.device.type,
    )
    joined = public_state(chunk_state(x, y, deg=deg, plan=plan), K, deg).unflatten(0, (B, -1))
    return joined[:, :, :-1].mT.contiguous(), joined[:, :, -1].contiguous()

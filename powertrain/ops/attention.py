"""Softmax baselines beside power retention: full and sliding-window causal attention, with documents and optional
gates.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from powertrain.ops import validation, varlen_attention
from powertrain.ops.blocked_attention import blocked_attention_op
from powertrain.ops.flops import softmax_attention_flops


def softmax_attention(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    log_G: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Compute causal softmax attention, out_i = sum_j w_ij v_j / sum_j w_ij with w_ij = exp(scale q_i.k_j + G_i - G_j).

    Args:
        Q: queries `(B, Tq, Hq, K)` of the last Tq <= T tokens, fp16, bf16, fp32 or fp64; Hq is a multiple of Hk.
        K: keys `(B, T, Hk, K)`, dtype of Q.
        V: values `(B, T, Hk, V)`, dtype of Q.
        log_G: log gates `(B, T, Hk)`, fp32, at most 0; G is their cumulative sum (as in the Forgetting Transformer, Lin
            et al. 2025, arXiv:2503.02130).
        cu_seqlens: document offsets as in `power_retention`; nothing passes between documents.
        scale: factor of the scores; None: 1 / sqrt(K).

    Returns:
        out `(B, Tq, Hq, V)` in the dtype of Q. For Tq = T, without gates and documents it is PyTorch's
        scaled_dot_product_attention; with documents, on CUDA in bf16 or fp16, its FlashAttention kernels; else blocked
        attention in PyTorch.

    Raises:
        ValueError: for inputs that do not fit together, as in `power_retention`.
    """
    Q, K, V, scale = _checked(Q, K, V, log_G, cu_seqlens, scale)
    if log_G is None and cu_seqlens is None and Q.shape[1] == K.shape[1]:
        q, k, v = (x.transpose(1, 2) for x in (Q, K, V))
        # By a branch: of dynamic shapes the comparison is no bool, which a compiler's SDPA refuses.
        shared_keys = True if Q.shape[2] != K.shape[2] else False  # noqa: SIM210
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=shared_keys
        )
        return out.transpose(1, 2)
    return _attention(Q, K, V, log_G, cu_seqlens, scale, K.shape[1])


def window_attention(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    window: int,
    log_G: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Compute `softmax_attention` in which token i sees tokens i - window < j <= i, in time and memory O(T * window).

    Arguments, result and errors are those of `softmax_attention`; window, at least 1, counts the token itself.
    """
    validation.check_positive("window", window, optional=False)
    Q, K, V, scale = _checked(Q, K, V, log_G, cu_seqlens, scale)
    return _attention(Q, K, V, log_G, cu_seqlens, scale, min(window, K.shape[1]))


def _attention(
    Q: Tensor, K: Tensor, V: Tensor, log_G: Tensor | None, cu_seqlens: Tensor | None, scale: float, window: int
) -> Tensor:
    validation.refuse_forward_mode("attention with gates, documents or a window", Q, K, V, log_G)
    if varlen_attention.takes(Q, V, log_G):
        return varlen_attention.varlen_attention(Q, K, V, cu_seqlens, scale, window)
    return blocked_attention_op(Q, K, V, log_G, cu_seqlens, scale, window)[0]


def _checked(
    Q: Tensor, K: Tensor, V: Tensor, log_G: Tensor | None, cu_seqlens: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor, Tensor, float]:
    Q, K, V = validation.autocast(Q=Q, K=K, V=V)
    validation.check_qkv(Q, K, V, same_length=False)
    if Q.shape[1] > K.shape[1]:
        raise ValueError(
            f"Q has {Q.shape[1]} tokens and K {K.shape[1]}; Q belongs to the last tokens of K, at most all"
        )
    validation.check_log_gates(log_G, K)
    validation.check_cu_seqlens(cu_seqlens, K)
    validation.check_values(log_G, cu_seqlens, K)
    validation.check_scale(scale)
    scale = 1.0 / math.sqrt(Q.shape[3]) if scale is None else float(scale)
    # FlashAttention kernels take the largest q.k for that of the largest score.
    return (Q, K, V, scale) if scale > 0 else (-Q, K, V, -scale)


def _sdpa_formula(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    return _sdpa_flops(q, v).forward.total


def _sdpa_bwd_formula(grad_out: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    return _sdpa_flops(q, v).backward.total


def _sdpa_flops(q: Any, v: Any) -> Any:
    B, H, T, K = q
    return softmax_attention_flops(
        batch=B, tokens=T, query_heads=H, key_dim=K, value_dim=v[3], executed=True, blocked=False
    )


# FlopCounterMode has formulas for SDPA's CUDA kernels and counts its CPU kernel as 0.
for _op, _count in (
    (torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, _sdpa_formula),
    (torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward, _sdpa_bwd_formula),
):
    if _op not in flop_registry:
        register_flop_formula(_op)(_count)

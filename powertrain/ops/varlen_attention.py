"""Causal softmax attention over documents, or over a window, by PyTorch's own FlashAttention kernels on CUDA.

The same mathematics as `powertrain.ops.blocked_attention` without gates, many times faster. The kernels are those of
`torch.nn.attention.varlen`, whose function changed its arguments from release to release; the ops beneath it did not.
Executed FLOPs count in the row blocks of the blocked implementation on CUDA, which skip about as much of what the mask
hides as the tiles of the kernels.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from powertrain.ops.flops import OpPassFlops, softmax_attention_flops

DEVICE_TYPES = ["cuda"]  # a test that stands in for the kernels adds "cpu"
_DTYPES = (torch.bfloat16, torch.float16)
# FlashAttention 2 (Dao 2023, arXiv:2307.08691): head dims up to 256, in multiples of 8, from compute capability 8.0 on.
_MAX_HEAD_DIM = 256
_MIN_CAPABILITY = (8, 0)


def takes(query: Tensor, value: Tensor, log_g: Tensor | None) -> bool:
    """Return whether the kernels compute these inputs."""
    head_dim = query.shape[3]
    return (
        log_g is None
        and query.device.type in DEVICE_TYPES
        and query.dtype in _DTYPES
        and value.shape[3] == head_dim
        and value.shape[1] >= query.shape[1]
        and head_dim <= _MAX_HEAD_DIM
        and head_dim % 8 == 0
        and (query.device.type != "cuda" or _has_kernels(query.device.index or 0))
    )


@torch.compiler.assume_constant_result  # asked once, while a compiler traces
def _has_kernels(index: int) -> bool:
    return _find_kernels(index)


@functools.cache
def _find_kernels(index: int) -> bool:
    built = torch.backends.cuda.is_flash_attention_available()
    return built and torch.cuda.get_device_capability(index) >= _MIN_CAPABILITY


def varlen_attention(Q: Tensor, K: Tensor, V: Tensor, cu_seqlens: Tensor | None, scale: float, window: int) -> Tensor:
    """Return out `(B, Tq, Hq, K)` for validated inputs that `takes` accepts; token i sees i - window < j <= i of its
    document.
    """
    B, T = K.shape[:2]
    Tq = Q.shape[1]
    if cu_seqlens is None:
        cu_seqlens = torch.arange(0, B * T + 1, T, dtype=torch.int32, device=Q.device)
    cu_queries = cu_seqlens = cu_seqlens.int()
    if Tq < T:
        # The kernels align the last query of a document with its last key.
        cu_queries = cu_seqlens // T * Tq + (cu_seqlens % T - (T - Tq)).clamp(min=0)
    return varlen_attention_op(Q, K, V, cu_queries, cu_seqlens, scale, window)[0]


@torch.library.custom_op("powertrain::varlen_attention", mutates_args=())
def varlen_attention_op(
    q: Tensor, k: Tensor, v: Tensor, cu_queries: Tensor, cu_seqlens: Tensor, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    """Return out `(B, Tq, Hq, K)` in the dtype of q, and the log-sum-exp of the scores `(Hq, B * Tq)`, fp32.

    cu_queries: offsets of the documents over the B * Tq queries, of the last tokens; cu_seqlens: over the B * T keys.
    """
    Tq, T = q.shape[1], k.shape[1]
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        *(x.flatten(0, 1) for x in (q, k, v)),
        cu_queries,
        cu_seqlens,
        # No document is longer; the longest one's length would have to be waited for, and blocks beyond a document's
        # end return at once.
        Tq,
        T,
        0.0,
        window >= T,
        False,
        scale=scale,
        **_window(window, T),
    )
    return out.view(q.shape), lse


@varlen_attention_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, cu_queries: Tensor, cu_seqlens: Tensor, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[2], q.shape[0] * q.shape[1], dtype=torch.float32)


@torch.library.custom_op("powertrain::varlen_attention_bwd", mutates_args=())
def varlen_attention_bwd_op(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_queries: Tensor,
    cu_seqlens: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    Tq, T = q.shape[1], k.shape[1]
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
    grads = torch.ops.aten._flash_attention_backward(
        grad_out.contiguous().flatten(0, 1),
        *(x.flatten(0, 1) for x in (q, k, v, out)),
        lse,
        cu_queries,
        cu_seqlens,
        Tq,
        T,
        0.0,
        window >= T,
        no_dropout,
        torch.empty(0, device=q.device),
        scale=scale,
        **_window(window, T),
    )
    grad_q, grad_k, grad_v = (g.contiguous().view(x.shape) for g, x in zip(grads, (q, k, v), strict=True))
    return grad_q, grad_k, grad_v


@varlen_attention_bwd_op.register_fake
def _(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_queries: Tensor,
    cu_seqlens: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _window(window: int, tokens: int) -> dict[str, int]:
    """How many tokens beside its own one sees to either side, where it does not see all before it."""
    return {"window_size_left": window - 1, "window_size_right": 0} if window < tokens else {}


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.window = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(*tensors, out, lse)


def _backward(ctx: Any, grad_out: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    # Unpacked once: activation checkpointing allows no second time.
    saved = ctx.saved_tensors
    return *varlen_attention_bwd_op(grad_out, *saved, ctx.scale, ctx.window), None, None, None, None


varlen_attention_op.register_autograd(_backward, setup_context=_setup_context)


def _call_flops(q: Any, v: Any, window: int) -> OpPassFlops:
    return softmax_attention_flops(
        batch=q[0],
        tokens=v[1],
        queries=q[1],
        query_heads=q[2],
        key_dim=q[3],
        value_dim=v[3],
        window=window,
        executed=True,
        device_type="cuda",
    )


@register_flop_formula(torch.ops.powertrain.varlen_attention)
def _formula(
    q: Any, k: Any, v: Any, cu_queries: Any, cu_seqlens: Any, scale: float, window: int, *args: Any, **kwargs: Any
) -> int:
    return _call_flops(q, v, window).forward.total


@register_flop_formula(torch.ops.powertrain.varlen_attention_bwd)
def _bwd_formula(
    grad_out: Any, q: Any, k: Any, v: Any, cu_queries: Any, cu_seqlens: Any, out: Any, lse: Any, scale: float,
    window: int, *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    return _call_flops(q, v, window).backward.total

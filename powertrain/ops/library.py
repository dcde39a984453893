"""Registration with `torch.library`: fake kernels, autograd and FLOP formulas, so that `torch.compile`, `opcheck`,
activation checkpointing and `FlopCounterMode` see ops.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.utils.flop_counter import register_flop_formula

from powertrain.ops.flops import OpPassFlops, power_retention_flops
from powertrain.ops.layout import compute_dtype, without_autocast
from powertrain.ops.normalized import normalized_bwd, normalized_fwd
from powertrain.ops.plan import make_plan
from powertrain.ops.sympow import phi_dimension

SHOWN_ON = ["cuda"]
"""Device types on which a compiler sees the body of degree 1; tests add "cpu"."""


@torch.library.custom_op("powertrain::power_retention", mutates_args=())
@without_autocast
def power_retention_op(
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
    """The forward of `normalized.normalized_fwd` as an op."""
    return normalized_fwd(q, k, v, log_g, state, sum_of_keys, cu_seqlens, scale, deg, chunk_size, final_state)


@power_retention_op.register_fake
def _(
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
    B, T, Hq, K = q.shape
    Hk, V = k.shape[2], v.shape[3]
    F = phi_dimension(K, deg)
    dtype = compute_dtype(q.dtype)
    plan = make_plan(
        batch=B,
        key_heads=Hk,
        tokens=T,
        query_heads_per_key_head=Hq // Hk,
        key_dim=K,
        value_dim=V,
        deg=deg,
        chunk_size=chunk_size,
        device_type=q.device.type,
    )
    state_dtype = dtype if state is None else state.dtype
    return (
        q.new_empty(B, T, Hq, V),
        q.new_empty(B, T, Hq, dtype=dtype),
        q.new_empty((B, Hk, F, V) if final_state else (0,), dtype=state_dtype),
        q.new_empty((B, Hk, F) if final_state else (0,), dtype=state_dtype),
        q.new_empty(B * Hk, len(plan.segments()) - 1, V + 1, F, dtype=dtype),
    )


@torch.library.custom_op("powertrain::power_retention_bwd", mutates_args=())
@without_autocast
def power_retention_bwd_op(
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
    """The backward of `normalized.normalized_bwd` as an op."""
    return normalized_bwd(
        grad_out, grad_state, grad_sum_of_keys, q, k, v, log_g, state, sum_of_keys, cu_seqlens,
        out, normalizer, saved_states, scale, deg, chunk_size,
    )  # fmt: skip


@power_retention_bwd_op.register_fake
def _(
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
    def like(x: Tensor | None) -> Tensor:
        return q.new_empty(0) if x is None else x.new_empty(x.shape)

    return like(q), like(k), like(v), like(log_g), like(state), like(sum_of_keys)


def _show_to_compiler(op: Any, function: Callable[..., Any]) -> None:
    """Let `torch.compile` see the body of `op` for degree 1 on a GPU, as `torch.library.triton_op` does for all.

    There the body is element-wise operations and small products, one launch each: the compiler joins what is not a
    product, with what surrounds the op too, and keeps for the backward pass what both passes form (about twice what
    the op alone saves). Of the other degrees most is one product after another, each with a tile of monomials, which as
    a graph would be long and take its memory at once; on CPU threads share out the body.
    """

    def decompose(mode: FunctionalTensorMode, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        names = [argument.name for argument in op._schema.arguments]
        call = dict(zip(names, args, strict=False)) | (kwargs or {})
        device_type = call["q"].device.type
        if call["deg"] != 1 or device_type not in SHOWN_ON:
            return mode.__torch_dispatch__(op, types, args, kwargs)
        with mode, torch.autocast(device_type, enabled=False):
            return function(**call)

    op.register_torch_dispatch(FunctionalTensorMode, decompose)


_show_to_compiler(power_retention_op, normalized_fwd)
_show_to_compiler(power_retention_bwd_op, normalized_bwd)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, log_g, state, sum_of_keys, cu_seqlens, ctx.scale, ctx.deg, ctx.chunk_size, ctx.final_state = inputs
    out, normalizer, _, _, saved_states = output
    ctx.mark_non_differentiable(normalizer, saved_states)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, log_g, state, sum_of_keys, cu_seqlens, out, normalizer, saved_states)


def _backward(
    ctx: Any, grad_out: Tensor | None, _: Any, grad_state: Tensor | None, grad_sum_of_keys: Tensor | None, __: Any
) -> tuple[Tensor | None, ...]:
    q, k, v, log_g, state, sum_of_keys, cu_seqlens, out, normalizer, saved_states = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    if not ctx.final_state or (grad_state is None and grad_sum_of_keys is None):
        grad_state = grad_sum_of_keys = None
    else:
        B, Hk, F, V = q.shape[0], k.shape[2], phi_dimension(q.shape[3], ctx.deg), v.shape[3]
        if grad_state is None:
            assert grad_sum_of_keys is not None
            grad_state = grad_sum_of_keys.new_zeros(B, Hk, F, V)
        if grad_sum_of_keys is None:
            grad_sum_of_keys = grad_state.new_zeros(B, Hk, F)
    grads = power_retention_bwd_op(
        grad_out, grad_state, grad_sum_of_keys, q, k, v, log_g, state, sum_of_keys, cu_seqlens,
        out, normalizer, saved_states, ctx.scale, ctx.deg, ctx.chunk_size,
    )  # fmt: skip
    given = (q, k, v, log_g, state, sum_of_keys)
    return *(None if x is None else grad for x, grad in zip(given, grads, strict=True)), None, None, None, None, None


power_retention_op.register_autograd(_backward, setup_context=_setup_context)


def _call_flops(
    q: Tensor, k: Tensor, v: Tensor, deg: int, chunk_size: int, initial_state: bool, final_state: bool
) -> OpPassFlops:
    return power_retention_flops(
        batch=q.shape[0],
        tokens=q.shape[1],
        query_heads=q.shape[2],
        key_heads=k.shape[2],
        key_dim=q.shape[3],
        value_dim=v.shape[3],
        deg=deg,
        chunk_size=chunk_size,
        executed=True,
        initial_state=initial_state,
        final_state=final_state,
        device_type=q.device.type,
    )


@register_flop_formula(torch.ops.powertrain.power_retention, get_raw=True)
def _power_retention_formula(
    q: Any, k: Any, v: Any, log_g: Any, state: Any, sum_of_keys: Any, cu_seqlens: Any,
    scale: float, deg: int, chunk_size: int, final_state: bool, *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    return _call_flops(q, k, v, deg, chunk_size, state is not None, final_state).forward.total


@register_flop_formula(torch.ops.powertrain.power_retention_bwd, get_raw=True)
def _power_retention_bwd_formula(
    grad_out: Any, grad_state: Any, grad_sum_of_keys: Any, q: Any, k: Any, v: Any, log_g: Any, state: Any,
    sum_of_keys: Any, cu_seqlens: Any, out: Any, normalizer: Any, saved_states: Any,
    scale: float, deg: int, chunk_size: int, *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    return _call_flops(q, k, v, deg, chunk_size, state is not None, grad_state is not None).backward.total

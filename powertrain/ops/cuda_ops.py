"""The ops of `torch.library` that run the kernel library: schemas, fake kernels and FLOP formulas.

Their kernels and their autograd are C++ (`powertrain/native/torch_binding.cpp`, loaded by `native.load_kernels`): in
Python they would cost the host more than the launches do.

What the backward pass needs of the forward one (packed inputs, gates, states, and last the normaliser `(B, Hq, T)`) is
one opaque byte tensor, so that one allocation and one saved tensor serve all of it. Inputs are validated and supported,
`log_g` and states are fp32, `cu_seqlens` is int32, `chunk_size` a multiple of 64; `arch` is 0 (the library chooses), 80
or 90.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from powertrain.ops.cuda_plan import saved_bytes
from powertrain.ops.flops import OpPassFlops, power_retention_flops
from powertrain.ops.sympow import phi_dimension

_library = torch.library.Library("powertrain", "FRAGMENT")  # its registrations live as long as this object


def _define(schema: str) -> Any:
    name = _library.define(schema)
    return getattr(torch.ops.powertrain, name).default


power_retention_cuda_op = _define(
    "power_retention_cuda(Tensor q, Tensor k, Tensor v, Tensor? log_g, Tensor? state, Tensor? sum_of_keys, "
    "Tensor? cu_seqlens, SymInt chunk_size, bool final_state, int arch) -> (Tensor, Tensor, Tensor, Tensor)"
)
"""The forward pass: out `(B, T, Hq, V)`, state and sum_of_keys (of size 0 unless `final_state`), `saved`."""

power_retention_cuda_bwd_op = _define(
    "power_retention_cuda_bwd(Tensor grad_out, Tensor? grad_state, Tensor? grad_sum, Tensor out, Tensor saved, "
    "Tensor? cu_seqlens, SymInt key_heads, bool has_gates, bool has_state, SymInt chunk_size, int arch) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
"""The backward pass: gradients of q, k, v, log_g, state, sum_of_keys, the last three of size 0 where not given."""

final_state_cuda_op = _define(
    "power_retention_cuda_final_state(Tensor q, Tensor k, Tensor v, Tensor? log_g, Tensor? cu_seqlens, "
    "SymInt chunk_size, int arch) -> (Tensor, Tensor)"
)
"""The state `(B, Hk, F, V)` and sum_of_keys `(B, Hk, F)`, fp32, that the tokens leave by themselves: of the forward
pass, only the stages that lead there. q, which has no part in it, completes the shapes."""

initial_state_grad_cuda_op = _define(
    "power_retention_cuda_initial_state_grad(Tensor grad_out, Tensor out, Tensor saved, SymInt key_heads, "
    "SymInt chunk_size, int arch) -> (Tensor, Tensor)"
)
"""The gradients of the initial state `(B, Hk, F, V)` and sum_of_keys `(B, Hk, F)` through the outputs alone; out and
`saved` are those of a forward pass with an initial state."""


def _state(like: Tensor, key_heads: int, wanted: bool) -> tuple[Tensor, Tensor]:
    """Empty state and sum_of_keys for `like (B, T, Hq, D)`; of size 0 unless `wanted`."""
    B, _, _, D = like.shape
    shape = (B, key_heads, phi_dimension(D, 2))
    return (
        like.new_empty((*shape, D) if wanted else (0,), dtype=torch.float32),
        like.new_empty(shape if wanted else (0,), dtype=torch.float32),
    )


@torch.library.register_fake("powertrain::power_retention_cuda")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    state: Tensor | None,
    sum_of_keys: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    final_state: bool,
    arch: int,
) -> tuple[Tensor, ...]:
    B, T, Hq, D = q.shape
    size = saved_bytes(
        batch=B,
        tokens=T,
        query_heads=Hq,
        key_heads=k.shape[2],
        head_dim=D,
        chunk_size=chunk_size,
        has_state=state is not None,
        scaled=q.dtype == torch.float16,
    )
    return (
        q.new_empty(B, T, Hq, D),
        *_state(q, k.shape[2], final_state),
        q.new_empty(size + 4 * B * Hq * T, dtype=torch.uint8),
    )


@torch.library.register_fake("powertrain::power_retention_cuda_bwd")
def _(
    grad_out: Tensor,
    grad_state: Tensor | None,
    grad_sum: Tensor | None,
    out: Tensor,
    saved: Tensor,
    cu_seqlens: Tensor | None,
    key_heads: int,
    has_gates: bool,
    has_state: bool,
    chunk_size: int,
    arch: int,
) -> tuple[Tensor, ...]:
    B, T, Hq, D = out.shape
    return (
        out.new_empty(B, T, Hq, D),
        out.new_empty(B, T, key_heads, D),
        out.new_empty(B, T, key_heads, D),
        out.new_empty((B, T, key_heads) if has_gates else (0,), dtype=torch.float32),
        *_state(out, key_heads, has_state),
    )


@torch.library.register_fake("powertrain::power_retention_cuda_final_state")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    arch: int,
) -> tuple[Tensor, Tensor]:
    return _state(q, k.shape[2], True)


@torch.library.register_fake("powertrain::power_retention_cuda_initial_state_grad")
def _(
    grad_out: Tensor, out: Tensor, saved: Tensor, key_heads: int, chunk_size: int, arch: int
) -> tuple[Tensor, Tensor]:
    return _state(out, key_heads, True)


def _call_flops(out_shape: Any, key_heads: int, chunk_size: int, initial_state: bool, final_state: bool) -> OpPassFlops:
    B, T, Hq, D = out_shape
    return power_retention_flops(
        batch=B,
        tokens=T,
        query_heads=Hq,
        key_heads=key_heads,
        key_dim=D,
        value_dim=D,
        deg=2,
        chunk_size=chunk_size,
        executed=False,
        initial_state=initial_state,
        final_state=final_state,
        device_type="cuda",
    )


@register_flop_formula(torch.ops.powertrain.power_retention_cuda)
def _forward_formula(
    q: Any, k: Any, v: Any, log_g: Any, state: Any, sum_of_keys: Any, cu_seqlens: Any, chunk_size: int,
    final_state: bool, *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    return _call_flops(q, k[2], chunk_size, state is not None, final_state).forward.total


@register_flop_formula(torch.ops.powertrain.power_retention_cuda_bwd)
def _backward_formula(
    grad_out: Any, grad_state: Any, grad_sum: Any, out: Any, saved: Any, cu_seqlens: Any,
    key_heads: int, has_gates: bool, has_state: bool, chunk_size: int, *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    return _call_flops(out, key_heads, chunk_size, has_state, grad_state is not None).backward.total

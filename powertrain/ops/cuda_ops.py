"""The ops of `torch.library` that run the kernel library: schemas, fake kernels and FLOP formulas.

Their kernels and their autograd are C++ (`powertrain/native/torch_binding.cpp`, loaded by `native.load_kernels`): in
Python they would cost the host more than the launches do.

What the backward pass needs of the forward one (packed inputs, gates, states, and last the normaliser `(B, Hq, T)`) is
one opaque byte tensor, so that one allocation and one saved tensor serve all of it. Inputs are validated and supported,
`log_g` and states are fp32, `cu_seqlens` is int32, `chunk_size` a multiple of 64; `arch` is 0 (the library chooses), 80
or 90. A result that a call does not have is None, an undefined tensor in C++.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from powertrain.ops.cuda_plan import begun_bytes, saved_bytes
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
"""The forward pass: out `(B, T, Hq, V)`, state and sum_of_keys (None unless `final_state`), `saved`."""

power_retention_cuda_bwd_op = _define(
    "power_retention_cuda_bwd(Tensor grad_out, Tensor? grad_state, Tensor? grad_sum, Tensor out, Tensor saved, "
    "Tensor? cu_seqlens, SymInt key_heads, bool has_gates, bool has_state, SymInt chunk_size, int arch) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
"""The backward pass: gradients of q, k, v, log_g, state, sum_of_keys, the last three None where not given."""

final_state_cuda_op = _define(
    "power_retention_cuda_final_state(Tensor q, Tensor k, Tensor v, Tensor? log_g, Tensor? cu_seqlens, "
    "SymInt chunk_size, bool keep, int arch) -> (Tensor, Tensor, Tensor)"
)
"""The state `(B, Hk, F, V)` and sum_of_keys `(B, Hk, F)`, fp32, that the tokens leave by themselves: of the forward
pass, only the stages that lead there. With `keep` (bf16 only) they are not run again: the third result, else of size 0,
is what `finish_cuda_op` goes on from. q, which has no part in the states, completes the shapes."""

finish_cuda_op = _define(
    "power_retention_cuda_finish(Tensor q, Tensor state, Tensor sum_of_keys, Tensor(a!) begun, SymInt key_heads, "
    "SymInt chunk_size, int arch) -> Tensor"
)
"""The rest of the forward pass that `final_state_cuda_op` began, from the initial state: out `(B, T, Hq, V)`. `begun`
becomes the `saved` of a forward pass with that state. Of q only shape and dtype count."""

initial_state_grad_cuda_op = _define(
    "power_retention_cuda_initial_state_grad(Tensor grad_out, Tensor out, Tensor saved, SymInt key_heads, "
    "SymInt chunk_size, bool keep, int arch) -> (Tensor, Tensor, Tensor)"
)
"""The gradients of the initial state `(B, Hk, F, V)` and sum_of_keys `(B, Hk, F)` through the outputs alone; out and
`saved` are those of a forward pass with an initial state. With `keep` (bf16 only) the third result, else of size 0, is
what `finish_cuda_bwd_op` goes on from."""

finish_cuda_bwd_op = _define(
    "power_retention_cuda_finish_bwd(Tensor grad_state, Tensor grad_sum, Tensor out, Tensor saved, Tensor(a!) begun, "
    "Tensor? cu_seqlens, SymInt key_heads, bool has_gates, SymInt chunk_size, int arch) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
"""The rest of the backward pass that `initial_state_grad_cuda_op` began, from the gradient of the final state:
gradients of q, k, v and log_g, the last None without gates. `begun` is used up."""


def _state(like: Tensor, key_heads: int) -> tuple[Tensor, Tensor]:
    """Empty state and sum_of_keys for `like (B, T, Hq, D)`."""
    B, _, _, D = like.shape
    shape = (B, key_heads, phi_dimension(D, 2))
    return like.new_empty((*shape, D), dtype=torch.float32), like.new_empty(shape, dtype=torch.float32)


def _saved(like: Tensor, key_heads: int, chunk_size: int, has_state: bool) -> Tensor:
    """Empty `saved` of a forward pass on q `like`."""
    B, T, Hq, D = like.shape
    size = saved_bytes(
        batch=B,
        tokens=T,
        query_heads=Hq,
        key_heads=key_heads,
        head_dim=D,
        chunk_size=chunk_size,
        has_state=has_state,
        scaled=like.dtype == torch.float16,
    )
    return like.new_empty(size + 4 * B * Hq * T, dtype=torch.uint8)


def _input_grads(like: Tensor, key_heads: int, has_gates: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Empty gradients of q, k, v and log_g for out `like`; the last None without gates."""
    B, T, _, D = like.shape
    return (
        like.new_empty(like.shape),
        like.new_empty(B, T, key_heads, D),
        like.new_empty(B, T, key_heads, D),
        like.new_empty((B, T, key_heads), dtype=torch.float32) if has_gates else None,
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
) -> tuple[Tensor | None, ...]:
    return (
        q.new_empty(q.shape),
        *(_state(q, k.shape[2]) if final_state else (None, None)),
        _saved(q, k.shape[2], chunk_size, state is not None),
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
) -> tuple[Tensor | None, ...]:
    return *_input_grads(out, key_heads, has_gates), *(_state(out, key_heads) if has_state else (None, None))


@torch.library.register_fake("powertrain::power_retention_cuda_final_state")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    keep: bool,
    arch: int,
) -> tuple[Tensor, ...]:
    begun = _saved(q, k.shape[2], chunk_size, True) if keep else q.new_empty(0, dtype=torch.uint8)
    return *_state(q, k.shape[2]), begun


@torch.library.register_fake("powertrain::power_retention_cuda_finish")
def _(
    q: Tensor, state: Tensor, sum_of_keys: Tensor, begun: Tensor, key_heads: int, chunk_size: int, arch: int
) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.register_fake("powertrain::power_retention_cuda_initial_state_grad")
def _(
    grad_out: Tensor, out: Tensor, saved: Tensor, key_heads: int, chunk_size: int, keep: bool, arch: int
) -> tuple[Tensor, ...]:
    B, T, Hq, D = out.shape
    size = (
        begun_bytes(batch=B, tokens=T, query_heads=Hq, key_heads=key_heads, head_dim=D, chunk_size=chunk_size)
        if keep
        else 0
    )
    return *_state(out, key_heads), out.new_empty(size, dtype=torch.uint8)


@torch.library.register_fake("powertrain::power_retention_cuda_finish_bwd")
def _(
    grad_state: Tensor,
    grad_sum: Tensor,
    out: Tensor,
    saved: Tensor,
    begun: Tensor,
    cu_seqlens: Tensor | None,
    key_heads: int,
    has_gates: bool,
    chunk_size: int,
    arch: int,
) -> tuple[Tensor | None, ...]:
    return _input_grads(out, key_heads, has_gates)


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


# A pass in two calls counts as the whole one with both states: the first call what it keeps, the second the rest. What
# the first call does not keep is computed again by a whole pass, which counts it.


@register_flop_formula(torch.ops.powertrain.power_retention_cuda_final_state)
def _final_state_formula(
    q: Any, k: Any, v: Any, log_g: Any, cu_seqlens: Any, chunk_size: int, keep: bool, *args: Any, **kwargs: Any
) -> int:
    return _call_flops(q, k[2], chunk_size, True, True).forward.state_update if keep else 0


@register_flop_formula(torch.ops.powertrain.power_retention_cuda_finish)
def _finish_formula(
    q: Any, state: Any, sum_of_keys: Any, begun: Any, key_heads: int, chunk_size: int, *args: Any, **kwargs: Any
) -> int:
    forward = _call_flops(q, key_heads, chunk_size, True, True).forward
    return forward.total - forward.state_update


@register_flop_formula(torch.ops.powertrain.power_retention_cuda_initial_state_grad)
def _initial_state_grad_formula(
    grad_out: Any, out: Any, saved: Any, key_heads: int, chunk_size: int, keep: bool, *args: Any, **kwargs: Any
) -> int:
    return _grad_states_flops(_call_flops(out, key_heads, chunk_size, True, True)) if keep else 0


@register_flop_formula(torch.ops.powertrain.power_retention_cuda_finish_bwd)
def _finish_backward_formula(
    grad_state: Any, grad_sum: Any, out: Any, saved: Any, begun: Any, cu_seqlens: Any, key_heads: int,
    has_gates: bool, chunk_size: int, *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    flops = _call_flops(out, key_heads, chunk_size, True, True)
    return flops.backward.total - _grad_states_flops(flops)


def _grad_states_flops(flops: OpPassFlops) -> int:
    """Of the backward pass, the gradients of the states: as many products as reading them took."""
    return flops.forward.state_query

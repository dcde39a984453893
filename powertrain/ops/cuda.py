"""The CUDA path of power retention: the kernel library's two passes, forward and backward, as ops of
`torch.library`.

The mathematics and the stages are those of `kernels/include/powertrain_kernels.h`. What the backward pass needs of the
forward one (packed inputs, gates, states) is one opaque byte tensor, so that one allocation and one saved tensor serve
all of it. The factor `scale` cancels in y = n / d and appears nowhere here.

fp16 alone carries scales: powers of two per row and head that bring q, k, v and dn' to magnitudes at most 1, and one
for the states.
"""

import contextlib
import ctypes
import functools
import math
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from powertrain import native
from powertrain.native import abi
from powertrain.ops.cuda_plan import BLOCK, DTYPES, choose_chunk_size, saved_bytes, unsupported
from powertrain.ops.flops import OpPassFlops, power_retention_flops
from powertrain.ops.sympow import phi_dimension

_arch = int(os.environ.get("POWERTRAIN_KERNELS_ARCH", "0"))

_warned: set[str] = set()
_library = torch.library.Library("powertrain", "FRAGMENT")  # its registrations live as long as this object

allocate: Callable[..., Tensor] = torch.empty
"""How outputs and workspaces are allocated; tests put a NaN-filling function here."""


@contextlib.contextmanager
def force_arch(arch: int) -> Iterator[None]:
    """Run the kernels of one architecture (80 or 90; 0: the best for the device) inside this context."""
    global _arch
    before, _arch = _arch, arch
    try:
        yield
    finally:
        _arch = before


def use_cuda(impl: str | None, query: Tensor, value: Tensor, deg: int) -> bool:
    """Return whether a call takes the CUDA path; `impl` forces it ("cuda") or the other ("torch").

    Raises:
        ValueError: impl is "cuda" and the inputs are not what the kernels take.
        KernelsUnavailable: impl is "cuda" and there is no library and no compiler.
    """
    if impl == "torch":
        return False
    reason = unsupported(query, value, deg)
    if reason is not None:
        if impl == "cuda":
            raise ValueError(f"impl='cuda' cannot run: {reason}")
        if query.device.type == "cuda" and query.dtype in DTYPES and deg == 2:
            _warn_once(f"power_retention takes its PyTorch path: {reason}.")
        return False
    problem = library_problem()
    if problem is None:
        return True
    if impl == "cuda":
        raise native.KernelsUnavailable(problem)
    _warn_once(f"power_retention takes its PyTorch path. {problem}")
    return False


@torch.compiler.assume_constant_result  # asked once, while a compiler traces
def library_problem() -> str | None:
    """Return why there is no kernel library, after trying to build one; None if there is one."""
    return _load_library()


@functools.cache
def _load_library() -> str | None:
    try:
        native.library()
    except (native.KernelsUnavailable, native.KernelBuildError) as error:
        return str(error)
    return None


def _warn_once(message: str) -> None:
    if not torch.compiler.is_compiling() and message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=4)


def power_retention_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    state: Tensor | None,
    sum_of_keys: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int | None,
    final_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return out `(B, T, Hq, V)`, state, sum_of_keys (of size 0 unless `final_state`), and for `public_normalizer` the
    raw normaliser `(B, Hq, T)` and the buffer of the backward pass.

    Inputs are validated and supported. `chunk_size` is rounded up to a multiple of 64; None picks one.
    """
    chunk_size = resolve_chunk_size(q, k, chunk_size, has_state=state is not None)
    if log_g is not None and log_g.dtype != torch.float32:
        log_g = log_g.float()
    if state is not None and sum_of_keys is not None:
        state, sum_of_keys = state.float(), sum_of_keys.float()
    if cu_seqlens is not None and cu_seqlens.dtype != torch.int32:
        cu_seqlens = cu_seqlens.int()
    # The dispatcher in Python costs more than the launches: eager calls that nobody watches go around it.
    tensors = [x for x in (q, k, v, log_g, state, sum_of_keys) if x is not None]
    watched = (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or any(type(x) not in (Tensor, torch.nn.Parameter) for x in tensors)
    )
    if watched:
        call: Any = power_retention_cuda_op
    elif torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        call = _Eager.apply
    else:
        call = _forward
    out, normalizer, new_state, new_sum, saved = call(
        q, k, v, log_g, state, sum_of_keys, cu_seqlens, chunk_size, final_state, _arch
    )
    return out, new_state, new_sum, normalizer, saved


def resolve_chunk_size(q: Tensor, k: Tensor, chunk_size: int | None, *, has_state: bool) -> int:
    """Return the chunk that the kernels run with: a multiple of 64, the cheapest where None is given."""
    if chunk_size is None:
        chunk_size = choose_chunk_size(
            tokens=q.shape[1],
            head_dim=q.shape[3],
            query_heads_per_key_head=q.shape[2] // k.shape[2],
            has_state=has_state,
        )
    return (min(chunk_size, q.shape[1]) + BLOCK - 1) // BLOCK * BLOCK


def public_normalizer(normalizer: Tensor, saved: Tensor, scale: float, like: Tensor, key_heads: int) -> Tensor:
    """Return sum_j w_ij `(B, T, Hq)` in fp32, from the kernels' own `(B, Hq, T)` in their units; `like` is q."""
    result = normalizer * scale**2
    if like.dtype == torch.float16:
        B, _, Hq, _ = like.shape
        scales = saved[-4 * B * (Hq + 2 * key_heads) :].view(torch.float32)
        q_scale = scales[: B * Hq].view(B, Hq)
        k_scale = scales[B * Hq : B * (Hq + key_heads)].view(B, key_heads).repeat_interleave(Hq // key_heads, 1)
        result = result / (q_scale * k_scale)[..., None] ** 2
    return result.transpose(1, 2)


class _Plan:
    """The problem struct of some shapes on some device, and the sizes of its buffers."""

    def __init__(
        self,
        dtype: torch.dtype,
        arch: int,
        B: int,
        T: int,
        Hq: int,
        Hk: int,
        D: int,
        chunk_size: int,
        has_state: bool,
        final_state: bool,
    ) -> None:
        # fp16: |phi| and |v'| are at most 1 in packed units and a state sums at most T of them; its gradient T Hq / Hk,
        # with queries lengthened up to 4 times where weights are small (few rows: a factor of 4 of the 16 is allowed
        # for). Twice that off the diagonal; half of the largest number is left as headroom.
        largest = 8 * T * (Hq // Hk) if dtype == torch.float16 else 1
        state_scale = 2.0 ** -max(0, math.ceil(math.log2(largest)) - 15)
        problem = abi.Problem(DTYPES[dtype], arch, B, Hq, Hk, D, chunk_size, state_scale, T)
        self.problem = ctypes.byref(problem)
        sizes = abi.PassSizes()
        native.call("pt_pass_sizes_of", self.problem, has_state, final_state, ctypes.byref(sizes))
        # Plain attributes: reading one of a ctypes struct costs ten times as much.
        self.saved, self.scales = sizes.saved, sizes.scales
        self.forward_workspace, self.backward_workspace = sizes.forward_workspace, sizes.backward_workspace
        library = native.library()
        self.forward, self.backward = library.pt_forward, library.pt_backward

    def run(self, function: Any, parameters: ctypes.Structure, stream: int) -> None:
        if function(self.problem, ctypes.byref(parameters), stream) != 0:
            raise native.KernelLaunchError(f"{function.__name__}: {native.library().pt_last_error().decode()}")


# Keyed by the device too: the library chooses the architecture, and with it the size of the workspaces, on the current
# device.
@functools.lru_cache(maxsize=1024)
def _plan(device: int, *shape: Any) -> _Plan:
    return _Plan(*shape)


def _strided(x: Tensor) -> abi.StridedTensor:
    stride = x.stride()
    return abi.StridedTensor(x.data_ptr(), stride[0], stride[1], stride[2])


def _with_contiguous_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def current_stream(device: torch.device) -> int:
    """Return the handle of the current stream of `device`."""
    # An emulated library computes on CPU tensors before a call returns (kernels/emulation).
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _bytes(size: int, device: torch.device) -> Tensor:
    return allocate(size, dtype=torch.uint8, device=device)


def _on_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Launch on the device of the first tensor: kernels go to the current one."""

    @functools.wraps(function)
    def guarded(first: Tensor, *arguments: Any) -> Any:
        if first.device.type != "cuda" or first.device.index == torch.cuda.current_device():
            return function(first, *arguments)
        with torch.cuda.device(first.device):
            return function(first, *arguments)

    return guarded


@_on_device
def _forward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    B, T, Hq, D = q.shape
    Hk, device = k.shape[2], q.device
    plan = _plan(device.index, q.dtype, arch, B, T, Hq, Hk, D, chunk_size, state is not None, final_state)
    q, k, v = _with_contiguous_rows(q), _with_contiguous_rows(k), _with_contiguous_rows(v)
    if state is not None and sum_of_keys is not None:
        state, sum_of_keys = state.contiguous(), sum_of_keys.contiguous()
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.contiguous()
    out = allocate((B, T, Hq, D), dtype=q.dtype, device=device)
    normalizer = allocate((B, Hq, T), dtype=torch.float32, device=device)
    F = phi_dimension(D, 2)
    new_state = allocate((B, Hk, F, D) if final_state else 0, dtype=torch.float32, device=device)
    new_sum = allocate((B, Hk, F) if final_state else 0, dtype=torch.float32, device=device)
    saved, workspace = _bytes(plan.saved, device), _bytes(plan.forward_workspace, device)
    parameters = abi.Forward(
        _strided(q),
        _strided(k),
        _strided(v),
        _pointer(log_g),
        *((0, 0, 0) if log_g is None else log_g.stride()),
        _pointer(cu_seqlens),
        0 if cu_seqlens is None else cu_seqlens.shape[0],
        _pointer(state),
        _pointer(sum_of_keys),
        _strided(out),
        normalizer.data_ptr(),
        new_state.data_ptr() if final_state else None,
        new_sum.data_ptr() if final_state else None,
        saved.data_ptr(),
        workspace.data_ptr(),
    )
    plan.run(plan.forward, parameters, current_stream(device))
    return out, normalizer, new_state, new_sum, saved


@_on_device
def _backward(
    grad_out: Tensor,
    grad_state: Tensor | None,
    grad_sum: Tensor | None,
    out: Tensor,
    normalizer: Tensor,
    saved: Tensor,
    cu_seqlens: Tensor | None,
    key_heads: int,
    has_gates: bool,
    has_state: bool,
    chunk_size: int,
    arch: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    B, T, Hq, D = out.shape
    Hk, device, dtype = key_heads, out.device, out.dtype
    plan = _plan(device.index, dtype, arch, B, T, Hq, Hk, D, chunk_size, has_state, grad_state is not None)
    grad_out = _with_contiguous_rows(grad_out)
    if grad_state is not None and grad_sum is not None:
        grad_state, grad_sum = grad_state.contiguous(), grad_sum.contiguous()
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.contiguous()
    dq = allocate((B, T, Hq, D), dtype=dtype, device=device)
    dk = allocate((B, T, Hk, D), dtype=dtype, device=device)
    dv = allocate((B, T, Hk, D), dtype=dtype, device=device)
    dlog_g = allocate((B, T, Hk) if has_gates else 0, dtype=torch.float32, device=device)
    F = phi_dimension(D, 2)
    dstate = allocate((B, Hk, F, D) if has_state else 0, dtype=torch.float32, device=device)
    dsum = allocate((B, Hk, F) if has_state else 0, dtype=torch.float32, device=device)
    workspace = _bytes(plan.backward_workspace, device)
    parameters = abi.Backward(
        _strided(grad_out),
        _strided(out),
        normalizer.data_ptr(),
        saved.data_ptr(),
        _pointer(cu_seqlens),
        0 if cu_seqlens is None else cu_seqlens.shape[0],
        has_state,
        _pointer(grad_state),
        _pointer(grad_sum),
        _strided(dq),
        _strided(dk),
        _strided(dv),
        *((dlog_g.data_ptr(), *dlog_g.stride()) if has_gates else (None, 0, 0, 0)),
        dstate.data_ptr() if has_state else None,
        dsum.data_ptr() if has_state else None,
        workspace.data_ptr(),
    )
    plan.run(plan.backward, parameters, current_stream(device))
    return dq, dk, dv, dlog_g, dstate, dsum


def _define(function: Callable[..., Any], name: str) -> Any:
    """Define `powertrain::<name>` with the schema of `function`.

    Not `torch.library.custom_op`: its checks in Python cost a call of ours 15 us, half of what it may cost in all.
    """
    _library.define(name + torch.library.infer_schema(function, mutates_args=()))
    _library.impl(name, function, "CompositeExplicitAutograd")
    return getattr(torch.ops.powertrain, name).default


def _power_retention_cuda(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The forward pass as an op: out, raw normaliser `(B, Hq, T)`, state, sum_of_keys, bytes for the backward pass."""
    return _forward(q, k, v, log_g, state, sum_of_keys, cu_seqlens, chunk_size, final_state, arch)


power_retention_cuda_op = _define(_power_retention_cuda, "power_retention_cuda")


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    B, T, Hq, D = q.shape
    Hk, F = k.shape[2], phi_dimension(D, 2)
    size = saved_bytes(
        batch=B,
        tokens=T,
        query_heads=Hq,
        key_heads=Hk,
        head_dim=D,
        chunk_size=chunk_size,
        has_state=state is not None,
        scaled=q.dtype == torch.float16,
    )
    return (
        q.new_empty(B, T, Hq, D),
        q.new_empty(B, Hq, T, dtype=torch.float32),
        q.new_empty((B, Hk, F, D) if final_state else (0,), dtype=torch.float32),
        q.new_empty((B, Hk, F) if final_state else (0,), dtype=torch.float32),
        q.new_empty(size, dtype=torch.uint8),
    )


def _power_retention_cuda_bwd(
    grad_out: Tensor,
    grad_state: Tensor | None,
    grad_sum: Tensor | None,
    out: Tensor,
    normalizer: Tensor,
    saved: Tensor,
    cu_seqlens: Tensor | None,
    key_heads: int,
    has_gates: bool,
    has_state: bool,
    chunk_size: int,
    arch: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The backward pass as an op: gradients of q, k, v, log_g, state, sum_of_keys; of size 0 where not given."""
    return _backward(
        grad_out, grad_state, grad_sum, out, normalizer, saved, cu_seqlens,
        key_heads, has_gates, has_state, chunk_size, arch,
    )  # fmt: skip


power_retention_cuda_bwd_op = _define(_power_retention_cuda_bwd, "power_retention_cuda_bwd")


@torch.library.register_fake("powertrain::power_retention_cuda_bwd")
def _(
    grad_out: Tensor,
    grad_state: Tensor | None,
    grad_sum: Tensor | None,
    out: Tensor,
    normalizer: Tensor,
    saved: Tensor,
    cu_seqlens: Tensor | None,
    key_heads: int,
    has_gates: bool,
    has_state: bool,
    chunk_size: int,
    arch: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    B, T, Hq, D = out.shape
    F = phi_dimension(D, 2)

    def fp32(*shape: Any) -> Tensor:
        return out.new_empty(shape, dtype=torch.float32)

    return (
        out.new_empty(B, T, Hq, D),
        out.new_empty(B, T, key_heads, D),
        out.new_empty(B, T, key_heads, D),
        fp32(B, T, key_heads) if has_gates else fp32(0),
        fp32(B, key_heads, F, D) if has_state else fp32(0),
        fp32(B, key_heads, F) if has_state else fp32(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, k, _, log_g, state, _, cu_seqlens, ctx.chunk_size, ctx.final_state, ctx.arch = inputs
    out, normalizer, new_state, _, saved = output
    ctx.state_shape = new_state.shape
    ctx.key_heads, ctx.has_gates, ctx.has_state = k.shape[2], log_g is not None, state is not None
    ctx.mark_non_differentiable(normalizer, saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(out, normalizer, saved, cu_seqlens)


def _autograd_backward(
    ctx: Any, grad_out: Tensor | None, _: Any, grad_state: Tensor | None, grad_sum: Tensor | None, __: Any
) -> tuple[Tensor | None, ...]:
    out, normalizer, saved, cu_seqlens = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    if not ctx.final_state or (grad_state is None and grad_sum is None):
        grad_state = grad_sum = None
    else:
        if grad_state is None:
            grad_state = out.new_zeros(ctx.state_shape, dtype=torch.float32)
        if grad_sum is None:
            grad_sum = out.new_zeros(ctx.state_shape[:3], dtype=torch.float32)
    dq, dk, dv, dlog_g, dstate, dsum = power_retention_cuda_bwd_op(
        grad_out, grad_state, grad_sum, out, normalizer, saved, cu_seqlens,
        ctx.key_heads, ctx.has_gates, ctx.has_state, ctx.chunk_size, ctx.arch,
    )  # fmt: skip
    state_grads = (dstate, dsum) if ctx.has_state else (None, None)
    return dq, dk, dv, dlog_g if ctx.has_gates else None, *state_grads, None, None, None, None


class _Eager(torch.autograd.Function):
    """The op without the dispatcher: the same functions, forward and backward."""

    forward = staticmethod(_forward)
    setup_context = staticmethod(_setup_context)
    backward = staticmethod(torch.autograd.function.once_differentiable(_autograd_backward))  # type: ignore[assignment]


torch.library.register_autograd(
    "powertrain::power_retention_cuda", _autograd_backward, setup_context=_setup_context, lib=_library
)


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
    grad_out: Any, grad_state: Any, grad_sum: Any, out: Any, normalizer: Any, saved: Any, cu_seqlens: Any,
    key_heads: int, has_gates: bool, has_state: bool, chunk_size: int, *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    return _call_flops(out, key_heads, chunk_size, has_state, grad_state is not None).backward.total

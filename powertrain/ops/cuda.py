"""The CUDA path of power retention: when a call takes it, and how its arguments become those of `cuda_ops.py`.

The mathematics and the stages are those of `kernels/include/powertrain_kernels.h`. The factor `scale` cancels in
y = n / d and appears nowhere here. fp16 alone carries scales: powers of two per row and head that bring q, k, v and dn'
to magnitudes at most 1, and one for the states.
"""

import contextlib
import functools
import os
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from powertrain import native
from powertrain.ops.cuda_ops import power_retention_cuda_op
from powertrain.ops.cuda_plan import BLOCK, DTYPES, choose_chunk_size, unsupported

_arch = {"80": 80, "90": 90}.get(_named := os.environ.get("POWERTRAIN_KERNELS_ARCH", ""), 0)
if _named and not _arch:
    raise ValueError(f"POWERTRAIN_KERNELS_ARCH={_named} is not allowed: it must be 80 or 90, or not set")

_warned: set[str] = set()


@contextlib.contextmanager
def force_arch(arch: int) -> Iterator[None]:
    """Run the kernels of one architecture (80 or 90; 0: the best for the device) inside this context."""
    global _arch
    before, _arch = _arch, arch
    try:
        yield
    finally:
        _arch = before


def forced_arch() -> int:
    """Return the architecture whose kernels run, 80 or 90; 0 is the best for the device."""
    return _arch


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
            warn_once(f"power_retention takes its PyTorch path: {reason}.")
        return False
    problem = library_problem()
    if problem is None:
        return True
    if impl == "cuda":
        raise native.KernelsUnavailable(problem)
    warn_once(f"power_retention takes its PyTorch path. {problem}")
    return False


@torch.compiler.assume_constant_result  # asked once, while a compiler traces
def library_problem() -> str | None:
    """Return why the kernels cannot be used, after trying to build them; None if they can."""
    return _load_library()


@functools.cache
def _load_library() -> str | None:
    try:
        native.load_kernels()
    except (native.KernelsUnavailable, native.KernelBuildError) as error:
        return str(error)
    except OSError as error:  # a cache that cannot be written
        return f"The kernels cannot be built: {error}; set POWERTRAIN_CACHE to a directory that can be written."
    return None


def warn_once(message: str) -> None:
    """Warn, once in a process, of a path that the caller may not expect."""
    if not torch.compiler.is_compiling() and message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=7)  # the caller of the public function


def power_retention_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    state: Tensor | None,
    sum_of_keys: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    final_state: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Return out `(B, T, Hq, V)`, state, sum_of_keys (None unless `final_state`), and for `public_normalizer` the
    buffer of the backward pass.

    Inputs are validated and supported; `chunk_size` is one of `resolve_chunk_size`.
    """
    if log_g is not None and log_g.dtype != torch.float32:
        log_g = log_g.float()
    if state is not None and sum_of_keys is not None:
        state, sum_of_keys = state.float(), sum_of_keys.float()
    if cu_seqlens is not None and cu_seqlens.dtype != torch.int32:
        cu_seqlens = cu_seqlens.int()
    return power_retention_cuda_op(q, k, v, log_g, state, sum_of_keys, cu_seqlens, chunk_size, final_state, _arch)


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


def current_stream(device: torch.device) -> int:
    """Return the handle of the current stream of `device`."""
    # An emulated library computes on CPU tensors before a call returns (kernels/emulation).
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0


def public_normalizer(saved: Tensor, scale: float, like: Tensor, key_heads: int) -> Tensor:
    """Return sum_j w_ij `(B, T, Hq)` in fp32, from the kernels' own in their units; `like` is q."""
    B, T, Hq, _ = like.shape
    kept, numbers = saved.split([saved.shape[0] - 4 * B * Hq * T, 4 * B * Hq * T])
    result = numbers.view(torch.float32).view(B, Hq, T) * scale**2
    if like.dtype == torch.float16:
        scales = kept[-4 * B * (Hq + 2 * key_heads) :].view(torch.float32)
        q_scale = scales[: B * Hq].view(B, Hq)
        k_scale = scales[B * Hq : B * (Hq + key_heads)].view(B, key_heads).repeat_interleave(Hq // key_heads, 1)
        result = result / (q_scale * k_scale)[..., None] ** 2
    return result.transpose(1, 2)

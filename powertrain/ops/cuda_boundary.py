"""`boundary_states.py` by the kernels: the states at the two ends of a stretch of tokens, without its outputs.

The passes of `cuda.py`, of which only the stages that lead to these states run.
"""

import torch
from torch import Tensor

from powertrain.native import abi
from powertrain.ops import cuda
from powertrain.ops.sympow import phi_dimension

_NOTHING = abi.StridedTensor(None, 0, 0, 0)


@cuda._on_device
def final_state_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    arch: int,
) -> tuple[Tensor, Tensor]:
    """Return the state `(B, Hk, F, V)` and sum_of_keys `(B, Hk, F)`, fp32, that the tokens leave by themselves.

    Arguments are those of `power_retention_cuda_op`; q, which has no part in it, only completes the shapes.
    """
    B, T, Hq, D = q.shape
    Hk, device = k.shape[2], q.device
    plan = cuda._plan(device.index, q.dtype, arch, B, T, Hq, Hk, D, chunk_size, False, True)
    q, k, v = (cuda._with_contiguous_rows(x) for x in (q, k, v))
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.contiguous()
    state, sum_of_keys = _allocate_state(B, Hk, D, device)
    saved, workspace = cuda._bytes(plan.saved, device), cuda._bytes(plan.forward_workspace, device)
    parameters = abi.Forward(
        cuda._strided(q),
        cuda._strided(k),
        cuda._strided(v),
        cuda._pointer(log_g),
        *((0, 0, 0) if log_g is None else log_g.stride()),
        cuda._pointer(cu_seqlens),
        0 if cu_seqlens is None else cu_seqlens.shape[0],
        None,
        None,
        _NOTHING,
        None,
        state.data_ptr(),
        sum_of_keys.data_ptr(),
        saved.data_ptr(),
        workspace.data_ptr(),
    )
    plan.run(plan.forward, parameters, cuda.current_stream(device))
    return state, sum_of_keys


@cuda._on_device
def initial_state_grad_cuda(
    grad_out: Tensor,
    out: Tensor,
    normalizer: Tensor,
    saved: Tensor,
    key_heads: int,
    chunk_size: int,
    arch: int,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the initial state `(B, Hk, F, V)` and sum_of_keys `(B, Hk, F)` through the outputs alone.

    out, the raw normalizer and `saved` are those of `power_retention_cuda_op`, called with an initial state.
    """
    B, T, Hq, D = out.shape
    device = out.device
    plan = cuda._plan(device.index, out.dtype, arch, B, T, Hq, key_heads, D, chunk_size, True, False)
    grad_out = cuda._with_contiguous_rows(grad_out)
    state, sum_of_keys = _allocate_state(B, key_heads, D, device)
    workspace = cuda._bytes(plan.backward_workspace, device)
    parameters = abi.Backward(
        cuda._strided(grad_out),
        cuda._strided(out),
        normalizer.data_ptr(),
        saved.data_ptr(),
        None,
        0,
        True,
        None,
        None,
        _NOTHING,
        _NOTHING,
        _NOTHING,
        *(None, 0, 0, 0),
        state.data_ptr(),
        sum_of_keys.data_ptr(),
        workspace.data_ptr(),
    )
    plan.run(plan.backward, parameters, cuda.current_stream(device))
    return state, sum_of_keys


def _allocate_state(B: int, heads: int, D: int, device: torch.device) -> tuple[Tensor, Tensor]:
    shape = (B, heads, phi_dimension(D, 2))
    return cuda.allocate((*shape, D), dtype=torch.float32, device=device), cuda.allocate(
        shape, dtype=torch.float32, device=device
    )

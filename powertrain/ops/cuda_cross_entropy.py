"""The kernel of the head's loss: losses of rows of 16-bit logits and, in place of the logits, their gradients."""

import contextlib
import ctypes

import torch
from torch import Tensor

from powertrain import native
from powertrain.native import abi
from powertrain.ops import cuda, cuda_plan

_ALIGNMENT = 64  # elements; rows that begin at whole cache lines are read fastest, and matrix products need 16 bytes


def takes(logits_like: Tensor) -> bool:
    """Return whether the kernel takes logits of this tensor's dtype and device, and there is a library."""
    if cuda_plan.unsupported_tensor(logits_like) is not None:
        return False
    problem = cuda.library_problem()
    if problem is not None:
        cuda.warn_once(f"The head's loss takes its PyTorch path. {problem}")
    return problem is None


def empty_logits(rows: int, columns: int, like: Tensor) -> Tensor:
    """Return uninitialised logits `(rows, columns)` whose rows begin at aligned addresses."""
    stride = -(-columns // _ALIGNMENT) * _ALIGNMENT
    padded = torch.empty((rows, stride), dtype=like.dtype, device=like.device)
    # A matrix product may read on beyond a row, for factors of 0 (oneDNN's in bf16, on CPUs with AMX), and a NaN stays.
    padded[:, columns:] = 0.0
    return padded[:, :columns]


def cross_entropy_(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    *,
    losses: Tensor | None = None,
    log_sum_exp: Tensor | None = None,
    has_log_sum_exp: bool = False,
    write_gradients: bool = False,
    factors: Tensor | None = None,
) -> None:
    """Write the losses of `logits` `(N, V)`, bf16 or fp16 with contiguous rows, and/or replace them by gradients.

    Args:
        labels: `(N,)` int64 in [0, V) or ignore_index; another one gives NaN.
        losses: `(N,)` fp32, written; 0 for ignored rows.
        log_sum_exp: `(N,)` fp32, read if `has_log_sum_exp`, written otherwise.
        write_gradients: replace the logits by the gradients of their rows' losses, times `factors`.
        factors: `(N,)` fp32; None: 1.
    """
    labels = labels.contiguous()
    factors = None if factors is None else factors.float().contiguous()
    parameters = abi.CrossEntropy(
        cuda_plan.DTYPES[logits.dtype],
        has_log_sum_exp,
        write_gradients,
        logits.shape[0],
        logits.shape[1],
        logits.stride(0),
        logits.data_ptr(),
        labels.data_ptr(),
        ignore_index,
        None if factors is None else factors.data_ptr(),
        None if losses is None else losses.data_ptr(),
        None if log_sum_exp is None else log_sum_exp.data_ptr(),
    )
    with torch.cuda.device(logits.device) if logits.device.type == "cuda" else contextlib.nullcontext():
        native.call("pt_cross_entropy", ctypes.byref(parameters), cuda.current_stream(logits.device))

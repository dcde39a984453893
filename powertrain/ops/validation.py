"""Checks of user input: every message states the offending values and what is allowed."""

import itertools
import numbers
import os

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from powertrain.ops.sympow import phi_dimension

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CHECKS_VALUES_ON_CUDA = os.environ.get("POWERTRAIN_CHECK_VALUES") == "1"
"""Whether values of CUDA tensors are checked too, which waits for the GPU; read once, as looking it up takes a call's
time."""


def checks_values(x: Tensor) -> bool:
    """Return whether the values of `x`, and not only its shape, are checked."""
    if not (x.is_cpu or CHECKS_VALUES_ON_CUDA):
        return False
    return not (torch.compiler.is_compiling() or isinstance(x, torch._subclasses.FakeTensor))


def shape_text(x: Tensor) -> str:
    return f"({', '.join(str(size) for size in x.shape)})"


def autocasts(x: Tensor) -> bool:
    """Return whether operations on `x` are to cast their inputs; False of what is no tensor."""
    try:
        if x.is_cuda:  # takes a fifth of the time of the device's type
            return torch.is_autocast_enabled("cuda")
        device_type = x.device.type
    except AttributeError:
        return False
    # Asking torch whether the type has autocast at all breaks the graph of torch 2.11's compiler.
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def autocast(**tensors: Tensor) -> tuple[Tensor, ...]:
    """Return tensors, given by name, in the autocast dtype of the first one under autocast, as they are otherwise.

    Raises:
        ValueError: for what is no tensor.
    """
    for name, x in tensors.items():
        check_tensor(name, x)
    first = next(iter(tensors.values()))
    if not autocasts(first):
        return tuple(tensors.values())
    dtype = torch.get_autocast_dtype(first.device.type)
    return tuple(x.to(dtype) for x in tensors.values())


def check_tensor(name: str, x: object, *, optional: bool = False) -> None:
    """Raise `ValueError` unless x is a tensor, or, where it is optional, None."""
    if not (isinstance(x, Tensor) or (optional and x is None)):
        kind = f"{type(x).__module__}.{type(x).__name__}"
        raise ValueError(f"{name} is a {kind}; expected a torch.Tensor{' or None' if optional else ''}")


def refuse_forward_mode(name: str, *tensors: Tensor | None) -> None:
    """Raise `NotImplementedError` for tensors with a tangent: ops of `torch.library` drop it without a word."""
    if any(x is not None and unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(f"{name} has no forward-mode derivative")


def check_qkv(Q: Tensor, K: Tensor, V: Tensor, *, same_length: bool = True) -> None:
    """Raise `ValueError` unless Q `(B, T, Hq, K)`, K `(B, T, Hk, K)` and V `(B, T, Hk, V)` fit together."""
    for name, x, layout in (("Q", Q, "(B, T, Hq, K)"), ("K", K, "(B, T, Hk, K)"), ("V", V, "(B, T, Hk, V)")):
        if x.ndim != 4:
            raise ValueError(f"{name} has {x.ndim} dimensions, shape {shape_text(x)}; expected 4: {layout}")
        if x.dtype not in FLOAT_DTYPES:
            raise ValueError(f"{name} has dtype {x.dtype}; allowed are float16, bfloat16, float32 and float64")
        if 0 in x.shape:
            raise ValueError(f"{name} has shape {shape_text(x)}; every size must be at least 1")
    if not Q.dtype == K.dtype == V.dtype:
        raise ValueError(f"Q, K and V must share a dtype; got {Q.dtype}, {K.dtype} and {V.dtype}")
    if not Q.device == K.device == V.device:
        raise ValueError(f"Q, K and V must be on one device; got {Q.device}, {K.device} and {V.device}")
    if not Q.shape[0] == K.shape[0] == V.shape[0]:
        raise ValueError(f"Q, K and V must share the batch size; got {Q.shape[0]}, {K.shape[0]} and {V.shape[0]}")
    if K.shape[1] != V.shape[1] or (same_length and Q.shape[1] != K.shape[1]):
        raise ValueError(f"Q, K and V must share the sequence length; got {Q.shape[1]}, {K.shape[1]} and {V.shape[1]}")
    if K.shape[2] != V.shape[2]:
        raise ValueError(f"K and V must have the same number of heads; got {K.shape[2]} and {V.shape[2]}")
    if Q.shape[2] % K.shape[2]:
        raise ValueError(
            f"query heads must be a multiple of key heads; got {Q.shape[2]} query heads and {K.shape[2]} key heads"
        )
    if Q.shape[3] != K.shape[3]:
        raise ValueError(f"Q and K must share the head dimension; got {Q.shape[3]} and {K.shape[3]}")


def check_log_gates(log_G: Tensor | None, K: Tensor) -> None:
    """Raise `ValueError` unless log_G is None or fp32 (or fp64) `(B, T, Hk)` on K's device."""
    check_tensor("log_G", log_G, optional=True)
    if log_G is None:
        return
    if log_G.shape != K.shape[:3]:
        raise ValueError(f"log_G has shape {shape_text(log_G)}; expected (B, T, Hk) = {shape_text(K[..., 0])}")
    if log_G.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"log_G has dtype {log_G.dtype}; expected float32, because sums of log gates over a sequence need it"
        )
    if log_G.device != K.device:
        raise ValueError(f"log_G is on {log_G.device}, Q, K and V on {K.device}; they must be on one device")


def check_deg(deg: int) -> None:
    """Raise `ValueError` unless deg is 1, 2 or 4."""
    if isinstance(deg, bool) or not isinstance(deg, int):
        raise ValueError(
            f"deg={deg!r} must be an integer; allowed are 1 (linear attention over a positive map), 2 and 4"
        )
    if deg > 1 and deg % 2:
        raise ValueError(
            f"deg={deg} is odd: (q.k)^{deg} takes both signs, so the weights form no average and their sum can vanish; "
            "allowed are 1 (over a positive feature map), 2 and 4"
        )
    if deg not in (1, 2, 4):
        raise ValueError(
            f"deg={deg} is not supported; allowed are 1 (linear attention over a positive feature map), 2 and 4"
        )


def check_scale(scale: float | None) -> None:
    """Raise `ValueError` unless the scale is None or a finite number other than 0."""
    if scale is not None and not (isinstance(scale, numbers.Real) and 0 < abs(scale) < float("inf")):
        raise ValueError(f"scale={scale!r} must be a finite number other than 0 (None: 1/sqrt(K))")


def check_positive(name: str, value: int | None, *, optional: bool = True) -> None:
    """Raise `ValueError` unless the value is an integer of at least 1, or, where it is optional, None."""
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} must be {'None or ' if optional else ''}an integer of at least 1")


def check_state(
    state: Tensor | None,
    sum_of_keys: Tensor | None,
    *,
    batch: int,
    key_heads: int,
    key_dim: int,
    value_dim: int,
    deg: int,
    device: torch.device,
) -> None:
    """Raise `ValueError` unless initial_state `(B, Hk, F, V)` and sum_of_keys `(B, Hk, F)` are both given and fit, or
    neither is.
    """
    for name, given in (("initial_state", state), ("sum_of_keys", sum_of_keys)):
        check_tensor(name, given, optional=True)
    if (state is None) != (sum_of_keys is None):
        missing = "sum_of_keys" if sum_of_keys is None else "initial_state"
        raise ValueError(f"initial_state and sum_of_keys belong together; {missing} is None")
    if state is None or sum_of_keys is None:
        return
    expected = (batch, key_heads, phi_dimension(key_dim, deg), value_dim)
    for name, x, shape in (("initial_state", state, expected), ("sum_of_keys", sum_of_keys, expected[:3])):
        if tuple(x.shape) != shape:
            layout = "(B, Hk, F, V)" if len(shape) == 4 else "(B, Hk, F)"
            raise ValueError(
                f"{name} has shape {shape_text(x)}; expected {layout} = {shape} with F = binom(K + deg - 1, deg)"
            )
        if x.dtype not in FLOAT_DTYPES:
            raise ValueError(f"{name} has dtype {x.dtype}; allowed are float16, bfloat16, float32 and float64")
        if x.device != device:
            raise ValueError(f"{name} is on {x.device}, Q on {device}; they must be on one device")
    if state.dtype != sum_of_keys.dtype:
        raise ValueError(f"initial_state and sum_of_keys must share a dtype; got {state.dtype} and {sum_of_keys.dtype}")


def check_cu_seqlens(cu_seqlens: Tensor | None, K: Tensor) -> None:
    """Raise `ValueError` unless cu_seqlens is None or `(M,)`, int32 or int64, on K's device."""
    check_tensor("cu_seqlens", cu_seqlens, optional=True)
    if cu_seqlens is None:
        return
    B, T = K.shape[:2]
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"cu_seqlens has shape {shape_text(cu_seqlens)}; expected (M,), M at least 2: "
            f"document offsets from 0 to B*T = {B * T}"
        )
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens has dtype {cu_seqlens.dtype}; allowed are int32 and int64")
    if cu_seqlens.device != K.device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device}, K on {K.device}; they must be on one device")


def check_values(log_G: Tensor | None, cu_seqlens: Tensor | None, K: Tensor) -> None:
    """Raise `ValueError`, where values are checked, unless log_G is at most 0, and cu_seqlens runs from 0 to B*T
    without decreasing and contains every row start.

    NaN passes, as it does in Q, K and V: it comes from a model that diverged, of which its results are to tell.
    """
    if (log_G is None and cu_seqlens is None) or not checks_values(K):
        return
    if log_G is not None:
        largest = log_G.detach().max().item()
        if largest != largest:  # NaN, which hides the others
            largest = log_G.detach().nan_to_num(nan=-torch.inf).max().item()
        if largest > 0:
            raise ValueError(f"log_G must be at most 0 (gates in [0, 1]); its maximum is {largest}")
    if cu_seqlens is None:
        return
    B, T = K.shape[:2]
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] != B * T:
        raise ValueError(f"cu_seqlens runs from {offsets[0]} to {offsets[-1]}; it must run from 0 to B*T = {B * T}")
    for before, after in itertools.pairwise(offsets):
        if after < before:
            raise ValueError(f"cu_seqlens decreases from {before} to {after}; offsets must not decrease")
    missing = sorted(set(range(0, B * T, T)) - set(offsets))
    if missing:
        raise ValueError(
            f"cu_seqlens lacks the row start {missing[0]}; with B={B} rows of T={T} tokens "
            "every multiple of T must be an offset"
        )

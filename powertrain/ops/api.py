"""The public functions of power retention: validation, defaults and the choice of implementation."""

import contextlib
import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from powertrain.ops import cuda, validation
from powertrain.ops.library import power_retention_op
from powertrain.ops.plan import choose_chunk_size

Implementation = Literal["torch", "cuda"]


def positive_feature_map(x: Tensor) -> Tensor:
    """Map `x (..., K)` to positive features elu(x) + 1 of the same shape and dtype: the field's standard for linear
    attention.

    Source: Katharopoulos et al. 2020, arXiv:2006.16236, equation 7. Degree 1 needs such a map, because q.k itself takes
    both signs: the weights would be no average, and their sum could vanish.
    """
    return (torch.nn.functional.elu(x.float() if x.dtype in (torch.float16, torch.bfloat16) else x) + 1).to(x.dtype)


def power_retention(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    log_G: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    deg: int = 2,
    scale: float | None = None,
    chunk_size: int | None = None,
    switch_over_seq_len: int | None = None,
    *,
    sum_of_keys: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    impl: Implementation | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Compute causal power retention, out_i = sum_j w_ij v_j / sum_j w_ij with w_ij = (scale q_i.k_j)^deg exp(G_i -
    G_j), in time linear in T.

    Args:
        Q: queries `(B, T, Hq, K)`, fp16, bf16, fp32 or fp64; Hq is a multiple of Hk.
        K: keys `(B, T, Hk, K)`, dtype of Q.
        V: values `(B, T, Hk, V)`, dtype of Q.
        log_G: log gates `(B, T, Hk)`, fp32, at most 0; G is their cumulative sum. None: no decay.
        initial_state: state `(B, Hk, F, V)` of the tokens before these, F = binom(K + deg - 1, deg); needs sum_of_keys.
            With cu_seqlens, each row's first document that is not empty continues from it.
        return_final_state: also return the state and sum_of_keys after the last token (with cu_seqlens: of each row's
            last document that is not empty).
        deg: 2 or 4; or 1 for linear attention over the feature map elu + 1, where weights are scale
            (elu(q_i)+1).(elu(k_j)+1) exp(G_i - G_j).
        scale: factor of the scores; None: 1 / sqrt(K).
        chunk_size: tokens per chunk, any T is allowed; None: the cheapest for these shapes.
        switch_over_seq_len: sequences up to this length use the quadratic form (one chunk); None: whichever form is
            cheaper.
        sum_of_keys: normaliser's part of the initial state, `(B, Hk, F)`.
        cu_seqlens: document offsets `(M,)` int32 or int64 over the flattened B*T tokens, from 0 to B*T, with every row
            start; equal neighbours are empty documents. Nothing passes from one document to another.
        impl: "torch" or "cuda" (the kernels); None: the kernels where they support the inputs, else torch.

    Returns:
        out `(B, T, Hq, V)` in the dtype of Q; with return_final_state `(out, state, sum_of_keys)`, in the dtype of
        initial_state, or fp32 (fp64 for fp64 inputs). Passing them on continues the sequence exactly, with gradients. A
        row whose weights are all zero gives zeros.

    Raises:
        ValueError: for inputs that do not fit together. Values (log_G > 0, offsets of cu_seqlens) are checked on CPU
            tensors, and on CUDA tensors, where the check waits for the device, only if the environment variable
            POWERTRAIN_CHECK_VALUES is 1 when powertrain is imported.

    Source: Buckman, Gelada and Zhang, "Symmetric Power Transformers", 2024; Gelada, Buckman, Zhang and Bach, "Scaling
    Context Requires Rethinking Attention", 2025, arXiv:2507.04239. docs/op.md has the mathematics.
    """
    out, _, state, new_sum_of_keys = _power_retention(
        Q, K, V, log_G, initial_state, return_final_state, deg, scale, chunk_size, switch_over_seq_len,
        sum_of_keys, cu_seqlens, impl, False,
    )  # fmt: skip
    if not return_final_state:
        return out
    assert state is not None
    assert new_sum_of_keys is not None
    return out, state, new_sum_of_keys


def power_retention_with_normalizer(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    log_G: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    deg: int = 2,
    scale: float | None = None,
    chunk_size: int | None = None,
    switch_over_seq_len: int | None = None,
    *,
    sum_of_keys: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    impl: Implementation | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Compute `power_retention` and return `(out, normalizer, state, sum_of_keys)`.

    The normalizer `(B, T, Hq)`, sum_j w_ij in fp32 (fp64 for fp64 inputs), has no gradient: it is for monitoring. State
    and sum_of_keys are None unless return_final_state. Arguments and errors are those of `power_retention`.
    """
    out, normalizer, state, new_sum_of_keys = _power_retention(
        Q, K, V, log_G, initial_state, return_final_state, deg, scale, chunk_size, switch_over_seq_len,
        sum_of_keys, cu_seqlens, impl, True,
    )  # fmt: skip
    assert normalizer is not None
    return (out, normalizer, state, new_sum_of_keys) if return_final_state else (out, normalizer, None, None)


class PowerCall(NamedTuple):
    """A validated call: tensors as the ops take them, and everything that was left open decided."""

    Q: Tensor
    K: Tensor
    V: Tensor
    deg: int
    scale: float
    chunk_size: int
    on_cuda: bool  # whether the kernels compute it


class _Decision(NamedTuple):
    """What `resolve_call` finds for tensors of some shapes, dtypes and devices."""

    scale: float
    chunk_size: int
    on_cuda: bool


_decisions: dict[tuple[Any, ...], _Decision] = {}
"""The decisions of arguments that passed validation, by everything but the tensors' values: validating anew costs the
host more than the kernels' launches."""
_MAX_DECISIONS = 4096


def forget_decisions() -> None:
    """Validate and decide anew: for what a decision rests on beside its arguments (devices, the kernel library)."""
    _decisions.clear()


def _description(x: Tensor) -> tuple[Any, ...]:
    return (x.shape, x.dtype, x.device)


def _key_of(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    log_G: Tensor | None,
    deg: int,
    scale: float | None,
    chunk_size: int | None,
    switch_over_seq_len: int | None,
    cu_seqlens: Tensor | None,
    has_state: bool,
    impl: Implementation | None,
    initial_state: Tensor | None,
    sum_of_keys: Tensor | None,
) -> tuple[Any, ...] | None:
    """Return the key of a call's decision; None where something is no tensor, which validation will refuse."""
    try:
        return (
            Q.shape, K.shape, V.shape, Q.dtype, K.dtype, V.dtype, Q.device, K.device, V.device,
            None if log_G is None else _description(log_G), None if cu_seqlens is None else _description(cu_seqlens),
            None if initial_state is None else _description(initial_state),
            None if sum_of_keys is None else _description(sum_of_keys), has_state,
            deg, type(deg), scale, type(scale), chunk_size, type(chunk_size),
            switch_over_seq_len, type(switch_over_seq_len), impl,
        )  # fmt: skip
    except AttributeError:
        return None


def _known_decision(key: tuple[Any, ...] | None) -> _Decision | None:
    try:
        return None if key is None else _decisions.get(key)
    except TypeError:  # symbolic sizes have no hash
        return None


def resolve_call(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    log_G: Tensor | None,
    *,
    deg: int,
    scale: float | None,
    chunk_size: int | None,
    switch_over_seq_len: int | None,
    cu_seqlens: Tensor | None,
    has_state: bool,
    impl: Implementation | None,
    initial_state: Tensor | None = None,
    sum_of_keys: Tensor | None = None,
) -> PowerCall:
    """Validate the arguments of `power_retention`, and decide scale, chunk size and implementation; `has_state` says
    that the tokens continue from a state, which need not be one of the arguments.

    Raises:
        ValueError: for arguments that do not fit together.
    """
    Q, K, V = validation.autocast(Q=Q, K=K, V=V)
    arguments = (
        Q, K, V, log_G, deg, scale, chunk_size, switch_over_seq_len, cu_seqlens, has_state, impl, initial_state,
        sum_of_keys,
    )  # fmt: skip
    key = None if torch.compiler.is_compiling() else _key_of(*arguments)
    decision = _known_decision(key)
    if decision is None:
        decision = _decide(*arguments)
        if key is not None:
            if len(_decisions) >= _MAX_DECISIONS:
                _decisions.clear()
            with contextlib.suppress(TypeError):  # symbolic sizes have no hash
                _decisions[key] = decision
    validation.check_values(log_G, cu_seqlens, K)
    if deg == 1:
        Q, K = positive_feature_map(Q), positive_feature_map(K)
    return PowerCall(Q, K, V, deg, *decision)


def _decide(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    log_G: Tensor | None,
    deg: int,
    scale: float | None,
    chunk_size: int | None,
    switch_over_seq_len: int | None,
    cu_seqlens: Tensor | None,
    has_state: bool,
    impl: Implementation | None,
    initial_state: Tensor | None,
    sum_of_keys: Tensor | None,
) -> _Decision:
    validation.check_qkv(Q, K, V)
    validation.check_log_gates(log_G, K)
    validation.check_deg(deg)
    validation.check_scale(scale)
    validation.check_positive("chunk_size", chunk_size)
    validation.check_positive("switch_over_seq_len", switch_over_seq_len)
    validation.check_cu_seqlens(cu_seqlens, K)
    _check_implementation(impl)
    B, T, Hq, key_dim = Q.shape
    Hk, value_dim = V.shape[2:]
    validation.check_state(
        initial_state,
        sum_of_keys,
        batch=B,
        key_heads=Hk,
        key_dim=key_dim,
        value_dim=value_dim,
        deg=deg,
        device=Q.device,
    )
    if scale is None:
        scale = 1.0 / math.sqrt(key_dim)
    if switch_over_seq_len is not None and switch_over_seq_len >= T:
        chunk_size = T
    if cuda.use_cuda(impl, Q, V, deg):
        return _Decision(float(scale), cuda.resolve_chunk_size(Q, K, chunk_size, has_state=has_state), True)
    if chunk_size is None:
        chunk_size = choose_chunk_size(
            tokens=T,
            key_dim=key_dim,
            value_dim=value_dim,
            deg=deg,
            query_heads_per_key_head=Hq // Hk,
            has_state=has_state,
        )
    return _Decision(float(scale), min(chunk_size, T), False)


def _power_retention(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    log_G: Tensor | None,
    initial_state: Tensor | None,
    return_final_state: bool,
    deg: int,
    scale: float | None,
    chunk_size: int | None,
    switch_over_seq_len: int | None,
    sum_of_keys: Tensor | None,
    cu_seqlens: Tensor | None,
    impl: Implementation | None,
    with_normalizer: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Validate, choose and run: out, normalizer (always there `with_normalizer`), and where there is a final state,
    state and sum_of_keys.
    """
    decision = None
    if not (torch.compiler.is_compiling() or validation.autocasts(Q)):
        # The short way of a call like an earlier one: `resolve_call` would find the same, and take the host longer.
        decision = _known_decision(
            _key_of(
                Q, K, V, log_G, deg, scale, chunk_size, switch_over_seq_len, cu_seqlens, initial_state is not None,
                impl, initial_state, sum_of_keys,
            )
        )  # fmt: skip
    if decision is not None and decision.on_cuda:
        validation.check_values(log_G, cu_seqlens, K)
        scale, chunk_size, on_cuda = decision
    else:
        Q, K, V, deg, scale, chunk_size, on_cuda = resolve_call(
            Q, K, V, log_G, deg=deg, scale=scale, chunk_size=chunk_size, switch_over_seq_len=switch_over_seq_len,
            cu_seqlens=cu_seqlens, has_state=initial_state is not None, impl=impl, initial_state=initial_state,
            sum_of_keys=sum_of_keys,
        )  # fmt: skip
    if not on_cuda:
        validation.refuse_forward_mode("power_retention", Q, K, V, log_G, initial_state, sum_of_keys)
        out, normalizer, state, new_sum_of_keys, _ = power_retention_op(
            Q, K, V, log_G, initial_state, sum_of_keys, cu_seqlens, scale, deg, chunk_size, return_final_state
        )
        return out, normalizer, state, new_sum_of_keys
    out, state, new_sum_of_keys, saved = cuda.power_retention_cuda(
        Q, K, V, log_G, initial_state, sum_of_keys, cu_seqlens, chunk_size, return_final_state
    )
    if initial_state is not None and state is not None and new_sum_of_keys is not None:
        state, new_sum_of_keys = state.to(initial_state.dtype), new_sum_of_keys.to(initial_state.dtype)
    normalizer = cuda.public_normalizer(saved, scale, Q, K.shape[2]) if with_normalizer else None
    return out, normalizer, state, new_sum_of_keys


def linear_attention(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    log_G: Tensor | None = None,
    *,
    chunk_size: int | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Compute causal linear attention over the feature map elu + 1, gated or not: `power_retention` of degree 1 (its
    shapes, dtypes and errors).

    Returns out `(B, T, Hq, V)`. Source: Katharopoulos et al. 2020, arXiv:2006.16236.
    """
    out = power_retention(Q, K, V, log_G, deg=1, chunk_size=chunk_size, cu_seqlens=cu_seqlens)
    assert isinstance(out, Tensor)
    return out


def _check_implementation(impl: Implementation | None) -> None:
    if impl not in (None, "torch", "cuda"):
        raise ValueError(
            f"impl={impl!r} is unknown; allowed are None (the fastest that supports the inputs), 'torch' and 'cuda'"
        )

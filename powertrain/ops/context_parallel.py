"""Power retention and attention over sequences that several ranks share; docs/context-parallel.md has the mathematics.

Power retention exchanges states, whose size does not depend on T. With S_r the state that the tokens of slice r leave
by themselves, D_r the decay over the whole slice (0 where a document begins inside it) and c_r whether the slice goes
on with the document before it, the state that enters slice r is

    I_r = sum_{s < r} c_r (prod_{s < j < r} D_j c_j) S_s

Every rank gathers all S and D at once and adds up its own I_r: one collective, no chain. The backward pass is the same
step the other way round: with A_r the gradient of I_r through the outputs of slice r,

    gradient of the state that leaves slice s = sum_{r > s} c_r (prod_{s < j < r} D_j c_j) A_r

Softmax and window attention gather the keys, values and gates that their queries see.
"""

from collections.abc import Hashable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from powertrain.ops import cuda
from powertrain.ops.api import PowerCall, resolve_call
from powertrain.ops.attention import softmax_attention, window_attention
from powertrain.ops.boundary_states import final_state, initial_state_grad
from powertrain.ops.context_shard import ContextShard
from powertrain.ops.cuda_ops import (
    final_state_cuda_op,
    finish_cuda_bwd_op,
    finish_cuda_op,
    initial_state_grad_cuda_op,
    power_retention_cuda_bwd_op,
    power_retention_cuda_op,
)
from powertrain.ops.decay import kept
from powertrain.ops.library import power_retention_bwd_op, power_retention_op

Saved = Sequence[Any]  # tensors and None
Begun = Tensor | None  # what a pass in two calls goes on from, if it is one
State = tuple[Tensor, Tensor]  # (B, Hk, F, V) and the normaliser's part (B, Hk, F)


@torch.compiler.disable
def context_power_retention(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    log_G: Tensor | None,
    shard: ContextShard,
    deg: int = 2,
    scale: float | None = None,
    chunk_size: int | None = None,
    switch_over_seq_len: int | None = None,
    *,
    layer: Hashable = None,
) -> tuple[Tensor, Tensor]:
    """Compute `power_retention_with_normalizer` of whole rows, each rank for its slice; a collective of the group.

    Args:
        Q, K, V, log_G: this rank's slice, `(B, L, ...)`; otherwise as in `power_retention`, with deg 1, 2 or 4.
        shard: where the slice lies, and the documents.
        layer: name of this call among those of a forward pass, for `ContextShard.remembering`.

    Returns:
        out `(B, L, Hq, V)` and the normalizer `(B, L, Hq)`, without gradient.

    Raises:
        ValueError: as `power_retention`.
    """
    call = resolve_call(
        Q, K, V, log_G, deg=deg, scale=scale, chunk_size=chunk_size, switch_over_seq_len=switch_over_seq_len,
        cu_seqlens=shard.cu_seqlens, has_state=True, impl=None,
    )  # fmt: skip
    stages: _Stages = _CudaStages(call, shard, log_G is not None) if call.on_cuda else _TorchStages(call, shard)
    return _ContextPowerRetention.apply(call.Q, call.K, call.V, log_G, shard, stages, layer)


@torch.compiler.disable
def context_attention(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    log_G: Tensor | None,
    shard: ContextShard,
    window: int | None = None,
) -> Tensor:
    """Compute `softmax_attention` of whole rows, or with a window `window_attention`, each rank for its slice.

    A collective of the group: the keys, values and gates of the slices before this one are gathered, with a window its
    last window - 1 tokens only. Arguments are this rank's slice `(B, L, ...)`; returns out `(B, L, Hq, V)`.

    Raises:
        ValueError: as `softmax_attention`.
    """
    reach = shard.tokens if window is None else window - 1
    key_dim = K.shape[3]
    before = shard.preceding(torch.cat([K, V], dim=-1), reach)
    K = torch.cat([before[..., :key_dim], K], dim=1)
    V = torch.cat([before[..., key_dim:], V], dim=1)
    if log_G is not None:
        log_G = torch.cat([shard.preceding(log_G, reach), log_G], dim=1)
    cu_seqlens = shard.offsets_from(shard.stop - K.shape[1])
    if window is None:
        return softmax_attention(Q, K, V, log_G, cu_seqlens)
    return window_attention(Q, K, V, window, log_G, cu_seqlens)


class _Stages(Protocol):
    """The parts of power retention on one slice, between which the ranks exchange states."""

    def final_state(self, q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None) -> tuple[State, Begun]:
        """The state that the slice's tokens leave by themselves."""
        ...

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None, state: State, begun: Begun
    ) -> tuple[Tensor, Tensor, Saved]:
        """out, normalizer, and what the backward pass needs; `begun` is that of `final_state`, or None."""
        ...

    def initial_state_grad(self, grad_out: Tensor, saved: Saved) -> tuple[State, Begun]:
        """The gradient of the entering state through the slice's outputs."""
        ...

    def backward(
        self, grad_out: Tensor, grad_leaving: State, saved: Saved, begun: Begun
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Gradients of q, k, v and log_g, for that of the leaving state; `begun` is that of `initial_state_grad`."""
        ...


class _ContextPowerRetention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_g: Tensor | None,
        shard: ContextShard,
        stages: _Stages,
        layer: Hashable,
    ) -> tuple[Tensor, Tensor]:
        memory = shard.entered if layer is not None else None
        known = None if memory is None else memory.pop(layer, None)
        begun = None
        if known is None:
            leaving, begun = stages.final_state(q, k, v, log_g)
            known = _exchange(leaving, log_g, shard)
            if memory is not None:
                memory[layer] = known
        state, passes = known
        out, normalizer, saved = stages.forward(q, k, v, log_g, state, begun)
        ctx.shard, ctx.stages, ctx.value_dim = shard, stages, v.shape[3]
        ctx.save_for_backward(passes, *saved)
        ctx.mark_non_differentiable(normalizer)
        return out, normalizer

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # Unpacked once: activation checkpointing allows no second time.
        passes, *saved = ctx.saved_tensors
        shard, stages = ctx.shard, ctx.stages
        entering, begun = stages.initial_state_grad(grad_out, saved)
        leaving = _split(_leaving(shard.all_gather(_joined(entering)), passes, shard), ctx.value_dim)
        grad_q, grad_k, grad_v, grad_log_g = stages.backward(grad_out, leaving, saved, begun)
        if grad_log_g is not None:
            # Where nothing enters, the first gate discounts nothing: exactly zero rather than rounding.
            rank = shard.ranks.rank
            continues = None if rank == 0 else shard.continues(rank)
            if rank == 0:
                grad_log_g[:, 0] = 0.0
            elif continues is not None:
                grad_log_g[:, 0].masked_fill_(~continues[:, None], 0.0)
        return grad_q, grad_k, grad_v, grad_log_g, None, None, None


def _exchange(leaving: State, log_g: Tensor | None, shard: ContextShard) -> tuple[State, Tensor]:
    """Return the state that enters this slice, and `_passes`, for the state that its tokens leave by themselves."""
    message = _joined(leaving)
    decay = message.new_zeros(message.shape[:2]) if log_g is None else log_g.sum(1, dtype=torch.float64)
    # The total gates travel with the state: one more number for each row and head.
    gathered = shard.all_gather(torch.cat([message, decay.to(message.dtype)[..., None]], dim=-1))
    passes = _passes(gathered[..., -1], shard)
    return _split(_entering(gathered[..., :-1], passes, shard), leaving[0].shape[3]), passes


def _joined(state: State) -> Tensor:
    """`(B, Hk, F, V)` and `(B, Hk, F)` to `(B, Hk, F * (V + 1))`."""
    return torch.cat([state[0].flatten(2), state[1]], dim=-1)


def _split(joined: Tensor, value_dim: int) -> State:
    rows = joined.shape[-1] // (value_dim + 1)
    state, sum_of_keys = joined.split([rows * value_dim, rows], dim=-1)
    return state.unflatten(-1, (rows, value_dim)).contiguous(), sum_of_keys.contiguous()


def _passes(total_log_gates: Tensor, shard: ContextShard) -> Tensor:
    """Return `(N, B, Hk)`: what is left, at the end of slice j, of a state that comes from before it (D_j c_j)."""
    passes = total_log_gates.exp()
    passes[0] = 0.0
    for rank in range(1, shard.ranks.size):
        for holds in (shard.continues(rank), shard.unbroken(rank)):
            if holds is not None:
                passes[rank].masked_fill_(~holds[:, None], 0.0)
    return passes


def _entering(states: Tensor, passes: Tensor, shard: ContextShard) -> Tensor:
    """Return I_r of this rank `(B, Hk, X)` for the states `(N, B, Hk, X)` that the slices leave by themselves."""
    rank = shard.ranks.rank
    result = torch.zeros_like(states[0])
    if rank == 0:
        return result
    weight = _continues(rank, passes, shard)
    for other in reversed(range(rank)):
        _add(result, states[other], weight, shard)
        weight = _through(weight, passes[other])
    return result


def _leaving(grads: Tensor, passes: Tensor, shard: ContextShard) -> Tensor:
    """Return the gradient of the state that leaves this slice, for A `(N, B, Hk, X)`."""
    result = torch.zeros_like(grads[0])
    carried = torch.ones_like(passes[0])
    for other in range(shard.ranks.rank + 1, shard.ranks.size):
        _add(result, grads[other], _through(_continues(other, passes, shard), carried), shard)
        carried = _through(carried, passes[other])
    return result


def _through(weight: Tensor, passes: Tensor) -> Tensor:
    """Return `weight * passes`, and 0 where the weight is, whatever the gates."""
    return torch.where(weight != 0, weight * passes, 0.0)


def _add(result: Tensor, x: Tensor, weight: Tensor, shard: ContextShard) -> None:
    """Add x `(B, Hk, X)`, weighted by `weight (B, Hk)`, and of another document nothing, also where x is not finite."""
    weighs = None if shard.whole_cu_seqlens is None else (weight != 0)[..., None]
    result.addcmul_(kept(x, weighs), weight[..., None])


def _continues(rank: int, passes: Tensor, shard: ContextShard) -> Tensor:
    """`shard.continues` as factors `(B, Hk)`."""
    continues = shard.continues(rank)
    return torch.ones_like(passes[0]) if continues is None else continues[:, None].to(passes.dtype).expand_as(passes[0])


class _TorchStages:
    """`_Stages` in PyTorch, on any device."""

    def __init__(self, call: PowerCall, shard: ContextShard) -> None:
        self.deg, self.scale, self.chunk_size = call.deg, call.scale, call.chunk_size
        self.cu_seqlens = shard.cu_seqlens

    def final_state(self, q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None) -> tuple[State, None]:
        return final_state(k, v, log_g, self.cu_seqlens, self.deg), None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None, state: State, begun: Begun
    ) -> tuple[Tensor, Tensor, Saved]:
        out, normalizer, _, _, saved_states = power_retention_op(
            q, k, v, log_g, *state, self.cu_seqlens, self.scale, self.deg, self.chunk_size, False
        )
        return out, normalizer, (q, k, v, log_g, *state, out, normalizer, saved_states)

    def initial_state_grad(self, grad_out: Tensor, saved: Saved) -> tuple[State, None]:
        q, k, _, log_g, _, _, out, normalizer, _ = saved
        grads = initial_state_grad(
            grad_out, q, log_g, self.cu_seqlens, out, normalizer, k.shape[2], self.scale, self.deg
        )
        return grads, None

    def backward(
        self, grad_out: Tensor, grad_leaving: State, saved: Saved, begun: Begun
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        q, k, v, log_g, *state, out, normalizer, saved_states = saved
        grad_q, grad_k, grad_v, grad_log_g, _, _ = power_retention_bwd_op(
            grad_out, *grad_leaving, q, k, v, log_g, *state, self.cu_seqlens, out, normalizer, saved_states,
            self.scale, self.deg, self.chunk_size,
        )  # fmt: skip
        return grad_q, grad_k, grad_v, None if log_g is None else grad_log_g


class _CudaStages:
    """`_Stages` by the CUDA kernels. In bf16 a pass goes on with what was begun, so that each state is scanned once.

    It runs whole in fp16, where the state that enters may lower the scales of what was packed, and without a first call
    (activation checkpointing knows the state already).
    """

    def __init__(self, call: PowerCall, shard: ContextShard, has_gates: bool) -> None:
        self.has_gates, self.scale, self.key_heads = has_gates, call.scale, call.K.shape[2]
        self.chunk_size, self.arch = call.chunk_size, cuda.forced_arch()
        self.keep = call.Q.dtype == torch.bfloat16
        self.cu_seqlens = None if shard.cu_seqlens is None else shard.cu_seqlens.int()

    def final_state(self, q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None) -> tuple[State, Begun]:
        log_g = None if log_g is None else log_g.float()
        *state, begun = final_state_cuda_op(q, k, v, log_g, self.cu_seqlens, self.chunk_size, self.keep, self.arch)
        return tuple(state), begun if self.keep else None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None, state: State, begun: Begun
    ) -> tuple[Tensor, Tensor, Saved]:
        if begun is None:
            log_g = None if log_g is None else log_g.float()
            out, _, _, saved = power_retention_cuda_op(
                q, k, v, log_g, *state, self.cu_seqlens, self.chunk_size, False, self.arch
            )
        else:
            out, saved = finish_cuda_op(q, *state, begun, self.key_heads, self.chunk_size, self.arch), begun
        return out, cuda.public_normalizer(saved, self.scale, q, self.key_heads), (out, saved)

    def initial_state_grad(self, grad_out: Tensor, saved: Saved) -> tuple[State, Begun]:
        *grads, begun = initial_state_grad_cuda_op(
            grad_out, *saved, self.key_heads, self.chunk_size, self.keep, self.arch
        )
        return tuple(grads), begun if self.keep else None

    def backward(
        self, grad_out: Tensor, grad_leaving: State, saved: Saved, begun: Begun
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        options = self.cu_seqlens, self.key_heads, self.has_gates
        if begun is None:
            grads = power_retention_cuda_bwd_op(
                grad_out, *grad_leaving, *saved, *options, True, self.chunk_size, self.arch
            )
        else:
            grads = finish_cuda_bwd_op(*grad_leaving, *saved, begun, *options, self.chunk_size, self.arch)
        grad_q, grad_k, grad_v, grad_log_g, *_ = grads
        return grad_q, grad_k, grad_v, grad_log_g if self.has_gates else None

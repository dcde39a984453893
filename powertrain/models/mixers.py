"""What mixes information between tokens: projections, rotary embedding, gates, and the call of one op of
`powertrain.ops`.

Shapes: B batch, T tokens, Hq and Hk query and key heads, D head dim. All kinds share one module, so that a
comparison between mixers changes the op and nothing else.
"""

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from powertrain.models.config import MixerConfig, ModelConfig
from powertrain.ops import (
    linear_attention,
    power_retention,
    power_retention_with_normalizer,
    softmax_attention,
    window_attention,
)
from powertrain.ops.context_parallel import context_attention, context_power_retention
from powertrain.ops.context_shard import ContextShard


class LayerCache(Protocol):
    """What one layer keeps between decoding steps; `powertrain.inference.cache` has one for each mixer kind."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, log_G: Tensor | None) -> Tensor:
        """Output (B, T, Hq, D) for T new tokens after all those seen before, which it then remembers."""
        ...


class Cache(Protocol):
    """The cache of a model: its layers' caches, and how many tokens they have seen."""

    position: int
    layers: Sequence[LayerCache]


class Linear(nn.Linear):
    """`nn.Linear` that leaves its parameters uninitialised: `GPT.init_weights` is the only init."""

    def reset_parameters(self) -> None:
        pass


class RMSNorm(nn.RMSNorm):
    """`nn.RMSNorm` that normalises in fp32 and returns the dtype of its input, whatever the dtype of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).to(x.dtype)


def token_positions(B: int, T: int, start: int, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    """Position of each token in its document: (1, T) from `start` on, or (B, T) with documents; int64.

    Positions restart with each document, because the feature map of linear attention sees them absolutely.
    """
    if cu_seqlens is None:
        return torch.arange(start, start + T, device=device)[None]
    index = torch.arange(B * T, device=device)
    first = cu_seqlens[torch.searchsorted(cu_seqlens, index.to(cu_seqlens.dtype), right=True) - 1]
    return (index - first).view(B, T)


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B or 1, T, 1, D/2), fp32, of the rotary embedding at positions (B or 1, T).

    Computed in each forward rather than kept in a buffer: there is nothing to restore after a meta-device init, and no
    longest context.
    """
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim)
    angles = positions[..., None, None].float() * frequencies
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn channel pairs (i, i + D/2) of x (B, T, H, D), fp32, by the angles of `rotary_angles` (Su et al. 2021)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def spread_gates(first: float, last: float, heads: int, device: torch.device) -> Tensor:
    """Logits (heads,), fp32, of gates from `first` to `last`, whose half-lives change from head to head by one factor.

    One head has the geometric mean of the two half-lives. Computed in each forward, for the reason that `rotary_angles`
    are; in fp64, because an fp32 gate near 1 has lost its half-life.
    """
    start, end = math.log(-math.log(first)), math.log(-math.log(last))
    if heads == 1:
        start = (start + end) / 2
    log_rates = torch.linspace(start, end, heads, dtype=torch.float64, device=device)
    return log_rates.exp().neg().exp().logit().float()


class Mixer(nn.Module):
    """Multi-head mixer of one layer: x (B, T, d_model) -> (B, T, d_model).

    With `gated`, each key head has a scalar gate per token, sigmoid(w.x + b + c) with c the logit of `gate_init`, or of
    the head's value between the two of a pair (`spread_gates`): the weight of key j for query i is multiplied by the
    product of the gates j+1 ... i. This is the gate of power retention, and for softmax that of the Forgetting
    Transformer (Lin et al. 2025, arXiv:2503.02130).
    """

    def __init__(self, config: ModelConfig, mixer: MixerConfig) -> None:
        super().__init__()
        assert len(mixer.kinds) == 1, "the mixer of one layer comes from MixerConfig.for_layer"
        self.config = mixer
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        self.qkv = Linear(config.d_model, (config.n_heads + 2 * config.n_kv_heads) * config.head_dim, bias=False)
        self.out = Linear(config.n_heads * config.head_dim, config.d_model, bias=False)
        self.gate = Linear(config.d_model, config.n_kv_heads) if mixer.gated else None
        # c, or the pair that `spread_gates` makes it from.
        gate = mixer.gate_init
        self.gate_start = gate if isinstance(gate, tuple) else math.log(gate / (1.0 - gate))
        self.q_norm = RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        cu_seqlens: Tensor | None = None,
        cache: LayerCache | None = None,
        collect_stats: bool = False,
        shard: ContextShard | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mixed tokens; of power layers, with `collect_stats`, also what `GPTOutput.stats` holds of this layer.

        With `shard`, x is this rank's slice of longer rows, and the documents are those of the shard.
        """
        B, T, _ = x.shape
        qkv = self.qkv(x).view(B, T, self.n_heads + 2 * self.n_kv_heads, self.head_dim)
        q, k, v = qkv.split([self.n_heads, self.n_kv_heads, self.n_kv_heads], dim=2)
        # Rounded once, to the dtype of v.
        q = apply_rotary(self.q_norm(q.float()), *rotary).to(v.dtype)
        k = apply_rotary(self.k_norm(k.float()), *rotary).to(v.dtype)
        log_G = self._log_gates(x)
        normalizer = None
        if cache is not None:
            out = cache.attend(q, k, v, log_G)
        elif shard is not None:
            out, normalizer = self._mix_slice(q, k, v, log_G, shard)
        else:
            out, normalizer = self._mix(q, k, v, log_G, cu_seqlens, with_normalizer=collect_stats)
        stats: dict[str, Tensor] = {}
        if collect_stats and normalizer is not None:
            stats["min_normalizer"] = normalizer.min() if shard is None else shard.minimum(normalizer.min())
            if log_G is not None:
                total, count = log_G.detach().sum(), log_G.numel()
                if shard is not None:
                    total, count = shard.sum(total), shard.rows * shard.tokens * self.n_kv_heads
                stats["gate_half_life"] = math.log(0.5) * count / total
        return self.out(out.reshape(B, T, self.n_heads * self.head_dim)), stats

    def _log_gates(self, x: Tensor) -> Tensor | None:
        """Logarithms of the gates (B, T, Hk), fp32 and <= 0."""
        if self.gate is None:
            return None
        start = self.gate_start
        c = spread_gates(*start, self.n_kv_heads, x.device) if isinstance(start, tuple) else start
        # c (6.9) joins in fp32: in bf16, steps of the sum would change the half-life by 3 %, as would those of a bias
        # that begins at c and that FSDP gathers in bf16.
        return F.logsigmoid(F.linear(x, self.gate.weight).float() + (self.gate.bias.float() + c))

    def _mix(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_G: Tensor | None,
        cu_seqlens: Tensor | None,
        *,
        with_normalizer: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """The op's output (B, T, Hq, D), and where asked of power layers the normaliser (B, T, Hq), fp32 without
        gradient.
        """
        config = self.config
        match config.kind:
            case "power":
                options: dict[str, Any] = {
                    "deg": config.deg,
                    "chunk_size": config.chunk_size,
                    "switch_over_seq_len": config.switch_over_seq_len,
                    "cu_seqlens": cu_seqlens,
                }
                if not with_normalizer:
                    out = power_retention(q, k, v, log_G, **options)
                    assert isinstance(out, Tensor)
                    return out, None
                out, normalizer, _, _ = power_retention_with_normalizer(q, k, v, log_G, **options)
                return out, normalizer
            case "linear":
                return linear_attention(q, k, v, log_G, chunk_size=config.chunk_size, cu_seqlens=cu_seqlens), None
            case "softmax":
                return softmax_attention(q, k, v, log_G=log_G, cu_seqlens=cu_seqlens), None
            case "window":
                return window_attention(q, k, v, config.window, log_G=log_G, cu_seqlens=cu_seqlens), None
        raise AssertionError(f"MixerConfig let kind {config.kind!r} through")

    def _mix_slice(
        self, q: Tensor, k: Tensor, v: Tensor, log_G: Tensor | None, shard: ContextShard
    ) -> tuple[Tensor, Tensor | None]:
        """`_mix` for this rank's slice of longer rows, together with the other ranks."""
        config = self.config
        match config.kind:
            case "power":
                return context_power_retention(
                    q,
                    k,
                    v,
                    log_G,
                    shard,
                    deg=config.deg,
                    chunk_size=config.chunk_size,
                    switch_over_seq_len=config.switch_over_seq_len,
                    layer=self,
                )
            case "linear":
                out, _ = context_power_retention(q, k, v, log_G, shard, deg=1, chunk_size=config.chunk_size, layer=self)
                return out, None
            case "softmax":
                return context_attention(q, k, v, log_G, shard), None
            case "window":
                return context_attention(q, k, v, log_G, shard, window=config.window), None
        raise AssertionError(f"MixerConfig let kind {config.kind!r} through")

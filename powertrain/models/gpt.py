"""The whole GPT: blocks of one mixer and one MLP, pre-norm, with rotary embeddings.

Shapes: B batch, T tokens, d_model width, vocab entries of the tokenizer.

    x = embedding(input_ids)
    for each block:  x = x + mixer(norm(x));  x = x + mlp(norm(x))
    logits = head(norm(x))

Init (`GPT.init_weights`), with s = config.init_std and L = config.n_layers:

    parameter                    init                        source
    embedding, head              N(0, s)                     GPT-2
    mixer.qkv, mlp.up            N(0, s)                     GPT-2
    mixer.out, mlp.down          N(0, s / sqrt(2 L))         GPT-2: 2 L branches add to the residual stream
    mixer.gate weight, bias      0                           every gate starts at gate_init, or at its head's value
                                                             between the two of a pair, whatever the token
    every norm                   1                           Zhang & Sennrich 2019 (arXiv:1910.07467)

No linear map has a bias but the gate. Each parameter is drawn from a generator of its own, seeded by the seed and the
parameter's name: models that differ in a mixer start from equal weights wherever they share a parameter, and a
sharded model starts from the same weights as a whole one, on every device.
"""

import hashlib
import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from powertrain.models.config import MixerConfig, ModelConfig
from powertrain.models.mixers import Cache, LayerCache, Linear, Mixer, RMSNorm, rotary_angles, token_positions
from powertrain.ops import linear_cross_entropy
from powertrain.ops.context_shard import ContextShard

IGNORE_INDEX = -100


class GPTOutput(NamedTuple):
    """What `GPT.forward` returns; a tuple, so that FSDP and `torch.compile` see the tensors inside."""

    # With labels: mean loss in nats per label that is not ignored (scalar), or (B, T) fp32 for loss_reduction="none".
    loss: Tensor | None
    # Without labels: (B, T, vocab_size), or the last positions of it.
    logits: Tensor | None
    # With collect_stats: `power/gate_half_life/<layer>` (tokens) and `power/min_normalizer/<layer>`, fp32 scalars.
    stats: dict[str, Tensor]


class Embedding(nn.Embedding):
    """`nn.Embedding` that leaves its parameters uninitialised: `GPT.init_weights` is the only init."""

    def reset_parameters(self) -> None:
        pass


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)) for swiglu, down(gelu(up(x))) for gelu; gate and up are one matrix."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.kind = config.mlp
        self.up = Linear(config.d_model, config.d_ff * (2 if config.mlp == "swiglu" else 1), bias=False)
        self.down = Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        if self.kind == "swiglu":
            gate, up = x.chunk(2, dim=-1)
            return self.down(F.silu(gate) * up)
        return self.down(F.gelu(x))


class Block(nn.Module):
    """One layer: a mixer and an MLP, each normalised before and added after."""

    def __init__(self, config: ModelConfig, mixer: MixerConfig) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.mixer = Mixer(config, mixer)
        self.mlp_norm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        cu_seqlens: Tensor | None = None,
        cache: LayerCache | None = None,
        collect_stats: bool = False,
        shard: ContextShard | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """x (B, T, d_model) -> the same shape, and the mixer's stats."""
        mixed, stats = self.mixer(self.mixer_norm(x), rotary, cu_seqlens, cache, collect_stats, shard)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), stats


class GPT(nn.Module):
    """Decoder-only language model of the shape of `config`, whose vocab_size must be set.

    Built under `torch.device("meta")` it holds no weights: shard it, `to_empty(device=...)`, then call
    `init_weights`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        rows = config.padded_vocab_size
        self.embedding = Embedding(rows, config.d_model)
        self.blocks = nn.ModuleList(Block(config, mixer) for mixer in config.layer_mixers)
        self.norm = RMSNorm(config.d_model, eps=config.norm_eps)
        # A shared parameter would come apart in `to_empty`; with a tied head there is only the embedding.
        self.head = None if config.tied_embeddings else Linear(config.d_model, rows, bias=False)
        if not self.embedding.weight.is_meta:
            self.init_weights()

    @torch.no_grad()
    def init_weights(self, seed: int | None = None) -> None:
        """Set every parameter as the table above says; `seed` is that of torch's default generator unless given.

        Sharded parameters (DTensor) are drawn one at a time on the CPU, and each rank keeps its shard.
        """
        if seed is None:
            seed = torch.initial_seed()
        residual_std = self.config.init_std / math.sqrt(2 * self.config.n_layers)
        for name, parameter in self.named_parameters():
            match name.split(".")[-2:]:
                case ["mixer_norm" | "mlp_norm" | "norm" | "q_norm" | "k_norm", "weight"]:
                    parameter.fill_(1.0)
                case ["gate", "weight" | "bias"]:
                    parameter.zero_()
                case ["out" | "down", "weight"]:
                    _draw_normal(parameter, residual_std, seed, name)
                case ["embedding" | "head" | "qkv" | "up", "weight"]:
                    _draw_normal(parameter, self.config.init_std, seed, name)
                case _:
                    raise AssertionError(f"parameter {name} has no row in the init table")

    def decay_parameters(self) -> frozenset[str]:
        """Names of the parameters that weight decay belongs to: the matrices of mixers and MLPs, and an untied head.

        Not the norms and gates, whose natural value is not 0, and not the embedding (tied or not): decay shrinks its
        rows, and small rows make large gradients in the first layers (OLMo 2, arXiv:2501.00656).
        """
        matrices = ("qkv.weight", "out.weight", "up.weight", "down.weight", "head.weight")
        return frozenset(name for name, _ in self.named_parameters() if name.endswith(matrices))

    def forward(
        self,
        input_ids: Tensor,
        *,
        labels: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: Cache | None = None,
        loss_reduction: Literal["mean", "sum", "none"] = "mean",
        logits_to_keep: int | None = None,
        collect_stats: bool = False,
        shard: ContextShard | None = None,
    ) -> GPTOutput:
        """Loss of `labels`, or the logits.

        input_ids (B, T) int64. labels (B, T) int64: the next token, -100 where there is none; with them the logits of
        all tokens never exist whole. cu_seqlens (M,) int32: document offsets over the flattened B T tokens; nothing
        passes a boundary. cache: the tokens follow those that the cache has seen, and it is advanced in place.
        loss_reduction: "mean" or "sum" over the labels that are not ignored, or "none". logits_to_keep: return the
        logits of this many last positions only. collect_stats: see GPTOutput. shard: input_ids and labels are this
        rank's slice of longer rows, whose documents the shard knows (docs/context-parallel.md); the loss, "sum" or
        "none", is that of the slice, its gradients reach the other ranks, and the call is a collective of them.
        """
        if cache is not None and (cu_seqlens is not None or labels is not None or shard is not None):
            raise ValueError(
                "a cache continues one sequence per row: cu_seqlens, labels and shard are not allowed with it"
            )
        if shard is not None:
            _check_shard(shard, input_ids, labels, cu_seqlens, loss_reduction)
        (B, T), device = input_ids.shape, input_ids.device
        start = 0 if cache is None else cache.position
        x = self.embedding(input_ids)
        again = self.config.activation_checkpointing and torch.is_grad_enabled()
        if shard is None:
            positions = token_positions(B, T, start, cu_seqlens, device)
        else:
            positions = shard.take(token_positions(B, shard.tokens, 0, shard.whole_cu_seqlens, device))
            shard = shard.remembering() if again else shard
        rotary = rotary_angles(positions, self.config.head_dim, self.config.rope_theta)
        stats: dict[str, Tensor] = {}
        for layer, block in enumerate(self.blocks):
            inputs = (x, rotary, cu_seqlens, None if cache is None else cache.layers[layer], collect_stats, shard)
            if again:
                x, layer_stats = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x, layer_stats = block(*inputs)
            stats.update({f"power/{key}/{layer}": value for key, value in layer_stats.items()})
        if cache is not None:
            cache.position = start + T
        x = self.norm(x)
        head = self.embedding.weight if self.head is None else self.head.weight
        if labels is None:
            x = x if logits_to_keep is None else x[:, -logits_to_keep:]
            return GPTOutput(None, F.linear(x, head)[..., : self.config.vocab_size], stats)
        # Rows of the padding are no token: they get no probability, and no gradient.
        loss = linear_cross_entropy(
            x.flatten(0, 1), head[: self.config.vocab_size], labels.flatten(), IGNORE_INDEX, loss_reduction
        )
        if loss_reduction == "none":
            loss = loss.view_as(labels)
        return GPTOutput(loss, None, stats)


def _check_shard(
    shard: ContextShard, input_ids: Tensor, labels: Tensor | None, cu_seqlens: Tensor | None, loss_reduction: str
) -> None:
    expected = (shard.rows, shard.stop - shard.start)
    if tuple(input_ids.shape) != expected:
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)}; rank {shard.ranks.rank} of {shard.ranks.size} holds a "
            f"slice of shape {expected}"
        )
    if cu_seqlens is not None:
        raise ValueError("cu_seqlens and shard are both given; the shard holds the documents of the whole rows")
    if labels is not None and loss_reduction == "mean":
        raise ValueError("loss_reduction='mean' is not defined for a slice; allowed with a shard are 'sum' and 'none'")


def _draw_normal(parameter: Tensor, std: float, seed: int, name: str) -> None:
    """Fill `parameter` from N(0, std) by a generator that depends on `seed` and `name` only."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "big") >> 1)
    values = torch.empty(parameter.shape, dtype=torch.float32, device="cpu").normal_(0.0, std, generator=generator)
    if not hasattr(parameter, "device_mesh"):
        parameter.copy_(values)
        return
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    values = values.to(parameter.dtype)
    # Every rank has drawn the same values: nothing needs to be sent.
    shard = distribute_tensor(values, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.to_local().copy_(shard.to_local())

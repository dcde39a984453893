"""The FLOPs and the parameters of a model, from its config alone: the only definition of either in the project.

A multiply-add is 2 FLOPs, and only matrix products count, as in `torch.utils.flop_counter`: norms, rotations, sigmoids
and the embedding lookup are free.

*Algorithmic* is what the mathematics needs: causal pairs only, the exact dimension of phi, the real vocabulary, and
nothing twice (but the scores of attention, which every implementation forms again in its backward pass). It is what
budgets, MFU and scaling curves are measured in. *Executed* is what the PyTorch implementation multiplies, and what
`FlopCounterMode` counts on the real model: blocks whole, masked or not, states formed again, and layers computed again
by activation checkpointing.
"""

from dataclasses import dataclass, fields

from powertrain.models.config import MixerConfig, ModelConfig
from powertrain.ops.flops import OpFlops, OpPassFlops, power_retention_flops, softmax_attention_flops
from powertrain.ops.plan import choose_chunk_size


@dataclass(frozen=True)
class TokenFlops:
    """FLOPs of one pass (forward or backward) per token, averaged over the tokens of a sequence."""

    # Matrices of mixers (gates included) and MLPs.
    weights: float = 0.0
    # The head; tied or not, it is a product of its own.
    head: float = 0.0
    # Pairs of tokens: within a chunk of power and linear layers, and all of softmax and window layers.
    intra_chunk: float = 0.0
    # phi(k)^T v into states.
    state_update: float = 0.0
    # phi(q) times states.
    state_query: float = 0.0

    @property
    def total(self) -> float:
        return self.weights + self.head + self.intra_chunk + self.state_update + self.state_query

    @property
    def without_head(self) -> float:
        return self.total - self.head

    def __add__(self, other: "TokenFlops") -> "TokenFlops":
        return TokenFlops(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(self)))


@dataclass(frozen=True)
class StepFlops:
    """FLOPs per token of a training step's forward and backward pass."""

    forward: TokenFlops
    backward: TokenFlops

    @property
    def total(self) -> float:
        return self.forward.total + self.backward.total

    @property
    def without_head(self) -> float:
        return self.forward.without_head + self.backward.without_head


@dataclass(frozen=True)
class FlopsPerToken:
    """FLOPs per token of a model at one context length, by both conventions."""

    algorithmic: StepFlops
    executed: StepFlops


def model_flops(
    config: ModelConfig, context_length: int, *, documents: bool = True, device_type: str = "cpu"
) -> FlopsPerToken:
    """FLOPs per token of `config` on sequences of `context_length` tokens, averaged over the positions.

    Every sequence counts as one document, so that budgets do not depend on how a corpus is cut. `documents` and
    `device_type` touch the executed count alone: whether batches carry `cu_seqlens`, as in training (softmax layers
    then run blocked instead of through SDPA), and "cpu" or "cuda", whose blocks differ. Errors: ValueError for a
    context below 1, or a config without a vocabulary.
    """
    if context_length < 1:
        raise ValueError(f"context_length={context_length}: must be at least 1")
    return FlopsPerToken(
        algorithmic=_step_flops(config, context_length, False, documents, device_type),
        executed=_step_flops(config, context_length, True, documents, device_type),
    )


def num_parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters of `config` by part, without building it; their sum is the size of the model.

    Parts: embedding, head (0 where tied), mixers (projections), gates, mlps, norms. The embedding and the head hold
    `padded_vocab_size` rows.
    """
    norms = config.d_model * (2 * config.n_layers + 1)
    if config.qk_norm:
        norms += 2 * config.head_dim * config.n_layers
    gated_layers = sum(bool(mixer.gated) for mixer in config.layer_mixers)
    embedding = config.padded_vocab_size * config.d_model
    return {
        "embedding": embedding,
        "head": 0 if config.tied_embeddings else embedding,
        "mixers": config.n_layers * _projection_weights(config),
        "gates": gated_layers * (config.d_model + 1) * config.n_kv_heads,
        "mlps": config.n_layers * _mlp_weights(config),
        "norms": norms,
    }


def _projection_weights(config: ModelConfig) -> int:
    return config.d_model * config.head_dim * 2 * (config.n_heads + config.n_kv_heads)


def _mlp_weights(config: ModelConfig) -> int:
    return config.d_model * config.d_ff * (3 if config.mlp == "swiglu" else 2)


def _step_flops(
    config: ModelConfig, context_length: int, executed: bool, documents: bool, device_type: str
) -> StepFlops:
    if config.vocab_size is None:
        raise ValueError("model.vocab_size=None: set it to the tokenizer's number of entries first")
    head = 2.0 * config.d_model * config.vocab_size
    # A product with a weight has two adjoints, one for the weight and one for its input.
    forward, backward = TokenFlops(head=head), TokenFlops(head=2 * head)
    for mixer in config.layer_mixers:
        gates = config.d_model * config.n_kv_heads if mixer.gated else 0
        weights = 2.0 * (_projection_weights(config) + gates + _mlp_weights(config))
        op = _op_flops(config, mixer, context_length, executed, documents, device_type)
        layer_forward = _per_token(op.forward, weights, context_length)
        layer_backward = _per_token(op.backward, 2 * weights, context_length)
        if executed and config.activation_checkpointing:
            # PyTorch stops computing a block again at its last saved tensor: the input of the down projection.
            down = TokenFlops(weights=-2.0 * config.d_model * config.d_ff)
            layer_backward += layer_forward + down
        forward, backward = forward + layer_forward, backward + layer_backward
    return StepFlops(forward, backward)


def _per_token(op: OpFlops, weights: float, context_length: int) -> TokenFlops:
    return TokenFlops(
        weights=weights,
        intra_chunk=op.intra_chunk / context_length,
        state_update=op.state_update / context_length,
        state_query=op.state_query / context_length,
    )


def _op_flops(
    config: ModelConfig, mixer: MixerConfig, context_length: int, executed: bool, documents: bool, device_type: str
) -> OpPassFlops:
    """FLOPs of one mixer's op on one sequence."""
    if mixer.kind in ("softmax", "window"):
        return softmax_attention_flops(
            batch=1,
            tokens=context_length,
            query_heads=config.n_heads,
            key_dim=config.head_dim,
            value_dim=config.head_dim,
            executed=executed,
            window=mixer.window if mixer.kind == "window" else None,
            blocked=documents or bool(mixer.gated) or mixer.kind == "window",
            device_type=device_type,
        )
    deg = 1 if mixer.kind == "linear" else mixer.deg
    return power_retention_flops(
        batch=1,
        tokens=context_length,
        query_heads=config.n_heads,
        key_heads=config.n_kv_heads,
        key_dim=config.head_dim,
        value_dim=config.head_dim,
        deg=deg,
        chunk_size=_chunk_size(config, mixer, deg, context_length),
        executed=executed,
        device_type=device_type,
    )


def _chunk_size(config: ModelConfig, mixer: MixerConfig, deg: int, context_length: int) -> int:
    """The chunk that the op runs with."""
    if mixer.kind == "power" and mixer.switch_over_seq_len is not None and context_length <= mixer.switch_over_seq_len:
        return context_length
    if mixer.chunk_size is not None:
        return min(mixer.chunk_size, context_length)
    return choose_chunk_size(
        tokens=context_length,
        key_dim=config.head_dim,
        value_dim=config.head_dim,
        deg=deg,
        query_heads_per_key_head=config.n_heads // config.n_kv_heads,
    )

"""Schema of a model: its shape (`ModelConfig`) and what mixes its tokens (`MixerConfig`).

No torch here: `powertrain train --cfg job` validates a config without importing it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from powertrain.divisors import divisors

MIXER_KINDS = ("power", "softmax", "window", "linear")
MLP_KINDS = ("swiglu", "gelu")
POWER_DEGREES = (2, 4)

# Kinds whose layers are gated when `gated` is left open. Linear-cost mixers need to forget, because their state is
# finite; softmax and window forget by themselves, and are gated on request as a fair baseline.
_GATED_BY_DEFAULT = ("power", "linear")

# Rows of the embedding and the head are rounded up to this, so that their matrix products are aligned for tensor
# cores.
VOCAB_MULTIPLE = 64


@dataclass(frozen=True)
class MixerConfig:
    """What mixes information between tokens, in one layer or, with a pattern, in all layers of a hybrid."""

    # One of MIXER_KINDS, or several separated by commas: a pattern that is repeated over the layers.
    # "power,power,softmax": layers 0 and 1 are power, layer 2 is softmax, layers 3 and 4 power again, ...
    kind: str = "power"
    # Power layers: degree p of the weights (scale q.k)^p, 2 or 4. The state of a head has binom(head_dim + p - 1, p)
    # rows.
    deg: int = 2
    # A scalar forget gate per key head and token, log-sigmoid of a projection of the hidden state. None: gated in
    # power and linear layers, not in softmax and window layers.
    gated: bool | None = None
    # Value of every gate at init, between 0 and 1 (exclusive). 0.999 is a half-life of 693 tokens. Two values, as
    # [0.9, 0.9999], are those of a layer's first and last key head: from head to head the half-life changes by one
    # factor, here from 6.6 to 6931 tokens. A single key head has the geometric mean of the two half-lives.
    gate_init: float | tuple[float, float] = 0.999
    # Power and linear layers: tokens per chunk. None: the op chooses.
    chunk_size: int | None = None
    # Power layers: sequences up to this many tokens use the quadratic form, and decoding folds its keys into the
    # state whenever this many are waiting. None: the op's defaults.
    switch_over_seq_len: int | None = None
    # Window layers: tokens that a query sees, itself included.
    window: int = 1024

    def __post_init__(self) -> None:
        unknown = [kind for kind in self.kinds if kind not in MIXER_KINDS]
        if unknown:
            raise ValueError(
                f"mixer.kind={self.kind!r}: {unknown[0]!r} is not a mixer; allowed are {', '.join(MIXER_KINDS)}, "
                "or several of them separated by commas"
            )
        if self.deg not in POWER_DEGREES:
            raise ValueError(
                f"mixer.deg={self.deg}: allowed are {' and '.join(map(str, POWER_DEGREES))}; an odd power of q.k may "
                "be negative, and the sum that normalises the output zero; degree 1 is mixer.kind=linear"
            )
        if isinstance(self.gate_init, Sequence) and not isinstance(self.gate_init, str):
            object.__setattr__(self, "gate_init", tuple(self.gate_init))
        gates = self.gate_init if isinstance(self.gate_init, tuple) and len(self.gate_init) == 2 else (self.gate_init,)
        if not all(isinstance(gate, float) and 0.0 < gate < 1.0 for gate in gates):
            given = list(self.gate_init) if isinstance(self.gate_init, tuple) else self.gate_init
            raise ValueError(
                f"mixer.gate_init={given!r}: must be a number between 0 and 1, exclusive, or two of them, as in "
                "[0.9, 0.9999]"
            )
        for name in ("chunk_size", "switch_over_seq_len"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"mixer.{name}={value}: must be at least 1, or null for the op's choice")
        if self.window < 1:
            raise ValueError(f"mixer.window={self.window}: must be at least 1")

    @property
    def kinds(self) -> tuple[str, ...]:
        """The pattern as a tuple: ("power",) for a uniform model, ("power", "power", "softmax") for a hybrid."""
        return tuple(kind.strip() for kind in self.kind.split(","))

    def for_layer(self, layer: int) -> "MixerConfig":
        """The mixer of layer `layer` (from 0): one kind, and `gated` decided."""
        kind = self.kinds[layer % len(self.kinds)]
        gated = kind in _GATED_BY_DEFAULT if self.gated is None else self.gated
        return replace(self, kind=kind, gated=gated)


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a GPT. A field given as 0 is derived, and holds the derived number after construction."""

    # Blocks, each one mixer and one MLP.
    n_layers: int = 4
    # Width of the residual stream.
    d_model: int = 128
    # Query heads.
    n_heads: int = 4
    # Key and value heads; n_heads must be a multiple of it. 0: n_heads (no grouping).
    n_kv_heads: int = 0
    # Width of a head, even because of the rotary embedding; the CUDA kernels take 32, 64 and 128. 0: d_model /
    # n_heads.
    head_dim: int = 0
    # "swiglu" (Shazeer 2020, arXiv:2002.05202) or "gelu" (GPT-2).
    mlp: str = "swiglu"
    # Width of the MLP. 0: 4 d_model for gelu, 8/3 d_model rounded up to a multiple of 64 for swiglu (as many
    # parameters).
    d_ff: int = 0
    # RMS-normalise the queries and keys of each head, with a learned scale, before the rotary embedding.
    qk_norm: bool = True
    # Base of the rotary wavelengths (Su et al. 2021, arXiv:2104.09864); the longest is about 2 pi rope_theta tokens.
    rope_theta: float = 10_000.0
    # The head is the embedding, transposed.
    tied_embeddings: bool = True
    # Added to the mean square in every RMSNorm.
    norm_eps: float = 1e-6
    # Standard deviation of the normal init; projections into the residual stream have init_std / sqrt(2 n_layers).
    init_std: float = 0.02
    # Entries of the tokenizer. None until the tokenizer is known: a model cannot be built, nor counted, before. A run
    # that gives it is planned with it until its data are prepared, and refused where they have others.
    vocab_size: int | None = None
    # Keep only the input of each block for the backward pass and compute the block again there.
    activation_checkpointing: bool = False
    mixer: MixerConfig = field(default_factory=MixerConfig)

    def __post_init__(self) -> None:
        for name in ("n_layers", "d_model", "n_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}={getattr(self, name)}: must be at least 1")
        for name in ("n_kv_heads", "head_dim", "d_ff"):
            if getattr(self, name) < 0:
                raise ValueError(f"model.{name}={getattr(self, name)}: must be positive, or 0 to derive it")
        if self.mlp not in MLP_KINDS:
            raise ValueError(f"model.mlp={self.mlp!r}: allowed are {', '.join(MLP_KINDS)}")
        if self.head_dim == 0:
            if self.d_model % self.n_heads:
                raise ValueError(
                    f"model.n_heads={self.n_heads} does not divide model.d_model={self.d_model}: "
                    "choose a divisor, or give model.head_dim"
                )
            self._derive("head_dim", self.d_model // self.n_heads)
        if self.head_dim % 2:
            raise ValueError(
                f"model.head_dim={self.head_dim}: must be even, because the rotary embedding turns pairs of channels"
            )
        if self.n_kv_heads == 0:
            self._derive("n_kv_heads", self.n_heads)
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"model.n_kv_heads={self.n_kv_heads} does not divide model.n_heads={self.n_heads}: "
                f"allowed are {divisors(self.n_heads)}"
            )
        if self.d_ff == 0:
            self._derive("d_ff", 4 * self.d_model if self.mlp == "gelu" else -(-8 * self.d_model // (3 * 64)) * 64)
        for name in ("rope_theta", "norm_eps", "init_std"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ValueError(f"model.{name}={getattr(self, name)}: must be positive and finite")
        if self.vocab_size is not None and self.vocab_size < 1:
            raise ValueError(
                f"model.vocab_size={self.vocab_size}: must be at least 1, or null until the tokenizer is known"
            )
        if len(self.mixer.kinds) > self.n_layers:
            raise ValueError(
                f"mixer.kind={self.mixer.kind!r} is a pattern of {len(self.mixer.kinds)} layers: "
                f"at most model.n_layers={self.n_layers} are allowed"
            )

    def _derive(self, name: str, value: int) -> None:
        object.__setattr__(self, name, value)

    @property
    def layer_mixers(self) -> tuple[MixerConfig, ...]:
        """The mixer of every layer, each of one kind."""
        return tuple(self.mixer.for_layer(layer) for layer in range(self.n_layers))

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and the head: `vocab_size` rounded up to a multiple of 64."""
        if self.vocab_size is None:
            raise ValueError("model.vocab_size=None: set it to the tokenizer's number of entries first")
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

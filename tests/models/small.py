"""Small models for the tests of `models` and `inference`: one for each mixer, and hybrids."""

import torch

from powertrain.models.config import MixerConfig, ModelConfig
from powertrain.models.gpt import GPT

# Chunks and windows are short, so that 40 tokens cross several of them.
MIXERS = {
    "power": MixerConfig(kind="power", chunk_size=16, gate_init=0.9),
    "power_spread": MixerConfig(kind="power", chunk_size=16, gate_init=(0.8, 0.999)),
    "power_quadratic": MixerConfig(kind="power", switch_over_seq_len=64, gated=False),
    "power_deg4": MixerConfig(kind="power", deg=4, chunk_size=16),
    "softmax": MixerConfig(kind="softmax"),
    "softmax_gated": MixerConfig(kind="softmax", gated=True, gate_init=0.9),
    "window": MixerConfig(kind="window", window=7),
    "window_gated": MixerConfig(kind="window", window=7, gated=True, gate_init=0.9),
    "linear": MixerConfig(kind="linear", chunk_size=16, gate_init=0.9),
    "hybrid": MixerConfig(kind="window,power", window=7, chunk_size=16),
}
VOCAB = 100


def small_config(mixer: str | MixerConfig = "power", **changes: object) -> ModelConfig:
    """Two layers, GQA with two query heads to a key head, and a vocabulary that needs padding."""
    values: dict = {"n_layers": 2, "d_model": 48, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "vocab_size": VOCAB}
    return ModelConfig(**{**values, **changes}, mixer=MIXERS[mixer] if isinstance(mixer, str) else mixer)


def small_model(mixer: str | MixerConfig = "power", seed: int = 0, **changes: object) -> GPT:
    """A model whose gates differ between tokens and whose output differs between tokens enough to test."""
    torch.manual_seed(seed)
    model = GPT(small_config(mixer, init_std=0.2, **changes))
    for name, parameter in model.named_parameters():
        if name.endswith("gate.weight"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def tokens(B: int, T: int, seed: int = 1) -> torch.Tensor:
    """Random ids (B, T)."""
    return torch.randint(0, VOCAB, (B, T), generator=torch.Generator().manual_seed(seed))

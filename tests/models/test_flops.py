"""FLOPs and parameters: hand counts, `FlopCounterMode` on the real model, and the sizes that the names promise."""

import pytest
import torch

from powertrain.models.config import MixerConfig, ModelConfig
from powertrain.models.flops import FlopsPerToken, TokenFlops, model_flops, num_parameters
from powertrain.models.gpt import GPT
from powertrain.schema import build
from tests.models import test_config
from tests.models.counting import flop_counter, open_ops
from tests.models.small import MIXERS, small_config, small_model, tokens

# --- By hand: 2 layers, d_model 48, 4 query and 2 key heads of 8, SwiGLU of 128, vocabulary 100, 40 tokens ---

# Multiply-adds per token and layer: q, k and v; out; gate and up, and down.
MATRICES = 48 * (4 + 2 + 2) * 8 + 4 * 8 * 48 + 48 * 256 + 128 * 48
GATES = 48 * 2
HEAD = 2 * 48 * 100


def check(flops: FlopsPerToken, forward: TokenFlops, backward: TokenFlops):
    for actual, expected in ((flops.algorithmic.forward, forward), (flops.algorithmic.backward, backward)):
        for part in ("weights", "head", "intra_chunk", "state_update", "state_query"):
            assert getattr(actual, part) == pytest.approx(getattr(expected, part), rel=1e-12), part
    assert flops.algorithmic.total == pytest.approx(sum(vars(forward).values()) + sum(vars(backward).values()))
    assert flops.algorithmic.without_head == pytest.approx(flops.algorithmic.total - 3 * HEAD)


def test_power_by_hand():
    # Chunks of 16, 16 and 8 tokens. F = 8 * 9 / 2 = 36 monomials; 8 values and the normaliser make 9 columns.
    pairs = 16 * 17 / 2 + 16 * 17 / 2 + 8 * 9 / 2
    weights = 2 * 2 * (MATRICES + GATES)
    intra_chunk = 2 * 4 * 2 * pairs * (8 + 9) / 40
    # The first 32 tokens go into states, once per key head; the last 24 read one, once per query head.
    state_update = 2 * 2 * 2 * 36 * 9 * 32 / 40
    state_query = 2 * 4 * 2 * 36 * 9 * 24 / 40
    check(
        model_flops(small_config("power"), 40),
        TokenFlops(weights, HEAD, intra_chunk, state_update, state_query),
        # Backward: q.k again, then the gradients of the weights (9 columns), of v (9), of q (8) and of k (8).
        TokenFlops(2 * weights, 2 * HEAD, intra_chunk * (8 + 9 + 9 + 8 + 8) / 17, 2 * state_update, 2 * state_query),
    )


def test_power_deg4_by_hand():
    flops = model_flops(small_config("power_deg4"), 40).algorithmic.forward
    # F = binom(11, 4) = 330.
    assert flops.state_update == pytest.approx(2 * 2 * 2 * 330 * 9 * 32 / 40)
    assert flops.state_query == pytest.approx(2 * 4 * 2 * 330 * 9 * 24 / 40)


def test_quadratic_power_by_hand():
    # 40 tokens are below switch_over_seq_len: one chunk, no state, no gates.
    weights, intra_chunk = 2 * 2 * MATRICES, 2 * 4 * 2 * (40 * 41 / 2) * (8 + 9) / 40
    check(
        model_flops(small_config("power_quadratic"), 40),
        TokenFlops(weights, HEAD, intra_chunk),
        TokenFlops(2 * weights, 2 * HEAD, intra_chunk * 42 / 17),
    )


def test_linear_by_hand():
    # As power, with F = 8.
    pairs = 16 * 17 / 2 + 16 * 17 / 2 + 8 * 9 / 2
    weights, intra_chunk = 2 * 2 * (MATRICES + GATES), 2 * 4 * 2 * pairs * (8 + 9) / 40
    state_update, state_query = 2 * 2 * 2 * 8 * 9 * 32 / 40, 2 * 4 * 2 * 8 * 9 * 24 / 40
    check(
        model_flops(small_config("linear"), 40),
        TokenFlops(weights, HEAD, intra_chunk, state_update, state_query),
        TokenFlops(2 * weights, 2 * HEAD, intra_chunk * 42 / 17, 2 * state_update, 2 * state_query),
    )


@pytest.mark.parametrize(("mixer", "gates"), [("softmax", 0), ("softmax_gated", GATES)])
def test_softmax_by_hand(mixer: str, gates: int):
    # Causal pairs only; backward is scores, and the gradients of weights, v, q and k: 5 products where forward has 2.
    weights, intra_chunk = 2 * 2 * (MATRICES + gates), 2 * 4 * 2 * (40 * 41 / 2) * (8 + 8) / 40
    check(
        model_flops(small_config(mixer), 40),
        TokenFlops(weights, HEAD, intra_chunk),
        TokenFlops(2 * weights, 2 * HEAD, 2.5 * intra_chunk),
    )


def test_window_by_hand():
    # The first 6 tokens see 1 ... 6 tokens, the other 34 see 7.
    weights, intra_chunk = 2 * 2 * MATRICES, 2 * 4 * 2 * (21 + 34 * 7) * (8 + 8) / 40
    check(
        model_flops(small_config("window"), 40),
        TokenFlops(weights, HEAD, intra_chunk),
        TokenFlops(2 * weights, 2 * HEAD, 2.5 * intra_chunk),
    )


def test_hybrid_is_the_mean_of_its_layers():
    window, power = (model_flops(small_config(mixer), 40) for mixer in ("window", "power"))
    # The power layer of the hybrid has the window's chunk, and both have two layers.
    hybrid = model_flops(small_config("hybrid"), 40)
    assert hybrid.algorithmic.total == pytest.approx((window.algorithmic.total + power.algorithmic.total) / 2)
    assert hybrid.executed.total == pytest.approx((window.executed.total + power.executed.total) / 2)


def test_gelu_and_untied_head():
    config = small_config("softmax", mlp="gelu", d_ff=192, tied_embeddings=False)
    forward = model_flops(config, 40).algorithmic.forward
    assert forward.weights == 2 * 2 * (48 * (4 + 2 + 2) * 8 + 4 * 8 * 48 + 2 * 48 * 192)
    assert forward.head == HEAD


@pytest.mark.parametrize("mixer", MIXERS)
def test_counting_takes_no_longer_for_longer_contexts(mixer: str):
    # Sums over their blocks would take hours. The unquadratic mixers cost a token no more than at a common context.
    common, absurd = (model_flops(small_config(mixer), T).executed.total for T in (1 << 20, 1 << 40))
    quadratic = mixer.startswith("softmax")
    assert absurd / common == pytest.approx(1, rel=1e-2) if not quadratic else absurd / common > 1000


def test_cost_grows_with_context_for_softmax_only():
    def flops(kind: str, T: int) -> TokenFlops:
        config = ModelConfig(vocab_size=320, mixer=MixerConfig(kind=kind, window=512))
        return model_flops(config, T).algorithmic.forward

    for kind in ("power", "linear", "window"):
        assert flops(kind, 65536).total < 1.25 * flops(kind, 4096).total, kind
    short, long = (flops("softmax", T).intra_chunk for T in (4096, 65536))
    assert long / short == pytest.approx(65537 / 4097)


def test_refuses():
    with pytest.raises(ValueError, match="context_length=0"):
        model_flops(small_config(), 0)
    with pytest.raises(ValueError, match="vocab_size=None"):
        model_flops(ModelConfig(), 16)


# --- Against FlopCounterMode ---


def count(model: GPT, T: int, documents: bool) -> tuple[float, float]:
    """FLOPs per token that FlopCounterMode sees in a forward pass, and in a forward and backward pass."""
    B = 2
    ids, labels = tokens(B, T), tokens(B, T, seed=2)
    cu_seqlens = torch.arange(0, B * T + 1, T, dtype=torch.int32) if documents else None
    counter = flop_counter()
    with counter, torch.no_grad():
        model(ids, labels=labels, cu_seqlens=cu_seqlens)
    forward = counter.get_total_flops()
    with counter:
        model(ids, labels=labels, cu_seqlens=cu_seqlens).loss.backward()
    return forward / (B * T), counter.get_total_flops() / (B * T)


@pytest.mark.parametrize("opened", [False, True], ids=["registered", "products"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_executed_is_what_flop_counter_counts(mixer: str, opened: bool, monkeypatch: pytest.MonkeyPatch):
    """With the ops closed their registered formulas count; opened, the products that they really run."""
    if opened:
        open_ops(monkeypatch)
    # 300 tokens cross the blocks (of 128) inside a chunk and of softmax.
    for T, documents in ((300, True), (40, False)):
        model = small_model(mixer)
        executed = model_flops(model.config, T, documents=documents).executed
        forward, both = count(model, T, documents)
        assert executed.forward.total == pytest.approx(forward, rel=0.01)
        assert executed.total == pytest.approx(both, rel=0.01)


@pytest.mark.parametrize("mixer", ["power", "softmax", "window"])
@pytest.mark.parametrize("mlp", ["swiglu", "gelu"])
def test_executed_with_activation_checkpointing(mixer: str, mlp: str):
    model = small_model(mixer, mlp=mlp, activation_checkpointing=True)
    executed = model_flops(model.config, 64).executed
    forward, both = count(model, 64, True)
    assert executed.forward.total == pytest.approx(forward, rel=0.01)
    assert executed.total == pytest.approx(both, rel=0.01)
    plain = model_flops(small_config(mixer, mlp=mlp), 64)
    assert model_flops(model.config, 64).algorithmic == plain.algorithmic


# --- Parameters ---

# Named sizes count everything, the embedding with this vocabulary (as the comments of conf/model/ say).
SIZES = {
    "1m": (1e6, 1024),
    "10m": (10e6, 8192),
    "35m": (35e6, 16384),
    "124m": (124e6, 50257),
    "350m": (350e6, 50257),
    "760m": (760e6, 50257),
    "1.3b": (1.3e9, 50257),
    "3b": (3e9, 50257),
}


@pytest.mark.parametrize("name", test_config.MODELS)
def test_named_sizes(name: str):
    size, vocabulary = SIZES[name]
    text = (test_config.share_dir("conf") / "model" / f"{name}.yaml").read_text()
    assert f"vocabulary of {vocabulary}." in text
    config = build(ModelConfig, {**test_config.load("model", name), "vocab_size": vocabulary})
    assert sum(num_parameters(config).values()) == pytest.approx(size, rel=0.03)


@pytest.mark.parametrize("mixer", test_config.MIXERS)
@pytest.mark.parametrize(
    "changes", [{}, {"tied_embeddings": False, "mlp": "gelu", "qk_norm": False}], ids=["", "other"]
)
def test_parameters_of_every_mixer(mixer: str, changes: dict):
    values = {**test_config.load("model", "3b"), "vocab_size": 1000, **changes}
    check_parameters(build(ModelConfig, {**values, "mixer": test_config.load("mixer", mixer)}))


@pytest.mark.parametrize("model", test_config.MODELS)
def test_parameters_of_every_size(model: str):
    check_parameters(build(ModelConfig, {**test_config.load("model", model), "vocab_size": 50257}))


def check_parameters(config: ModelConfig):
    with torch.device("meta"):
        model = GPT(config)
    parts = num_parameters(config)
    by_part = dict.fromkeys(parts, 0)
    for name, parameter in model.named_parameters():
        kind = name.split(".")[-2]
        names = {"qkv": "mixers", "out": "mixers", "up": "mlps", "down": "mlps", "gate": "gates"}
        by_part["norms" if kind.endswith("norm") else names.get(kind, kind)] += parameter.numel()
    assert by_part == parts

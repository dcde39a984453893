"""The GPT on every mixer: init, loss, causality, documents, checkpointing, compilation, stats."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from powertrain.models.config import MixerConfig, ModelConfig
from powertrain.models.gpt import GPT
from tests.models.small import MIXERS, VOCAB, small_config, small_model, tokens

every_mixer = pytest.mark.parametrize("mixer", MIXERS)


def gradients(model: GPT) -> dict[str, torch.Tensor]:
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert len(grads) == len(list(model.parameters()))
    model.zero_grad()
    return grads


def assert_same_gradients(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float):
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(
            actual[name], grad, rtol=tolerance, atol=tolerance * grad.abs().max().item(), msg=name
        )


# --- Init ---


@pytest.mark.parametrize("tied", [True, False])
def test_init_table(tied: bool):
    config = ModelConfig(n_layers=4, d_model=128, n_heads=4, vocab_size=1000, init_std=0.05, tied_embeddings=tied)
    model = GPT(config)
    expected_std = {
        "embedding": 0.05,
        "head": 0.05,
        "qkv": 0.05,
        "up": 0.05,
        "out": 0.05 / 8**0.5,
        "down": 0.05 / 8**0.5,
    }
    seen = set()
    for name, parameter in model.named_parameters():
        kind = name.split(".")[-2]
        seen.add(kind)
        if kind in expected_std:
            standard_error = expected_std[kind] / (2 * parameter.numel()) ** 0.5
            assert abs(parameter.std().item() - expected_std[kind]) < 5 * standard_error, name
            assert abs(parameter.mean().item()) < 5 * expected_std[kind] / parameter.numel() ** 0.5, name
        elif kind == "gate":
            assert not parameter.any(), name
        else:
            assert (parameter == 1).all(), name
    assert seen >= {*expected_std, "gate", "mixer_norm", "mlp_norm", "norm", "q_norm", "k_norm"} - (
        {"head"} if tied else set()
    )


def test_gates_start_at_gate_init():
    model = GPT(small_config("power"))
    log_G = model.blocks[0].mixer._log_gates(torch.randn(2, 5, 48))
    assert log_G.dtype == torch.float32
    torch.testing.assert_close(log_G.exp(), torch.full((2, 5, 2), 0.9))


def gates_at_init(gate_init: float | tuple[float, float], n_kv_heads: int) -> torch.Tensor:
    """Log gates (Hk,) of a new model."""
    model = GPT(small_config(MixerConfig(gate_init=gate_init), n_heads=4, n_kv_heads=n_kv_heads))
    log_G = model.blocks[1].mixer._log_gates(torch.randn(2, 5, 48))
    assert log_G.dtype == torch.float32
    assert (log_G == log_G[0, 0]).all()
    return log_G[0, 0]


@pytest.mark.parametrize("pair", [(0.9, 0.9999), (0.9999, 0.9), (0.5, 0.999999)])
def test_gates_of_a_pair_start_at_half_lives_that_change_by_one_factor(pair: tuple[float, float]):
    half_lives = math.log(0.5) / gates_at_init(pair, 4).double()
    first, last = (math.log(0.5) / math.log(gate) for gate in pair)
    expected = torch.tensor([first * (last / first) ** (head / 3) for head in range(4)], dtype=torch.float64)
    torch.testing.assert_close(half_lives, expected, rtol=2e-6, atol=0)
    middle = math.log(0.5) / gates_at_init(pair, 1).item()
    assert middle == pytest.approx(math.sqrt(first * last), rel=2e-6)
    # The ends are what a number gives, to the last bit.
    two = gates_at_init(pair, 2)
    assert [two[0], two[1]] == [gates_at_init(gate, 1)[0] for gate in pair]


def test_a_pair_of_gates_adds_nothing_to_the_state_and_a_number_is_added_as_it_is():
    number, pair = small_model("power"), small_model(MixerConfig(chunk_size=16, gate_init=(0.9, 0.9)))
    state = number.state_dict()
    assert list(pair.state_dict()) == list(state)
    assert not list(pair.buffers())
    for model in (number, pair):
        mixer, x = model.blocks[0].mixer, torch.randn(2, 5, 48)
        with torch.no_grad():
            mixer.gate.bias.normal_()
            mixer.gate.weight.normal_()
        expected = F.logsigmoid(F.linear(x, mixer.gate.weight) + (mixer.gate.bias + math.log(0.9 / (1.0 - 0.9))))
        assert torch.equal(mixer._log_gates(x), expected)


def test_same_seed_same_weights_whatever_was_drawn_before():
    torch.manual_seed(3)
    first = GPT(small_config()).state_dict()
    torch.manual_seed(3)
    torch.rand(7)
    second = GPT(small_config()).state_dict()
    torch.manual_seed(4)
    other = GPT(small_config()).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])
    assert not torch.equal(first["blocks.0.mlp.up.weight"], first["blocks.1.mlp.up.weight"])


def test_models_share_initial_weights_across_mixers():
    torch.manual_seed(3)
    power, softmax = GPT(small_config("power")).state_dict(), GPT(small_config("softmax")).state_dict()
    assert all(torch.equal(power[name], softmax[name]) for name in softmax)


@pytest.mark.parametrize("mixer", ["power", "power_spread"])
def test_meta_device_then_init_equals_direct(mixer: str):
    direct = GPT(small_config(mixer))
    direct.init_weights(seed=5)
    with torch.device("meta"):
        model = GPT(small_config(mixer))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not list(model.buffers())
    model.to_empty(device="cpu").init_weights(seed=5)
    assert model.head is None
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in direct.state_dict().items())
    assert torch.equal(model(tokens(1, 9)).logits, direct(tokens(1, 9)).logits)


def test_sharded_init_equals_whole():
    """The last of 3 ranks (of a fake process group: nothing can be sent) gets its rows of the whole model's weights."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    whole = GPT(small_config())
    whole.init_weights(seed=5)
    dist.init_process_group("fake", store=FakeStore(), rank=2, world_size=3)
    try:
        mesh = init_device_mesh("cpu", (3,))
        with torch.device("meta"):
            model = GPT(small_config())
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model.to_empty(device="cpu")
        model.init_weights(seed=5)
        for name, parameter in model.named_parameters():
            shards = whole.get_parameter(name).chunk(3)
            expected = shards[2] if len(shards) == 3 else shards[0][:0]
            assert torch.equal(parameter.to_local(), expected), name
    finally:
        dist.destroy_process_group()


def test_decay_parameters():
    names = small_model("power", tied_embeddings=False).decay_parameters()
    matrices = {"mixer.qkv.weight", "mixer.out.weight", "mlp.up.weight", "mlp.down.weight"}
    assert names == {f"blocks.{layer}.{name}" for layer in range(2) for name in matrices} | {"head.weight"}
    assert names - small_model("power").decay_parameters() == {"head.weight"}


# --- Loss and logits ---


@pytest.mark.parametrize("tied", [True, False])
def test_loss_is_cross_entropy_of_real_entries(tied: bool):
    model, ids, labels = small_model(tied_embeddings=tied), tokens(2, 40), tokens(2, 40, seed=2)
    labels[0, 5:9] = -100
    logits = model(ids).logits
    assert logits.shape == (2, 40, VOCAB)
    assert model.embedding.weight.shape[0] == 128
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(2, 40)
    each = model(ids, labels=labels, loss_reduction="none").loss
    assert each.dtype == torch.float32
    torch.testing.assert_close(each, expected)
    assert (each[0, 5:9] == 0).all()
    out = model(ids, labels=labels)
    assert out.logits is None
    torch.testing.assert_close(out.loss, expected.sum() / 76)
    out.loss.backward()
    actual = gradients(model)
    (expected.sum() / 76).backward()
    assert_same_gradients(actual, gradients(model), 1e-4)
    # Padding rows are neither predicted nor looked up.
    assert (actual["embedding.weight"][VOCAB:] == 0).all()


def test_logits_to_keep():
    model, ids = small_model(), tokens(2, 12)
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, model(ids).logits[:, -3:])


def test_gelu_mlp_without_qk_norm():
    model, x = small_model(mlp="gelu", qk_norm=False), torch.randn(2, 3, 48)
    mlp = model.blocks[0].mlp
    assert mlp.up.weight.shape == (192, 48)
    torch.testing.assert_close(mlp(x), F.gelu(x @ mlp.up.weight.T) @ mlp.down.weight.T)
    assert not any("q_norm" in name for name, _ in model.named_parameters())
    assert model(tokens(1, 9), labels=tokens(1, 9)).loss.isfinite()


# --- Mixers ---


@every_mixer
def test_causal(mixer: str):
    model, ids = small_model(mixer), tokens(2, 40)
    changed = ids.clone()
    changed[:, 25] = (changed[:, 25] + 1) % VOCAB
    before, after = model(ids).logits, model(changed).logits
    torch.testing.assert_close(after[:, :25], before[:, :25])
    assert (after[:, 25] - before[:, 25]).abs().max() > 1e-2
    # Later tokens see the change, even beyond a window (two layers of 7 reach 12 back).
    assert (after[:, 26:31] - before[:, 26:31]).abs().amax(-1).min() > 1e-6


@every_mixer
def test_documents_are_independent(mixer: str):
    """Packed documents give the logits and the gradients of the documents one at a time."""
    model, ids, labels = small_model(mixer), tokens(2, 40), tokens(2, 40, seed=2)
    offsets = [0, 3, 4, 29, 40, 62, 80]
    cu_seqlens = torch.tensor([*offsets, 80, 80], dtype=torch.int32)
    packed = model(ids, cu_seqlens=cu_seqlens).logits.flatten(0, 1)
    alone = [model(ids.flatten()[None, a:b]).logits[0] for a, b in pairwise(offsets)]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-3, atol=1e-3)
    model(ids, labels=labels, cu_seqlens=cu_seqlens, loss_reduction="none").loss.sum().backward()
    actual = gradients(model)
    for a, b in pairwise(offsets):
        model(ids.flatten()[None, a:b], labels=labels.flatten()[None, a:b], loss_reduction="none").loss.sum().backward()
    assert_same_gradients(actual, gradients(model), 1e-3)


@pytest.mark.parametrize("mixer", ["power", "softmax_gated", "window", "linear"])
def test_grouped_queries_equal_repeated_keys(mixer: str):
    grouped, full = small_model(mixer), small_model(mixer, n_kv_heads=4)
    state = dict(grouped.state_dict())
    for layer in range(2):
        name = f"blocks.{layer}.mixer.qkv.weight"
        q, k, v = state[name].split([32, 16, 16])
        k, v = (x.view(2, 8, 48).repeat_interleave(2, 0).flatten(0, 1) for x in (k, v))
        state[name] = torch.cat([q, k, v])
        for gate in (f"blocks.{layer}.mixer.gate.weight", f"blocks.{layer}.mixer.gate.bias"):
            if gate in state:
                state[gate] = state[gate].repeat_interleave(2, 0)
    full.load_state_dict(state)
    ids = tokens(2, 40)
    torch.testing.assert_close(full(ids).logits, grouped(ids).logits, rtol=1e-4, atol=1e-4)


@every_mixer
def test_learns(mixer: str):
    """The second half repeats the first: 40 steps take the loss well below that of a model that only counts tokens."""
    model = GPT(small_config(mixer))
    half = tokens(4, 16)
    ids = torch.cat([half, half], dim=1)
    labels = ids.roll(-1, 1)
    labels[:, -1] = -100
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = model(ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert abs(losses[0] - math.log(VOCAB)) < 0.3
    assert losses[-1] < 0.5


# --- Memory, precision, compilation ---


@every_mixer
def test_activation_checkpointing_changes_nothing(mixer: str):
    plain, checkpointed = small_model(mixer), small_model(mixer, activation_checkpointing=True)
    ids, labels = tokens(2, 40), tokens(2, 40, seed=2)
    losses = []
    for model in (plain, checkpointed):
        loss = model(ids, labels=labels, collect_stats=True).loss
        loss.backward()
        losses.append(loss.detach())
    assert torch.equal(*losses)
    assert_same_gradients(gradients(checkpointed), gradients(plain), 1e-6)


def test_activation_checkpointing_keeps_one_tensor_per_block():
    def saved_bytes(checkpointing: bool) -> int:
        model, total = small_model(activation_checkpointing=checkpointing), 0

        def pack(x: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += x.numel() * x.element_size()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(tokens(2, 40)).logits.sum()
        return total

    assert saved_bytes(True) < saved_bytes(False) / 4


@every_mixer
def test_bf16_autocast(mixer: str):
    model, ids, labels = small_model(mixer), tokens(2, 40), tokens(2, 40, seed=2)
    expected = model(ids, labels=labels).loss
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids, labels=labels, collect_stats=True)
    out.loss.backward()
    assert out.loss.dtype == torch.float32
    assert all(grad.isfinite().all() and grad.dtype == torch.float32 for grad in gradients(model).values())
    assert abs(out.loss.item() / expected.item() - 1) < 0.03


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("mixer", ["softmax", "softmax_gated", "linear", "hybrid", "power_spread"])
def test_compiles_whole(mixer: str, checkpointing: bool):
    torch._dynamo.reset()
    model, ids, labels = (
        small_model(mixer, activation_checkpointing=checkpointing),
        tokens(2, 40),
        tokens(2, 40, seed=2),
    )
    cu_seqlens = torch.tensor([0, 12, 40, 80], dtype=torch.int32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out = compiled(ids, labels=labels, cu_seqlens=cu_seqlens, collect_stats=True)
    out.loss.backward()
    actual = gradients(model)
    expected = model(ids, labels=labels, cu_seqlens=cu_seqlens, collect_stats=True)
    expected.loss.backward()
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(out.stats, expected.stats)
    assert_same_gradients(actual, gradients(model), 1e-4)


# --- Stats ---


def test_stats_of_power_layers():
    model, ids = small_model("hybrid", qk_norm=False), tokens(2, 40)
    assert model(ids).stats == {}
    out = model(ids, collect_stats=True)
    assert set(out.stats) == {"power/gate_half_life/1", "power/min_normalizer/1"}
    assert not any(value.requires_grad for value in out.stats.values())
    seen = {}
    block = model.blocks[1]
    block.mixer.qkv.register_forward_hook(lambda module, inputs, output: seen.update(qkv=output, x=inputs[0]))
    model(ids)
    log_G = block.mixer._log_gates(seen["x"])
    torch.testing.assert_close(out.stats["power/gate_half_life/1"], math.log(0.5) / log_G.mean())
    # The definition in fp64, d_i = sum over j <= i of (q_i.k_j / sqrt(D))^2 exp(G_i - G_j), with the rotation as a
    # product of complex numbers.
    q, k, _ = seen["qkv"].double().view(2, 40, 8, 8).split([4, 2, 2], dim=2)
    angles = torch.arange(40)[:, None] * 10_000.0 ** (-torch.arange(4) / 4)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None].to(torch.complex128)
    q, k = (torch.complex(x[..., :4], x[..., 4:]) * turn for x in (q, k))
    scores = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(2, 2).conj()).real / 8**0.5
    G = log_G.double().cumsum(1).repeat_interleave(2, 2).transpose(1, 2)
    weights = scores**2 * (G[..., :, None] - G[..., None, :]).tril().exp()
    torch.testing.assert_close(
        out.stats["power/min_normalizer/1"].double(), weights.tril().sum(-1).min(), rtol=1e-3, atol=0
    )


def test_half_life_at_init():
    stats = GPT(ModelConfig(n_layers=1, vocab_size=VOCAB))(tokens(1, 8), collect_stats=True).stats
    assert abs(stats["power/gate_half_life/0"].item() - 692.8) < 1.0


def test_ungated_power_has_no_half_life():
    model = GPT(ModelConfig(n_layers=1, vocab_size=VOCAB, mixer=MixerConfig(gated=False)))
    assert set(model(tokens(1, 8), collect_stats=True).stats) == {"power/min_normalizer/0"}

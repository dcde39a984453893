"""Sampling, generation of text, and `powertrain generate` on a run directory."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from powertrain.cli import main as powertrain
from powertrain.config import compose, to_values
from powertrain.data.tokenizers import byte_tokenizer
from powertrain.inference.generate import generate_text, generate_tokens, load_run, sample
from powertrain.models.config import MixerConfig, ModelConfig
from powertrain.models.gpt import GPT
from powertrain.run_status import RunStatus, write_status
from powertrain.training.checkpoint import Checkpoint, CheckpointError, CheckpointStore
from tests.models.small import small_model, tokens


def generate(model: GPT, prompt: torch.Tensor, count: int, **arguments: object) -> torch.Tensor:
    return torch.stack(list(generate_tokens(model, prompt, max_new_tokens=count, **arguments)), dim=1)


def draws(logits: torch.Tensor, n: int = 4000, **arguments: object) -> torch.Tensor:
    """Frequencies of each token among n samples."""
    values = {"temperature": 1.0, "top_k": None, "top_p": None, **arguments}
    tokens = sample(logits.expand(n, -1), generator=torch.Generator().manual_seed(0), **values)
    return torch.bincount(tokens, minlength=len(logits)) / n


# --- Sampling ---


def test_sample_follows_the_probabilities():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    torch.testing.assert_close(draws(logits), logits.exp(), atol=0.03, rtol=0)
    cold = (logits / 0.5).softmax(0)
    torch.testing.assert_close(draws(logits, temperature=0.5), cold, atol=0.03, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        ({"top_k": 1}, 1),
        ({"top_k": 3}, 3),
        ({"top_k": 99}, 4),
        ({"top_p": 0.4}, 1),
        ({"top_p": 0.6}, 2),
        ({"top_p": 0.81}, 3),
        ({"top_p": 1.0}, 4),
        ({"top_k": 2, "top_p": 0.6}, 1),
    ],
)
def test_sample_keeps_the_likeliest(arguments: dict, kept: int):
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    # Among the top 2, the first has probability 0.5 / 0.8 = 0.625 and alone reaches 0.6.
    expected = torch.where(torch.arange(4) < kept, logits.exp(), 0.0)
    order = torch.tensor([2, 0, 3, 1])
    frequencies = draws(logits[order], **arguments)
    torch.testing.assert_close(frequencies, (expected / expected.sum())[order], atol=0.03, rtol=0)


def test_temperature_zero_is_greedy():
    model, prompt = small_model(), tokens(2, 9)
    out, ids = generate(model, prompt, 5, temperature=0.0), prompt
    for _ in range(5):
        ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(out, ids[:, 9:])


@pytest.mark.parametrize("temperature", [1e-30, 1e-45, 1e-60])
def test_the_smallest_temperatures_are_greedy(temperature: float):
    logits = torch.tensor([-7.0, 90.0, 3.0, 89.0])
    assert draws(logits, n=9, temperature=temperature).tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("logit", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_is_drawn_from_logits_that_are_not_finite(logit: float, temperature: float):
    with pytest.raises(ValueError, match="logits are not finite"):
        draws(torch.tensor([0.0, logit]), temperature=temperature)


# --- Generation ---


def test_seed_decides():
    model, prompt = small_model(), tokens(2, 9)
    first, again, other = (generate(model, prompt, 30, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (2, 30)
    assert first.max() < model.config.vocab_size
    assert not torch.is_inference_mode_enabled()


def test_generate_nothing():
    assert list(generate_tokens(small_model(), tokens(1, 3), max_new_tokens=0)) == []


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"prompt": torch.zeros(1, 0, dtype=torch.int64)}, r"\(1, 0\)"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1"),
        ({"temperature": -0.5}, "temperature=-0.5"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"seed": 2**64}, r"seed=18446744073709551616: must be at least -2\^63 and below 2\^64"),
        ({"seed": -(2**63) - 1}, "seed=-9223372036854775809"),
    ],
)
def test_refuses(arguments: dict, text: str):
    values = {"prompt": tokens(1, 3), "max_new_tokens": 3, **arguments}
    with pytest.raises(ValueError, match=text):
        list(generate_tokens(small_model(), **values))


class Script:
    """Stands for a model that says given tokens, whatever it is asked."""

    def __init__(self, ids: list[int], vocab_size: int) -> None:
        self.ids, self.vocab_size, self.asked = ids, vocab_size, []
        self.config = ModelConfig(vocab_size=vocab_size)
        self.embedding = torch.nn.Embedding(1, 1)

    def __call__(self, ids: torch.Tensor, **arguments: object):
        self.asked.append(ids[0].tolist())
        logits = torch.full((1, 1, self.vocab_size), -1e9)
        logits[0, 0, self.ids[len(self.asked) - 1]] = 0.0
        return type("Output", (), {"logits": logits})


def test_text_starts_a_document_and_ends_with_it():
    tokenizer = byte_tokenizer()
    model = Script([*"naïve €uro".encode(), tokenizer.eod_id, *b"never"], tokenizer.vocab_size)
    pieces = list(generate_text(model, tokenizer, "A", max_new_tokens=100))
    assert "".join(pieces) == "naïve €uro"
    # No piece ends within a character.
    assert not any("\ufffd" in piece for piece in pieces)
    assert model.asked[0] == [tokenizer.eod_id, ord("A")]
    assert model.asked[1] == [ord("n")]


def test_text_shows_bytes_that_are_no_character():
    tokenizer = byte_tokenizer()
    model = Script([*b"a\xffb"], tokenizer.vocab_size)
    assert "".join(generate_text(model, tokenizer, "", max_new_tokens=3)) == "a\ufffdb"


# --- Runs ---


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory as training leaves it: resolved config, tokenizer, checkpoints with links."""
    directory = tmp_path / "runs" / "small"
    directory.mkdir(parents=True)
    store = CheckpointStore(directory / "checkpoints")
    config = compose(["model=1m", "mixer=hybrid_power_window", "model.n_layers=4", "mixer.window=8", "name=small"])
    (directory / "config.yaml").write_text(yaml.safe_dump(to_values(config)))
    tokenizer = byte_tokenizer()
    tokenizer.save(directory / "tokenizer")
    for step in (1, 2):
        torch.manual_seed(step)
        model = GPT(ModelConfig(**{**vars(config.model), "vocab_size": tokenizer.vocab_size}))
        state = {f"model.{name}": value for name, value in model.state_dict().items()}
        store.save(step, state, {}, val_loss=float(step))
    return directory


def test_load_run_takes_the_best_checkpoint_or_the_one_given(run: Path):
    checkpoints = run / "checkpoints"
    best, tokenizer = load_run(run)
    assert tokenizer.vocab_size == best.config.vocab_size == 257
    assert best.config.mixer.kinds == ("window", "window", "window", "power")
    assert not best.training
    saved = load_file(checkpoints / "step-00000001" / "rank-00000.safetensors")
    assert all(torch.equal(saved[f"model.{name}"], value) for name, value in best.state_dict().items())
    for path in (checkpoints / "last", checkpoints / "step-00000002"):
        last, _ = load_run(path)
        assert not torch.equal(last.embedding.weight, best.embedding.weight)
    (checkpoints / "best").unlink()
    assert torch.equal(load_run(run)[0].embedding.weight, last.embedding.weight)


def test_command_prints_prompt_and_continuation(run: Path, capsys: pytest.CaptureFixture):
    arguments = ["generate", str(run), "--prompt", "def f(", "--max-new-tokens", "12", "--seed", "3", "--device", "cpu"]
    assert powertrain(arguments) == 0
    text = capsys.readouterr().out
    model, tokenizer = load_run(run)
    expected = "".join(generate_text(model, tokenizer, "def f(", max_new_tokens=12, temperature=0.8, seed=3))
    assert text == f"def f({expected}\n"
    assert len(expected) > 3


def test_command_takes_seeds_of_64_bits_and_says_so(run: Path, capsys: pytest.CaptureFixture):
    for seed, code in ((2**64 - 1, 0), (-(2**63), 0), (2**64, 2), (-(10**30), 2)):
        assert powertrain(["generate", str(run), "--max-new-tokens", "1", "--device", "cpu", f"--seed={seed}"]) == code
        error = capsys.readouterr().err
        assert (f"powertrain generate: seed={seed}: must be at least" in error) == (code == 2)


def test_command_refuses_a_prompt_that_is_no_text(run: Path, capsys: pytest.CaptureFixture):
    assert powertrain(["generate", str(run), "--prompt", "caf\udce9"]) == 2
    out, error = capsys.readouterr()
    assert (out, error) == ("", "powertrain generate: --prompt 'caf\\udce9' is not text in UTF-8\n")


def test_command_says_how_far_an_unfinished_run_is(run: Path, capsys: pytest.CaptureFixture):
    def said(path: Path) -> str:
        assert powertrain(["generate", str(path), "--max-new-tokens", "1", "--device", "cpu"]) == 0
        return capsys.readouterr().err

    assert said(run) == ""  # copied without its status
    write_status(run, RunStatus("interrupted", step=2, total_steps=1200))
    line = "powertrain generate: the run is not finished: its weights are those of step "
    assert said(run) == f"{line}1 of 1,200 (0.1%), validation loss 1.0000 nats per token\n"
    assert said(run / "checkpoints" / "last") == f"{line}2 of 1,200 (0.2%), validation loss 2.0000 nats per token\n"
    # Killed before its first heartbeat, and saved where it was not validated.
    write_status(run, RunStatus("running"))
    CheckpointStore(run / "checkpoints").save(3, weights(run), {})
    assert said(run / "checkpoints" / "last") == f"{line}3\n"
    assert powertrain(["export", str(run)]) == 0
    assert said(run / "model.safetensors") == ""
    write_status(run, RunStatus("finished", step=2, total_steps=2))
    assert said(run) == ""


@pytest.mark.parametrize(
    ("gpus", "device", "allowed"), [(0, "cuda", "cpu"), (0, "foo", "cpu"), (2, "cuda:2", "cuda, cpu, cuda:0, cuda:1")]
)
def test_command_refuses_a_device_that_is_not_there(
    gpus: int, device: str, allowed: str, run: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert powertrain(["generate", str(run), "--device", device]) == 2
    sentence = f"powertrain generate: --device {device} is no device of this machine; allowed: {allowed}\n"
    assert capsys.readouterr().err == sentence


def weights(run: Path) -> dict[str, torch.Tensor]:
    return {f"model.{name}": value for name, value in load_run(run)[0].state_dict().items()}


def test_command_explains_what_is_missing(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    def error(path: Path) -> str:
        assert powertrain(["generate", str(path)]) == 2
        return capsys.readouterr().err

    config = (run / "config.yaml").read_text()
    assert "config.yaml" in error(tmp_path)
    assert "config.yaml" in error(run / "checkpoints" / "step-00000009")
    weights = run / "checkpoints" / "step-00000001" / "rank-00000.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "is not a usable checkpoint: rank-00000.safetensors has 1000 bytes instead of" in error(run)
    weights.with_name("manifest.json").write_text("{}")
    assert "is not a usable checkpoint: its manifest is damaged" in error(run)
    store = CheckpointStore(run / "checkpoints")
    store.save(1, {"model.embedding.weight": torch.zeros(3)}, {}, val_loss=0.0)
    message = error(run)
    assert "does not hold the weights of the model" in message
    assert "size mismatch for model.embedding.weight" in message or "is missing" in message
    (run / "config.yaml").write_text("name: [")
    assert f"{run / 'config.yaml'} is not YAML" in error(run)
    (run / "config.yaml").write_text(config)
    shutil.rmtree(run / "checkpoints")
    assert "neither checkpoints/best nor checkpoints/last" in error(run)


def test_an_exported_file_is_the_checkpoint(run: Path, capsys: pytest.CaptureFixture):
    last = run / "checkpoints" / "last"
    assert powertrain(["export", str(last)]) == 0
    exported = run / "model.safetensors"
    assert f"parameters in {exported}" in capsys.readouterr().out
    expected, got = load_run(last)[0].state_dict(), load_run(exported)[0].state_dict()
    assert expected.keys() == load_file(exported).keys()
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    assert powertrain(["export", str(run), "--output", str(run / "best" / "weights.safetensors")]) == 0
    best = load_file(run / "best" / "weights.safetensors")
    assert not torch.equal(best["embedding.weight"], expected["embedding.weight"])
    exported.write_bytes(exported.read_bytes()[:1000])
    assert powertrain(["generate", str(exported)]) == 2
    assert "does not hold the weights" in capsys.readouterr().err


def test_a_flipped_bit_in_the_weights_is_not_taken_for_the_model(run: Path):
    weights = run / "checkpoints" / "step-00000001" / "rank-00000.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"the SHA-256 of rank-00000\.safetensors is not the one"):
        load_run(run)


def test_a_pickle_is_not_executed(run: Path, tmp_path: Path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"state_dict": Bomb()}, run / "checkpoints" / "step-00000001" / "rank-00000.safetensors")
    with pytest.raises(ValueError, match="bytes instead of"):
        load_run(run)
    unverified = Checkpoint(run / "checkpoints" / "step-00000001", verify=False)
    with pytest.raises(CheckpointError, match="cannot be read"):
        unverified.read_into({name: torch.empty(shape) for name, shape in unverified.shapes.items()})
    assert not (tmp_path / "executed").exists()


def test_softmax_and_power_generate_alike_on_repetition():
    """A trained copier continues a pattern: decoding uses what the cache holds."""
    pattern = torch.tensor([3, 1, 4, 15, 9, 2, 6])
    ids = pattern.repeat(6)[None]
    for kind in ("power", "softmax"):
        torch.manual_seed(0)
        config = ModelConfig(n_layers=2, d_model=32, n_heads=4, vocab_size=16, mixer=MixerConfig(kind=kind))
        model = GPT(config)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(30):
            model(ids[:, :-1], labels=ids[:, 1:]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert torch.equal(generate(model, ids[:, :14], 14, temperature=0.0)[0], ids[0, 14:28]), kind

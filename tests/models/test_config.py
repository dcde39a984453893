"""The schema of a model: what it derives, what it refuses, and the sizes and mixers of `conf/`."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from powertrain.config import share_dir
from powertrain.models.config import MixerConfig, ModelConfig
from powertrain.schema import build

MODELS = sorted(path.stem for path in (share_dir("conf") / "model").glob("*.yaml"))
MIXERS = sorted(path.stem for path in (share_dir("conf") / "mixer").glob("*.yaml"))


def load(group: str, name: str) -> dict:
    return yaml.safe_load((share_dir("conf") / group / f"{name}.yaml").read_text())


def test_derived_fields():
    config = ModelConfig(d_model=192, n_heads=6)
    assert (config.head_dim, config.n_kv_heads, config.d_ff) == (32, 6, 512)
    assert ModelConfig(d_model=192, n_heads=6, mlp="gelu").d_ff == 768
    # 8/3 * 200 = 533.3, up to a multiple of 64.
    assert ModelConfig(d_model=200, n_heads=4).d_ff == 576
    assert ModelConfig(d_model=192, n_heads=5, head_dim=64, n_kv_heads=1).n_kv_heads == 1


def test_hybrid_pattern_repeats_over_layers():
    config = ModelConfig(n_layers=5, mixer=MixerConfig(kind="window, window,power"))
    assert [mixer.kind for mixer in config.layer_mixers] == ["window", "window", "power", "window", "window"]
    assert [mixer.gated for mixer in config.layer_mixers] == [False, False, True, False, False]


@pytest.mark.parametrize(
    ("kind", "gated", "expected"),
    [
        ("power", None, True),
        ("linear", None, True),
        ("softmax", None, False),
        ("window", None, False),
        ("softmax", True, True),
        ("power", False, False),
    ],
)
def test_gate_defaults(kind: str, gated: bool | None, expected: bool):
    assert MixerConfig(kind=kind, gated=gated).for_layer(0).gated is expected


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"n_heads": 3}, ["n_heads=3", "d_model=128"]),
        ({"n_kv_heads": 3}, ["n_kv_heads=3", "n_heads=4", "[1, 2, 4]"]),
        ({"head_dim": 33}, ["head_dim=33", "even"]),
        ({"mlp": "relu"}, ["'relu'", "swiglu, gelu"]),
        ({"n_layers": 0}, ["n_layers=0"]),
        ({"d_ff": -1}, ["d_ff=-1"]),
        ({"vocab_size": 0}, ["vocab_size=0"]),
        ({"norm_eps": 0.0}, ["norm_eps=0.0"]),
        ({"norm_eps": math.nan}, ["norm_eps=nan: must be positive and finite"]),
        ({"rope_theta": math.inf}, ["rope_theta=inf: must be positive and finite"]),
        ({"init_std": math.inf}, ["init_std=inf: must be positive and finite"]),
        ({"n_layers": 1, "mixer": MixerConfig(kind="power,softmax")}, ["'power,softmax'", "n_layers=1"]),
    ],
)
def test_model_refuses(arguments: dict, parts: list[str]):
    with pytest.raises(ValueError, match=r"model|mixer") as error:
        ModelConfig(**arguments)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"kind": "power,atention"}, ["'atention'", "power, softmax, window, linear"]),
        ({"kind": ""}, ["power, softmax, window, linear"]),
        ({"deg": 3}, ["deg=3", "2 and 4"]),
        ({"deg": 1}, ["deg=1", "linear"]),
        ({"gate_init": 1.0}, ["gate_init=1.0: must be a number between 0 and 1, exclusive, or two of them"]),
        ({"gate_init": (0.9, 1.0)}, ["gate_init=[0.9, 1.0]: must be a number between 0 and 1, exclusive"]),
        ({"gate_init": [0.0, 0.9]}, ["gate_init=[0.0, 0.9]"]),
        ({"gate_init": (float("nan"), 0.9)}, ["gate_init=[nan, 0.9]"]),
        ({"gate_init": (0.9,)}, ["gate_init=[0.9]", "two of them"]),
        ({"gate_init": (0.9, 0.99, 0.999)}, ["gate_init=[0.9, 0.99, 0.999]", "two of them"]),
        ({"gate_init": "0.9"}, ["gate_init='0.9'", "must be a number"]),
        ({"gate_init": ("0.9", "0.99")}, ["gate_init=['0.9', '0.99']", "must be a number"]),
        ({"gate_init": True}, ["gate_init=True", "must be a number"]),
        ({"gate_init": [True, 0.9]}, ["gate_init=[True, 0.9]", "must be a number"]),
        ({"chunk_size": 0}, ["chunk_size=0"]),
        ({"switch_over_seq_len": -1}, ["switch_over_seq_len=-1"]),
        ({"window": 0}, ["window=0"]),
    ],
)
def test_mixer_refuses(arguments: dict, parts: list[str]):
    with pytest.raises(ValueError, match=r"mixer\.") as error:
        MixerConfig(**arguments)
    for part in parts:
        assert part in str(error.value)


def test_a_pair_of_gates_is_a_tuple_whatever_it_is_given_as():
    for pair in ([0.9, 0.9999], (0.9, 0.9999), OmegaConf.create([0.9, 0.9999])):
        mixer = MixerConfig(gate_init=pair)
        assert mixer == build(MixerConfig, {"gate_init": [0.9, 0.9999]})
        assert type(mixer.gate_init) is type(mixer.for_layer(0).gate_init) is tuple
        assert hash(mixer) == hash(MixerConfig(gate_init=(0.9, 0.9999)))


def test_padded_vocabulary_needs_a_vocabulary():
    assert ModelConfig(vocab_size=257).padded_vocab_size == 320
    assert ModelConfig(vocab_size=320).padded_vocab_size == 320
    with pytest.raises(ValueError, match="vocab_size=None"):
        _ = ModelConfig().padded_vocab_size


@pytest.mark.parametrize("name", MODELS)
def test_model_files_hold_every_key_and_use_kernel_head_dims(name: str):
    values = load("model", name)
    config = build(ModelConfig, values)
    assert set(values) == set(ModelConfig.__dataclass_fields__) - {"mixer"}
    assert config.head_dim in (32, 64, 128)
    # What the file says is what the run gets: nothing is left to derive.
    assert all(getattr(config, key) == value for key, value in values.items())


@pytest.mark.parametrize("name", MIXERS)
def test_mixer_files_hold_every_key_and_fit_the_small_models(name: str):
    values = load("mixer", name)
    mixer = build(MixerConfig, values)
    assert set(values) == set(MixerConfig.__dataclass_fields__)
    build(ModelConfig, {**load("model", "1m"), "mixer": mixer})


def test_all_sizes_and_mixers_are_there():
    assert set(MODELS) >= {"1m", "10m", "35m", "124m", "350m", "760m", "1.3b", "3b"}
    assert set(MIXERS) >= {"power", "power_deg4", "softmax", "softmax_gated", "window", "linear"}


def test_config_imports_no_torch():
    code = "import sys, powertrain.models.config; sys.exit('torch' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0

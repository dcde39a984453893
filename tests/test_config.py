import dataclasses
import functools
import math
import os
import re
import subprocess
import sys
from typing import Any, get_args

import pytest
import yaml

from powertrain import config as run_config
from powertrain.cli import main
from powertrain.config import (
    FIRST_IDENTITY,
    GROUPS,
    NOT_IDENTITY,
    RunConfig,
    changes,
    compose,
    from_values,
    options,
    override_keys,
    share_dir,
    to_values,
)
from powertrain.schema import ConfigError, leaf_keys
from powertrain.training.config import TrainerConfig

# What the options of `data` cannot know by themselves.
NEEDED = {
    "text": ["data.files=corpus/*.txt"],
    "json": ["data.files=corpus/*.jsonl"],
    "parquet": ["data.files=corpus/*.parquet"],
    "hub": ["data.hub_path=corpus"],
}


def every_option():
    return [(group, name) for group in GROUPS for name in options(group, [share_dir("conf")])]


@pytest.mark.parametrize(("group", "name"), every_option(), ids=lambda value: value)
def test_every_entry_of_conf_composes_and_validates(group, name):
    config = compose([f"{group}={name}", *(NEEDED.get(name, []) if group == "data" else [])])
    assert from_values(yaml.safe_load(yaml.safe_dump(to_values(config)))) == config


def test_every_group_of_conf_is_known():
    assert sorted(p.name for p in share_dir("conf").iterdir() if p.is_dir()) == sorted(GROUPS)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["modle=1m"], "unknown option 'modle': did you mean 'model'?"),
        (["model=125m"], "unknown option model=125m: did you mean '124m'?"),
        (["trainer.max_tokn=3"], "unknown option 'trainer.max_tokn': did you mean 'trainer.max_tokens'?"),
        (["+trainer.max_tokn=3"], "did you mean 'trainer.max_tokens'?"),
        (["max_tokens=3"], "did you mean 'trainer.max_tokens'?"),
        (["trainer.lr=1e-3"], "unknown option 'trainer.lr': did you mean 'optim.lr'?"),
        (["trainer.lrr=1"], "unknown option 'trainer.lrr': did you mean 'optim.lr'?"),
        (["optim.warmpu=1"], "unknown option 'optim.warmpu': did you mean 'schedule.warmup'?"),
        (["model.layers=1"], "unknown option 'model.layers': did you mean 'model.n_layers'?"),
        (["trainer.batch=1"], "did you mean 'trainer.global_batch_tokens' or 'trainer.micro_batch_size'?"),
        (["optim.wd=1"], "'optim.wd': allowed: optim.betas, optim.eps, optim.fused, optim.lr, optim.weight_decay"),
        (["trainer.rate=1"], "unknown option 'trainer.rate': allowed: trainer.accelerator, "),
        (["trainer.shape=linear"], "unknown option 'trainer.shape': did you mean 'schedule.shape'?"),
        (["trainer.vocab_size=9"], "did you mean 'data.tokenizer.vocab_size' or 'model.vocab_size'?"),
        (["mixer.chunk_size=4096"], "mixer.chunk_size=4096 is longer than trainer.context_length=1024"),
        (["mixer=window", "mixer.window=4096"], "mixer.window=4096 is wider than trainer.context_length=1024"),
        (["trainer.max_steps=3", "trainer.max_tokens=5e6"], "give one budget"),
        (["trainer.max_steps=3", "budget.value=5"], "trainer.max_steps=3 and budget.value=5 both set the length"),
        (["data=text"], "needs data.files"),
        (["data=hub"], "data.hub_path"),
        (["optim.lr=abc"], "optim.lr='abc' is not allowed: it must be a number"),
        (["optim.lr=-1"], "optim.lr"),
        (["mixer.deg=3"], "mixer.deg=3"),
        (
            ["mixer.gate_init=[0.9,1]"],
            "mixer.gate_init=[0.9, 1.0]: must be a number between 0 and 1, exclusive, or two",
        ),
        (
            ["mixer.gate_init=[0.9]"],
            "mixer.gate_init=[0.9] is not allowed: it must be a number or [a number, a number]",
        ),
        (["mixer.gate_init=true"], "mixer.gate_init=True is not allowed: it must be a number or [a number, a number]"),
        (
            ["mixer.gate_init=slow"],
            "mixer.gate_init='slow' is not allowed: it must be a number or [a number, a number]",
        ),
        (["mixer.gate_init=[0.9,true]"], "mixer.gate_init[1]=True is not allowed: it must be a number"),
        (["model.n_heads=7", "model.head_dim=0"], "model.n_heads=7 does not divide"),
        (["model=1m,10m"], "one run takes one"),
        (["data.files=[a"], "cannot read the override 'data.files=[a'"),
        (["trainer.max_steps"], "cannot read the override 'trainer.max_steps'"),
        (["run_id=../x"], "run_id='../x' is not allowed: it names a directory"),
        (["seed=-1"], "seed=-1 is not allowed"),
        (["seed=4294967296"], "seed=4294967296 is not allowed: it must be at least 0 and below 2^32"),
        (['sample.prompt="caf\udce9"'], r"sample.prompt='caf\udce9' is not text in UTF-8"),
        (["sample.temperature=-1"], "sample.temperature=-1.0 is not allowed"),
        (["sample.temperature=nan"], "sample.temperature=nan is not allowed: it must be 0 or more, and finite"),
        (["sample.temperature=inf"], "sample.temperature=inf is not allowed: it must be 0 or more, and finite"),
    ],
)
def test_each_mistake_is_one_clear_sentence(overrides, message, capsys):
    assert main(["train", "--cfg", "job", *overrides]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    sentence, *rest = captured.err.strip().splitlines()
    assert message in sentence
    assert rest == []


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_no_option_takes_what_is_no_finite_number(bad):
    numbers = [key for key, kind in leaf_keys(RunConfig).items() if float in (kind, *get_args(kind))]
    assert {"optim.lr", "model.init_std", "sample.temperature", "trainer.grad_clip", "budget.value"} <= set(numbers)
    config = compose([])
    for key in numbers:
        values = to_values(config)
        *sections, name = key.replace("model.mixer.", "mixer.").split(".")
        part = functools.reduce(dict.__getitem__, sections, values)
        part[name] = [bad, bad] if isinstance(part[name], list | tuple) else bad
        with pytest.raises(ConfigError, match=re.escape(name)):
            from_values(values)


def test_only_what_powertrain_did_not_say_itself_hints_at_the_traceback(monkeypatch, capsys):
    def theirs():
        int("no number")

    monkeypatch.setattr("powertrain.runs.main", lambda _: theirs())
    assert main(["runs"]) == 2
    assert capsys.readouterr().err.splitlines()[1:] == ["(POWERTRAIN_TRACEBACK=1 shows where this arose)"]
    for arguments in (
        ["bench", "distributed", "--processes", "64"],
        ["generate", "nowhere"],
        ["train", "--config", "no"],
    ):
        assert main(arguments) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_pattern_of_layers_needs_no_quotes():
    kinds = compose(["mixer.kind=power,power,softmax"]).model.mixer.kinds
    assert kinds == compose(['mixer.kind="power,power,softmax"']).model.mixer.kinds == ("power", "power", "softmax")


def test_gates_may_start_at_a_pair():
    config = compose(["mixer.gate_init=[0.9,0.9999]"])
    assert config.model.mixer.gate_init == (0.9, 0.9999)
    hash(config.model)
    saved = yaml.safe_load(yaml.safe_dump(to_values(config)))
    assert saved["mixer"]["gate_init"] == [0.9, 0.9999]
    assert from_values(saved) == config
    assert from_values(saved).resolved_run_id() == config.resolved_run_id() != compose([]).resolved_run_id()
    assert changes(from_values(saved), config) == []
    assert changes(compose([]), config) == [("model.mixer.gate_init", 0.999, (0.9, 0.9999))]


def test_a_key_that_its_yaml_leaves_at_the_default_can_be_set():
    assert compose(["data.split=tail", "trainer.compile=true"]).data.split == "tail"


def test_a_directory_of_ones_own_groups(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /model: 1m\noptim:\n  lr: 0.5\n"
    )
    config = compose(["experiment=mine"], tmp_path)
    assert (config.name, config.optim.lr, config.model.n_layers) == ("mine", 0.5, compose(["model=1m"]).model.n_layers)
    with pytest.raises(ConfigError, match="did you mean 'mine'"):
        compose(["experiment=min"], tmp_path)
    with pytest.raises(ConfigError, match="is not a directory"):
        compose([], tmp_path / "absent")


def test_run_id_follows_the_numbers_and_not_the_place():
    base = compose([]).resolved_run_id()
    assert base.startswith("10m-power-python_stdlib-")
    same = [
        "paths.runs=elsewhere",
        "trainer.devices=2",
        "trainer.accelerator=gpu",
        "logger=wandb",
        "data.num_workers=3",
        "debug=anomaly",
        "debug.profiler=simple",
    ]
    assert compose(same).resolved_run_id() == base
    for other in ("seed=1", "optim.lr=0.5", "mixer.deg=4", "trainer.max_steps=5", "data.split_seed=1", "debug=overfit"):
        assert compose([other]).resolved_run_id() != base
    assert compose(["run_id=mine"]).resolved_run_id() == "mine"


def test_ids_of_what_exists_stay_as_they_are():
    """Records are kept by these ids: a change here makes every committed sweep start again."""
    assert compose([]).resolved_run_id() == "10m-power-python_stdlib-f16c2117"
    others = ["model=124m", "mixer=softmax", "data=hub", "data.hub_path=some/set", "schedule=cosine", "optim.lr=2e-3"]
    assert compose([*others, "name=other"]).resolved_run_id() == "other-c1d945a1"
    assert compose(["experiment=quickstart"]).resolved_run_id() == "quickstart-bdd7d8b8"


def test_a_precision_left_to_the_device_has_the_id_of_the_first_default():
    default = compose([])
    assert default.trainer.precision == "auto"
    assert default.identity() == compose(["trainer.precision=bf16-mixed"]).identity()
    assert default.identity() != compose(["trainer.precision=32-true"]).identity()


def test_a_later_field_changes_an_id_only_where_it_is_set():
    @dataclasses.dataclass(frozen=True)
    class LaterTrainer(TrainerConfig):
        rings: int = 1
        bounds: tuple[int, ...] = dataclasses.field(default_factory=lambda: (1, 2))

    @dataclasses.dataclass(frozen=True)
    class Group:
        size: int = 0

    @dataclasses.dataclass(frozen=True)
    class LaterRun(RunConfig):
        group: Group = dataclasses.field(default_factory=Group)

    config = compose(["name=n"])
    parts = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    trainer = {f.name: getattr(config.trainer, f.name) for f in dataclasses.fields(config.trainer)}

    def later(group: Group, **changed: Any) -> str:
        values = {**parts, "trainer": LaterTrainer(**{**trainer, **changed}), "group": group}
        return LaterRun(**values).resolved_run_id()

    assert later(Group()) == config.resolved_run_id()
    set_somewhere = [later(Group(), rings=2), later(Group(), bounds=(1,)), later(Group(1))]
    assert len({config.resolved_run_id(), *set_somewhere}) == 4
    # Written out or not, a default is the same.
    assert later(Group(), rings=1, bounds=(1, 2)) == config.resolved_run_id()


def test_first_identity_is_what_there_is():
    for group, keys in FIRST_IDENTITY.items():
        for key in keys:
            name = f"{group.removeprefix('model.')}.{key}".lstrip(".")
            assert any(k == name or k.startswith(f"{name}.") for k in override_keys()), name
            assert key not in NOT_IDENTITY.get(group, ())


def test_what_is_not_identity_exists():
    for group, keys in NOT_IDENTITY.items():
        for key in keys:
            name = f"{group}.{key}" if group else key
            assert any(k == name or k.startswith(f"{name}.") for k in override_keys())


def test_saved_values_with_an_unknown_key_are_refused():
    values = to_values(compose([]))
    values["optim"]["lrr"] = 1
    with pytest.raises(ConfigError, match=r"unknown option 'optim\.lrr': did you mean 'optim\.lr'"):
        from_values(values)
    del values["optim"]["lrr"]
    values["trainer"]["lr"] = 1
    with pytest.raises(ConfigError, match=r"unknown option 'trainer\.lr': did you mean 'optim\.lr'"):
        from_values(values)


def test_compose_leaves_hydra_as_it_was():
    from hydra.core.global_hydra import GlobalHydra

    compose([])
    with pytest.raises(ConfigError):
        compose(["model=nope"])
    assert not GlobalHydra.instance().is_initialized()


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["train", "--cfg", "job"], ["--version"]])
def test_questions_are_answered_without_heavy_imports(arguments):
    probe = (
        "import sys, time; from powertrain.cli import main\n"
        f"try: main({arguments!r})\n"
        "except SystemExit: pass\n"
        "heavy = any(m in sys.modules for m in ('torch', 'lightning', 'datasets', 'wandb'))\n"
        "sys.exit(heavy or time.process_time() > 5)"  # about 0.4 s
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_unknown_commands_name_the_nearest(capsys):
    assert main(["trian"]) == 2
    assert "did you mean 'train'" in capsys.readouterr().err


def test_traceback_on_request(monkeypatch):
    monkeypatch.setenv("POWERTRAIN_TRACEBACK", "1")
    with pytest.raises(ConfigError):
        main(["train", "--cfg", "job", "modle=1m"])


def test_share_dir_of_an_installed_package_is_its_own(monkeypatch, tmp_path):
    monkeypatch.setattr(run_config, "__file__", str(tmp_path / "powertrain" / "config.py"))
    # As other packages leave in site-packages by mistake.
    (tmp_path / "pyproject.toml").touch()
    for directory in (tmp_path / "conf", tmp_path / "powertrain" / "_share" / "conf"):
        directory.mkdir(parents=True)
    assert share_dir("conf") == directory


def test_share_dir_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(run_config, "__file__", str(tmp_path / "powertrain" / "config.py"))
    with pytest.raises(FileNotFoundError, match="'conf' is missing"):
        share_dir("conf")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("trainer: {max_tokens: 1e6}\n", ["# @package _global_", "its trainer would be options of `experiment`"]),
        ("# @package _global_\nmodel: 1m\n", ["model='1m'", "override /model: 1m"]),
        ("# @package _global_\nmixer: linear\n", ["mixer='linear'", "override /mixer: linear"]),
        ("- trainer\n", ["# @package _global_", "its keys would be options of `experiment`"]),
        ("trainer: [\n", ["while parsing a flow node", "mine.yaml", "line 2"]),
        ("# caf\udce9\n", ["mine.yaml is not YAML: 'utf-8' codec can't decode byte 0xe9"]),
        ("# @package _global_\n" + 9999 * "#\n" + "name: \udce9\n", ["mine.yaml is not YAML: 'utf-8' codec can't"]),
    ],
)
def test_a_mistake_in_an_experiment_of_ones_own_is_one_sentence(tmp_path, text, words):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(text, errors="surrogateescape")
    with pytest.raises(ConfigError) as error:
        compose(["experiment=mine"], tmp_path)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", " must hold a mapping of options, and holds nothing"),
        ("- name\n", " must hold a mapping of options, and holds a list"),
        ("name: [\n", " is not YAML: while parsing a flow node"),
        ("name: \x00\n", " is not YAML: unacceptable character"),
        ("mixer: {}\n", "missing option model, data"),
        ("experiment: 3\n", "an experiment file must begin with"),
    ],
)
def test_a_mistake_in_a_saved_configuration_is_one_sentence(tmp_path, text, message, capsys):
    saved = tmp_path / "config.yaml"
    saved.write_text(text)
    assert main(["train", "--config", str(saved)]) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert message in sentence
    assert str(saved) in sentence or not message.startswith(" ")

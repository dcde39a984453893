"""The configuration of a run: its schema, its composition from `conf/` and overrides, and what contradicts itself."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_origin

from powertrain.cluster.config import ClusterConfig
from powertrain.data.config import MIN_BPE_VOCAB, DataConfig
from powertrain.models.config import MixerConfig, ModelConfig
from powertrain.schema import ConfigError, UnknownOptionError, build, closest, leaf_keys, nearest
from powertrain.training.config import (
    BudgetConfig,
    DebugConfig,
    LoggerConfig,
    OptimConfig,
    ScheduleConfig,
    TrainerConfig,
)
from powertrain.wording import counted


@dataclass(frozen=True)
class PathsConfig:
    """Where a run reads and writes."""

    runs: str = "runs"  # directory that holds one directory per run
    cache: str | None = None  # prepared tokens; null: $POWERTRAIN_CACHE, else the user's cache directory


def check_text(label: str, given: str) -> None:
    """Reject an argument whose bytes are no text, by a ValueError: they arrive as halves of surrogate pairs."""
    try:
        given.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{label}{given!a} is not text in UTF-8") from error


@dataclass(frozen=True)
class SampleConfig:
    """The text generated at the end of a run, so that one sees what the model learned."""

    prompt: str = ""  # text to continue; empty starts a new document
    max_new_tokens: int = 200  # 0 draws no sample
    temperature: float = 0.8  # 0 takes the likeliest token
    top_k: int | None = 50  # sample among this many likeliest tokens; null: all

    def __post_init__(self) -> None:
        check_text("sample.prompt=", self.prompt)
        if self.max_new_tokens < 0:
            raise ValueError(f"sample.max_new_tokens={self.max_new_tokens} is not allowed: it must be 0 or more")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"sample.temperature={self.temperature} is not allowed: it must be 0 or more, and finite")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"sample.top_k={self.top_k} is not allowed: it must be at least 1, or null")


# What a run may change without becoming another run: where it executes and what it prints, not what it computes.
NOT_IDENTITY = {
    "": ("paths", "logger", "sample", "cluster", "name", "run_id"),
    "trainer": (
        "accelerator",
        "devices",
        "num_nodes",
        "strategy",
        "fsdp_accumulation",
        "context_parallel",
        "micro_batch_size",
        "log_every_steps",
        "checkpoint_every_steps",
        "keep_checkpoints",
        "peak_flops",
        "hang_timeout",
    ),
    "data": ("num_workers",),
    "debug": ("detect_anomaly", "profiler"),
}

# Every other key that there was when ids began to be kept (run directories, records of sweeps): these are always
# hashed. A field that came later is hashed only where it differs from its default, so that what was made before keeps
# its id. Hence: add no key here, and give a later field a default that computes what was computed without it, for good.
FIRST_IDENTITY = {
    "": ("seed",),
    "model": (
        *("n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim", "mlp", "d_ff", "qk_norm", "rope_theta"),
        *("tied_embeddings", "norm_eps", "init_std", "vocab_size", "activation_checkpointing"),
    ),
    "model.mixer": ("kind", "deg", "gated", "gate_init", "chunk_size", "switch_over_seq_len", "window"),
    "data": (
        *("source", "files", "field", "encoding", "hub_path", "hub_name", "hub_split", "hub_revision", "streaming"),
        *("max_documents", "deduplicate", "split", "val_fraction", "split_seed", "max_val_tokens", "document_mask"),
        "shard_tokens",
    ),
    "data.tokenizer": ("kind", "vocab_size", "train_bytes", "path", "revision", "eod"),
    "optim": ("lr", "betas", "eps", "weight_decay", "fused"),
    "schedule": ("kind", "warmup", "decay", "final", "shape", "unit"),
    "trainer": (
        *("max_steps", "max_tokens", "context_length", "global_batch_tokens", "precision", "grad_clip", "compile"),
        *("val_every_steps", "nonfinite", "nonfinite_patience", "deterministic"),
    ),
    "budget": ("kind", "value"),
}


@dataclass(frozen=True)
class RunConfig:
    """Everything that defines a run; one field per group of `conf/`."""

    model: ModelConfig
    data: DataConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    name: str = "run"  # first part of the run id
    run_id: str | None = None  # null: `<name>-<hash of identity()>`
    seed: int = 0  # fixes the initialisation and the order of the data; below 2^32

    def __post_init__(self) -> None:
        context = self.trainer.context_length
        mixer = self.model.mixer
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} is not allowed: it must be at least 0 and below 2^32")
        for label, text in (("name", self.name), ("run_id", self.run_id)):
            if text is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", text):
                raise ValueError(
                    f"{label}={text!r} is not allowed: it names a directory, so use letters, digits, '.', '_' and '-', "
                    f"beginning with a letter or digit, at most 128 of them"
                )
        if mixer.chunk_size is not None and mixer.chunk_size > context:
            raise ValueError(
                f"mixer.chunk_size={mixer.chunk_size} is longer than trainer.context_length={context}: "
                f"give a chunk of at most the context, or null"
            )
        if "window" in mixer.kinds and mixer.window > context:
            raise ValueError(
                f"mixer.window={mixer.window} is wider than trainer.context_length={context}, so it is plain softmax: "
                f"give a window of at most the context, or mixer=softmax"
            )
        limits = {
            "trainer.max_steps": self.trainer.max_steps,
            "trainer.max_tokens": self.trainer.max_tokens,
            "budget.value": self.budget.value,
        }
        given = [f"{key}={value:g}" for key, value in limits.items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} both set the length of the run: set all but one of them to null")
        if self.cluster.kind == "slurm":
            self._check_cluster()

    def _check_cluster(self) -> None:
        """Judge what a submission would only find out when the job starts."""
        cluster, trainer = self.cluster, self.trainer
        for key, value, wanted in (
            ("trainer.num_nodes", trainer.num_nodes, cluster.nodes),
            ("trainer.devices", trainer.devices, cluster.processes_per_node),
        ):
            if value not in ("auto", 1, wanted):
                raise ValueError(
                    f"{key}={value} contradicts cluster=slurm with cluster.nodes={cluster.nodes} and "
                    f"{cluster.processes_per_node} processes on each: leave {key} out"
                )
        if trainer.accelerator == "gpu" and not cluster.gpus_per_node:
            raise ValueError("trainer.accelerator=gpu needs GPUs in the job: give cluster.gpus_per_node")
        if trainer.accelerator == "cpu" and cluster.gpus_per_node:
            raise ValueError(
                f"trainer.accelerator=cpu leaves cluster.gpus_per_node={cluster.gpus_per_node} unused: "
                f"give cluster.tasks_per_node instead"
            )
        sequences = trainer.global_batch_tokens // trainer.context_length
        if cluster.processes % trainer.context_parallel:
            raise ValueError(
                f"trainer.context_parallel={trainer.context_parallel} does not divide the job's {cluster.processes} "
                f"processes into equal groups: give a divisor of their number"
            )
        at_once = cluster.processes // trainer.context_parallel * (trainer.micro_batch_size or 1)
        if sequences % at_once:
            micro = f" of micro-batches of {trainer.micro_batch_size}" if trainer.micro_batch_size else ""
            raise ValueError(
                f"trainer.global_batch_tokens={trainer.global_batch_tokens} holds {counted(sequences, 'sequence')}, "
                f"which {counted(cluster.processes, 'process', 'processes')}{micro} cannot share evenly: give a "
                f"multiple of {at_once * trainer.context_length} tokens, or other processes"
            )

    def identity(self) -> dict[str, Any]:
        """Return what defines the numbers of the run; see `NOT_IDENTITY` and `FIRST_IDENTITY`."""
        found = _identity(self, "")
        if self.trainer.precision == "auto":
            # The default when ids began, and the same wherever the id is asked for.
            found["trainer"]["precision"] = "bf16-mixed"
        return found

    def resolved_run_id(self) -> str:
        """Return the run id: the one given, or the name and eight digits of the hash of `identity()`."""
        if self.run_id is not None:
            return self.run_id
        canonical = json.dumps(self.identity(), sort_keys=True)
        return f"{self.name}-{hashlib.sha256(canonical.encode()).hexdigest()[:8]}"


def _identity(part: Any, group: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for option in dataclasses.fields(part):
        if option.name in NOT_IDENTITY.get(group, ()):
            continue
        value = getattr(part, option.name)
        if dataclasses.is_dataclass(value):
            value = _identity(value, f"{group}.{option.name}".lstrip("."))
            if value:
                found[option.name] = value
        elif option.name in FIRST_IDENTITY.get(group, ()) or value != _default(option):
            found[option.name] = value
    return found


def _default(option: dataclasses.Field) -> Any:
    return option.default if option.default_factory is dataclasses.MISSING else option.default_factory()


# conf/ has a group `mixer` of its own, so that any mixer goes with any model size; it becomes `model.mixer`.
GROUPS = (
    "model",
    "mixer",
    "data",
    "optim",
    "schedule",
    "trainer",
    "budget",
    "logger",
    "debug",
    "cluster",
    "experiment",
)


def share_dir(name: str) -> Path:
    """Return the directory `conf` or `recipes`: beside the package in a checkout, inside it in a wheel.

    Errors:
        FileNotFoundError: neither is there.
    """
    package = Path(__file__).resolve().parent
    # What a wheel carries comes first: beside it may be another package's directory of that name.
    for candidate in (package / "_share" / name, package.parent / name):
        if candidate.is_dir():
            return candidate
    raise FileNotFoundError(
        f"powertrain's directory '{name}' is missing beside or inside {package}; reinstall powertrain"
    )


def options(group: str, directories: list[Path]) -> list[str]:
    """Return the names one may give for a group: the YAML files in any of the configuration directories."""
    return sorted({p.stem for d in directories for p in (d / group).glob("*.yaml")})


def override_keys() -> list[str]:
    """Return every dotted key that an override may set."""
    keys = [k for k in leaf_keys(RunConfig) if not k.startswith("model.mixer.")]
    return sorted([*keys, *(f"mixer.{k}" for k in leaf_keys(MixerConfig))])


def checked_overrides(overrides: list[str], directories: list[Path]) -> list[str]:
    """Reject override keys and group options that do not exist, naming the nearest that do.

    Returns:
        The overrides for Hydra; a valid key that its group's file leaves at the default is added rather than refused.
    Errors:
        ConfigError: one sentence for the first mistake.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    known = override_keys()
    mappings = {k for k, kind in leaf_keys(RunConfig).items() if get_origin(kind) is dict}  # of any keys
    sections = {k.rsplit(".", depth)[0] for k in known for depth in range(1, k.count(".") + 1)}
    checked = []
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException as error:
            raise ConfigError(
                f"cannot read the override {text!r}: write key=value, quoting a value that holds spaces, commas or "
                f"brackets twice, as in 'key=\"a, b\"'"
            ) from error
        if override.is_sweep_override():
            name, _, value = text.partition("=")
            if not (name.endswith("mixer.kind") and override.is_choice_sweep()):
                raise ConfigError(
                    f"{text!r} gives several values: one run takes one; sweeps are `powertrain sweep plan RECIPE`"
                )
            # A pattern of layers, which a shell has taken the quotes off.
            text = f'{name}="{value}"'
            override = OverridesParser.create().parse_override(text)
        key = override.key_or_group
        if key in GROUPS and not isinstance(override.value(), dict):
            allowed = options(key, directories)
            if override.value() is not None and str(override.value()) not in allowed:
                hint = nearest(str(override.value()), allowed, list_all=True)
                raise ConfigError(f"unknown option {key}={override.value()}: {hint}")
        elif key in known or key.rpartition(".")[0] in mappings:
            text = "++" + text.lstrip("+") if not override.is_delete() else text
        elif key not in sections:
            raise ConfigError(f"unknown option '{key}': {nearest(key, [*known, *GROUPS])}")
        checked.append(text)
    return checked


def compose(overrides: list[str], config_dir: Path | None = None) -> RunConfig:
    """Compose `conf/config.yaml` with overrides into a validated configuration.

    Args:
        overrides: Hydra overrides, such as `model=124m` or `optim.lr=3e-4`.
        config_dir: a directory of the user's own groups (as `experiment/mine.yaml`), searched before powertrain's.
    Returns:
        The configuration, with `name` filled from the chosen experiment or groups when it was not given.
    Errors:
        ConfigError: one sentence that says what was given and what is allowed.
    """
    values, choices = compose_values(overrides, config_dir)
    if values.get("name") is None:
        values["name"] = choices.get("experiment") or "-".join(str(choices[g]) for g in ("model", "mixer", "data"))
    return from_values(values)


def compose_values(overrides: list[str], config_dir: Path | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compose to plain values and the chosen option of each group, before validation; see `compose`."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    directories = [share_dir("conf")]
    search: list[str] = []
    if config_dir is not None:
        if not config_dir.is_dir():
            raise ConfigError(f"--config-dir {config_dir} is not a directory")
        directories.insert(0, config_dir)
        search = [f"hydra.searchpath=[{json.dumps('file://' + str(config_dir.resolve()))}]"]
    overrides = checked_overrides(overrides, directories)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(share_dir("conf")), version_base="1.3"):
            whole = hydra_compose("config", overrides=[*search, *overrides], return_hydra_config=True)
        choices = OmegaConf.to_container(whole.hydra.runtime.choices)
        whole = OmegaConf.masked_copy(whole, [str(key) for key in whole if key != "hydra"])
        missing = sorted(OmegaConf.missing_keys(whole))
        if missing:
            raise ConfigError(f"{missing[0]} is not given: add {missing[0]}=... to the command")
        values = OmegaConf.to_container(whole, resolve=True)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ConfigError("; ".join(lines)) from error
    except UnicodeDecodeError as error:
        # It does not say of which file.
        files = (path for directory in directories for path in sorted(directory.rglob("*.yaml")))
        path = next((path for path in files if error.object in path.read_bytes()), config_dir)
        raise ConfigError(f"{path} is not YAML: {error}") from error
    finally:
        GlobalHydra.instance().clear()
    assert isinstance(values, dict)
    assert isinstance(choices, dict)
    return {str(k): v for k, v in values.items()}, {str(k): v for k, v in choices.items()}


def from_values(values: dict[str, Any]) -> RunConfig:
    """Build and validate a configuration from composed values; see `read_config` for a saved one.

    Errors:
        ConfigError: unknown keys, wrong types, contradictions.
    """
    values = dict(values)
    if "experiment" in values:
        experiment = values["experiment"]
        keys = ", ".join(map(str, experiment)) if isinstance(experiment, dict) and experiment else "keys"
        raise ConfigError(
            "an experiment file must begin with the line `# @package _global_`, as conf/experiment/quickstart.yaml "
            f"does: without it, its {keys} would be options of `experiment`"
        )
    for group in ("model", "mixer"):
        if group in values and not isinstance(values[group], dict):
            raise ConfigError(
                f"{group}={values[group]!r} must hold options of {group}; an experiment file chooses {values[group]} "
                f"by `defaults: [override /{group}: {values[group]}]`"
            )
    if "mixer" in values:
        mixer = values.pop("mixer")
        if "model" in values:
            values["model"] = {**values["model"], "mixer": mixer}
    try:
        return build(RunConfig, values)
    except UnknownOptionError as error:
        known = override_keys()
        if not closest(error.key, known):
            raise
        raise ConfigError(f"unknown option '{error.key}': {nearest(error.key, known)}") from error


def read_config(path: Path) -> RunConfig:
    """Return the configuration in a saved `config.yaml`.

    Errors:
        ConfigError: the file is no YAML of options, or `from_values` refuses them.
        OSError: it cannot be read.
    """
    import yaml

    try:
        with path.open("rb") as file:
            values = yaml.safe_load(file)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        found = "nothing" if values is None else f"a {type(values).__name__}"
        raise ConfigError(f"{path} must hold a mapping of options, and holds {found}")
    return from_values(values)


def to_values(config: RunConfig) -> dict[str, Any]:
    """Return the plain values that `from_values` reads back to an equal configuration."""
    values = dataclasses.asdict(config)
    model = values.pop("model")
    mixer = model.pop("mixer")
    return {"run_id": values.pop("run_id"), "name": values.pop("name"), "model": model, "mixer": mixer, **values}


def planned_vocabulary(config: RunConfig) -> int:
    """Return the vocabulary size that a run will have, without preparing its data.

    Errors:
        ConfigError: a pretrained tokenizer's size is not known before it is loaded.
    """
    if config.model.vocab_size is not None:
        return config.model.vocab_size
    tokenizer = config.data.tokenizer
    if tokenizer.kind == "bpe":
        return tokenizer.vocab_size
    if tokenizer.kind == "bytes":
        return MIN_BPE_VOCAB
    raise ConfigError("a pretrained tokenizer's size is not known before it is loaded: add model.vocab_size=<entries>")


def changes(before: RunConfig, after: RunConfig) -> list[tuple[str, Any, Any]]:
    """Return the dotted keys in which the identities of two configurations differ, with both values."""
    keys = sorted(_flat(before.identity()) | _flat(after.identity()))
    # Identities leave out what is at its default.
    old, new = _flat(dataclasses.asdict(before)), _flat(dataclasses.asdict(after))
    return [(key, old[key], new[key]) for key in keys if old[key] != new[key]]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat

import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from powertrain.training.config import (
    BudgetConfig,
    DebugConfig,
    LoggerConfig,
    OptimConfig,
    ScheduleConfig,
    TrainerConfig,
)

CONF = Path(__file__).parents[2] / "conf"
GROUPS = {
    "optim": OptimConfig,
    "schedule": ScheduleConfig,
    "trainer": TrainerConfig,
    "budget": BudgetConfig,
    "logger": LoggerConfig,
    "debug": DebugConfig,
}
FILES = [(group, path) for group in GROUPS for path in sorted((CONF / group).glob("*.yaml"))]


@pytest.mark.parametrize(("group", "path"), FILES, ids=lambda v: v if isinstance(v, str) else v.stem)
def test_every_file_of_a_group_builds_its_dataclass(group, path):
    values = yaml.safe_load(path.read_text())
    values.pop("defaults", None)
    config = GROUPS[group](**values)
    for key, value in values.items():
        stored = getattr(config, key)
        assert (list(stored) if isinstance(stored, tuple) else stored) == value


@pytest.mark.parametrize("group", ["trainer", "logger", "debug", "optim"])
def test_the_base_file_of_a_group_holds_every_key_at_its_default(group):
    base = {"trainer": "default", "logger": "local", "debug": "none", "optim": "adamw"}[group]
    values = yaml.safe_load((CONF / group / f"{base}.yaml").read_text())
    assert set(values) == set(GROUPS[group].__dataclass_fields__)
    assert GROUPS[group](**values) == GROUPS[group]()


def test_whole_floats_become_counts():
    config = TrainerConfig(max_tokens=1e9, global_batch_tokens=32768.0)
    assert config.max_tokens == 10**9
    assert isinstance(config.max_tokens, int)
    assert isinstance(config.global_batch_tokens, int)


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (OptimConfig, {"lr": 0}, r"optim\.lr is 0; .* above 0"),
        (OptimConfig, {"lr": math.nan}, r"optim\.lr is nan"),
        (OptimConfig, {"betas": (0.9, 1.0)}, r"optim\.betas is \(0\.9, 1\.0\)"),
        (OptimConfig, {"fused": "yes"}, r"optim\.fused is 'yes'; .* true or false"),
        (ScheduleConfig, {"kind": "wds"}, r"schedule\.kind is 'wds'; allowed are 'wsd', 'cosine', 'constant'"),
        (ScheduleConfig, {"warmup": 0.6, "decay": 0.5}, r"0\.6 and schedule\.decay 0\.5 .* exceed 1"),
        (ScheduleConfig, {"final": 1.5}, r"schedule\.final is 1\.5; .* at least 0 and at most 1"),
        (TrainerConfig, {"max_steps": 2.5}, r"trainer\.max_steps is 2\.5; .* whole number"),
        (TrainerConfig, {"max_steps": 1, "max_tokens": 2}, r"both given"),
        (TrainerConfig, {"global_batch_tokens": 5000}, r"5000, .* multiple of .*1024; allowed are 4096 and 5120"),
        (TrainerConfig, {"global_batch_tokens": 8192, "micro_batch_size": 3}, r"is 3, .* allowed are 1, 2, 4, 8"),
        (TrainerConfig, {"devices": "all"}, r"trainer\.devices is 'all'"),
        (TrainerConfig, {"devices": 0}, r"trainer\.devices is 0"),
        (TrainerConfig, {"val_every_steps": None}, r"trainer\.val_every_steps is None"),
        (TrainerConfig, {"grad_clip": 0.0}, r"trainer\.grad_clip is 0\.0"),
        (TrainerConfig, {"hang_timeout": 604801.0}, r"hang_timeout is 604801\.0; .* above 0 and at most 604800\."),
        (TrainerConfig, {"nonfinite": "ignore"}, r"allowed are 'stop', 'skip'"),
        (BudgetConfig, {"kind": "hours"}, r"allowed are 'tokens', 'steps', 'flops'"),
        (BudgetConfig, {"value": -1}, r"budget\.value is -1"),
        (LoggerConfig, {"wandb_tags": "one"}, r"must be a list of texts"),
        (DebugConfig, {"profiler": "perf"}, r"allowed are 'simple', 'pytorch'"),
    ],
)
def test_bad_values_are_refused_with_what_is_allowed(cls, values, message):
    with pytest.raises(ValueError, match=message):
        cls(**values)


@pytest.mark.parametrize("module", ["config", "length", "schedules", "records", "hardware"])
def test_light_modules_import_neither_torch_nor_lightning(module):
    code = f"import sys, powertrain.training.{module}; sys.exit('torch' in sys.modules or 'lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_a_plot_needs_no_lightning():
    code = "import sys, powertrain.training.plots; sys.exit('lightning' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0

"""One of several processes that `tests.forked.launch_forked` starts: the runs that its arguments describe.

    DIRECTORY '[{"name": "ddp", "model": "gpt", "strategy": "ddp"}, ...]'

Each run goes to DIRECTORY/name; keys besides those of `Run` are options of the trainer. A test in its own process runs
the same descriptions through `train`.
"""

from __future__ import annotations

import functools
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from powertrain.models.config import MixerConfig, ModelConfig
from powertrain.models.gpt import GPT
from powertrain.training.config import ScheduleConfig
from powertrain.training.fit import FitResult
from tests.training.fakes import VOCAB, TinyModel, run_tiny
from tests.training.scenes import SCENES
from tests.training.test_gradients import round_anew


def gpt(*, meta: bool = False, rounded: tuple[int, float] | None = None, **options: Any) -> nn.Module:
    """A small GPT; `rounded` is the seed and the relative size of an error in every weight."""
    torch.manual_seed(0)
    config = ModelConfig(
        n_layers=2, d_model=32, n_heads=2, vocab_size=VOCAB, mixer=MixerConfig(kind="power", chunk_size=16), **options
    )
    with torch.device("meta") if meta else nullcontext():
        model = GPT(config)
    if rounded is not None:
        round_anew(model, *rounded)
    return model


def train(
    directory: Path,
    *,
    name: str,
    model: str = "tiny",
    scene: str | None = None,
    options: dict[str, Any] | None = None,
    **trainer: Any,
) -> FitResult:
    """Train one run; `model` is tiny or gpt, `scene` a name of `tests.training.scenes.SCENES`."""
    torch.manual_seed(0)
    sharded = trainer.get("strategy") == "fsdp"
    return run_tiny(
        directory / name,
        model=gpt(meta=sharded, **(options or {})) if model == "gpt" else TinyModel(dropout=0.0),
        # So that a run of few steps is the beginning of a longer one.
        schedule=ScheduleConfig(kind="constant", warmup=0.0),
        callbacks=[SCENES[scene]()] if scene else [],
        **trainer,
    )


def main() -> int:
    torch.set_num_threads(1)
    # What is compiled is the same with the backend that needs no compiler.
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    for description in json.loads(sys.argv[2]):
        train(Path(sys.argv[1]), **description)
    return 0

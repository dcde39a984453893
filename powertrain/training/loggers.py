"""Where metrics go: `metrics.jsonl` always; W&B, TensorBoard and CSV on request. The only place that knows W&B."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from powertrain.files import replacing_file
from powertrain.training.config import LoggerConfig
from powertrain.training.records import METRICS_FILE, read_metrics

# Counters that every record holds, and that a chart may use as its x-axis.
AXES = ("step", "tokens", "flops", "seconds")


class JsonlLogger(Logger):
    """Appends one JSON object per record to metrics.jsonl, and hands each line to the operating system at once.

    Numbers that JSON cannot hold (NaN, infinities) are written as null.
    """

    def __init__(self, run_dir: str | Path, run_id: str) -> None:
        super().__init__()
        self._run_dir = Path(run_dir)
        self._run_id = run_id

    @property
    def name(self) -> str:
        return "jsonl"

    @property
    def version(self) -> str:
        return self._run_id

    @property
    def save_dir(self) -> str:
        return str(self._run_dir)

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: config.yaml in the run directory holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        record = {"step": step, **{k: v if math.isfinite(v) else None for k, v in metrics.items()}}
        with (self._run_dir / METRICS_FILE).open("a") as file:
            file.write(json.dumps(record) + "\n")


class CsvLogger(JsonlLogger):
    """Renders metrics.jsonl as one metrics.csv, so that a resumed run has each step once here too.

    Must come after the `JsonlLogger` of the same directory.
    """

    @property
    def name(self) -> str:
        return "csv"

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if any(key.startswith("val/") for key in metrics):
            self.save()

    @rank_zero_only
    def save(self) -> None:
        records = read_metrics(self._run_dir)
        columns = dict.fromkeys(key for record in records for key in record)
        # Not durable: it is made anew from metrics.jsonl.
        with (
            replacing_file(self._run_dir / "metrics.csv", durable=False) as temporary,
            temporary.open("w", newline="") as file,
        ):
            writer = csv.DictWriter(file, list(columns))
            writer.writeheader()
            writer.writerows(records)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()


class RunWandbLogger(WandbLogger):
    """Lightning's W&B logger with the run's counters as x-axes."""

    @property
    @rank_zero_only
    def experiment(self) -> Any:
        fresh = self._experiment is None
        experiment = super().experiment
        if fresh and getattr(experiment, "define_metric", None):
            for axis in AXES:
                experiment.define_metric(axis)
            for group in ("train/*", "val/*", "power/*"):
                experiment.define_metric(group, step_metric="tokens")
        return experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        assert step is not None
        super().log_metrics({"step": step, **metrics}, step=step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        super().finalize(status)
        # Lightning leaves the run open, and a next run of this process would be logged into it.
        if self._experiment is not None:
            self._experiment.finish(exit_code=0 if status == "success" else 1)
            self._experiment = None


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def wandb_mode(config: LoggerConfig) -> str:
    """Return online, offline or disabled; `auto` follows $WANDB_MODE, else whether there is a key, and never asks."""
    if config.wandb_mode != "auto":
        return config.wandb_mode
    asked = os.environ.get("WANDB_MODE", "")
    if asked in ("online", "offline", "disabled"):
        return asked
    return "online" if _has_wandb_key() else "offline"


def build_loggers(
    config: LoggerConfig, run_dir: str | Path, run_id: str, run_config: dict[str, Any], *, start_step: int
) -> list[Logger]:
    """Return the loggers of a run, metrics.jsonl first; nothing is created on disk or server but on rank 0.

    Args:
        run_id: also the id of the W&B run, so that a resumed run continues it.
        run_config: plain values that describe the run.
        start_step: the step the run resumes at; event files drop what they hold after it.
    Errors:
        ValueError: TensorBoard is asked for and not installed.
    """
    run_dir = Path(run_dir)
    loggers: list[Logger] = [JsonlLogger(run_dir, run_id)]
    if config.csv:
        loggers.append(CsvLogger(run_dir, run_id))
    if config.tensorboard:
        if importlib.util.find_spec("tensorboard") is None:
            raise ValueError("logger.tensorboard=true needs TensorBoard: pip install 'powertrain[tensorboard]'")
        purge: dict[str, Any] = {"purge_step": start_step + 1} if start_step else {}
        loggers.append(TensorBoardLogger(run_dir, name="tensorboard", version="", **purge))
    if config.wandb:
        import wandb

        loggers.append(
            RunWandbLogger(
                name=run_id,
                id=run_id,
                resume="allow",
                save_dir=run_dir,
                project=config.wandb_project,
                entity=config.wandb_entity,
                group=config.wandb_group,
                job_type=config.wandb_job_type,
                tags=list(config.wandb_tags),
                mode=wandb_mode(config),
                config=run_config,
                log_model=False,
                settings=wandb.Settings(silent=True, console="off"),
            )
        )
    return loggers

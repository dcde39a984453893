"""Training of cells: a trunk at constant learning rate shared by all budgets, and an annealed branch for each."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import traceback
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from powertrain.config import RunConfig
from powertrain.files import write_file
from powertrain.scaling.catalog import DeviceType, model_cost
from powertrain.scaling.cells import Cell
from powertrain.scaling.recipe import Recipe
from powertrain.scaling.records import CellRecord, Start
from powertrain.scaling.run import Interrupted, SweepPaths, SweepState
from powertrain.schema import ConfigError, build
from powertrain.training.config import BudgetConfig
from powertrain.training.signals import Stopped, StopSignals

if TYPE_CHECKING:
    from powertrain.train import RunResult

# Of a run's directory: which processes trained it.
STARTS_FILE = "starts.json"


def trunk_config(cell: Cell) -> RunConfig:
    """Return the run that a cell's trunk is up to where the cell branches off: the same, without the final fall."""
    return dataclasses.replace(
        cell.config,
        run_id=cell.trunk,
        schedule=dataclasses.replace(cell.config.schedule, kind="constant"),
        budget=BudgetConfig(kind="steps", value=cell.decay_start),
        # A trunk is continued or branched from; it is measured through its branches.
        logger=dataclasses.replace(cell.config.logger, wandb_job_type="trunk"),
    )


def read_starts(run_dir: Path) -> list[Start]:
    """Return the processes that trained a run, in their order."""
    path = run_dir / STARTS_FILE
    return [build(Start, values) for values in json.loads(path.read_text())] if path.exists() else []


def write_starts(run_dir: Path, starts: Iterable[Start]) -> None:
    """Keep which processes trained a run."""
    run_dir.mkdir(parents=True, exist_ok=True)
    write_file(run_dir / STARTS_FILE, json.dumps([dataclasses.asdict(start) for start in starts]) + "\n")


def _before(starts: Iterable[Start], step: int) -> list[Start]:
    # Whoever started at that step or later made none of the steps up to it.
    return [start for start in starts if start.from_step < step]


def branch(trunk: Path, run_dir: Path, decay_start: int) -> int:
    """Give a new run the newest checkpoint of its trunk that lies before its anneal, the metrics, who trained it, and
    the configuration, whose precision it goes on in where its own is `auto`.

    Args:
        trunk: run directory of the trunk.
        run_dir: run directory of the cell; where it holds a checkpoint already, nothing is done.
        decay_start: last step that trunk and cell have in common.
    Returns:
        The step that the cell starts from; 0 where the trunk has no checkpoint to branch from.
    """
    from powertrain.training.checkpoint import CheckpointStore
    from powertrain.training.records import METRICS_FILE

    if CheckpointStore(run_dir / "checkpoints").steps():
        return max(CheckpointStore(run_dir / "checkpoints").steps())
    source = CheckpointStore(trunk / "checkpoints")
    usable = [step for step in source.steps() if step <= decay_start and source.fault(step) is None]
    if not usable:
        return 0
    step = max(usable)
    run_dir.mkdir(parents=True, exist_ok=True)
    # Records after that step are dropped when the run resumes.
    for name in (METRICS_FILE, "config.yaml"):
        shutil.copyfile(trunk / name, run_dir / name)
    write_starts(run_dir, _before(read_starts(trunk), step))
    CheckpointStore(run_dir / "checkpoints").adopt(source, step)
    return step


@contextlib.contextmanager
def printing_to(path: Path) -> Iterator[None]:
    """Send what a training prints to its log; the terminal shows the sweep."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        path.open("a", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        yield


def check(state: SweepState, *, devices: bool = True) -> None:
    """Judge what the missing cells share, before one is claimed: it would fail them one by one. Prepares the data.

    Args:
        devices: judge those of this process too; not where it only starts runners, which see one GPU each.
    Errors:
        ConfigError: the tokenizer is not the planned one, or this machine has other documents than the records, as
            `python_packages` has wherever other packages are installed.
        ValueError: there are no such data or devices.
    """
    from powertrain.data.prepare import prepare
    from powertrain.training.batching import resolve_devices

    missing = state.missing(state.expand())
    if not missing:
        return
    if devices:
        # A cell's own, because the sequences of a step are shared out too.
        resolve_devices(next(iter(missing.values()))[0].config.trainer)
    config = state.shared_config()
    store = prepare(config.data, config.paths.cache)
    if store.vocab_size != config.model.vocab_size:
        raise ConfigError(
            f"the tokenizer has {store.vocab_size} entries, but cells are planned with {config.model.vocab_size}: set "
            f"data.tokenizer.vocab_size to what the corpus yields"
        )
    known = {r.data["tokens"] for r in state.store.read() if r.data.get("tokens")}
    here = store.fingerprint
    if known and here not in known:
        raise ConfigError(
            f"the records in {state.paths.records} are of the tokens {', '.join(sorted(known))}, and this machine's "
            f"data.source={config.data.source} yields {here}: cells of both do not compare; continue where the same "
            f"documents are, or give --directory for a sweep of its own"
        )


class TrainingExecutor:
    """Trains cells through `powertrain.train.run`, each resuming where it stopped, and measures them.

    Args:
        wandb: log every trunk and cell to W&B too.
        keep_checkpoints: keep the last checkpoint of finished cells; without it only trunks keep theirs.
        runners: that share the device, this one included.
        signals: that ask this runner to stop.
    """

    def __init__(
        self,
        recipe: Recipe,
        paths: SweepPaths,
        *,
        wandb: bool = False,
        keep_checkpoints: bool = False,
        runners: int = 1,
        signals: StopSignals | None = None,
    ) -> None:
        self.recipe, self.paths, self.wandb, self.keep_checkpoints = recipe, paths, wandb, keep_checkpoints
        self.runners = runners
        self.signals = signals or StopSignals()

    def run(self, cell: Cell) -> CellRecord:
        """Train and measure a cell; see `powertrain.scaling.run.Executor`."""
        with printing_to(self.paths.logs / f"{cell.id}.log"), self._interruptible():
            # The largest budget has nothing after it that could branch off.
            if cell.budget < max(self.recipe.budgets):
                self._train(self._local(trunk_config(cell)))
            branch(self.paths.runs / cell.trunk, self.paths.runs / cell.id, cell.decay_start)
            return self._measure(cell, self._train(self._local(cell.config)))

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Say of whatever ends a cell after a signal that the signal did: what it ends first may fail by that."""
        try:
            yield
        except Stopped as stop:
            raise Interrupted(stop.signum) from stop
        except Interrupted:
            raise
        except Exception as error:
            if self.signals.received is None:
                raise
            traceback.print_exc()
            raise Interrupted(self.signals.received) from error

    def _local(self, config: RunConfig) -> RunConfig:
        return dataclasses.replace(
            config,
            paths=dataclasses.replace(config.paths, runs=str(self.paths.runs)),
            logger=dataclasses.replace(config.logger, wandb=self.wandb or config.logger.wandb),
        )

    def recorded(self, cell: Cell) -> None:
        """Remove what only the training of a cell needed; see `powertrain.scaling.run.Executor`."""
        if not self.keep_checkpoints:
            shutil.rmtree(self.paths.runs / cell.id / "checkpoints", ignore_errors=True)

    def _train(self, config: RunConfig) -> RunResult:
        from powertrain.train import run
        from powertrain.training.batching import resolve_devices
        from powertrain.training.checkpoint import CheckpointStore

        run_dir = self.paths.runs / config.resolved_run_id()
        step = max(CheckpointStore(run_dir / "checkpoints").steps(), default=0)
        device = device_name(resolve_devices(config.trainer).torch_device)
        start = Start(step, device, self.runners, environment_here())
        write_starts(run_dir, [*_before(read_starts(run_dir), step), start])
        result = run(config, command="powertrain sweep run", signals=self.signals)
        if result.fit.interrupted_by is not None:
            raise Interrupted(result.fit.interrupted_by)
        self.signals.raise_received()
        return result

    def _measure(self, cell: Cell, result: RunResult) -> CellRecord:
        from powertrain.data.datamodule import TokenDataModule
        from powertrain.inference.generate import load_run
        from powertrain.scaling.evaluate import measure, order_fingerprint, training_curve
        from powertrain.training.batching import resolve_devices
        from powertrain.training.records import read_metrics

        config = result.config
        devices = resolve_devices(config.trainer)
        device = devices.torch_device
        assert result.fit.checkpoint is not None
        model, _ = load_run(result.fit.checkpoint, device)
        data = TokenDataModule(
            config.data,
            context_length=cell.context,
            micro_batch_size=1,
            seed=config.seed,
            cache_dir=config.paths.cache,
        )
        measured = measure(
            model,
            data,
            precision=config.trainer.precision,
            device=device,
            buckets=self.recipe.evaluation.position_buckets,
        )
        device_type: DeviceType = "cuda" if device.type == "cuda" else "cpu"
        cost = model_cost(cell.config.model, cell.context, device_type)
        count = devices.world_size
        starts = read_starts(result.run_dir)
        return CellRecord(
            cell=cell.id,
            sweep=self.recipe.name,
            mixer=cell.mixer,
            size=cell.size,
            context=cell.context,
            budget=cell.budget,
            seed=cell.seed,
            learning_rate=cell.learning_rate,
            learning_rate_factor=cell.learning_rate_factor,
            batch_tokens=cell.batch_tokens,
            batch_factor=cell.batch_factor,
            steps=cell.steps,
            tokens=cell.tokens,
            parameters=cost.parameters,
            parameters_total=cost.parameters_total,
            state_size=cost.state_size,
            flops_per_token={str(convention): flops for convention, flops in cost.flops_per_token.items()},
            flops_by_part=cost.flops_by_part,
            annealed=True,
            loss=measured.loss,
            bits_per_byte=measured.bits_per_byte,
            seconds=result.fit.counters.seconds * count,
            device=device_name(device),
            devices=count,
            runners=max(start.runners for start in starts),
            document_loss=measured.document_loss,
            document_tokens=measured.document_tokens,
            document_numbers=measured.document_numbers,
            position_bounds=measured.position_bounds,
            position_loss=measured.position_loss,
            position_tokens=measured.position_tokens,
            curve=training_curve(read_metrics(result.run_dir), cell.decay_start, count),
            data={
                "tokens": data.fingerprint,
                "order": order_fingerprint(data),
                "evaluation": measured.fingerprint,
            },
            environment=environment_of(result.run_dir),
            starts=tuple(starts),
        )


def device_name(device: Any) -> str:
    """Return what a GPU's driver calls it, or `cpu`."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    return "cpu"


def environment_of(run_dir: Path) -> dict[str, str]:
    """Return the versions and the commit that a run's directory states."""
    return _versions_and_commit(json.loads((run_dir / "environment.json").read_text()))


def environment_here() -> dict[str, str]:
    """Return the versions and the commit that a run of this process would state."""
    from powertrain.train import environment

    return _versions_and_commit(environment())


def _versions_and_commit(values: Mapping[str, Any]) -> dict[str, str]:
    found = {"python": values["python"], **values["versions"]}
    if values.get("git_commit"):
        found["commit"] = values["git_commit"][:12] + ("+" if values.get("git_modified") else "")
    return {key: str(value) for key, value in found.items()}

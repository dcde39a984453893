"""`powertrain bench distributed`: how training scales from one GPU to several, by strategy, and what a save costs.

Every case is a run through `powertrain.training.fit` on random tokens. With ddp and fsdp a process has the same number
of tokens of each step whatever the number of processes; with context parallelism all share one long sequence. Cases
with equal processes share one launch. Rates are medians over the records of a run, its first ones left out.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, IterableDataset

from powertrain.bench.provenance import provenance
from powertrain.config import compose
from powertrain.models.config import ModelConfig
from powertrain.models.flops import model_flops
from powertrain.models.gpt import GPT
from powertrain.training.checkpointing import Checkpointing
from powertrain.training.config import DebugConfig, OptimConfig, ScheduleConfig, TrainerConfig
from powertrain.training.fit import fit
from powertrain.training.launch import launch
from powertrain.training.length import TrainingLength
from powertrain.training.module import PowertrainModule
from powertrain.training.records import read_metrics
from powertrain.training.state import collect_tensors

VOCABULARY = {"gpu": 50257, "cpu": 512}  # by accelerator
# Records of a run that are left out: compilation, allocation and the first communication.
WARM_UP_RECORDS = 2


@dataclass(frozen=True)
class Case:
    """One run."""

    name: str
    baseline: str  # name of the case that its rate is compared with
    processes: int
    model: str  # option of the group `model`
    layers: int | None  # instead of the model's own number
    context_length: int
    micro_batch_size: int  # sequences
    sequences: int  # of one step over all processes
    steps: int
    log_every_steps: int
    accelerator: str
    strategy: str = "auto"
    context_parallel: int = 1
    compile: bool = False
    activation_checkpointing: bool = False
    time_save: bool = False


@dataclass(frozen=True)
class Result:
    """What a case measured."""

    tokens_per_second: float  # of all processes
    save_pause_seconds: float | None = None  # that training waits for one checkpoint
    save_seconds: float | None = None  # until it is on the disk
    peak_memory_bytes: int | None = None  # of rank 0's GPU


class RandomTokens(pl.LightningDataModule):
    """One batch of random tokens again and again; the same on every rank."""

    def __init__(self, context_length: int, vocabulary: int) -> None:
        super().__init__()
        self.context_length = context_length
        self.vocabulary = vocabulary
        self.micro_batch_size = 1
        self.global_batch_size = 1

    def _loader(self) -> DataLoader:
        T, rows = self.context_length, self.micro_batch_size
        tokens = torch.randint(self.vocabulary, (rows, T + 1), generator=torch.Generator().manual_seed(0))
        batch = {
            "input_ids": tokens[:, :-1].contiguous(),
            "labels": tokens[:, 1:].contiguous(),
            "cu_seqlens": torch.arange(0, rows * T + 1, T, dtype=torch.int32),
        }
        return DataLoader(_Repeat(batch), batch_size=None)

    train_dataloader = val_dataloader = _loader

    def set_ranks(self, rank: int, world_size: int) -> None:
        """Every rank reads the same, also those that share sequences."""

    def state_dict(self) -> dict[str, Any]:
        return {}


class _Repeat(IterableDataset):
    def __init__(self, batch: dict[str, torch.Tensor]) -> None:
        self.batch = batch

    def __iter__(self) -> Any:
        while True:
            yield dict(self.batch)


class TimeSave(pl.Callback):
    """Times one more save when training has ended; the run's own last save has allocated its memory."""

    pause: float | None = None
    total: float | None = None

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, PowertrainModule)
        store = next(c.store for c in trainer.callbacks if isinstance(c, Checkpointing))  # type: ignore[attr-defined]
        store.finish()
        store.begin(pl_module.step + 1, collect_tensors(pl_module, trainer.optimizers[0]), {})
        self.pause = store.pause_seconds
        store.finish()
        self.total = store.save_seconds


def main(argv: list[str]) -> int:
    """Run the benchmark with command-line arguments `argv` and return the exit status."""
    args = _parse(argv)
    if args.worker is not None:
        for case in json.loads(args.worker):
            _run(Case(**case), Path(args.output))
        return 0
    started = time.monotonic()
    console = Console()
    cases = _cases(args)
    results: dict[str, Result] = {}
    code = 0
    with tempfile.TemporaryDirectory() as directory:
        for processes in sorted({case.processes for case in cases}):
            here = [case for case in cases if case.processes == processes]
            command = [sys.executable, "-m", "powertrain", "bench", "distributed", "--output", directory, "--worker"]
            code = launch([*command, json.dumps([asdict(case) for case in here])], processes)
            for case in here:
                written = Path(directory) / f"{case.name}.json"
                if written.is_file():
                    results[case.name] = Result(**json.loads(written.read_text()))
            if code:
                break
    # Of a run that was cut short, what it has measured.
    missing = [case.name for case in cases if case.name not in results]
    if missing:
        console.print(f"Ended early: {', '.join(missing)} not measured")
    rows = [_row(case, results) for case in cases if {case.name, case.baseline} <= results.keys()]
    record = {
        **_environment(args, argv),
        "seconds": round(time.monotonic() - started, 1),
        "missing": missing,
        "rows": rows,
    }
    console.print(_table(rows, record))
    if args.output is not None:
        path = Path(args.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")
        console.print(f"Written to {path}")
    return code


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="powertrain bench distributed", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("--processes", type=int, default=2, help="GPUs to compare with one (default: 2)")
    parser.add_argument("--model", default="350m", help="option of the group `model` (default: 350m)")
    parser.add_argument("--context-length", type=int, default=4096, help="tokens of a sequence (default: 4096)")
    parser.add_argument("--micro-batch-size", type=int, default=8, help="sequences of a pass (default: 8)")
    parser.add_argument("--accumulation", type=int, default=2, help="passes of a step (default: 2)")
    parser.add_argument("--steps", type=int, default=24, help="steps of a run (default: 24)")
    parser.add_argument(
        "--long-context-length", type=int, default=131072, help="of the cases for context parallelism (default: 131072)"
    )
    parser.add_argument(
        "--cases", nargs="+", choices=["ddp", "fsdp", "context"], help="only these, and what they are compared with"
    )
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    parser.add_argument("--cpu", action="store_true", help="a tiny model on CPUs, to see that it works")
    parser.add_argument(
        "--output",
        help="JSON file to write (default: bench/distributed.json; with --cpu, which measures nothing, none)",
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.cpu:
        args.model, args.context_length, args.micro_batch_size, args.accumulation, args.steps = "1m", 64, 2, 2, 6
        args.long_context_length, args.no_compile = 256, True
    elif args.output is None:
        args.output = "bench/distributed.json"
    available = torch.cuda.device_count()
    if args.worker is None and not args.cpu and args.processes > available:
        raise ValueError(
            f"--processes={args.processes} needs as many GPUs, and this machine has {available}; --cpu runs without."
        )
    return args


def _cases(args: argparse.Namespace) -> list[Case]:
    one = Case(
        name="one",
        baseline="one",
        processes=1,
        model=args.model,
        layers=2 if args.cpu else None,
        context_length=args.context_length,
        micro_batch_size=args.micro_batch_size,
        sequences=args.micro_batch_size * args.accumulation,
        steps=args.steps,
        log_every_steps=max(1, args.steps // 8),
        accelerator="cpu" if args.cpu else "gpu",
        compile=not args.no_compile,
    )
    several = dataclasses.replace(
        one, processes=args.processes, sequences=one.sequences * args.processes, time_save=True
    )
    # One sequence whatever the processes.
    long = dataclasses.replace(
        one,
        name="long",
        baseline="long",
        context_length=args.long_context_length,
        micro_batch_size=1,
        sequences=1,
        activation_checkpointing=True,
    )
    cases = [
        one,
        dataclasses.replace(several, name="ddp", strategy="ddp"),
        dataclasses.replace(several, name="fsdp", strategy="fsdp"),
        long,
        dataclasses.replace(
            long, name="context", processes=args.processes, strategy="ddp", context_parallel=args.processes
        ),
    ]
    kept = [case for case in cases if args.cases is None or case.name in args.cases]
    return [case for case in cases if case.name in {name for c in kept for name in (c.name, c.baseline)}]


def _run(case: Case, output: Path) -> None:
    """Train one case; rank 0 writes the result."""
    model_config = compose([f"model={case.model}"]).model
    vocabulary = VOCABULARY[case.accelerator]
    model_config = dataclasses.replace(
        model_config,
        vocab_size=vocabulary,
        n_layers=case.layers or model_config.n_layers,
        activation_checkpointing=case.activation_checkpointing,
    )
    trainer = TrainerConfig(
        max_steps=case.steps,
        context_length=case.context_length,
        global_batch_tokens=case.sequences * case.context_length,
        micro_batch_size=case.micro_batch_size,
        accelerator=case.accelerator,
        devices=case.processes,
        strategy=case.strategy,
        context_parallel=case.context_parallel,
        compile=case.compile,
        val_every_steps=case.steps,
        log_every_steps=case.log_every_steps,
        keep_checkpoints=1,
        deterministic=False,
    )
    run_dir, save = output / "runs" / case.name, TimeSave()
    torch.manual_seed(0)
    if case.accelerator == "gpu":
        # What the case before held.
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with torch.device("meta"):
        model = GPT(model_config)
    fit(
        model,
        RandomTokens(case.context_length, vocabulary),
        optim=OptimConfig(),
        schedule=ScheduleConfig(),
        trainer=trainer,
        length=_length(model_config, trainer),
        run_dir=run_dir,
        run_id=case.name,
        debug=DebugConfig(val_batches=1),
        callbacks=[save] if case.time_save else [],
    )
    if os.environ["RANK"] != "0":
        return
    rates = [r["train/tokens_per_second"] for r in read_metrics(run_dir) if "train/tokens_per_second" in r]
    result = Result(
        tokens_per_second=statistics.median(rates[WARM_UP_RECORDS:]),
        save_pause_seconds=save.pause,
        save_seconds=save.total,
        peak_memory_bytes=torch.cuda.max_memory_allocated() if case.accelerator == "gpu" else None,
    )
    (output / f"{case.name}.json").write_text(json.dumps(asdict(result)))


def _length(model: ModelConfig, trainer: TrainerConfig) -> TrainingLength:
    assert trainer.max_steps is not None
    flops = model_flops(model, trainer.context_length).algorithmic.total
    return TrainingLength(trainer.max_steps, trainer.global_batch_tokens, flops, "benchmark")


def _row(case: Case, results: dict[str, Result]) -> dict[str, Any]:
    result = results[case.name]
    ratio = result.tokens_per_second / results[case.baseline].tokens_per_second
    return {**asdict(case), **asdict(result), "times_the_baseline": ratio}


def _environment(args: argparse.Namespace, argv: list[str]) -> dict[str, Any]:
    gpus = [] if args.cpu else [torch.cuda.get_device_name(i) for i in range(args.processes)]
    nccl = None
    with contextlib.suppress(Exception):
        nccl = ".".join(map(str, torch.cuda.nccl.version()))  # absent from builds without CUDA
    return {
        **provenance("distributed", argv),
        "lightning": metadata.version("lightning"),
        "cuda": torch.version.cuda,
        "nccl": nccl,
        "gpus": gpus,
    }


def _table(rows: list[dict[str, Any]], record: dict[str, Any]) -> Table:
    where = " + ".join(record["gpus"]) or "CPU"
    table = Table(title=f"Training on random tokens, {where}, torch {record['torch']}")
    for name in ("case", "ranks", "context", "tokens/s", "scaling", "save", "pause", "memory"):
        table.add_column(name, justify="left" if name == "case" else "right")
    for row in rows:
        pause, total, memory = row["save_pause_seconds"], row["save_seconds"], row["peak_memory_bytes"]
        table.add_row(
            row["name"],
            str(row["processes"]),
            f"{row['context_length']:,}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['times_the_baseline']:.2f} x {row['baseline']}",
            f"{total:.2f} s" if total else "",
            f"{pause / total:.1%}" if total else "",
            f"{memory / 2**30:.1f} GiB" if memory else "",
        )
    return table

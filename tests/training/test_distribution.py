"""Strategies over real processes: losses and gradients as of one process, and nothing whole where it is sharded."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from powertrain.training.checkpoint import Checkpoint
from powertrain.training.config import TrainerConfig
from powertrain.training.distribution import lightning_strategy
from powertrain.training.ranks import Ranks
from powertrain.training.records import read_metrics
from tests.forked import launch_forked
from tests.training.fakes import CONTEXT, saved_tensors
from tests.training.rank_script import train
from tests.training.test_gradients import EPS, assert_as_rounded, assert_first_step

# Long, and so begun first.
pytestmark = pytest.mark.first

STEPS = {"steps": 4, "micro_batch_size": 1, "val_every_steps": 2}
# Four micro-batches to a step on two processes.
LARGE = {"model": "gpt", "global_batch_tokens": 8 * CONTEXT}


def run_ranks(directory: Path, processes: int, *descriptions: dict) -> None:
    runs = [{"devices": processes, **STEPS, **d} for d in descriptions]
    assert launch_forked("tests.training.rank_script", [str(directory), json.dumps(runs)], processes) == 0


def values(run_dir: Path, key: str) -> list[float]:
    return [record[key] for record in read_metrics(run_dir) if key in record]


# Runs of one process with rounding errors in every weight, beside the one without.
ROUNDED = (0, 1)


def results(run_dir: Path) -> dict[str, torch.Tensor]:
    """Everything that a run computed: losses and norms by step, the first step's gradients, and what it saved."""
    found = {key: torch.tensor(values(run_dir, key)) for key in ("train/loss", "train/grad_norm")}
    # The end of a part of a run validates besides.
    found["val/loss"] = torch.tensor(
        [r["val/loss"] for r in read_metrics(run_dir) if "val/loss" in r and r["step"] % STEPS["val_every_steps"] == 0]
    )
    gradients = torch.load(run_dir / "gradients.pt", weights_only=True)
    found |= {f"gradient of {name}": gradient for name, gradient in gradients.items()}
    return found | saved_tensors(run_dir / "checkpoints" / "last")


def assert_same_training(run_dir: Path, reference: Path) -> None:
    others = [results(reference.with_name(f"{reference.name} {seed}")) for seed in ROUNDED]
    assert_as_rounded(results(run_dir), results(reference), others)


def train_alone(directory: Path, name: str, error: float = EPS, **description) -> None:
    """Train on one process what `assert_same_training` compares with: as described, and with errors in the weights."""
    train(directory, name=name, scene="keep", **STEPS, **description)
    for seed in ROUNDED:
        options = {"rounded": (seed, error)}
        train(directory, name=f"{name} {seed}", scene="keep", options=options, **STEPS, **description)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Runs on one process: in both precisions, and with twice the global batch."""
    directory = tmp_path_factory.mktemp("alone")
    train_alone(directory, "32-true", model="gpt")
    # Sums stay fp32: only weights and activations are rounded, by a quarter of the eps in the root of the mean.
    eps = torch.finfo(torch.bfloat16).eps / 4
    train_alone(directory, "bf16-mixed", eps, model="gpt", precision="bf16-mixed")
    train_alone(directory, "large", **LARGE)
    return directory


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Runs on two processes, all in one launch."""
    directory = tmp_path_factory.mktemp("two")
    fsdp = {"model": "gpt", "strategy": "fsdp"}
    run_ranks(
        directory,
        2,
        {"name": "gradients", "scene": "keep", "grad_clip": None},
        {"name": "ddp", "model": "gpt", "strategy": "ddp", "scene": "keep"},
        {"name": "fsdp", "scene": "sharded", **fsdp},
        {"name": "checkpointed", "options": {"activation_checkpointing": True}, "scene": "keep", **fsdp},
        {"name": "compiled", "compile": True, "scene": "keep", **fsdp},
        {"name": "bf16 ddp", "model": "gpt", "strategy": "ddp", "precision": "bf16-mixed", "scene": "keep"},
        {"name": "bf16 fsdp", "precision": "bf16-mixed", "scene": "sharded", **fsdp},
        {"name": "whole", "fsdp_accumulation": "whole", "scene": "accumulate", **fsdp, **LARGE},
        {"name": "sharded", "fsdp_accumulation": "sharded", "scene": "accumulate", **fsdp, **LARGE},
        {"name": "bf16 sharded", "fsdp_accumulation": "sharded", "precision": "bf16-mixed", "scene": "keep", **fsdp},
        {"name": "spoiled ddp", "model": "gpt", "strategy": "ddp", "scene": "spoil", "steps": 2, "nonfinite": "skip"},
        {"name": "spoiled fsdp", "scene": "spoil", **fsdp, "steps": 2, "nonfinite": "skip"},
        # The same run in two parts, and one that changes its strategy.
        {"name": "resumed", **fsdp, "steps": 2},
        {"name": "resumed", **fsdp},
        {"name": "moved", **fsdp, "steps": 1, "scene": "keep"},
        {"name": "moved", "model": "gpt", "strategy": "ddp", "steps": 2},
    )
    return directory


@pytest.fixture(scope="module")
def four(two, alone):
    """Runs on four processes, two of which hold nothing of a bias of two elements; one goes on with a run of two."""
    run_ranks(
        two,
        4,
        {"name": "four", "model": "gpt", "strategy": "fsdp", "scene": "sharded"},
        {"name": "moved", "model": "gpt", "strategy": "fsdp", "steps": 3},
    )
    return two


def test_two_ranks_give_the_gradient_of_the_whole_batch(two):
    norm, loss = (values(two / "gradients", key)[0] for key in ("train/grad_norm", "train/loss"))
    assert_first_step(torch.load(two / "gradients" / "gradients.pt", weights_only=True), norm, loss)


@pytest.mark.parametrize("name", ["ddp", "fsdp", "checkpointed", "compiled"])
def test_two_ranks_train_as_one_process(two, alone, name):
    assert_same_training(two / name, alone / "32-true")


@pytest.mark.parametrize("name", ["bf16 ddp", "bf16 fsdp", "bf16 sharded"])
def test_two_ranks_train_as_one_process_in_bf16(two, alone, name):
    assert_same_training(two / name, alone / "bf16-mixed")


@pytest.mark.parametrize("name", ["whole", "sharded"])
def test_accumulation_of_shards_and_of_whole_gradients_trains_as_one_process(two, alone, name):
    """What each holds and sends between its micro-batches is asserted on the ranks: see `CheckAccumulation`."""
    assert_same_training(two / name, alone / "large")


class SmallestGpu(Ranks):
    """Ranks of GPUs, of which another than this one's is the smallest."""

    memory = 48 * 10**9

    def max(self, *values):
        return [max(value, -self.memory) for value in values]


@pytest.mark.parametrize(("precision", "bytes_each"), [("bf16-mixed", 6), ("32-true", 8)])
def test_gradients_are_kept_whole_unasked_where_that_takes_a_tenth_of_the_smallest_gpu(
    monkeypatch, precision, bytes_each
):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * 10**9))
    ranks = SmallestGpu(size=2, device=torch.device("cuda", 0))
    largest = SmallestGpu.memory // 10 // bytes_each

    def keeps_whole(parameters, **options):
        model = nn.Linear(parameters, 1, bias=False, device="meta")
        model.__class__ = type("Sharded", (FSDPModule, nn.Linear), {})
        return lightning_strategy(model, ranks, TrainerConfig(precision=precision, **options)).keeps_whole

    assert keeps_whole(largest)
    assert not keeps_whole(largest + 1)
    assert keeps_whole(largest + 1, fsdp_accumulation="whole")
    assert not keeps_whole(largest, fsdp_accumulation="sharded")


def test_a_resumed_run_on_equal_ranks_has_the_bits_of_the_unbroken_one(two):
    for key in ("train/loss", "val/loss", "train/grad_norm"):
        assert values(two / "resumed", key) == values(two / "fsdp", key)
    mine, theirs = (saved_tensors(two / name / "checkpoints" / "last") for name in ("resumed", "fsdp"))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_gradient_that_is_not_finite_is_found_on_its_rank(two, strategy):
    said = (two / f"spoiled {strategy}" / "said.txt").read_text()
    where = "the gradient of blocks.1.mlp.down.weight went first"
    assert said.startswith(f"step 2: the gradient is not finite on rank 1: {where};")


def test_four_ranks_train_as_one_process(four, alone):
    assert_same_training(four / "four", alone / "32-true")


def test_a_run_goes_on_with_another_strategy_and_number_of_ranks(four, alone):
    """One step each of fsdp on two, ddp on two, fsdp on four, and one process."""
    assert train(four, name="moved", model="gpt", **STEPS).resumed_step == 3
    assert_same_training(four / "moved", alone / "32-true")


def test_each_rank_writes_its_part(four):
    """Sharded or whole on every rank: the files are of about one size, and hold each element once."""
    for name, ranks in (("fsdp", 2), ("ddp", 2), ("four", 4)):
        directory = four / name / "checkpoints" / "last"
        sizes = [path.stat().st_size for path in directory.glob("rank-*.safetensors")]
        assert len(sizes) == ranks
        elements = sum(torch.Size(shape).numel() for shape in Checkpoint(directory).shapes.values())
        # Beside the numbers: headers, and the random states within.
        assert 4 * elements < sum(sizes) < 4 * elements + ranks * 40_000
        assert max(sizes) < 1.5 * min(sizes)


@pytest.mark.multigpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_two_gpus_train_as_one(precision, tmp_path):
    common = {"model": "gpt", "accelerator": "gpu", "precision": precision}
    error = EPS if precision == "32-true" else torch.finfo(torch.bfloat16).eps / 4
    train_alone(tmp_path, "alone", error, devices=1, **common)
    strategies = {
        "ddp": {"strategy": "ddp"},
        "fsdp": {"strategy": "fsdp"},
        "sharded": {"strategy": "fsdp", "fsdp_accumulation": "sharded"},
        "context ddp": {"strategy": "ddp", "context_parallel": 2},
        "context fsdp": {"strategy": "fsdp", "context_parallel": 2},
    }
    run_ranks(tmp_path, 2, *({"name": name, "scene": "keep", **common, **s} for name, s in strategies.items()))
    failures = []
    for name in strategies:
        try:
            assert_same_training(tmp_path / name, tmp_path / "alone")
        except AssertionError as failure:
            failures.append(f"{name}: {failure}")
    assert not failures, "\n".join(failures)

"""Strategies over real processes: losses and gradients as of one process, and nothing whole where it is sharded."""

import json
import sys
from pathlib import Path

import pytest
import torch

from powertrain.training.checkpoint import Checkpoint
from powertrain.training.launch import launch
from powertrain.training.records import read_metrics
from tests.training.fakes import saved_tensors
from tests.training.rank_script import train
from tests.training.test_gradients import assert_gradients, expected_gradients

STEPS = {"steps": 4, "micro_batch_size": 1, "val_every_steps": 2}
# Losses are means of a few hundred terms in fp32, summed in another order; two orders beyond the rounding of one term.
FP32 = 1e-5
# A weight or activation is rounded to 8 bits, in another place where blocks are gathered in bf16; the loss averages it.
BF16 = 2.0**-9


def run_ranks(directory: Path, processes: int, *descriptions: dict) -> None:
    runs = [{"devices": processes, **STEPS, **d} for d in descriptions]
    command = [sys.executable, "-m", "tests.training.rank_script", str(directory), json.dumps(runs)]
    assert launch(command, processes) == 0


def values(run_dir: Path, key: str) -> list[float]:
    return [record[key] for record in read_metrics(run_dir) if key in record]


def assert_same_training(run_dir: Path, reference: Path, rtol: float) -> None:
    for key in ("train/loss", "val/loss", "train/grad_norm"):
        expected = values(reference, key)
        assert values(run_dir, key) == pytest.approx(expected, rel=rtol * (10 if key == "train/grad_norm" else 1)), key


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    directory = tmp_path_factory.mktemp("alone")
    for precision in ("32-true", "bf16-mixed"):
        train(directory, name=precision, model="gpt", precision=precision, **STEPS)
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
        {"name": "ddp", "model": "gpt", "strategy": "ddp"},
        {"name": "fsdp", "scene": "sharded", **fsdp},
        {"name": "checkpointed", "options": {"activation_checkpointing": True}, **fsdp},
        {"name": "compiled", "compile": True, **fsdp},
        {"name": "bf16 ddp", "model": "gpt", "strategy": "ddp", "precision": "bf16-mixed"},
        {"name": "bf16 fsdp", "precision": "bf16-mixed", "scene": "sharded", **fsdp},
        {"name": "spoiled ddp", "model": "gpt", "strategy": "ddp", "scene": "spoil", "steps": 2, "nonfinite": "skip"},
        {"name": "spoiled fsdp", "scene": "spoil", **fsdp, "steps": 2, "nonfinite": "skip"},
        # The same run in two parts, and one that changes its strategy.
        {"name": "resumed", **fsdp, "steps": 2},
        {"name": "resumed", **fsdp},
        {"name": "moved", **fsdp, "steps": 1, "scene": "count"},
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
    wanted, loss = expected_gradients()
    assert_gradients(torch.load(two / "gradients" / "gradients.pt", weights_only=True), wanted)
    assert values(two / "gradients", "train/loss")[0] == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("name", ["ddp", "fsdp", "checkpointed", "compiled"])
def test_two_ranks_train_as_one_process(two, alone, name):
    assert_same_training(two / name, alone / "32-true", FP32)


@pytest.mark.parametrize("name", ["bf16 ddp", "bf16 fsdp"])
def test_two_ranks_train_as_one_process_in_bf16(two, alone, name):
    assert_same_training(two / name, alone / "bf16-mixed", BF16)


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
    assert_same_training(four / "four", alone / "32-true", FP32)


def test_a_run_goes_on_with_another_strategy_and_number_of_ranks(four, alone):
    """One step each of fsdp on two, ddp on two, fsdp on four, and one process."""
    assert train(four, name="moved", model="gpt", **STEPS).resumed_step == 3
    losses = values(alone / "32-true", "train/loss")
    assert values(four / "moved", "train/loss") == pytest.approx(losses, rel=FP32)
    mine, theirs = (saved_tensors(path / "checkpoints" / "last") for path in (four / "moved", alone / "32-true"))
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-5, msg=name)


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

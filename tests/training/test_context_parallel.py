"""Processes that share sequences train as one does: losses, validation, gradient norms, whatever the strategy."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from powertrain.training.batching import Devices, resolve_devices
from powertrain.training.config import TrainerConfig
from powertrain.training.records import read_metrics
from tests.training.rank_script import train
from tests.training.test_distribution import STEPS, assert_same_training, run_ranks, train_alone, values
from tests.training.test_launch import OPTIONS

# Long, and so begun first.
pytestmark = pytest.mark.first

# Losses are means of a few hundred terms in fp32, summed in another order; two orders beyond the rounding of one term.
FP32 = 1e-5


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One process, two that share every sequence, and two pairs that do; a launch each."""
    directory = tmp_path_factory.mktemp("runs")
    train_alone(directory, "alone", model="gpt")
    shared = {"model": "gpt", "context_parallel": 2, "scene": "keep"}
    run_ranks(
        directory,
        2,
        {"name": "ddp", **shared},
        {"name": "fsdp", "strategy": "fsdp", "options": {"activation_checkpointing": True}, **shared},
        {"name": "compiled", "compile": True, **shared},
        {"name": "compiled again", "compile": True, "options": {"activation_checkpointing": True}, **shared},
        # Two steps by processes that share sequences, the rest by one that does not.
        {"name": "moved", **shared, "steps": 2},
    )
    run_ranks(directory, 4, {"name": "pairs", "strategy": "fsdp", **shared, "micro_batch_size": 2})
    return directory


@pytest.mark.parametrize("name", ["ddp", "fsdp", "compiled", "compiled again", "pairs"])
def test_shared_sequences_train_as_whole_ones(runs, name):
    assert_same_training(runs / name, runs / "alone")


def test_everything_that_is_logged_is_of_whole_sequences(runs):
    for key in ("val/loss_by_position/64", "val/bits_per_byte", "power/min_normalizer/0", "power/gate_half_life/1"):
        expected = values(runs / "alone", key)
        assert expected
        # Normalisers are sums of squares that cancel; see docs/op.md.
        assert values(runs / "ddp", key) == pytest.approx(expected, rel=1e-3 if "power" in key else FP32), key
    keys = [{key for record in read_metrics(runs / name) for key in record} for name in ("alone", "ddp")]
    assert keys[0] == keys[1]


def test_a_run_goes_on_where_sequences_are_no_longer_shared(runs):
    assert train(runs, name="moved", model="gpt", **STEPS).resumed_step == 2
    assert_same_training(runs / "moved", runs / "alone")


def test_groups_of_processes_share_the_global_batch():
    config = TrainerConfig(
        accelerator="cpu", devices=6, context_parallel=3, context_length=64, global_batch_tokens=64 * 4
    )
    assert resolve_devices(config) == Devices("cpu", 6, 1, 3)
    assert resolve_devices(config).data_parallel == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_parallel": 4}, r"context_parallel=4 does not divide the 6 processes .* allowed are \[1, 2, 3, 6\]"),
        ({"context_parallel": 2}, "is 4 sequences of 64 tokens, which 3 groups of 2 processes cannot share equally"),
        ({"context_parallel": 65}, "context_parallel is 65, more than the 64 tokens"),
        ({"context_parallel": 0}, "context_parallel is 0; it must be a whole number of at least 1"),
    ],
)
def test_contradictions_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        resolve_devices(
            TrainerConfig(accelerator="cpu", devices=6, context_length=64, global_batch_tokens=64 * 4, **changes)
        )


def test_one_command_shares_the_packed_documents_of_a_corpus(tmp_path):
    """All kinds of mixers over short documents, with a context of which one process has a token more."""
    for number in range(60):
        text = "".join(f"x{i} = {number}\n" for i in range(1 + number % 7))
        (tmp_path / f"{number}.txt").write_text(text)
    arguments = [
        *OPTIONS,
        f"data.files={tmp_path}/*.txt",
        f"paths.cache={tmp_path / 'cache'}",
        f"paths.runs={tmp_path}",
    ]
    arguments += ["model.n_layers=4", 'mixer.kind="power,softmax,window,linear"', "mixer.gated=true", "mixer.window=9"]
    arguments += ["trainer.context_length=63", "trainer.global_batch_tokens=252", "data.max_val_tokens=504"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    for name, changes in {
        "one": ["trainer.devices=1"],
        "two": ["trainer.devices=2", "trainer.context_parallel=2"],
    }.items():
        command = [sys.executable, "-m", "powertrain", "train", *arguments, f"run_id={name}", *changes]
        subprocess.run(command, env=environment, check=True, timeout=240)
    assert len(values(tmp_path / "one", "train/loss")) == 8
    for key, rtol in {"train/loss": FP32, "val/loss": FP32, "train/grad_norm": 10 * FP32}.items():
        assert values(tmp_path / "two", key) == pytest.approx(values(tmp_path / "one", key), rel=rtol), key

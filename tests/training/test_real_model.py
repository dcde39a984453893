"""The GPT and the token datamodule through `fit`: learns, resumes bit for bit, and reports what power layers have."""

import math
import re

import pytest
import torch

from powertrain.data.config import DataConfig, TokenizerConfig
from powertrain.data.datamodule import TokenDataModule
from powertrain.models.config import MixerConfig, ModelConfig
from powertrain.models.flops import model_flops
from powertrain.models.gpt import GPT
from powertrain.training.config import OptimConfig, ScheduleConfig, TrainerConfig
from powertrain.training.fit import fit
from powertrain.training.length import TrainingLength
from powertrain.training.nonfinite import NonFiniteError, replay
from powertrain.training.records import read_metrics
from tests.training.test_resume import Crash, Do, assert_same_run, crash

CONTEXT = 64


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    directory = tmp_path_factory.mktemp("corpus")
    for number in range(40):
        lines = [f"def f{number}_{i}(x):\n    return x + {i * number}\n\n" for i in range(20)]
        (directory / f"{number:02d}.py").write_text("".join(lines))
    return directory


def train(corpus, run_dir, *, kind="power", gate_init=0.999, callbacks=None, poison=None, steps=12):
    torch.manual_seed(0)
    data = TokenDataModule(
        DataConfig(
            source="text",
            files=(str(corpus / "*.py"),),
            tokenizer=TokenizerConfig(kind="bytes"),
            num_workers=0,
            val_fraction=0.1,
            max_val_tokens=1024,
        ),
        context_length=CONTEXT,
        micro_batch_size=1,
        cache_dir=corpus / "cache",
    )
    config = ModelConfig(
        n_layers=2,
        d_model=32,
        n_heads=2,
        vocab_size=data.vocab_size,
        mixer=MixerConfig(kind=kind, chunk_size=16, gate_init=gate_init),
    )
    model = GPT(config)
    if poison is not None:
        with torch.no_grad():
            model.blocks[poison].mlp.up.weight.fill_(3e38)
    trainer = TrainerConfig(
        context_length=CONTEXT,
        global_batch_tokens=8 * CONTEXT,
        micro_batch_size=4,
        precision="bf16-mixed",
        accelerator="cpu",
        val_every_steps=4,
        log_every_steps=1,
    )
    length = TrainingLength(steps, trainer.global_batch_tokens, model_flops(config, CONTEXT).algorithmic.total, "test")
    return fit(
        model,
        data,
        optim=OptimConfig(lr=1e-2),
        schedule=ScheduleConfig(),
        trainer=trainer,
        length=length,
        run_dir=run_dir,
        run_id=run_dir.name,
        callbacks=callbacks,
    )


def test_learns_and_resumes_bit_for_bit(corpus, tmp_path):
    train(corpus, tmp_path / "whole")
    records = read_metrics(tmp_path / "whole")
    losses = [r["train/loss"] for r in records if "train/loss" in r]
    # At the start the model guesses among about 257 tokens.
    assert losses[0] == pytest.approx(math.log(257), abs=0.5)
    assert losses[-1] < 3.5
    first = records[0]
    for layer in (0, 1):
        assert first[f"power/gate_half_life/{layer}"] == pytest.approx(math.log(0.5) / math.log(0.999), rel=0.02)
        assert first[f"power/min_normalizer/{layer}"] > 0
    val = [r for r in records if "val/loss" in r][-1]
    # One token is one byte, but for the ends of documents.
    assert val["val/bits_per_byte"] == pytest.approx(val["val/loss"] / math.log(2), rel=0.02)

    with pytest.raises(Crash):
        train(corpus, tmp_path / "broken", callbacks=[Do(7, crash)])
    assert train(corpus, tmp_path / "broken").resumed_step == 4
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.parametrize(
    ("gate_init", "poison"),
    [(0.999, 1), ((0.9, 0.9999), 1), (0.999, 0)],
    ids=["number", "pair", "gates of the next layer are NaN"],
)
def test_a_record_of_a_non_finite_step_is_replayed_without_the_run(corpus, tmp_path, gate_init, poison):
    where = f"blocks.{poison}.mlp.up"
    with pytest.raises(NonFiniteError, match=f"step 1: the loss is not finite: the output of {re.escape(where)}"):
        train(corpus, tmp_path / "run", gate_init=gate_init, poison=poison)
    diagnosis = replay(tmp_path / "run" / "nonfinite" / "step-00000001" / "rank-0.pt")
    assert diagnosis.forward == where


def test_softmax_trains_by_the_same_loop(corpus, tmp_path):
    result = train(corpus, tmp_path / "run", kind="softmax", steps=2)
    assert result.finished
    assert not any(key.startswith("power/") for record in read_metrics(tmp_path / "run") for key in record)

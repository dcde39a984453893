import math

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from powertrain.training.config import OptimConfig, ScheduleConfig, TrainerConfig
from powertrain.training.length import TrainingLength
from powertrain.training.module import PowertrainModule
from powertrain.training.nonfinite import MAX_RECORDS, Diagnosis, NonFiniteError, fp32_products, replay
from powertrain.training.ranks import Ranks
from powertrain.training.records import read_metrics
from powertrain.training.rng import capture_rng
from powertrain.training.schedules import Schedule
from tests.training.fakes import CONTEXT, FakeData, TinyModel, make_batch, run_tiny, saved_tensors
from tests.training.test_resume import assert_same_run


class _NanBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")


class Faulty(nn.Module):
    """A linear map that overflows, or whose backward pass gives NaN, for batches that hold the token `trigger`."""

    def __init__(self, inner, kind):
        super().__init__()
        self.inner, self.kind, self.on = inner, kind, False

    def forward(self, x):
        x = self.inner(x)
        if not self.on:
            return x
        return x * float("nan") if self.kind == "forward" else _NanBackward.apply(x)


class FaultyModel(TinyModel):
    """Goes wrong in layer 1 for batches that begin with a certain token."""

    def __init__(self, kind, trigger=None):
        super().__init__(dropout=0.0)
        self.blocks[1] = Faulty(self.blocks[1], kind)
        self.trigger = trigger

    def forward(self, input_ids, **kwargs):
        self.blocks[1].on = bool((input_ids == self.trigger).any()) if self.trigger is not None else True
        return super().forward(input_ids, **kwargs)


TRIGGER = 63


class Poisoned(FakeData):
    """Puts the trigger into the training batches of some steps (counted from 1)."""

    def __init__(self, steps):
        super().__init__()
        self.steps = steps

    def on_before_batch_transfer(self, batch, dataloader_idx):
        micro = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if self.trainer.training and micro // 2 + 1 in self.steps and micro % 2 == 1:
            batch = {**batch, "input_ids": batch["input_ids"].clone()}
            batch["input_ids"][0, 0] = TRIGGER
        return batch


class Weights(pl.Callback):
    def __init__(self):
        self.by_step = {}

    def on_train_batch_end(self, trainer, pl_module, *_):
        if pl_module.at_step_end:
            values = [p.detach().clone().flatten() for p in pl_module.model.parameters()]
            self.by_step[pl_module.step] = torch.cat(values)


@pytest.mark.parametrize(
    ("kind", "what", "where"),
    [
        ("forward", "the loss is not finite", r"the output of blocks\.1 went first"),
        ("backward", "the gradient is not finite", r"the gradient of blocks\.1\.inner's output went first"),
    ],
)
def test_stop_names_the_layer_keeps_the_weights_and_replays(tmp_path, kind, what, where):
    model = FaultyModel(kind, TRIGGER)
    with pytest.raises(NonFiniteError, match=rf"step 3: {what}: {where}; the update was not made; replay it from"):
        run_tiny(tmp_path / "run", steps=10, model=model, data=Poisoned({3}))
    path = tmp_path / "run" / "nonfinite" / "step-00000003" / "rank-0.pt"
    record = torch.load(path, weights_only=True)
    assert len(record["micro_batches"]) == 2
    assert (record["micro_batches"][1]["input_ids"] == TRIGGER).any()
    weights = torch.load(path.with_name("weights.pt"), weights_only=True)
    assert all(torch.isfinite(value).all() for value in weights.values())
    # The weights are those before the update: the checkpoint of step 2 has them.
    saved = saved_tensors(tmp_path / "run" / "checkpoints" / "step-00000002")
    assert all(torch.equal(value, saved[f"model.{name}"]) for name, value in weights.items())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    again = replay(path, model=FaultyModel(kind, TRIGGER))
    assert str(again) == record["diagnosis"]
    assert str(again) in str(where).replace("\\", "")
    assert str(replay(path, model=FaultyModel(kind, trigger=10**6))).startswith("a replay of the batch was finite")
    assert read_metrics(tmp_path / "run")[-1]["step"] == 2


class TwoRanks(Ranks):
    """The first of two, of which the other finds what `other` says."""

    other = Diagnosis(1.0)

    def gather(self, value):
        return [value, self.other]

    def broadcast(self, value):
        return value


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (Diagnosis(1.0, backward="head"), r"not finite on rank 1: the gradient of head went first.*/rank-1\.pt$"),
        (Diagnosis(1.0), r"not finite: a replay of the batch was finite .*/rank-\*\.pt$"),
    ],
    ids=["found on rank 1", "found nowhere"],
)
def test_a_rank_is_named_only_where_a_replay_shows_which(tmp_path, monkeypatch, other, says):
    monkeypatch.setattr(TwoRanks, "other", other)
    module = PowertrainModule(
        TinyModel(),
        optim=OptimConfig(),
        schedule=Schedule(ScheduleConfig(), TrainingLength(10, 4 * CONTEXT, 1.0, "test")),
        trainer=TrainerConfig(precision="32-true"),
        run_dir=tmp_path,
        ranks=TwoRanks(size=2),
    )
    module._micro_batches, module._rng, module.loss = [make_batch(0, 2)], capture_rng(), 1.0
    with pytest.raises(NonFiniteError, match=f"step 1: the gradient is {says}"):
        module._reject(module.configure_optimizers())


def test_skip_leaves_the_weights_of_that_step_and_counts(tmp_path):
    seen = Weights()
    model = FaultyModel("backward", TRIGGER)
    result = run_tiny(tmp_path / "run", steps=6, model=model, data=Poisoned({3, 5}), nonfinite="skip", callbacks=[seen])
    assert result.finished
    assert result.counters.skipped == 2
    assert result.counters.skipped_in_a_row == 0
    assert torch.equal(seen.by_step[2], seen.by_step[3])
    assert torch.equal(seen.by_step[4], seen.by_step[5])
    assert not torch.equal(seen.by_step[3], seen.by_step[4])
    train = {r["step"]: r for r in read_metrics(tmp_path / "run") if "train/loss" in r}
    assert train[2].get("train/skipped_updates") is None
    assert train[6]["train/skipped_updates"] == 2
    assert train[3]["train/grad_norm"] is None


def test_skip_gives_up_after_so_many_in_a_row(tmp_path):
    with pytest.raises(NonFiniteError, match=r"step 5: .*3 updates in a row were skipped"):
        run_tiny(
            tmp_path / "run",
            steps=10,
            model=FaultyModel("forward", TRIGGER),
            data=Poisoned({1, 3, 4, 5}),
            nonfinite="skip",
            nonfinite_patience=3,
        )


def test_records_are_limited(tmp_path):
    run_tiny(
        tmp_path / "run",
        steps=8,
        model=FaultyModel("forward", TRIGGER),
        data=Poisoned(set(range(1, 9))),
        nonfinite="skip",
        nonfinite_patience=100,
        val_every_steps=100,
        checkpoint_every_steps=100,
    )
    assert len(list((tmp_path / "run" / "nonfinite").iterdir())) == MAX_RECORDS


def test_weights_that_are_not_finite_are_named(tmp_path):
    model = TinyModel()
    with torch.no_grad():
        model.blocks[0].weight[3, 4] = math.nan
    with pytest.raises(NonFiniteError, match=r"the weights of blocks\.0\.weight were not finite before the step"):
        run_tiny(tmp_path / "run", steps=2, model=model)


def test_a_run_that_stopped_continues_exactly_when_the_cause_is_gone(tmp_path):
    def model(trigger):
        torch.manual_seed(0)
        return FaultyModel("forward", trigger)

    with pytest.raises(NonFiniteError):
        run_tiny(tmp_path / "run", steps=6, model=model(TRIGGER), data=Poisoned({3}))
    run_tiny(tmp_path / "run", steps=6, model=model(10**6))
    run_tiny(tmp_path / "clean", steps=6, model=model(10**6))
    assert_same_run(tmp_path / "run", tmp_path / "clean")


@pytest.mark.parametrize(
    ("precision", "device_type", "inside"),
    [("bf16-mixed", "cuda", "high"), ("bf16-mixed", "cpu", "highest"), ("32-true", "cuda", "highest")],
)
def test_fp32_products_round_beside_bf16_on_a_gpu_and_nowhere_else(precision, device_type, inside):
    assert torch.get_float32_matmul_precision() == "highest"
    with fp32_products(precision, device_type):
        assert torch.get_float32_matmul_precision() == inside
    assert torch.get_float32_matmul_precision() == "highest"

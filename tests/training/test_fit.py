import io
import os
import re
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from powertrain.training import clock
from powertrain.training.batching import Devices, _fits, choose_micro_batch_size, resolve_devices, with_precision
from powertrain.training.checkpoint import CheckpointStore
from powertrain.training.config import DebugConfig, TrainerConfig
from powertrain.training.progress import ProgressReport, duration
from powertrain.training.ranks import Ranks
from powertrain.training.records import read_metrics
from tests.training import fakes
from tests.training.fakes import CONTEXT, FakeData, TinyModel, run_tiny

ONE_CPU = Devices("cpu", 1, 1)


def test_an_unknown_micro_batch_is_the_largest_that_a_cpu_should_take():
    model = TinyModel()
    config = TrainerConfig(context_length=1024, global_batch_tokens=24 * 1024)
    assert choose_micro_batch_size(model, config, ONE_CPU) == 8
    assert choose_micro_batch_size(model, config, Devices("cpu", 3, 2)) == 4
    long = TrainerConfig(context_length=65536, global_batch_tokens=2 * 65536)
    assert choose_micro_batch_size(model, long, ONE_CPU) == 1


def test_a_micro_batch_that_does_not_divide_a_ranks_share_is_refused():
    config = TrainerConfig(context_length=64, global_batch_tokens=64 * 8, micro_batch_size=8)
    with pytest.raises(ValueError, match=r"does not divide the 4 sequences that each of 2 .* allowed are \[1, 2, 4\]"):
        choose_micro_batch_size(TinyModel(), config, Devices("cpu", 2, 1))


@pytest.mark.parametrize("shared", [{"strategy": "fsdp"}, {"context_parallel": 2}], ids=["fsdp", "context parallel"])
def test_gpus_that_share_a_model_or_sequences_need_a_micro_batch(shared):
    config = TrainerConfig(context_length=64, global_batch_tokens=64 * 4, accelerator="gpu", devices=4, **shared)
    ((name, value),) = shared.items()
    devices = Devices("gpu", 4, 1, config.context_parallel)
    with pytest.raises(
        ValueError, match=rf"^trainer.{name}={value} needs trainer.micro_batch_size on GPUs, .* allowed"
    ):
        choose_micro_batch_size(TinyModel(), config, devices)


def test_training_time_holds_the_agreement_of_the_ranks_and_no_save(tmp_path, monkeypatch):
    """By a clock that only forward passes (1 s), the agreement (10 s) and the beginning of a save (1000 s) move."""
    now = [0.0]

    def taking(seconds, function):
        def call(*args, **kwargs):
            now[0] += seconds
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(TinyModel, "forward", taking(1.0, TinyModel.forward))
    monkeypatch.setattr(Ranks, "max", taking(10.0, Ranks.max))
    monkeypatch.setattr(CheckpointStore, "begin", taking(1000.0, CheckpointStore.begin))
    run_tiny(tmp_path / "run", steps=5)
    records = [record for record in read_metrics(tmp_path / "run") if "train/tokens_per_second" in record]
    # Two micro-batches a step; step 2 is saved; the ranks agree after step 4 in the pause of its validation.
    seconds = [4 * CONTEXT / record["train/tokens_per_second"] for record in records]
    assert seconds == pytest.approx([2.0, 12.0, 12.0, 12.0, 2.0])


def test_processes_that_cannot_share_the_batch_are_refused():
    config = TrainerConfig(context_length=64, global_batch_tokens=64 * 8, accelerator="cpu", devices=3)
    with pytest.raises(ValueError, match=r"8 sequences .* 3 processes cannot share equally; give a multiple of 192"):
        resolve_devices(config)


def test_gpus_that_are_not_there_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"needs 2 GPUs on this machine, which has none"):
        resolve_devices(TrainerConfig(accelerator="gpu", devices=2))
    assert resolve_devices(TrainerConfig()).accelerator == "cpu"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu_the_largest_that_fits_is_taken():
    model = TinyModel()
    config = TrainerConfig(context_length=64, global_batch_tokens=64 * 8)
    assert choose_micro_batch_size(model, config, Devices("gpu", 1, 1)) == 8
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


@pytest.mark.parametrize(
    ("gpus", "in_bf16", "accelerator", "precision"),
    [
        (0, False, "auto", "32-true"),
        (1, True, "auto", "bf16-mixed"),
        (1, True, "gpu", "bf16-mixed"),
        (1, False, "auto", "32-true"),
        (1, True, "cpu", "32-true"),
    ],
)
def test_a_precision_left_to_the_device_is_bf16_where_a_gpu_computes_in_it(
    monkeypatch, gpus, in_bf16, accelerator, precision
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or in_bf16
    )
    config = with_precision(TrainerConfig(accelerator=accelerator))
    assert config == TrainerConfig(accelerator=accelerator, precision=precision)
    assert with_precision(config) is config
    other = TrainerConfig(precision="32-true" if precision == "bf16-mixed" else "bf16-mixed")
    assert with_precision(other) is other


def _cuda_of_another_process(monkeypatch, free, reserved, peak):
    """A GPU of 80 bytes as torch describes it, after a pass of this process."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak)
    for name in ("empty_cache", "reset_peak_memory_stats", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: None)


@pytest.mark.parametrize(
    ("free", "reserved", "peak", "fits"),
    [(60, 20, 70, True), (60, 20, 73, False), (20, 20, 36, True), (20, 20, 37, False)],
)
def test_what_other_processes_hold_is_not_there(monkeypatch, free, reserved, peak, fits):
    _cuda_of_another_process(monkeypatch, free, reserved, peak)
    model = TinyModel()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.unused = torch.nn.Parameter(torch.zeros(0))
    monkeypatch.setattr(TinyModel, "forward", lambda self, ids, **_: SimpleNamespace(loss=self.unused.sum()))
    assert _fits(model, 1, 4, "32-true", torch.device("cpu")) is fits


def test_records_have_every_promised_key(tmp_path):
    run_tiny(tmp_path / "run", steps=4, log_every_steps=2, peak_flops=1e9)
    records = read_metrics(tmp_path / "run")
    train = [r for r in records if "train/loss" in r]
    assert [r["step"] for r in train] == [2, 4]
    counters = {"step", "tokens", "flops", "seconds"}
    names = ("loss", "perplexity", "bits_per_byte", "grad_norm", "lr", "tokens_per_second", "mfu")
    assert set(train[0]) == counters | {f"train/{name}" for name in names} | {"power/gate_half_life/0"}
    (val,) = [r for r in records if "val/loss" in r]
    assert set(val) == counters | {"val/loss", "val/perplexity", "val/bits_per_byte", "val/loss_by_position/64"}
    for record in train:
        assert record["flops"] == record["tokens"] * 1000.0
        rate = record["train/tokens_per_second"]
        assert record["train/mfu"] == pytest.approx(rate * 1000.0 / 1e9)
    assert val["val/bits_per_byte"] == pytest.approx(val["val/loss"] / 3 / 0.6931471805599453)


def test_tokens_per_second_leaves_validation_out(tmp_path):
    import time

    class Slow(FakeData):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            time.sleep(0.3 if self.trainer.validating else 0.05)
            return batch

    run_tiny(tmp_path / "run", steps=4, data=Slow(), val_every_steps=2, log_every_steps=4)
    (train,) = [r for r in read_metrics(tmp_path / "run") if "train/loss" in r]
    # 8 micro-batches of 0.05 s, and between them a validation of 1.2 s; either may take longer on a busy machine.
    assert 0.4 < 256 * 4 / train["train/tokens_per_second"] < train["seconds"] - 1.2


def test_debug_limits_the_validation_and_overfits_one_batch_across_a_resume(tmp_path):
    seen = {"training": [], "validating": []}

    class Watched(TinyModel):
        def forward(self, input_ids, **kwargs):
            seen["training" if self.training else "validating"].append(input_ids.clone())
            return super().forward(input_ids, **kwargs)

    for steps in (4, 6):
        run_tiny(tmp_path / "run", steps=steps, debug=DebugConfig(val_batches=1, overfit=True), model=Watched())
    assert len(seen["validating"]) == 2
    first, second = seen["training"][:2]
    assert not torch.equal(first, second)
    assert len(seen["training"]) == 12
    for number, ids in enumerate(seen["training"]):
        assert torch.equal(ids, (first, second)[number % 2])


def test_each_new_best_is_saved_though_the_first_validation_was_not_a_number(tmp_path):
    class NanAtFirst(TinyModel):
        validating = 0

        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            self.validating += not self.training
            return output if self.training or self.validating > 4 else output._replace(loss=output.loss * torch.nan)

    result = run_tiny(tmp_path / "run", model=NanAtFirst(), steps=6, val_every_steps=2, checkpoint_every_steps=6)
    assert (tmp_path / "run" / "checkpoints" / "step-00000004").exists()
    assert result.counters.best_step == 6


@pytest.mark.parametrize("profiler", ["simple", "pytorch"])
def test_a_profile_is_written_to_the_run(tmp_path, profiler):
    run_tiny(tmp_path / "run", steps=3, debug=DebugConfig(profiler=profiler))
    assert list((tmp_path / "run" / "profile").iterdir())


def test_anomaly_detection_is_handed_on(tmp_path):
    class Watched(TinyModel):
        seen = False

        def forward(self, *args, **kwargs):
            Watched.seen |= torch.is_anomaly_enabled()
            return super().forward(*args, **kwargs)

    run_tiny(tmp_path / "run", steps=1, model=Watched(), debug=DebugConfig(detect_anomaly=True))
    assert Watched.seen
    assert not torch.is_anomaly_enabled()


def test_durations():
    assert [duration(s) for s in (0, 59.4, 60, 185, 7620, 360_000)] == [
        "0s",
        "59s",
        "1m 00s",
        "3m 05s",
        "2h 07m",
        "4d 4h",
    ]


def run_with_console(tmp_path, monkeypatch, console):
    monkeypatch.setattr("powertrain.training.fit.ProgressReport", lambda: ProgressReport(console, every_seconds=0.0))
    run_tiny(tmp_path / "run", steps=6)
    return console.file.getvalue()


def test_without_a_terminal_progress_is_plain_lines(tmp_path, monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=False, width=200)
    text = run_with_console(tmp_path, monkeypatch, console)
    lines = text.splitlines()
    assert len(lines) == 8
    assert "\x1b" not in text
    assert re.fullmatch(r"step 6/6  loss \d\.\d{3}  val \d\.\d{3}  tok/s \S+  left 0s", lines[-1])


@pytest.mark.parametrize("width", [80, 120, 200])
def test_on_a_terminal_there_is_one_live_bar_on_one_line(tmp_path, monkeypatch, width):
    console = Console(file=io.StringIO(), force_terminal=True, width=width)
    text = run_with_console(tmp_path, monkeypatch, console)
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).strip().splitlines()[-1]
    assert re.search(r"training .* 6/6 .*loss \d\.\d{3}.*val \d\.\d{3}.*tok/s \S+.*left 0s", last)


def autocasts_of_a_run(run_dir, precision):
    """Return whether the model saw autocast, and the type of its weights, over all of its passes."""
    seen = set()

    class Watched(TinyModel):
        def forward(self, *args, **kwargs):
            seen.add((torch.is_autocast_enabled("cpu"), self.head.weight.dtype))
            return super().forward(*args, **kwargs)

    run_tiny(run_dir, steps=1, model=Watched(), precision=precision)
    return seen


@pytest.mark.parametrize(
    ("precision", "autocast"),
    [("bf16-mixed", True), ("32-true", False), (TrainerConfig().precision, False)],
    ids=["bf16-mixed", "32-true", "default"],
)
def test_the_callers_precision_gives_autocast(tmp_path, precision, autocast):
    assert autocasts_of_a_run(tmp_path / "run", precision) == {(autocast, torch.float32)}


def test_where_gpus_differ_the_first_rank_decides_the_precision(tmp_path, monkeypatch):
    class OfABf16Gpu(Ranks):
        def broadcast(self, value):
            return "bf16-mixed" if value == "32-true" else value

    monkeypatch.setattr("powertrain.training.fit.process_group", lambda *_: nullcontext(OfABf16Gpu()))
    assert autocasts_of_a_run(tmp_path / "run", "auto") == {(True, torch.float32)}


def test_fakes_follow_the_contract():
    batch = fakes.make_batch(0, 2)
    assert set(batch) == {"input_ids", "labels", "cu_seqlens"}

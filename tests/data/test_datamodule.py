from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from powertrain.data.config import DataConfig, TokenizerConfig
from powertrain.data.datamodule import TokenDataModule, order_hash
from powertrain.data.packing import IGNORE, Batch
from powertrain.data.shards import ShardError

from .conftest import make_texts, write_texts

Build = Callable[..., DataConfig]
T = 256
GLOBAL = 12


def module(config: DataConfig, **options: Any) -> TokenDataModule:
    settings = {"context_length": T, "micro_batch_size": 2, "global_batch_size": GLOBAL, "seed": 3, **options}
    return TokenDataModule(config, **settings)


def global_order(
    config: DataConfig, steps: int, *, world_size: int = 1, micro_batch_size: int = 2, start: int = 0
) -> list[Batch]:
    """Return the micro-batches of all ranks over some steps, in the order (step, micro-batch, rank)."""
    loaders = []
    for rank in range(world_size):
        data = module(config, micro_batch_size=micro_batch_size)
        data.set_ranks(rank, world_size)
        data.consumed_samples = start
        accumulation = data.accumulation
        loaders.append(iter(data.train_dataloader()))
    return [next(loader) for _ in range(steps * accumulation) for loader in loaders]


# Order


def test_order_is_that_of_the_samples(text_config: Build) -> None:
    data = module(text_config())
    batches = global_order(text_config(), steps=8)
    windows, seen = data.train_windows, torch.cat([batch["input_ids"] for batch in batches])
    # The steps below run through more than one epoch, each of which reads every window once.
    n = len(windows)
    assert n < len(seen)
    everything = sorted(tuple(windows[i].tokens[:-1].tolist()) for i in range(n))
    assert sorted(map(tuple, seen[:n].tolist())) == everything
    assert seen[:n].tolist() != [windows[i].tokens[:-1].tolist() for i in range(n)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 12), (1, 3), (2, 2), (2, 6), (3, 4), (4, 3), (4, 1)])
def test_order_is_the_same_for_all_ranks_and_workers(
    text_config: Build, world_size: int, micro_batch_size: int, workers: int
) -> None:
    expected = order_hash(global_order(text_config(), steps=8))
    config = text_config(num_workers=workers)
    batches = global_order(config, steps=8, world_size=world_size, micro_batch_size=micro_batch_size)
    assert order_hash(batches) == expected


def test_workers_outlive_the_signals_of_their_group_and_end_with_their_loader(text_config: Build) -> None:
    loader = iter(module(text_config(num_workers=2)).train_dataloader())
    batches = [next(loader)]
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker, signum in itertools.product(workers, (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)):
        assert worker.pid is not None
        os.kill(worker.pid, signum)
    # More than the workers had made before the signals.
    batches += itertools.islice(loader, 11)
    assert order_hash(batches) == order_hash(itertools.islice(module(text_config()).train_dataloader(), 12))
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's would raise that a worker was killed
    try:
        workers[0].terminate()
        workers[0].join(30)
    finally:
        signal.signal(signal.SIGCHLD, handler)
    assert workers[0].exitcode == -signal.SIGKILL
    del loader
    workers[1].join(30)
    assert not workers[1].is_alive()


def test_seed_decides_the_order(text_config: Build) -> None:
    def first(seed: int) -> str:
        return order_hash(itertools.islice(module(text_config(), seed=seed).train_dataloader(), 6))

    assert first(0) == first(0)
    assert first(0) != first(1)


@pytest.mark.parametrize("world_size", [1, 3])
def test_resume_within_and_across_epochs(text_config: Build, world_size: int) -> None:
    steps = 8
    whole = global_order(text_config(), steps)
    per_epoch = len(module(text_config()).train_windows)
    assert GLOBAL < per_epoch < GLOBAL * (steps - 2)
    for done in (1, 2, per_epoch // GLOBAL + 1, steps - 1):
        rest = global_order(text_config(), steps - done, world_size=world_size, start=done * GLOBAL)
        assert order_hash(rest) == order_hash(whole[done * GLOBAL // 2 :])


def test_state_is_a_few_counters(text_config: Build) -> None:
    data = module(text_config())
    data.consumed_samples = 36
    state = data.state_dict()
    assert state["consumed_samples"] == 36
    assert all(isinstance(value, int | str) for value in state.values())
    other = module(text_config())
    other.load_state_dict(state)
    assert other.consumed_samples == 36


def test_state_of_other_data_is_refused(text_config: Build) -> None:
    state = module(text_config()).state_dict()
    for key, data in {
        "seed": module(text_config(), seed=4),
        "context_length": module(text_config(), context_length=128),
        "fingerprint": module(text_config(split_seed=1)),
    }.items():
        with pytest.raises(ValueError, match=f"another {key}"):
            data.load_state_dict(state)
    with pytest.raises(ValueError, match="consumed_samples=-1"):
        module(text_config()).consumed_samples = -1


def test_accumulation(text_config: Build) -> None:
    data = module(text_config(), micro_batch_size=2)
    assert data.accumulation == 6
    data.set_ranks(1, 3)
    assert data.accumulation == 2
    data.set_ranks(0, 4)
    with pytest.raises(ValueError, match=r"12 sequences .* micro-batches of 2 on 4 ranks: .* multiple of 8"):
        _ = data.accumulation
    assert module(text_config(), global_batch_size=None).accumulation == 1
    with pytest.raises(ValueError, match=r"rank=4 has to lie in 0\.\.3"):
        data.set_ranks(4, 4)
    with pytest.raises(ValueError, match="micro_batch_size=0"):
        module(text_config(), micro_batch_size=0)


# Validation


def validation_rows(config: DataConfig, world_size: int, micro_batch_size: int) -> dict[str, list[Any]]:
    """Return what counts of one evaluation over all ranks, sorted."""
    loaders = []
    for rank in range(world_size):
        data = module(config, micro_batch_size=micro_batch_size, global_batch_size=None)
        data.set_ranks(rank, world_size)
        loader = data.val_dataloader()
        batches = list(loader)
        assert len(batches) == len(loader)
        assert all(batch["input_ids"].shape == (micro_batch_size, T) for batch in batches)
        loaders.append(batches)
    assert len({len(batches) for batches in loaders}) == 1
    rows, label_bytes = [], 0
    for batch in itertools.chain(*loaders):
        label_bytes += int(batch["label_bytes"].sum())
        rows += [
            (i.tolist(), lab.tolist())
            for i, lab in zip(batch["input_ids"], batch["labels"], strict=True)
            if (lab != IGNORE).any()
        ]
    return {"rows": sorted(rows), "bytes": [label_bytes]}


def test_validation_is_the_same_for_all_ranks_and_batches(text_config: Build) -> None:
    config = text_config(max_val_tokens=7 * T)
    expected = validation_rows(config, 1, 1)
    assert len(expected["rows"]) == 7
    for world_size, micro_batch_size in [(1, 3), (2, 2), (3, 1), (4, 5)]:
        assert validation_rows(config, world_size, micro_batch_size) == expected


def test_validation_reads_the_validation_split_from_its_start(text_config: Build) -> None:
    data = module(text_config(max_val_tokens=None), context_length=16, micro_batch_size=1, global_batch_size=None)
    stream = data.store.split("validation")
    tokens, _ = stream.read(0, stream.num_tokens + 1)
    labels = torch.cat([batch["labels"].flatten() for batch in data.val_dataloader()])
    assert labels.tolist() == tokens[1 : len(labels) + 1].tolist()
    assert data.val_tokens == len(labels) == stream.num_tokens // 16 * 16


@pytest.mark.parametrize("tokenizer", [TokenizerConfig(kind="bytes"), TokenizerConfig(kind="bpe", vocab_size=300)])
def test_label_bytes_are_exact(text_config: Build, tokenizer: TokenizerConfig) -> None:
    """With the whole split in one row, labels stand for every byte of its documents, no more and no less."""
    config = text_config(tokenizer=tokenizer, max_val_tokens=None)
    length = module(config).store.split("validation").num_tokens
    data = module(config, context_length=length, micro_batch_size=1, global_batch_size=None)
    (batch,) = data.val_dataloader()
    assert int(batch["label_bytes"].sum()) == data.store.split("validation").num_bytes
    assert (batch["label_bytes"][batch["labels"] == data.tokenizer.eod_id] == 0).all()


def test_at_least_one_validation_window(text_config: Build) -> None:
    assert module(text_config(max_val_tokens=1)).num_val_windows == 1


# The corpus


def test_what_a_record_says(text_config: Build) -> None:
    data = module(text_config())
    record = data.describe()
    texts = make_texts(60)
    assert record["documents"] == 60
    assert record["vocab_size"] == 257
    assert record["train_tokens"] == len(data.train_windows) * T
    stream = data.store.split("train")
    assert record["bytes_per_token"] == stream.num_bytes / (stream.num_bytes + stream.num_documents)
    total = sum(len(t.encode()) for t in texts)
    assert stream.num_bytes + data.store.split("validation").num_bytes == total


@pytest.mark.parametrize(("length", "split"), [(10**6, "train"), (6000, "validation")])
def test_context_longer_than_the_data(text_config: Build, length: int, split: str) -> None:
    data = module(text_config(), context_length=length)
    with pytest.raises(ValueError, match=rf"the {split} split holds [\d,]+ tokens in \d+ documents, fewer than one"):
        data.setup()


def test_an_import_of_the_module_does_not_tokenize(text_config: Build) -> None:
    data = module(text_config())
    assert "store" not in vars(data)


# In a Lightning run


class Recorder(L.LightningModule):
    """Trains one number, and notes the ids of every batch whose step it finished."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.fail_at = fail_at
        self.seen: list[Batch] = []

    def training_step(self, batch: Batch, index: int) -> torch.Tensor:
        if len(self.seen) == self.fail_at:
            raise KeyboardInterrupt
        self.seen.append({"input_ids": batch["input_ids"].clone()})
        return self.weight * batch["input_ids"].float().mean()

    def validation_step(self, batch: Batch, index: int) -> None:
        assert batch["label_bytes"].shape == batch["labels"].shape

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(directory: Path, steps: int, accumulation: int, **options: Any) -> L.Trainer:
    return L.Trainer(
        default_root_dir=directory,
        accelerator="cpu",
        max_steps=steps,
        accumulate_grad_batches=accumulation,
        val_check_interval=3 * accumulation,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("workers", [0, 2])
def test_lightning_resumes_where_steps_were_complete(text_config: Build, tmp_path: Path, workers: int) -> None:
    config = text_config(num_workers=workers)
    unbroken = Recorder()
    data = module(config)
    trainer(tmp_path, 8, data.accumulation).fit(unbroken, data)
    assert data.consumed_samples == 8 * GLOBAL
    assert order_hash(unbroken.seen) == order_hash(global_order(config, steps=8))

    # Interrupted in the middle of the accumulation of the sixth step, with batches prefetched.
    per_step = data.accumulation
    broken, data = Recorder(fail_at=5 * per_step + 3), module(config)
    first = trainer(tmp_path, 8, per_step)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        first.fit(broken, data)
    assert data.consumed_samples == 5 * GLOBAL
    first.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["TokenDataModule"]["consumed_samples"] == 5 * GLOBAL

    # Continued with another micro-batch size, hence another accumulation.
    resumed, data = Recorder(), module(config, micro_batch_size=4)
    trainer(tmp_path, 8, data.accumulation).fit(resumed, data, ckpt_path=tmp_path / "last.ckpt")
    assert data.consumed_samples == 8 * GLOBAL
    assert order_hash([*broken.seen[: 5 * per_step], *resumed.seen]) == order_hash(unbroken.seen)


@pytest.mark.filterwarnings("ignore")
def test_saving_at_the_end_of_a_step(text_config: Build, tmp_path: Path) -> None:
    """The state saved in on_train_batch_end covers the step that just ended."""
    positions: list[tuple[int, int]] = []

    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            positions.append((trainer.global_step, trainer.datamodule.state_dict()["consumed_samples"]))  # type: ignore[attr-defined]

    data = module(text_config(), micro_batch_size=6)
    trainer(tmp_path, 4, data.accumulation, callbacks=[Save()]).fit(Recorder(), data)
    assert positions == [(i // 2, i // 2 * GLOBAL) for i in range(1, 9)]


def test_json_streaming_or_not_gives_the_same_run(tmp_path: Path) -> None:
    import json

    texts = make_texts(60)
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    pattern = write_texts(tmp_path / "files", texts)
    tokenizer = TokenizerConfig(kind="bytes")
    configs = [
        DataConfig(source="text", files=(pattern,), val_fraction=0.2, num_workers=0, tokenizer=tokenizer),
        *(
            DataConfig(
                source="json",
                files=(str(tmp_path / "x.jsonl"),),
                streaming=streaming,
                val_fraction=0.2,
                num_workers=0,
                tokenizer=tokenizer,
            )
            for streaming in (True, False)
        ),
    ]
    assert len({order_hash(global_order(config, steps=2)) for config in configs}) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_damage_found_by_a_worker_is_one_sentence(text_config: Build, workers: int) -> None:
    data = module(text_config(num_workers=workers))
    batches = iter(data.train_dataloader())
    next(batches)
    shard = data.store.directory / "tokens-00000.bin"
    os.truncate(shard, 2)
    with pytest.raises(ShardError, match=r"^prepared tokens are damaged: .*tokens-00000\.bin changed") as error:
        list(itertools.islice(batches, 20))  # some are prefetched
    assert "\n" not in str(error.value)


def test_ranks_with_other_data_are_told(text_config: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(seen: list[str], mine: str) -> None:
        seen[:] = [mine, "other"]

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    with pytest.raises(ValueError, match=r"ranks see different data .*paths\.cache"):
        module(text_config()).setup()


def test_a_part_of_the_validation_split_is_spread_evenly_over_it(text_config: Any) -> None:
    def rows(limit: int | None) -> torch.Tensor:
        data = module(text_config(max_val_tokens=limit), context_length=16, micro_batch_size=1, global_batch_size=None)
        return torch.cat([batch["input_ids"] for batch in data.val_dataloader()])

    whole = rows(None)
    count = len(whole) // 2 - 1
    assert count >= 3
    assert torch.equal(rows(count * 16), whole[[i * len(whole) // count for i in range(count)]])

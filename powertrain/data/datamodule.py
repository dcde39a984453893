"""Batches for training and validation, in an order that only seed and sample number decide."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from powertrain.wording import counted

from .config import DataConfig
from .order import SampleOrder
from .packing import Batch, Windows, make_batch
from .prepare import documents_in, prepare
from .shards import ShardError, TokenStore
from .tokenizers import Tokenizer
from .workers import WorkerContext


class TrainBatches(IterableDataset):
    """The micro-batches of one rank, without end; batch i is a function of i alone.

    Step s consumes global samples start + [s GB, (s + 1) GB). Its micro-batch m takes from rank r the samples at
    (m world_size + r) micro_batch_size, so that the samples of a step are the same for any number of ranks.
    """

    def __init__(
        self,
        windows: Windows,
        order: SampleOrder,
        *,
        start: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        document_mask: bool,
    ) -> None:
        self.windows = windows
        self.order = order
        self.start = start
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.world_size = world_size
        self.document_mask = document_mask

    def batch(self, index: int) -> Batch:
        """Return micro-batch number `index` of this rank, counted from `start`."""
        first = self.start + (index * self.world_size + self.rank) * self.micro_batch_size
        samples = range(first, first + self.micro_batch_size)
        rows = [self.windows[self.order.window(sample)] for sample in samples]
        return make_batch(rows, self.windows.context_length, document_mask=self.document_mask)

    def __iter__(self) -> Iterator[Batch]:
        # A DataLoader takes from its workers in turn, so worker w of n makes batches w, w + n, ...
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        for index in itertools.count(first, stride):
            try:
                batch: Batch | ShardError = self.batch(index)
            except ShardError as error:
                batch = error
            yield batch  # type: ignore[misc]


class ValidationBatches(IterableDataset):
    """`num_windows` windows spread evenly over the validation split, dealt to the ranks.

    Evenly, because neighbours are of one document: the first windows would speak for a few documents alone.
    Every rank gets as many batches of full size (collectives need that); what fills them up has no labels.
    """

    def __init__(
        self,
        windows: Windows,
        num_windows: int,
        token_bytes: np.ndarray,
        *,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        document_mask: bool,
    ) -> None:
        self.windows = windows
        self.num_windows = num_windows
        self.token_bytes = token_bytes
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.world_size = world_size
        self.document_mask = document_mask

    def __len__(self) -> int:
        return -(-self.num_windows // (self.micro_batch_size * self.world_size))

    def __iter__(self) -> Iterator[Batch]:
        for index in range(len(self)):
            first = (index * self.world_size + self.rank) * self.micro_batch_size
            rows = [
                self.windows[number * len(self.windows) // self.num_windows] if number < self.num_windows else None
                for number in range(first, first + self.micro_batch_size)
            ]
            yield make_batch(
                rows,
                self.windows.context_length,
                document_mask=self.document_mask,
                token_bytes=self.token_bytes,
            )


class _Loader(DataLoader):
    """A DataLoader that raises what a worker found wrong with the shards as that worker said it.

    PyTorch would bury the sentence in the traceback of another process.
    """

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        for batch in super().__iter__():
            if isinstance(batch, ShardError):
                raise batch
            yield batch


class TokenDataModule(L.LightningDataModule):
    """Prepares the corpus of `config` once and yields its batches (see docs/architecture.md, "A batch").

    Args:
        config: corpus, tokenizer, split.
        context_length: T, tokens of a sequence.
        micro_batch_size: B, sequences in one batch of one rank.
        global_batch_size: sequences of one optimizer step over all ranks and accumulated micro-batches; None means one
            micro-batch a rank.
        seed: chooses the order of training samples.
        cache_dir: where prepared tokens live; None means `cache_directory()`.

    Attributes of the corpus (`vocab_size`, `train_tokens`, ...) prepare it on first use. The training loader has no end
    and starts at `consumed_samples`: limit a run by steps and validate every so many steps. The `Trainer` keeps
    `consumed_samples` up to date; without one, set it.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        context_length: int,
        micro_batch_size: int,
        global_batch_size: int | None = None,
        seed: int = 0,
        cache_dir: str | Path | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("context_length", context_length), ("micro_batch_size", micro_batch_size)):
            if value < 1:
                raise ValueError(f"{name}={value} has to be at least 1")
        self.config = config
        self.context_length = context_length
        self.micro_batch_size = micro_batch_size
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.cache_dir = cache_dir
        self._ranks: tuple[int, int] | None = None
        self._start = 0
        self._processed_before = 0
        self._loader_started = False

    # The corpus

    @cached_property
    def store(self) -> TokenStore:
        return prepare(self.config, self.cache_dir)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return self.store.tokenizer()

    @cached_property
    def train_windows(self) -> Windows:
        return self._windows("train")

    @cached_property
    def val_windows(self) -> Windows:
        return self._windows("validation")

    def _windows(self, split: str) -> Windows:
        windows = Windows(self.store.split(split), self.context_length)
        stream = windows.stream
        if len(windows) == 0:
            raise ValueError(
                f"the {split} split holds {counted(stream.num_tokens, 'token')} in "
                f"{counted(stream.num_documents, 'document')}, fewer "
                f"than one sequence of context_length={self.context_length:,}: give more text{self._other_split(split)}"
            )
        return windows

    def _other_split(self, short: str) -> str:
        """Return how else to divide the documents so that both splits hold a sequence; "" where nothing does."""
        share = self.context_length / sum(self.splits.values())
        # The ends of all documents are a share that is known; which whole documents validate their hashes say.
        options = [(1.1, "data.val_fraction=", "")]
        if self.config.split == "document":
            options = [(2.0, "data.val_fraction=", " or so"), (1.1, "data.split=tail with data.val_fraction=", "")]
        text = ""
        for margin, before, after in options:
            if margin * share <= 0.5:
                digits = 1 - math.floor(math.log10(margin * share))  # two that count
                wanted = math.ceil(margin * share * 10**digits) / 10**digits
                text += f", {before}{wanted if short == 'validation' else round(1 - wanted, digits):g}{after}"
        return text

    @property
    def splits(self) -> dict[str, int]:
        """Tokens of each split, `train` and `validation`; a context is at most the smaller."""
        return {name: counts["tokens"] for name, counts in self.store.manifest["splits"].items()}

    @property
    def vocab_size(self) -> int:
        return self.store.vocab_size

    @property
    def fingerprint(self) -> str:
        """Identity of the tokenized documents and their split, wherever they came from."""
        return self.store.fingerprint

    @property
    def num_documents(self) -> int:
        """Documents of both splits; with `split=tail` the beginning and the end of one count as two."""
        return sum(split["documents"] for split in self.store.manifest["splits"].values())

    @property
    def documents(self) -> str:
        """How many documents there are, in words."""
        return documents_in(self.store.manifest)

    @property
    def train_tokens(self) -> int:
        """Tokens of one epoch (whole sequences)."""
        return len(self.train_windows) * self.context_length

    @property
    def num_val_windows(self) -> int:
        limit = self.config.max_val_tokens
        available = len(self.val_windows)
        return available if limit is None else min(available, max(1, limit // self.context_length))

    @property
    def val_tokens(self) -> int:
        """Tokens of one evaluation (whole sequences)."""
        return self.num_val_windows * self.context_length

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per token of the training split, end-of-document tokens included."""
        stream = self.train_windows.stream
        return stream.num_bytes / stream.num_tokens

    def describe(self) -> dict[str, Any]:
        """Return what a record of a run says about its data."""
        return {
            "source": self.config.source,
            "fingerprint": self.fingerprint,
            "directory": str(self.store.directory),
            "vocab_size": self.vocab_size,
            "documents": self.num_documents,
            "train_tokens": self.train_tokens,
            "val_tokens": self.val_tokens,
            "bytes_per_token": self.bytes_per_token,
        }

    # Ranks

    def set_ranks(self, rank: int, world_size: int) -> None:
        """Say which share of each step this process reads, where it is not the trainer's rank (context parallel)."""
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} has to lie in 0..{world_size - 1} for world_size={world_size}")
        self._ranks = (rank, world_size)

    @property
    def ranks(self) -> tuple[int, int]:
        """(rank, world_size) among the processes that read different samples."""
        if self._ranks is not None:
            return self._ranks
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    @property
    def accumulation(self) -> int:
        """Micro-batches of each rank that make up one optimizer step."""
        per_micro_step = self.micro_batch_size * self.ranks[1]
        total = self.global_batch_size or per_micro_step
        if total % per_micro_step:
            raise ValueError(
                f"a global batch of {counted(total, 'sequence')} does not divide into micro-batches of "
                f"{self.micro_batch_size} on {counted(self.ranks[1], 'rank')}: it has to be a multiple of "
                f"{per_micro_step}"
            )
        return total // per_micro_step

    # Lightning

    def prepare_data(self) -> None:
        _ = self.store

    def setup(self, stage: str | None = None) -> None:
        """Open both splits; `ValueError` where one is shorter than a sequence or ranks see different data."""
        _ = self.train_windows, self.val_windows, self.accumulation
        _check_same_on_all_ranks(self.fingerprint)

    def train_dataloader(self) -> DataLoader:
        self._start = self.consumed_samples
        self._processed_before = self._processed()
        self._loader_started = True
        rank, world_size = self.ranks
        batches = TrainBatches(
            self.train_windows,
            SampleOrder(len(self.train_windows), self.seed),
            start=self._start,
            micro_batch_size=self.micro_batch_size,
            rank=rank,
            world_size=world_size,
            document_mask=self.config.document_mask,
        )
        return self._loader(batches, self.config.num_workers)

    def val_dataloader(self) -> DataLoader:
        rank, world_size = self.ranks
        batches = ValidationBatches(
            self.val_windows,
            self.num_val_windows,
            self.tokenizer.token_bytes,
            micro_batch_size=self.micro_batch_size,
            rank=rank,
            world_size=world_size,
            document_mask=self.config.document_mask,
        )
        # In the training process: it is read a few times a run, and idle workers would hold memory all the while.
        return self._loader(batches, 0)

    def _loader(self, batches: IterableDataset, num_workers: int) -> DataLoader:
        return _Loader(
            batches,
            batch_size=None,
            num_workers=num_workers,
            multiprocessing_context=WorkerContext() if num_workers else None,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    # Position

    @property
    def consumed_samples(self) -> int:
        """Global samples whose steps are complete; the next training loader starts here."""
        if not self._loader_started:
            return self._start
        _, world_size = self.ranks
        steps = (self._processed() - self._processed_before) // self.accumulation
        return self._start + steps * self.accumulation * self.micro_batch_size * world_size

    @consumed_samples.setter
    def consumed_samples(self, samples: int) -> None:
        if samples < 0:
            raise ValueError(f"consumed_samples={samples} has to be at least 0")
        self._start = samples
        self._loader_started = False

    def _processed(self) -> int:
        """Return how many training micro-batches the trainer has finished, an interrupted one not counted."""
        if self.trainer is None:
            return 0
        return self.trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Any]:
        return {
            "consumed_samples": self.consumed_samples,
            "seed": self.seed,
            "context_length": self.context_length,
            "fingerprint": self.fingerprint,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after `state_dict`; `ValueError` where data, seed or context are not those it was made with."""
        here = self.state_dict()
        for key in ("fingerprint", "context_length", "seed"):
            if state_dict[key] != here[key]:
                raise ValueError(
                    f"the checkpoint was made with another {key} of the data ({state_dict[key]}, now {here[key]}), "
                    f"so its position means nothing here: restore them, or start a new run"
                )
        self.consumed_samples = state_dict["consumed_samples"]


def _check_same_on_all_ranks(fingerprint: str) -> None:
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    seen: list[str] = [""] * distributed.get_world_size()
    distributed.all_gather_object(seen, fingerprint)
    if len(set(seen)) > 1:
        raise ValueError(
            f"ranks see different data (fingerprints {', '.join(sorted(set(seen)))}): "
            "set paths.cache to a directory that all nodes share, or make the sources equal on all nodes"
        )


def order_hash(batches: Iterable[Batch]) -> str:
    """Return the hash of the token ids of `batches` in their order.

    For several ranks, give the micro-batches in the order (micro-batch, rank); the result is then independent of the
    number of ranks, workers, and of the micro-batch size.
    """
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(batch["input_ids"].numpy().tobytes())
    return digest.hexdigest()

"""What is damaged or cannot be read, on one rank or all, is passed over and set aside, and costs no whole one."""

import contextlib
import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from powertrain.training import checkpoint as module
from powertrain.training.checkpoint import Checkpoint, CheckpointError, CheckpointStore, UnreadableError
from powertrain.training.ranks import Ranks
from tests.training.checkpoints import assert_holds, damage, save

pytestmark = pytest.mark.usefixtures("no_waiting")


@pytest.mark.parametrize(
    "kind",
    ["truncate", "flip", "empty", "no file", "unreadable file", "no manifest", "garbage manifest", "changed manifest"],
)
def test_a_damaged_newest_falls_back_with_a_warning(store, kind):
    save(store, 1)
    damage(save(store, 2), kind)
    with pytest.warns(UserWarning, match=r"step-00000002 is not usable: .*; falling back to step 1"):
        assert_holds(store, 1)


def test_without_any_whole_checkpoint_it_says_so_rather_than_beginning_anew(store):
    damage(save(store, 1), "truncate")
    with pytest.raises(CheckpointError, match="no whole checkpoint is left"):
        store.latest()


def test_checkpoints_of_an_earlier_format_are_not_taken_for_a_new_run(store):
    store.directory.mkdir()
    (store.directory / "step-00000100.ckpt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="holds checkpoints of an earlier format, and this version reads 3"):
        store.latest()


def test_a_damaged_later_step_is_replaced_and_never_costs_a_good_one(store):
    for step in (1, 2, 3):
        save(store, step)
    damage(store.path(3), "truncate")
    with pytest.warns(UserWarning, match="falling back to step 2"):
        assert_holds(store, 2)
    assert sorted(p.name for p in store.directory.iterdir()) == ["damaged-step-00000003", "last", "step-00000002"]
    assert (store.directory / "last").resolve() == store.path(2)
    save(store, 3)
    assert_holds(store, 3)
    assert store.steps() == [2, 3]
    damage(store.path(3), "no manifest")
    with pytest.warns(UserWarning, match=r"it is set aside as damaged-step-00000003\.2; falling back to step 2"):
        assert_holds(store, 2)


def damaged_in(store):
    return sorted(p.name for p in store.directory.glob("damaged-*"))


@pytest.mark.filterwarnings("ignore:.*is not usable")
def test_only_the_newest_damaged_one_stays_once_the_run_has_passed_the_others(store):
    save(store, 1)
    for expected in (["damaged-step-00000002"], ["damaged-step-00000002", "damaged-step-00000002.2"]):
        damage(save(store, 2), "flip")
        assert_holds(store, 1)
        assert damaged_in(store) == expected
    save(store, 2)
    assert damaged_in(store) == ["damaged-step-00000002", "damaged-step-00000002.2"]
    save(store, 3)
    assert damaged_in(store) == ["damaged-step-00000002.2"]
    damage(save(store, 5), "no manifest")
    assert_holds(store, 3)
    assert damaged_in(store) == ["damaged-step-00000002.2", "damaged-step-00000005"]
    save(store, 4)
    assert damaged_in(store) == ["damaged-step-00000005"]
    for step in (5, 6, 7):
        save(store, step)
    assert damaged_in(store) == ["damaged-step-00000005"]
    assert_holds(store, 7)


@pytest.mark.filterwarnings("ignore:.*is not usable")
def test_a_save_that_fails_removes_nothing_that_was_set_aside(store, monkeypatch):
    save(store, 1)
    for _ in range(2):
        damage(save(store, 2), "flip")
        assert_holds(store, 1)
    before = damaged_in(store)
    assert len(before) == 2
    with monkeypatch.context() as patch:
        patch.setattr(
            module, "_read_manifest", lambda path: (_ for _ in ()).throw(CheckpointError("does not read back"))
        )
        with pytest.raises(CheckpointError, match="does not read back"):
            save(store, 3)
    assert damaged_in(store) == before
    assert_holds(store, 1)


@pytest.mark.filterwarnings("ignore:.*is not usable")
def test_the_links_name_no_checkpoint_that_was_passed_over(store):
    for step, loss in ((1, 2.0), (2, 1.0)):
        save(store, step, val_loss=loss)
    damage(store.path(2), "flip")
    assert_holds(store, 1)
    assert (store.directory / "last").resolve() == (store.directory / "best").resolve() == store.path(1)


def test_what_another_process_saved_since_is_set_aside_and_not_removed(store):
    save(store, 1)
    assert_holds(store, 1)
    other = CheckpointStore(store.directory)
    save(other, 3)
    with pytest.warns(UserWarning, match=r"step-00000003 is not of this attempt.*set aside as damaged-step-00000003"):
        save(store, 2)
    assert store.steps() == [1, 2]
    assert Checkpoint(store.directory / "damaged-step-00000003").step == 3


def failing(original, code, times, name):
    """Return a function that reads, but fails so many times for files of that name."""
    left = times

    def read(path):
        nonlocal left
        if path.name == name and left:
            left -= 1
            raise OSError(code, os.strerror(code), str(path))
        return original(path)

    return read


def break_reads(monkeypatch, name, code, times):
    owner, attribute = (Path, "read_bytes") if name == "manifest.json" else (module, "sha256_file")
    monkeypatch.setattr(owner, attribute, failing(getattr(owner, attribute), code, times, name))


@pytest.mark.parametrize("name", ["manifest.json", "rank-00000.safetensors"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ENOENT])
def test_a_read_that_fails_for_a_while_costs_nothing(store, monkeypatch, name, code, recwarn):
    save(store, 1)
    save(store, 2)
    break_reads(monkeypatch, name, code, times=3)
    assert_holds(store, 2)
    # Not those of Python, on files and threads that earlier tests have left to the garbage collector.
    assert not [warning for warning in recwarn.list if issubclass(warning.category, UserWarning)]


@pytest.mark.parametrize("name", ["manifest.json", "rank-00000.safetensors"])
def test_what_cannot_be_read_ends_the_run_and_is_not_taken_for_damaged(store, monkeypatch, name):
    save(store, 1)
    save(store, 2)
    with monkeypatch.context() as patch:
        break_reads(patch, name, errno.EIO, times=4)
        message = rf"step-00000002/{name} cannot be read \(Input/output error\) on rank 0; nothing was changed"
        with pytest.raises(UnreadableError, match=message):
            store.latest()
        break_reads(patch, name, errno.EIO, times=4)
        with pytest.raises(UnreadableError, match="Input/output error"):
            store.fault(2)
    assert_holds(store, 2)


@contextlib.contextmanager
def unreadable_step(monkeypatch, store, step):
    """Let no manifest of that step be read, and expect the warning."""
    broken = store.path(step) / "manifest.json"
    original = Path.read_bytes

    def read(path):
        if path == broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return original(path)

    message = rf"{broken} cannot be read \(Input/output error\): until it can be read, `best` stays as it is and no"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", read)
        with pytest.warns(UserWarning, match=message) as caught:
            yield
    assert len(caught) == 1


def test_an_old_checkpoint_that_cannot_be_read_costs_no_save_and_is_not_pruned(store, monkeypatch):
    for step, loss in ((10, 1.0), (20, 2.0)):
        save(store, step, val_loss=loss)
    with unreadable_step(monkeypatch, store, 10):
        save(store, 30, val_loss=0.5)
    assert store.steps() == [10, 20, 30]
    assert (store.directory / "last").resolve() == store.path(30)
    assert (store.directory / "best").resolve() == store.path(10)
    assert_holds(store, 30)
    save(store, 40, val_loss=3.0)
    assert store.steps() == [30, 40]
    assert (store.directory / "best").resolve() == store.path(30)


def test_an_old_checkpoint_that_cannot_be_read_does_not_keep_a_run_from_going_on(store, monkeypatch):
    for step, loss in ((10, 1.0), (20, 2.0)):
        save(store, step, val_loss=loss)
    (store.directory / "last").unlink()
    with unreadable_step(monkeypatch, store, 10):
        assert_holds(store, 20)
    assert (store.directory / "last").resolve() == store.path(20)
    assert (store.directory / "best").resolve() == store.path(10)


@dataclass(frozen=True)
class ThreadRank(Ranks):
    """A rank that is a thread of this process."""

    values: list = field(default_factory=list)
    barrier: threading.Barrier | None = None

    def gather(self, value):
        self.values[self.rank] = value
        self.barrier.wait(30)
        values = list(self.values)
        self.barrier.wait(30)
        return values

    def broadcast(self, value):
        return self.gather(value)[0]


def stores_of_two(*directories, **options):
    """Return the stores of two ranks, each with the directory that its node has."""
    shared = {"store": torch.distributed.HashStore(), "values": [None, None], "barrier": threading.Barrier(2)}
    return [
        CheckpointStore(directory, ranks=ThreadRank(rank, 2, **shared), **options)
        for rank, directory in enumerate(directories)
    ]


def on_both(stores, call):
    """Return what `call` gives or raises on each rank."""

    def outcome(store):
        try:
            return call(store)
        except CheckpointError as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(outcome, stores))


def test_ranks_that_do_not_share_the_directory_lose_no_checkpoint(tmp_path):
    stores = stores_of_two(tmp_path / "a", tmp_path / "a", keep=1)
    assert on_both(stores, lambda store: save(store, 1)) == [stores[0].path(1)] * 2
    stores[1].directory = tmp_path / "b"
    errors = on_both(stores, lambda store: save(store, 2))
    assert str(errors[0]) == str(errors[1])
    assert str(errors[0]) == (
        f"the checkpoint of step 2 could not be written to {tmp_path / 'a'}: rank 0 does not find what rank 1 wrote"
        " (rank-00001.safetensors is missing): paths.runs must be one directory that all nodes share; the checkpoint of"
        " step 1 is intact"
    )
    assert stores[0].fault(1) is None
    assert stores[0].steps() == [1]


def test_a_rank_that_cannot_read_ends_all(tmp_path):
    stores = stores_of_two(tmp_path / "a", tmp_path / "a")
    on_both(stores, lambda store: save(store, 1))
    stores[1].directory = tmp_path / "b"
    errors = on_both(stores, CheckpointStore.latest)
    assert [type(error) for error in errors] == [UnreadableError] * 2
    assert f"{tmp_path / 'b' / 'step-00000001'} is not there on rank 1; nothing was changed" in str(errors[0])


def test_all_ranks_fall_back_together_and_one_sets_aside(tmp_path):
    stores = stores_of_two(tmp_path / "a", tmp_path / "a")
    for step in (1, 2):
        on_both(stores, lambda store, step=step: save(store, step))
    with (tmp_path / "a" / "step-00000002" / "rank-00001.safetensors").open("r+b") as file:
        file.truncate(10)
    with pytest.warns(UserWarning, match="is not usable") as caught:
        assert [found.step for found in on_both(stores, CheckpointStore.latest)] == [1, 1]
    assert len(caught) == 1
    assert (tmp_path / "a" / "damaged-step-00000002").is_dir()
    assert stores[0].steps() == [1]

"""Processes that die at any moment of saving, removing and falling back, or that outlive their attempt."""

import contextlib
import os

import pytest

from powertrain.training.checkpoint import CheckpointStore
from tests.training.checkpoints import assert_holds, damage, save, tensors, values

pytestmark = pytest.mark.usefixtures("no_waiting")


class Killed(BaseException):
    pass


@contextlib.contextmanager
def killed_at(monkeypatch, moment, after):
    """Let the process die at such a system call, before or after it; give a function that tells whether it came to."""
    calls = 0

    def dying(original):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            # A process that is dead makes no further calls.
            if calls > moment or (calls == moment and not after):
                raise Killed
            try:
                return original(*args, **kwargs)
            finally:
                if calls == moment:
                    raise Killed

        return call

    with monkeypatch.context() as patch:
        for name in ("fsync", "rename", "replace", "unlink", "rmdir", "symlink", "mkdir"):
            patch.setattr(os, name, dying(getattr(os, name)))
        with contextlib.suppress(Killed):
            yield lambda: calls >= moment


def test_a_killed_first_save_is_no_checkpoint(store):
    save(store, 1)
    os.rename(store.path(1), store.directory / ".step-00000001.tmp")
    (store.directory / "last").unlink()
    assert store.latest() is None
    assert not list(store.directory.iterdir())


@pytest.mark.filterwarnings("ignore:.*is not usable", "ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("after", [False, True], ids=["before the call", "after the call"])
def test_a_kill_at_any_moment_of_a_save_leaves_a_whole_checkpoint(tmp_path, monkeypatch, after):
    """The process dies at each system call that makes a save durable, in turn."""
    survived = []
    for moment in range(1, 100):
        directory = tmp_path / str(moment)
        save(CheckpointStore(directory, keep=1), 1, val_loss=2.0)
        with killed_at(monkeypatch, moment, after) as killed:
            save(CheckpointStore(directory, keep=1), 2, val_loss=1.0)
        again = CheckpointStore(directory, keep=1)
        found = again.latest()
        assert found is not None
        survived.append(found.step)
        assert_holds(again, found.step)
        # Whatever was left over does not hinder the next save.
        save(again, 3)
        assert_holds(again, 3)
        assert not list(again.directory.glob(".*"))
        if not killed():
            break
    assert len(survived) > 10
    assert survived == sorted(survived)
    assert set(survived) == {1, 2}


@pytest.mark.filterwarnings("ignore:.*is not usable")
@pytest.mark.parametrize("after", [False, True], ids=["before the call", "after the call"])
def test_a_kill_at_any_moment_of_a_removal_leaves_no_part_of_what_was_set_aside(tmp_path, monkeypatch, after):
    for moment in range(1, 100):
        store = CheckpointStore(tmp_path / str(moment))
        save(store, 1)
        for _ in range(2):
            damage(save(store, 2), "flip")
            assert_holds(store, 1)
        save(store, 2)
        whole = {p.name: sorted(f.name for f in p.iterdir()) for p in store.directory.glob("damaged-*")}
        with killed_at(monkeypatch, moment, after) as killed:
            for path in store._superseded(3):
                store._remove(path)
        left = {p.name: sorted(f.name for f in p.iterdir()) for p in store.directory.glob("damaged-*")}
        assert left.items() <= whole.items()
        assert "damaged-step-00000002.2" in left
        assert_holds(CheckpointStore(store.directory), 2)
        assert not list(store.directory.glob(".*"))
        if not killed():
            break
    assert moment > 2


@pytest.mark.filterwarnings("ignore:.*is not usable")
@pytest.mark.parametrize("after", [False, True], ids=["before the call", "after the call"])
def test_a_kill_at_any_moment_of_falling_back_keeps_all_that_there_was(tmp_path, monkeypatch, after):
    for moment in range(1, 100):
        store = CheckpointStore(tmp_path / str(moment), keep=3)
        for step, loss in ((1, 2.0), (2, 1.0), (3, 0.5)):
            save(store, step, val_loss=loss)
        damage(store.path(2), "flip")
        damage(store.path(3), "no manifest")
        with killed_at(monkeypatch, moment, after) as killed:
            store.latest()
        assert_holds(store, 1)
        assert sorted(p.name for p in store.directory.iterdir()) == [
            "best", "damaged-step-00000002", "damaged-step-00000003", "last", "step-00000001"
        ]  # fmt: skip
        assert (store.directory / "last").resolve() == (store.directory / "best").resolve() == store.path(1)
        if not killed():
            break
    assert moment > 5


def test_a_process_that_outlived_its_attempt_cannot_spoil_the_next_ones_save(store, monkeypatch):
    stale, commit = CheckpointStore(store.directory), store._commit
    monkeypatch.setattr(stale, "_commit", lambda *arguments: None)  # it dies after its write

    def commit_after_the_stale_write(*arguments):
        stale.begin(1, tensors(7), values(7))
        stale.settle(10)
        commit(*arguments)

    monkeypatch.setattr(store, "_commit", commit_after_the_stale_write)
    save(store, 1)
    assert_holds(store, 1)

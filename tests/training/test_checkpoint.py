import json
import os
import resource

import pytest
import torch

from powertrain.training.checkpoint import CheckpointError, CheckpointStore


def state(step):
    return {"step": step, "weights": torch.full((1000,), float(step)), "nested": [{"a": (1, 2.0, "x", None)}]}


def assert_holds(store, step):
    loaded = store.load_latest()
    assert loaded is not None
    assert loaded[1] == step
    assert loaded[0]["step"] == step
    assert torch.equal(loaded[0]["weights"], state(step)["weights"])
    assert loaded[0]["nested"] == state(step)["nested"]


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints", keep=2)


def test_an_empty_directory_has_no_checkpoint(store):
    assert store.load_latest() is None


def test_newest_is_loaded_and_older_ones_are_pruned(store):
    for step in (1, 2, 3):
        store.save(step, state(step))
    assert_holds(store, 3)
    assert store.steps() == [2, 3]
    assert (store.directory / "last").resolve() == store.path(3)
    assert sorted(p.name for p in store.directory.iterdir()) == [
        "last",
        "step-00000002.ckpt",
        "step-00000002.ckpt.json",
        "step-00000003.ckpt",
        "step-00000003.ckpt.json",
    ]


def test_the_best_is_kept_besides(store):
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, float("nan"))):
        store.save(step, state(step), val_loss=loss)
    assert store.steps() == [2, 4, 5]
    assert store.best_step() == 2
    assert (store.directory / "best").resolve() == store.path(2)


@pytest.mark.parametrize("damage", ["truncate", "flip", "sidecar", "garbage sidecar", "empty"])
def test_a_damaged_newest_falls_back_with_a_warning(store, damage):
    store.save(1, state(1))
    path = store.save(2, state(2))
    content = bytearray(path.read_bytes())
    if damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "sidecar":
        path.with_name(path.name + ".json").unlink()
    elif damage == "garbage sidecar":
        path.with_name(path.name + ".json").write_text("{")
    else:
        path.write_bytes(b"")
    with pytest.warns(UserWarning, match=r"step-00000002\.ckpt is not usable: .*; falling back to step 1"):
        assert_holds(store, 1)


def test_without_any_whole_checkpoint_it_says_so_rather_than_beginning_anew(store):
    path = store.save(1, state(1))
    path.write_bytes(b"garbage")
    with pytest.raises(CheckpointError, match="no whole checkpoint is left"):
        store.load_latest()


def test_a_killed_first_save_is_no_checkpoint(store):
    path = store.save(1, state(1))
    path.with_name(path.name + ".json").unlink()
    assert store.load_latest() is None


def test_a_damaged_later_step_is_replaced_and_never_costs_a_good_one(store):
    for step in (1, 2, 3):
        store.save(step, state(step))
    store.path(3).write_bytes(b"x")
    with pytest.warns(UserWarning, match="falling back to step 2"):
        assert_holds(store, 2)
    (store.directory / "step-00000005.ckpt").write_bytes(b"x")
    store.save(3, state(3))
    assert_holds(store, 3)
    assert store.steps() == [2, 3]


class Killed(BaseException):
    pass


@pytest.mark.filterwarnings("ignore:the checkpoint")
@pytest.mark.parametrize("after", [False, True], ids=["before the call", "after the call"])
def test_a_kill_at_any_moment_of_a_save_leaves_a_whole_checkpoint(tmp_path, monkeypatch, after):
    """The process dies at each system call that makes a save durable, in turn."""
    names = ["fsync", "replace", "unlink", "symlink"]
    survived = []
    for moment in range(1, 100):
        directory = tmp_path / str(moment)
        CheckpointStore(directory, keep=1).save(1, state(1), val_loss=2.0)
        calls = 0

        def dying(original, moment=moment):
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls == moment and not after:
                    raise Killed
                try:
                    return original(*args, **kwargs)
                finally:
                    if calls == moment:
                        raise Killed

            return call

        with monkeypatch.context() as patch:
            for name in names:
                patch.setattr(os, name, dying(getattr(os, name)))
            try:
                CheckpointStore(directory, keep=1).save(2, state(2), val_loss=1.0)
            except Killed:
                killed = True
            else:
                killed = False
        again = CheckpointStore(directory, keep=1)
        loaded = again.load_latest()
        assert loaded is not None
        assert torch.equal(loaded[0]["weights"], state(loaded[1])["weights"])
        survived.append(loaded[1])
        # Whatever was left over does not hinder the next save.
        again.save(3, state(3))
        assert_holds(again, 3)
        assert not list(again.directory.glob(".*"))
        if not killed:
            break
    assert len(survived) > 15
    assert survived == sorted(survived)
    assert set(survived) == {1, 2}


def test_a_disk_that_fills_while_writing_is_one_message_and_costs_nothing(store):
    store.save(1, state(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    big = {"weights": torch.zeros(1 << 20)}
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(
            CheckpointError, match=r"step 2 could not be written .* the disk is full .* checkpoint of step 1 is intact"
        ):
            store.save(2, big)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_holds(store, 1)
    assert sorted(p.name for p in store.directory.iterdir()) == [
        "last",
        "step-00000001.ckpt",
        "step-00000001.ckpt.json",
    ]


def test_a_disk_that_is_too_small_is_noticed_before_writing(store, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100})())
    with pytest.raises(CheckpointError, match=r"the disk is full \(4000 bytes needed, 100 free\); there is no earlier"):
        store.save(1, state(1))


def test_the_sidecar_states_size_and_hash(store):
    path = store.save(7, state(7), val_loss=1.5)
    facts = json.loads(path.with_name(path.name + ".json").read_text())
    assert facts["bytes"] == path.stat().st_size
    assert facts["step"] == 7
    assert facts["val_loss"] == 1.5
    assert len(facts["sha256"]) == 64

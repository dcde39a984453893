import contextlib
import errno
import json
import os
import resource
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from powertrain.training import checkpoint as module
from powertrain.training.checkpoint import Checkpoint, CheckpointError, CheckpointStore, UnreadableError
from powertrain.training.checkpoint_files import Piece, PieceReader, write_pieces
from powertrain.training.ranks import Ranks
from tests.training.fakes import saved_tensors


def tensors(step):
    return {
        "weights": torch.full((1000,), float(step)),
        "half": torch.arange(6).view(2, 3).to(torch.bfloat16) * step,
        "scalar": torch.tensor(step),
    }


def values(step):
    return {"step": step, "nested": [{"a": [1, 0.1 + 0.2, "x", None]}]}


def save(store, step, **options):
    return store.save(step, tensors(step), values(step), rng={"seed": step}, **options)


def assert_holds(store, step):
    found = store.latest()
    assert found is not None
    assert found.step == step
    assert found.values == values(step)
    assert found.rng(0) == {"seed": step}
    read = {name: torch.zeros_like(tensor) for name, tensor in tensors(step).items()}
    found.read_into(read)
    for name, tensor in tensors(step).items():
        assert torch.equal(read[name], tensor)


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints", keep=2)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(module, "_RETRIES", (0.0, 0.0, 0.0))


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


def test_an_empty_directory_has_no_checkpoint(store):
    assert store.latest() is None


def test_newest_is_loaded_and_older_ones_are_pruned(store):
    for step in (1, 2, 3):
        save(store, step)
    assert_holds(store, 3)
    assert store.steps() == [2, 3]
    assert (store.directory / "last").resolve() == store.path(3)
    assert sorted(p.name for p in store.directory.iterdir()) == ["last", "step-00000002", "step-00000003"]
    assert sorted(p.name for p in store.path(3).iterdir()) == ["manifest.json", "rank-00000.safetensors"]


def test_the_best_is_kept_besides(store):
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, float("nan"))):
        save(store, step, val_loss=loss)
    assert store.steps() == [2, 4, 5]
    assert (store.directory / "best").resolve() == store.path(2)


def test_files_are_safetensors_and_the_manifest_states_size_and_hash(store):
    path = save(store, 7, val_loss=1.5)
    file = path / "rank-00000.safetensors"
    loaded = load_file(file)
    assert loaded.keys() == tensors(7).keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors(7).items())
    manifest = json.loads((path / "manifest.json").read_text())
    facts = manifest["files"]["rank-00000.safetensors"]
    assert facts["bytes"] == file.stat().st_size
    assert len(facts["sha256"]) == 64
    assert manifest["val_loss"] == 1.5
    assert manifest["tensors"] == {"weights": [1000], "half": [2, 3], "scalar": []}


def damage(path, kind):
    file, manifest = path / "rank-00000.safetensors", path / "manifest.json"
    content = bytearray(file.read_bytes())
    match kind:
        case "truncate":
            file.write_bytes(content[: len(content) // 2])
        case "flip":
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
        case "empty":
            file.write_bytes(b"")
        case "no file":
            file.unlink()
        case "unreadable file":
            file.unlink()
            file.mkdir()
        case "no manifest":
            manifest.unlink()
        case "garbage manifest":
            manifest.write_text("{")
        case "changed manifest":
            manifest.write_text(manifest.read_text().replace('"nested"', '"nexted"'))


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


def test_a_killed_first_save_is_no_checkpoint(store):
    save(store, 1)
    os.rename(store.path(1), store.directory / ".step-00000001.tmp")
    (store.directory / "last").unlink()
    assert store.latest() is None
    assert not list(store.directory.iterdir())


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
    owner, attribute = (Path, "read_bytes") if name == "manifest.json" else (module, "sha256")
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


def test_a_disk_that_fills_while_writing_is_one_message_and_costs_nothing(store):
    save(store, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(
            CheckpointError, match=r"step 2 could not be written .* the disk is full .* checkpoint of step 1 is intact"
        ):
            store.save(2, {"weights": torch.zeros(1 << 20)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_holds(store, 1)
    assert sorted(p.name for p in store.directory.iterdir()) == ["last", "step-00000001"]


def test_a_disk_that_is_too_small_is_noticed_before_writing(store, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100})())
    with pytest.raises(CheckpointError, match=r"the disk is full \(4000 bytes needed, 100 free\); there is no earlier"):
        store.save(1, {"weights": torch.zeros(1000)}, {})


def test_the_caller_goes_on_while_a_save_is_written_and_what_it_changes_is_not_saved(store, monkeypatch):
    release = threading.Event()

    def slow(*args):
        release.wait(30)
        return write_pieces(*args)

    monkeypatch.setattr(module, "write_pieces", slow)
    weights = torch.zeros(1000)
    store.begin(1, {"weights": weights}, {})
    weights += 1.0
    assert store.busy
    assert store.steps() == []
    release.set()
    store.finish()
    assert not store.pending
    assert torch.equal(saved_tensors(store.path(1))["weights"], torch.zeros(1000))
    # The next save takes over the memory of the last, whose values are on the disk.
    store.save(2, {"weights": weights}, {})
    assert torch.equal(saved_tensors(store.path(2))["weights"], weights)


def test_the_pause_is_one_copy_and_nothing_else(store):
    """A hundred megabytes: copied once while the caller waits, but hashed and written beside it.

    Which share of the save that is depends on how fast a machine's memory is, and its disk (docs/distribution.md);
    the copy is what it has to be. Hashing alone would be several. Least of as many as it takes, as others use the
    machine too; what is several copies never becomes two.
    """
    weights = {f"w{i}": torch.ones(5, 1 << 20) for i in range(5)}
    buffers = {name: torch.empty_like(tensor) for name, tensor in weights.items()}
    copies, pauses = [], []
    while len(copies) < 6 or (min(pauses) >= 2 * min(copies) and len(copies) < 60):
        started = time.monotonic()
        for name, tensor in weights.items():
            buffers[name].copy_(tensor)
        copies.append(time.monotonic() - started)
        store.begin(len(copies), weights, {})
        store.finish()
        pauses.append(store.pause_seconds)
    assert min(pauses) < 2 * min(copies)


def test_the_manifest_states_what_json_holds_of_the_values(store):
    """Keys 9 and 10 are in this order as numbers, and in the other as text."""
    save(store, 1)
    store.save(2, tensors(2), {"by_number": {9: "a", 10: (1, 2)}})
    found = store.latest()
    assert found is not None
    assert found.step == 2
    assert found.values == {"by_number": {"9": "a", "10": [1, 2]}}


@pytest.mark.parametrize("cause", ["the manifest is damaged on its way", "values that are none of JSON's"])
def test_a_save_that_no_reader_would_take_costs_nothing(store, monkeypatch, cause):
    save(store, 1)
    store.keep = 1
    values, message = {"a": 1}, "its manifest is not the one it was written with"
    if cause.startswith("values"):
        values, message = {"a": {1}}, "Object of type set is not JSON serializable"
    else:
        seal = module._seal
        monkeypatch.setattr(module, "_seal", lambda manifest: {**seal(manifest), "step": 3})
    with pytest.raises(CheckpointError, match=f"step 2 could not be written .*{message}; .* of step 1 is intact"):
        store.save(2, tensors(2), values)
    assert_holds(store, 1)
    assert sorted(p.name for p in store.directory.iterdir()) == ["last", "step-00000001"]


def test_a_later_error_is_that_of_the_save_before(store, monkeypatch):
    def broken(*args):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_pieces", broken)
        store.begin(1, tensors(1), values(1))
        store.settle(10)
    with pytest.raises(CheckpointError, match=r"step 1 could not be written .* Input/output error"):
        store.begin(2, tensors(2), values(2))
    save(store, 3)
    assert_holds(store, 3)


def test_another_run_takes_a_checkpoint_over(store, tmp_path):
    save(store, 1)
    save(store, 2)
    other = CheckpointStore(tmp_path / "other" / "checkpoints")
    other.adopt(store, 1)
    assert_holds(other, 1)
    save(other, 5)
    save(other, 6)
    assert other.steps() == [5, 6]
    assert store.fault(1) is None


def test_pieces_are_read_into_whatever_part_is_asked_for(tmp_path):
    whole = torch.arange(7 * 4, dtype=torch.float32).view(7, 4)
    files = {}
    for number, (start, end) in enumerate([(0, 3), (3, 6), (6, 7)]):
        piece = Piece("w", whole[start:end].clone(), (start, 0), (7, 4))
        files[f"{number}"] = write_pieces(tmp_path / f"{number}", [piece], {})["pieces"]
    read = torch.zeros(7, 4)
    PieceReader(tmp_path, files).read_into({"w": read})
    assert torch.equal(read, whole)
    del files["1"]
    with pytest.raises(CheckpointError, match="does not hold all of w"):
        PieceReader(tmp_path, files).read_into({"w": read})
    with pytest.raises(CheckpointError, match="does not hold all of v"):
        PieceReader(tmp_path, files).read_into({"v": torch.zeros(1)})


def test_what_is_no_checkpoint_is_said_in_one_sentence(tmp_path):
    with pytest.raises(CheckpointError, match=r"is not a usable checkpoint: manifest\.json is missing"):
        Checkpoint(tmp_path)

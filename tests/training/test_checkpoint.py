"""What a save writes and keeps, what the caller waits for, and what a disk that is full costs."""

import json
import resource
import shutil
import threading
import time

import pytest
import torch
from safetensors.torch import load_file

from powertrain.training import checkpoint as module
from powertrain.training.checkpoint import Checkpoint, CheckpointError, CheckpointStore
from powertrain.training.checkpoint_files import Piece, PieceReader, write_pieces
from tests.training.checkpoints import assert_holds, save, tensors, values
from tests.training.fakes import saved_tensors

pytestmark = pytest.mark.usefixtures("no_waiting")


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

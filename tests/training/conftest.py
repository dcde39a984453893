import pytest

from powertrain.training import checkpoint
from powertrain.training.checkpoint import CheckpointStore


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints", keep=2)


@pytest.fixture
def no_waiting(monkeypatch):
    """A file that cannot be read is read again at once."""
    monkeypatch.setattr(checkpoint, "_RETRIES", (0.0, 0.0, 0.0))

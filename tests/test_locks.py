"""Locks between processes, which the fork of one stands for, and file systems that have none."""

import errno
import fcntl
import os

import pytest

from powertrain.locks import take_lock
from powertrain.native import store


def test_a_lock_is_one_process_at_a_time(tmp_path):
    path = tmp_path / "lock"
    with path.open("a") as mine, path.open("a") as of_another:
        assert take_lock(mine) is True
        assert take_lock(of_another) is False
    with path.open("a") as of_another:
        assert take_lock(of_another, wait=True) is True


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_kernels_are_built_where_there_are_no_locks(number, tmp_path, monkeypatch):
    def none(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", none)
    monkeypatch.setenv("POWERTRAIN_CACHE", str(tmp_path))
    with (tmp_path / "lock").open("w") as file:
        assert take_lock(file) is None
    with store.building():
        pass


def test_a_lock_that_fails_otherwise_is_an_error(tmp_path, monkeypatch):
    def fails(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", fails)
    with (tmp_path / "lock").open("w") as file, pytest.raises(OSError, match=os.strerror(errno.EIO)):
        take_lock(file)

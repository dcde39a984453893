"""Files that appear whole or not at all, whatever fails and however many write them."""

import errno
import hashlib
import os
import threading
import time
from functools import partial

import pytest

from powertrain.files import ABANDONED_SECONDS, replacing_file, sha256_file, write_file, write_new_file


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def replace_by_block(path, content):
    with replacing_file(path) as temporary:
        temporary.write_text(content)


@pytest.mark.parametrize("write", [write_file, replace_by_block])
def test_a_file_takes_the_place_of_the_one_before(tmp_path, write):
    for content in ("of before", "φ of after\n"):
        write(tmp_path / "a", content)
        assert (tmp_path / "a").read_bytes() == content.encode()
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("call", ["fsync", "naming"])
@pytest.mark.parametrize(
    ("write", "naming"), [(write_file, "replace"), (replace_by_block, "replace"), (write_new_file, "link")]
)
def test_what_fails_changes_nothing_and_leaves_nothing(tmp_path, monkeypatch, write, naming, call):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "a"
    if write is not write_new_file:
        path.write_text("of before")
    before = names(tmp_path)
    monkeypatch.setattr(os, naming if call == "naming" else call, full)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        write(path, "of after")
    assert names(tmp_path) == before
    assert not before or path.read_text() == "of before"


def test_a_block_that_fails_replaces_nothing(tmp_path):
    def fails():
        with replacing_file(tmp_path / "a") as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    (tmp_path / "a").write_text("of before")
    with pytest.raises(KeyboardInterrupt):
        fails()
    assert (tmp_path / "a").read_text() == "of before"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.parametrize(("write", "naming"), [(write_file, "replace"), (write_new_file, "link")])
def test_the_content_is_on_the_disk_before_the_name(tmp_path, monkeypatch, write, naming, durable):
    calls = []

    def recorded(name, call, *arguments):
        calls.append(name)
        return call(*arguments)

    for name in ("fsync", naming):
        monkeypatch.setattr(os, name, partial(recorded, name, getattr(os, name)))
    write(tmp_path / "a", "x", durable=durable)
    assert calls == (["fsync", naming] if durable else [naming])


@pytest.mark.parametrize("write", [write_file, write_new_file])
def test_permissions_are_those_of_the_umask(tmp_path, write):
    before = os.umask(0o027)
    try:
        write(tmp_path / "a", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_any_number_may_write_one_file_at_once(tmp_path):
    contents = [str(i) * 100_000 for i in range(4)]
    start, errors = threading.Barrier(len(contents)), []

    def writes(content):
        start.wait()
        try:
            for _ in range(25):
                write_file(tmp_path / "a", content, durable=False)
                assert (tmp_path / "a").read_text() in contents
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=writes, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert names(tmp_path) == ["a"]


def test_a_new_file_is_written_once(tmp_path):
    assert write_new_file(tmp_path / "a", "first") is True
    assert write_new_file(tmp_path / "a", "second") is False
    assert (tmp_path / "a").read_text() == "first"
    assert names(tmp_path) == ["a"]


def test_what_killed_writers_left_goes_after_a_day(tmp_path):
    of_today, of_the_past, of_another = (tmp_path / f".{name}.tmp" for name in ("a.0123", "a.4567", "b.89ab"))
    for path in (of_today, of_the_past, of_another):
        path.write_text("half")
    for path in (of_the_past, of_another):
        os.utime(path, (time.time() - ABANDONED_SECONDS - 60,) * 2)
    write_file(tmp_path / "a", "x")
    assert names(tmp_path) == [".a.0123.tmp", ".b.89ab.tmp", "a"]


def test_the_digest_is_that_of_the_whole_content(tmp_path):
    for content in (b"", b"abc", bytes(5_000_001)):
        (tmp_path / "a").write_bytes(content)
        assert sha256_file(tmp_path / "a") == hashlib.sha256(content).hexdigest()

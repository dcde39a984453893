import json
import multiprocessing
import os
import signal
import time

import pytest

from powertrain.scaling.claims import Claims, read_owner


def test_one_holder_at_a_time(tmp_path):
    first, second = Claims(tmp_path), Claims(tmp_path)
    claim = first.take("a")
    assert claim is not None
    assert second.take("a") is None
    assert "process" in second.holder("a")
    other = second.take("b")
    assert other is not None
    claim.release()
    assert second.holder("a") is None
    with second.take("a") as taken:
        assert first.take("a") is None
    assert taken.path.exists() is False
    other.release()


def test_a_claim_is_renewed_and_expires_only_without_its_owner(tmp_path):
    claims = Claims(tmp_path, lease_seconds=0.4)
    with claims.take("a") as claim:
        # As if the owner were on another machine, where its process cannot be looked up.
        values = json.loads(claim.path.read_text())
        taken, deadline = claim.path.stat().st_mtime, time.monotonic() + 60
        while claim.path.stat().st_mtime <= taken + 0.4:
            assert time.monotonic() < deadline, "the owner renews it, beyond its first lease"
            time.sleep(0.05)
        # Longer, lest this process be kept waiting between two renewals.
        assert Claims(tmp_path, lease_seconds=60).take("a") is None
    foreign = tmp_path / "b.claim"
    foreign.write_text(json.dumps({**values, "machine": "elsewhere"}))
    assert claims.take("b") is None
    old = time.time() - 10
    os.utime(foreign, (old, old))
    taken = claims.take("b")
    assert taken is not None
    taken.release()


def test_whoever_only_looks_writes_nothing(tmp_path, monkeypatch):
    claims = Claims(tmp_path)
    (tmp_path / "a.claim").write_text(json.dumps({"token": "x", "machine": "elsewhere", "pid": 1, "who": "somebody"}))
    monkeypatch.setattr(Claims, "_now", None)
    assert claims.holder("a") == "somebody"
    os.utime(tmp_path / "a.claim", (1.0, 1.0))
    assert claims.holder("a") is None


def test_a_released_claim_of_somebody_else_stays(tmp_path):
    claims = Claims(tmp_path)
    claim = claims.take("a")
    values = json.loads(claim.path.read_text())
    claim.path.write_text(json.dumps({**values, "token": "taken over"}))
    claim.release()
    assert read_owner(claim.path).token == "taken over"


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[1]", b"1", b'{"token":"a","machine":"m","pid":"x","who":"w"}'])
def test_a_claim_that_does_not_say_whose_it_is_holds_until_it_expires(tmp_path, content):
    path = tmp_path / "a.claim"
    path.write_bytes(content)
    claims = Claims(tmp_path)
    assert (claims.holder("a"), claims.take("a")) == ("unknown", None)
    os.utime(path, (1.0, 1.0))
    claims.take("a").release()


def _hold(directory, ready):
    Claims(directory).take("a")
    ready.set()
    time.sleep(60)


def test_the_claim_of_a_killed_process_is_free_at_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=_hold, args=(tmp_path, ready))
    process.start()
    assert ready.wait(60)
    claims = Claims(tmp_path)
    assert claims.take("a") is None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    taken = claims.take("a")
    assert taken is not None
    taken.release()


def _grab(directory, start, results):
    claims = Claims(directory, lease_seconds=1000)
    start.wait()
    results.put(claims.take("a") is not None)
    time.sleep(1)


def test_an_expired_claim_is_taken_over_by_exactly_one(tmp_path):
    context = multiprocessing.get_context("spawn")
    path = tmp_path / "a.claim"
    path.write_text(json.dumps({"token": "x", "machine": "elsewhere", "pid": 1, "who": "gone"}))
    os.utime(path, (1.0, 1.0))
    start, results = context.Event(), context.Queue()
    processes = [context.Process(target=_grab, args=(tmp_path, start, results)) for _ in range(4)]
    for process in processes:
        process.start()
    time.sleep(1)
    start.set()
    assert sum(results.get(timeout=60) for _ in processes) == 1
    for process in processes:
        process.join()

"""What processes agree on before they are a group."""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch

from powertrain.training import ranks as module
from powertrain.training.ranks import agree_to_start
from powertrain.training.signals import Stopped, StopSignals

SECOND = timedelta(seconds=1)


def meet(store, *ranks, timeout=60 * SECOND):
    """Let a rank a thread meet; return for each 0 where it begins, or the signal at which it ends."""
    outcomes = {}

    def arrive(number, signals):
        try:
            agree_to_start(store, len(ranks), signals, timeout, keeps_store=number == 0)
            outcomes[number] = 0
        except Stopped as stop:
            outcomes[number] = stop.signum

    threads = [threading.Thread(target=arrive, args=item) for item in enumerate(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [outcomes[number] for number in range(len(ranks))]


def signalled(signum):
    signals = StopSignals()
    signals.learn(signum)
    return signals


def test_all_begin_where_nobody_got_a_signal():
    assert meet(torch.distributed.HashStore(), StopSignals(), StopSignals(), StopSignals()) == [0, 0, 0]


def test_a_signal_to_one_before_all_are_here_ends_all():
    store = torch.distributed.HashStore()
    with pytest.raises(Stopped):
        agree_to_start(store, 3, signalled(signal.SIGUSR1), SECOND, keeps_store=False)
    for late in (StopSignals(), signalled(signal.SIGTERM)):
        with pytest.raises(Stopped) as stop:
            agree_to_start(store, 3, late, SECOND, keeps_store=False)
        assert stop.value.signum == signal.SIGUSR1


def test_whoever_gets_a_signal_once_all_begin_begins_too():
    """It did not yet know: the others count on it."""
    store = torch.distributed.HashStore()
    assert store.add("here", 2) == 2
    agree_to_start(store, 3, StopSignals(), SECOND, keeps_store=False)
    agree_to_start(store, 3, signalled(signal.SIGUSR1), SECOND, keeps_store=False)


def test_who_does_not_come_is_waited_for_and_counted():
    with pytest.raises(TimeoutError, match=r"1 of 2 processes have come within 0\.2 s"):
        agree_to_start(torch.distributed.HashStore(), 2, StopSignals(), SECOND / 5, keeps_store=False)


def test_a_lost_store_is_an_interruption_where_a_signal_came_here_too():
    server = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = torch.distributed.TCPStore("127.0.0.1", server.port, wait_for_workers=False)
    del server
    with pytest.raises(torch.distributed.DistError):
        agree_to_start(client, 2, StopSignals(), SECOND, keeps_store=False)
    with pytest.raises(Stopped):
        agree_to_start(client, 2, signalled(signal.SIGUSR1), SECOND, keeps_store=False)


class Slow:
    """A connection to a store on which each look takes a while."""

    def __init__(self, store):
        self.store = store

    def check(self, keys):
        time.sleep(0.5)
        return self.store.check(keys)

    def __getattr__(self, name):
        return getattr(self.store, name)


def outcome(store, signals, *, keeps_store):
    """Return the signal at which one of six ends; a store that it keeps ends with it."""
    try:
        agree_to_start(store, 6, signals, 60 * SECOND, keeps_store=keeps_store)
    except Stopped as stop:
        return stop.signum


def test_who_keeps_the_store_leaves_after_all_that_are_here():
    server = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    slow, fast = (torch.distributed.TCPStore("127.0.0.1", server.port, wait_for_workers=False) for _ in range(2))
    with ThreadPoolExecutor(2) as pool:
        late = pool.submit(outcome, Slow(slow), StopSignals(), keeps_store=False)
        while server.add("here", 0) < 1:
            time.sleep(0.01)
        first = pool.submit(outcome, fast, signalled(signal.SIGUSR1), keeps_store=False)
        assert outcome(server, StopSignals(), keeps_store=True) == signal.SIGUSR1
        del server
        assert first.result() == late.result() == signal.SIGUSR1


def test_who_keeps_the_store_does_not_wait_for_one_that_is_gone(monkeypatch):
    monkeypatch.setattr(module, "PARTING", 0.2)
    store = torch.distributed.HashStore()
    store.add("here", 1)
    assert outcome(store, signalled(signal.SIGUSR1), keeps_store=True) == signal.SIGUSR1


def test_a_signal_after_that_of_another_process_changes_nothing():
    with StopSignals() as signals:
        with signals.deferred():
            signals.learn(signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.received == signal.SIGUSR1

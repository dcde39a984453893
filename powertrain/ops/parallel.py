"""Independent parts of one call on CPU, each in a thread of its own instead of one after another in all of PyTorch's.

The chunked form is many operations of 10 to 500 microseconds. Shared out over cores one by one, most of them gain
little: below PyTorch's grain size not at all. A group of sequences needs nothing of another one, so threads that take
whole groups keep every core busy. PyTorch releases the interpreter's lock inside its operations. `Plan.groups_at_once`
says where that pays.

Every part runs with one thread of PyTorch's own, and so gives the same bits as without any other thread.
"""

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

Item = TypeVar("Item")


def for_each(function: Callable[[Item], object], items: Iterable[Item], threads: int) -> None:
    """Call `function` with every item, `threads` of them at the same time: on CPU, where there are as many items.

    For more than one thread, others than the caller's call it, with gradients, autocast and dispatch modes off: it must
    not depend on them, and write its results to tensors that exist. The first error is raised when no call is running
    any more.
    """
    items = list(items)
    if len(items) < threads or not _can_spread(threads):
        for item in items:
            function(item)
        return
    remaining, lock = iter(items), threading.Lock()

    def work() -> None:
        # A new thread records for autograd, which the caller, inside an op, does not.
        with torch.inference_mode():
            for item in _taken(remaining, lock):
                function(item)

    futures = [_workers.submit(threads, work) for _ in range(threads)]
    wait(futures)
    for future in futures:
        future.result()


def _taken(remaining: Iterator[Item], lock: threading.Lock) -> Iterator[Item]:
    """Yield items of an iterator that several threads share, each item to one of them."""
    while True:
        with lock:
            try:
                item = next(remaining)
            except StopIteration:
                return
        yield item


def _can_spread(threads: int) -> bool:
    if threads <= 1 or not torch.backends.openmp.is_available():
        return False  # without OpenMP the number of threads is one of the process, and cannot be 1 in some threads
    # New threads inherit the cores of the caller, which is bound to a single one under OMP_PROC_BIND.
    return not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) >= threads


class _Workers:
    """Threads in which PyTorch uses one thread, kept from call to call: a pool for each number of threads asked for."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Start over, as a forked child must, which has the record of the threads but not the threads."""
        self._pools: dict[int, ThreadPoolExecutor] = {}
        self._lock = threading.Lock()

    def submit(self, threads: int, function: Callable[[], object]) -> Future[object]:
        with self._lock:
            if threads not in self._pools:
                self._pools[threads] = _start(threads)
        return self._pools[threads].submit(function)


def _start(threads: int) -> ThreadPoolExecutor:
    of_caller = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="powertrain-op")
    all_set = threading.Barrier(threads)

    def set_up() -> None:
        # The first question initialises the thread with the number of the process, and must come before the change.
        torch.get_num_threads()
        torch.set_num_threads(1)
        all_set.wait()  # so that each thread of the pool runs this once

    try:
        for future in [pool.submit(set_up) for _ in range(threads)]:
            future.result()
    except RuntimeError:  # this process may start no more threads: those that wait for them must end
        all_set.abort()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    # Setting a thread's number also sets the one that threads yet to come start with: put that back.
    torch.set_num_threads(of_caller)
    return pool


_workers = _Workers()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_workers.forget)

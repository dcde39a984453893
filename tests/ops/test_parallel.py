"""Groups of sequences in threads of their own: what they may not change."""

import os
import threading
from collections.abc import Iterator

import pytest
import torch

from powertrain.ops import power_retention
from powertrain.ops.parallel import for_each
from powertrain.ops.plan import make_plan


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


needs_openmp = pytest.mark.skipif(
    not torch.backends.openmp.is_available() or len(os.sched_getaffinity(0)) < 2, reason="two cores and OpenMP"
)


@needs_openmp
def test_each_item_once_in_threads_of_one() -> None:
    seen: list[tuple[int, int, bool]] = []
    threads = set()
    both = threading.Barrier(2, timeout=30)

    def record(item: int) -> None:
        if item < 2:
            both.wait()  # passes only if two threads are in the function at once
        threads.add(threading.get_ident())
        seen.append((item, torch.get_num_threads(), torch.is_grad_enabled()))

    for _ in range(2):
        seen.clear()
        for_each(record, range(5), 2)
        assert sorted(seen) == [(i, 1, False) for i in range(5)]
    assert len(threads) == 2
    assert threading.get_ident() not in threads
    assert torch.get_num_threads() == 2
    new: list[int] = []
    thread = threading.Thread(target=lambda: new.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert new == [2], "threads that start later have the number of the process"


@pytest.mark.parametrize(("items", "at_once"), [(1, 2), (4, 1)])
def test_stays_in_the_caller(items: int, at_once: int) -> None:
    """Too few items keep PyTorch's own threads."""
    threads = []
    for_each(lambda _: threads.append(threading.get_ident()), range(items), at_once)
    assert threads == [threading.get_ident()] * items


@needs_openmp
def test_calls_inside_an_item_do_not_wait_for_each_other() -> None:
    inner: list[int] = []
    for_each(lambda _: for_each(inner.append, range(3), torch.get_num_threads()), range(4), 2)
    assert sorted(inner) == sorted([0, 1, 2] * 4)


def test_an_error_is_raised_after_all_calls_have_ended() -> None:
    running: list[int] = []
    slow = threading.Event()

    def fail(item: int) -> None:
        running.append(item)
        try:
            if item == 0:
                raise MemoryError("item 0")
            slow.wait(0.2)
        finally:
            running.remove(item)

    with pytest.raises(MemoryError, match="item 0"):
        for_each(fail, range(4), 2)
    assert not running


def gradients(num_threads: int) -> list[torch.Tensor]:
    """Return output and gradients of four sequences, in two groups."""
    torch.set_num_threads(num_threads)
    generator = torch.Generator().manual_seed(0)
    Q, K, V = (torch.randn(1, 1024, 4, 64, generator=generator, requires_grad=True) for _ in range(3))
    log_G = torch.full((1, 1024, 4), -1e-2, requires_grad=True)
    out = power_retention(Q, K, V, log_G, chunk_size=512)
    assert isinstance(out, torch.Tensor)
    grads = torch.autograd.grad(out, [Q, K, V, log_G], torch.randn(out.shape, generator=generator))
    with torch.inference_mode():
        assert torch.equal(out, power_retention(Q, K, V, log_G, chunk_size=512))
    return [out, *grads]


@needs_openmp
def test_bits_do_not_depend_on_threads() -> None:
    plan = make_plan(
        batch=1, key_heads=4, tokens=1024, query_heads_per_key_head=1, key_dim=64, value_dim=64, deg=2,
        chunk_size=512, device_type="cpu",
    )  # fmt: skip
    assert len(list(plan.groups())) == plan.groups_at_once(2) == 2
    for two, one in zip(gradients(2), gradients(1), strict=True):
        assert torch.equal(two, one)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_forked_child_starts_threads_of_its_own() -> None:
    """As a DataLoader's worker that sets its number of threads, or a launcher of ranks."""
    for_each(lambda _: None, range(4), 2)  # the parent has its threads
    child = os.fork()
    if child == 0:
        seen: list[int] = []
        for_each(seen.append, range(4), 2)
        os._exit(0 if sorted(seen) == [0, 1, 2, 3] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize(("tokens", "chunk_size", "at_once"), [(1024, 1024, 1), (1024, 512, 2), (4096, 4096, 2)])
def test_large_batches_are_shared_and_small_ones_are_not(tokens: int, chunk_size: int, at_once: int) -> None:
    plan = make_plan(
        batch=1, key_heads=8, tokens=tokens, query_heads_per_key_head=1, key_dim=64, value_dim=64, deg=2,
        chunk_size=chunk_size, device_type="cpu",
    )  # fmt: skip
    assert plan.groups_at_once(2) == at_once
    assert plan.groups_at_once(1) == 1

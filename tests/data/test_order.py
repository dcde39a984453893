from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from powertrain.data.order import Permutation, SampleOrder


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 16, 17, 100, 255, 256, 257, 1000, 4099])
def test_every_index_once(size: int) -> None:
    for epoch in range(3):
        permutation = Permutation(size, seed=5, epoch=epoch)
        assert sorted(map(permutation, range(size))) == list(range(size))


def test_large_domain_needs_no_table() -> None:
    size = 10**13 + 7
    permutation = Permutation(size, seed=0, epoch=0)
    images = [permutation(i) for i in range(1000)]
    assert len(set(images)) == 1000
    assert max(images) < size
    # Uniform images: the mean of 1000 has standard deviation size / sqrt(12000).
    assert abs(np.mean(images) - size / 2) < 5 * size / 12000**0.5


def test_positions_are_uniform() -> None:
    """Over many seeds, index 0 of a small domain lands everywhere, and neighbours are independent (chi-squared)."""
    size, seeds = 10, 4000
    first: Counter[int] = Counter()
    pairs: Counter[tuple[int, int]] = Counter()
    for seed in range(seeds):
        permutation = Permutation(size, seed, epoch=0)
        a, b = permutation(0), permutation(1)
        first[a] += 1
        pairs[a, b] += 1
    assert sum((first[i] - seeds / size) ** 2 for i in range(size)) / (seeds / size) < 27.9  # p = 0.001, 9 degrees
    expected = seeds / (size * (size - 1))
    cells = [(a, b) for a in range(size) for b in range(size) if a != b]
    assert sum((pairs[c] - expected) ** 2 for c in cells) / expected < 135.0  # p = 0.001, 89 degrees of freedom


def test_epochs_and_seeds_differ_and_repeat() -> None:
    order = SampleOrder(50, seed=1)
    epochs = [[order.window(50 * e + i) for i in range(50)] for e in range(4)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert [SampleOrder(50, seed=1).window(i) for i in range(50)] == epochs[0]
    assert [SampleOrder(50, seed=2).window(i) for i in range(50)] != epochs[0]
    # Going back is as good as going on: nothing but the number of the sample matters.
    assert [order.window(i) for i in range(50)] == epochs[0]


def test_known_order() -> None:
    """The order of published runs: a change here changes what every seed means."""
    assert [SampleOrder(10, seed=0).window(i) for i in range(20)] == [
        4,
        6,
        5,
        2,
        3,
        9,
        7,
        1,
        8,
        0,
        2,
        7,
        5,
        0,
        4,
        8,
        3,
        1,
        6,
        9,
    ]

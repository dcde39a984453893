"""The order of training samples: a seeded permutation per epoch, evaluated one index at a time."""

from __future__ import annotations

import hashlib

_MASK = (1 << 64) - 1
# Four rounds of a Feistel network are indistinguishable from random (Luby and Rackoff, 1988) for ideal round functions
# on large domains; twice as many cost microseconds and also serve the tiny domains of small corpora.
_ROUNDS = 8


def _mix(x: int) -> int:
    """Return the splitmix64 finalizer of `x` (Steele, Lea and Flood, 2014)."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


class Permutation:
    """A bijection of range(size) chosen by (seed, epoch), in constant memory.

    A balanced Feistel network permutes the smallest range of 4^b numbers that covers `size`; walking its cycle until an
    image lies below `size` restricts it to range(size) (Black and Rogaway, 2002).
    """

    def __init__(self, size: int, seed: int, epoch: int) -> None:
        assert size > 0
        self.size = size
        self._bits = max(1, ((size - 1).bit_length() + 1) // 2)
        self._half = (1 << self._bits) - 1
        digest = hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=8 * _ROUNDS).digest()
        self._keys = [int.from_bytes(digest[8 * r : 8 * r + 8], "little") for r in range(_ROUNDS)]

    def __call__(self, index: int) -> int:
        assert 0 <= index < self.size
        shift = 64 - self._bits
        while True:
            left, right = index >> self._bits, index & self._half
            for key in self._keys:
                left, right = right, left ^ (_mix(right ^ key) >> shift)
            index = left << self._bits | right
            if index < self.size:
                return index


class SampleOrder:
    """Maps a global sample number to a window: epoch after epoch over `num_windows`, each in its own order."""

    def __init__(self, num_windows: int, seed: int) -> None:
        self.num_windows = num_windows
        self.seed = seed
        self._epoch = -1
        self._permutation: Permutation | None = None

    def window(self, sample: int) -> int:
        """Return the window that global sample number `sample` (from 0, without end) reads."""
        epoch, index = divmod(sample, self.num_windows)
        if self._permutation is None or epoch != self._epoch:
            self._epoch, self._permutation = epoch, Permutation(self.num_windows, self.seed, epoch)
        return self._permutation(index)

"""What divides a whole number."""

from __future__ import annotations

import math


def divisors(number: int) -> list[int]:
    """Return the divisors of a whole number of at least 1, from 1 to itself."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return small + [number // n for n in reversed(small) if n * n != number]

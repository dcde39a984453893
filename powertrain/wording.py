"""Numbers in sentences."""

from __future__ import annotations


def counted(count: int, singular: str, plural: str | None = None) -> str:
    """Return a count with its noun, as `1 step` and `1,685 steps`; `plural` is for nouns that take more than an s."""
    return f"{count:,} {singular if count == 1 else plural or singular + 's'}"

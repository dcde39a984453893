"""Where what is made once and used by many runs lives: prepared tokens in `data`, built kernels in `kernels`."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """Return `$POWERTRAIN_CACHE`, else `powertrain` in the user's cache directory, absolute; it need not exist.

    Errors:
        ValueError: it is in a home directory, and there is none.
    """
    if given := os.environ.get("POWERTRAIN_CACHE"):
        root = Path(given)
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "powertrain"
    try:
        return root.expanduser().absolute()
    except RuntimeError:
        raise ValueError(f"{root}: there is no such home directory; set POWERTRAIN_CACHE to a directory") from None

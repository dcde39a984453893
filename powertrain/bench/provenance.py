"""What made a benchmark's data: the part of its record that all benchmarks share."""

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from powertrain.version import __version__


def provenance(benchmark: str, argv: list[str]) -> dict[str, Any]:
    """Return name, command, commit (None outside a checkout or without git) and versions of a run of `powertrain bench
    BENCHMARK`.
    """
    return {
        "benchmark": benchmark,
        "command": " ".join(["powertrain", "bench", benchmark, *argv]),
        "commit": _commit(),
        "powertrain": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None

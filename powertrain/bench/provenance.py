"""What made a benchmark's data: the part of its record that all benchmarks share."""

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from powertrain.version import __version__


def provenance(benchmark: str, argv: list[str]) -> dict[str, Any]:
    """Return name, command, commit (None outside a checkout) and versions of a run of `powertrain bench BENCHMARK`."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "benchmark": benchmark,
        "command": " ".join(["powertrain", "bench", benchmark, *argv]),
        "commit": commit.stdout.strip() or None,
        "powertrain": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }

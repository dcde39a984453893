"""`powertrain bench <what>`: side-by-side benchmarks that write their results as data."""

from __future__ import annotations

import sys
from importlib import import_module

from powertrain.schema import nearest

BENCHMARKS = {
    "op": ("powertrain.bench.op", "the PyTorch op against SDPA, time against context"),
    "distributed": (
        "powertrain.bench.distributed",
        "training on several GPUs against one, and what a save costs",
    ),
    "kernels": ("powertrain.bench.kernels", "the CUDA kernels against their peers, by stage and problem"),
}


def main(argv: list[str]) -> int:
    """Run one benchmark; the remaining arguments are its own."""
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: powertrain bench <what> [arguments]\n")
        for name, (_, text) in BENCHMARKS.items():
            print(f"  {name:<12} {text}")
        return 0
    if argv[0] not in BENCHMARKS:
        print(f"powertrain bench: unknown benchmark '{argv[0]}': {nearest(argv[0], BENCHMARKS)}", file=sys.stderr)
        return 2
    return import_module(BENCHMARKS[argv[0]][0]).main(argv[1:])

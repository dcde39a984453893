"""`python -m tests.faults`: break runs in every way that is foreseen, and count which survive.

    python -m tests.faults [--chains 10] [--seed 0] [--output docs/benchmarks/faults.json] [--keep DIRECTORY]

Prints the figures, and writes them with every fault to the output. The exit code is 1 where anything was lost.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.faults import policies
from tests.faults.campaign import chains, prepare
from tests.faults.report import Report


@contextlib.contextmanager
def _workplace(keep: Path | None) -> Iterator[Path]:
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="faults-") as directory:
            yield Path(directory)
    else:
        keep.mkdir(parents=True)
        yield keep.resolve()


def main(argv: list[str]) -> int:
    """Run the campaign; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description="Break runs and count which survive.")
    parser.add_argument("--chains", type=int, default=10, help="runs that are hit again and again (default 10)")
    parser.add_argument("--seed", type=int, default=0, help="of every random choice (default 0)")
    parser.add_argument("--output", type=Path, help="file for the figures (default: none is written)")
    parser.add_argument("--keep", type=Path, help="new directory for runs and outputs (default: a temporary one)")
    arguments = parser.parse_args(argv)
    # Before the server that ranks are forked from: one thread each, as there are more ranks than cores.
    os.environ["OMP_NUM_THREADS"] = "1"
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:5.0f} s] {text}", file=sys.stderr, flush=True)

    with _workplace(arguments.keep) as directory:
        shop = prepare(directory)
        report = Report(shop.references, arguments.seed, shlex.join(["python", "-m", "tests.faults", *argv]))
        say("the unbroken runs are made")
        for chain in chains(shop, arguments.chains, arguments.seed):
            chain.execute()
            report.add_chain(chain)
            lost = [outcome for outcome in chain.outcomes if not outcome.survived]
            say(f"{chain.name}: {len(chain.outcomes)} faults, {len(lost)} lost {[o.reason for o in lost] or ''}")
        for outcome in policies.execute(shop, arguments.seed):
            report.add(outcome)
            say(f"{outcome.kind}, {outcome.run}, {outcome.layout}: {outcome.reason or 'survived'}")
        report.not_tried = policies.not_tried(shop)
    report.seconds = time.monotonic() - began
    print(report.table())
    if arguments.output is not None:
        report.write(arguments.output)
    return 0 if report.lost == 0 else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

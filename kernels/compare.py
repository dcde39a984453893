"""Times kernel libraries side by side: `python kernels/compare.py base=OLD.so@OLD_CHECKOUT new=NEW.so [--problems ...]`.

Each library runs in a process of its own, all of them in every round, so that a machine that changes its clock changes it
for all; differences below some 3 % are noise. A library whose ABI is another one is named with the checkout whose Python
calls it. Libraries lie where `powertrain kernels build` put them (it says where). Medians of the passes and of every stage,
and how far random projections of output and gradients (random gates) are from the first library's, relative to their norms,
go to stdout and, after every round, to --output.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# batch, tokens, query heads, key heads, head dim, chunk size
PROBLEMS = {
    "K=32": (1, 65536, 8, 8, 32, None),
    "K=32, GQA 32:8": (1, 65536, 32, 8, 32, None),
    "K=32, T=4k": (16, 4096, 8, 8, 32, None),
    "small K=32": (2, 2048, 8, 8, 32, None),
    "headline": (1, 65536, 8, 8, 64, 1024),
    "GQA 32:8": (1, 65536, 32, 8, 64, None),
    "K=128": (1, 65536, 8, 8, 128, None),
    "T=1k": (64, 1024, 8, 8, 64, None),
    "small": (2, 2048, 8, 8, 64, None),
    "small K=128": (1, 2048, 8, 8, 128, None),
}
SECONDS = 60.0  # a problem that takes longer hangs
ROOT = Path(__file__).resolve().parent.parent


def measure(name: str, repeats: int) -> dict[str, float | list[float]]:
    """Return milliseconds of one problem by pass and stage, and random projections of output and gradients."""
    from powertrain import power_retention
    from powertrain.bench import kernels as bench

    batch, tokens, query_heads, key_heads, dim, chunk = PROBLEMS[name]
    generator = torch.Generator(device="cuda").manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    q, k, v = (randn(batch, tokens, h, dim).bfloat16().requires_grad_() for h in (query_heads, key_heads, key_heads))
    grad = randn(*q.shape).bfloat16()
    weak = torch.full((batch, tokens, key_heads), -1e-3, device="cuda", requires_grad=True)
    random = torch.nn.functional.logsigmoid(3 + randn(*weak.shape)).requires_grad_()

    def forward(log_g: torch.Tensor = weak) -> Any:
        return power_retention(q, k, v, log_g, chunk_size=chunk, impl="cuda")

    def both() -> object:
        return torch.autograd.grad(forward(), (q, k, v, weak), grad)

    result: dict[str, float | list[float]] = {"forward + backward": bench.median_ms(both, repeats)}
    with torch.no_grad():
        result["forward"] = bench.median_ms(forward, repeats)
    problem = bench.Problem(name, batch, tokens, query_heads, key_heads, dim, chunk)
    stages = bench._stage_timings(problem, name, both, argparse.Namespace(repeats=4))
    result |= {stage.stage: stage.milliseconds for stage in stages}
    out = forward(random)
    projections = []
    for x in (out, *torch.autograd.grad(out, (q, k, v, random), grad)):
        exact = x.detach().double()
        for _ in range(4):
            projections.append(float((exact * randn(*x.shape)).sum() / exact.norm()))
    result["projections"] = projections
    return result


def main() -> int:
    args = _parse()
    if args.measure:
        sys.path.insert(0, os.getcwd())
        print(json.dumps({name: measure(name, args.repeats) for name in args.problems}))
        return 0
    libraries = [_Library.parse(given) for given in args.libraries]
    if not torch.cuda.is_available():
        raise SystemExit("kernels/compare.py needs an NVIDIA GPU.")
    times: dict[str, dict[str, dict[str, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    projections: dict[str, dict[str, list[float]]] = defaultdict(dict)
    for _ in range(args.rounds):
        for library in libraries:
            for problem, result in library.run(args).items():
                projections[problem][library.name] = result.pop("projections")
                for part, milliseconds in result.items():
                    times[problem][part][library.name].append(milliseconds)
        medians = {
            problem: {part: {name: statistics.median(x) for name, x in row.items()} for part, row in parts.items()}
            for problem, parts in times.items()
        }
        differences = {
            problem: {
                name: max(abs(a - b) for a, b in zip(x, of[libraries[0].name], strict=True))
                for name, x in of.items()
                if name != libraries[0].name
            }
            for problem, of in projections.items()
        }
        if args.output:
            args.output.write_text(json.dumps({"ms": medians, "differences": differences}, indent=1) + "\n")
    for problem, parts in medians.items():
        print(problem)
        for part, row in parts.items():
            print(f"  {part:24}" + "".join(f"  {name} {value:.4f}" for name, value in row.items()))
        print(f"  differences: {differences[problem]}")
    return 0


@dataclass(frozen=True)
class _Library:
    name: str
    path: Path
    checkout: Path

    @classmethod
    def parse(cls, given: str) -> "_Library":
        name, _, rest = given.partition("=")
        path, _, checkout = rest.partition("@")
        found = cls(name, Path(path).resolve(), Path(checkout).resolve() if checkout else ROOT)
        if not rest or not found.path.is_file():
            raise SystemExit(f"{given!r} names no library: NAME=FILE or NAME=FILE@CHECKOUT, the file being there.")
        if not (found.checkout / "powertrain").is_dir():
            raise SystemExit(f"{given!r}: there is no package powertrain in {found.checkout}.")
        return found

    def run(self, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
        command = [sys.executable, str(Path(__file__).resolve()), "_", "--measure", "--repeats", str(args.repeats)]
        try:
            result = subprocess.run(
                [*command, "--problems", *args.problems],
                env={**os.environ, "POWERTRAIN_KERNELS_LIBRARY": str(self.path)},
                cwd=self.checkout,
                stdout=subprocess.PIPE,
                text=True,
                timeout=SECONDS * len(args.problems),
                check=True,
            )
        except subprocess.TimeoutExpired:
            raise SystemExit(f"{self.name}: no result in {SECONDS * len(args.problems):.0f} s; it hangs.") from None
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"{self.name}: exit status {error.returncode}; what it said is above.") from None
        return json.loads(result.stdout.splitlines()[-1])


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("libraries", nargs="+", metavar="NAME=LIBRARY[@CHECKOUT]", help="the first is the base")
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS), choices=PROBLEMS)
    parser.add_argument("--rounds", type=int, default=2, help="processes of each library (default: 2)")
    parser.add_argument("--repeats", type=int, default=10, help="timed passes in each process (default: 10)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

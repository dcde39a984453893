"""`powertrain bench op`: power retention beside PyTorch's softmax attention, forward and forward+backward, at a list of
lengths.

Each figure is the median of repeated runs; the two implementations take turns, and a speedup is the median of the
ratios of neighbouring runs, so that a machine that slows down slows both. Results are written as JSON with what is
needed to repeat them.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from powertrain.bench.provenance import provenance
from powertrain.ops import power_retention
from powertrain.ops.plan import choose_chunk_size
from powertrain.schema import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Row:
    """One length: times in milliseconds, each repeat's and their medians; a speedup is the median of SDPA's time over
    ours in the run before it, which is not the ratio of the medians.
    """

    tokens: int
    chunk_size: int
    power_forward_ms: float
    sdpa_forward_ms: float
    forward_speedup: float
    power_forward_backward_ms: float
    sdpa_forward_backward_ms: float
    forward_backward_speedup: float
    repeats: int
    power_forward_times_ms: list[float]
    sdpa_forward_times_ms: list[float]
    power_forward_backward_times_ms: list[float]
    sdpa_forward_backward_times_ms: list[float]


def main(argv: list[str]) -> int:
    """Run the benchmark with command-line arguments `argv` and return the exit status."""
    args = _parse(argv)
    if args.draw:
        _draw(Path(args.output))
        return 0
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    console = Console()
    rows = []
    for tokens in args.tokens:
        rows.append(_measure(tokens, args))
        console.print(f"T = {tokens}: {rows[-1].forward_backward_speedup:.2f} x SDPA, forward and backward")
    console.print(_table(rows, args))
    path = Path(args.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**_environment(args, argv), "rows": [asdict(row) for row in rows]}, indent=2) + "\n")
    console.print(f"Written to {path}, drawn to {_draw(path)}")
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="powertrain bench op", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384], help="sequence lengths"
    )
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=8, help="query heads, of power retention and of SDPA")
    parser.add_argument("--key-heads", type=int, help="key heads (default: as many as query heads)")
    parser.add_argument("--dim", type=int, default=64, help="head dimension, K = V")
    parser.add_argument("--deg", type=int, default=2, choices=(1, 2, 4))
    parser.add_argument("--no-gates", action="store_true", help="leave out log_G")
    parser.add_argument("--chunk-size", type=int, help="default: chosen from the shapes")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--repeats", type=int, default=9, help="least number of timed runs for each median")
    parser.add_argument("--output", default="bench/op.json", help="JSON file to write, with a figure beside it")
    parser.add_argument("--draw", action="store_true", help="only draw the figure of --output")
    args = parser.parse_args(argv)
    args.key_heads = args.heads if args.key_heads is None else args.key_heads
    _check(args)
    return args


def _check(args: argparse.Namespace) -> None:
    """Refuse what no run could measure, by a ConfigError."""
    counts = {"--tokens": min(args.tokens), "--batch": args.batch, "--heads": args.heads, "--key-heads": args.key_heads}
    counts |= {"--dim": args.dim, "--repeats": args.repeats, "--chunk-size": args.chunk_size, "--threads": args.threads}
    for option, count in counts.items():
        if count is not None and count < 1:
            raise ConfigError(f"{option} {count} is not allowed: it must be at least 1")
    if args.heads % args.key_heads:
        raise ConfigError(f"--key-heads {args.key_heads} does not divide --heads {args.heads}")
    allowed = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    allowed += [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    if args.device not in allowed:
        raise ConfigError(f"--device {args.device} is not allowed: this machine has {', '.join(allowed)}")


def _measure(tokens: int, args: argparse.Namespace) -> Row:
    generator = torch.Generator().manual_seed(0)

    def randn(heads: int) -> Tensor:
        x = torch.randn(args.batch, tokens, heads, args.dim, generator=generator)
        return x.to(args.device, DTYPES[args.dtype]).requires_grad_()

    Q, K, V = randn(args.heads), randn(args.key_heads), randn(args.key_heads)
    grad = torch.randn(Q.shape, generator=generator).to(Q)
    log_G = None
    if not args.no_gates:
        log_G = torch.full((args.batch, tokens, args.key_heads), -1e-3, device=args.device, requires_grad=True)
    chunk_size = args.chunk_size or choose_chunk_size(
        tokens=tokens,
        key_dim=args.dim,
        value_dim=args.dim,
        deg=args.deg,
        query_heads_per_key_head=args.heads // args.key_heads,
    )
    # SDPA gets its own layout, contiguous (B, H, T, D): the baseline pays for no copy.
    q, k, v = (x.detach().transpose(1, 2).contiguous().requires_grad_() for x in (Q, K, V))
    grad_sdpa = grad.transpose(1, 2).contiguous()

    def power() -> Tensor:
        out = power_retention(Q, K, V, log_G, deg=args.deg, chunk_size=chunk_size)
        assert isinstance(out, Tensor)
        return out

    def sdpa() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=args.heads != args.key_heads
        )

    leaves = [Q, K, V] if log_G is None else [Q, K, V, log_G]
    with torch.no_grad():
        forward = _times([power, sdpa], args)
    both = _times(
        [lambda: torch.autograd.grad(power(), leaves, grad), lambda: torch.autograd.grad(sdpa(), (q, k, v), grad_sdpa)],
        args,
    )
    return Row(
        tokens=tokens,
        chunk_size=chunk_size,
        power_forward_ms=statistics.median(forward[0]),
        sdpa_forward_ms=statistics.median(forward[1]),
        forward_speedup=median_ratio(*forward),
        power_forward_backward_ms=statistics.median(both[0]),
        sdpa_forward_backward_ms=statistics.median(both[1]),
        forward_backward_speedup=median_ratio(*both),
        repeats=args.repeats,
        power_forward_times_ms=forward[0],
        sdpa_forward_times_ms=forward[1],
        power_forward_backward_times_ms=both[0],
        sdpa_forward_backward_times_ms=both[1],
    )


def median_ratio(power: list[float], sdpa: list[float]) -> float:
    """Return the median of SDPA's time over ours in neighbouring runs."""
    return statistics.median(theirs / ours for ours, theirs in zip(power, sdpa, strict=True))


def _times(functions: list[Callable[[], object]], args: argparse.Namespace) -> list[list[float]]:
    """Return the times of each function in milliseconds, from runs in turns after one warm-up."""
    times: list[list[float]] = [[] for _ in functions]
    for repeat in range(args.repeats + 1):
        for function, record in zip(functions, times, strict=True):
            _synchronize(args.device)
            start = time.perf_counter()
            function()
            _synchronize(args.device)
            if repeat > 0:
                record.append((time.perf_counter() - start) * 1e3)
    return times


def _synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _environment(args: argparse.Namespace, argv: list[str]) -> dict[str, object]:
    is_cuda = torch.device(args.device).type == "cuda"
    return {
        **provenance("op", argv),
        "platform": f"{sys.platform}-{platform.machine()}",
        "processor": _processor(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(args.device) if is_cuda else None,
        "load_average": os.getloadavg()[0],
        "problem": {
            "batch": args.batch,
            "heads": args.heads,
            "key_heads": args.key_heads,
            "dim": args.dim,
            "deg": args.deg,
            "gated": not args.no_gates,
            "dtype": args.dtype,
            "device": args.device,
        },
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def _draw(path: Path) -> Path:
    """Draw the speedups against length beside the data file, and return where: on a machine that others use, they are
    what can be compared.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    record = json.loads(path.read_text())
    rows, problem = record["rows"], record["problem"]
    figure, axes = pyplot.subplots(figsize=(6.5, 4), layout="constrained")
    for name, label in (("forward", "forward"), ("forward_backward", "forward and backward")):
        axes.plot([row["tokens"] for row in rows], [row[f"{name}_speedup"] for row in rows], marker="o", label=label)
    axes.axhline(1.0, color="gray", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set(
        ylim=(0, None),
        xlabel="sequence length T (tokens)",
        ylabel="time of SDPA softmax / time of power retention",
        title=f"{record['gpu'] or record['processor']}: {problem['heads']} heads of {problem['dim']}, "
        f"{problem['dtype']}" + ("" if record["gpu"] else f", threads: {record['threads']}"),
    )
    axes.legend()
    figure_path = path.with_suffix(".png")
    figure.savefig(figure_path, dpi=150)
    pyplot.close(figure)
    return figure_path


def _table(rows: list[Row], args: argparse.Namespace) -> Table:
    gates = "ungated" if args.no_gates else "gated"
    problem = f"B={args.batch}, H={args.heads}, K=V={args.dim}, {args.dtype}, {args.device}"
    table = Table(
        title=f"Power retention (deg {args.deg}, {gates}) and SDPA softmax: {problem}; ms, medians of {args.repeats}"
    )
    for name in ("T", "chunk", "power fwd", "SDPA fwd", "speedup", "power fwd+bwd", "SDPA fwd+bwd", "speedup"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            str(row.tokens),
            str(row.chunk_size),
            f"{row.power_forward_ms:.1f}",
            f"{row.sdpa_forward_ms:.1f}",
            f"{row.forward_speedup:.2f} x",
            f"{row.power_forward_backward_ms:.1f}",
            f"{row.sdpa_forward_backward_ms:.1f}",
            f"{row.forward_backward_speedup:.2f} x",
        )
    return table

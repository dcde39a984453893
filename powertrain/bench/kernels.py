"""`powertrain bench kernels`: the CUDA path beside its peers, by problem and by stage, against the hardware's floor.

Peers are PyTorch's SDPA backends (causal softmax attention of the same shape) and the `retention` package where it is
installed. Times are medians of CUDA-event measurements after warm-up, in one run; rates of a large matrix product and a
large copy are measured before each problem, and their medians give the floors. Everything is written to one JSON file,
and the figures are drawn from that file alone.
"""

import argparse
import ctypes
import importlib.metadata
import importlib.util
import json
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from powertrain import native
from powertrain.bench.provenance import provenance
from powertrain.ops import cuda, power_retention
from powertrain.ops.cuda_plan import choose_chunk_size, phi_tiles
from powertrain.ops.flops import OpPassFlops, power_retention_flops

SDPA_BACKENDS = {"sdpa flash": SDPBackend.FLASH_ATTENTION, "sdpa cudnn": SDPBackend.CUDNN_ATTENTION}
WARM_UP = 3
_PRODUCTS = 80  # some 0.12 s on an H100
_L2_BYTES = 256 << 20  # more than the L2 cache of any GPU holds


@dataclass(frozen=True)
class Problem:
    """One shape, gated, with `chunk_size` None for the chosen one."""

    name: str
    batch: int
    tokens: int
    query_heads: int
    key_heads: int
    head_dim: int
    chunk_size: int | None = None
    peers: bool = True

    @property
    def resolved_chunk_size(self) -> int:
        return self.chunk_size or choose_chunk_size(
            tokens=self.tokens,
            head_dim=self.head_dim,
            query_heads_per_key_head=self.query_heads // self.key_heads,
            has_state=False,
        )

    @property
    def flops(self) -> OpPassFlops:
        return power_retention_flops(
            batch=self.batch,
            tokens=self.tokens,
            query_heads=self.query_heads,
            key_heads=self.key_heads,
            key_dim=self.head_dim,
            value_dim=self.head_dim,
            deg=2,
            chunk_size=min(self.resolved_chunk_size, self.tokens),
            executed=False,
            device_type="cuda",
        )


PROBLEMS = (
    Problem("headline", 1, 65536, 8, 8, 64, 1024),
    Problem("headline, chosen chunk", 1, 65536, 8, 8, 64),
    Problem("T=1k", 64, 1024, 8, 8, 64),
    Problem("T=4k", 16, 4096, 8, 8, 64),
    Problem("T=16k", 4, 16384, 8, 8, 64),
    Problem("T=256k", 1, 1 << 18, 8, 8, 64, peers=False),
    Problem("T=1M", 1, 1 << 20, 8, 8, 64, peers=False),
    Problem("K=32", 1, 65536, 8, 8, 32),
    Problem("K=128", 1, 65536, 8, 8, 128),
    Problem("GQA 32:8", 1, 65536, 32, 8, 64),
    Problem("GQA 32:8, K=128", 1, 65536, 32, 8, 128),
)


@dataclass(frozen=True)
class Timing:
    """Medians of one contender on one problem, in milliseconds; `peak_gib` is its peak memory, inputs included."""

    problem: str
    contender: str
    forward_ms: float
    forward_backward_ms: float
    peak_gib: float


@dataclass(frozen=True)
class StageTiming:
    """Median of one stage of our path."""

    problem: str
    contender: str
    stage: str
    milliseconds: float


def main(argv: list[str]) -> int:
    """Run the benchmark with command-line arguments `argv` and return the exit status."""
    args = _parse(argv)
    if args.draw:
        return _draw(Path(args.output))
    if not torch.cuda.is_available():
        raise SystemExit("powertrain bench kernels needs an NVIDIA GPU; --draw draws an existing result anywhere")
    console = Console()
    rates: dict[str, dict[str, float]] = {}
    timings: list[Timing] = []
    stages: list[StageTiming] = []
    skipped: list[dict[str, str]] = []
    host, path = measure_host(), Path(args.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    chosen = [problem for problem in PROBLEMS if not args.problems or problem.name in args.problems]
    for problem in chosen:
        rates[problem.name] = measured = measure_rates()
        console.print(
            f"{problem.name}: {measured['matrix_tflops']:.0f} TFLOP/s bf16 matrix product, "
            f"{measured['copy_tbps']:.2f} TB/s copy"
        )
        _measure(problem, args, timings, stages, skipped, console)
        # After each problem: a run that is cut short has measured something.
        record = {
            **_environment(argv),
            "rates": rates,
            "host_us": host,
            "problems": [{**asdict(p), "chunk_size": p.resolved_chunk_size, "flops": asdict(p.flops)} for p in chosen],
            **shares(chosen, rates, timings, stages),
            "skipped": skipped,
            "complete": problem is chosen[-1],
            "kernels": _kernel_attributes(),
        }
        path.write_text(json.dumps(record, indent=1) + "\n")
    console.print(_table(record))
    console.print(f"Written to {path}")
    return _draw(path)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="powertrain bench kernels", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("--problems", nargs="+", choices=[p.name for p in PROBLEMS], help="only these")
    parser.add_argument("--repeats", type=int, default=10, help="timed runs for each median")
    parser.add_argument("--no-peers", action="store_true", help="our path alone")
    parser.add_argument(
        "--retention",
        nargs="*",
        default=["headline"],
        choices=[p.name for p in PROBLEMS],
        help="problems that the `retention` package runs too: its first call at a head dim tunes for minutes",
    )
    parser.add_argument("--output", default="docs/benchmarks/kernels.json", help="JSON file to write (or to draw)")
    parser.add_argument("--draw", action="store_true", help="only draw the figures of --output")
    return parser.parse_args(argv)


def median_ms(function: Callable[[], object], repeats: int) -> float:
    """Return the median time of `function` on the device in milliseconds, between CUDA events.

    As it runs in training: the host goes ahead and does not wait between the repeats, and before each the L2 cache is
    filled with something else. What a call costs the host is measured apart (`measure_host`).
    """
    other = torch.empty(_L2_BYTES, dtype=torch.uint8, device="cuda")
    for _ in range(WARM_UP):
        function()
    events = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        other.zero_()
        start.record()
        function()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def measure_rates() -> dict[str, float]:
    """Return the rates of an 8192^3 bf16 matrix product (TFLOP/s) and of a 4 GiB copy, read and written (TB/s).

    Before each problem anew: a GPU at its power limit lowers its clock, for products and kernels alike, so a rate taken
    from a cool GPU is no floor for a busy one (`shares`). The products take as long together as a large problem's
    passes.
    """
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    matrix = 2 * 8192**3 / median_ms(lambda: a @ b, _PRODUCTS) / 1e9
    source = torch.empty(1 << 32, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    copy = 2 * source.numel() / median_ms(lambda: target.copy_(source), 10) / 1e9
    return {"matrix_tflops": matrix, "copy_tbps": copy}


def measure_host(calls: int = 20, repeats: int = 10) -> dict[str, float]:
    """Return the least microseconds that a call keeps the host, ours and SDPA's: B=1, T=512, 8 heads of 64, a forward
    pass on inputs that require gradients. The backward pass is not part of it.
    """
    q, k, v = (torch.randn(1, 512, 8, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    log_g = torch.full((1, 512, 8), -1e-3, device="cuda", requires_grad=True)
    qt, kt, vt = (x.detach().transpose(1, 2).contiguous().requires_grad_() for x in (q, k, v))
    contenders: dict[str, Callable[[], Any]] = {
        "powertrain": lambda: power_retention(q, k, v, log_g, chunk_size=128, impl="cuda"),
        "sdpa": lambda: torch.nn.functional.scaled_dot_product_attention(qt, kt, vt, is_causal=True),
    }
    result = {}
    for name, call in contenders.items():
        times = []
        for _ in range(1 + repeats):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(calls):  # few enough to stay ahead of the launch queue
                call()
            times.append((time.perf_counter() - start) / calls * 1e6)
        result[name] = min(times)
    return result


def _measure(
    problem: Problem,
    args: argparse.Namespace,
    timings: list[Timing],
    stages: list[StageTiming],
    skipped: list[dict[str, str]],
    console: Console,
) -> None:
    p = problem
    generator = torch.Generator(device="cuda").manual_seed(0)

    def randn(heads: int) -> Tensor:
        x = torch.randn(p.batch, p.tokens, heads, p.head_dim, generator=generator, device="cuda")
        return x.bfloat16().requires_grad_()

    q, k, v = randn(p.query_heads), randn(p.key_heads), randn(p.key_heads)
    grad = torch.randn(q.shape, generator=generator, device="cuda").bfloat16()
    log_g = torch.full((p.batch, p.tokens, p.key_heads), -1e-3, device="cuda", requires_grad=True)

    def skip(contender: str, why: str) -> None:
        skipped.append({"problem": p.name, "contender": contender, "why": why})
        console.print(f"{p.name}: {contender} left out: {why}")

    def record(contender: str, forward: Callable[[], Any], leaves: tuple[Tensor, ...], cotangent: Tensor) -> None:
        def both() -> object:
            return torch.autograd.grad(forward(), leaves, cotangent)

        try:
            torch.cuda.reset_peak_memory_stats()
            both()
            peak = torch.cuda.max_memory_allocated() / 2**30
            with torch.no_grad():
                forward_ms = median_ms(forward, args.repeats)
            timings.append(Timing(p.name, contender, forward_ms, median_ms(both, args.repeats), peak))
        # A compiler's errors are of any class, and must not cost the other contenders' times.
        except Exception as error:
            skip(contender, f"{type(error).__name__}: {error}".splitlines()[0])
            return
        last = timings[-1]
        console.print(
            f"{p.name}: {contender} {last.forward_ms:.3f} ms, with backward {last.forward_backward_ms:.3f} ms"
        )

    def ours() -> Any:
        return power_retention(q, k, v, log_g, chunk_size=p.resolved_chunk_size, impl="cuda")

    leaves = (q, k, v, log_g)
    for contender, arch in (("powertrain", 0), ("powertrain sm80", 80)):
        with cuda.force_arch(arch):
            record(contender, ours, leaves, grad)
            stages += _stage_timings(p, contender, lambda: torch.autograd.grad(ours(), leaves, grad), args)
    if args.no_peers or not p.peers:
        return
    # The peers' own layout, contiguous (B, H, T, D): they pay for no copy.
    qt, kt, vt = (x.detach().transpose(1, 2).contiguous().requires_grad_() for x in (q, k, v))
    for contender, backend in SDPA_BACKENDS.items():

        def softmax(backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(
                    qt, kt, vt, is_causal=True, enable_gqa=p.query_heads != p.key_heads
                )

        record(contender, softmax, (qt, kt, vt), grad.transpose(1, 2).contiguous())
    if p.name not in args.retention:
        skip("retention", "not among --retention")
        return
    try:
        from retention import power_retention as peer
    # It looks for compilers and sources when it is imported, and fails in ways of its own.
    except Exception as error:
        skip("retention", f"cannot be imported: {error}")
        return
    record("retention", lambda: peer(q, k, v, log_g, deg=2, chunk_size=p.resolved_chunk_size), leaves, grad)


# Kernels of one pass, in the order in which they run.
_STAGES = {
    "pack_inputs": "pack",
    "chunk_state_kernel": "chunk_state",
    "segment_state_kernel": "segment_state",
    "chunk_scan_kernel": "chunk_scan",
    "query_scan_kernel": "query_scan",
    "pack_grad": "pack_grad",
    "chunk_scan_grad_kernel": "chunk_scan_grad",
    "key_grads_kernel": "key_grads",
    "state_flow": "state_flow",
    "gate_grad": "gate_grad",
}
_FOLLOWERS = ("join_kernel", "enter_kernel")  # they belong to the stage before them
# Kernels that pack on the way, by their template arguments, and what they do so in place of.
_PACKING = {"Packs 1": "pack", "Packs 2": "pack_grad", "Packs 3": "pack q", "Packs 4": "pack k, v"}


def stages_of(kernels: list[str]) -> list[str | None]:
    """Return the stage of each kernel of one forward and backward pass, by name and order; None for others' kernels.

    Kernels that serve both directions run backward after the forward scan, and the second `chunk_scan_grad` is the
    reverse one. A kernel that also packs is a stage named after both; `pt_pack` then forms the gates alone.
    """
    stages: list[str | None] = []
    scanned = packed = False
    for kernel in kernels:
        kernel = re.sub(r"\((?:powertrain::sm90::)?Packs\)", "Packs ", kernel)  # casts of template arguments
        found = re.search(r"(\w+)(?:<(?:[^,<>]*, )?([^<>]*)>)?\(", kernel)
        name, argument = found.groups() if found else ("", None)
        stage = _STAGES.get(name)
        if name in _FOLLOWERS:
            stage = next((s for s in reversed(stages) if s), None)
        elif stage == "chunk_scan_grad":
            stage += " reverse" if stage in stages else ""
        elif stage in ("chunk_state", "segment_state", "chunk_scan") and scanned:
            stage += " reverse"
        if name in ("segment_state_kernel", "query_scan_kernel") and argument in _PACKING:
            stage = f"{_PACKING[argument]}, {stage}"
            packed |= _PACKING[argument] != "pack_grad"
        scanned |= name in ("chunk_scan_kernel", "query_scan_kernel")
        stages.append(stage)
    return ["gates" if packed and stage == "pack" else stage for stage in stages]


def _stage_timings(
    problem: Problem, contender: str, step: Callable[[], object], args: argparse.Namespace
) -> list[StageTiming]:
    for _ in range(WARM_UP):
        step()
    times: dict[str, list[float]] = defaultdict(list)
    for _ in range(args.repeats):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            step()
            torch.cuda.synchronize()
        events = [event for event in profiler.events() or [] if event.device_type == torch.autograd.DeviceType.CUDA]
        events.sort(key=lambda event: event.time_range.start)
        sums: dict[str, float] = defaultdict(float)
        for event, stage in zip(events, stages_of([event.name for event in events]), strict=True):
            if stage is not None:
                sums[stage] += event.time_range.elapsed_us() / 1e3
        for stage, milliseconds in sums.items():
            times[stage].append(milliseconds)
    return [StageTiming(problem.name, contender, name, statistics.median(values)) for name, values in times.items()]


def shares(
    problems: list[Problem], rates: dict[str, dict[str, float]], timings: list[Timing], stages: list[StageTiming]
) -> dict[str, Any]:
    """Return timings and stages as records, ours with their share of the floor at the run's median rates.

    A pass's floor is the time that the algorithmic FLOPs of power retention take at the matrix rate, a stage's as
    `stage_floors` has it. Rates taken before a problem and its own passes meet different temperatures: one rate alone
    would move a share by several points.
    """
    of_run = {key: statistics.median(x[key] for x in rates.values()) for key in next(iter(rates.values()))}
    floors = {
        p.name: {
            "forward": p.flops.forward.total / of_run["matrix_tflops"] / 1e9,
            "both": (p.flops.forward.total + p.flops.backward.total) / of_run["matrix_tflops"] / 1e9,
            **stage_floors(p, of_run),
        }
        for p in problems
    }

    def share(problem: str, what: str, milliseconds: float, ours: bool = True) -> float | None:
        floor = floors[problem].get(what)
        return floor / milliseconds if ours and floor is not None else None

    def of_pass(t: Timing) -> dict[str, float | None]:
        ours = t.contender.startswith("powertrain")
        return {
            "forward_share": share(t.problem, "forward", t.forward_ms, ours),
            "share": share(t.problem, "both", t.forward_backward_ms, ours),
        }

    def of_stage(s: StageTiming) -> dict[str, float | None]:
        return {"floor_ms": floors[s.problem].get(s.stage), "share": share(s.problem, s.stage, s.milliseconds)}

    return {
        "median_rates": of_run,
        "timings": [{**asdict(timing), **of_pass(timing)} for timing in timings],
        "stages": [{**asdict(stage), **of_stage(stage)} for stage in stages],
    }


def stage_floors(problem: Problem, rates: dict[str, float]) -> dict[str, float]:
    """Return the least milliseconds of each stage: its algorithmic FLOPs at the matrix rate or its bytes at the copy
    rate, whichever takes longer.

    A stage counts what it needs if it stood alone: one product with the state, and over pairs of tokens the scores
    again and its own products. The floors of the backward stages therefore add up to more than the backward pass's.
    """
    p, flops = problem, problem.flops
    tokens = p.batch * p.tokens
    row = p.head_dim * 2
    q_bytes, k_bytes = tokens * p.query_heads * row, tokens * p.key_heads * row
    chunks = -(-p.tokens // p.resolved_chunk_size)
    states = p.batch * p.key_heads * chunks * phi_tiles(p.head_dim) * 64 * (p.head_dim + 8) * 2 if chunks > 1 else 0
    read = -(-chunks // min(max(2048 // p.resolved_chunk_size, 1), 4))  # by state_flow, where gates are weak
    product = flops.forward.intra_chunk / 2  # one product over the pairs
    needs = {
        "chunk_state": (flops.forward.state_update, 2 * k_bytes + states),
        "chunk_scan": (flops.forward.state_query + 2 * product, 2 * q_bytes + 2 * k_bytes + states),
        "chunk_state reverse": (flops.backward.state_query / 2, 2 * q_bytes + states),
        "chunk_scan reverse": (flops.backward.state_update / 2 + 2 * product, 2 * q_bytes + 3 * k_bytes + states),
        "chunk_scan_grad": (flops.backward.state_query / 2 + 3 * product, 3 * q_bytes + 2 * k_bytes + states),
        "chunk_scan_grad reverse": (flops.backward.state_update / 2 + 3 * product, 2 * q_bytes + 3 * k_bytes + states),
        # Pairs are counted by chunk as for the other stages, though both score them within steps of 128 tokens alone: a
        # share of what was asked for, not of their own work.
        "query_scan": (
            flops.forward.state_update + flops.forward.state_query + 2 * product,
            2 * q_bytes + 2 * k_bytes + states,
        ),
        "key_grads": (
            flops.backward.state_query / 2 + flops.backward.state_update + 4 * product,
            2 * q_bytes + 4 * k_bytes + states,
        ),
        "segment_state": (flops.forward.state_update, 2 * k_bytes),
        "segment_state reverse": (flops.backward.state_query / 2, 2 * q_bytes),
        "pack": (0, 2 * (q_bytes + 2 * k_bytes)),
        "pack_grad": (0, 3 * q_bytes),
        "gates": (0, 6 * 4 * tokens * p.key_heads),  # read once, five decays of each
        "state_flow": (0, 2 * states * read // chunks),
    }
    # What packs on the way reads tensors in place of packed tiles, and writes these.
    for packing, stage, more in (
        ("pack", "query_scan", q_bytes + 2 * k_bytes),
        ("pack q", "query_scan", q_bytes),
        ("pack k, v", "segment_state", 2 * k_bytes),
        ("pack_grad", "segment_state reverse", 2 * q_bytes),  # with y, which the stage itself does not read
    ):
        work, size = needs[stage]
        needs[f"{packing}, {stage}"] = (work, size + more)
    return {
        name: max(work / rates["matrix_tflops"], size / rates["copy_tbps"]) / 1e9
        for name, (work, size) in needs.items()
    }


def _kernel_attributes() -> list[dict[str, Any]]:
    library, count = native.library(), ctypes.c_int32()
    native.call("pt_kernel_count", ctypes.byref(count))
    result = []
    for index in range(count.value):
        attributes = native.abi.KernelAttributes()
        if library.pt_kernel_info(index, ctypes.byref(attributes)) == 0:
            fields = {name: getattr(attributes, name) for name, *_ in attributes._fields_}
            result.append({**fields, "name": attributes.name.decode()})
    return result


def _environment(argv: list[str]) -> dict[str, Any]:
    peer = "retention"
    return {
        **provenance("kernels", argv),
        "cuda": torch.version.cuda,
        "retention": importlib.metadata.version(peer) if importlib.util.find_spec(peer) else None,
        "gpu": torch.cuda.get_device_name(),
        "multiprocessors": torch.cuda.get_device_properties(0).multi_processor_count,
    }


def _table(record: dict[str, Any]) -> Table:
    table = Table(title="ms, medians; shares of the floor at the run's median rates")
    for name in ("problem", "contender", "forward", "forward + backward", "peak GiB", "stages"):
        table.add_column(name)

    def of_floor(share: float | None) -> str:
        return f" ({share:.0%})" if share else ""

    for t in record["timings"]:
        parts = [
            f"{s['stage']} {s['milliseconds']:.3f}{of_floor(s['share'])}"
            for s in record["stages"]
            if (s["problem"], s["contender"]) == (t["problem"], t["contender"])
        ]
        table.add_row(
            t["problem"],
            t["contender"],
            f"{t['forward_ms']:.3f}{of_floor(t['forward_share'])}",
            f"{t['forward_backward_ms']:.3f}{of_floor(t['share'])}",
            f"{t['peak_gib']:.2f}",
            ", ".join(parts),
        )
    return table


def _draw(path: Path) -> int:
    """Draw time per token against context, and each stage's share of its floor, beside the data file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, ScalarFormatter

    record = json.loads(path.read_text())
    problems = {problem["name"]: problem for problem in record["problems"]}
    contexts = [p for p in problems.values() if p["name"].startswith("T=") or p["name"] == "headline, chosen chunk"]
    # `retention` runs the headline problem, whose shape is that of the chosen chunk.
    names = {p["name"] for p in contexts}
    called = {
        "powertrain sm80": "powertrain, kernels for A100",
        "sdpa flash": "softmax, FlashAttention",
        "sdpa cudnn": "softmax, cuDNN",
    }

    figure, axes = pyplot.subplots(figsize=(8.5, 4), layout="constrained")
    lines: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for timing in record["timings"]:
        if timing["problem"] in names or timing["contender"] == "retention":
            problem = problems[timing["problem"]]
            per_token = timing["forward_backward_ms"] * 1e6 / (problem["batch"] * problem["tokens"])
            lines[timing["contender"]].append((problem["tokens"], per_token))
    for contender, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=called.get(contender, contender))
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="context T (tokens)",
        ylabel="forward + backward per token (ns)",
        title=f"{record['gpu']}, 8 heads of 64, bf16\nbatches of 65536 tokens up to T = 64k, then one sequence",
    )
    axes.set_xticks(
        [p["tokens"] for p in contexts],
        [p["name"].removeprefix("T=") if "T=" in p["name"] else "64k" for p in contexts],
    )
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.grid(alpha=0.3)
    if lines:
        figure.legend(loc="outside right center")
    figure.savefig(path.with_name(f"{path.stem}-context.png"), dpi=150)

    shares = [s for s in record["stages"] if s["problem"] == "headline" and s["share"] is not None]
    figure, axes = pyplot.subplots(figsize=(6.5, 4), layout="constrained")
    labels = [f"{s['stage']} ({s['contender'].removeprefix('powertrain').strip() or 'chosen'})" for s in shares]
    axes.barh(labels, [100 * s["share"] for s in shares])
    axes.invert_yaxis()
    axes.set(xlabel="share of the floor (%)", xlim=(0, 100), title="Headline problem, by stage")
    figure.savefig(path.with_name(f"{path.stem}-stages.png"), dpi=150)
    print(f"Drawn: {path.with_name(path.stem + '-context.png')}, {path.with_name(path.stem + '-stages.png')}")
    return 0

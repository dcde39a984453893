"""The loss curve of a run, from its metrics.jsonl alone."""

from __future__ import annotations

import math
from pathlib import Path

from powertrain.training.records import read_metrics


def plot_curve(run_dir: str | Path) -> Path:
    """Draw training and validation loss (left axis) and perplexity (right axis) against tokens.

    Returns:
        `<run_dir>/plots/loss.png`.
    Errors:
        ValueError: the run has no records.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, FixedLocator, FuncFormatter, NullLocator

    run_dir = Path(run_dir)
    records = read_metrics(run_dir)
    curves = {
        key: [(r["tokens"], r[key]) for r in records if r.get(key) is not None] for key in ("train/loss", "val/loss")
    }
    losses = [loss for points in curves.values() for _, loss in points]
    if not losses:
        raise ValueError(f"{run_dir} has no loss in its metrics.jsonl to draw")
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if curves["train/loss"]:
        axes.plot(*zip(*curves["train/loss"], strict=True), color="#9db7d5", linewidth=1.0, label="training")
    if curves["val/loss"]:
        final = curves["val/loss"][-1][1]
        axes.plot(
            *zip(*curves["val/loss"], strict=True),
            color="#1f4e8c",
            linewidth=1.8,
            marker="o",
            markersize=3.5,
            label=f"validation, at the end {final:.3f} (perplexity {math.exp(min(final, 700.0)):.4g})",
        )
    axes.set(xlabel="tokens", ylabel="loss (nats per token)", title=run_dir.resolve().name)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlim(left=0)
    # The first steps' loss is that of a uniform guess; the axis still holds it, because it says where training began.
    low, high = min(losses), max(losses)
    margin = 0.05 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + margin)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    right = axes.secondary_yaxis("right")
    right.set_ylabel("perplexity")
    bottom, top = axes.get_ylim()
    # Perplexities are at least 1, and no larger than a float where a run has diverged.
    lowest, highest = (math.exp(min(max(loss, 0.0), 700.0)) for loss in (bottom, top))
    ticks = log_ticks(lowest, highest) if lowest < highest else []
    right.yaxis.set_major_locator(FixedLocator([math.log(t) for t in ticks]))
    right.yaxis.set_minor_locator(NullLocator())
    right.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{math.exp(y):.4g}"))
    path = run_dir / "plots" / "loss.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def log_ticks(low: float, high: float) -> list[float]:
    """Return at least four ticks between two positive values: the coarsest round numbers of which there are as many."""
    from matplotlib.ticker import MaxNLocator

    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for mantissas in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.2, 1.5, 2.0, 3.0, 5.0, 7.0)):
        ticks = [t for d in decades for m in mantissas if low <= (t := float(f"{m}e{d}")) <= high]
        if len(ticks) >= 4:
            # A few, also of a range over many decades.
            return ticks[:: math.ceil(len(ticks) / 12)]
    # So narrow a range looks linear.
    even = MaxNLocator(6, min_n_ticks=4, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    return [float(f"{t:.6g}") for t in even if low <= t <= high]

"""The figures of a report; each draws one kind of finding, or nothing where the records hold none."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from powertrain.scaling.analysis import Findings
from powertrain.scaling.compare import Envelope, Frontier, trunk_curve
from powertrain.scaling.drawing import (
    BAND_ALPHA,
    BUDGET_MAP,
    BUDGET_RANGE,
    EDGE_RING,
    GAIN_DODGE,
    GREY,
    MINIMUM_STAR,
    Pens,
    canvas,
    exact,
    fit_log_x,
    log_axis,
    number,
)
from powertrain.scaling.recipe import Figure, Recipe
from powertrain.scaling.resample import comparison_intervals

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas


def _convention(recipe: Recipe) -> str:
    return f"training FLOPs ({recipe.convention})"


def draw_envelope(recipe: Recipe, findings: Findings) -> Canvas | None:
    """(a) Training curves of every run, and their lower envelope per mixer."""
    from matplotlib.legend_handler import HandlerTuple

    if not findings.envelopes:
        return None
    annealed = [(m, p) for (m, _), p in sorted(findings.selected.items())]
    mixers = [m for m in findings.mixers(recipe) if m in findings.envelopes or m in {a for a, _ in annealed}]
    pens = Pens(recipe, mixers)
    figure, axes = canvas()
    ax = axes[0, 0]
    seen: list[float] = []
    for m in mixers:
        for r in findings.records:
            if r.mixer == m and r.curve:
                c, l = trunk_curve(r, recipe.convention)
                ax.plot(exact(c), exact(l), color=pens.colour(m), linewidth=0.6, alpha=0.25)
        # Without an envelope, because all runs are too short, a mixer still has its marks, and its legend.
        e = findings.envelopes.get(m, Envelope(np.empty(0), np.empty(0)))
        ax.plot(exact(e.compute), exact(e.loss), color=pens.colour(m), linewidth=2.4, label=pens.label(m))
        seen += list(e.compute)
    marks: dict[str, Any] = {}
    for m, p in annealed:
        style_ = {"color": pens.colour(m), "marker": pens.marker(m), "markeredgecolor": "white", "zorder": 4}
        (marks[m],) = ax.plot(exact([p.flops(recipe.convention)]), exact([p.loss]), linestyle="none", **style_)
    # The first steps fall from log(vocabulary) within a hair's breadth of the axis, and would flatten all the rest.
    lowest = min(float(e.loss.min()) for e in findings.envelopes.values())
    lowest = min([lowest, *(p.loss for _, p in annealed)])
    start = max(max(seen) / 10**2.5, min(float(e.compute.max()) for e in findings.envelopes.values()) / 10**1.5)
    shown = [
        float(l) for e in findings.envelopes.values() for c, l in zip(e.compute, e.loss, strict=True) if c >= start
    ]
    fit_log_x(ax, [c for c in [*seen, *(p.flops(recipe.convention) for _, p in annealed)] if c >= start])
    top = max(shown)
    ax.set_ylim(*exact([lowest - 0.06 * (top - lowest), top + 0.06 * (top - lowest)]))
    ax.set_xlabel(_convention(recipe))
    ax.set_ylabel("loss (nats per token)")
    ax.set_title(f"Training curves and their envelopes, context {findings.context}")
    handles, labels = ax.get_legend_handles_labels()
    if annealed:
        handles.append(tuple(marks[m] for m in mixers if m in marks))
        labels.append("annealed, held-out text")
    ax.legend(handles, labels, handler_map={tuple: HandlerTuple(ndivide=None)})
    return figure


def has_minimum(findings: Findings) -> bool:
    """Return whether any parabola has its minimum among the sizes measured, where a star is drawn."""
    return any(i.minimum is not None for i in findings.isoflops)


def has_edge(findings: Findings) -> bool:
    """Return whether any best size is at the edge of those measured, where a ring is drawn."""
    return any(i.edge is not None for i in findings.isoflops)


def draw_isoflop(recipe: Recipe, findings: Findings) -> Canvas | None:
    """(b) Loss against size at each budget, annealed, with parabolas and their minima."""
    import matplotlib
    from matplotlib.lines import Line2D

    mixers = [m for m in findings.mixers(recipe) if any(i.mixer == m for i in findings.isoflops)]
    if not mixers:
        return None
    budgets = sorted({i.budget for i in findings.isoflops})
    shades = matplotlib.colormaps[BUDGET_MAP](np.linspace(*BUDGET_RANGE, len(budgets)))
    columns = min(len(mixers), 2)
    rows = math.ceil(len(mixers) / columns)
    size = {"width": 3.6 * columns + 0.8, "height": 2.9 * rows + 0.6}
    figure, axes = canvas(columns, rows, **size, sharex=True, sharey=True)
    pens = Pens(recipe, mixers)
    all_sizes = [p.first.parameters for i in findings.isoflops for p in i.points]
    handles: dict[str, Any] = {}
    for ax, m in zip(axes.flat, mixers, strict=False):
        for i in (i for i in findings.isoflops if i.mixer == m):
            colour = shades[budgets.index(i.budget)]
            x = [p.first.parameters for p in i.points]
            y = [p.loss for p in i.points]
            ax.plot(exact(x), exact(y), color=colour, marker="o", linestyle="none", zorder=3)
            if i.parabola is None:
                ax.plot(exact(x), exact(y), color=colour, linewidth=0.8, linestyle=":")
                continue
            grid = np.geomspace(i.parabola.fitted[0], i.parabola.fitted[-1], 100)
            ax.plot(exact(grid), exact(i.parabola(grid)), color=colour, linewidth=1.2, linestyle="-")
        for i in (i for i in findings.isoflops if i.mixer == m):
            if i.minimum is not None:
                at = exact([i.minimum.parameters]), exact([i.minimum.loss])
                ax.plot(*at, color=shades[budgets.index(i.budget)], zorder=4, **MINIMUM_STAR)
            if i.edge is not None:
                ax.plot(exact([i.best.first.parameters]), exact([i.best.loss]), zorder=5, **EDGE_RING)
        ax.set_title(pens.label(m), color=pens.colour(m))
    for ax in axes.flat[len(mixers) :]:
        ax.set_visible(False)
    fit_log_x(axes[0, 0], all_sizes)
    # The lowest panel of a column, which is not in the last row where the number of mixers is odd.
    for ax in axes.flat[max(0, len(mixers) - columns) : len(mixers)]:
        ax.tick_params(labelbottom=True)
        ax.set_xlabel("parameters without embeddings")
    for ax in axes[:, 0]:
        ax.set_ylabel("annealed loss (nats per token)")
    for budget, colour in zip(budgets, shades, strict=True):
        handles[f"{number(budget)} FLOPs"] = Line2D([], [], color=colour, marker="o", linestyle="none")
    parabolas = [i.parabola for i in findings.isoflops if len(i.points) > 1]
    if any(parabolas):
        handles["parabola"] = Line2D([], [], color=GREY, linewidth=1.2)
    if not all(parabolas):
        handles["joined: no parabola"] = Line2D([], [], color=GREY, linewidth=0.8, linestyle=":")
    if has_minimum(findings):
        handles["minimum of the parabola"] = Line2D([], [], color=GREY, **MINIMUM_STAR)
    if has_edge(findings):
        handles["best at the edge: no minimum"] = Line2D([], [], **EDGE_RING)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=min(4, len(handles)))
    return figure


def _comparison_bands(recipe: Recipe, findings: Findings) -> dict[tuple[str, float], NDArray[np.float64]]:
    """Return the (low, high) of every selected point, without the shift that a draw of documents gives all mixers."""
    bands = {}
    for budget in sorted({b for _, b in findings.selected}):
        mixers = sorted(m for m, b in findings.selected if b == budget)
        replicates = np.stack([findings.selected[m, budget].replicates for m in mixers])
        for m, band in zip(mixers, comparison_intervals(replicates, recipe.analysis.confidence), strict=True):
            bands[m, budget] = band
    return bands


def _budgets(lines: dict[str, Frontier]) -> list[float]:
    return sorted({p.budget for line in lines.values() for p in line.points})


def draw_perplexity(recipe: Recipe, findings: Findings) -> Canvas | None:
    """(c) Perplexity of every mixer's best configuration against FLOPs, with confidence bands."""
    lines = findings.frontiers[recipe.convention]
    if not lines:
        return None
    mixers = [m for m in findings.mixers(recipe) if m in lines]
    pens = Pens(recipe, mixers)
    figure, axes = canvas()
    ax = axes[0, 0]
    laws = {f.mixer: f for f in findings.laws if f.fit is not None}
    seen: list[float] = []
    bands = _comparison_bands(recipe, findings)
    for m in mixers:
        line = lines[m]
        seen += list(line.compute)
        low, high = np.exp(np.array([bands[m, p.budget] for p in line.points]).T)
        x = exact(line.compute)
        ax.fill_between(x, exact(low), exact(high), color=pens.colour(m), alpha=BAND_ALPHA, linewidth=0)
        options = {"color": pens.colour(m), "marker": pens.marker(m), "markeredgecolor": "white"}
        ax.plot(x, exact(np.exp(line.loss)), label=pens.label(m), **options)
        error = np.maximum(np.stack([np.exp(line.loss) - low, high - np.exp(line.loss)]), 0)
        ax.errorbar(x, exact(np.exp(line.loss)), yerr=exact(error), color=pens.colour(m), linestyle="none", linewidth=1)
        if m in laws:
            compute, loss = np.array(laws[m].frontier).T
            ax.plot(exact(compute), exact(np.exp(loss)), color=pens.colour(m), linewidth=1, linestyle="--")
    if laws:
        ax.plot([], [], color=GREY, linewidth=1, linestyle="--", label="law fitted without the largest budget")
    fit_log_x(ax, seen, _budgets(lines))
    ax.set_yscale("log")
    log_axis(ax.yaxis)
    ax.set_xlabel(_convention(recipe))
    ax.set_ylabel("perplexity on held-out text")
    ax.set_title(f"Perplexity at equal compute, context {findings.context}")
    ax.legend()
    return figure


def draw_position(recipe: Recipe, findings: Findings) -> Canvas | None:
    """(d) Loss by position in the context, and its difference to the baseline."""
    if not findings.positions:
        return None
    pens = Pens(recipe, [c.mixer for c in findings.positions])
    order = findings.mixers(recipe)
    curves = sorted(findings.positions, key=lambda c: order.index(c.mixer))
    figure, axes = canvas(2, width=9.6, height=4.0, sharex=True)
    left, right = axes[0]
    for c in curves:
        options = {"color": pens.colour(c.mixer), "marker": pens.marker(c.mixer), "markeredgecolor": "white"}
        x = exact(c.bounds)
        left.plot(x, exact(c.loss), label=pens.label(c.mixer), **options)
        left.fill_between(x, exact(c.low), exact(c.high), color=pens.colour(c.mixer), alpha=BAND_ALPHA, linewidth=0)
        if c.mixer != recipe.baseline:
            right.plot(x, exact(c.difference), **options)
            band = exact(c.difference_low), exact(c.difference_high)
            right.fill_between(x, *band, color=pens.colour(c.mixer), alpha=BAND_ALPHA, linewidth=0)
    right.axhline(0, color=pens.colour(recipe.baseline), linewidth=1.2)
    left.set_xscale("log", base=2)
    bounds = [float(b) for b in curves[0].bounds]
    left.set_xlim(*exact([min(bounds) / 1.2, max(bounds) * 1.2]))
    for ax in (left, right):
        ax.set_xlabel("tokens of context, up to")
    left.set_ylabel("loss (nats per token)")
    right.set_ylabel(f"loss minus that of {pens.label(recipe.baseline)}")
    left.set_title(f"Loss by position at {number(curves[0].budget)} FLOPs")
    right.set_title("Paired difference")
    left.legend()
    return figure


def draw_seconds(recipe: Recipe, findings: Findings) -> Canvas | None:
    """(e) Loss against FLOPs beside loss against measured device-seconds."""
    lines = findings.frontiers[recipe.convention]
    timed = {m: [p for p in line.points if p.seconds] for m, line in lines.items()}
    if not any(timed.values()):
        return None
    mixers = [m for m in findings.mixers(recipe) if m in lines]
    pens = Pens(recipe, mixers)
    figure, axes = canvas(2, width=9.6, height=4.0, sharey=True)
    left, right = axes[0]
    for m in mixers:
        options = {"color": pens.colour(m), "marker": pens.marker(m), "markeredgecolor": "white"}
        left.plot(exact(lines[m].compute), exact(lines[m].loss), label=pens.label(m), **options)
        points = sorted(timed[m], key=lambda p: p.seconds or 0.0)
        right.plot(exact([p.seconds or 0.0 for p in points]), exact([p.loss for p in points]), **options)
    fit_log_x(left, [float(c) for line in lines.values() for c in line.compute], _budgets(lines))
    fit_log_x(right, [p.seconds or 0.0 for points in timed.values() for p in points])
    devices = sorted({f"{r.devices} × {r.device}" for r in findings.records if r.device})
    left.set_xlabel(_convention(recipe))
    right.set_xlabel("device-seconds of training" + (f" ({devices[0]})" if len(devices) == 1 else ""))
    left.set_ylabel("annealed loss (nats per token)")
    left.set_title(f"Against FLOPs, context {findings.context}")
    right.set_title("Against measured time")
    left.legend()
    return figure


def draw_gain(recipe: Recipe, findings: Findings) -> Canvas | None:
    """(f) Compute-equivalent gain over the baseline: annealed points with intervals, envelopes as thin lines."""
    if not findings.gains and not any(findings.envelope_gains.values()):
        return None
    mixers = [m for m in findings.mixers(recipe) if m != recipe.baseline]
    pens = Pens(recipe, findings.mixers(recipe))
    figure, axes = canvas()
    ax = axes[0, 0]
    last = max((e.compute.max() for e in findings.envelopes.values()), default=math.inf)
    # The steep start compares warm-ups; two decades are what a budget is about.
    curves = {
        m: [g for g in findings.envelope_gains.get(m, []) if not g.bound and g.compute >= last / 10**2.5]
        for m in mixers
    }
    seen = [g.compute for curve in curves.values() for g in curve] + [g.point.compute for g in findings.gains]
    if not seen:
        return None
    fit_log_x(ax, seen)
    left, right = ax.get_xlim()
    shown: list[float] = [1.0]
    for position, m in enumerate(mixers):
        colour = pens.colour(m)
        # Side by side, because marks and intervals at equal budgets would hide each other: a mark's width apart.
        dodge = (right / left) ** (GAIN_DODGE * (position - (len(mixers) - 1) / 2))
        points = sorted((g for g in findings.gains if g.mixer == m), key=lambda g: g.point.compute)
        if curves[m]:
            x, y = [g.compute for g in curves[m]], [g.gain for g in curves[m]]
            ax.plot(exact(x), exact(y), color=colour, linewidth=1.1, alpha=0.8)
            shown += y
        if curves[m] or points:
            options = {"color": colour, "marker": pens.marker(m) if points else "", "linewidth": 1.2}
            ax.plot([], [], linestyle="-" if curves[m] else "none", label=pens.label(m), **options)
        for g in points:
            centre = g.point.gain
            error = exact([[centre - g.low], [g.high - centre]])
            options = {"color": colour, "marker": pens.marker(m), "linewidth": 1.2, "capsize": 2.5}
            fill = "white" if g.point.bound else colour
            at = exact([g.point.compute * dodge]), exact([centre])
            ax.errorbar(*at, yerr=error, linestyle="none", markerfacecolor=fill, zorder=3, **options)
            if g.point.bound:
                up = g.point.bound == "at least"
                ax.annotate(
                    "",
                    xy=(float(at[0][0]), float(exact(centre * (1.25 if up else 0.8)))),
                    xytext=(float(at[0][0]), float(at[1][0])),
                    arrowprops={"arrowstyle": "->", "color": colour, "linewidth": 1.2},
                )
            shown += [
                g.low,
                g.high,
                centre * 1.3 if g.point.bound == "at least" else centre / 1.3 if g.point.bound else centre,
            ]
    ax.axhline(1, color=pens.colour(recipe.baseline), linewidth=1.4, label=f"{pens.label(recipe.baseline)} (baseline)")
    ax.set_yscale("log")
    low, high = min(shown), max(shown)
    ax.set_ylim(*exact([low / 1.15, high * 1.15]))
    log_axis(ax.yaxis)
    ax.set_xlabel(_convention(recipe))
    ax.set_ylabel("compute-equivalent gain")
    ax.set_title(f"Compute that {pens.label(recipe.baseline)} needs for the same loss, context {findings.context}")
    ax.legend()
    return figure


def draw_state_size(recipe: Recipe, findings: Findings) -> Canvas | None:
    """Loss at fixed FLOPs against the size of the recurrent state, and against the ratio of weight to state FLOPs."""
    import matplotlib

    chosen = {key: p for key, p in findings.selected.items() if p.first.state_size > 0}
    if not chosen:
        return None
    budgets = sorted({b for _, b in chosen})
    shades = matplotlib.colormaps[BUDGET_MAP](np.linspace(*BUDGET_RANGE, len(budgets)))
    pens = Pens(recipe, findings.mixers(recipe))
    figure, axes = canvas(2, width=9.6, height=4.2, sharey=True)
    left, right = axes[0]
    ratios: list[float] = []
    bands = _comparison_bands(recipe, findings)
    for budget, colour in zip(budgets, shades, strict=True):
        for ax, value in ((left, "state"), (right, "ratio")):
            items = []
            for (m, b), p in chosen.items():
                parts = p.first.flops_by_part
                state = sum(v for k, v in parts.items() if k.startswith("state"))
                weights = sum(v for k, v in parts.items() if k in ("weights", "head"))
                if b == budget and state > 0:
                    items.append((p.first.state_size if value == "state" else weights / state, m, p))
            items.sort(key=lambda i: i[:2])
            x = exact([i[0] for i in items])
            y = np.array([i[2].loss for i in items])
            low, high = np.array([bands[m, budget] for _, m, _ in items]).T
            error = exact(np.maximum(np.stack([y - low, high - y]), 0))
            label = f"{number(budget)} FLOPs"
            ax.errorbar(
                x, exact(y), yerr=error, color=colour, linewidth=1.4, label=label if ax is left else None, zorder=2
            )
            for i, (xi, m, _) in enumerate(items):
                at = exact([xi]), exact([y[i]])
                options = {
                    "color": pens.colour(m),
                    "marker": pens.marker(m),
                    "markeredgecolor": "white",
                    "markersize": 7,
                }
                ax.plot(*at, linestyle="none", zorder=3, **options)
            if value == "ratio":
                ratios += [i[0] for i in items]
    states = [p.first.state_size for p in chosen.values()]
    fit_log_x(left, states)
    fit_log_x(right, ratios)
    right.axvline(1, color=GREY, linewidth=0.8, linestyle=":")
    shown = sorted({m for m, _ in chosen}, key=findings.mixers(recipe).index)
    for m in shown:
        options = {"color": pens.colour(m), "marker": pens.marker(m), "markeredgecolor": "white", "linestyle": "none"}
        right.plot([], [], label=pens.label(m), markersize=7, **options)
    left.set_xlabel("state of a sequence (numbers, all layers)")
    right.set_xlabel("weight FLOPs / state FLOPs")
    left.set_ylabel("annealed loss (nats per token)")
    left.set_title(f"Against state size, context {findings.context}")
    right.set_title("Against the balance of weights and state")
    right.legend()
    # Below: one line per budget leaves no corner of the left axes free.
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=min(6, len(budgets)))
    return figure


DRAW: dict[Figure, Callable[[Recipe, Findings], Any]] = {
    "envelope": draw_envelope,
    "isoflop": draw_isoflop,
    "perplexity": draw_perplexity,
    "position": draw_position,
    "seconds": draw_seconds,
    "gain": draw_gain,
    "state_size": draw_state_size,
}

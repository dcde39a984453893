"""How figures look and become bytes: the style, the palette, logarithmic axes, deterministic rendering."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from powertrain.scaling.recipe import Recipe
from powertrain.training.plots import log_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

# Okabe and Ito's palette, distinct for all common kinds of colour vision; markers differ too, for print without colour.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F3C8D", "#4D4D4D")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
# Budgets, from light to dark; a slice of one colour map, because they are ordered.
BUDGET_MAP, BUDGET_RANGE = "viridis_r", (0.12, 0.95)
BAND_ALPHA = 0.16
GREY = "#555555"
# How far apart the marks of two mixers stand at one budget, as a share of the axis.
GAIN_DODGE = 0.022
# At the minimum of a parabola.
MINIMUM_STAR: dict[str, Any] = {
    "marker": "*",
    "markersize": 11,
    "markeredgecolor": "black",
    "markeredgewidth": 0.6,
    "linestyle": "none",
}
# Around a best size at the edge of those measured.
EDGE_RING: dict[str, Any] = {
    "marker": "o",
    "markersize": 11,
    "color": "none",
    "markeredgecolor": "#C00000",
    "markeredgewidth": 1.2,
    "linestyle": "none",
}

STYLE: dict[str, Any] = {
    # Shipped with matplotlib, so that every machine draws the same glyphs.
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.use_mathtext": True,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.6,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": "black",
    "ytick.labelcolor": "black",
    "lines.linewidth": 1.8,
    "lines.markersize": 5.0,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.dpi": 100,
    "savefig.dpi": 200,
    # Ids in an SVG are random without a salt; text becomes outlines, because a reader's fonts differ.
    "svg.hashsalt": "powertrain",
    "svg.fonttype": "path",
    "text.usetex": False,
}


@contextmanager
def style() -> Iterator[None]:
    """Draw with our settings alone, whatever the user's matplotlibrc says."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)  # type: ignore[arg-type]
        yield


def render(figure: Canvas) -> dict[str, bytes]:
    """Return a figure as `png` and `svg`, without dates, versions or other traces of the machine."""
    # The layout is found once; each file would repeat it, and with the engine "none" still draw twice for it.
    figure.draw_without_rendering()
    figure.set_layout_engine(None)
    result = {}
    for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, metadata=metadata)
        result[kind] = buffer.getvalue()
    return result


def exact(values: ArrayLike) -> NDArray[np.float64]:
    """Round to six significant digits, far below a pixel: machines differ in the last bit of a logarithm or a sum."""
    x = np.asarray(values, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        digits = np.where((x != 0) & np.isfinite(x), np.floor(np.log10(np.abs(x))), 0.0)
    scale = 10.0 ** (5 - digits)
    return np.where(np.isfinite(x), np.round(x * scale) / scale, x)


def number(x: float) -> str:
    """Return a power of ten as TeX where it reads better: 3e+16 as 3 x 10^16."""
    if x == 0 or 1e-3 <= abs(x) < 1e4:
        return f"{x:.3g}"
    mantissa, exponent = f"{x:.2e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".")
    power = f"10^{{{int(exponent)}}}"
    return f"${power}$" if mantissa == "1" else f"${mantissa}\\times {power}$"


class Pens:
    """One colour, marker and label per mixer, the same in every figure of a report."""

    def __init__(self, recipe: Recipe, mixers: list[str]) -> None:
        known = list(recipe.mixers) + [m for m in mixers if m not in recipe.mixers]
        self._index = {m: i for i, m in enumerate(known)}
        self._labels = {m: recipe.label(m) for m in known}

    def colour(self, mixer: str) -> str:
        return COLOURS[self._index[mixer] % len(COLOURS)]

    def marker(self, mixer: str) -> str:
        return MARKERS[self._index[mixer] % len(MARKERS)]

    def label(self, mixer: str) -> str:
        return self._labels[mixer]


def canvas(
    columns: int = 1, rows: int = 1, width: float = 6.4, height: float = 4.2, **options: Any
) -> tuple[Canvas, Any]:
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def log_axis(axis: Any, ticks: list[float] | None = None) -> None:
    """Label a logarithmic axis whose limits are set at `ticks`, or else at round numbers."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

    axis.set_major_locator(FixedLocator(log_ticks(*axis.get_view_interval()) if ticks is None else ticks))
    axis.set_major_formatter(FuncFormatter(lambda x, _: number(float(f"{x:.6g}"))))
    axis.set_minor_formatter(NullFormatter())


def fit_log_x(ax: Axes, values: list[float], ticks: list[float] | None = None) -> None:
    """Make the x-axis logarithmic and as wide as the values need."""
    low, high = min(values), max(values)
    pad = max((high / low) ** 0.06, 1.12)
    ax.set_xscale("log")
    ax.set_xlim(*exact([low / pad, high * pad]))
    log_axis(ax.xaxis, ticks)

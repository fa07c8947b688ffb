"""How every figure looks: one palette, one set of rules, and saving as PNG.

Colours are Okabe and Ito's, which people with any common colour blindness tell apart; what matters is
never told by colour alone, but by position, shape or a label too. Figures are made without pyplot, so that
nothing global is left behind and no display is needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from milp_ray.atomic_files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#1f2430"
MUTED = "#6b7280"
FAINT = "#e5e7eb"
BLUE = "#0072B2"
ORANGE = "#E69F00"
GREEN = "#009E73"
SKY = "#56B4E9"
VERMILLION = "#D55E00"
PURPLE = "#CC79A7"
GREY = "#9aa0a6"

METHOD_COLOURS = {
    "base": GREY,
    "text_prompt": ORANGE,
    "oracle_profile": INK,
    "memory_only": SKY,
    "instruction_only": GREEN,
    "milp": BLUE,
}
METHOD_MARKERS = {"oracle_profile": "D", "milp": "o", "text_prompt": "s", "base": "X"}
_OTHER_COLOURS = (PURPLE, VERMILLION, "#F0E442")

DPI = 160
_RULES: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.labelsize": 9.5,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#b8bec7",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "figure.constrained_layout.use": True,
}


def method_colour(name: str, position: int = 0) -> str:
    """The colour of a method, the same in every figure; ``position`` tells unknown ones apart."""
    return METHOD_COLOURS.get(name, _OTHER_COLOURS[position % len(_OTHER_COLOURS)])


def method_marker(name: str) -> str:
    """The marker of a method."""
    return METHOD_MARKERS.get(name, "o")


@contextmanager
def styled() -> Iterator[None]:
    """The rules above, for the figures made and saved inside."""
    import matplotlib

    with matplotlib.rc_context(_RULES):
        yield


def blank_figure(width: float, height: float) -> Figure:
    """A figure of so many inches without axes."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def new_figure(width: float, height: float, **subplots: Any) -> tuple[Figure, Any]:
    """A figure of so many inches and its axes, as ``Figure.subplots`` gives them."""
    figure = blank_figure(width, height)
    return figure, figure.subplots(**subplots)


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG, whole or not at all; the same figure gives the same bytes."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=DPI, format="png", metadata={"Software": None})
    return path


def only_grid(axes: Axes, axis: Literal["x", "y"]) -> None:
    """Grid lines across one axis only: those that a value is read off."""
    axes.grid(False)
    axes.grid(True, axis=axis)


def robust_limits(values: Sequence[float], *, margin: float = 0.06) -> tuple[float, float]:
    """Axis limits that leave out wild values: those beyond three interquartile ranges of the quartiles."""
    import numpy as np

    data = np.asarray(values, dtype=float)
    first, third = np.percentile(data, [25, 75])
    fence = 3.0 * (third - first)
    kept = data[(data >= first - fence) & (data <= third + fence)]
    low, high = float(kept.min()), float(kept.max())
    pad = margin * (high - low) or max(abs(high) * margin, 1e-6)
    return low - pad, high + pad


def thousands(value: float, _: object = None) -> str:
    """A count as an axis shows it: 900, 12k, 1.5M."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.1f}".removesuffix(".0") + unit
    return f"{value:.0f}"


def number(value: float) -> str:
    """A value of an objective: four digits; counts in full."""
    return f"{value:,.0f}" if value == int(value) and abs(value) >= 1000 else f"{value:.4g}"


def plus_minus(value: float, spread: float | None) -> str:
    """A value and its error, both to the error's second digit: "0.2489 ± 0.0018".

    Without an error, or with one that is rounding alone, the value as :func:`number` shows it.
    """
    if not spread or spread < 1e-9 * abs(value):
        return number(value)
    digits = max(0, 1 - math.floor(math.log10(spread)))
    return f"{value:,.{digits}f} ± {spread:,.{digits}f}"


def duration(seconds: float) -> str:
    """Seconds as people say them: "0.4 s", "42 s", "3 min 05 s", "2 h 10 min"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"

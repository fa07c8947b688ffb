"""Figures of an evaluation: scores by method and by kind of query, differences, and time by stage.

Pure functions of the dict that :func:`milp_ray.evaluation.compare.compare` makes. Scores are dots with
their intervals, one row a method, so that any number of methods is read off one axis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from milp_ray.evaluation.compare import main_measure, measured
from milp_ray.evaluation.measures import MEASURES, Measure
from milp_ray.evaluation.slices import ALL, HISTORY_LABELS
from milp_ray.evaluation.tables import PAIR_NAMES, compared_slices, kind_rows, slice_name
from milp_ray.report.style import (
    BLUE,
    FAINT,
    INK,
    MUTED,
    ORANGE,
    blank_figure,
    duration,
    method_colour,
    method_marker,
    new_figure,
    only_grid,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Cell = Mapping[str, Any]
_ROW_HEIGHT = 0.27  # inches a method
_MOST_COLUMNS = 8  # panels by kind; more would be too narrow to read


def methods_figure(comparison: Cell) -> Figure:
    """Every measure over all held-out queries: one panel a measure, one row a method."""
    names = [name for name in measured(dict(comparison)) if name != "rouge_1"]
    methods = comparison["methods"]
    with styled():
        figure, grid = new_figure(
            2.1 + 2.25 * max(1, len(names)), 1.15 + _ROW_HEIGHT * len(methods), ncols=max(1, len(names)),
            squeeze=False, sharey=True,
        )  # fmt: skip
        layout: Any = figure.get_layout_engine()
        layout.set(wspace=0.07)  # room for the values beside each panel
        for axes, name in zip(grid[0], names, strict=False):
            cells = {method: comparison["scores"][method].get(ALL, {}).get(name) for method in methods}
            _dot_panel(axes, comparison, cells, MEASURES[name], values_shown=True)
            better = "lower" if MEASURES[name].direction == "min" else "higher"
            axes.set_title(MEASURES[name].label)
            axes.set_xlabel(f"{MEASURES[name].unit} ({better} is better)")
        return figure


def kinds_figure(comparison: Cell) -> Figure | None:
    """The main measure by kind of query, short and long histories in rows of their own.

    ``None`` where the data has neither kinds nor two lengths of history.
    """
    both = comparison["n_users_fits"] and comparison["n_users_long"]
    histories = ["fits", "long"] if both else [""]
    main = main_measure(dict(comparison))
    wanted = [_columns(comparison, history) for history in histories]
    columns = list(dict.fromkeys(name for row in wanted for name in row))[:_MOST_COLUMNS]
    if main is None or not columns or (len(columns) == 1 and not both):
        return None
    methods = comparison["methods"]
    measure = MEASURES[main]
    keys = [f"{history}:{column}" if history else column for history in histories for column in columns]
    limits = _common_limits(comparison, keys, measure)
    with styled():
        height = 0.85 + _ROW_HEIGHT * len(methods)
        figure = blank_figure(max(5.0, 1.7 + 1.5 * len(columns)), 0.35 + height * len(histories))
        parts = figure.subfigures(nrows=len(histories), squeeze=False)[:, 0]
        for history, part in zip(histories, parts, strict=True):
            row = part.subplots(ncols=len(columns), squeeze=False, sharey=True, sharex=True)[0]
            for axes, column in zip(row, columns, strict=True):
                key = f"{history}:{column}" if history else column
                cells = {m: comparison["scores"][m].get(key, {}).get(main) for m in methods}
                _dot_panel(axes, comparison, cells, measure)
                axes.set_xlim(*limits)
                _panel_title(axes, comparison, key, cells)
            n_users = comparison["slices"].get(f"{history}:{ALL}" if history else ALL, {}).get("n_users", 0)
            part.suptitle(f"{HISTORY_LABELS[history]} ({n_users} users)", x=0.005, ha="left", fontsize=10.5,
                          fontweight="bold")  # fmt: skip
        parts[-1].supxlabel(
            f"{measure.label} ({measure.unit}), mean over users with {comparison['confidence']:.0%} interval",
            fontsize=9.5,
        )
        return figure


def _common_limits(comparison: Cell, keys: Sequence[str], measure: Measure) -> tuple[float, float]:
    """One range for all panels, so that they are read against each other; the whole scale for a share."""
    if measure.unit == "%":
        return -4.0, 104.0
    cells = [
        comparison["scores"][m].get(key, {}).get(measure.name) for m in comparison["methods"] for key in keys
    ]
    ends = [
        cell[end] * measure.scale
        for cell in cells
        if cell
        for end in ("mean", "low", "high")
        if cell[end] is not None
    ]
    margin = 0.06 * (max(ends) - min(ends)) or 1.0
    return min(ends) - margin, max(ends) + margin


def _panel_title(axes: Axes, comparison: Cell, key: str, cells: Mapping[str, Cell | None]) -> None:
    n_examples = max((cell["n_examples"] for cell in cells.values() if cell), default=0)
    label = comparison["slices"][key]["label"] if n_examples else "none"
    axes.set_title(f"{label[0].upper()}{label[1:]}", fontsize=9, fontweight="normal", pad=5)
    axes.set_title(f"{n_examples}", loc="right", fontsize=8, fontweight="normal", color=MUTED, pad=5)


def differences_figure(comparison: Cell) -> Figure | None:
    """What MiLP adds to the base and to the text prompt, by the main measure; ``None`` without MiLP."""
    main = main_measure(dict(comparison))
    keys = [key for key in compared_slices(comparison) if _has_difference(comparison, key, main)]
    if main is None or not keys or not comparison["differences"]:
        return None
    measure = MEASURES[main]
    pairs = list(comparison["differences"])
    with styled():
        figure, axes = new_figure(7.4, 1.3 + 0.42 * len(keys))
        only_grid(axes, "x")
        axes.axvline(0, color=INK, lw=1)
        for position, pair in enumerate(pairs):
            shift = (position - (len(pairs) - 1) / 2) * -0.28
            colour, marker = ((BLUE, "o"), (ORANGE, "s"))[position % 2]
            for row, key in enumerate(keys):
                cell = comparison["differences"][pair].get(key, {}).get(main)
                if cell:
                    _dot(axes, cell, len(keys) - 1 - row + shift, measure, colour, marker,
                         label=PAIR_NAMES.get(pair, pair) if row == 0 else None)  # fmt: skip
        axes.set_yticks(
            range(len(keys)), [slice_name(comparison, key).capitalize() for key in reversed(keys)]
        )
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_ylim(-0.6, len(keys) - 0.4)
        unit = "percentage points" if measure.unit == "%" else measure.unit
        axes.set_xlabel(f"{measure.label}: difference in {unit}, paired within users")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=2)
        return figure


def seconds_figure(seconds: Mapping[str, float]) -> Figure:
    """Wall-clock time by stage, in the order of the stages."""
    stages = list(seconds)
    with styled():
        figure, axes = new_figure(6.4, 0.75 + 0.34 * max(1, len(stages)))
        axes.grid(False)
        places = range(len(stages) - 1, -1, -1)
        axes.barh(list(places), [seconds[stage] for stage in stages], height=0.6, color=BLUE)
        for place, stage in zip(places, stages, strict=True):
            axes.annotate(duration(seconds[stage]), (seconds[stage], place), xytext=(5, 0),
                          textcoords="offset points", va="center", fontsize=9)  # fmt: skip
        axes.set_yticks(list(places), [stage.capitalize() for stage in stages])
        axes.tick_params(axis="y", length=0)
        axes.set_xlim(0, max([*seconds.values(), 1e-9]) * 1.2)
        axes.set_xlabel("Wall-clock seconds")
        axes.set_title(f"Time by stage ({duration(sum(seconds.values()))} in all)")
        return figure


def _columns(comparison: Cell, history: str) -> list[str]:
    """Slices (without the history part of their key) that the figure by kind shows.

    Everything, and then each kind by exposure where it has several, as a whole where it does not.
    """
    main = main_measure(dict(comparison))
    rows = [row for row in kind_rows(comparison, history) if row.measure == main]
    found = []
    for row in rows:
        piece = comparison["slices"][row.key]
        bare = row.key.partition(":")[2] if history else row.key
        split_up = not row.indented and any(other.key.startswith(row.key + "/") for other in rows)
        if bare == ALL or (piece["kind"] and not split_up):
            found.append(bare)
    return found


def _dot_panel(
    axes: Axes,
    comparison: Cell,
    cells: Mapping[str, Cell | None],
    measure: Measure,
    *,
    values_shown: bool = False,
) -> None:
    methods: Sequence[str] = list(cells)
    only_grid(axes, "x")
    for position, method in enumerate(methods):
        place = len(methods) - 1 - position
        axes.axhline(place, color=FAINT, lw=0.8, zorder=0)
        cell = cells[method]
        if cell is None:
            continue
        _dot(axes, cell, place, measure, method_colour(method, position), method_marker(method))
        if values_shown:
            axes.annotate(measure.show(cell["mean"]), (1.02, place), xycoords=("axes fraction", "data"),
                          va="center", fontsize=8.5, color=INK)  # fmt: skip
    labels = [comparison["labels"][method] for method in reversed(methods)]
    axes.set_yticks(range(len(methods)), labels)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_ylim(-0.6, len(methods) - 0.4)


def _dot(
    axes: Axes, cell: Cell, place: float, measure: Measure, colour: str, marker: str, label: str | None = None
) -> None:
    """A mean with its interval at a height."""
    if cell["low"] is not None:
        ends = [cell["low"] * measure.scale, cell["high"] * measure.scale]
        axes.plot(ends, [place, place], color=colour, lw=2.2, solid_capstyle="butt", alpha=0.55)
    mean = cell["mean"] * measure.scale
    axes.plot(mean, place, marker, ms=6.5, color=colour, mec="white", mew=0.7, ls="none", label=label)


def _has_difference(comparison: Cell, key: str, main: str | None) -> bool:
    return any(main in slices.get(key, {}) for slices in comparison["differences"].values())

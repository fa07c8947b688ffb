"""The layer map: where the memory is stored, after the model of the search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from milp_ray.objectives import KNOWN_OBJECTIVES
from milp_ray.report.style import BLUE, GREY, INK, ORANGE, new_figure, only_grid, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from milp_ray.search.insight import Beliefs

_LAYER = "layer "
_GAP = 0.8  # between the layers and what is not a layer, in bars


def importance_figure(analysis: Beliefs, chosen: Sequence[bool] | None = None) -> Figure:
    """Importance of each layer, of the number of LoRAs and of their rank; a row an objective.

    Args:
        analysis: of the study.
        chosen: the layers of the chosen layout, which are marked.
    """
    names = list(analysis.objectives)
    width = min(11.2, max(5.4, 1.6 + 0.42 * len(analysis.factors)))
    with styled():
        figure, grid = new_figure(
            width, 0.9 + 1.55 * len(names), nrows=len(names), squeeze=False, sharex=True
        )
        for axes, name in zip(grid[:, 0], names, strict=True):
            _importance_panel(axes, analysis, name, chosen)
        grid[-1, 0].set_xlabel("Layer (0 is next to the input)", loc="left")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=3, handlelength=1.2)
        return figure


def _importance_panel(axes: Axes, analysis: Beliefs, name: str, chosen: Sequence[bool] | None) -> None:
    only_grid(axes, "y")
    found = analysis.importance[name]
    layers = [factor for factor in analysis.factors if factor.startswith(_LAYER)]
    others = [factor for factor in analysis.factors if not factor.startswith(_LAYER)]
    places = [float(factor.removeprefix(_LAYER)) for factor in layers]
    beside = [len(layers) + (_GAP if layers else 0.0) + place for place in range(len(others))]
    for factors, xs, colour, label in (
        (layers, places, BLUE, "Layer"),
        (others, beside, GREY, "Other factors"),
    ):
        totals = [found[factor][0] for factor in factors]
        arms = [
            [max(0.0, found[factor][0] - found[factor][1]) for factor in factors],
            [max(0.0, found[factor][2] - found[factor][0]) for factor in factors],
        ]
        if factors:
            axes.bar(xs, totals, 0.72, color=colour, label=label)
            axes.errorbar(xs, totals, yerr=arms, fmt="none", ecolor=INK, elinewidth=1.1)
    marked = [place for place in places if chosen is not None and chosen[int(place)]]
    if marked:
        axes.plot(
            marked, [0.0] * len(marked), "v", color=ORANGE, mec=INK, mew=0.6, ms=6.5, clip_on=False, zorder=5,
            label="Layers of the chosen layout",
        )  # fmt: skip
    axes.set_xticks([*places, *beside], [*(str(int(place)) for place in places), *others])
    axes.set_xlim(-0.6, max([*places, *beside]) + 0.6)
    axes.set_ylim(bottom=0)
    axes.set_title(KNOWN_OBJECTIVES[name].label.partition(" (")[0])

"""Figures of quality against cost: one point a method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from milp_ray.evaluation.compare import main_measure
from milp_ray.evaluation.measures import MEASURES
from milp_ray.evaluation.slices import ALL
from milp_ray.report.style import method_colour, method_marker, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Costs that quality is drawn over: key, label, what a value is multiplied with.
AXES = (
    ("stored_bytes", "Stored a user (KiB)", 1 / 1024),
    ("prompt_tokens", "Prompt (tokens a query)", 1.0),
    ("training_seconds", "Training (s a user)", 1.0),
)


def total_costs(comparison: Mapping[str, Any], method: str) -> dict[str, float]:
    """A method's costs, with its share of what is trained on all users together in training and storage."""
    costs = comparison["costs"][method]
    n_users = max(1, comparison["n_users"])
    return {
        **costs,
        "training_seconds": costs["training_seconds"] + costs["shared_seconds"] / n_users,
        "stored_bytes": costs["stored_bytes"] + costs["shared_bytes"] / n_users,
    }


def cost_figure(comparison: Mapping[str, Any]) -> Figure | None:
    """Quality over bytes stored, prompt tokens and training time; ``None`` without any quality.

    The scales are linear up to a small value, so that methods that cost nothing are on them, and logarithmic
    above.
    """
    name = main_measure(dict(comparison))
    if name is None:
        return None
    measure = MEASURES[name]
    with styled():
        figure, panels = new_figure(10.5, 3.9, ncols=len(AXES), sharey=True)
        for axes, (key, label, factor) in zip(panels, AXES, strict=True):
            for position, method in enumerate(comparison["methods"]):
                cell = comparison["scores"][method].get(ALL, {}).get(name)
                if cell is None:
                    continue
                x, y = total_costs(comparison, method)[key] * factor, cell["mean"] * measure.scale
                colour = method_colour(method, position)
                if cell["low"] is not None:
                    ends = [cell["low"] * measure.scale, cell["high"] * measure.scale]
                    axes.plot([x, x], ends, color=colour, lw=1.6, alpha=0.5)
                axes.plot(x, y, method_marker(method), ms=6.5, color=colour, mec="white", mew=0.7, ls="none")
                axes.annotate(comparison["short_labels"][method], (x, y), xytext=(5, 3),
                              textcoords="offset points", fontsize=7.5)  # fmt: skip
            axes.set_xscale("symlog", linthresh=1.0)
            axes.set_xlim(left=0)
            axes.set_xlabel(label)
        panels[0].set_ylabel(measure.header)
        return figure

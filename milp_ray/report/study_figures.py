"""Figures of a search: the front, hypervolume over trials, and what each factor of the layout does.

Pure functions of :class:`Trial` lists; each returns a matplotlib figure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from milp_ray.evaluation.bootstrap import interval
from milp_ray.objectives import ADAPTER_PARAMETERS, KNOWN_OBJECTIVES, ROUGE_L, VALIDATION_LOSS
from milp_ray.report.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    MUTED,
    ORANGE,
    VERMILLION,
    new_figure,
    only_grid,
    robust_limits,
    styled,
    thousands,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PANELS = ((VALIDATION_LOSS.name, ROUGE_L.name), (ADAPTER_PARAMETERS.name, VALIDATION_LOSS.name))
_LONG_LABELS = {
    VALIDATION_LOSS.name: "Validation loss (nats a token), lower is better",
    ROUGE_L.name: "ROUGE-L (F × 100), higher is better",
    ADAPTER_PARAMETERS.name: "Adapter parameters, fewer is better",
}
# Who gave a trial its layout, as the journal names them (:mod:`milp_ray.search.journal`); else: chance, where
# the surrogate had no proposal.
_INITIAL = ("sobol", "warm_start")
_SURROGATE = "saas_nehvi"
_MEAN_SETTINGS = {"n_bootstrap": 1000, "confidence": 0.95, "seed": 0}


@dataclass(frozen=True, slots=True)
class Trial:
    """One finished trial: where its layout lies and what it measured."""

    index: int
    generator: str
    mask: tuple[bool, ...]
    rank: int
    values: Mapping[str, float] = field(default_factory=dict)
    on_front: bool = False
    chosen: bool = False
    # The model's mean and standard deviation by objective, where there is a model.
    model: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def n_loras(self) -> int:
        """Layers that carry a LoRA."""
        return sum(self.mask)

    @property
    def is_initial(self) -> bool:
        """Whether it was drawn before the surrogate proposed anything."""
        return self.generator in _INITIAL

    @property
    def is_proposed(self) -> bool:
        """Whether the surrogate proposed it."""
        return self.generator == _SURROGATE


def pareto_figure(trials: Sequence[Trial]) -> Figure:
    """All trials in two views of the objectives: loss × ROUGE-L and parameters × loss."""
    panels = [pair for pair in _PANELS if all(set(pair) <= trial.values.keys() for trial in trials)]
    with styled():
        figure, grid = new_figure(5.1 * max(1, len(panels)), 4.3, ncols=max(1, len(panels)), squeeze=False)
        for axes, (x_name, y_name) in zip(grid[0], panels, strict=False):
            _front_panel(axes, trials, x_name, y_name)
        handles = {
            text: handle
            for axes in grid[0]
            for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        columns = 2 * max(1, len(panels)) + 1
        figure.legend(
            handles.values(), handles.keys(), loc="outside upper left", ncols=columns, handletextpad=0.3
        )
        return figure


def _front_panel(axes: Axes, trials: Sequence[Trial], x_name: str, y_name: str) -> None:
    def place(subset: Sequence[Trial]) -> tuple[list[float], list[float]]:
        return [t.values[x_name] for t in subset], [t.values[y_name] for t in subset]

    initial = [t for t in trials if t.is_initial]
    proposed = [t for t in trials if t.is_proposed]
    random = [t for t in trials if not t.is_initial and not t.is_proposed]
    front = [t for t in trials if t.on_front]
    chosen = [t for t in trials if t.chosen]
    axes.scatter(*place(initial), s=30, facecolor="white", edgecolor=GREY, lw=1.2, label="Initial")
    axes.scatter(*place(proposed), s=34, color=BLUE, alpha=0.8, lw=0, label="Proposed by the surrogate")
    if random:
        axes.scatter(
            *place(random), s=34, marker="D", facecolor="white", edgecolor=GREY, lw=1.2,
            label="At random (no proposal)",
        )  # fmt: skip
    axes.scatter(*place(front), s=105, facecolor="none", edgecolor=VERMILLION, lw=1.6, label="Pareto front")
    believed = [t for t in front if t.model]
    if believed:
        (xs, x_errors), (ys, y_errors) = (_believed(believed, name) for name in (x_name, y_name))
        # From what was measured to what the model makes of it.
        axes.plot(
            *([m, b] for m, b in zip(place(believed), (xs, ys), strict=True)), color=GREEN, lw=0.7, ls=":"
        )
        axes.errorbar(
            xs, ys, xerr=x_errors, yerr=y_errors, fmt="s", ms=3.6, color=GREEN, elinewidth=1.1, zorder=4,
            label="Front as the model sees it (mean ± sd)",
        )  # fmt: skip
    axes.scatter(
        *place(chosen),
        s=190,
        marker="*",
        color=ORANGE,
        edgecolor=INK,
        lw=0.9,
        zorder=5,
        label="Chosen layout",
    )
    axes.set(xlabel=_LONG_LABELS[x_name], ylabel=_LONG_LABELS[y_name])
    axes.set_title(f"{_short(x_name)} and {_short(y_name, inside=True)}")
    outside: set[int] = set()  # trials, by their index
    for name, setter in ((x_name, axes.set_xlim), (y_name, axes.set_ylim)):
        means, deviations = _believed(believed, name)
        ends = [mean + side * sd for mean, sd in zip(means, deviations, strict=True) for side in (-1, 1)]
        low, high = robust_limits([t.values[name] for t in trials] + ends)
        setter(low, high)
        outside |= {t.index for t in trials if not low <= t.values[name] <= high}
    if ADAPTER_PARAMETERS.name == x_name:
        axes.xaxis.set_major_formatter(thousands)
        axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
    if outside:
        axes.text(
            0.99, 0.985, f"{len(outside)} outside the axes", transform=axes.transAxes, ha="right", va="top",
            fontsize=8, color=MUTED,
        )  # fmt: skip


def _believed(trials: Sequence[Trial], name: str) -> tuple[list[float], list[float]]:
    """Means and deviations of the model; an objective that it does not model is known: as measured."""
    pairs = [trial.model.get(name, (trial.values[name], 0.0)) for trial in trials]
    return [mean for mean, _ in pairs], [sd for _, sd in pairs]


def hypervolume_figure(
    hypervolumes: Sequence[float], n_initial: int, by_time: Sequence[tuple[float, float]] = ()
) -> Figure:
    """Hypervolume of the front over trials and, beside it, over time.

    Args:
        hypervolumes: one value a finished trial, in the order of the trials.
        n_initial: how many of them were drawn before the surrogate proposed.
        by_time: (seconds that the search had worked, hypervolume), in the order in which trials ended.
    """
    with styled():
        n_panels = 2 if by_time else 1
        figure, [panels] = new_figure(
            5.1 * n_panels if by_time else 6.4, 3.4, ncols=n_panels, squeeze=False, sharey=True
        )
        _hypervolume_by_trial(panels[0], hypervolumes, n_initial)
        if by_time:
            _hypervolume_by_time(panels[1], by_time)
        panels[0].set_ylim(0, max(hypervolumes) * 1.15 or 1)
        panels[0].yaxis.set_major_formatter(lambda value, _: _number(value))
        panels[0].set_ylabel("Hypervolume of the front")
        return figure


def _hypervolume_by_trial(axes: Axes, hypervolumes: Sequence[float], n_initial: int) -> None:
    from matplotlib.ticker import MaxNLocator

    counts = np.arange(1, len(hypervolumes) + 1)
    only_grid(axes, "y")
    if n_initial:
        axes.axvspan(0.5, n_initial + 0.5, color="#f3f4f6", lw=0, zorder=0)
    axes.step(counts, hypervolumes, where="post", color=BLUE, lw=2)
    _mark_last(axes, counts[-1], hypervolumes[-1])
    axes.set_xlim(0.5, len(hypervolumes) + 0.8)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.set(xlabel="Finished trials")
    axes.set_title("Hypervolume over trials")
    for start, end, text in ((0, n_initial, "initial"), (n_initial, len(hypervolumes), "surrogate")):
        if end > start:
            middle = (start + end + 1) / 2
            axes.text(middle, 0.03, text, transform=axes.get_xaxis_transform(), ha="center", color=MUTED,
                      fontsize=8.5)  # fmt: skip


def _hypervolume_by_time(axes: Axes, by_time: Sequence[tuple[float, float]]) -> None:
    only_grid(axes, "y")
    last = by_time[-1][0]
    unit, name = next(
        (unit, name)
        for unit, name in ((3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))
        if last >= 2 * unit or unit == 1.0
    )
    times = [0.0, *(seconds / unit for seconds, _ in by_time)]
    axes.step(times, [0.0, *(value for _, value in by_time)], where="post", color=BLUE, lw=2)
    _mark_last(axes, times[-1], by_time[-1][1])
    axes.set_xlim(0, times[-1] * 1.03 or 1)
    axes.set(xlabel=f"Time that the search worked ({name})")
    axes.set_title("Hypervolume over time")


def _mark_last(axes: Axes, x: float, value: float) -> None:
    axes.plot([x], [value], "o", color=BLUE, ms=6)
    axes.annotate(
        _number(value), (x, value), xytext=(-6, 7), ha="right", textcoords="offset points", color=BLUE,
        fontweight="bold",
    )  # fmt: skip


def layout_figure(trials: Sequence[Trial]) -> Figure:
    """What each factor of the layout does: objectives by layer on or off, by number and by rank."""
    names = [name for name in (VALIDATION_LOSS.name, ROUGE_L.name) if all(name in t.values for t in trials)]
    with styled():
        figure, grid = new_figure(
            11.2, 3.2 * max(1, len(names)), nrows=max(1, len(names)), ncols=3, squeeze=False, sharey="row",
            width_ratios=[1.9, 1.2, 1],
        )  # fmt: skip
        for row, name in zip(grid, names, strict=False):
            low, high = robust_limits([t.values[name] for t in trials])
            kept = [t for t in trials if low <= t.values[name] <= high]
            _layer_panel(row[0], kept, name)
            _factor_panel(row[1], kept, name, {t.index: t.n_loras for t in kept})
            _factor_panel(row[2], kept, name, {t.index: t.rank for t in kept if t.n_loras})
            row[0].set_ylabel(f"{_short(name)} ({KNOWN_OBJECTIVES[name].label.partition('(')[2]}")
            if len(kept) < len(trials):
                row[0].set_title(_left_out(len(trials) - len(kept)), loc="right", fontsize=8,
                                 color=MUTED, fontweight="normal")  # fmt: skip
        for axes, title in zip(grid[0], ("By layer", "By number of LoRAs", "By rank"), strict=True):
            axes.set_title(title)
        for axes, label in zip(
            grid[-1], ("Layer (0 is next to the input)", "LoRAs placed", "Rank"), strict=True
        ):
            axes.set_xlabel(label)
        handles, labels = grid[0][0].get_legend_handles_labels()
        more_handles, more_labels = grid[0][1].get_legend_handles_labels()
        figure.legend(handles + more_handles, labels + more_labels, loc="outside upper right", ncols=3)
        return figure


def _layer_panel(axes: Axes, trials: Sequence[Trial], name: str) -> None:
    only_grid(axes, "y")
    n_layers = len(trials[0].mask) if trials else 0
    for state, colour, marker, shift in ((True, BLUE, "o", 0.12), (False, GREY, "X", -0.12)):
        xs, means, errors = [], [], []
        for layer in range(n_layers):
            values = [t.values[name] for t in trials if t.mask[layer] is state]
            found = interval(values, **_MEAN_SETTINGS)  # type: ignore[arg-type]
            if found is not None:
                xs.append(layer + shift)
                means.append(found.mean)
                errors.append(_arms(found.mean, found.low, found.high))
        axes.errorbar(
            xs, means, yerr=np.transpose(errors) if errors else None, fmt=marker, color=colour, ms=6.5,
            elinewidth=1.6, mec="white", mew=0.6,
            label=f"{'With' if state else 'Without'} a LoRA on the layer (mean, 95% interval)",
        )  # fmt: skip
    axes.set_xticks(range(n_layers))
    axes.set_xlim(-0.6, n_layers - 0.4)


def _factor_panel(axes: Axes, trials: Sequence[Trial], name: str, level_of: Mapping[int, int]) -> None:
    """Trials as dots over the levels of a factor, and each level's mean as a bar."""
    only_grid(axes, "y")
    levels = sorted(set(level_of.values()))
    seen: Counter[int] = Counter()
    for trial in trials:
        if trial.index in level_of:
            place = levels.index(level_of[trial.index])
            # Spread by arrival, to the left and right in turn, so that equal values do not hide each other.
            offset = ((seen[place] + 1) // 2) * (0.07 if seen[place] % 2 else -0.07)
            seen[place] += 1
            x = place + max(-0.3, min(0.3, offset))
            axes.plot(x, trial.values[name], "o", ms=4.2, color=MUTED, alpha=0.5, mew=0)
    for place, level in enumerate(levels):
        mean = float(np.mean([t.values[name] for t in trials if level_of.get(t.index) == level]))
        axes.hlines(
            mean,
            place - 0.34,
            place + 0.34,
            color=INK,
            lw=2,
            label="_" if place else "Mean of the trials",
        )
    axes.set_xticks(range(len(levels)), [str(level) for level in levels])
    axes.set_xlim(-0.6, max(len(levels) - 0.4, 0.6))


def _number(value: float) -> str:
    """A hypervolume, whose size depends on the objectives' units: 5M, 0.1234."""
    return thousands(value) if abs(value) >= 1000 else f"{value:.4g}"


def _left_out(count: int) -> str:
    return f"{count} diverged trial{'s' if count > 1 else ''} left out"


def _arms(mean: float, low: float | None, high: float | None) -> tuple[float, float]:
    """Lengths of an error bar below and above the mean; none where there is no interval."""
    return (0.0, 0.0) if low is None or high is None else (max(0.0, mean - low), max(0.0, high - mean))


def _short(name: str, *, inside: bool = False) -> str:
    label = KNOWN_OBJECTIVES[name].label.partition(" (")[0]
    return label if not inside or label.startswith("ROUGE") else label[0].lower() + label[1:]

"""What a comparison's runs say: regret against trials and time, one figure, and the numbers of the last line.

A run's regret is 1 − hypervolume / the best possible hypervolume of the problem. Algorithms are compared by
medians over seeds; «ours» and «peers» are as :data:`comparison.algorithms.ENTRIES` says.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import numpy as np
from comparison.algorithms import ENTRIES
from numpy.typing import NDArray

from milp_ray.report.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    new_figure,
    save,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Floats = NDArray[np.float64]
# One run of the cache, as search.py writes it; by problem and algorithm, a list over seeds.
Runs = Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]

SHARE = 0.95
# Whose numbers are the headline: the search as experiments/demo.yaml configures it, and the same with trials
# stopped early where time is what counts.
HEADLINE, HEADLINE_IN_TIME = "ours_map", "ours_map_stopping"
_COLOURS = {
    "random": GREY,
    "optuna_nsga2": SKY,
    "optuna_motpe": GREEN,
    "optuna_gp": PURPLE,
    "ax_default": ORANGE,
    "ax_saasbo": VERMILLION,
    "ours_map": BLUE,
    "ours_nuts": INK,
    "ours_map_stopping": BLUE,
    "ours_nuts_stopping": INK,
    "ours_map_subset": SKY,
}
_MARKERS = dict(zip(ENTRIES, "ov^sDPXo*p<", strict=True))
# Below this a regret is drawn as this much: a logarithmic axis has no zero.
_LEAST_REGRET = 1e-4


def by_problem(records: Sequence[Mapping[str, Any]]) -> Runs:
    """Records grouped by problem and algorithm, in the order of the seeds."""
    found: dict[str, dict[str, list[Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for record in sorted(records, key=lambda record: int(record["seed"])):
        found[record["problem"]][record["algorithm"]].append(record)
    return found


def share_after(run: Mapping[str, Any], n_trials: int) -> float:
    """Share of the best hypervolume after the first ``n_trials`` trials that ended."""
    return float(run["share"][min(n_trials, len(run["share"])) - 1])


def share_at(run: Mapping[str, Any], seconds: float) -> float:
    """Share of the best hypervolume at a moment of the simulated search; after its end what it had then."""
    n_ended = int(np.searchsorted(run["ended"], seconds, side="right"))
    return share_after(run, n_ended) if n_ended else 0.0


def time_to(run: Mapping[str, Any], share: float) -> float:
    """Simulated seconds until that share of the best hypervolume was reached; infinite where it never was."""
    reached = [end for end, value in zip(run["ended"], run["share"], strict=True) if value >= share]
    return float(reached[0]) if reached else math.inf


def figures_of(runs: Runs, n_trials: int) -> dict[str, Any]:
    """The numbers of one comparison, ready for JSON; ``None`` where the runs for it are missing.

    hypervolume_ratio_vs_X: median share of the headline against that of the best algorithm of X after equally
    many trials (``n_trials``, or as many as X was run for), mean over problems.
    time_to_95pct_hypervolume_ratio_vs_best_peer: the best peer's median simulated time to 95 % of the best
    hypervolume over ours, geometric mean over problems (above 1: ours is sooner); a peer whose median run
    never got there counts with the end of that run, which favours it, and the problem is listed under
    peers_never_reached; not one that was given fewer trials than others. A problem on which ours never got
    there has no such number.
    by_problem: of every algorithm; ``share_median_after`` has its median share after as many trials as any
    algorithm of the problem was run for, as far as its own go.
    early_stopping: by problem, median simulated seconds until the median final share without early stopping
    is reached up to 5 %, with it, without it, and those that the whole search without it takes.
    """
    problems = {name: _of_problem(algorithms, n_trials) for name, algorithms in runs.items()}
    ratios = {
        f"hypervolume_ratio_vs_{whom}": _mean(p[f"ratio_vs_{whom}"] for p in problems.values())
        for whom in ("ax", "optuna_best", "random")
    }
    in_time = [p["time_ratio_vs_best_peer"] for p in problems.values()]
    logs = _mean(None if ratio is None else math.log(ratio) for ratio in in_time)
    return {
        **ratios,
        "time_to_95pct_hypervolume_ratio_vs_best_peer": None if logs is None else math.exp(logs),
        "peers_never_reached": [name for name, p in problems.items() if p["peers_never_reached"]],
        "early_stopping": {name: p["early_stopping"] for name, p in problems.items()},
        "n_trials": n_trials,
        "by_problem": {name: p["algorithms"] for name, p in problems.items()},
    }


def _of_problem(algorithms: Mapping[str, Sequence[Mapping[str, Any]]], n_trials: int) -> dict[str, Any]:
    counts = sorted({min(n_trials, *(len(run["share"]) for run in runs)) for runs in algorithms.values()})
    rows = {name: _of_algorithm(runs, n_trials, counts) for name, runs in algorithms.items()}
    found: dict[str, Any] = {"algorithms": rows}
    for whom, head in (("ax", "ax_"), ("optuna_best", "optuna_"), ("random", "random")):
        ratios = [
            _share_ratio(algorithms[HEADLINE], algorithms[name], n_trials)
            for name in rows
            if name.startswith(head) and HEADLINE in rows
        ]
        found[f"ratio_vs_{whom}"] = min(ratios, default=None)
    times = {name: median(time_to(run, SHARE) for run in runs) for name, runs in algorithms.items()}
    peers = {
        name: min(time, median(run["ended"][-1] for run in algorithms[name]))
        for name, time in times.items()
        if not ENTRIES[name].is_ours
    }
    reached = [name for name in peers if math.isfinite(times[name])]
    # A peer that got there counts before one that did not, and no search that was merely given fewer trials.
    whole = [name for name in peers if rows[name]["n_trials"] == max(counts)]
    best = min((peers[name] for name in reached or whole), default=None)
    own = times.get(HEADLINE_IN_TIME, times.get(HEADLINE, math.inf))
    found["time_ratio_vs_best_peer"] = best / own if best is not None and math.isfinite(own) else None
    found["peers_never_reached"] = bool(peers) and not reached
    found["early_stopping"] = _early_stopping(algorithms)
    return found


def _share_ratio(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]], n: int) -> float:
    """Median share of ours against theirs, after n trials or as many as they were run for."""
    n = min(n, *(len(run["share"]) for run in theirs))
    return median(share_after(run, n) for run in ours) / median(share_after(run, n) for run in theirs)


def _early_stopping(algorithms: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, float | None] | None:
    if HEADLINE not in algorithms or HEADLINE_IN_TIME not in algorithms:
        return None
    without, with_stopping = algorithms[HEADLINE], algorithms[HEADLINE_IN_TIME]
    target = SHARE * median(run["share"][-1] for run in without)
    seconds = [median(time_to(run, target) for run in runs) for runs in (with_stopping, without)]
    whole = median(run["ended"][-1] for run in without)
    found = {
        "seconds_with": seconds[0],
        "seconds_without": seconds[1],
        "seconds_of_the_whole_search_without": whole,
        "ratio": seconds[0] / seconds[1],
        "ratio_to_the_whole": seconds[0] / whole,
    }
    return {name: value if math.isfinite(value) else None for name, value in found.items()}


def _of_algorithm(runs: Sequence[Mapping[str, Any]], n_trials: int, counts: Sequence[int]) -> dict[str, Any]:
    n_run = min(n_trials, *(len(run["share"]) for run in runs))
    shares = [share_after(run, n_trials) for run in runs]
    low, high = np.quantile(shares, [0.25, 0.75])
    reached = median(time_to(run, SHARE) for run in runs)
    return {
        "n_seeds": len(runs),
        "n_trials": n_run,
        "share_median": median(shares),
        "share_median_after": {
            str(n): median(share_after(run, n) for run in runs) for n in counts if n <= n_run
        },
        "share_quartiles": [float(low), float(high)],
        "seconds_to_95pct_median": reached if math.isfinite(reached) else None,
        "suggestion_seconds_a_trial": median(run["suggestion_seconds"] / len(run["ended"]) for run in runs),
        "n_stopped_median": median(run["n_stopped"] for run in runs),
        "n_repeats_median": median(run["n_repeats"] for run in runs),
    }


def _mean(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def table_of(numbers: Mapping[str, Any]) -> str:
    """The numbers by problem and algorithm, to be read.

    Where algorithms were run for fewer trials than others, a column has every median after so many.
    """
    lines: list[str] = []
    for problem, rows in numbers["by_problem"].items():
        counts = sorted({row["n_trials"] for row in rows.values()})[:-1]
        lines += ["", f"{problem}: share of the best hypervolume after {numbers['n_trials']} trials"]
        columns = "".join(f"{f'after {n}':>10s}" for n in counts)
        lines.append(f"  {'':20s} seeds trials  median  quartiles      s to 95 %  s a suggestion{columns}")
        for name, row in sorted(rows.items(), key=lambda item: -item[1]["share_median"]):
            low, high = row["share_quartiles"]
            seconds = row["seconds_to_95pct_median"]
            shares = [row["share_median_after"].get(str(n)) for n in counts]
            lines.append(
                f"  {name:20s} {row['n_seeds']:5d}  {row['n_trials']:5d}  {row['share_median']:.4f}  "
                f"{low:.4f}–{high:.4f}  "
                f"{'never' if seconds is None else format(seconds, '.0f'):>9s}  "
                f"{row['suggestion_seconds_a_trial']:14.2f}"
                + "".join(f"{'' if share is None else format(share, '.4f'):>10s}" for share in shares)
            )
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------- figure


def draw(runs: Runs, n_trials: int, path: Path) -> Path:
    """Regret against trials (left) and simulated time (right), a row a problem; median and quartiles."""
    with styled():
        figure, axes = new_figure(10.0, 3.2 * len(runs) + 0.8, nrows=len(runs), ncols=2, squeeze=False)
        for row, (problem, algorithms) in zip(axes, runs.items(), strict=True):
            each = [run["ended"] for name in algorithms for run in algorithms[name]]
            seconds = np.geomspace(min(ended[0] for ended in each), max(ended[-1] for ended in each), 120)
            for name in [name for name in ENTRIES if name in algorithms]:
                own = algorithms[name]
                if not ENTRIES[name].stops_early:  # a trial that is stopped is no whole trial
                    counts = np.arange(1, min(n_trials, *(len(run["share"]) for run in own)) + 1)
                    shares = [[share_after(run, int(n)) for n in counts] for run in own]
                    _curve(row[0], name, counts, np.array(shares))
                while_run = seconds[seconds <= max(run["ended"][-1] for run in own)]
                shares = [[share_at(run, float(s)) for s in while_run] for run in own]
                _curve(row[1], name, while_run, np.array(shares))
            row[0].set(title=problem, xlabel="Trials", ylabel="Hypervolume regret (share)", yscale="log")
            row[1].set(title=" ", xlabel="Simulated seconds", xscale="log", yscale="log")
        handles = {line.get_label(): line for row in axes for ax in row for line in ax.get_lines()}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5)
        return save(figure, path)


def _curve(axes: Axes, name: str, x: Any, shares: Floats) -> None:
    regret = np.maximum(1.0 - shares, _LEAST_REGRET)
    low, middle, high = np.quantile(regret, [0.25, 0.5, 0.75], axis=0)
    colour, is_ours = _COLOURS[name], ENTRIES[name].is_ours
    axes.plot(
        x,
        middle,
        label=name,
        color=colour,
        linestyle="--" if ENTRIES[name].stops_early else "-",
        linewidth=2.0 if is_ours else 1.3,
        marker=_MARKERS[name],
        markersize=4,
        markevery=max(1, len(x) // 8),
    )
    axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)

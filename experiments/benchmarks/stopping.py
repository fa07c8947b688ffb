"""What early stopping saves in the paper's search: the same one with it and without, in simulated time.

    .venv/bin/python experiments/benchmarks/stopping.py --quick   # under a minute
    .venv/bin/python experiments/benchmarks/stopping.py           # a quarter of an hour

On lora_table, with four workers: 100 initial points, as in the paper, then the surrogate's proposals.
(search.py has the same comparison with few initial points.) Both sides of a seed are run one after the other;
seconds are those of the trials as they were measured, plus those of the suggestions.

Prints the seconds to 95 % of the hypervolume that the search without early stopping ends with, medians over
seeds, and one JSON object as its last line.
"""

from __future__ import annotations

import argparse
import json
import math
from statistics import median
from typing import Any

from comparison.algorithms import Ours, early_stopping
from comparison.measured import LoraTable
from comparison.simulation import Run, simulate
from comparison.summary import SHARE, time_to

from milp_ray.config.search import EarlyStoppingSection


def search(problem: LoraTable, seed: int, n_initial: int, n_trials: int, eta: int | None) -> Run:
    """One search that lets one in ``eta`` trials go on from the rung, or all."""
    return simulate(
        problem,
        Ours(problem, seed, "map", n_initial=n_initial),
        n_trials=n_trials,
        early_stopping=None if eta is None else early_stopping(eta),
    )


def seconds_to(run: Run, volume: float) -> float:
    """Simulated seconds until the hypervolume was reached; infinite where it never was."""
    return time_to({"ended": [trial.ended for trial in run.trials], "share": run.hypervolumes}, volume)


def compare(n_initial: int, n_trials: int, n_seeds: int, eta: int, time_scale: float) -> dict[str, Any]:
    """Both sides of every seed."""
    problem = LoraTable(time_scale=time_scale)
    rows = []
    for seed in range(n_seeds):
        without = search(problem, seed, n_initial, n_trials, None)
        stopping = search(problem, seed, n_initial, n_trials, eta)
        target = SHARE * without.hypervolumes[-1]
        rows.append(
            {
                "with": seconds_to(stopping, target),
                "without": seconds_to(without, target),
                "whole": without.trials[-1].ended,
                "stopped": sum(trial.was_stopped for trial in stopping.trials) / n_trials,
                "volume_ratio": stopping.hypervolumes[-1] / without.hypervolumes[-1],
                "whole_with": stopping.trials[-1].ended,
            }
        )
        print(
            f"{n_initial:3d} initial, seed {seed}: {rows[-1]['with']:6.0f} s with early stopping, "
            f"{rows[-1]['without']:6.0f} s without ({rows[-1]['whole']:.0f} s in all); "
            f"{rows[-1]['stopped']:.0%} stopped, final hypervolume × {rows[-1]['volume_ratio']:.3f}",
            flush=True,
        )
    ratios = [row["with"] / row["without"] for row in rows]
    to_whole = [row["with"] / row["whole"] for row in rows]
    return {
        "n_initial": n_initial,
        "n_trials": n_trials,
        "n_seeds": n_seeds,
        "eta": eta,
        "ratio_of_seconds_to_95pct": _finite(median(ratios)),
        "ratio_to_the_whole_search_without": _finite(median(to_whole)),
        "ratio_of_whole_searches": median(row["whole_with"] / row["whole"] for row in rows),
        "volume_ratio": median(row["volume_ratio"] for row in rows),
        "share_stopped": median(row["stopped"] for row in rows),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two seeds of a short search")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--eta", type=int, default=EarlyStoppingSection().eta)
    parser.add_argument(
        "--time-scale", type=float, default=60.0, help="what the embedded base's seconds are multiplied with"
    )
    arguments = parser.parse_args()
    n_initial, n_trials, n_seeds = (24, 40, 2) if arguments.quick else (100, 140, arguments.seeds)
    print(json.dumps(compare(n_initial, n_trials, n_seeds, arguments.eta, arguments.time_scale)))


if __name__ == "__main__":
    main()

"""The problems that searches are compared on, and what they are like.

    .venv/bin/python experiments/benchmarks/problems.py    # seconds

Prints of each its size, its front, how far random layouts get and how long a trial takes; of the measured
layouts also how well the loss after each epoch foretells the last one, and how much of the hypervolume two
layouts hold. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np
from comparison.measured import LoraTable
from comparison.problem import best_hypervolume
from comparison.synthetic import few_layers, two_depths
from scipy.stats import spearmanr

from milp_ray.search.front import hypervolume


def rung_correlations(table: LoraTable) -> dict[int, float]:
    """Spearman's rho of the validation loss after each epoch but the last with the final one."""
    losses = np.array([table.evaluate(layout).values[:, 0] for layout in table.layouts])
    return {
        epoch + 1: round(float(spearmanr(losses[:, epoch], losses[:, -1]).statistic), 3)
        for epoch in range(losses.shape[1] - 1)
    }


def hypervolume_lost_without(table: LoraTable) -> dict[str, float]:
    """The share of the best hypervolume that is lost without the two layouts that count most by themselves.

    The first two values are of each alone, the last one of both together.
    """
    best = best_hypervolume(table)
    values = {layout.key: table.truth(layout) for layout in table.layouts}

    def lost(*without: str) -> float:
        left = [value for key, value in values.items() if key not in without]
        return round(1.0 - hypervolume(left, table.signs, table.reference) / best, 4)

    on_front = [key for key, value in values.items() if (table.front == value).all(axis=1).any()]
    alone = {key: lost(key) for key in on_front}
    first, second = sorted(alone, key=lambda key: -alone[key])[:2]
    return {first: alone[first], second: alone[second], "both": lost(first, second)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    cards: dict[str, Any] = {}
    for problem in (LoraTable(), few_layers(), two_depths()):
        rng = np.random.default_rng(0)
        drawn = [problem.space.layout(problem.space.sample(rng)).canonical() for _ in range(200)]
        curves = [problem.evaluate(layout) for layout in drawn]
        of_random = hypervolume([problem.truth(layout) for layout in drawn], problem.signs, problem.reference)
        cards[problem.name] = {
            "n_parameters": len(problem.space.parameters()),
            "n_layouts": problem.space.n_canonical,
            "n_measured": len(problem.layouts) if isinstance(problem, LoraTable) else None,
            "objectives": list(problem.objectives),
            "n_front": len(problem.front),
            "hypervolume_share_of_200_random": of_random / best_hypervolume(problem),
            "median_trial_seconds": float(np.median([curve.seconds for curve in curves])),
        }
        if isinstance(problem, LoraTable):
            cards[problem.name]["spearman_of_loss_with_final"] = rung_correlations(problem)
            cards[problem.name]["hypervolume_lost_without"] = hypervolume_lost_without(problem)
        print(f"{problem.name}: " + ", ".join(f"{k} {v}" for k, v in cards[problem.name].items()))
    print(json.dumps(cards))


if __name__ == "__main__":
    main()

"""A search that starts from an earlier one: of related users, and of tasks that have nothing to say.

    .venv/bin/python experiments/benchmarks/warm_start.py --quick   # under a minute
    .venv/bin/python experiments/benchmarks/warm_start.py           # a quarter of an hour

Two families of tasks. On the measured layouts of *lora_table* one of the three users is searched for after an
earlier search over the other two (one user's ROUGE-L is mostly noise). On *two_depths* all effects of the
earlier task are up to 30 % larger or smaller, and its level is another one. What the earlier search hands on
is

- *related*: as it was measured;
- *mirrored*: the first layer's part played by the last one, and so on: of the same kind, and wrong;
- *shuffled*: every layout with the values of another one, but for its size.

Prints the share of the best hypervolume after so many trials, mean over seeds, beside that of a
search from nothing with the same seeds, and one JSON object as its last line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from comparison.algorithms import N_INITIAL, Ours
from comparison.measured import LoraTable
from comparison.problem import Problem, best_hypervolume
from comparison.simulation import simulate
from comparison.synthetic import Effect, two_depths

from milp_ray.memory.layout import CanonicalLayout
from milp_ray.objectives import ADAPTER_PARAMETERS
from milp_ray.search.candidates import initial_points
from milp_ray.search.observations import Observation
from milp_ray.search.warm_start import EarlierStudy, spread_front

N_USERS = 3
N_EARLIER = 48  # trials of the earlier search
KINDS = ("from nothing", "related", "mirrored", "shuffled")
FAMILIES = ("lora_table", "two_depths")


def tasks(family: str, seed: int) -> tuple[Problem, Problem]:
    """A task and one related to it."""
    if family == "lora_table":
        user = seed % N_USERS
        others = [other for other in range(N_USERS) if other != user]
        return LoraTable(users=[user]), LoraTable(users=others)
    target, rng = two_depths(), np.random.default_rng(seed)

    def changed(effect: Effect) -> Effect:
        return replace(
            effect,
            weights={layer: w * rng.uniform(0.7, 1.3) for layer, w in effect.weights.items()},
            pairs={pair: w * rng.uniform(0.7, 1.3) for pair, w in effect.pairs.items()},
            start=effect.start + rng.uniform(0.2, 1.0),
        )

    effects = {name: changed(effect) for name, effect in target.effects.items()}
    return target, replace(target, effects=effects)


def earlier_study(kind: str, related: Problem, seed: int) -> list[EarlierStudy]:
    """A finished search of the related task, at random layouts; none for "from nothing"."""
    if kind == "from nothing":
        return []
    space, names = related.space, related.objectives
    raws = initial_points(space, N_EARLIER, 1000 + seed)
    layouts = {layout.key: layout for layout in (space.layout(raw).canonical() for raw in raws)}
    values = [related.evaluate(layout).values[-1] for layout in layouts.values()]
    if kind == "shuffled":
        is_size = np.array([name == ADAPTER_PARAMETERS.name for name in names])
        order = np.random.default_rng(seed).permutation(len(values))
        values = [np.where(is_size, own, values[other]) for own, other in zip(values, order, strict=True)]
    measured = [_mirrored(x) if kind == "mirrored" else x for x in layouts.values()]
    observations = tuple(
        Observation(i, space.raw(layout), layout, dict(zip(names, row.tolist(), strict=True)))
        for i, (layout, row) in enumerate(zip(measured, values, strict=True))
    )
    return [EarlierStudy(kind, observations, spread_front(observations, names))]


def _mirrored(layout: CanonicalLayout) -> CanonicalLayout:
    return CanonicalLayout(layout.mask[::-1], layout.rank)


def shares(kind: str, family: str, seed: int, after: Sequence[int]) -> list[float]:
    """Share of the best hypervolume after so many trials of one search."""
    problem, related = tasks(family, seed)
    ours = Ours(problem, seed, "map", earlier_study(kind, related, seed))
    run = simulate(problem, ours, n_trials=max(after))
    best = best_hypervolume(problem)
    return [run.hypervolumes[n - 1] / best for n in after]


def compare(family: str, n_seeds: int, after: Sequence[int]) -> dict[str, Any]:
    """All kinds of earlier searches, seed by seed; prints them."""
    found: dict[str, list[list[float]]] = {kind: [] for kind in KINDS}
    for seed in range(n_seeds):
        for kind in KINDS:
            found[kind].append(shares(kind, family, seed, after))
    print(f"{family}: share of the best hypervolume after so many trials; {n_seeds} searches a line")
    print(f"  {'':14s}" + "".join(f"{n:>18d}" for n in after))
    means, gains = {}, {}
    for kind, rows in found.items():
        difference = np.array(rows) - np.array(found[KINDS[0]])
        means[kind] = dict(zip(map(str, after), np.mean(rows, axis=0).tolist(), strict=True))
        gains[kind] = dict(zip(map(str, after), difference.mean(axis=0).tolist(), strict=True))
        errors = difference.std(axis=0, ddof=1) / n_seeds**0.5
        cells = zip(means[kind].values(), gains[kind].values(), errors, strict=True)
        print(f"  {kind:14s}" + "".join(f"  {mean:.3f} {d:+.3f}±{e:.3f}" for mean, d, e in cells), flush=True)
    return {"n_searches": n_seeds, "share": means, "gain": gains}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two seeds, few trials")
    parser.add_argument("--seeds", type=int, default=12)
    arguments = parser.parse_args()
    n_seeds = 2 if arguments.quick else arguments.seeds
    after = (N_INITIAL, 10) if arguments.quick else (N_INITIAL, 16, 24, 32)
    print(json.dumps({family: compare(family, n_seeds, after) for family in FAMILIES}))


if __name__ == "__main__":
    main()

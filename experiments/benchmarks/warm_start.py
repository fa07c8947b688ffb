"""A search that starts from an earlier one: of related users, and of tasks that have nothing to say.

    .venv/bin/python experiments/benchmarks/warm_start.py --quick   # under a minute
    .venv/bin/python experiments/benchmarks/warm_start.py           # a quarter of an hour

On the measured layouts of lora_table, whose three users make three tasks: a layout is searched for one user
after an earlier search over the other two. What the earlier search hands on is

- *related*: as it was measured;
- *mirrored*: the first layer's part played by the last one, and so on: of the same kind, and wrong;
- *shuffled*: every layout with the loss and ROUGE-L of another one.

Prints the share of the best hypervolume after so many trials, mean over users and seeds, beside that of a
search from nothing with the same seeds, and one JSON object as its last line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

import numpy as np
from comparison.algorithms import N_INITIAL, Ours
from comparison.simulation import simulate
from problems import LoraTable, best_hypervolume

from milp_ray.memory.layout import CanonicalLayout
from milp_ray.search.candidates import initial_points
from milp_ray.search.observations import Observation
from milp_ray.search.warm_start import EarlierStudy, spread_front

N_USERS = 3
N_EARLIER = 48  # trials of the earlier search
KINDS = ("from nothing", "related", "mirrored", "shuffled")


def earlier_study(kind: str, user: int, seed: int) -> list[EarlierStudy]:
    """The finished search over the users beside ``user``, at random layouts; none for "from nothing"."""
    if kind == "from nothing":
        return []
    table = LoraTable(users=[other for other in range(N_USERS) if other != user])
    raws = initial_points(table.space, N_EARLIER, 1000 + seed)
    layouts = {layout.key: layout for layout in (table.space.layout(raw).canonical() for raw in raws)}
    values = [table.truth(layout) for layout in layouts.values()]
    if kind == "shuffled":
        size = table.objectives.index("adapter_parameters")
        order = np.random.default_rng(seed).permutation(len(values))
        values = [
            np.where(np.arange(len(own)) == size, own, values[other])
            for own, other in zip(values, order, strict=True)
        ]
    measured = [_mirrored(x) if kind == "mirrored" else x for x in layouts.values()]
    observations = tuple(
        Observation(
            i, table.space.raw(layout), layout, dict(zip(table.objectives, row.tolist(), strict=True))
        )
        for i, (layout, row) in enumerate(zip(measured, values, strict=True))
    )
    return [EarlierStudy(kind, observations, spread_front(observations, table.objectives))]


def _mirrored(layout: CanonicalLayout) -> CanonicalLayout:
    return CanonicalLayout(layout.mask[::-1], layout.rank)


def shares(kind: str, user: int, seed: int, after: Sequence[int]) -> list[float]:
    """Share of the best hypervolume after so many trials of one search."""
    problem = LoraTable(users=[user])
    ours = Ours(problem, seed, "map", earlier_study(kind, user, seed))
    run = simulate(problem, ours, n_trials=max(after))
    best = best_hypervolume(problem)
    return [run.hypervolumes[n - 1] / best for n in after]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one user, two seeds, few trials")
    parser.add_argument("--seeds", type=int, default=6)
    arguments = parser.parse_args()
    users, seeds = (1, 2) if arguments.quick else (N_USERS, arguments.seeds)
    after = (N_INITIAL, 12) if arguments.quick else (N_INITIAL, 16, 24, 32)
    found: dict[str, list[list[float]]] = {kind: [] for kind in KINDS}
    for seed in range(seeds):
        for user in range(users):
            for kind in KINDS:  # all kinds take turns
                found[kind].append(shares(kind, user, seed, after))
    print(f"share of the best hypervolume after so many trials; {users * seeds} searches a line")
    print(f"  {'':14s}" + "".join(f"{n:>8d}" for n in after))
    means = {kind: np.mean(rows, axis=0) for kind, rows in found.items()}
    for kind, row in means.items():
        print(f"  {kind:14s}" + "".join(f"{share:8.4f}" for share in row))
    gains = {}
    for kind in KINDS[1:]:
        difference = np.array(found[kind]) - np.array(found[KINDS[0]])
        error = difference.std(axis=0, ddof=1) / len(difference) ** 0.5
        print(f"  {kind} − from nothing: ", end="")
        print(", ".join(f"{d:+.4f} ± {e:.4f}" for d, e in zip(difference.mean(axis=0), error, strict=True)))
        gains[kind] = dict(zip(map(str, after), difference.mean(axis=0).tolist(), strict=True))
    numbers = {kind: dict(zip(map(str, after), row.tolist(), strict=True)) for kind, row in means.items()}
    print(json.dumps({"n_searches": users * seeds, "share": numbers, "gain": gains}))


if __name__ == "__main__":
    main()

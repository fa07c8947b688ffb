"""Which factors of a layout are worth searching (the paper's Table 4): number, size, layers, pairs, all.

    .venv/bin/python experiments/table4_search_space.py                        # demo scale: half an hour
    .venv/bin/python experiments/table4_search_space.py --seeds 1 --trials 4   # to see it work
    .venv/bin/python experiments/table4_search_space.py --scale paper users.paths='[data/users.jsonl]'

For every set of factors and every seed `milp-ray run` searches with the same number of trials, the other
factors held (all layers, as many LoRAs as layers, the smallest rank), takes the layout with the lowest
validation loss, and scores MiLP on the users' held-out queries. A finished run is not repeated. Differences
to the whole space are paired inside users, after the mean over seeds where those have the same users (the
embedded ones differ from seed to seed); 95 % intervals by bootstrap.

Writes experiments/results/table4/{table.md,values.csv}, with options runs/results/table4; the last line is
one JSON object.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
import yaml
from commands import run
from result_files import DRAWS, cell, invocation, markdown, results_of, write_csv, write_text

from milp_ray.evaluation.bootstrap import difference_interval, interval
from milp_ray.evaluation.scores import read_scores
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.rundir import RunFolder

FACTORS = (
    ("number",),
    ("rank",),
    ("layers",),
    ("number", "rank"),
    ("layers", "number"),
    ("layers", "rank"),
    ("layers", "number", "rank"),
)
LABELS = {"number": "number", "rank": "size", "layers": "layers"}
MEASURES = ("rouge_l", "fact_accuracy", "loss")
SCALES = {
    "demo": (
        "demo.yaml",
        [
            "users.persona_world.n_short_users=6",
            "users.persona_world.n_long_users=6",
            "search.n_initial=6",
            "evaluation.methods=[milp]",
            "choice.rule=best_loss",
        ],
    ),
    "paper": ("paper_llama2_7b.yaml", ["evaluation.methods=[milp]", "choice.rule=best_loss"]),
}
ByUser = dict[str, dict[str, float]]  # user → measure → value


def run_of(factors: tuple[str, ...], seed: int, arguments: argparse.Namespace, extra: list[str]) -> RunFolder:
    """Run one search and everything after it, or find it finished; its folder."""
    config, settings = SCALES[arguments.scale]
    name = f"table4_{arguments.scale}_{'-'.join(factors)}_{seed}"
    overrides = [*settings, f"seed={seed}", f"space.factors=[{','.join(factors)}]", *extra]
    if arguments.trials is not None:
        n_initial = min(6, arguments.trials)
        overrides += [f"search.n_trials={arguments.trials}", f"search.n_initial={n_initial}"]
    return run(config, name, overrides)


def by_user(run: RunFolder) -> ByUser:
    """User → measure → mean over their held-out queries."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in read_scores(run.scores_file).to_pylist():
        for name in MEASURES:
            if row["method"] == "milp" and row[name] is not None:
                found[row["user_id"]][name].append(row[name])
    return {user: {name: fmean(values) for name, values in own.items()} for user, own in found.items()}


def over_seeds(scores: Sequence[ByUser]) -> ByUser:
    """The mean of each user's values over the seeds that have the user."""
    found: ByUser = {}
    for user in sorted({user for of_seed in scores for user in of_seed}):
        own = [of_seed[user] for of_seed in scores if user in of_seed]
        names = {name for values in own for name in values}
        found[user] = {name: fmean(values[name] for values in own if name in values) for name in names}
    return found


def layout_of(run: RunFolder) -> CanonicalLayout:
    """What the run chose."""
    chosen = yaml.safe_load(run.chosen_file.read_text(encoding="utf-8"))
    return CanonicalLayout.from_dict(chosen["layout"])


def main() -> None:
    """Run what is missing, compare, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--scale", choices=tuple(SCALES), default="demo")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=None, help="of every search; demo 12, paper 200")
    parser.add_argument("--results", type=Path, default=results_of("table4"), help="to write into")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings for every run")
    arguments = parser.parse_args()
    if arguments.scale == "demo" and arguments.trials is None:
        arguments.trials = 12
    per_set: dict[tuple[str, ...], ByUser] = {}
    layouts: dict[tuple[str, ...], list[CanonicalLayout]] = {}
    for factors in FACTORS:
        runs = [run_of(factors, seed, arguments, arguments.overrides) for seed in range(arguments.seeds)]
        per_set[factors] = over_seeds([by_user(run) for run in runs])
        layouts[factors] = [layout_of(run) for run in runs]
        keys = ", ".join(one.key for one in layouts[factors])
        print(f"{' + '.join(LABELS[factor] for factor in factors)}: {keys}", flush=True)
    write(per_set, layouts, arguments)


def write(
    per_set: dict[tuple[str, ...], ByUser],
    layouts: dict[tuple[str, ...], list[CanonicalLayout]],
    arguments: argparse.Namespace,
) -> None:
    """The tables and the JSON object."""
    whole = FACTORS[-1]
    scales = {"rouge_l": (1.0, 1), "fact_accuracy": (100.0, 0), "loss": (1.0, 3)}
    header = ["Searched", "ROUGE-L", "Fact accuracy (%)", "Loss (nats)"]
    header += ["− all: ROUGE-L", "− all: facts", "− all: loss", "LoRAs × rank (mean)"]
    rows, values, last = [], [], {}
    users = sorted(per_set[whole])
    for factors in FACTORS:
        means, differences = {}, {}
        for name in MEASURES:
            own, of_whole = (
                np.array([per_set[one].get(user, {}).get(name, np.nan) for user in users])
                for one in (factors, whole)
            )
            means[name] = interval(own, **DRAWS)
            differences[name] = difference_interval(own, of_whole, **DRAWS) if factors != whole else None
            values.append([" ".join(factors), name, means[name].to_dict()["mean"] if means[name] else ""])
        label = " + ".join(LABELS[factor] for factor in factors)
        size = fmean(len(one.layers) * one.rank for one in layouts[factors])
        rows.append([
            label,
            *(cell(means[name], *scales[name]) for name in MEASURES),
            *(cell(differences[name], *scales[name], signed=True) for name in MEASURES),
            f"{size:.0f}",
        ])  # fmt: skip
        last[label] = {name: found.to_dict()["mean"] for name, found in means.items() if found}
    trials = f"{arguments.seeds} seeds, {arguments.trials} trials a search"
    text = f"{invocation()}: {trials}.\n\n{markdown(header, rows)}"
    write_text(arguments.results / "table.md", text)
    write_csv(arguments.results / "values.csv", ["factors", "measure", "mean"], values)
    print(text)
    print(json.dumps(last))


if __name__ == "__main__":
    main()

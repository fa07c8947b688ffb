"""What updates cost of old facts, and adapters of general ability.

    .venv/bin/python experiments/forgetting.py                     # make forgetting; a quarter of an hour
    .venv/bin/python experiments/forgetting.py --users 4 --seeds 1
    .venv/bin/python experiments/forgetting.py --scale paper --texts FILE users.paths='[data/users.jsonl]'

`benchmarks/updating.py` for users of several seeds: an adapter continued with what is new, alone and with
replay, against the old version and against training on everything again. And `milp-ray ability` of runs with
the same seeds (those of table3_winrate.py): the perplexity on documents about nobody, against the base's.

Writes experiments/results/forgetting/{table.md,values.csv,figure.png}, with options runs/results/forgetting;
the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from commands import HERE, SCALES, SEEDS, milp_ray, output_of, run_of_seed
from result_files import DRAWS, cell, invocation, markdown, results_of, write_csv, write_text

from milp_ray.evaluation.bootstrap import difference_interval, interval
from milp_ray.report.style import BLUE, GREEN, VERMILLION, new_figure, only_grid, save, styled

STATES = {"old": VERMILLION, "changed": BLUE, "new": GREEN}
AGAINST = "everything again"
SCRIPT = HERE / "benchmarks" / "updating.py"
KEPT = Path("runs/forgetting")

ByWay = dict[str, dict[str, list[float]]]  # way → state of facts → a user's share of right answers


def updated(seed: int, n_users: int) -> list[dict[str, Any]]:
    """The rows of one seed's users, one a way; measured now or before."""
    data = b"".join(path.read_bytes() for path in (SCRIPT, HERE / SCALES["demo"]))
    kept = KEPT / f"updates-{seed}-{n_users}-{hashlib.sha256(data).hexdigest()[:12]}.json"
    if not kept.is_file():
        answer = output_of([sys.executable, str(SCRIPT), "--users", str(n_users), "--seed", str(seed)])
        write_text(kept, answer.splitlines()[-1])
    rows: list[dict[str, Any]] = json.loads(kept.read_text(encoding="utf-8"))["ways"]
    return rows


def by_way(seeds: Sequence[Sequence[Mapping[str, Any]]]) -> ByWay:
    """All seeds' users, one after another."""
    found: ByWay = {}
    for rows in seeds:
        for row in rows:
            own = found.setdefault(row["way"], {state: [] for state in STATES})
            for state in STATES:
                own[state] += row["by_user"][state]
    return found


def table(found: ByWay, kept: Mapping[str, float | None]) -> str:
    """Right answers, and paired differences to training on everything again."""
    header = ["", *(f"{state} facts (%)" for state in STATES)]
    header += [*(f"{state}: − {AGAINST}" for state in STATES), "guard keeps old (%)"]
    rows = []
    for way, own in found.items():
        differences = [
            "" if way == AGAINST
            else cell(difference_interval(own[s], found[AGAINST][s], **DRAWS), 100.0, 0, signed=True)
            for s in STATES
        ]  # fmt: skip
        share = kept[way]
        means = [cell(interval(own[state], **DRAWS), 100.0, 0) for state in STATES]
        rows.append([way, *means, *differences, "" if share is None else f"{100 * share:.0f}"])
    return markdown(header, rows)


def ability_table(seeds: Sequence[Mapping[str, Any]]) -> str:
    """A row a seed's run."""
    return markdown(
        [
            "General ability",
            "users",
            "perplexity of the base",
            "with a user's adapter",
            "change (%)",
            "worst user (%)",
        ],
        [
            [
                f"seed {seed}",
                str(one["n_users"]),
                f"{one['base_perplexity']:.2f}",
                cell(one["perplexity"], 1.0, 2),
                cell(one["change"], 100.0, 1, signed=True),
                f"{100 * one['worst_change']:+.1f}",
            ]
            for seed, one in enumerate(seeds)
        ],
    )


def draw(found: ByWay, path: Path) -> None:
    """Right answers about old, changed and new facts, a group of bars a way."""
    with styled():
        figure, axes = new_figure(7.0, 3.4)
        width = 0.8 / len(STATES)
        for i, (state, colour) in enumerate(STATES.items()):
            cells = [interval(own[state], **DRAWS) for own in found.values()]
            places = [way + (i - 1) * width for way in range(len(found))]
            means = [100.0 * one.mean for one in cells if one]
            axes.bar(places, means, width, color=colour, label=f"{state} facts")
            for place, one in zip(places, cells, strict=True):
                if one and one.low is not None and one.high is not None:
                    axes.plot([place, place], [100 * one.low, 100 * one.high], color="black", lw=1)
        axes.set_xticks(range(len(found)), list(found))
        axes.set_ylabel("Right answers (%)")
        axes.set_ylim(0, 100)
        only_grid(axes, "y")
        axes.legend(ncols=len(STATES), loc="lower center", bbox_to_anchor=(0.5, 1.0))
        save(figure, path)


def main() -> None:
    """Measure, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--scale", choices=tuple(SCALES), default="demo", help="of the runs")
    parser.add_argument("--users", type=int, default=12, help="of every seed, for the updates")
    parser.add_argument("--seeds", type=int, help=f"how many; default: {SEEDS}")
    parser.add_argument("--texts", type=Path, help="about nobody, for `milp-ray ability` of other bases")
    parser.add_argument("--results", type=Path, default=results_of("forgetting"), help="to write into")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings for the runs")
    arguments = parser.parse_args()
    if arguments.scale != "demo" and arguments.texts is None:
        parser.error(
            "name a file of texts about nobody with --texts: those of the demo are for its base alone"
        )
    given = [] if arguments.texts is None else ["--texts", str(arguments.texts)]
    updates, ability = [], []
    for seed in range(arguments.seeds or SEEDS[arguments.scale]):
        updates.append(updated(seed, arguments.users))
        found_run = run_of_seed(arguments.scale, seed, arguments.overrides)
        ability.append(json.loads(milp_ray("ability", str(found_run.place), *given, "--json")))
        print(f"seed {seed} is done", flush=True)
    found = by_way(updates)
    kept = {
        row["way"]: fmean(rows[i]["kept_by_guard"] for rows in updates) if "kept_by_guard" in row else None
        for i, row in enumerate(updates[0])
    }
    text = (
        f"{invocation()}: {arguments.users} users of each of {len(updates)} seeds. Means over users with "
        "95 % intervals by bootstrap over users; an asterisk: the interval leaves zero out.\n\n"
        f"{table(found, kept)}\n{ability_table(ability)}"
    )
    write_text(arguments.results / "table.md", text)
    values = [
        [way, state, user, value]
        for way, own in found.items()
        for state, shares in own.items()
        for user, value in enumerate(shares)
    ]
    write_csv(arguments.results / "values.csv", ["way", "facts", "user", "right"], values)
    draw(found, arguments.results / "figure.png")
    print(text)
    print(json.dumps({"updates": found, "ability": ability}))


if __name__ == "__main__":
    main()

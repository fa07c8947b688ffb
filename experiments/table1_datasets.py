"""What the users of the experiments are: counts and lengths (the paper's Table 1).

    .venv/bin/python experiments/table1_datasets.py                     # make table1; seconds
    .venv/bin/python experiments/table1_datasets.py --config FILE --config FILE
    .venv/bin/python experiments/table1_datasets.py --scale paper users.paths='[data/users.jsonl]'

`milp-ray users stats` of each configuration. The paper's Table 1 is about AmazonQA, Reddit and
MedicalDialogue, none of which is in this repository: give configurations that read them to see theirs.

Writes experiments/results/table1/{table.md,values.csv,figure.png}, with options runs/results/table1; the last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from commands import HERE, milp_ray
from result_files import invocation, markdown, results_of, write_csv, write_text

from milp_ray.report.style import BLUE, GREEN, ORANGE, PURPLE, new_figure, only_grid, save, styled, thousands

SCALES = {
    "demo": ("demo.yaml", "table2_methods.yaml", "table2_long.yaml"),
    "paper": ("paper_llama2_7b.yaml",),
}
COUNTS = {
    "n_users": "users",
    "n_train": "training examples",
    "n_validation": "validation examples",
    "n_test": "test examples",
}
SPREADS = {"turns_a_user": "turns of history a user", "examples_a_user": "examples a user"}
COLOURS = (BLUE, ORANGE, GREEN, PURPLE)
LENGTHS = {
    "history": "of history a user",
    "turn": "a turn",
    "query": "a query",
    "response": "a response",
}


def rows_of(found: dict[str, Any]) -> dict[str, str]:
    """Measure → cell; of what varies over users or texts the mean, smallest and largest."""
    rows: dict[str, dict[str, float]] = defaultdict(dict)
    for measure, statistic, value in values_of(found):
        rows[measure][statistic] = value
    return {measure: f"{one['count']:,}" if "count" in one else _spread(one) for measure, one in rows.items()}


def values_of(found: dict[str, Any]) -> list[tuple[str, str, float]]:
    """Measure, statistic and value of all that was counted."""
    spreads = {label: found[name] for name, label in SPREADS.items()}
    for unit, of_unit in found["lengths"].items():
        spreads |= {f"{unit} {label}": of_unit[name] for name, label in LENGTHS.items()}
    counts = [(label, "count", found[name]) for name, label in COUNTS.items()]
    return counts + [
        (label, statistic, value) for label, one in spreads.items() for statistic, value in one.items()
    ]


def _spread(found: dict[str, float]) -> str:
    return f"{found['mean']:,.1f} ({found['smallest']:,}–{found['largest']:,})"


def draw(found: dict[str, dict[str, Any]], path: Path) -> None:
    """Tokens of every kind of text: a dot at the mean, a line from the smallest to the largest."""
    with styled():
        figure, axes = new_figure(6.5, 0.9 + 0.16 * len(LENGTHS) * (len(found) + 1))
        for i, (name, one) in enumerate(found.items()):
            lengths = [one["lengths"]["tokens"][text] for text in LENGTHS]
            places = [row * (len(found) + 1) + i for row in range(len(LENGTHS))]
            smallest, mean, largest = (
                [each[statistic] for each in lengths] for statistic in ("smallest", "mean", "largest")
            )
            colour = COLOURS[i % len(COLOURS)]
            axes.hlines(places, smallest, largest, color=colour, linewidth=1.4)
            axes.plot(mean, places, "o", color=colour, markersize=5, label=name)
        middle = (len(found) - 1) / 2
        axes.set_yticks(
            [row * (len(found) + 1) + middle for row in range(len(LENGTHS))],
            [text.capitalize() for text in LENGTHS],
        )
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(thousands)
        axes.set_xlabel("Tokens: mean, and from the smallest to the largest")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(found))
        only_grid(axes, "x")
        save(figure, path)


def main() -> None:
    """Count, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--scale", choices=tuple(SCALES), default="demo")
    parser.add_argument("--config", action="append", type=Path, help="in place of the scale's; several times")
    parser.add_argument("--results", type=Path, default=results_of("table1"), help="to write into")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings for each")
    arguments = parser.parse_args()
    configs = arguments.config or [HERE / name for name in SCALES[arguments.scale]]
    found = {
        config.stem: json.loads(
            milp_ray("users", "stats", str(config), *arguments.overrides, "--tokens", "--json")
        )
        for config in configs
    }
    columns = {name: rows_of(one) for name, one in found.items()}
    measures = list(dict.fromkeys(measure for column in columns.values() for measure in column))
    table = markdown(
        ["", *(f"`{name}` ({found[name]['format']})" for name in columns)],
        [[measure, *(column.get(measure, "–") for column in columns.values())] for measure in measures],
    )
    text = f"{invocation()}: means, with the smallest and the largest.\n\n{table}"
    write_text(arguments.results / "table.md", text)
    values = [[name, *value] for name, one in found.items() for value in values_of(one)]
    draw(found, arguments.results / "figure.png")
    header = ["configuration", "measure", "statistic", "value"]
    write_csv(arguments.results / "values.csv", header, values)
    print(text)
    print(json.dumps(found))


if __name__ == "__main__":
    main()

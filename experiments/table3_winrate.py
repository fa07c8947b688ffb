"""Who wins against the text prompt, by two judges (the paper's Table 3).

    .venv/bin/python experiments/table3_winrate.py                 # make table3; a quarter of an hour
    .venv/bin/python experiments/table3_winrate.py --seeds 1
    .venv/bin/python experiments/table3_winrate.py --scale paper users.paths='[data/users.jsonl]'

For each seed `milp-ray run` makes and scores everybody's adapters, where that is not done, and `milp-ray
winrate` compares answers with the text prompt's: by the wanted response (`embedded`) and without it
(`embedded_free`). The embedded users differ from seed to seed, and intervals are over all of them.

Writes experiments/results/table3/{table.md,values.csv,figure.png}, with options runs/results/table3; the last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from commands import SCALES, SEEDS, milp_ray, run_of_seed
from result_files import DRAWS, cell, invocation, markdown, results_of, write_csv, write_text

from milp_ray.evaluation.judgements import read_judgements
from milp_ray.evaluation.win_rate import win_rates
from milp_ray.report.style import GREEN, GREY, VERMILLION, new_figure, only_grid, save, styled

JUDGES = ("embedded", "embedded_free")
METHODS = ("memory_only", "instruction_only", "milp")
SHARES = {"wins": GREEN, "ties": GREY, "losses": VERMILLION}


def judged(scale: str, seed: int, overrides: Sequence[str]) -> pa.Table:
    """All judgements of the seed's run; what is judged is not answered again."""
    found = run_of_seed(scale, seed, overrides)
    file = found.judgements_file
    is_judged = set()
    if file.is_file():
        is_judged = {(row["judge"], row["method"]) for row in read_judgements(file).to_pylist()}
    for judge in JUDGES:
        for method in METHODS:
            if (judge, method) not in is_judged:
                milp_ray("winrate", str(found.place), "--judge", judge, "--method", method)
    return read_judgements(file)


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """A row a method and judge."""
    header = [
        "Against the text prompt",
        "judge",
        "users",
        "wins (%)",
        "ties (%)",
        "losses (%)",
        "wins − losses",
    ]
    return markdown(
        header,
        [
            [
                one["label"],
                one["judge"],
                str(one["n_users"]),
                *(cell(one[share], 100.0, 0) for share in SHARES),
                cell(one["net"], 100.0, 0, signed=True),
            ]
            for one in found
        ],
    )


def draw(found: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Wins, ties and losses, a bar a method and judge."""
    with styled():
        figure, axes = new_figure(6.5, 0.6 + 0.45 * len(found))
        names = [f"{one['label']}, {one['judge']}" for one in found]
        left = [0.0] * len(found)
        for share, colour in SHARES.items():
            widths = [100.0 * one[share]["mean"] for one in found]
            axes.barh(names, widths, left=left, color=colour, label=share)
            left = [before + width for before, width in zip(left, widths, strict=True)]
        axes.invert_yaxis()
        axes.set_xlim(0, 100)
        axes.set_xlabel("Queries (%), mean over users")
        only_grid(axes, "x")
        axes.legend(ncols=len(SHARES), loc="lower center", bbox_to_anchor=(0.5, 1.0))
        save(figure, path)


def main() -> None:
    """Run and judge what is missing, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--scale", choices=tuple(SCALES), default="demo")
    parser.add_argument("--seeds", type=int, help=f"how many; default: {SEEDS}")
    parser.add_argument("--results", type=Path, default=results_of("table3"), help="to write into")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings for every run")
    arguments = parser.parse_args()
    tables = []
    for seed in range(arguments.seeds or SEEDS[arguments.scale]):
        tables.append(judged(arguments.scale, seed, arguments.overrides))
        print(f"seed {seed}: {tables[-1].num_rows} judgements", flush=True)
    found = win_rates(pa.concat_tables(tables), DRAWS)
    text = (
        f"{invocation()}. Shares of queries, means over users with 95 % intervals by bootstrap over users; "
        f"an asterisk: the interval leaves zero out.\n\n{table(found)}"
    )
    write_text(arguments.results / "table.md", text)
    header = ["method", "judge", "share", "mean", "low", "high", "n_users"]
    write_csv(
        arguments.results / "values.csv",
        header,
        [
            [one["method"], one["judge"], share, *(one[share][name] for name in header[3:])]
            for one in found
            for share in (*SHARES, "net")
        ],
    )
    draw(found, arguments.results / "figure.png")
    print(text)
    print(json.dumps(found))


if __name__ == "__main__":
    main()

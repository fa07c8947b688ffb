"""The table, the values and the figure of PLUM's experiment: means over users, with bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from plum_questions import AGES, Row, age_name
from result_files import DRAWS, cell, markdown, write_csv, write_text

from milp_ray.evaluation.bootstrap import difference_interval, interval
from milp_ray.report.style import BLUE, INK, SKY, VERMILLION, new_figure, save, styled

Found = Mapping[str, Sequence[Sequence[Row]]]  # way → seeds × users

LABELS = {
    "nothing": "nothing known",
    "bm25": "BM25, two turns in the prompt",
    "plum": "PLUM, earlier data discarded",
    "plum_earlier": "PLUM, pairs of earlier conversations beside",
    "plum_no_negatives": "PLUM, earlier data discarded, no negatives",
}
COLOURS = {"bm25": INK, "plum_earlier": BLUE, "plum": SKY, "plum_no_negatives": VERMILLION}
COLUMNS = {
    "yes": "said (%)",
    "no": "not said (%)",
    "both": "both (%)",
    "open": "open (%)",
    "perplexity": "perplexity (%)",
}
SIGNED = "perplexity"  # a change against the base, which has none itself
AGAINST = "bm25"
# Magister et al. 2024, the abstract: their model, data and questions differ.
PAPER = (
    "Magister et al. (2024) report, after 100 conversations and with the data of each discarded, 81.5 % for "
    "PLUM against 83.5 % for retrieval."
)


def of_users(runs: Sequence[Sequence[Row]], measure: str) -> list[float]:
    """Each user's mean over seeds."""
    return [fmean(row[measure] for row in rows) for rows in zip(*runs, strict=True)]


def table(found: Found) -> str:
    """Markdown: a row a way, and the difference to retrieval."""
    rows = []
    for way, runs in found.items():
        cells = [
            cell(interval(of_users(runs, name), **DRAWS), 1.0, 1, signed=name == SIGNED) for name in COLUMNS
        ]
        if way == "nothing":
            cells[-1] = ""
        own, against = (of_users(found[one], "both") for one in (way, AGAINST))
        difference = difference_interval(own, against, **DRAWS)
        cells.append("" if way == AGAINST else cell(difference, 1.0, 1, signed=True))
        rows.append([LABELS[way], *cells])
    return markdown(["", *COLUMNS.values(), "both, against BM25 (points)"], rows)


def write(folder: Path, text: str, found: Found) -> None:
    """``table.md``, ``values.csv`` (a line a way, seed, user and measure) and ``figure.png``."""
    explained = (
        f"{text}\nAccuracy of yes/no questions about what was said and about something related that was not, "
        "of open questions, and the change of perplexity on documents about nobody here. Means over users of "
        "the means over seeds, with 95 % intervals by bootstrap over users; with so few of them they are too "
        f"narrow.\n\n{PAPER}\n"
    )
    write_text(folder / "table.md", explained)
    values = [
        [way, seed, user, name, "" if math.isnan(value) else round(value, 3)]
        for way, runs in found.items()
        for seed, rows in enumerate(runs)
        for user, row in enumerate(rows)
        for name, value in row.items()
    ]
    write_csv(folder / "values.csv", ["way", "seed", "user", "measure", "value"], values)
    draw(found, folder / "figure.png")


def draw(found: Found, path: Path) -> None:
    """Accuracy by age of conversation, a line a way."""
    with styled():
        figure, axes = new_figure(6.0, 3.6)
        names = [age_name(low, high) for low, high in AGES]
        for way, colour in COLOURS.items():
            means = [fmean(of_users(found[way], name)) for name in names]
            axes.plot(range(len(names)), means, "o-", color=colour, label=LABELS[way])
        axes.set_xticks(range(len(names)), [f"{low}–{high}" for low, high in AGES])
        axes.set_xlabel("Conversations ago")
        axes.set_ylabel("Right yes/no answers (%)")
        axes.set_ylim(0, 102)
        axes.legend(loc="lower left", fontsize=8)
        save(figure, path)

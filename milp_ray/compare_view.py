"""``milp-ray compare``: the tables of a comparison on a terminal, in Markdown and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from milp_ray.atomic_files import write_text
from milp_ray.evaluation.compare import main_measure, measured
from milp_ray.evaluation.measures import MEASURES, TASK_MEASURES
from milp_ray.evaluation.side_by_side import AHEAD
from milp_ray.evaluation.slices import ALL, HISTORY_LABELS
from milp_ray.evaluation.tables import cell_text, histories, method_table, task_table
from milp_ray.evaluation.together import present
from milp_ray.report.cost_figures import cost_figure, total_costs

if TYPE_CHECKING:
    from rich.console import Console

Section = tuple[str, list[str], list[list[str]]]  # title, header, rows

_COSTS = (
    ("training_seconds", "Training (s a user)", 1.0, 2),
    ("stored_bytes", "Stored (KiB a user)", 1 / 1024, 1),
    ("prompt_tokens", "Prompt (tokens)", 1.0, 0),
    ("answer_seconds", "Answer (ms)", 1e3, 1),
)


def print_comparison(console: Console, comparison: Mapping[str, Any]) -> None:
    """Print quality, cost, quality by kind of query, and what MiLP is ahead or behind by."""
    console.print(method_table(comparison))
    console.print(_as_table("Costs", *cost_rows(comparison)))
    closed = task_table(comparison)
    if closed is not None:
        console.print(closed)
    for title, header, rows in [*_kind_sections(comparison), *_difference_sections(comparison)]:
        console.print(_as_table(title, header, rows))


def write_comparison(folder: Path, comparison: Mapping[str, Any]) -> list[Path]:
    """Write the tables as Markdown and the first as CSV, and the figure; the files."""
    from milp_ray.report.style import save

    sections = [
        ("Quality", *quality_rows(comparison)),
        ("Costs", *cost_rows(comparison)),
        *_closed_sections(comparison),
        *_kind_sections(comparison),
        *_difference_sections(comparison),
    ]
    text = "\n".join(line for title, header, rows in sections for line in _markdown(title, header, rows))
    written = [folder / "tables.md", folder / "values.csv"]
    write_text(written[0], text)
    write_text(written[1], _values(comparison))
    figure = cost_figure(comparison)
    if figure is not None:
        written.append(save(figure, folder / "quality_over_cost.png"))
    return written


def quality_rows(comparison: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and a row a method: means with intervals."""
    names = measured(dict(comparison))
    rows = [
        [
            comparison["labels"][method],
            *(cell_text(MEASURES[n], comparison["scores"][method].get(ALL, {}).get(n)) for n in names),
        ]
        for method in comparison["methods"]
    ]
    return ["Method", *(MEASURES[name].header for name in names)], rows


def cost_rows(comparison: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and a row a method; what all users share is spread over them."""
    rows = []
    for method in comparison["methods"]:
        costs = total_costs(comparison, method)
        values = [f"{costs[key] * factor:,.{decimals}f}" for key, _, factor, decimals in _COSTS]
        rows.append([comparison["labels"][method], *values])
    return ["Method", *(label for _, label, _, _ in _COSTS)], rows


def _closed_sections(comparison: Mapping[str, Any]) -> Iterator[Section]:
    """Yes/no questions, labels and ratings, where the users' queries asked for any."""
    names = present(comparison, TASK_MEASURES)
    if names:
        scores = comparison["together"]["scores"]
        rows = [
            [
                comparison["labels"][method],
                *(cell_text(TASK_MEASURES[name], scores[method].get(name)) for name in names),
            ]
            for method in comparison["methods"]
        ]
        yield "Closed questions", ["Method", *(TASK_MEASURES[name].header for name in names)], rows


def kind_rows(comparison: Mapping[str, Any], history: str) -> tuple[list[str], list[list[str]]]:
    """Header and a row a method: the main measure by kind of query, for one length of history."""
    name = main_measure(dict(comparison))
    slices = _kind_slices(comparison, history)
    if name is None or len(slices) < 2:
        return ["Method"], []
    rows = [
        [
            comparison["labels"][method],
            *(_short(name, comparison["scores"][method].get(key, {}).get(name)) for key, _ in slices),
        ]
        for method in comparison["methods"]
    ]
    return ["Method", *(piece["label"].capitalize() for _, piece in slices)], rows


def _kind_slices(comparison: Mapping[str, Any], history: str) -> list[tuple[str, Mapping[str, Any]]]:
    """All queries, each exposure and each kind, for one length of history: key and what the slice is."""
    return [
        (key, piece)
        for key, piece in comparison["slices"].items()
        if piece["history"] == history and not piece["tag"] and not (piece["kind"] and piece["exposure"])
    ]


def _short(name: str, cell: Mapping[str, Any] | None) -> str:
    """A mean, and half of its interval's width."""
    measure = MEASURES[name]
    if cell is None or cell["low"] is None:
        return measure.show(cell["mean"] if cell else None)
    return f"{measure.show(cell['mean'])} ±{measure.show((cell['high'] - cell['low']) / 2)}"


def _kind_sections(comparison: Mapping[str, Any]) -> Iterator[Section]:
    name = main_measure(dict(comparison))
    for history in histories(comparison):
        header, rows = kind_rows(comparison, history)
        if rows and name is not None:
            measure = MEASURES[name]
            yield f"{measure.label} by kind of query, {HISTORY_LABELS[history].lower()}", header, rows


def _difference_sections(comparison: Mapping[str, Any]) -> Iterator[Section]:
    for first in AHEAD:
        header, rows = difference_rows(comparison, first)
        if not rows:
            continue
        title = f"{comparison['labels'][first]} minus every other method"
        yield title, header, rows
        for history in histories(comparison):
            header, rows = kind_difference_rows(comparison, first, history)
            if rows:
                yield f"{title}, {HISTORY_LABELS[history].lower()}", header, rows


def difference_rows(comparison: Mapping[str, Any], first: str) -> tuple[list[str], list[list[str]]]:
    """Header and a row a method that ``first`` is compared with, paired inside users; an asterisk marks an
    interval without zero.
    """
    names = [name for name in measured(dict(comparison)) if name != "rouge_1"]
    rows = []
    for pair, slices in comparison["differences"].items():
        left, _, right = pair.partition(" - ")
        if left == first:
            cells = [_difference(name, slices.get(ALL, {}).get(name)) for name in names]
            rows.append([comparison["labels"][right], *cells])
    return ["Minus", *(MEASURES[name].header for name in names)], rows


def kind_difference_rows(
    comparison: Mapping[str, Any], first: str, history: str
) -> tuple[list[str], list[list[str]]]:
    """As :func:`difference_rows` for one length of history: the main measure and ROUGE-L by kind of query."""
    main = main_measure(dict(comparison))
    kinds = [key for key, _ in _kind_slices(comparison, history)]
    columns = [(name, key) for name in dict.fromkeys((main, "rouge_l")) if name for key in kinds]
    if len(kinds) < 2:
        return ["Minus"], []
    rows, filled = [], set()
    for pair, slices in comparison["differences"].items():
        left, _, right = pair.partition(" - ")
        if left != first:
            continue
        cells = [slices.get(key, {}).get(name) for name, key in columns]
        filled |= {column for column, cell in zip(columns, cells, strict=True) if cell is not None}
        rows.append((comparison["labels"][right], cells))
    kept = [i for i, column in enumerate(columns) if column in filled]
    labels = [f"{MEASURES[name].label}: {comparison['slices'][key]['label']}" for name, key in columns]
    return ["Minus", *(labels[i] for i in kept)], [
        [label, *(_difference(columns[i][0], cells[i]) for i in kept)] for label, cells in rows
    ]


def _difference(name: str, cell: Mapping[str, Any] | None) -> str:
    text = cell_text(MEASURES[name], cell, signed=True)
    is_clear = cell is not None and cell["low"] is not None and (cell["low"] > 0 or cell["high"] < 0)
    return f"{text} *" if is_clear else text


def _as_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    from rich.markup import escape

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    return table


def _markdown(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield from (f"## {title}", "", "| " + " | ".join(header) + " |")
    yield "|---|" + "---:|" * (len(header) - 1)
    for row in rows:
        yield "| " + " | ".join(cell.replace(" *", r" \*") for cell in row) + " |"
    yield ""


def _values(comparison: Mapping[str, Any]) -> str:
    """One line a (method, slice, measure), and one a (method, cost)."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "slice", "measure", "mean", "low", "high", "n_users", "n_examples"])
    for method in comparison["methods"]:
        for key, cells in comparison["scores"][method].items():
            for name, cell in cells.items():
                numbers = [cell[part] for part in ("mean", "low", "high", "n_users", "n_examples")]
                writer.writerow([method, key, name, *numbers])
        for name, value in comparison["costs"][method].items():
            writer.writerow([method, "", name, value, "", "", "", ""])
    return text.getvalue()

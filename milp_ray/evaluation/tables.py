"""The comparison as tables for a terminal, readable at 120 columns.

They are made of :func:`milp_ray.evaluation.compare.compare`'s dict alone, so that ``summary.json`` of a
finished run can be printed again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from milp_ray.evaluation.compare import main_measure, measured
from milp_ray.evaluation.measures import MEASURES, TASK_MEASURES, Measure
from milp_ray.evaluation.slices import ALL, HISTORY_LABELS
from milp_ray.evaluation.together import present

if TYPE_CHECKING:
    from rich.table import Table

_COMPARED = ("rouge_l", "persona_f1", "fact_accuracy", "loss")
PAIR_NAMES = {"milp - base": "MiLP − base alone", "milp - text_prompt": "MiLP − text prompt"}


def cell_text(measure: Measure, cell: Mapping[str, Any] | None, *, signed: bool = False) -> str:
    """A mean and its interval: "41.2 [38.0, 44.1]"; the mean alone without one; a dash without a mean."""
    if cell is None:
        return "–"
    mean = measure.show(cell["mean"], signed=signed)
    if cell["low"] is None:
        return mean
    low, high = (measure.show(cell[bound], signed=signed) for bound in ("low", "high"))
    return f"{mean} [{low}, {high}]"


def terminal_tables(comparison: Mapping[str, Any]) -> list[Table]:
    """The tables of an evaluation: by method, by kind and length of history, and the differences."""
    by_kind = [kind_table(comparison, history) for history in histories(comparison)]
    differences = difference_table(comparison)
    tables = [method_table(comparison), task_table(comparison), *by_kind, differences]
    return [table for table in tables if table is not None]


def method_table(comparison: Mapping[str, Any], slice_key: str = ALL) -> Table:
    """One row a method, one column a measure, over one slice."""
    names = [name for name in measured(dict(comparison)) if name != "rouge_1"]
    size = comparison["slices"].get(slice_key, {"n_users": 0, "n_examples": 0})
    table = _table(
        f"Held-out queries: {size['n_users']} users, {size['n_examples']} queries "
        f"(mean over users [{comparison['confidence']:.0%} interval])"
    )
    table.add_column("Method", no_wrap=True)
    for name in names:
        table.add_column(MEASURES[name].header, justify="right", no_wrap=True)
    bests = {name: best_method(comparison, slice_key, name) for name in names}
    for method in comparison["methods"]:
        cells = comparison["scores"][method].get(slice_key, {})
        shown = []
        for name in names:
            text = cell_text(MEASURES[name], cells.get(name))
            shown.append(f"[bold]{_escape(text)}[/bold]" if method == bests[name] else _escape(text))
        table.add_row(comparison["labels"][method], *shown)
    return table


def task_table(comparison: Mapping[str, Any]) -> Table | None:
    """One row a method, one column a measure of closed questions; ``None`` where none was asked."""
    names = present(comparison, TASK_MEASURES)
    if not names:
        return None
    table = _table("Closed questions: all users")
    table.add_column("Method", no_wrap=True)
    for name in names:
        table.add_column(TASK_MEASURES[name].header, justify="right", no_wrap=True)
    for method in comparison["methods"]:
        cells = comparison["together"]["scores"][method]
        texts = [_escape(cell_text(TASK_MEASURES[name], cells.get(name))) for name in names]
        table.add_row(comparison["labels"][method], *texts)
    return table


def kind_table(comparison: Mapping[str, Any], history: str) -> Table | None:
    """One row a kind and exposure, one column a method, for one length of history; ``None`` if one row."""
    rows = kind_rows(comparison, history)
    measure_name = main_measure(dict(comparison))
    if measure_name is None or not rows or (len(rows) == 1 and not history):
        return None
    n_users = comparison["slices"][rows[0].key]["n_users"]
    header = MEASURES[measure_name].header
    table = _table(f"{header} by query kind: {HISTORY_LABELS[history].lower()} ({n_users} users)")
    table.add_column("Queries", no_wrap=True)
    table.add_column("n", justify="right")
    for method in comparison["methods"]:
        table.add_column(comparison["short_labels"][method], justify="right", no_wrap=True)
    for row in rows:
        cells = [
            _whole_cell(MEASURES[row.measure], comparison["scores"][method].get(row.key, {}).get(row.measure))
            for method in comparison["methods"]
        ]
        table.add_row(("  " if row.indented else "") + row.label, str(row.n_examples), *cells)
    return table


@dataclass(frozen=True, slots=True)
class KindRow:
    """One row of a table by kind: which slice, by which measure, under which name."""

    key: str
    label: str
    measure: str
    n_examples: int
    indented: bool


def kind_rows(comparison: Mapping[str, Any], history: str) -> list[KindRow]:
    """The rows of a table by kind for one length of history.

    A kind that the main measure does not know (generic queries have no fact) stands there with its ROUGE-L;
    an exposure that is all there is of its kind is not said twice.
    """
    main = main_measure(dict(comparison))
    found: list[KindRow] = []
    for key, piece in comparison["slices"].items():
        if main is None or piece["history"] != history or piece["tag"]:
            continue
        cells = [comparison["scores"][method].get(key, {}) for method in comparison["methods"]]
        measure = next((name for name in (main, "rouge_l") if any(name in cell for cell in cells)), None)
        n_examples = max((cell[measure]["n_examples"] for cell in cells if measure in cell), default=0)
        inside_kind = bool(piece["kind"] and piece["exposure"])
        whole_kind = [row for row in found if row.key == key.rpartition("/")[0]]
        if measure is None or (inside_kind and whole_kind and whole_kind[0].n_examples == n_examples):
            continue
        label = piece["label"] if measure == main else f"{piece['label']}: {MEASURES[measure].label}"
        found.append(KindRow(key, label, measure, n_examples, inside_kind))
    return found


def difference_table(comparison: Mapping[str, Any]) -> Table | None:
    """What MiLP adds to the base and to the text prompt, paired inside users; ``None`` without MiLP."""
    names = compared_measures(comparison)
    if not names or not comparison["differences"]:
        return None
    table = _table("Paired differences (bold: the interval excludes 0)")
    table.add_column("", no_wrap=True)
    for name in names:
        measure = MEASURES[name]
        table.add_column(
            f"{measure.label} {'↓' if measure.direction == 'min' else '↑'}", justify="right", no_wrap=True
        )
    for pair, slices in comparison["differences"].items():
        table.add_row(f"[bold]{PAIR_NAMES.get(pair, pair)}[/bold]")
        for key in compared_slices(comparison):
            cells = slices.get(key)
            if cells:
                shown = [_difference_text(MEASURES[name], cells.get(name)) for name in names]
                table.add_row("  " + slice_name(comparison, key), *shown)
    return table


def compared_measures(comparison: Mapping[str, Any]) -> list[str]:
    """The measures that differences are shown for."""
    present = measured(dict(comparison))
    return [name for name in _COMPARED if name in present]


def compared_slices(comparison: Mapping[str, Any]) -> list[str]:
    """The slices that differences are shown for: all, unseen facts, and both lengths where there are two."""
    wanted = [ALL, "unseen"]
    if comparison["n_users_fits"] and comparison["n_users_long"]:
        wanted += ["fits:all", "fits:unseen", "long:all", "long:unseen"]
    return [key for key in wanted if key in comparison["slices"]]


def slice_name(comparison: Mapping[str, Any], key: str) -> str:
    """A slice's name where it stands without a heading, such as "all queries, long history"."""
    piece = comparison["slices"][key]
    history = {"": "", "fits": ", short history", "long": ", long history"}[piece["history"]]
    return f"{piece['label']}{history}"


def excludes_zero(cell: Mapping[str, Any] | None) -> bool:
    """Whether a difference's interval lies on one side of 0."""
    return cell is not None and cell["low"] is not None and (cell["low"] > 0 or cell["high"] < 0)


def histories(comparison: Mapping[str, Any]) -> list[str]:
    """All users together where their histories are alike, each length by itself where they are not."""
    both = comparison["n_users_fits"] and comparison["n_users_long"]
    return ["fits", "long"] if both else [""]


def best_method(comparison: Mapping[str, Any], slice_key: str, measure_name: str) -> str | None:
    """The best method by a measure, the ceiling aside."""
    means = {
        method: comparison["scores"][method][slice_key][measure_name]["mean"]
        for method in comparison["methods"]
        if method != "oracle_profile" and measure_name in comparison["scores"][method].get(slice_key, {})
    }
    if len(means) < 2:
        return None
    pick = min if MEASURES[measure_name].direction == "min" else max
    return pick(means, key=lambda method: means[method])


def _difference_text(measure: Measure, cell: Mapping[str, Any] | None) -> str:
    text = _escape(cell_text(measure, cell, signed=True))
    return f"[bold]{text}[/bold]" if excludes_zero(cell) else text


def _whole_cell(measure: Measure, cell: Mapping[str, Any] | None) -> str:
    """A mean and its interval in whole numbers, for tables with a column a method: "41 (38–44)"."""
    if cell is None:
        return "–"
    mean, *bounds = (
        None if cell[name] is None else f"{cell[name] * measure.scale:.0f}"
        for name in ("mean", "low", "high")
    )
    return f"{mean} ({bounds[0]}–{bounds[1]})" if all(bounds) else f"{mean}"


def _table(title: str) -> Table:
    from rich import box
    from rich.table import Table

    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)

"""The report as one HTML page: no script, nothing loaded from anywhere, figures beside it.

Tables are built here as plain data; ``templates/report.html.j2`` only lays them out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from milp_ray.evaluation.compare import main_measure, measured
from milp_ray.evaluation.measures import FURTHER_MEASURES, MEASURES, TASK_MEASURES, Measure
from milp_ray.evaluation.slices import ALL, HISTORY_LABELS, TAG_LABELS
from milp_ray.evaluation.tables import (
    PAIR_NAMES,
    best_method,
    compared_measures,
    compared_slices,
    excludes_zero,
    histories,
    kind_rows,
    slice_name,
)
from milp_ray.evaluation.together import present
from milp_ray.methods import INFO
from milp_ray.report.ability_text import ability_table, ability_verdict
from milp_ray.report.html_table import Cell, HtmlTable, Row
from milp_ray.report.layouts_text import layout_sentences, layout_table
from milp_ray.report.leakage_text import leakage_table, leakage_verdict
from milp_ray.report.study_text import cost_sentences, front_table, importance_table
from milp_ray.report.style import duration, method_colour, thousands
from milp_ray.report.win_rate_text import win_rate_table

if TYPE_CHECKING:
    from milp_ray.report.content import ReportContent


def render(content: ReportContent, figures: Mapping[str, str]) -> str:
    """The page.

    Args:
        content: what it tells.
        figures: name → path of its PNG relative to the page; figures that are not there are not shown.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("milp_ray.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    comparison = content.comparison
    return environment.get_template("report.html.j2").render(
        content=content,
        figures=figures,
        facts=facts(content),
        findings=findings(comparison) if comparison else [],
        method_table=method_table(comparison) if comparison else None,
        task_table=together_table(comparison, TASK_MEASURES, "Closed questions") if comparison else None,
        further_table=together_table(comparison, FURTHER_MEASURES, "Further measures, all held-out queries")
        if comparison
        else None,
        difference_table=difference_table(comparison) if comparison else None,
        kind_tables=kind_tables(comparison) if comparison else [],
        tag_table=tag_table(comparison) if comparison else None,
        front_table=front_table(content.study) if content.study else None,
        importance_table=importance_table(content.study) if content.study else None,
        ability_table=ability_table(content.ability) if content.ability else None,
        ability_verdict=ability_verdict(content.ability) if content.ability else "",
        win_rate_table=win_rate_table(content.win_rates),
        layout_table=layout_table(content.layouts) if content.layouts else None,
        layout_sentences=layout_sentences(content.layouts) if content.layouts else [],
        leakage_table=leakage_table(content.leakage) if content.leakage else None,
        leakage_verdict=leakage_verdict(content.leakage) if content.leakage else "",
        costs=cost_sentences(content.study.status) if content.study else [],
        methods=[INFO[name] for name in comparison["methods"] if name in INFO] if comparison else [],
        versions=_flat(_without_people(content.versions)),
    )


def facts(content: ReportContent) -> list[tuple[str, str, str]]:
    """The run in a few numbers: (name, value, remark)."""
    found: list[tuple[str, str, str]] = []
    study, chosen, comparison = content.study, content.chosen, content.comparison
    if study:
        counts = {"stopped early": study.n_stopped, "failed": study.n_failed}
        remark = ", ".join(
            [f"{len(study.front)} on the front", *(f"{n} {what}" for what, n in counts.items() if n)]
        )
        found.append(("Trials", str(study.n_ended), remark))
    if chosen:
        layout = chosen["layout"]
        size = thousands(chosen["adapter_parameters"])
        remark = f"{len(layout['layers'])} of {layout['n_layers']} layers, {size} parameters a user"
        found.append(("Chosen layout", layout["key"], remark))
    if comparison:
        remark = (
            f"{comparison['n_users_fits']} histories fit the context, {comparison['n_users_long']} do not"
        )
        found.append(("Users evaluated", str(comparison["n_users"]), remark))
    if content.seconds:
        memory = f"peak memory {content.peak_rss_mib / 1024:.1f} GiB" if content.peak_rss_mib else ""
        found.append(("Time", duration(sum(content.seconds.values())), memory))
    return found


def findings(comparison: Mapping[str, Any]) -> list[str]:
    """What the paired differences say, in sentences, for and against the full method."""
    name = main_measure(dict(comparison))
    if name is None:
        return []
    measure = MEASURES[name]
    sentences = []
    for key in compared_slices(comparison):
        parts = []
        for pair, slices in comparison["differences"].items():
            cell = slices.get(key, {}).get(name)
            if cell is not None and cell["low"] is not None:
                other = comparison["labels"][pair.partition(" - ")[2]].lower()
                parts.append(f"{_verdict(cell)} {other} ({_difference(measure, cell)})")
        if parts:
            where = slice_name(comparison, key)
            subject = (
                f"{where[0].upper()}{where[1:]}, {measure.label if name == 'rouge_l' else 'fact accuracy'}"
            )
            sentences.append(f"{subject}: MiLP is {', and '.join(parts)}.")
    return sentences


def _verdict(cell: Mapping[str, Any]) -> str:
    if not excludes_zero(cell):
        return "not to be told apart from"
    return "ahead of" if cell["mean"] > 0 else "behind"


def _difference(measure: Measure, cell: Mapping[str, Any]) -> str:
    mean, low, high = (measure.show(cell[part], signed=True) for part in ("mean", "low", "high"))
    return f"{mean} points, interval {low} to {high}"


def method_table(comparison: Mapping[str, Any]) -> HtmlTable:
    """One row a method over all held-out queries."""
    names = measured(dict(comparison))
    bests = {name: best_method(comparison, ALL, name) for name in names}
    rows = [
        Row(
            comparison["labels"][method],
            [
                _cell(
                    MEASURES[n], comparison["scores"][method].get(ALL, {}).get(n), strong=bests[n] == method
                )
                for n in names
            ],
            colour=method_colour(method, position),
        )
        for position, method in enumerate(comparison["methods"])
    ]
    return HtmlTable("All held-out queries", ["Method", *(MEASURES[n].header for n in names)], rows)


def together_table(
    comparison: Mapping[str, Any], measures: Mapping[str, Measure], title: str
) -> HtmlTable | None:
    """One row a method, one column a measure of its answers taken together; ``None`` where there is none."""
    names = present(comparison, measures)
    rows = [
        Row(
            comparison["labels"][method],
            [_cell(measures[name], comparison["together"]["scores"][method].get(name)) for name in names],
            colour=method_colour(method, position),
        )
        for position, method in enumerate(comparison["methods"])
    ]
    return HtmlTable(title, ["Method", *(measures[name].header for name in names)], rows) if names else None


def kind_tables(comparison: Mapping[str, Any]) -> list[HtmlTable]:
    """One table for all users, and one for each length of history where there are two."""
    name = main_measure(dict(comparison))
    if name is None:
        return []
    tables = []
    for history in dict.fromkeys(["", *histories(comparison)]):
        rows = []
        for row in kind_rows(comparison, history):
            cells = [
                _cell(MEASURES[row.measure], comparison["scores"][m].get(row.key, {}).get(row.measure))
                for m in comparison["methods"]
            ]
            rows.append(Row(row.label, [Cell(str(row.n_examples)), *cells], indented=row.indented))
        if len(rows) > 1 or history:
            columns = ["Queries", "n", *(comparison["short_labels"][m] for m in comparison["methods"])]
            title = f"{MEASURES[name].header}: {HISTORY_LABELS[history].lower()}"
            tables.append(HtmlTable(title, columns, rows))
    return tables


def tag_table(comparison: Mapping[str, Any]) -> HtmlTable | None:
    """The main measure by the tags of queries; ``None`` for data without tags."""
    name = main_measure(dict(comparison))
    rows: list[Row] = []
    for tag, heading in TAG_LABELS.items():
        keys = [key for key, piece in comparison["slices"].items() if piece["tag"] == tag]
        if name is None or len(keys) < 2:
            continue
        rows.append(Row(heading, [], heading=True))
        for key in keys:
            found = [comparison["scores"][m].get(key, {}).get(name) for m in comparison["methods"]]
            n_examples = max((cell["n_examples"] for cell in found if cell), default=0)
            if n_examples:
                cells = [_cell(MEASURES[name], cell) for cell in found]
                label = comparison["slices"][key]["label"]
                rows.append(Row(label, [Cell(str(n_examples)), *cells], indented=True))
    if name is None or not rows:
        return None
    columns = ["Queries", "n", *(comparison["short_labels"][m] for m in comparison["methods"])]
    return HtmlTable(f"{MEASURES[name].header}: by property of the query, all users", columns, rows)


def difference_table(comparison: Mapping[str, Any]) -> HtmlTable | None:
    """What MiLP adds, paired inside users."""
    names = compared_measures(comparison)
    rows: list[Row] = []
    for pair, slices in comparison["differences"].items():
        rows.append(Row(PAIR_NAMES.get(pair, pair), [], heading=True))
        for key in compared_slices(comparison):
            found = slices.get(key)
            if found:
                cells = [
                    _cell(MEASURES[n], found.get(n), strong=excludes_zero(found.get(n)), signed=True)
                    for n in names
                ]
                label = slice_name(comparison, key)
                rows.append(Row(label[0].upper() + label[1:], cells, indented=True))
    if not names or not rows:
        return None
    return HtmlTable(
        "Paired differences",
        ["", *(MEASURES[n].header for n in names)],
        rows,
        note="Bold where the interval excludes 0. For the loss, below 0 is better.",
    )


def _cell(
    measure: Measure, cell: Mapping[str, Any] | None, *, strong: bool = False, signed: bool = False
) -> Cell:
    if cell is None:
        return Cell("–")
    text = measure.show(cell["mean"], signed=signed)
    if cell["low"] is None:
        return Cell(text, "", strong)
    bounds = " to ".join(measure.show(cell[bound], signed=signed) for bound in ("low", "high"))
    return Cell(text, bounds, strong)


def _without_people(versions: Mapping[str, Any]) -> dict[str, Any]:
    """What the run was made with, with the number of probe users in place of their ids."""
    return {
        name: len(value) if name == "probe_users" and isinstance(value, list) else value
        for name, value in versions.items()
    }


def _flat(data: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested facts as (dotted name, value) pairs."""
    pairs: list[tuple[str, str]] = []
    for key, value in data.items():
        if isinstance(value, Mapping):
            pairs += _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            pairs.append((prefix + key, ", ".join(map(str, value))))
        else:
            pairs.append((prefix + key, "–" if value is None else str(value)))
    return pairs

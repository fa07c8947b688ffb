"""Win rates in words, for the terminal and the page alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from milp_ray.report.html_table import Cell, HtmlTable, Row

COLUMNS = ("Judge", "Users", "Queries", "Wins (%)", "Ties (%)", "Losses (%)", "Wins − losses")


def win_rate_title(rate: Mapping[str, Any]) -> str:
    """Who is compared with whom."""
    return f"{rate['label']} against {rate['against_label'].lower()}"


def win_rate_cells(rate: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(value, interval) of each column but the first two."""
    shares = [_percent(rate[name]) for name in ("wins", "ties", "losses")]
    return [(str(rate["n_users"]), ""), (str(rate["n_examples"]), ""), *shares, _percent(rate["net"], "+")]


def win_rate_verdict(rate: Mapping[str, Any]) -> str:
    """Whether the judge tells the two apart, in a sentence."""
    net, names = rate["net"], (rate["label"], rate["against_label"].lower())
    if net["low"] is None or net["low"] <= 0 <= net["high"]:
        return f"The judge {rate['judge']} does not tell {names[0]} and {names[1]} apart."
    better, worse = names if net["mean"] > 0 else names[::-1]
    return f"The judge {rate['judge']} prefers {better} to {worse}."


def agreement_sentence(found: Mapping[str, Any]) -> str:
    """How far the judge and people agree, in a sentence."""
    if not found["n_matched"]:
        return (
            f"No human choice of {found['n_choices']} on these methods is about a query that was judged: "
            "compare user_id and example"
        )
    cells = {name: _with_interval(found[name]) for name in ("accuracy", "pearson")}
    return (
        f"Agreement with people on {found['n_matched']} of {found['n_choices']} choices: accuracy "
        f"{cells['accuracy']}, Pearson {cells['pearson']}"
    )


def win_rate_table(rates: Sequence[Mapping[str, Any]]) -> HtmlTable | None:
    """The win rates as a table of the page; ``None`` where nothing was judged."""
    rows: list[Row] = []
    for rate in rates:
        heading = win_rate_title(rate)
        if heading not in [row.label for row in rows if row.heading]:
            rows.append(Row(heading, [], heading=True))
        rows.append(Row(rate["judge"], [Cell(*cell) for cell in win_rate_cells(rate)], indented=True))
    note = (
        "Shares over users of the queries whose answer a judge preferred, with intervals over users. The "
        "judge embedded compares with the wanted response, by (ROUGE-L + F1 of content words) / 2; "
        "embedded_free takes Persona-F1 instead and sees no wanted response."
    )
    return HtmlTable("Win rates", COLUMNS, rows, note=note) if rows else None


def _percent(cell: Mapping[str, Any], sign: str = "") -> tuple[str, str]:
    mean, low, high = (
        None if cell[part] is None else f"{100 * cell[part]:{sign}.0f}".replace("-", "−")
        for part in ("mean", "low", "high")
    )
    return str(mean), f"{low} to {high}" if low is not None else ""


def _with_interval(cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return "–"
    mean, low, high = (
        None if cell[part] is None else f"{cell[part]:.2f}".replace("-", "−")
        for part in ("mean", "low", "high")
    )
    return f"{mean} [{low}, {high}]" if low is not None else str(mean)

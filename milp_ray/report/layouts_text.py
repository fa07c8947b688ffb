"""Per-user layouts in words and as a table, for the terminal and for the page: quality against cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from milp_ray.report.html_table import Cell, HtmlTable, Row

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = ("Layout", "Users", "Share")
_MOST_ROWS = 12


def layout_title(found: Mapping[str, Any]) -> str:
    """By what users' layouts were decided."""
    return f"Per-user layouts, by a {found['mode']}: {_users(found['n_users'])}"


def layout_rows(found: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """One row a layout, the most frequent first, in the order of :data:`COLUMNS`; the rest as one row."""
    n_users, taken = found["n_users"], list(found["taken"].items())
    rows = [(key + (" (chosen)" if key == found["chosen"] else ""), n) for key, n in taken[:_MOST_ROWS]]
    if len(taken) > _MOST_ROWS:
        rows.append((f"{len(taken) - _MOST_ROWS} others", sum(n for _, n in taken[_MOST_ROWS:])))
    return [(name, f"{n:,}", f"{n / n_users:.0%}") for name, n in rows]


def layout_sentences(found: Mapping[str, Any]) -> list[str]:
    """What was gained, as far as it is known, and what it cost."""
    sentences = [_reasons(found)]
    if found["n_compared"]:
        n, taken, chosen = found["n_compared"], found["taken_loss"], found["chosen_loss"]
        sentences.append(
            f"Validation loss of {_users(n)} who raced, where the chosen layout was measured last: "
            f"{taken:.4f} with the layout taken, {chosen:.4f} with the chosen one "
            f"({taken / chosen - 1:+.1%}). The winner was selected on these very examples, so held-out "
            "queries will show less."
        )
    if found["predicted_gain"] is not None:
        sentences.append(
            f"For {_users(found['n_other'])} with another layout the predicted fall of the validation "
            f"loss is {found['predicted_gain']:.1%} on average; the chosen layout was not trained there."
        )
    sentences.append(
        f"Cost: {_times(found['steps_ratio'])} the optimizer steps of one layout a user, "
        f"{_times(found['seconds_ratio'])} the seconds of training the layouts taken alone, and "
        f"{_times(found['parameters_ratio'])} the parameters of the chosen layout for all."
    )
    return [sentence.replace("(-", "(−") for sentence in sentences]


def layout_table(found: Mapping[str, Any]) -> HtmlTable:
    """The counts as a table of the page."""
    rows = [Row(name, [Cell(text) for text in texts]) for name, *texts in layout_rows(found)]
    note = "Memory only and instruction only, where they are compared, have the chosen layout for everybody."
    return HtmlTable(layout_title(found), COLUMNS, rows, note)


def terminal_table(found: Mapping[str, Any]) -> Table:
    """The counts as they are printed, below :func:`layout_title`, which may be wider."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD)
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == COLUMNS[0] else "right")
    for row in layout_rows(found):
        table.add_row(*row)
    return table


def _times(ratio: float | None) -> str:
    return "an unknown number of times" if ratio is None else f"{ratio:.2f} ×"


def _reasons(found: Mapping[str, Any]) -> str:
    told = "; ".join(f"{_users(n)}: {reason}" for reason, n in found["reasons"].items())
    return f"Why: {told}."


def _users(n: int) -> str:
    return f"{n:,} user{'s' if n != 1 else ''}"

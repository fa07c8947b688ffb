"""General ability in words, for the terminal and the page alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from milp_ray.report.html_table import Cell, HtmlTable, Row

COLUMNS = ("", "Perplexity ↓", "Change (%)", "Worst user (%)")


def ability_title(found: Mapping[str, Any]) -> str:
    """On what was measured."""
    return (
        f"{found['n_texts']} texts about nobody ({found['texts']}, {found['n_tokens']:,} tokens), "
        f"{found['n_users']} users ({found['confidence']:.0%} intervals over users)"
    )


def ability_rows(found: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The base and the users' adapters: name, and (value, interval) of each column."""
    base = [(f"{found['base_perplexity']:.3g}", ""), ("", ""), ("", "")]
    personal = [
        _shown(found["perplexity"], "{:.3g}"),
        _shown(found["change"], "{:+.1f}", 100.0),
        (_minus(f"{100 * found['worst_change']:+.1f}"), ""),
    ]
    return [("The base alone", base), ("With a user's adapter", personal)]


def ability_verdict(found: Mapping[str, Any]) -> str:
    """What adapters cost on average, in a sentence."""
    change = found["change"]
    if change["low"] is None or change["low"] <= 0 <= change["high"]:
        return "On texts about nobody adapters are not to be told apart from the base."
    verb = "raise" if change["mean"] > 0 else "lower"
    size = f"{abs(100 * change['mean']):.1f}%"
    return f"Adapters {verb} the perplexity on texts about nobody by {size} on average."


def ability_table(found: Mapping[str, Any]) -> HtmlTable:
    """The measurement as a table of the page."""
    rows = [Row(name, [Cell(*cell) for cell in cells]) for name, cells in ability_rows(found)]
    return HtmlTable(ability_title(found), COLUMNS, rows)


def _shown(cell: Mapping[str, Any], shape: str, scale: float = 1.0) -> tuple[str, str]:
    mean, low, high = (
        None if cell[part] is None else _minus(shape.format(scale * cell[part]))
        for part in ("mean", "low", "high")
    )
    return str(mean), f"{low}, {high}" if low is not None else ""


def _minus(text: str) -> str:
    return text.replace("-", "−")

"""A leakage audit in words and as a table, for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from milp_ray.report.html_table import Cell, HtmlTable, Row

LABELS = {
    "own": "The user's own adapter",
    "others": "Other users' adapters",
    "control": "The user's adapter, no canaries",
    "base": "The base alone",
}
COLUMNS = ("Canaries looked for under", "Exposure (bits)", "Difference to the base", "Completed (%)")


def leakage_title(found: Mapping[str, Any]) -> str:
    """What was planted."""
    times = "" if found["repeats"] == 1 else f", each {found['repeats']} times"
    n_users, n_canaries, space = found["n_users"], found["n_canaries"], found["space"]
    return (
        f"Leakage audit of {found['layout']}: {n_users} users × {n_canaries} canaries{times}; secrets of "
        f"{space['bits']:.0f} bits ({space['name']}), ranked among {found['n_candidates']:,} others"
    )


def leakage_rows(found: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """One row a source, in the order of :data:`COLUMNS`."""
    rows = []
    for name, bits in found["exposure"].items():
        difference = found["differences"].get(f"{name} - base")
        rows.append(
            (
                LABELS[name],
                _with_interval(bits, "{:.2f}"),
                _with_interval(difference, "{:+.2f}") if difference else "",
                _with_interval(found["extracted"][name], "{:.0f}", scale=100.0),
            )
        )
    return rows


def leakage_note(found: Mapping[str, Any]) -> str:
    """How the numbers are to be read."""
    return (
        f"Exposure lies between 0 and {found['most_bits']:.2f} bits; a secret that a model knows nothing "
        f"about has {found['chance_bits']:.2f} on average. {found['confidence']:.0%} intervals over users."
    )


def leakage_verdict(found: Mapping[str, Any]) -> str:
    """The two verdicts in a sentence or two."""
    others = _with_interval(found["differences"]["others - base"], "{:+.2f}")
    if found["isolated"]:
        verdict = f"Isolated: other users' adapters expose no more than the base does ({others} bits)."
    else:
        verdict = f"Not isolated: other users' adapters expose more than the base does ({others} bits)."
    if not found["remembered"]:
        verdict += (
            " The users' own adapters did not remember the canaries either, so this says little; plant "
            "them more often (--repeats)."
        )
    return verdict


def leakage_table(found: Mapping[str, Any]) -> HtmlTable:
    """The audit as a table of the page."""
    rows = [Row(label, [Cell(text) for text in texts]) for label, *texts in leakage_rows(found)]
    return HtmlTable(leakage_title(found), COLUMNS, rows, note=leakage_note(found))


def _with_interval(cell: Mapping[str, Any], shape: str, scale: float = 1.0) -> str:
    mean, low, high = (
        None if cell[part] is None else shape.format(scale * cell[part]).replace("-", "−")
        for part in ("mean", "low", "high")
    )
    return f"{mean} [{low}, {high}]" if low is not None else str(mean)

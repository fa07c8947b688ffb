"""How experiments show and keep what they found: Markdown tables, and CSV files of values."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from milp_ray.atomic_files import write_text
from milp_ray.evaluation.bootstrap import Interval

__all__ = ["DRAWS", "RESULTS", "cell", "invocation", "markdown", "results_of", "write_csv", "write_text"]

RESULTS = Path(__file__).resolve().parent / "results"
DRAWS: dict[str, Any] = {"n_bootstrap": 2000, "confidence": 0.95, "seed": 0}  # of all their intervals


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers, with a line break at its end."""
    first, *others = ("| " + " | ".join(cells) + " |\n" for cells in (header, *rows))
    return "".join([first, "|---|" + "---:|" * (len(header) - 1) + "\n", *others])


def cell(
    found: Interval | Mapping[str, Any] | None, scale: float, decimals: int, *, signed: bool = False
) -> str:
    """A mean and its interval; an asterisk where a difference's (``signed``) leaves zero out."""
    if found is None:
        return "–"
    values = found.to_dict() if isinstance(found, Interval) else found
    sign = "+" if signed else ""
    mean = f"{values['mean'] * scale:{sign}.{decimals}f}"
    if values["low"] is None:
        return mean
    low, high = (f"{values[end] * scale:{sign}.{decimals}f}" for end in ("low", "high"))
    mark = r" \*" if signed and (values["low"] > 0 or values["high"] < 0) else ""
    return f"{mean}{mark}" if low == high else f"{mean} [{low}, {high}]{mark}"


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write values, one row a line."""
    lines = io.StringIO(newline="")
    csv.writer(lines).writerows([header, *rows])
    write_text(path, lines.getvalue())


def results_of(name: str) -> Path:
    """Where the script at hand writes by default: into the repository what it finds with its own settings."""
    return Path("runs") / "results" / name if _options() else RESULTS / name


def invocation() -> str:
    """The command at hand, as a table's first line names it."""
    return f"`{' '.join(['experiments/' + Path(sys.argv[0]).name, *_options()])}`"


def _options() -> list[str]:
    """What was said on the command line; to name the scale that it has anyway says nothing."""
    options = sys.argv[1:]
    return [] if options == ["--scale", "demo"] else options

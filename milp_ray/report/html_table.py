"""Tables of the page as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Cell:
    """One number of a table: the mean, its interval below it, and whether it is to stand out."""

    text: str
    interval: str = ""
    strong: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a table."""

    label: str
    cells: Sequence[Cell]
    indented: bool = False
    colour: str = ""  # of the method, as in the figures
    heading: bool = False


@dataclass(frozen=True, slots=True)
class HtmlTable:
    """A table of the page."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Row] = field(default_factory=list)
    note: str = ""

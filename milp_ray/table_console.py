"""The console that tables are printed on: as wide as they need, whatever the terminal is."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

# A pipe is no terminal of 80 columns, and in a narrow terminal a line that goes on below is better than
# numbers that are cut off.
_LEAST_WIDTH = 120


def table_console() -> Console:
    """A console for standard output."""
    from rich.console import Console

    console = Console(highlight=False, emoji=False)
    if not sys.stdout.isatty() or console.width < _LEAST_WIDTH:
        console.width = _LEAST_WIDTH
    return console

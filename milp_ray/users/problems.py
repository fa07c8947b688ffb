"""What a reader hands over for a record that it cannot use: the place and the reason, never the text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Problem:
    """One record that is kept out.

    ``line`` is the line of a text file, the row of a Parquet file (both from 1), the index of a record in a
    JSON list (from 0), or 0 where something is said of the whole file. ``reason`` names fields and places,
    and holds nothing of what a user wrote; ``user_id`` is there where it could be read.
    """

    path: Path | str  # of JSON Lines and Parquet a string, which may be a URI
    line: int
    reason: str
    user_id: str | None = None

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"


CONSENT_WITHDRAWN = "consent withdrawn"

"""What people chose between two answers: a CSV to fill in, and the filled one.

Columns: ``user_id``, ``example`` (position among the user's test examples, from 0), ``first``, ``second``
(names of methods) and ``choice``: "first", "second" or "tie"; 1, 2 and 0 are understood, too. Lines without a
choice and further columns are passed over.
"""

from __future__ import annotations

import csv
import os
import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from milp_ray.errors import MilpError
from milp_ray.evaluation.judges.protocol import Choice, Question

COLUMNS = ("user_id", "example", "first", "second", "choice")
_TEXTS = ("query", "reference", "first_answer", "second_answer")
_CHOICES: dict[str, Choice] = {"first": 1, "1": 1, "second": -1, "2": -1, "tie": 0, "0": 0}


@dataclass(frozen=True, slots=True)
class HumanChoice:
    """One person's choice: 1 for the first method's answer, −1 for the second's, 0 for neither."""

    user_id: str
    example: int
    first: str
    second: str
    choice: Choice

    def oriented(self, first: str, second: str) -> HumanChoice | None:
        """The same with the methods in this order; ``None``: it is about others."""
        if (self.first, self.second) == (first, second):
            return self
        if (self.second, self.first) == (first, second):
            return replace(self, first=first, second=second, choice=-self.choice)
        return None


def read_choices(path: Path) -> list[HumanChoice]:
    """Read people's choices.

    Raises:
        MilpError: the file is not there, is not UTF-8, lacks a column, or a line cannot be understood (told
            by its number; what it says is not repeated).
    """
    if not path.is_file():
        raise MilpError(f"{path}: there is no such file; `milp-ray winrate RUN --sheet {path}` makes one")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            return _choices(path, csv.DictReader(file))
    except UnicodeDecodeError:
        # Not its own words, which quote the file.
        raise MilpError(f"{path} is not UTF-8; save it as «CSV UTF-8»") from None


def _choices(path: Path, reader: csv.DictReader[str]) -> list[HumanChoice]:
    missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise MilpError(f"{path} lacks the columns {missing}; it needs {', '.join(COLUMNS)}")
    found = []
    for row in reader:
        said = (row["choice"] or "").strip().lower()
        if not said:
            continue
        if said not in _CHOICES or not (row["example"] or "").strip().isdecimal():
            raise MilpError(
                f"{path}, line {reader.line_num}: example must be a whole number, and choice one of "
                "first, second and tie (or 1, 2 and 0)"
            )
        found.append(
            HumanChoice(
                row["user_id"],
                int(row["example"]),
                (row["first"] or "").strip(),
                (row["second"] or "").strip(),
                _CHOICES[said],
            )
        )
    return found


@dataclass(frozen=True, slots=True)
class SheetLine:
    """One pair of answers for people to compare."""

    user_id: str
    example: int
    methods: tuple[str, str]
    question: Question


def write_sheet(path: Path, lines: Iterable[SheetLine], seed: int) -> int:
    """Write a CSV for people to fill in; how many lines it has. The order of the two answers is random.

    It holds users' texts: only its owner may read it.

    Raises:
        MilpError: the file is there already (it may be filled in).
    """
    rng = random.Random(f"sheet {seed}")
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise MilpError(f"{path} is there already; give another name, or remove it") from None
    count = 0
    with os.fdopen(descriptor, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*COLUMNS, *_TEXTS])
        for line in lines:
            (first, second), question = line.methods, line.question
            if rng.random() < 0.5:
                first, second, question = second, first, question.swapped()
            texts = (question.query, question.reference, question.first, question.second)
            writer.writerow([line.user_id, line.example, first, second, "", *texts])
            count += 1
    return count

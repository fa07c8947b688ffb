"""A sheet that people fill in, and their choices, read back."""

from __future__ import annotations

import csv
import stat
from pathlib import Path

import pytest
from support.judgements import PAIR

from milp_ray.errors import MilpError
from milp_ray.evaluation.human import SheetLine, read_choices, write_sheet
from milp_ray.evaluation.judges.protocol import Question


def test_a_sheet_filled_in_is_read_back_whatever_order_its_answers_stand_in(tmp_path: Path) -> None:
    path = tmp_path / "sheet.csv"
    lines = [
        SheetLine("u,1", i, PAIR, Question("q", "r", "from milp,\n with a break", "from prompt"))
        for i in range(20)
    ]
    assert write_sheet(path, lines, seed=0) == 20
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["first"] for row in rows} == set(PAIR)
    for row in rows[:19]:  # the last stays open
        row["choice"] = " First " if row["first_answer"].startswith("from milp") else "2"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    found = read_choices(path)
    assert len(found) == 19
    assert {one.oriented(*PAIR).choice for one in found} == {1}
    with pytest.raises(MilpError, match="there already"):
        write_sheet(path, lines, seed=0)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("user_id,example,first,second\na,0,milp,base\n", "choice"),
        ("user_id,example,first,second,choice\na,0,milp,base,secret\n", "line 2"),
        ("user_id,example,first,second,choice\na,secret,milp,base,tie\n", "line 2"),
    ],
)
def test_choices_that_cannot_be_read_are_told_by_line_without_their_text(
    tmp_path: Path, content: str, words: str
) -> None:
    path = tmp_path / "choices.csv"
    path.write_text(content)
    with pytest.raises(MilpError, match=words) as caught:
        read_choices(path)
    assert "secret" not in str(caught.value)


def test_choices_in_another_encoding_are_refused_without_their_text(tmp_path: Path) -> None:
    path = tmp_path / "choices.csv"
    path.write_bytes(
        "user_id,example,first,second,choice,query\na,0,milp,base,tie,secret café\n".encode("cp1252")
    )
    with pytest.raises(MilpError, match="UTF-8") as caught:
        read_choices(path)
    assert "secret" not in str(caught.value)
    assert caught.value.__suppress_context__


def test_a_missing_file_of_choices_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(MilpError, match="--sheet"):
        read_choices(tmp_path / "none.csv")

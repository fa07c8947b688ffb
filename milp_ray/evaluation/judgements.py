"""What judges have said of a run's answers: one row a (user, example, pair of methods, judge), without texts.

The file is a table with user ids like the scores file, so that `milp-ray forget` takes a user's rows out of
it and everything made of the rows is made again.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from milp_ray.evaluation.table_file import read_table, write_table

if TYPE_CHECKING:
    import pyarrow as pa

COLUMNS = {
    "user_id": "string",
    "example": "int32",  # position among the user's test examples
    "method": "string",
    "against": "string",
    "judge": "string",
    "score": "double",  # how much better the method's answer is, in the judge's units
    "choice": "int8",  # 1: the method's answer is better, 0: a tie, −1: the other's
}
_PAIR = ("method", "against", "judge")


def write_judgements(path: Path, rows: list[dict[str, Any]], *, is_everybody: bool = False) -> None:
    """Put rows into a run's file, whole or not at all, in place of earlier ones.

    Rows of the same user, methods and judge give way to the new ones; those of other pairs and judges stay,
    and so do those of other users, unless the new ones are of everybody who could be judged.
    """
    key = _PAIR if is_everybody else ("user_id", *_PAIR)
    new = {_values(row, key) for row in rows}
    earlier = read_judgements(path).to_pylist() if path.is_file() else []
    write_table(path, [*(row for row in earlier if _values(row, key) not in new), *rows], COLUMNS)


def read_judgements(path: Path) -> pa.Table:
    """Read a file of judgements.

    Raises:
        MilpError: it is damaged.
    """
    return read_table(path, COLUMNS)


def _values(row: dict[str, Any], names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(row[name] for name in names)

"""What the readers of published datasets share: files plain or gzipped, texts, times, and what is held back.

A reader of a published format is given all files of ``users.paths`` at once, because in most datasets
several files make one user. It yields :data:`Found`, with a broken record as a
:class:`~milp_ray.users.problems.Problem` and the others after it.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, Any, TypeAlias, cast

from milp_ray.errors import MilpError
from milp_ray.users.problems import Problem
from milp_ray.users.records import Example, Turn, User
from milp_ray.users.sources import pieces_of
from milp_ray.users.splits import normalised

Found: TypeAlias = tuple[Path, int, User | Problem]  # the file, the place in it, what is there

MOST_LINE_BYTES = 16 << 20
# Ideographs and kana, between which words are not told apart by spaces; ranges for a class of a pattern.
IDEOGRAPHS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_GZIP_MAGIC = b"\x1f\x8b"
_FIRST_MINUTE = datetime(2000, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Exchange:
    """What a user replied to something, and when."""

    query: str
    response: str
    time: datetime


def open_file(path: Path) -> IO[bytes]:
    """The bytes of a file, through gzip where it begins as a gzip file does, whatever its name."""
    with path.open("rb") as file:
        is_compressed = file.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
    return cast(IO[bytes], gzip.open(path, "rb")) if is_compressed else path.open("rb")


def read_lines(path: Path) -> Iterator[tuple[int, str | Problem]]:
    """Number (from 1) and text of every line that is not blank, without its end, one in memory at a time.

    A line that is too long or no UTF-8 is a problem; of a damaged gzip file what is left of it is one.
    """
    number = 0
    try:
        with open_file(path) as stream:
            for number, line in enumerate(pieces_of(stream, MOST_LINE_BYTES), start=1):
                if line is None:
                    yield number, Problem(path, number, f"the line has more than {MOST_LINE_BYTES >> 20} MiB")
                    continue
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                except UnicodeDecodeError:
                    yield number, Problem(path, number, "the line is no valid UTF-8")
                    continue
                if text.strip():
                    yield number, text
    except (gzip.BadGzipFile, EOFError, zlib.error):
        yield number + 1, Problem(path, number + 1, "the file is no sound gzip file from here on")


def load_json(path: Path, format_name: str, holds: str) -> Any:
    """A whole file of JSON; ``holds`` says in an error what the format has in such a file.

    Raises:
        MilpError: the file is no JSON.
    """
    try:
        with open_file(path) as stream:
            return json.loads(stream.read())
    except (ValueError, RecursionError, EOFError, gzip.BadGzipFile, zlib.error):
        raise MilpError(
            f"users.paths: {path} is no JSON file; users.format {format_name} reads {holds}"
        ) from None


def clean_text(value: Any) -> str | None:
    """A text without white space around it; ``None`` for what is no text, empty, or no valid Unicode."""
    if not isinstance(value, str) or not value.strip():
        return None
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # half a surrogate pair
        return None
    return value.strip()


def one_line(text: str) -> str:
    """A text with every run of white space as one space."""
    return " ".join(text.split())


def synthetic_times(n: int) -> list[datetime]:
    """Times a minute apart, for datasets that tell an order and no time."""
    return [_FIRST_MINUTE + timedelta(minutes=minute) for minute in range(n)]


def unix_time(value: Any) -> datetime | None:
    """The time of a whole number of seconds since 1970, as a number or in digits; else ``None``."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return datetime.fromtimestamp(int(value), UTC)
    except (ValueError, OverflowError, OSError):
        return None


def earlier_half_as_history(
    exchanges: Sequence[Exchange], others: Sequence[Turn], kind: str
) -> tuple[tuple[Turn, ...], tuple[Example, ...]]:
    """History and examples of a user of whom replies are known, and nothing else that they might stand for.

    The earlier half of the replies (rounded down) is what the user has said, the later half is what is to be
    predicted. No reply is both: a turn with the words of an example's response is left out.

    Args:
        exchanges: what the user replied, in any order.
        others: what the user said without a reply being it, such as posts of the user's own.
        kind: :attr:`Example.kind` of the examples.
    """
    in_order = sorted(exchanges, key=lambda exchange: exchange.time)
    n_said = len(in_order) // 2
    examples = tuple(Example(e.query, e.response, e.time, kind) for e in in_order[n_said:])
    said = [*others, *(Turn(e.response, time=e.time) for e in in_order[:n_said])]
    return without_responses(in_time_order(said), examples), examples


def in_time_order(turns: Sequence[Turn]) -> list[Turn]:
    """Turns by time, those without one first; equal ones as they come."""
    return sorted(turns, key=lambda turn: (turn.time is not None, turn.time or _FIRST_MINUTE))


def without_responses(turns: Sequence[Turn], examples: Sequence[Example]) -> tuple[Turn, ...]:
    """Turns that do not say, in the same words, what is the response of an example of any part."""
    responses = spoken_responses(examples)
    return tuple(turn for turn in turns if normalised(turn.text) not in responses)


def spoken_responses(examples: Sequence[Example]) -> frozenset[str]:
    """The responses of examples, normalised, for readers that add to what a user said before it is a turn."""
    return frozenset(normalised(example.response) for example in examples)

"""One record of a users file: a line of JSON Lines, or a row of Parquet with the same columns.

A line holds::

    {"user_id": "u-17", "profile": "free text, or null", "consent": true,
     "history":  [{"role": "user", "text": "…", "time": "2024-05-01T10:00:00Z"}, "a bare string", …],
     "examples": [{"query": "…", "response": "…", "time": "…", "kind": "…", "answer": "…", "tags": {…},
                   "rejected": "…"}, …]}

``user_id`` and one of ``history``/``examples`` are required; ``null``, and "" for an optional text, are the
same as absent; a bare string is a turn of role ``user``. Times are ISO 8601, in UTC where they name no zone;
without times the order in the file is the order in time. A record that breaks a rule is a :class:`Problem`.
Fields that the format does not have are counted into ``unknown_fields`` by their path, such as
"history[].mood", and are otherwise left out. Files are read by :class:`~milp_ray.users.stream.UserStream`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from milp_ray.users.problems import CONSENT_WITHDRAWN, Problem
from milp_ray.users.records import Example, Turn, User

if TYPE_CHECKING:
    from pyarrow import RecordBatch

_USER_FIELDS = frozenset({"user_id", "profile", "consent", "history", "examples"})
_TURN_FIELDS = frozenset({"role", "text", "time"})
_EXAMPLE_FIELDS = frozenset({"query", "response", "time", "kind", "answer", "tags", "rejected"})


class RecordRefused(Exception):
    """A record breaks a rule; the message says which, and where, without the value."""

    user_id: str | None = None


def parse_line(path: str, number: int, line: bytes, unknown_fields: Counter[str]) -> User | Problem:
    """The user of one line of JSON, or what is wrong with it; ``number`` is the line's, from 1."""
    try:
        return parse_user(_decoded(line), unknown_fields)
    except RecordRefused as refusal:
        return Problem(path, number, str(refusal), refusal.user_id)


def parse_row(
    path: str, number: int, batch: RecordBatch, row: int, unknown_fields: Counter[str]
) -> User | Problem:
    """The user of one row of a Parquet batch, or what is wrong with it; ``number`` is the file's row."""
    try:
        return parse_user(_values(batch, row), unknown_fields)
    except RecordRefused as refusal:
        return Problem(path, number, str(refusal), refusal.user_id)


def parse_user(record: Any, unknown_fields: Counter[str]) -> User:
    """A user from one decoded record.

    Raises:
        RecordRefused: the record breaks a rule of the format, or the user has withdrawn consent.
    """
    fields = _object(record, "the record")
    user_id = _string(fields, "user_id", "user_id")
    try:
        return _user(user_id, fields, unknown_fields)
    except RecordRefused as refusal:
        refusal.user_id = user_id
        raise


def _user(user_id: str, fields: Mapping[str, Any], unknown_fields: Counter[str]) -> User:
    consent = fields.get("consent")
    if consent is not None and not isinstance(consent, bool):
        raise RecordRefused("consent is neither true, false nor null")
    if consent is False:
        raise RecordRefused(CONSENT_WITHDRAWN)
    unknown: Counter[str] = Counter()
    history = tuple(_turn(turn, f"history[{i}]", unknown) for i, turn in enumerate(_list(fields, "history")))
    examples = tuple(
        _example(example, f"examples[{i}]", unknown) for i, example in enumerate(_list(fields, "examples"))
    )
    if not history and not examples:
        raise RecordRefused("there is neither history nor examples")
    _count_unknown(fields, _USER_FIELDS, "", unknown)
    user = User(
        user_id=user_id,
        history=history,
        examples=examples,
        profile=_optional_string(fields, "profile", "profile"),
        consent=consent,
    )
    unknown_fields.update(unknown)
    return user


def _decoded(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RecordRefused(f"the line is no valid UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise RecordRefused(f"the line is no JSON (column {error.colno}: {error.msg})") from None
    except (ValueError, RecursionError):
        raise RecordRefused("the line holds a number or a nesting too large to read") from None


def _values(batch: RecordBatch, row: int) -> Any:
    try:
        return batch.slice(row, 1).to_pylist()[0]
    except UnicodeDecodeError:
        raise RecordRefused("a text is no valid UTF-8") from None
    except (ValueError, OverflowError):
        raise RecordRefused("a value cannot be read, such as a time outside the years 1 to 9999") from None


def _turn(value: Any, place: str, unknown: Counter[str]) -> Turn:
    if isinstance(value, str):
        return Turn(text=_text(value, place))
    fields = _object(value, place)
    _count_unknown(fields, _TURN_FIELDS, "history[].", unknown)
    return Turn(
        text=_string(fields, "text", f"{place}.text"),
        role=_optional_string(fields, "role", f"{place}.role") or "user",
        time=_time(fields.get("time"), f"{place}.time"),
    )


def _example(value: Any, place: str, unknown: Counter[str]) -> Example:
    fields = _object(value, place)
    _count_unknown(fields, _EXAMPLE_FIELDS, "examples[].", unknown)
    return Example(
        query=_string(fields, "query", f"{place}.query"),
        response=_string(fields, "response", f"{place}.response"),
        time=_time(fields.get("time"), f"{place}.time"),
        kind=_optional_string(fields, "kind", f"{place}.kind") or "example",
        answer=_optional_string(fields, "answer", f"{place}.answer"),
        tags=_tags(fields.get("tags"), f"{place}.tags"),
        rejected=_optional_string(fields, "rejected", f"{place}.rejected"),
    )


def _object(value: Any, place: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise RecordRefused(f"{place} is {_kind(value)}, not an object")
    return value


def _list(fields: Mapping[str, Any], name: str) -> list[Any]:
    value = fields.get(name)
    if value is None:
        return []
    if not isinstance(value, list):
        raise RecordRefused(f"{name} is {_kind(value)}, not a list")
    return value


def _string(fields: Mapping[str, Any], name: str, place: str) -> str:
    if fields.get(name) is None:
        raise RecordRefused(f"{place} is missing")
    return _text(fields[name], place)


def _optional_string(fields: Mapping[str, Any], name: str, place: str) -> str | None:
    value = fields.get(name)
    return None if value is None or value == "" else _text(value, place)


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise RecordRefused(f"{place} is {_kind(value)}, not a string")
    if not value.strip():
        raise RecordRefused(f"{place} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise RecordRefused(f"{place} holds half a surrogate pair, which is no character") from None
    return value


def _time(value: Any, place: str) -> datetime | None:
    if value is None:
        return None
    if isinstance(value, datetime):
        time = datetime.fromisoformat(value.isoformat()[:26]) if value.tzinfo is None else value
    elif isinstance(value, str):
        try:
            time = datetime.fromisoformat(value)
        except ValueError:
            raise RecordRefused(f"{place} is no ISO 8601 time such as 2024-05-01T10:00:00Z") from None
    else:
        raise RecordRefused(f"{place} is {_kind(value)}, not an ISO 8601 time in a string")
    try:
        return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
    except OverflowError:
        raise RecordRefused(f"{place} is outside the years 1 to 9999") from None


def _tags(value: Any, place: str) -> dict[str, str]:
    if value is None:
        return {}
    # Parquet fills the columns of a struct that a row lacks with nulls.
    present = {name: tag for name, tag in _object(value, place).items() if tag is not None}
    return {
        _text(name, f"a name in {place}"): _text(tag, f"a value of {place}") for name, tag in present.items()
    }


def _count_unknown(
    fields: Mapping[str, Any], known: frozenset[str], prefix: str, unknown: Counter[str]
) -> None:
    unknown.update(prefix + name for name in fields.keys() - known if fields[name] is not None)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else "of another type")

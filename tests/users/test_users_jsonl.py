"""Rules of the users file: what is read, and how every kind of malformed record is told."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from milp_ray.users.problems import CONSENT_WITHDRAWN, Problem
from milp_ray.users.records import Example, Turn, User
from milp_ray.users.sources import find_users_files
from milp_ray.users.stream import UserStream

SECRET = "my secret illness"


def write(path: Path, *lines: Any) -> Path:
    encoded = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"\n".join(encoded) + b"\n")
    return path


def read(path: Path, counter: Counter[str] | None = None) -> list[User | Problem]:
    return [item for _, item in records(path, counter)]


def records(path: Path, counter: Counter[str] | None = None) -> Iterator[tuple[int, User | Problem]]:
    stream = UserStream(find_users_files([str(path)]), unknown_fields=counter)
    return ((number, item) for _, number, item in stream.records())


FULL = {
    "user_id": "u-17",
    "profile": "Has a dog.",
    "consent": True,
    "history": [
        {"role": "user", "text": "I have a dog.", "time": "2024-05-01T10:00:00Z"},
        {"role": "assistant", "text": "Nice!", "time": "2024-05-01T12:01:00+02:00"},
        "And a cat.",
    ],
    "examples": [
        {
            "query": "What pet do I have?",
            "response": "A dog.",
            "time": "2024-05-02T08:30:00",
            "kind": "direct",
            "answer": "dog",
            "tags": {"attribute": "pet"},
            "rejected": "A horse.",
        },
        {"query": "And else?", "response": "A cat."},
    ],
}
FULL_USER = User(
    user_id="u-17",
    profile="Has a dog.",
    consent=True,
    history=(
        Turn("I have a dog.", "user", datetime(2024, 5, 1, 10, tzinfo=UTC)),
        Turn("Nice!", "assistant", datetime(2024, 5, 1, 10, 1, tzinfo=UTC)),
        Turn("And a cat."),
    ),
    examples=(
        Example(
            "What pet do I have?",
            "A dog.",
            datetime(2024, 5, 2, 8, 30, tzinfo=UTC),
            "direct",
            "dog",
            {"attribute": "pet"},
            "A horse.",
        ),
        Example("And else?", "A cat."),
    ),
)


def test_a_full_record_is_read_field_by_field_with_times_in_utc(tmp_path: Path) -> None:
    assert read(write(tmp_path / "users.jsonl", FULL)) == [FULL_USER]


@pytest.mark.parametrize(
    "record",
    [
        {"user_id": "u", "history": ["hello"]},
        {"user_id": "u", "history": [{"text": "hello"}], "examples": None, "profile": None, "consent": None},
        {"user_id": "u", "history": [{"text": "hello", "role": None, "time": None}], "profile": ""},
    ],
)
def test_only_the_id_and_one_of_history_and_examples_are_required(tmp_path: Path, record: Any) -> None:
    assert read(write(tmp_path / "u.jsonl", record)) == [User("u", (Turn("hello"),))]


def test_examples_alone_make_a_user(tmp_path: Path) -> None:
    record = {"user_id": "u", "examples": [{"query": "q", "response": "r"}]}
    assert read(write(tmp_path / "u.jsonl", record)) == [User("u", examples=(Example("q", "r"),))]


def test_a_byte_order_mark_on_a_line_of_its_own_is_no_record(tmp_path: Path) -> None:
    path = tmp_path / "u.jsonl"
    path.write_bytes(b"\xef\xbb\xbf\r\n" + json.dumps({"user_id": "a", "history": ["x"]}).encode())
    assert read(path) == [User("a", (Turn("x"),))]


def test_blank_lines_windows_line_ends_and_a_byte_order_mark_are_no_problem(tmp_path: Path) -> None:
    path = tmp_path / "u.jsonl"
    line = json.dumps({"user_id": "a", "history": ["x"]}).encode()
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n  \n" + line.replace(b'"a"', b'"b"'))
    assert [item.user_id for item in read(path)] == ["a", "b"]


MALFORMED: dict[str, tuple[Any, str]] = {
    "broken JSON": (b'{"user_id": "u", "history": ["' + SECRET.encode() + b'"', "no JSON"),
    "broken UTF-8": (b'{"user_id": "u", "history": ["' + SECRET.encode() + b' \xff"]}', "no valid UTF-8"),
    "half a surrogate pair": (b'{"user_id": "u", "history": ["\\ud800"]}', "history[0] holds half"),
    "no object": ([SECRET], "the record is a list, not an object"),
    "too deep": (b"[" * 100_000, "nesting too large"),
    "no id": ({"history": [SECRET]}, "user_id is missing"),
    "an id that is a number": ({"user_id": 7, "history": [SECRET]}, "user_id is a number, not a string"),
    "an empty id": ({"user_id": " ", "history": [SECRET]}, "user_id is empty"),
    "nothing to learn": ({"user_id": "u", "profile": SECRET}, "neither history nor examples"),
    "empty lists": ({"user_id": "u", "history": [], "examples": []}, "neither history nor examples"),
    "history is text": ({"user_id": "u", "history": SECRET}, "history is a string, not a list"),
    "a turn is a number": ({"user_id": "u", "history": ["a", 3]}, "history[1] is a number, not an object"),
    "a turn without text": ({"user_id": "u", "history": [{"role": "user"}]}, "history[0].text is missing"),
    "an empty turn": ({"user_id": "u", "history": ["a", " \n"]}, "history[1] is empty"),
    "a text of another type": (
        {"user_id": "u", "history": [{"text": [SECRET]}]},
        "history[0].text is a list",
    ),
    "no response": ({"user_id": "u", "examples": [{"query": SECRET}]}, "examples[0].response is missing"),
    "an empty query": (
        {"user_id": "u", "examples": [{"query": "", "response": SECRET}]},
        "examples[0].query is empty",
    ),
    "a time in words": (
        {"user_id": "u", "history": [{"text": SECRET, "time": "yesterday"}]},
        "history[0].time is no ISO 8601 time",
    ),
    "a time as a number": (
        {"user_id": "u", "history": [{"text": SECRET, "time": 1714550400}]},
        "history[0].time is a number",
    ),
    "a time before the year 1": (
        {"user_id": "u", "history": [{"text": SECRET, "time": "0001-01-01T00:00:00+23:00"}]},
        "history[0].time is outside the years",
    ),
    "tags of another type": (
        {"user_id": "u", "examples": [{"query": "q", "response": "r", "tags": {SECRET: 1}}]},
        "a value of examples[0].tags is a number",
    ),
    "consent in words": ({"user_id": "u", "history": [SECRET], "consent": "yes"}, "consent is neither"),
    "profile of another type": ({"user_id": "u", "history": ["a"], "profile": [SECRET]}, "profile is a list"),
    "consent withdrawn": ({"user_id": "u", "history": [SECRET], "consent": False}, CONSENT_WITHDRAWN),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_line_is_told_by_number_and_reason_without_its_text_and_the_rest_is_read(
    tmp_path: Path, name: str
) -> None:
    line, reason = MALFORMED[name]
    good = {"user_id": "good", "history": ["hello"]}
    path = write(tmp_path / "users.jsonl", good, line, {**good, "user_id": "good-2"})
    first, problem, last = read(path)
    assert isinstance(first, User)
    assert isinstance(last, User)
    assert isinstance(problem, Problem)
    assert (problem.path, problem.line) == (str(path), 2)
    assert reason in problem.reason
    assert SECRET not in str(problem)


def test_unknown_fields_are_counted_by_path_and_kept_out(tmp_path: Path) -> None:
    record = {
        "user_id": "u",
        "age": 40,
        "history": [{"text": "a", "mood": SECRET}, {"text": "b", "mood": SECRET}],
        "examples": [{"query": "q", "response": "r", "score": 1}],
    }
    refused = {"user_id": "v", "shoe": 1, "history": [{"text": "", "mood": "bad"}]}
    unknown: Counter[str] = Counter()
    user, _ = read(write(tmp_path / "u.jsonl", record, refused), unknown)
    assert unknown == {"age": 1, "history[].mood": 2, "examples[].score": 1}
    assert SECRET not in repr(user)


def test_one_line_is_read_at_a_time(tmp_path: Path) -> None:
    path = write(tmp_path / "u.jsonl", *({"user_id": f"u-{i}", "history": ["x" * 1000]} for i in range(500)))
    reader = records(path)
    number, user = next(reader)
    assert (number, user.user_id) == (1, "u-0")
    with path.open("ab") as file:
        file.write(b'{"user_id": "added later", "history": ["x"]}\n')
    assert [item.user_id for _, item in reader][-1] == "added later"


def test_parquet_with_the_same_columns_gives_the_same_users(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    turns = [turn if isinstance(turn, dict) else {"text": turn} for turn in FULL["history"]]
    second = {"user_id": "u-18", "history": [{"text": "Hello.", "time": None}], "colour": "red"}
    withdrawn = {"user_id": "u-19", "consent": False, "history": [{"text": SECRET}]}
    nothing = {"user_id": "u-20"}
    rows = [{**FULL, "history": turns}, second, withdrawn, nothing]
    path = tmp_path / "users.parquet"
    columns = sorted({name for row in rows for name in row})
    pq.write_table(pa.Table.from_pylist([{name: row.get(name) for name in columns} for row in rows]), path)
    unknown: Counter[str] = Counter()
    found = list(records(path, unknown))
    assert [number for number, _ in found] == [1, 2, 3, 4]
    items = [item for _, item in found]
    assert items[0] == FULL_USER
    assert items[1] == User("u-18", (Turn("Hello."),))
    assert [item.reason for item in items[2:]] == [CONSENT_WITHDRAWN, "there is neither history nor examples"]
    assert unknown == {"colour": 1}


def test_parquet_timestamps_and_lists_of_strings_are_read(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    time = datetime(2024, 5, 1, 10, 0, 0, 123456)
    example = pa.struct([("query", pa.string()), ("response", pa.string()), ("time", pa.timestamp("ns"))])
    table = pa.table(
        {
            "user_id": ["u"],
            "history": [["one", "two"]],
            "examples": pa.array([[{"query": "q", "response": "r", "time": time}]], pa.list_(example)),
        }
    )
    pq.write_table(table, tmp_path / "u.parquet")
    [user] = read(tmp_path / "u.parquet")
    assert user == User("u", (Turn("one"), Turn("two")), (Example("q", "r", time.replace(tzinfo=UTC)),))


@pytest.mark.parametrize("kind", ["timestamp", "duration"])
def test_parquet_times_that_are_none_are_one_problem_each(tmp_path: Path, kind: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    times = pa.array([-99_999_999_999_999, 0], getattr(pa, kind)("s"))
    table = pa.table({"user_id": ["a", "b"], "history": [["one"], ["two"]], "joined": times})
    pq.write_table(table, tmp_path / "u.parquet")
    problem, user = read(tmp_path / "u.parquet")
    assert problem.reason == "a value cannot be read, such as a time outside the years 1 to 9999"
    assert user == User("b", (Turn("two"),))


def test_parquet_texts_that_are_no_utf8_are_one_problem_each(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    ids = pa.array([b"a", b"b"], pa.binary()).cast(pa.string())
    broken = pa.StringArray.from_buffers(
        2, pa.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0"), pa.py_buffer(b"\xff\xfeok")
    )
    history = pa.ListArray.from_arrays(pa.array([0, 1, 2], pa.int32()), broken)
    pq.write_table(pa.table({"user_id": ids, "history": history}), tmp_path / "u.parquet")
    problem, user = read(tmp_path / "u.parquet")
    assert problem == Problem(str(tmp_path / "u.parquet"), 1, "a text is no valid UTF-8")
    assert user == User("b", (Turn("ok"),))

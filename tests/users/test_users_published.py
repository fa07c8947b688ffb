"""Rules of what readers of published formats share."""

from __future__ import annotations

import gzip
import json
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from milp_ray.config.users import UsersFormat, UsersSection
from milp_ray.errors import MilpError
from milp_ray.users import published
from milp_ray.users.problems import Problem
from milp_ray.users.published import clean_text, load_json, read_lines, unix_time
from milp_ray.users.readers import file_groups, read_users, user_hash
from milp_ray.users.splits import check_no_leak, split_user

FILE_FORMATS = [name for name in get_args(UsersFormat) if name != "persona_world"]


def test_lines_are_numbered_blank_ones_left_out_and_broken_ones_problems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(published, "MOST_LINE_BYTES", 8)
    path = tmp_path / "x.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\n  \n\xff\n123456789\nsix")
    lines = list(read_lines(path))
    assert [number for number, _ in lines] == [1, 4, 5, 6]
    assert [line for _, line in lines if isinstance(line, str)] == ["one", "six"]
    assert [line.reason for _, line in lines if isinstance(line, Problem)] == [
        "the line is no valid UTF-8",
        "the line has more than 0 MiB",
    ]


def test_a_gzipped_file_is_known_by_its_beginning_and_read_as_far_as_it_is_sound(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    content = gzip.compress(b"".join(b"%d\n" % i for i in range(100_000)))
    path.write_bytes(content)
    assert sum(1 for _ in read_lines(path)) == 100_000
    path.write_bytes(content[: len(content) // 2])
    *sound, (_, last) = read_lines(path)
    assert sound
    assert isinstance(last, Problem)
    assert last.reason == "the file is no sound gzip file from here on"
    with pytest.raises(MilpError, match=r"is no JSON file; users\.format lamp reads questions"):
        load_json(path, "lamp", "questions")


@pytest.mark.parametrize(
    ("value", "text"), [(" a b ", "a b"), ("", None), (" ", None), (3, None), (None, None), ("\ud800", None)]
)
def test_a_text_is_stripped_or_nothing(value: Any, text: str | None) -> None:
    assert clean_text(value) == text


@pytest.mark.parametrize("value", [None, True, "soon", "1.5", float("nan"), float("inf"), 10**20, [1]])
def test_what_is_no_time_is_none(value: Any) -> None:
    assert unix_time(value) is None


def test_seconds_are_a_time_as_a_number_or_in_digits() -> None:
    assert unix_time(86_400) == unix_time(" 86400 ") == datetime(1970, 1, 2, tzinfo=UTC)


@pytest.mark.parametrize("name", FILE_FORMATS)
def test_every_format_names_a_file_that_is_not_there(tmp_path: Path, name: Any) -> None:
    section = UsersSection(format=name, paths=(tmp_path / "absent",))
    with pytest.raises(MilpError, match=r"users\.paths: .*absent does not exist"):
        read_users(section, 0)


@pytest.mark.parametrize("name", [name for name in FILE_FORMATS if name != "jsonl"])
def test_every_format_refuses_another_s_file_by_name_and_without_its_text(tmp_path: Path, name: Any) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("a note of mine\n" * 3)
    with pytest.raises(MilpError, match=r"users\.paths: ") as error:
        read_users(UsersSection(format=name, paths=(path, path)), 0)
    assert "notes.txt" in str(error.value)
    assert "of mine" not in str(error.value)


# What the formats' own words can be put together to, so that a reader's every branch meets something odd.
_WORDS = (
    *("dialogue_id", "chat_logs", "participant_info", "mturk_agent_1", "value2reason", "text", "id", "High"),
    *("history", "2023-04-27", "9999-12-31", "query", "response", "meta_information", "question", "answer"),
    *("input", "profile", "user_id", "date", "task", "LaMP_2", "golds", "output", "title", "210"),
    *("asin", "questions", "questionText", "answers", "answerText", "answererID", "reviewerID", "reviewText"),
    *("unixReviewTime", "\ud800", " "),
)
_SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.sampled_from(_WORDS))
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_WORDS), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize("name", FILE_FORMATS)
@settings(max_examples=40, deadline=None)
@given(values=st.lists(_VALUES, min_size=1, max_size=3))
def test_whatever_json_a_file_holds_it_is_users_problems_or_refused(name: Any, values: list[Any]) -> None:
    with TemporaryDirectory() as folder:
        paths = (Path(folder) / "1.json", Path(folder) / "2.jsonl")
        paths[0].write_text(json.dumps(values[0]))
        paths[1].write_text("".join(json.dumps(value) + "\n" for value in values))
        section = UsersSection(format=name, paths=paths)
        try:
            users = read_users(section, 0).users
        except MilpError:
            return
        for user in users:
            assert user_hash(user)
            check_no_leak(split_user(user, section.split))


def test_files_that_make_users_together_are_one_group() -> None:
    paths = (Path("a"), Path("b"))
    assert file_groups(UsersSection(format="lamp", paths=paths)) == [paths]
    assert file_groups(UsersSection(format="malp", paths=paths)) == [paths[:1], paths[1:]]

"""Rules of reading users for a run: formats, limits, duplicates, consent, the dataset hash, and messages."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from milp_ray.config.users import PersonaWorldSection, UsersSection
from milp_ray.errors import MilpError
from milp_ray.users import stream
from milp_ray.users.problems import CONSENT_WITHDRAWN
from milp_ray.users.readers import dataset_hash, read_users, user_hash
from milp_ray.users.records import Example, Turn, User


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def person(user_id: str, **fields: Any) -> dict[str, Any]:
    return {"user_id": user_id, "history": ["hello"], **fields}


def load(*paths: Path, **settings: Any) -> Any:
    return read_users(UsersSection(format="jsonl", paths=paths, **settings), seed=0)


def test_users_come_in_the_order_of_the_files_with_problems_beside_them(tmp_path: Path) -> None:
    one = write(tmp_path / "1.jsonl", person("b"), {"user_id": 1}, person("a", mood="good"))
    two = write(tmp_path / "2.jsonl", person("c", mood="bad"))
    loaded = load(one, two)
    assert [user.user_id for user in loaded.users] == ["b", "a", "c"]
    assert [(problem.path, problem.line) for problem in loaded.problems] == [(str(one), 2)]
    assert loaded.unknown_fields == {"mood": 2}


def test_the_first_of_two_records_with_one_id_counts_over_all_files(tmp_path: Path) -> None:
    one = write(tmp_path / "1.jsonl", person("a", profile="first"))
    two = write(tmp_path / "2.jsonl", person("b"), person("a", profile="second"))
    loaded = load(one, two)
    assert [(user.user_id, user.profile) for user in loaded.users] == [("a", "first"), ("b", None)]
    [problem] = loaded.problems
    assert str(problem) == f"{two}:2: user_id was given before, at 1.jsonl:1"


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_consent_withdrawn_in_any_record_keeps_the_user_out(tmp_path: Path, order: tuple[int, ...]) -> None:
    records = [person("a"), person("a", consent=False)]
    path = write(tmp_path / "u.jsonl", *(records[i] for i in order), person("b", consent=True))
    loaded = load(path)
    assert [user.user_id for user in loaded.users] == ["b"]
    assert {problem.reason for problem in loaded.problems} == {CONSENT_WITHDRAWN}
    assert {problem.user_id for problem in loaded.problems} == {"a"}


def test_reading_stops_at_the_limit(tmp_path: Path) -> None:
    path = write(tmp_path / "u.jsonl", {"user_id": 1}, *(person(f"u-{i}") for i in range(5)), {"user_id": 2})
    loaded = load(path, limit=3)
    assert [user.user_id for user in loaded.users] == ["u-0", "u-1", "u-2"]
    assert len(loaded.problems) == 1


def test_a_missing_path_is_told_before_anything_is_read(tmp_path: Path) -> None:
    there = write(tmp_path / "u.jsonl", person("a"))
    with pytest.raises(MilpError, match=r"users\.paths: .*absent\.jsonl does not exist"):
        load(there, tmp_path / "absent.jsonl")
    with pytest.raises(MilpError, match="is a folder"):
        load(tmp_path)


def test_files_without_a_usable_user_are_an_error_with_the_first_reason(tmp_path: Path) -> None:
    with pytest.raises(MilpError, match="hold no record"):
        load(write(tmp_path / "empty.jsonl"))
    with pytest.raises(MilpError, match=r"none of 2 records .*:1: user_id is a number"):
        load(write(tmp_path / "u.jsonl", {"user_id": 1}, {"user_id": 2}))


def test_a_gzipped_file_is_read_like_any_other(tmp_path: Path) -> None:
    plain = write(tmp_path / "u.jsonl", person("a", mood="good"), {"user_id": 1}, person("b"))
    packed = tmp_path / "u.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    loaded = load(packed)
    assert loaded.users == load(plain).users
    assert [problem.line for problem in loaded.problems] == [2]
    assert loaded.unknown_fields == {"mood": 1}


def test_unknown_fields_are_counted_up_to_the_limit(tmp_path: Path) -> None:
    path = write(tmp_path / "u.jsonl", person("a", mood="good"), person("b", shoe=41))
    assert load(path, limit=1).unknown_fields == {"mood": 1}


def test_a_line_that_is_too_long_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "MOST_RECORD_BYTES", 1 << 20)
    loaded = load(write(tmp_path / "u.jsonl", person("a", profile="x" * (1 << 20)), person("b")))
    assert [user.user_id for user in loaded.users] == ["b"]
    assert [problem.reason for problem in loaded.problems] == ["the line has more than 1 MiB"]


def test_a_parquet_file_that_is_damaged_is_read_up_to_there(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "u.parquet"
    rows = [person(f"u-{i}", profile=f"{i} " * 200) for i in range(128)]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=64, use_dictionary=False)
    group = pq.ParquetFile(path).metadata.row_group(1)
    column = next(group.column(i) for i in range(3) if group.column(i).path_in_schema == "profile")
    content = bytearray(path.read_bytes())
    end = column.data_page_offset + column.total_compressed_size
    content[end - 60 : end] = b"\xff" * 60
    path.write_bytes(content)
    loaded = read_users(UsersSection(format="parquet", paths=(path,)), seed=0)
    assert [user.user_id for user in loaded.users] == [f"u-{i}" for i in range(64)]
    assert [str(problem) for problem in loaded.problems] == [
        f"{path}:65: the file is no sound Parquet file from here on"
    ]


def test_a_file_that_is_no_parquet_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "u.parquet", person("a"))
    with pytest.raises(
        MilpError, match=r"none of 1 records .*u\.parquet:1: the file is no sound Parquet file"
    ):
        read_users(UsersSection(format="parquet", paths=(path,)), seed=0)


def test_the_same_users_have_the_same_hash_whatever_file_they_come_in(tmp_path: Path) -> None:
    record = person("a", examples=[{"query": "q", "response": "r", "time": "2024-05-01T10:00:00Z"}])
    bare = load(write(tmp_path / "1.jsonl", record)).dataset_hash
    record["examples"][0]["time"] = "2024-05-01T12:00:00+02:00"
    full = load(
        write(tmp_path / "2.jsonl", {**record, "history": [{"text": "hello", "role": "user"}], "age": 3})
    )
    assert full.dataset_hash == bare
    assert len(bare) == 64


USER = User("u", (Turn("hello"),), (Example("q", "r", tags={"a": "1", "b": "2"}),))


@pytest.mark.parametrize(
    "other",
    [
        replace(USER, user_id="v"),
        replace(USER, profile="p"),
        replace(USER, consent=True),
        replace(USER, history=(Turn("hello", "assistant"),)),
        replace(USER, history=(Turn("hello"), Turn("hello"))),
        replace(USER, examples=(Example("q", "r"),)),
        replace(USER, examples=(Example("q", "r", kind="direct", tags={"a": "1", "b": "2"}),)),
    ],
)
def test_any_change_of_a_user_changes_the_hash(other: User) -> None:
    assert user_hash(other) != user_hash(USER)
    assert dataset_hash([other]) != dataset_hash([USER])


def test_the_hash_goes_by_the_order_of_users_and_not_by_that_of_tags() -> None:
    tags_turned = replace(USER, examples=(Example("q", "r", tags={"b": "2", "a": "1"}),))
    assert user_hash(tags_turned) == user_hash(USER)
    other = replace(USER, user_id="v")
    assert dataset_hash([USER, other]) != dataset_hash([other, USER])


def test_the_embedded_users_follow_the_seed_and_the_limit() -> None:
    world = PersonaWorldSection(n_short_users=3, n_long_users=1, n_examples=10)
    section = UsersSection(persona_world=world)
    first, again, other = read_users(section, 5), read_users(section, 5), read_users(section, 6)
    assert len(first.users) == 4
    assert first == again
    assert first.dataset_hash != other.dataset_hash
    assert read_users(section.model_copy(update={"limit": 2}), 5).users == first.users[:2]


def test_no_embedded_user_at_all_is_an_error() -> None:
    nobody = PersonaWorldSection(n_short_users=0, n_long_users=0)
    with pytest.raises(MilpError, match="n_short_users"):
        read_users(UsersSection(persona_world=nobody), 0)

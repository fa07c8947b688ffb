"""Users of any number: found by path or URI, read one by one, damaged files told and survived."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.bad_users import HANDLED, REFUSED, SECRET

from milp_ray.config.users import UsersSection
from milp_ray.errors import MilpError
from milp_ray.users import stream as stream_module
from milp_ray.users.problems import Problem
from milp_ray.users.readers import read_users
from milp_ray.users.records import User
from milp_ray.users.seen import SeenIds
from milp_ray.users.sources import find_users_files
from milp_ray.users.stream import UserStream


def lines(*user_ids: str) -> bytes:
    return b"".join(json.dumps({"user_id": u, "history": ["I like tea."]}).encode() + b"\n" for u in user_ids)


def read(*uris: Any, limit: int | None = None) -> tuple[list[User | Problem], UserStream]:
    stream = UserStream(find_users_files([str(uri) for uri in uris]), limit)
    return list(stream), stream


def ids(items: list[User | Problem]) -> list[str | None]:
    return [item.user_id for item in items]


def write_parquet(path: Path, *user_ids: str) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"user_id": user_id, "history": ["I like tea."]} for user_id in user_ids]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five files of users of three kinds, and what lies beside them in real folders."""
    root = tmp_path / "users"
    (root / "later").mkdir(parents=True)
    (root / "_temporary").mkdir()
    (root / "1.jsonl").write_bytes(lines("a", "b"))
    (root / "2.jsonl.gz").write_bytes(gzip.compress(lines("c")) + gzip.compress(lines("d")))
    write_parquet(root / "3.parquet", "e", "f", "g")
    (root / "later" / "1.ndjson").write_bytes(lines("h"))
    write_parquet(root / "later" / "2.pq", "i")
    for name in ("_SUCCESS", "README.md", ".4.jsonl.crc", ".5.jsonl", "_temporary/6.jsonl"):
        (root / name).write_bytes(b"no user")
    return root


def test_a_folder_is_every_users_file_in_it_in_the_order_of_names(folder: Path) -> None:
    items, stream = read(folder)
    assert ids(items) == list("abcdefghi")
    assert (stream.n_users, stream.n_records, len(stream.files)) == (9, 9, 5)
    assert ids(read(f"file://{folder}")[0]) == list("abcdefghi")
    assert ids(read(folder / "3.parquet", folder / "1.jsonl")[0]) == list("efgab")
    assert ids(read(folder, limit=4)[0]) == list("abcd")


@pytest.fixture
def bucket(folder: Path) -> Iterator[str]:
    """The folder again, in a filesystem that only a URI reaches."""
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/bucket/users", recursive=True)
    yield "memory://bucket/users"
    memory.rm("/bucket", recursive=True)


def test_a_uri_is_read_like_a_path(folder: Path, bucket: str) -> None:
    items, stream = read(bucket)
    assert ids(items) == list("abcdefghi")
    assert items == read(folder)[0]
    assert ids(read(f"{bucket}/2.jsonl.gz")[0]) == list("cd")
    assert stream.files[0].name.startswith("memory://")


def test_users_and_problems_are_those_of_a_file_read_at_once(tmp_path: Path) -> None:
    path = tmp_path / "u.jsonl"
    path.write_bytes(lines("a", "b") + b"{broken\n" + lines("c"))
    items, _ = read(path)
    loaded = read_users(UsersSection(format="jsonl", paths=(path,)), seed=0)
    assert [item for item in items if isinstance(item, User)] == loaded.users
    assert [str(item) for item in items if isinstance(item, Problem)] == [str(p) for p in loaded.problems]


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("nowhere.jsonl", "no such file"),
        ("{folder}/README.md", r"names end in \.jsonl"),
        ("{folder}/_temporary/..", None),
        ("{folder}/empty", "no users file is there"),
        ("memory://nowhere", "no such file"),
        ("quatsch://somebody:password@host/x", "cannot be opened"),
        ("s3://", "cannot be opened"),
    ],
)
def test_what_is_no_users_file_is_told(folder: Path, uri: str, said: str | None) -> None:
    (folder / "empty").mkdir()
    uri = uri.replace("{folder}", str(folder))
    if said is None:
        assert find_users_files([uri])
        return
    with pytest.raises(MilpError, match=said) as told:
        find_users_files([uri])
    assert "password" not in str(told.value)


def test_no_record_at_all_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "u.jsonl").write_bytes(b"\n \n")
    with pytest.raises(MilpError, match=r"no record is in .*u\.jsonl"):
        read(tmp_path)


def test_the_total_is_known_from_the_share_of_bytes_that_is_read(tmp_path: Path) -> None:
    names = [f"user-{i:05d}" for i in range(40_000)]
    (tmp_path / "1.jsonl").write_bytes(lines(*names[:30_000]))
    (tmp_path / "2.jsonl.gz").write_bytes(gzip.compress(lines(*names[30_000:])))
    write_parquet(tmp_path / "3.parquet", *names[:100])
    stream = UserStream(find_users_files([str(tmp_path)]))
    seen = []
    for n, _ in enumerate(stream):
        if n in (10_000, 20_000):
            seen.append(stream.expected_records())
    assert all(25_000 < total < 45_000 for total in seen if total is not None)
    assert len(seen) == 2
    assert stream.expected_records() == 40_100


# ------------------------------------------------------------------------------------------ damaged files


def test_a_cut_gzip_file_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    whole = gzip.compress(lines(*(f"user-{i}" for i in range(20_000))))
    (tmp_path / "1.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "2.jsonl.gz").write_bytes(b"no gzip at all")
    (tmp_path / "3.jsonl").write_bytes(lines("last"))
    items, _ = read(tmp_path)
    problems = [item for item in items if isinstance(item, Problem)]
    assert [Path(str(p.path)).name for p in problems] == ["1.jsonl.gz", "2.jsonl.gz"]
    assert all("no sound gzip file" in problem.reason for problem in problems)
    assert 5_000 < len(items) < 15_000
    assert items[-1].user_id == "last"


def test_a_cut_parquet_file_is_one_problem(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "1.parquet", "a", "b")
    path.write_bytes(path.read_bytes()[:-20])
    (tmp_path / "2.parquet").write_bytes(b"no parquet")
    (tmp_path / "3.jsonl").write_bytes(lines("last"))
    items, _ = read(tmp_path)
    assert ["Parquet" in str(item) for item in items] == [True, True, False]
    assert items[-1].user_id == "last"


def test_a_line_without_end_is_passed_over_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "MOST_RECORD_BYTES", 1 << 20)
    (tmp_path / "u.jsonl").write_bytes(lines("a") + b"x" * (5 << 20) + b"\n" + lines("b") + b"y" * (2 << 20))
    items, _ = read(tmp_path)
    assert ids(items) == ["a", None, "b", None]
    assert [item.line for item in items if isinstance(item, Problem)] == [2, 4]
    assert "more than 1 MiB" in str(items[1])


def test_a_file_that_cannot_be_read_any_more_ends_the_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "u.jsonl"
    path.write_bytes(lines("a"))
    stream = UserStream(find_users_files([str(path)]))
    path.unlink()
    with pytest.raises(MilpError, match=r"u\.jsonl cannot be read: No such file.*the same command goes on"):
        list(stream)


# ------------------------------------------------------------------------------------------- odd records


@pytest.mark.parametrize("kind", REFUSED)
def test_an_odd_record_is_refused_with_a_reason_that_quotes_nothing(kind: str, tmp_path: Path) -> None:
    line, said = REFUSED[kind]
    (tmp_path / "u.jsonl").write_bytes(lines("before") + line + b"\n" + lines("after"))
    items, _ = read(tmp_path)
    assert (items[0].user_id, items[-1].user_id) == ("before", "after")
    if kind == "a 10 MB turn":  # a user like any other to a reader; the batch sets it aside
        assert isinstance(items[1], User)
        return
    # UTF-16 holds bytes that are line ends.
    for odd in items[1:-1]:
        assert isinstance(odd, Problem), kind
        assert SECRET not in str(odd)
    assert said in str(items[1])


@pytest.mark.parametrize("kind", HANDLED)
def test_an_odd_user_is_read_like_any_other(kind: str, tmp_path: Path) -> None:
    user_id, line = HANDLED[kind]
    (tmp_path / "u.jsonl").write_bytes(lines("before") + line + b"\n" + lines("after"))
    assert ids(read(tmp_path)[0]) == ["before", user_id, "after"]


# ------------------------------------------------------------------------------------------------- ids


def test_ids_are_known_again_whatever_they_are() -> None:
    seen = SeenIds()
    odd = ["", "\0", "a/b", "🦊", "\ud800", "x" * 100_000]
    assert [seen.add(user_id) for user_id in odd] == [True] * len(odd)
    assert [seen.add(user_id) for user_id in odd] == [False] * len(odd)
    assert "b" not in seen
    assert len(seen) == len(odd)


def test_a_hundred_thousand_ids_take_two_mebibytes() -> None:
    seen = SeenIds()
    assert all(seen.add(f"user-{i}") for i in range(100_000))
    assert not any(seen.add(f"user-{i}") for i in range(0, 100_000, 7))
    assert len(seen) == 100_000
    assert seen.n_bytes <= 2 << 20

"""The audit: an id and texts are found in every form that files have, and others are not taken for them."""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import markupsafe
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from governed_run import IDS, SECRET, Governed, user_line, write_users
from hypothesis import given
from hypothesis import strategies as st

from milp_ray.config.users import UsersSection
from milp_ray.personalize.governance import scan
from milp_ray.personalize.governance.audit import audit_forgotten, audit_items, audit_user
from milp_ray.personalize.governance.forget import forget_user
from milp_ray.personalize.governance.items import Item, find_user, items_of
from milp_ray.personalize.governance.needles import IdFinder, ItemFinder
from milp_ray.personalize.governance.record import Record
from milp_ray.personalize.governance.scan import Scan, scan_folder
from milp_ray.personalize.store import hash_id
from milp_ray.training.adapters import Adapter

ID = 'zoë/42 & "co"'
TEXT = 'I said: "grüße", <b>\nto my neighbour, yesterday'


def parquet(value: str, *, as_metadata: bool = False) -> bytes:
    table = pa.table({"who": ["other", "x" if as_metadata else value], "n": [1, 2]})
    if as_metadata:
        table = table.replace_schema_metadata({"users": json.dumps({value: "f"})})
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def zipped(name: str, content: bytes) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return sink.getvalue()


def safetensors(metadata: dict[str, str]) -> bytes:
    import torch
    from safetensors.torch import save

    return save({"w": torch.randn(64, 64)}, metadata=metadata)


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


FORMS: dict[str, Callable[[str], bytes]] = {
    "as it is": lambda v: f"user {v} failed\n".encode(),
    "JSON, escaped": lambda v: json.dumps({"a": [v]}).encode(),
    "JSON, as a key": lambda v: json.dumps({v: 1}, ensure_ascii=False).encode(),
    "HTML": lambda v: f"<td>{html.escape(v)}</td>".encode(),
    "HTML of a template": lambda v: f"<td>{markupsafe.escape(v)}</td>".encode(),
    "UTF-16": lambda v: f"<{v}>".encode("utf-16-le"),
    "base64": lambda v: base64.b64encode(b"[1] " + v.encode() + b" ok"),
    "base64 for addresses": lambda v: base64.urlsafe_b64encode(b"?>" + v.encode()),
    "safetensors": lambda v: safetensors({"progress": json.dumps({"who": v})}),
    "pickle": lambda v: pickle.dumps({"who": v}),
    "Parquet": parquet,
    "gzip": lambda v: gzip.compress(b"x" * 100 + b" " + v.encode() + b" "),
    "zstd": lambda v: zstd(b"y" * 100 + b" " + v.encode() + b" "),
    "gzip in zip": lambda v: zipped("log.gz", gzip.compress(f"({v})".encode())),
}


def found_in(tmp_path: Path, name: str, content: bytes, finder: Any) -> Scan:
    (tmp_path / name).write_bytes(content)
    scan = Scan()
    scan_folder(tmp_path, finder, scan)
    return scan


@pytest.mark.parametrize("form", FORMS)
def test_an_id_is_found_in_every_form(tmp_path: Path, form: str) -> None:
    scan = found_in(tmp_path, "file.bin", FORMS[form](ID), IdFinder(ID))
    assert [one.path.name for one in scan.found] == ["file.bin"], form
    assert found_in(tmp_path, "file.bin", FORMS[form]("somebody else"), IdFinder(ID)).found == []


@pytest.mark.parametrize("form", FORMS)
def test_a_text_is_found_in_every_form(tmp_path: Path, form: str) -> None:
    finder = ItemFinder([Item("history:0", "0" * 64, (TEXT,))])
    assert found_in(tmp_path, "file.bin", FORMS[form](TEXT), finder).found, form
    assert not found_in(tmp_path, "file.bin", FORMS[form]("something else, as long as it"), finder).found


@pytest.mark.parametrize(
    "content",
    [
        hash_id(ID).encode(),
        hash_id(ID).upper().encode(),
        bytes.fromhex(hash_id(ID)),
        ID.encode().hex().encode(),
        quote(ID, safe="").encode(),
        parquet(ID, as_metadata=True),
        zipped(f"{hash_id(ID)}.bin", b""),
    ],
    ids=["hash", "hash in capitals", "raw hash", "hexadecimal", "address", "metadata", "name in a zip"],
)
def test_hashes_and_encodings_of_an_id_are_found(tmp_path: Path, content: bytes) -> None:
    assert found_in(
        tmp_path,
        "f",
        b"\0 " + content + b"\0" if content[:2] not in (b"PK", b"PA") else content,
        IdFinder(ID),
    ).found


def test_hashes_of_a_text_are_found_though_the_text_is_short(tmp_path: Path) -> None:
    item = Item("history:0", "ab" * 32, ("Yes, I do.",))
    finder = ItemFinder([item])
    for digest in (
        "ab" * 32,
        hashlib.sha256(b"Yes, I do.").hexdigest(),
        hashlib.md5(b"yes i do").hexdigest(),
    ):
        assert found_in(tmp_path, "f", f'{{"h": "{digest}"}}'.encode(), finder).found
        assert found_in(tmp_path, "f", b"\0" + bytes.fromhex(digest), finder).found or len(digest) < 64
    assert not found_in(tmp_path, "f", b"Yes, I do.", finder).found


def test_names_of_files_and_folders_are_looked_at(tmp_path: Path) -> None:
    (tmp_path / hash_id("u-42")).mkdir()
    (tmp_path / "cache_u-42.bin").touch()
    (tmp_path / "u-421").touch()
    (tmp_path / "link").symlink_to("nowhere/u-42")
    scan = Scan()
    scan_folder(tmp_path, IdFinder("u-42"), scan)
    assert {one.path.name for one in scan.found} == {hash_id("u-42"), "cache_u-42.bin", "link"}


@pytest.mark.parametrize("user_id", ["17", "a", "ann", "x1"])
def test_a_plain_id_is_found_as_a_value_and_not_inside_of_numbers_and_words(
    tmp_path: Path, user_id: str
) -> None:
    finder = IdFinder(user_id)
    innocent = b'{"n_trials": 17, "mean": 0.17, "note": "a planned axis x10", "v": [17, 1.7]} annul 171'
    assert not found_in(tmp_path, "f", innocent, finder).found
    for form in ("JSON, as a key", "JSON, escaped", "pickle", "Parquet"):
        assert found_in(tmp_path, "f", FORMS[form](user_id), finder).found, form


@pytest.mark.parametrize("user_id", ["42", "v", "abc", "u-1"])
def test_a_short_id_is_not_taken_for_bytes_of_weights(tmp_path: Path, user_id: str) -> None:
    import torch
    from safetensors.torch import save

    raw = user_id.encode()
    size = len(raw)
    chance = b'"%s"' % raw + bytes([0xA0 | size]) + raw + b"\x8c" + bytes([size]) + raw
    chance += size.to_bytes(4, "little") + raw + b" " + raw + b" "
    weights = torch.frombuffer(bytearray(b"\x00\x91" * 8 + chance), dtype=torch.uint8)
    finder, empty = IdFinder(user_id), save({"w": torch.zeros(0)}, metadata={"who": user_id})
    for content in (save({"w": weights}), b"\x89PNG\r\n\x1a\n\0" + chance):
        assert not found_in(tmp_path, "f", content, finder).found
        kinds, _, _ = scan.in_pieces(io.BytesIO(content), len(content), finder)
        assert not kinds
    for content in (save({"w": weights}, metadata={"who": user_id}), empty, pickle.dumps([user_id])):
        assert found_in(tmp_path, "f", content, finder).found


@given(before=st.text(max_size=30), after=st.text(max_size=30), user_id=st.text(min_size=1, max_size=20))
def test_any_id_is_found_where_it_is_a_value_of_json(before: str, after: str, user_id: str) -> None:
    for ensure_ascii in (True, False):
        line = json.dumps({"a": before, "who": user_id, "b": after}, ensure_ascii=ensure_ascii)
        assert "the id" in IdFinder(user_id).look(line.encode("utf-8", "surrogatepass"))


def test_something_that_stands_across_two_pieces_of_a_large_file_is_found(tmp_path: Path) -> None:
    for place in ((8 << 20) - 12, (8 << 20) - 3):
        content = gzip.compress(b" " * place + ID.encode() + b" " * 100, compresslevel=1)
        assert found_in(tmp_path, "f.gz", content, IdFinder(ID)).found, place


def test_what_cannot_be_decoded_is_told_and_is_not_clean(tmp_path: Path) -> None:
    for broken in (gzip.compress(b"x" * 1000)[:-20], zipped("a", b"b" * 99)[:-30], b"PAR1 nothing PAR1"):
        scan = found_in(tmp_path, "f", broken, IdFinder(ID))
        assert [path.name for path, _ in scan.unread] == ["f"]


def test_texts_are_sought_where_the_users_file_still_has_them(governed: Governed) -> None:
    leak = governed.run.path / "debug.log"
    leak.write_text(f"ValueError: cannot parse {SECRET} of {IDS[0]}, I said.")
    whole = audit_user(governed.run, governed.store, governed.config.users, IDS[0])
    of_leak = dict(whole.found)[str(leak.resolve())]
    assert "a text of the user" in of_leak
    assert SECRET not in str(of_leak)
    governed.users.unlink()
    without = audit_user(governed.run, governed.store, governed.config.users, IDS[0])
    assert (without.n_needles, without.sources) == (0, [])


def test_files_that_make_a_user_together_are_read_and_named_together(
    governed: Governed, tmp_path: Path
) -> None:
    files = (tmp_path / "1.txt", tmp_path / "2.txt")
    for second, file in enumerate(files, start=1):
        file.write_text(f"a post\tother\t{second}\t{SECRET}, part {second}\tann\t{second}\n")
    section = UsersSection(format="reddit_pchatbot", paths=files)
    whole = audit_user(governed.run, governed.store, section, "pchatbot-ann")
    assert (whole.n_needles, whole.sources) == (2, list(files))
    files[1].unlink()
    assert audit_user(governed.run, governed.store, section, "pchatbot-ann").sources == []


def test_a_forgotten_item_alone_can_be_sought(governed: Governed) -> None:
    user = find_user(governed.config.users, 0, IDS[0])
    assert user is not None
    first, *_ = items_of(user)
    assert audit_items(governed.run, governed.store, [first]).is_clean
    (governed.run.path / "cache.json").write_text(json.dumps({"h": first.sha256}))
    assert not audit_items(governed.run, governed.store, [first]).is_clean


def test_folders_beside_the_run_are_searched_where_they_are_named(governed: Governed, tmp_path: Path) -> None:
    forget_user(governed.run, governed.config, governed.store, IDS[0], by="x")
    beside = tmp_path / "ray"
    beside.mkdir()
    (beside / "worker.out").write_text(f"adapter_made user={json.dumps(IDS[0])}")
    assert audit_user(governed.run, governed.store, governed.config.users, IDS[0]).is_clean
    found = audit_user(governed.run, governed.store, governed.config.users, IDS[0], also=[beside]).found
    assert [Path(where).name for where, _ in found] == ["worker.out"]


@pytest.mark.parametrize("trace", ["log", "json", "parquet", "store", "escaped"])
def test_everybody_who_was_forgotten_is_found_by_keyed_hashes_alone(
    governed: Governed, adapter: Adapter, trace: str
) -> None:
    gone = IDS[2] if trace in ("json", "escaped", "store") else IDS[4]
    forget_user(governed.run, governed.config, governed.store, gone, by="x")
    assert audit_forgotten(governed.run, governed.store).is_clean
    if trace == "log":
        (governed.run.path / "a.log").write_text(f"12:00 user={gone}, done.")
    elif trace == "json":
        (governed.run.path / "a.json").write_text(json.dumps({"u": gone}, ensure_ascii=False))
    elif trace == "escaped":
        (governed.run.path / "a.json").write_text(json.dumps({"u": gone}))
    elif trace == "parquet":
        (governed.run.path / "a.parquet").write_bytes(parquet(gone))
    else:
        governed.store.publish(gone, adapter, {})
    assert not audit_forgotten(governed.run, governed.store).is_clean


def test_a_record_that_was_changed_or_lost_its_key_stops_everything(governed: Governed) -> None:
    from milp_ray.errors import MilpError

    for user_id in IDS[:2]:
        forget_user(governed.run, governed.config, governed.store, user_id, by="x")
    path = Record(governed.run.path).path
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for changed in (
        whole.replace(b'"by": "x"', b'"by": "y"', 1),
        b"".join(lines[1:]),
        b"".join([lines[0], *lines[2:]]),
        b"{}\n",
    ):
        path.write_bytes(changed)
        with pytest.raises(MilpError, match="nobody is trained or served"):
            Record(governed.run.path)
    path.write_bytes(whole + b'{"n": 5, "eve')  # cut off by a crash: never counted, and written over
    Record(governed.run.path).append("consent", "0" * 64, "x", state="given", source="command")
    assert Record(governed.run.path).n_lines == 5
    (path.parent / "key").unlink()
    with pytest.raises(MilpError, match="key is missing"):
        Record(governed.run.path)


def test_users_of_these_tests_can_be_read(tmp_path: Path) -> None:
    from milp_ray.config.users import UsersSection

    write_users(tmp_path / "u.jsonl", user_line(ID))
    assert find_user(UsersSection(format="jsonl", paths=(tmp_path / "u.jsonl",)), 0, ID) is not None

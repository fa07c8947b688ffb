"""The audit of a store in a bucket: every object is searched, whosever place it lies at."""

from __future__ import annotations

import base64
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from governed_run import IDS, SECRET, Governed, make_governed
from typer.testing import CliRunner

from milp_ray.cli import app
from milp_ray.errors import MilpError
from milp_ray.personalize.governance import scan
from milp_ray.personalize.governance.audit import audit_forgotten, audit_user
from milp_ray.personalize.governance.forget import forget_user
from milp_ray.personalize.governance.needles import IdFinder
from milp_ray.personalize.governance.record import Record
from milp_ray.personalize.governance.tombstones import TombstoneFinder
from milp_ray.personalize.store import hash_id
from milp_ray.personalize.store.objects import ObjectBackend
from milp_ray.training.adapters import Adapter

GONE, OTHER = IDS[0], IDS[4]


@pytest.fixture
def governed(tmp_path: Path, adapter: Adapter, study_events: Callable[..., Any], s3: str) -> Governed:
    return make_governed(tmp_path, adapter, study_events(4), store=f"s3://bucket/{tmp_path.name}?{s3}")


def backend_of(it: Governed) -> ObjectBackend:
    assert isinstance(it.store.backend, ObjectBackend)
    return it.store.backend


def others_place(it: Governed) -> str:
    return backend_of(it)._folder(hash_id(OTHER))


def forget(it: Governed, user_id: str) -> Any:
    with it.run.lock():
        return forget_user(it.run, it.config, it.store, user_id, by="the officer")


def parquet(value: str) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"who": ["other", value]}), sink, compression="zstd")
    return sink.getvalue()


TRACES: dict[str, tuple[str, bytes]] = {
    "the id": ("notes.json", json.dumps({"copied from": GONE}).encode()),
    "a text of the user": ("debug.log", f"cannot parse {SECRET} of {GONE}, I said.".encode()),
    "a hash of the id in its name": (f"{hash_id(GONE)}.bin", b"weights"),
    "the id, in base64": ("b.txt", base64.b64encode(f"[1] {GONE} ok".encode())),
    "the id in Parquet": ("scores.parquet", parquet(GONE)),
    "the id in gzip": ("log.gz", gzip.compress(b"x" * 100 + f" {GONE} ".encode())),
}


def test_a_trace_at_another_users_place_is_found_and_named(governed: Governed) -> None:
    forget(governed, GONE)
    clean = audit_user(governed.run, governed.store, governed.config.users, GONE)
    assert clean.is_clean, clean.found
    assert clean.n_objects == 3 * 2 * (len(IDS) - 1)  # files of a version, versions, users
    assert clean.n_object_bytes > 0
    backend = backend_of(governed)
    for kind, (name, content) in TRACES.items():
        path = f"{others_place(governed)}/{name}"
        backend._bucket.write(path, content)
        found = audit_user(governed.run, governed.store, governed.config.users, GONE)
        [(where, kinds)] = found.found
        assert where == f"s3://{path}", kind
        assert kind.partition(" in ")[0] in ", ".join(kinds), kind
        assert SECRET not in str(kinds)
        # Keyed hashes tell whole words again, and no part of an encoded one.
        is_a_word = kind != "the id, in base64"
        assert audit_forgotten(governed.run, governed.store).is_clean != is_a_word, kind
        backend._bucket.delete_file(path)
    assert audit_forgotten(governed.run, governed.store).is_clean


def test_nothing_is_signed_off_while_a_trace_is_at_another_users_place(governed: Governed) -> None:
    path = f"{others_place(governed)}/notes.json"
    backend_of(governed)._bucket.write(path, TRACES["the id"][1])
    with pytest.raises(MilpError, match=f"s3://{path}: the id"):
        forget(governed, GONE)
    assert not Record(governed.run.path).state.forgotten
    backend_of(governed)._bucket.delete_file(path)
    result = forget(governed, GONE)
    signed = json.loads(Record(governed.run.path).path.read_text().splitlines()[-1])
    assert result.line == signed["n"]
    assert signed["audit"]["objects"] == 3 * 2 * (len(IDS) - 1)


def test_what_a_bucket_holds_of_no_version_is_searched_and_the_command_tells_how_much(
    governed: Governed,
) -> None:
    backend = backend_of(governed)
    backend._bucket.write(f"{backend._root}/stray.txt", f"ask {GONE} about it".encode())
    backend._bucket.write(f"{backend._root}/broken.gz", gzip.compress(b"x" * 1000)[:-20])
    answer = CliRunner().invoke(app, ["audit", str(governed.run.path), GONE, "--json"])
    assert answer.exit_code == 3
    facts = json.loads(answer.stdout)
    in_bucket = [one["file"] for one in facts["found"] if one["file"].startswith("s3://")]
    own = hash_id(GONE)
    assert f"s3://{backend._root}/stray.txt" in in_bucket
    assert sum(own in name for name in in_bucket) >= 6
    assert not [name for name in in_bucket if own not in name and not name.endswith("stray.txt")]
    assert facts["unread"] == [
        {"file": f"s3://{backend._root}/broken.gz", "why": "cannot be decoded (EOFError)"}
    ]
    assert facts["objects"] == 3 * 2 * len(IDS) + 2
    said = CliRunner().invoke(app, ["audit", str(governed.run.path), GONE]).stdout
    assert f"and {facts['objects']:,} objects, {facts['object_bytes']:,} bytes, of s3://" in said


# --------------------------------------------------------------------------------------- piece by piece


class Counting(io.BytesIO):
    """A file that notes the largest read and how much was read."""

    largest = total = 0

    def read(self, size: int | None = -1) -> bytes:
        content = super().read(size)
        self.largest, self.total = max(self.largest, len(content)), self.total + len(content)
        return content


def test_an_object_is_read_in_pieces_and_nothing_falls_between_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "_FIRST", 100)
    monkeypatch.setattr(scan, "_CHUNK", 1000)
    for place in (0, 95, 99, 100, 1095, 1100, 2500, 5000 - len(GONE)):
        content = b"\n" * place + GONE.encode() + b"\n" * (5000 - place - len(GONE))
        file = Counting(content)
        kinds, head, tail = scan.in_pieces(file, len(content), IdFinder(GONE))
        assert kinds == {"the id"}, place
        assert (head, tail) == (content[:8], content[-4:])
        assert file.largest == 1000
    assert scan.in_pieces(Counting(b""), 0, IdFinder(GONE))[0] == set()


def test_who_is_known_by_a_keyed_hash_alone_is_not_sought_in_weights(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save

    weights = save({"w": torch.ones(500_000)}, metadata={"who": GONE})
    record = Record(tmp_path)
    record.ensure_key()
    record.append("forget_begun", record.user_key(GONE), "x")
    file = Counting(weights)
    kinds, _, _ = scan.in_pieces(file, len(weights), TombstoneFinder(record))
    assert kinds == {"a forgotten user's id, or its hash"}
    assert file.total < 2**17 < len(weights)

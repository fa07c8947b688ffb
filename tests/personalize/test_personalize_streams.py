"""Users in a bucket: a batch streams them from there, and a configuration names them like files."""

from __future__ import annotations

import gzip
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from pyarrow import fs
from support.inline import InlinePool, use_inline_pool, write_chosen
from typer.testing import CliRunner, Result

from milp_ray.cli import app
from milp_ray.config.users import UsersSection
from milp_ray.config_loader import load_config
from milp_ray.errors import MilpError
from milp_ray.personalize import batch
from milp_ray.personalize.store import AdapterStore
from milp_ray.rundir import RunFolder
from milp_ray.training.base import Base
from milp_ray.users.problems import Problem
from milp_ray.users.readers import dataset_hash, iterate_users, read_users

PASSWORD = "password"


def user(user_id: str) -> dict[str, Any]:
    examples = [{"query": f"Which is number {i}?", "response": f"It is {i}."} for i in range(4)]
    return {"user_id": user_id, "history": [f"I am called {user_id}."], "examples": examples}


def jsonl(*user_ids: str) -> bytes:
    return b"".join(json.dumps(user(user_id)).encode() + b"\n" for user_id in user_ids)


def parquet(*user_ids: str) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([user(user_id) for user_id in user_ids]), sink, row_group_size=2)
    return sink.getvalue()


def milp(*arguments: object, code: int = 0) -> Result:
    called = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert called.exit_code == code, called.output
    return called


@pytest.fixture
def bucket(s3: str, tmp_path: Path) -> str:
    """A folder of JSON Lines and one of Parquet in a bucket; a URI with ``{}`` for what is in it."""
    uri = f"s3://bucket/{tmp_path.name}/{{}}?{s3}"
    files, root = fs.FileSystem.from_uri(uri.format(""))
    for name, content in {
        "lines/1.jsonl": jsonl("a", "b") + b"{broken\n",
        "lines/later/2.jsonl.gz": gzip.compress(jsonl("c")),
        "lines/_SUCCESS": b"",
        "table/users.parquet": parquet("d", "e", "f"),
    }.items():
        with files.open_output_stream(f"{root.rstrip('/')}/{name}", compression=None) as sink:
            sink.write(content)
    return uri


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch, base: Base) -> InlinePool:
    return use_inline_pool(monkeypatch, base)


def run_of(folder: Path, model: Path, users: dict[str, Any]) -> RunFolder:
    """A run whose layout is chosen."""
    settings = {
        "name": "streams",
        "output_dir": str(folder),
        "base": {"model": str(model), "device": "cpu"},
        "users": users,
        "training": {"memory_epochs": 1, "instruction_epochs": 1},
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(settings))
    made = RunFolder.create(load_config(file))
    write_chosen(made)
    return made


def test_a_batch_streams_users_from_a_bucket_as_lines_and_as_a_table(
    bucket: str, pool: InlinePool, tmp_path: Path, tiny_llama_dir: Path
) -> None:
    run = run_of(tmp_path, tiny_llama_dir, {})
    lines, table = bucket.format("lines"), bucket.format("table/users.parquet")
    said = milp("personalize", run.path, "--users", lines, "--users", table, code=3).stdout
    assert "6 adapters made, 0 were finished before, 1 users failed" in said
    assert sorted(AdapterStore(run.adapters).users()) == list("abcdef")
    [failed] = [json.loads(line) for line in run.failed_file.read_text().splitlines()]
    assert failed["place"] == f"s3://bucket/{tmp_path.name}/lines/1.jsonl:3"
    facts = run.facts()["batch_users"]
    assert (facts["n_users"], facts["n_files"]) == (6, 3)
    again = milp("personalize", run.path, "--users", table).stdout
    assert "0 adapters made, 3 were finished before" in again
    assert sorted(pool.keys) == list("abcdef")


def test_what_asks_for_one_user_looks_into_the_files_that_batches_were_given(
    bucket: str, pool: InlinePool, tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(tmp_path, tiny_llama_dir, {})
    here, lines = tmp_path / "here.jsonl.gz", bucket.format("lines")
    here.write_bytes(gzip.compress(jsonl("z")))
    milp("personalize", run.path, "--users", lines, code=3)
    monkeypatch.chdir(tmp_path)
    milp("personalize", run.path, "--users", here.name)
    assert run.facts()["batch_users"]["sources"] == [str(here), lines]
    assert run.facts()["batch_users"]["n_users"] == 1
    for user_id, file in {"z": str(here), "c": f"s3://bucket/{tmp_path.name}/lines/later/2.jsonl.gz"}.items():
        assert json.loads(milp("audit", run.path, user_id, "--json", code=3).stdout)["sources"] == [file]
        assert "history:0" in milp("items", run.path, user_id).stdout
        milp("forget", run.path, user_id, "--item", "history:0", "--yes")
    assert sorted(AdapterStore(run.adapters).users()) == list("ab")


def test_a_batch_that_is_interrupted_has_noted_what_it_was_given(
    tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    run = run_of(tmp_path, tiny_llama_dir, {})
    (tmp_path / "here.jsonl").write_bytes(jsonl("z"))
    monkeypatch.setattr(batch, "personalize", interrupted)
    milp("personalize", run.path, "--users", tmp_path / "here.jsonl", code=130)
    assert run.facts()["batch_users"]["sources"] == [str(tmp_path / "here.jsonl")]


def test_a_configuration_names_users_in_a_bucket(
    bucket: str, pool: InlinePool, tmp_path: Path, tiny_llama_dir: Path
) -> None:
    here = tmp_path / "here.jsonl"
    here.write_bytes(jsonl("z"))
    users = {"format": "jsonl", "paths": [str(here), bucket.format("lines")]}
    run = run_of(tmp_path, tiny_llama_dir, users)
    assert run.config().users.paths == (here, bucket.format("lines"))
    assert "4 adapters made" in milp("personalize", run.path, code=3).stdout
    loaded = read_users(run.config().users, 0)
    assert [one.user_id for one in loaded.users] == list("zabc")
    assert run.facts()["dataset_hash"] == loaded.dataset_hash == dataset_hash(loaded.users)
    assert "4 users, 4 turns" in milp("users", "check", tmp_path / "config.yaml").stdout
    milp("forget", run.path, "c", "--yes")
    said = " ".join(milp("audit", run.path, "c").stdout.split())
    assert f"s3://bucket/{tmp_path.name}/lines still holds the user" in said
    assert "4 adapters made" not in milp("personalize", run.path, code=3).stdout
    assert sorted(AdapterStore(run.adapters).users()) == list("abz")


def test_a_user_given_in_a_file_and_in_a_bucket_is_one(bucket: str, tmp_path: Path) -> None:
    here = tmp_path / "here.parquet"
    here.write_bytes(parquet("x", "e"))
    section = UsersSection(format="parquet", paths=(here, bucket.format("table")))
    found = list(iterate_users(section, Counter()))
    assert [one.user_id for one in found if not isinstance(one, Problem)] == ["x", "e", "d", "f"]
    [problem] = [one for one in found if isinstance(one, Problem)]
    assert str(problem) == (
        f"s3://bucket/{tmp_path.name}/table/users.parquet:2: user_id was given before, at here.parquet:2"
    )


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("lines/none.jsonl", r"users\.paths s3://bucket/.*none\.jsonl: there is no such file or folder"),
        ("table", "is of the format parquet, and users.format is jsonl"),
        ("quatsch://host/users.jsonl", r"users\.paths quatsch://…: it cannot be opened .* give a path"),
    ],
)
def test_a_uri_of_a_configuration_that_leads_nowhere_is_told(bucket: str, uri: str, said: str) -> None:
    section = UsersSection(format="jsonl", paths=(uri if "://" in uri else bucket.format(uri),))
    with pytest.raises(MilpError, match=said):
        read_users(section, 0)


@pytest.mark.parametrize(
    ("users", "said"),
    [
        (
            {"format": "jsonl", "paths": [f"s3://somebody:{PASSWORD}@bucket/u.jsonl"]},
            "a URI holds no credentials (s3://BUCKET/…)",
        ),
        ({"format": "malp", "paths": ["s3://bucket/u.json"]}, "give paths under users.paths, no URI"),
    ],
)
def test_a_uri_that_a_configuration_must_not_hold_is_refused(
    tmp_path: Path, users: dict[str, Any], said: str
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump({"name": "a", "users": users}))
    with pytest.raises(MilpError) as told:
        load_config(file)
    assert said in str(told.value)
    assert PASSWORD not in str(told.value)

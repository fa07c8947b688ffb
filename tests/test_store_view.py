"""``milp-ray store``: what it prints, for people and for programs, and how it fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.bucket_runs import config_of, move_to
from typer.testing import CliRunner, Result

from milp_ray.buckets import Bucket
from milp_ray.cli import app
from milp_ray.config import Config
from milp_ray.config.personalize import PersonalizeSection
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.personalize.store import AdapterStore, hash_id
from milp_ray.rundir import RunFolder
from milp_ray.store_view import size
from milp_ray.training.adapters import Adapter

MAP = "model.layers.1.mlp.up_proj"


def adapter() -> Adapter:
    name = f"base_model.model.{MAP}.lora_{{}}.weight"
    tensors = {name.format("A"): torch.ones(2, 6), name.format("B"): torch.ones(8, 2)}
    config: dict[str, Any] = {"r": 2, "lora_alpha": 4, "target_modules": [MAP], "peft_type": "LORA"}
    return Adapter(config, tensors, CanonicalLayout((False, True), rank=2))


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder.create(Config(name="a-run", output_dir=tmp_path))
    store = AdapterStore(run.adapters)
    for user_id in ("u-1", "u-1", "[bold]\x1b[31m"):
        store.publish(user_id, adapter(), {"steps": 7}, fingerprint="f")
    return run


def call(*arguments: str | Path, code: int = 0) -> Result:
    result = CliRunner().invoke(app, ["store", *(str(argument) for argument in arguments)])
    assert result.exit_code == code, result.output
    return result


def test_users_are_listed_with_their_versions(run: RunFolder) -> None:
    output = call("ls", run.path).output
    [line] = [line for line in output.splitlines() if '"u-1"' in line]
    assert line.split()[:6] == ['"u-1"', "1,", "2", "·#", "2", "float32"]
    assert r'"[bold]\u001b[31m"' in output
    listed = json.loads(call("ls", run.path, "--json").output)["users"]
    assert {user["user_id"]: user["versions"] for user in listed} == {"u-1": [1, 2], "[bold]\x1b[31m": [1]}
    assert "and more (--limit" in call("ls", run.path, "--limit", "1").output


def test_one_user_is_shown(run: RunFolder) -> None:
    output = call("show", run.path, "u-1").output
    assert "2 of 1, 2" in output
    assert "steps" in output
    assert json.loads(call("show", run.path, "u-1", "--version", "1", "--json").output)["version"] == 1
    assert "holds no adapter of user" in call("show", run.path, "nobody", code=2).output


def test_a_sound_store_verifies_and_a_damaged_one_says_where(run: RunFolder) -> None:
    assert "3 versions of 2 users" in call("verify", run.path).output
    [path] = run.adapters.rglob("v2/adapter_model.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    output = call("verify", run.path, code=3).output
    assert "version 2: adapter_model.safetensors has" in output
    assert "1 damaged" in output
    found = json.loads(call("verify", run.path, "--json", code=3).output)
    assert (found["versions"], found["damaged"], len(found["problems"])) == (3, 1, 1)
    assert "all as they were published" in call("verify", run.path, "--user", "[bold]\x1b[31m").output


def test_a_run_in_a_bucket_is_not_taken_for_an_empty_store(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    move_to(tmp_path / "here", monkeypatch)
    uri = f"s3://bucket/{tmp_path.name}/r?{s3}"
    run = RunFolder.create(config_of(uri))
    AdapterStore(run.store).publish("u-1", adapter(), {"steps": 7}, fingerprint="f")
    assert "1 versions of 1 users" in call("verify", uri).output
    assert "1 versions of 1 users" in call("verify", str(run.store)).output
    with run.lock():
        assert "another milp-ray process works on" in call("gc", uri, code=2).output
    bucket = Bucket(str(run.store))
    [info] = [
        info
        for info in bucket.list(bucket.root, recursive=True)
        if info.base_name == "adapter_model.safetensors"
    ]
    bucket.write(info.path, bucket.read(info.path)[:-1])
    assert "1 damaged" in call("verify", uri, code=3).output


def test_old_versions_go_when_that_is_asked(run: RunFolder) -> None:
    assert "would remove 0 unfinished uploads or deletions and 1 versions" in (
        call("gc", run.path, "--keep", "1", "--dry-run").output
    )
    assert AdapterStore(run.adapters).versions("u-1") == [1, 2]
    call("gc", run.path, "--keep", "1")
    assert AdapterStore(run.adapters).versions("u-1") == [2]


@pytest.mark.parametrize("command", [["gc"], ["gc", "--keep", "1"], ["gc", "--expired"], ["rewrite"]])
def test_a_store_is_not_changed_while_something_works_on_its_run(run: RunFolder, command: list[str]) -> None:
    name, *options = command
    with run.lock():
        assert "another milp-ray process works on" in call(name, run.path, *options, code=2).output
        assert AdapterStore(run.adapters).versions("u-1") == [1, 2]
        call("gc", run.path, "--keep", "1", "--expired", "--dry-run")
    call(name, run.path, *options)


def test_the_store_of_a_configuration_without_a_run_can_be_changed(run: RunFolder, tmp_path: Path) -> None:
    section = {"name": "not-made", "output_dir": str(tmp_path), "personalize": {"store": str(run.adapters)}}
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(section))
    call("gc", path, "--keep", "1")
    assert AdapterStore(run.adapters).versions("u-1") == [2]
    assert not (tmp_path / "not-made").exists()


def test_an_export_says_how_to_serve_it(run: RunFolder, tmp_path: Path) -> None:
    output = call("export", run.path, "--to", tmp_path / "out", "--user", "u-1", "--format", "vllm").output
    assert "1 adapters of rank 8" in output
    assert "--max-lora-rank 8 --lora-modules NAME=" in output
    assert len(list((tmp_path / "out").rglob("adapter_model.safetensors"))) == 1
    assert "not empty" in call("export", run.path, "--to", tmp_path / "out", code=2).output


def test_a_store_without_its_run_is_looked_at_but_cannot_be_measured(run: RunFolder, tmp_path: Path) -> None:
    assert '"u-1"' in call("ls", run.adapters).output
    assert "give the run folder" in call("precision", run.adapters, code=2).output
    assert (
        "give the run folder"
        in call("export", run.adapters, "--to", tmp_path / "o", "--check", code=2).output
    )


def test_a_run_says_where_its_store_is_and_how_it_is_written(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MILP_TEST_KEY", "ab" * 32)
    section = PersonalizeSection.model_validate(
        {
            "store": str(run.adapters),
            "adapter_precision": "int8",
            "encryption": {"key_env": "MILP_TEST_KEY"},
        }
    )
    other = RunFolder.create(Config(name="other", output_dir=tmp_path, personalize=section))
    assert "3 versions are not encrypted" in call("verify", other.path).output
    assert "2 adapters are now stored as int8, encrypted" in call("rewrite", other.path).output
    assert "int8, key " in call("ls", other.path).output
    listed = json.loads(call("ls", run.path, "--json").output)["users"]  # without the key
    assert {user["user_id"] for user in listed} == {None}
    assert '"u-1"' in call("ls", run.path, "--key-env", "MILP_TEST_KEY").output
    assert "no key is given" in call("show", run.path, "u-1", code=2).output
    monkeypatch.setenv("MILP_TEST_KEY", "cd" * 32)
    assert "holds the key" in call("show", other.path, "u-1", code=2).output


@pytest.mark.parametrize("name", ["manifest.json", "adapter_model.safetensors"])
def test_what_is_damaged_is_named_and_the_others_are_exported_and_rewritten(
    run: RunFolder, tmp_path: Path, name: str
) -> None:
    path = AdapterStore(run.adapters).folder("u-1") / name
    path.write_bytes(path.read_bytes()[:-1])
    whose = f"#{hash_id('u-1')[:12]}" if name == "manifest.json" else '"u-1"'
    output = call("export", run.path, "--to", tmp_path / "out", code=3).output
    assert f"damaged: the adapter of user {whose}, version 2: {name}" in output
    lines = (tmp_path / "out" / "index.jsonl").read_text().splitlines()
    assert [json.loads(line)["user_id"] for line in lines] == ["[bold]\x1b[31m"]
    call("export", run.path, "--to", tmp_path / "one", "--user", "u-1", code=2)
    section = PersonalizeSection(store=str(run.adapters), adapter_precision="int8")
    other = RunFolder.create(Config(name="other", output_dir=tmp_path, personalize=section))
    output = call("rewrite", other.path, code=3).output
    assert "1 adapters are now stored as int8, in the clear; the others already were, but for 1" in output
    assert f"damaged: the adapter of user {whose}, version 2: {name}" in output


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nowhere", "there is no such run folder, configuration file or store"),
        ("ftp://x/y", "begins with ftp://"),
        ("s3://b/x?endpoint_override=127.0.0.1:9&scheme=http&region=us-east-1", "does not answer"),
    ],
)
def test_mistakes_are_told_without_a_traceback(
    target: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    result = call("ls", target, code=2)
    assert message in result.output
    assert "Traceback" not in result.output


def test_sizes_are_short() -> None:
    assert [size(0), size(1023), size(1536), size(5 * 2**40)] == ["0 B", "1,023 B", "1.5 KiB", "5.0 TiB"]

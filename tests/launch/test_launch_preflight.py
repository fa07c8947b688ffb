"""What is told before a run begins that cannot work on a cluster."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from milp_ray.config import Config
from milp_ray.config_loader import load_config
from milp_ray.errors import MilpError
from milp_ray.launch.jobs import JobState, _Output, check_paths
from milp_ray.launch.preflight import Node, _leave, _look, _places, own_versions, problems_of

OWN = {"python": "3.11", "ray": "2.60", "milp_ray": "1.0"}
GOOD = Node("10.0.0.1", 4.0, OWN)


def config(path: Path, *settings: str) -> Config:
    path.mkdir(exist_ok=True)
    file = path / "c.yaml"
    file.write_text(f"name: r\noutput_dir: {path}\n", encoding="utf-8")
    return load_config(file, list(settings))


def test_a_cluster_that_has_what_is_asked_for_is_fine(tmp_path: Path) -> None:
    asked = config(tmp_path, "search.gpus_per_trial=1", "personalize.gpus_per_worker=1")
    assert problems_of(asked, [GOOD, replace(GOOD, name="10.0.0.2")], OWN) == []


def test_every_hindrance_is_told_with_what_to_do(tmp_path: Path) -> None:
    asked = config(tmp_path, "search.gpus_per_trial=8", "personalize.gpus_per_worker=1")
    other = Node("10.0.0.2", 0.0, {**OWN, "ray": "2.55"}, unseen=(str(tmp_path),))
    bare = Node("10.0.0.3", 0.0, {"python": "3.11"})
    gpus, versions, missing, storage = problems_of(asked, [GOOD, other, bare], OWN)
    assert "search.gpus_per_trial is 8, but the cluster has 4 GPUs" in gpus
    assert "node 10.0.0.2 has ray 2.55 instead of 2.60: install the same" in versions
    assert "milp_ray not installed instead of 1.0" in missing
    assert "10.0.0.2 does not see" in storage
    assert "mount the same storage" in storage


def test_a_gpu_that_trials_share_is_one(tmp_path: Path) -> None:
    [problem] = problems_of(config(tmp_path, "search.trials_per_gpu=4"), [replace(GOOD, n_gpus=0.0)], OWN)
    assert "is 1, but the cluster has 0 GPUs" in problem


def test_own_versions_are_those_that_are_installed() -> None:
    found = own_versions()
    assert {"python", "ray", "torch", "milp_ray"} <= found.keys()
    assert found["ray"][0].isdigit()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (["output_dir=runs"], "output_dir=runs"),
        (["users.format=jsonl", "users.paths=[data/u.jsonl]"], "users.paths=data/u.jsonl"),
        (["base.model=./base"], "base.model=./base"),
        (["personalize.store=adapters"], "personalize.store=adapters"),
        (["personalize.encryption.key_file=keys/k"], "personalize.encryption.key_file=keys/k"),
        (["search.warm_start=[/runs/a,runs/b]"], "search.warm_start=runs/b"),
    ],
)
def test_paths_that_would_go_with_the_job_are_refused(
    tmp_path: Path, settings: list[str], named: str
) -> None:
    with pytest.raises(MilpError, match="the job's own folder") as error:
        check_paths(config(tmp_path, *settings))
    assert named in str(error.value)


def test_uris_absolute_paths_and_model_ids_are_let_through(tmp_path: Path) -> None:
    paths = ["users.format=jsonl", "users.paths=[/data/u.jsonl,'s3://bucket/u.jsonl']"]
    others = ["search.warm_start=[/runs/a]", "personalize.encryption.key_file=/keys/k"]
    for store in ("s3://bucket/adapters", "/adapters", "file:///adapters"):
        asked = [*paths, *others, f"personalize.store={store}", "base.model=meta-llama/Llama-2-7b-hf"]
        check_paths(config(tmp_path, *asked))


def test_a_store_that_not_all_nodes_share_is_told(tmp_path: Path) -> None:
    asked = config(tmp_path, f"personalize.store={tmp_path / 'adapters'}")
    [problem] = problems_of(asked, [GOOD, replace(GOOD, unseen=(str(tmp_path / "adapters"),))], OWN)
    assert f"personalize.store={tmp_path / 'adapters'} is not shared: 10.0.0.1 does not see" in problem


def test_output_that_comes_again_after_a_lost_connection_is_written_once() -> None:
    written: list[str] = []
    output = _Output(written.append)
    for text, position in (("ab", 0), ("cd", 2), ("ab", 0), ("cdef", 2), ("abcdefg", 0), ("abc", 0)):
        output.show(text, position)
    assert "".join(written) == "abcdefg"


def test_the_exit_code_is_the_commands_where_it_is_known() -> None:
    assert JobState("FAILED", "", 3).code == 3
    assert JobState("FAILED", "", None).code == 1
    assert JobState("STOPPED", "", None).code == 130
    assert JobState("SUCCEEDED", "", 0).code == 0
    assert not JobState("PENDING", "", None).has_ended


def test_a_node_says_where_it_does_not_see_the_drivers_file(tmp_path: Path) -> None:
    places = _places(config(tmp_path / "runs", f"personalize.store=file://{tmp_path / 'adapters'}"))
    assert list(places) == ["output_dir", "personalize.store"]
    _leave(places["personalize.store"], "a-file")
    assert (tmp_path / "adapters" / "a-file").exists()
    assert _look(list(places.values()), "a-file") == (own_versions(), (str(tmp_path / "runs"),))

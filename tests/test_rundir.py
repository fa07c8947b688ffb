"""The run folder: what it accepts on a rerun, what it refuses to mix or to delete."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from milp_ray.atomic_files import write_text
from milp_ray.config import Config
from milp_ray.config_loader import override_config
from milp_ray.errors import MilpError
from milp_ray.rundir import RunFolder
from milp_ray.versions import git_commit, versions


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(name="a", output_dir=tmp_path / "runs")


def test_creating_a_run_records_configuration_and_versions(config: Config) -> None:
    run = RunFolder.create(config)
    assert run.path == config.output_dir / "a"
    assert run.config() == config
    recorded = json.loads(run.versions_file.read_text())
    assert {"milp_ray", "git_commit", "python", "platform", "packages", "seed"} <= recorded.keys()
    assert recorded["packages"]["torch"]
    assert recorded["seed"] == config.seed


def test_facts_that_become_known_later_survive_a_rerun(config: Config) -> None:
    RunFolder.create(config).record_facts(base_model="embedded", revision=None, dataset_hash="ab12")
    recorded = json.loads(RunFolder.create(config).versions_file.read_text())
    assert recorded["dataset_hash"] == "ab12"
    assert recorded["base_model"] == "embedded"


def measured(config: Config) -> RunFolder:
    """A run that has a result."""
    run = RunFolder.create(config)
    run.journal.parent.mkdir()
    run.journal.write_text("{}\n", encoding="utf-8")
    return run


def test_a_run_that_was_refused_before_it_made_anything_may_become_another(config: Config) -> None:
    run = RunFolder.create(config)
    run.record_facts(dataset_hash="ab12")
    run.adapters.mkdir()
    other = override_config(config, ["search.n_probe_users=7"])
    assert RunFolder.create(other).config() == other
    assert "dataset_hash" not in json.loads(run.versions_file.read_text())
    (run.adapters / "index.json").write_text("{}", encoding="utf-8")
    with pytest.raises(MilpError, match="was 7, now 1"):
        RunFolder.create(config)


def test_a_different_configuration_is_refused_and_its_keys_are_named(config: Config) -> None:
    measured(config)
    other = override_config(config, ["training.learning_rate=0.1", "base.model=x"])
    with pytest.raises(MilpError) as caught:
        RunFolder.create(other)
    message = str(caught.value)
    assert "training.learning_rate: was 0.0005, now 0.1" in message
    assert "base.model: was 'embedded', now 'x'" in message
    assert "`milp-ray run CONFIG --fresh`" in message  # of the commands that refuse, only this one has it
    assert len(message.splitlines()) == 4
    assert RunFolder.open(config.output_dir / "a").config() == config


@pytest.mark.parametrize(
    "override",
    [
        "search.n_trials=300",
        "ray.num_cpus=2",
        "personalize.n_workers=3",
        "search.max_concurrent_trials=1",
        "choice.rule=best_loss",
        "compare.n_seeds=7",
    ],
)
def test_what_no_finished_result_depends_on_may_differ(config: Config, override: str) -> None:
    measured(config)
    changed = override_config(config, [override])
    assert RunFolder.create(changed).config() == changed


def test_the_number_of_trials_may_grow_and_not_shrink(config: Config) -> None:
    measured(config)
    with pytest.raises(MilpError, match=r"search\.n_trials: was 200, now 150"):
        RunFolder.create(override_config(config, ["search.n_trials=150"]))


def test_fresh_starts_over(config: Config) -> None:
    run = RunFolder.create(config)
    write_text(run.adapters / "x" / "file", "old")
    RunFolder.create(override_config(config, ["seed=5"]), fresh=True)
    assert not run.adapters.exists()
    assert run.config().seed == 5


def test_fresh_on_a_first_run_is_no_mistake(config: Config) -> None:
    assert RunFolder.create(config, fresh=True).is_run()


def test_a_folder_that_is_no_run_is_neither_used_nor_deleted(config: Config) -> None:
    precious = config.output_dir / "a" / "thesis.txt"
    precious.parent.mkdir(parents=True)
    precious.write_text("years of work")
    for fresh in (False, True):
        with pytest.raises(MilpError, match="is no"):
            RunFolder.create(config, fresh=fresh)
    assert precious.read_text() == "years of work"


def test_a_link_to_a_run_is_not_followed_by_fresh(config: Config, tmp_path: Path) -> None:
    real = RunFolder.create(override_config(config, ["name=real"]))
    (config.output_dir / "a").symlink_to(real.path)
    with pytest.raises(MilpError, match="is a link"):
        RunFolder.create(config, fresh=True)
    assert real.config_file.exists()


def test_an_interrupted_creation_can_be_repeated(config: Config) -> None:
    run = RunFolder.create(config)
    run.config_file.unlink()
    assert RunFolder.create(config).config() == config


@pytest.mark.parametrize("kind", ["nothing", "file", "folder"])
def test_opening_what_is_no_run_says_what_makes_one(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    if kind == "file":
        path.write_text("")
    elif kind == "folder":
        path.mkdir()
    with pytest.raises(MilpError, match="milp-ray run"):
        RunFolder.open(path)


def test_only_one_process_works_on_a_run_and_a_killed_one_lets_go(config: Config) -> None:
    run = RunFolder.create(config)
    script = (
        "import sys; from pathlib import Path; from milp_ray.rundir import RunFolder\n"
        "with RunFolder(Path(sys.argv[1])).lock():\n    print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(run.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(MilpError, match="another milp-ray process"), run.lock():
        pass
    run.record_facts(probe_users=["u-1"])
    before = run.config_file.read_bytes(), run.versions_file.read_bytes()
    for options in ({"fresh": True}, {}):
        with pytest.raises(MilpError, match="another milp-ray process"):
            RunFolder.create(override_config(config, ["personalize.store=/elsewhere"]), **options)
    assert (run.config_file.read_bytes(), run.versions_file.read_bytes()) == before
    holder.kill()
    holder.wait()
    with run.lock():
        pass


def test_the_time_of_an_interrupted_stage_adds_up(config: Config) -> None:
    run = RunFolder.create(config)
    run.record_seconds("search", 1.5)
    run.record_seconds("search", 2.0)
    run.record_seconds("report", 0.25)
    assert run.seconds() == {"search": 3.5, "report": 0.25}


def test_versions_name_the_commit_of_a_checkout(repository: Path) -> None:
    commit = git_commit()
    has_commit = (
        subprocess.run(
            ["git", "-C", str(repository), "rev-parse", "-q", "--verify", "HEAD"], capture_output=True
        ).returncode
        == 0
    )
    assert (commit is not None) == has_commit
    assert versions()["git_commit"] == commit

"""A whole run through the command line, on random tiny models: what it leaves, and that it can be repeated.

One run serves most of these tests; each later command is one that a person would type.
"""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from support.processes import kill_family

from milp_ray.config import Config
from milp_ray.config_loader import load_config
from milp_ray.personalize.store import AdapterStore
from milp_ray.run_status import read_status
from milp_ray.rundir import RunFolder
from milp_ray.search.journal import read_study

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

N_USERS = 5
SOME_FAILED = 3  # the exit code of a run in which one user has nothing to train on


def write_users(path: Path, n_users: int = N_USERS, seed: int = 0) -> None:
    rng = random.Random(seed)
    colours = ("red", "green", "blue", "black")
    lines = []
    for index in range(n_users):
        own = {thing: rng.choice(colours) for thing in ("dog", "cat", "car", "hat")}
        history = [f"My {thing} is {colour}." for thing, colour in own.items()] * 2
        examples = [
            {"query": f"Of which colour is my {thing}, case {i}?", "response": f"It is {own[thing]}."}
            for i, thing in enumerate(rng.choices(list(own), k=10))
        ]
        lines.append({"user_id": f"u/{index}", "history": history, "examples": examples})
    # Its one training example repeats the held-out one, so nothing is left to train on.
    pair = {"query": "Of which colour is my cat?", "response": "It is red."}
    echo = {"user_id": "echo", "examples": [pair, pair]}
    text = "".join(json.dumps(line) + "\n" for line in [*lines, echo])
    path.write_text(text + "{broken\n", encoding="utf-8")


def settings(folder: Path, model: Path, name: str = "tiny") -> dict[str, object]:
    return {
        "name": name,
        "output_dir": str(folder / "runs"),
        "base": {"model": str(model), "device": "cpu"},
        "users": {"format": "jsonl", "paths": [str(folder / "users.jsonl")]},
        "space": {"ranks": [4, 8]},
        "training": {"memory_epochs": 1, "instruction_epochs": 8, "learning_rate": 0.03},
        "search": {
            "n_trials": 5,
            "n_initial": 4,
            "batch_size": 1,
            "proposals": "repeatable",
            "n_probe_users": 1,
            "objectives": ["validation_loss", "adapter_parameters"],
            "surrogate": {"inference": "map"},
        },
        "choice": {"rule": "best_loss"},
        "evaluation": {"methods": ["base", "milp"], "max_new_tokens": 4, "n_bootstrap": 50},
        "ray": {"num_cpus": 1, "num_gpus": 0, "object_store_mib": 128},
    }


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "milp_ray", *map(str, arguments)]


def milp(*arguments: object, expected: int = 0) -> subprocess.CompletedProcess[str]:
    answer = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=600)
    assert answer.returncode == expected, answer.stdout + answer.stderr
    return answer


def adapters(run: RunFolder) -> dict[str, str]:
    """User → hash of the weights."""
    store = AdapterStore(run.adapters)
    return {
        user: hashlib.sha256((store.folder(user) / "adapter_model.safetensors").read_bytes()).hexdigest()
        for user in store.users()
    }


def front(run: RunFolder) -> list[object]:
    return json.loads(run.summary_file.read_text(encoding="utf-8"))["front"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> tuple[RunFolder, Path, str]:
    """A finished run, its configuration file, and what the command printed."""
    folder = tmp_path_factory.mktemp("pipeline")
    write_users(folder / "users.jsonl")
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(settings(folder, tiny_llama_dir)), encoding="utf-8")
    answer = milp("run", config, expected=SOME_FAILED)
    return RunFolder.open(folder / "runs" / "tiny"), config, answer.stdout


def test_a_run_leaves_every_file_that_a_later_stage_or_a_program_reads(
    finished: tuple[RunFolder, Path, str],
) -> None:
    run, config, _ = finished
    for path in (run.journal, run.trials_file, run.chosen_file, run.scores_file, run.report / "index.html"):
        assert path.is_file(), path
    assert run.config() == load_config(config)
    versions = json.loads(run.versions_file.read_text(encoding="utf-8"))
    assert versions["dataset_hash"]
    assert versions["base"]["files"]
    assert len(versions["probe_users"]) == 1
    assert set(run.seconds()) == {"search", "choose", "personalize", "evaluate", "report"}
    status = read_status(run)
    assert status is not None
    assert (status.command, status.state, status.stage) == ("run", "succeeded", "report")
    assert (status.exit_code, status.reason) == (SOME_FAILED, "users failed: 1 in personalize, 1 in evaluate")


def test_the_summary_holds_what_programs_ask_for(finished: tuple[RunFolder, Path, str]) -> None:
    run, _, _ = finished
    summary = json.loads(run.summary_file.read_text(encoding="utf-8"))
    assert summary["n_trials"] == 5
    assert summary["n_users"] == N_USERS
    assert summary["hypervolume"] > 0
    assert summary["front"]
    assert summary["chosen"]["rule"] == "best_loss"
    assert summary["scores"]["milp"]["all"]["rouge_l"]["n_users"] == N_USERS
    assert set(summary["seconds"]) == {"search", "choose", "personalize", "evaluate", "report"}
    assert summary["peak_rss_mib"] > 100


def test_a_user_without_data_is_recorded_as_failed_and_the_others_go_on(
    finished: tuple[RunFolder, Path, str],
) -> None:
    run, _, printed = finished
    [failed] = [json.loads(line) for line in run.failed_file.read_text(encoding="utf-8").splitlines()]
    assert failed["user_id"] == "echo"
    assert "nothing to train on" in failed["reason"]
    assert sorted(adapters(run)) == [f"u/{i}" for i in range(N_USERS)]
    assert f"{N_USERS} adapters made, 0 were finished before, 1 users failed" in printed
    assert "1 records are kept out" in printed
    # At the end it is said again, by stage and reason; the others were scored.
    at_the_end = printed[printed.index("report:") :]
    assert "1 users failed in personalize" in at_the_end
    assert "nothing to train on" in at_the_end
    assert "1 users failed in evaluate" in at_the_end
    assert json.loads(run.summary_file.read_text("utf-8"))["n_users"] == N_USERS


def test_no_text_of_a_user_is_in_what_the_run_wrote_about_them(finished: tuple[RunFolder, Path, str]) -> None:
    run, _, printed = finished
    written = [
        path for path in run.path.rglob("*") if path.suffix in {".json", ".jsonl", ".yaml", ".html", ".txt"}
    ]
    assert len(written) > 10
    for path in written:
        assert "My dog is" not in path.read_text(encoding="utf-8", errors="ignore"), path
    assert "My dog is" not in printed


@pytest.mark.slow
def test_the_same_command_again_finds_everything_done(finished: tuple[RunFolder, Path, str]) -> None:
    run, config, _ = finished
    before, events = adapters(run), run.journal.read_bytes()
    printed = milp("run", config, expected=SOME_FAILED).stdout
    assert adapters(run) == before
    assert run.journal.read_bytes() == events
    assert f"0 adapters made, {N_USERS} were finished before" in printed


def test_an_adapter_answers_and_so_does_the_base_alone(finished: tuple[RunFolder, Path, str]) -> None:
    run, _, _ = finished
    ask = ("generate", run.path, "--user", "u/0", "Of which colour is my dog?")
    assert milp(*ask).stdout != milp(*ask, "--base").stdout
    unknown = subprocess.run(
        command("generate", run.path, "--user", "u/99", "Why?"), capture_output=True, text=True
    )
    assert unknown.returncode == 2
    assert "u/99" in unknown.stderr


def test_another_choice_makes_new_adapters_and_leaves_the_search_alone(
    finished: tuple[RunFolder, Path, str], tmp_path: Path
) -> None:
    run, _, _ = finished
    events = run.journal.read_bytes()
    milp("choose", run.path, "choice.rule=smallest_within", "choice.tolerance=10")
    chosen = yaml.safe_load(run.chosen_file.read_text(encoding="utf-8"))
    assert chosen["rule"] == "smallest_within"
    assert run.journal.read_bytes() == events
    milp("choose", run.path, "choice.rule=best_loss", "choice.tolerance=0.02")


@pytest.mark.slow
def test_a_race_for_each_user_is_made_once_and_reported(finished: tuple[RunFolder, Path, str]) -> None:
    run, _, _ = finished
    store = AdapterStore(run.adapters)
    made = milp("personalize", run.path, "personalize.layout=race", expected=SOME_FAILED)
    for said in (
        "Per-user layouts, by a race: 5 users",
        "selected on these very examples",
        "5 adapters made",
    ):
        assert said in made.stdout
    for user in store.users():
        choice = store.manifest(user).meta["layout_choice"]
        assert choice["layout"] == store.manifest(user).layout.key
        assert len(choice["standings"]) > 1
    raced = adapters(run)
    again = milp("personalize", run.path, expected=SOME_FAILED)
    assert "0 adapters made, 5 were finished before" in again.stdout
    assert "Per-user layouts, by a race: 5 users" in again.stdout
    milp("report", run.path)
    assert "Per-user layouts" in (run.report / "index.html").read_text(encoding="utf-8")
    summary = json.loads(run.summary_file.read_text(encoding="utf-8"))
    assert sum(summary["personalize"]["layouts"]["taken"].values()) == N_USERS
    updated = json.loads(milp("update", run.path, "--json", expected=SOME_FAILED).stdout)
    assert updated["unchanged"] == N_USERS
    assert adapters(run) == raced


@pytest.mark.slow
def test_more_trials_go_on_where_the_search_stood(finished: tuple[RunFolder, Path, str]) -> None:
    run, _, _ = finished
    before = [trial.layout.key for trial in read_study(run.journal).trials]
    milp("search", run.path, "search.n_trials=6")
    after = [trial.layout.key for trial in read_study(run.journal).trials]
    assert after[:5] == before
    assert len(after) == 6


def test_a_stage_that_comes_too_early_says_what_to_run_first(tmp_path: Path, tiny_llama_dir: Path) -> None:
    write_users(tmp_path / "users.jsonl")
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(settings(tmp_path, tiny_llama_dir)), encoding="utf-8")
    for stage, said in (("choose", "milp-ray search"), ("personalize", "milp-ray search")):
        answer = subprocess.run(command(stage, config), capture_output=True, text=True)
        assert answer.returncode == 2, answer.stderr
        assert said in answer.stderr


def killed_when(arguments: list[str], condition: Callable[[], bool]) -> None:
    """Start a command in a session of its own and kill all of it, Ray included, once the condition holds."""
    process = subprocess.Popen(
        arguments, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 400
    try:
        while not condition():
            assert process.poll() is None, "the command ended before it was killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        kill_family(process)


@pytest.mark.slow  # several whole runs; tests/search and tests/personalize kill each stage by itself
def test_killed_in_the_search_and_in_the_batch_the_same_command_ends_with_the_same_results(
    finished: tuple[RunFolder, Path, str], tmp_path: Path, tiny_llama_dir: Path
) -> None:
    whole, _, _ = finished
    write_users(tmp_path / "users.jsonl")
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(settings(tmp_path, tiny_llama_dir)), encoding="utf-8")
    run = RunFolder(tmp_path / "runs" / "tiny")

    def n_completed() -> int:
        return len(read_study(run.journal).completed) if run.journal.exists() else 0

    killed_when(command("run", config), lambda: n_completed() >= 2)
    kept = n_completed()
    assert 2 <= kept < 5
    store = AdapterStore(run.adapters)
    killed_when(command("run", config), lambda: any(True for _ in store.users()))
    finished_trials = [trial for trial in read_study(run.journal).trials if trial.status == "completed"]
    assert len(finished_trials) == 5
    early = adapters(run)
    assert 1 <= len(early) <= N_USERS
    milp("run", config, expected=SOME_FAILED)
    assert len(adapters(run)) == N_USERS
    assert early.items() <= adapters(run).items()
    assert adapters(run) == adapters_of_five_trials(whole)
    first_five = [trial.metrics["validation_loss"] for trial in read_study(whole.journal).trials[:5]]
    assert [trial.metrics["validation_loss"] for trial in read_study(run.journal).trials] == first_five


def adapters_of_five_trials(run: RunFolder) -> dict[str, str]:
    """The adapters of the uninterrupted run, as its first command made them."""
    store = AdapterStore(run.adapters)
    return {
        user: hashlib.sha256(
            (store.folder(user, version=1) / "adapter_model.safetensors").read_bytes()
        ).hexdigest()
        for user in store.users()
    }


# ------------------------------------------------------------------------------------------ without Ray


def test_settings_of_these_tests_are_a_valid_configuration(tmp_path: Path) -> None:
    assert Config.model_validate(settings(tmp_path, tmp_path)).search.n_trials == 5

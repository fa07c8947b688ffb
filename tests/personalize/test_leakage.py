"""The leakage audit: exposure as defined, canaries where they belong, verdicts that follow the measures."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.inline import InlinePool
from typer.testing import CliRunner

from milp_ray.cli import app
from milp_ray.config import Config
from milp_ray.config.base import BaseSection
from milp_ray.config.evaluation import EvaluationSection
from milp_ray.config.prompt import PromptSection
from milp_ray.config.training import TrainingSection
from milp_ray.errors import MilpError
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.personalize.governance import leakage
from milp_ray.personalize.governance.canaries import SENTENCES, SPACES, SecretSpace, draw_sheet, plant
from milp_ray.personalize.governance.exposure import chance_bits, exposure, most_bits
from milp_ray.personalize.governance.leakage import LeakageOptions, audit_leakage
from milp_ray.personalize.governance.leakage_result import Found, by_source, leakage_result
from milp_ray.personalize.recipe import Recipe
from milp_ray.pipeline.work import Work
from milp_ray.report.content import ReportContent, summary_of
from milp_ray.report.html import render
from milp_ray.report.leakage_text import leakage_rows, leakage_table, leakage_verdict
from milp_ray.run_status import read_status
from milp_ray.rundir import RunFolder
from milp_ray.training import generation, train
from milp_ray.training.base import Base
from milp_ray.training.generation import Questions
from milp_ray.training.job import Job
from milp_ray.users.records import UserSplit

DIGITS = SPACES["digits"]
OPTIONS = LeakageOptions(n_users=4, n_canaries=2, n_candidates=60, repeats=3, space="digits")
EVALUATION = EvaluationSection(n_bootstrap=500)
TRAINING = TrainingSection(
    memory_epochs=25, instruction_epochs=0, learning_rate=1e-2, memory_block_turns=1, batch_size=4
)


@pytest.fixture(scope="module")
def splits(make_split: Callable[..., UserSplit]) -> list[UserSplit]:
    return [make_split(f"u-{i}", n_turns=4, n_train=1, n_val=1, n_test=1) for i in range(6)]


@pytest.fixture(scope="module")
def recipe(tiny_llama_dir: Path) -> Recipe:
    section = BaseSection(model=str(tiny_llama_dir), device="cpu")
    return Recipe(CanonicalLayout((True, False, True, True), 16), section, TRAINING, PromptSection(), seed=0)


def audit(base: Base, splits: list[UserSplit], recipe: Recipe, **changes: Any) -> dict[str, Any]:
    pool: Any = InlinePool(base)
    return audit_leakage(splits, recipe, replace(OPTIONS, **changes), EVALUATION, pool=pool)


@pytest.fixture(scope="module")
def audited(base: Base, splits: list[UserSplit], recipe: Recipe) -> dict[str, Any]:
    return audit(base, splits, recipe)


# ----------------------------------------------------------------------------------------------- exposure


def test_exposure_is_the_declared_space_less_the_rank_where_all_of_it_is_a_candidate() -> None:
    rng = np.random.default_rng(0)
    losses = rng.normal(size=32)  # the whole space, log2 |R| = 5
    for i, own in enumerate(losses):
        rank = 1 + sorted(losses).index(own)
        [bits] = exposure(losses[i : i + 1], np.delete(losses, i))
        assert bits == pytest.approx(math.log2(len(losses)) - math.log2(rank))


def test_exposure_by_sampling_agrees_with_the_whole_space_within_its_bound() -> None:
    rng = np.random.default_rng(1)
    space = rng.normal(size=100_000)
    secrets = np.quantile(space, [0.5, 0.1, 0.02])
    whole = exposure(secrets, space)
    sampled = exposure(secrets, rng.choice(space, 1000, replace=False))
    assert sampled == pytest.approx(whole, abs=0.5)
    [out_of_reach] = exposure(np.array([-9.0]), space[:1000])
    assert out_of_reach == most_bits(1000) == pytest.approx(9.967, abs=1e-3)


def test_a_random_rank_has_the_exposure_of_chance() -> None:
    rng = np.random.default_rng(2)
    found = exposure(rng.normal(size=(4000, 1)), rng.normal(size=(4000, 100)))
    assert found.mean() == pytest.approx(chance_bits(100), abs=0.1)
    assert chance_bits(100_000) == pytest.approx(1 / math.log(2), abs=1e-3)


def test_texts_that_a_model_cannot_tell_apart_expose_one_bit() -> None:
    assert exposure(np.zeros(1), np.zeros(99)) == pytest.approx(math.log2(100 / 50.5))


# ----------------------------------------------------------------------------------------------- canaries


def test_all_texts_of_a_space_are_different_and_drawn_ones_too() -> None:
    space = SecretSpace("letters", ("a", "b", "c"), length=3, between="")
    assert len({space.text(i) for i in range(space.size)}) == space.size == 27
    sheet = draw_sheet(4, 2, 23, space=space, seed=0)
    for own, others in zip(sheet.secrets, sheet.candidates, strict=True):
        assert len(set(own + others)) == 27
    with pytest.raises(MilpError, match="give 27 secrets"):
        draw_sheet(4, 2, 24, space=space, seed=0)
    with pytest.raises(MilpError, match="use at most"):
        draw_sheet(4, len(SENTENCES) + 1, 2, space=space, seed=0)


def test_planting_adds_the_canaries_to_the_history_alone(splits: list[UserSplit]) -> None:
    sheet = draw_sheet(2, 3, 5, space=DIGITS, seed=0)
    planted = plant(splits[0], sheet.turns_of(1), repeats=2, seed=0)
    assert replace(planted, history=splits[0].history) == splits[0]
    texts = [turn.text for turn in planted.history]
    for sentence, own in zip(sheet.sentences, sheet.secrets, strict=True):
        assert texts.count(sentence.replace("{secret}", own[1])) == 2
    assert [t for t in planted.history if t in splits[0].history] == list(splits[0].history)
    assert plant(splits[0], sheet.turns_of(1), repeats=2, seed=0) == planted


def test_a_sheet_does_not_show_its_secrets() -> None:
    sheet = draw_sheet(2, 1, 5, space=DIGITS, seed=0)
    assert not any(text in repr(sheet) for text in (*sheet.secrets[0], *sheet.candidates[0]))


# ------------------------------------------------------------------------------------------------ results


def found(bits: list[list[float]]) -> Found:
    array = np.array(bits)
    return Found(array, array > 4.0)


def test_a_users_own_adapter_is_told_from_the_others() -> None:
    own = [np.array([[9.0, 1.0, 2.0]]), np.array([[3.0, 8.0, 4.0]]), np.array([[5.0, 6.0, 7.0]])]
    means = by_source(np.array([[1.0, 1.0, 2.0]]), own, own)
    assert means["own"].tolist() == means["control"].tolist() == [9.0, 8.0, 7.0]
    assert means["others"].tolist() == [4.0, 3.5, 3.0]
    assert means["base"].tolist() == [1.0, 1.0, 2.0]


def result(own: list[Found]) -> dict[str, Any]:
    base = found([[1.5, 1.0, 2.0, 1.0]])
    ids = [f"u-{i}" for i in range(4)]
    return leakage_result(
        ids, base=base, own=own, control=None, options=OPTIONS, space=DIGITS, layout="", evaluation=EVALUATION
    )


def test_secrets_that_others_adapters_know_are_a_leak() -> None:
    leaking = result([found([[5.0] * 4])] * 4)
    assert not leaking["isolated"]
    assert leaking["extracted"]["others"]["mean"] == 1.0
    assert leakage_verdict(leaking).startswith("Not isolated")


def test_isolation_without_remembering_is_told() -> None:
    nothing = result([found([[1.0, 1.5, 1.0, 2.0]])] * 4)
    assert nothing["isolated"]
    assert not nothing["remembered"]
    assert "--repeats" in leakage_verdict(nothing)


# ------------------------------------------------------------------------------------------ the whole audit


def test_own_adapters_expose_the_canaries_and_others_no_more_than_the_base(audited: dict[str, Any]) -> None:
    bits = {name: cell["mean"] for name, cell in audited["exposure"].items()}
    assert audited["remembered"]
    assert bits["own"] > bits["base"] + 2.0
    assert bits["own"] > bits["others"] + 2.0
    assert audited["isolated"]
    assert audited["differences"]["others - base"]["low"] <= 0.0
    # Means of eight values that are spread nearly exponentially, with a standard deviation of 1.4 bits.
    for name in ("base", "control", "others"):
        assert bits[name] == pytest.approx(audited["chance_bits"], abs=1.5)
    assert audited["extracted"]["base"]["mean"] == audited["extracted"]["others"]["mean"] == 0.0


def test_a_secret_is_extracted_by_who_says_it_first(
    base: Base, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    sheet = draw_sheet(2, 2, 5, space=DIGITS, seed=0)

    def generate(base: Base, asked: list[Questions], *, max_new_tokens: int, **_: Any) -> list[list[str]]:
        assert [one.prompts[0] for one in asked] == ["User history:\nThe code of my locker is"] * 2
        assert max_new_tokens >= DIGITS.length
        return [["no", "no"], [f"{sheet.secrets[0][1]}. And", f"not {sheet.secrets[1][0]}"]]

    monkeypatch.setattr(generation, "generate", generate)
    nobody, somebody = leakage._extracted(sheet, recipe, 8, base, [None, None])
    assert not nobody.any()
    assert somebody.tolist() == [[False, True], [False, False]]


def test_an_audit_is_repeatable(
    base: Base, splits: list[UserSplit], recipe: Recipe, audited: dict[str, Any]
) -> None:
    assert audit(base, splits, recipe) == audited


def test_a_canary_in_two_histories_is_found(
    base: Base, splits: list[UserSplit], recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plant_in_all(split: UserSplit, turns: Any, **how: Any) -> UserSplit:
        everybody = [turn for i in range(3) for turn in sheet.turns_of(i)]
        return plant(split, everybody, **how)

    sheet = draw_sheet(3, 1, 60, space=DIGITS, seed=0)
    monkeypatch.setattr(leakage, "plant", plant_in_all)
    shared = audit(base, splits, recipe, n_users=3, n_canaries=1, control=False)
    assert "control" not in shared["exposure"]
    assert not shared["isolated"]


def test_no_canary_and_no_text_is_told(
    base: Base,
    splits: list[UserSplit],
    recipe: Recipe,
    audited: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def choke(base: Base, jobs: list[Job], *_: Any, **__: Any) -> None:
        raise ValueError([turn.text for job in jobs for turn in job.split.history])

    sheet = draw_sheet(4, 2, 60, space=DIGITS, seed=0)
    secrets = [text for own in (*sheet.secrets, *sheet.candidates) for text in own]
    told = json.dumps(audited) + str(leakage_table(audited)) + repr(leakage_rows(audited))
    monkeypatch.setattr(train, "train", choke)
    caplog.set_level(logging.DEBUG)
    with pytest.raises(MilpError, match="ValueError") as raised:
        audit(base, splits, recipe)
    told += caplog.text + str(raised.value)
    assert not any(secret in told for secret in secrets)
    assert not any(turn.text in told for split in splits for turn in split.history)


def test_what_cannot_be_audited_is_refused(base: Base, splits: list[UserSplit], recipe: Recipe) -> None:
    with pytest.raises(MilpError, match="empty one"):
        audit(base, splits, replace(recipe, layout=CanonicalLayout((False,) * 4, 0)))
    with pytest.raises(MilpError, match="an audit needs two"):
        audit(base, splits[:1], recipe)
    no_memory = TRAINING.model_copy(update={"memory_epochs": 0})
    with pytest.raises(MilpError, match="memory_epochs"):
        audit(base, splits, replace(recipe, training=no_memory))


def test_the_report_and_the_summary_hold_the_audit(audited: dict[str, Any]) -> None:
    content = ReportContent(name="a-run", leakage=audited)
    page = render(content, {})
    assert "Do adapters keep users apart?" in page
    assert "Isolated: other users" in page
    assert f"{audited['exposure']['own']['mean']:.2f} [" in page
    assert summary_of(content)["leakage"] == audited
    assert "keep users apart" not in render(ReportContent(name="a-run"), {})


# ---------------------------------------------------------------------------------------------- the command


@pytest.fixture
def run(
    tmp_path: Path, base: Base, splits: list[UserSplit], recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> RunFolder:
    """A run whose users, recipe and pool are the tests' own."""
    made = RunFolder.create(Config(name="a-run", output_dir=tmp_path, evaluation=EVALUATION))
    monkeypatch.setattr(Work, "splits", splits)
    monkeypatch.setattr(Work, "recipe", recipe)
    monkeypatch.setattr(Work, "pool", InlinePool(base))
    return made


def test_the_command_writes_the_audit_and_nothing_else(run: RunFolder) -> None:
    before = {path.name for path in run.path.iterdir()}
    arguments = [
        "--users",
        "2",
        "--canaries",
        "1",
        "--candidates",
        "20",
        "--secrets",
        "digits",
        "--no-control",
    ]
    called = CliRunner().invoke(app, ["leakage", str(run.path), *arguments])
    assert called.exit_code in (0, 3), called.output
    assert "bits (digits), ranked among 20 others" in called.output
    after = {path.name for path in run.path.iterdir()}
    assert after - before == {"leakage.json", "peak_memory.json", "status.json"}
    again = CliRunner().invoke(app, ["leakage", str(run.path), *arguments, "--json"])
    assert json.loads(again.stdout) == json.loads(run.leakage_file.read_text("utf-8"))
    assert again.exit_code == called.exit_code


def test_a_leak_is_the_commands_exit_code_and_its_statuss(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for bits, code in (([[5.0] * 4], 3), ([[1.0, 1.5, 1.0, 2.0]], 0)):
        audit_found = result([found(bits)] * 4)
        monkeypatch.setattr(leakage, "audit_leakage", lambda *_, told=audit_found, **__: told)
        assert CliRunner().invoke(app, ["leakage", str(run.path)]).exit_code == code
        status = read_status(run)
        assert status is not None
        assert (status.state, status.exit_code) == ("succeeded", code)
        assert bool(status.reason) == bool(code)

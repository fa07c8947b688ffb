"""Win rates: from answers over judgements to intervals, people's choices, and what forgetting leaves."""

from __future__ import annotations

import csv
import json
import pickle
import stat
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.inline import InlinePool, use_inline_pool, write_chosen
from typer.testing import CliRunner

from milp_ray import cli
from milp_ray.config import Config
from milp_ray.config.base import BaseSection
from milp_ray.config.evaluation import EvaluationSection
from milp_ray.config.prompt import PromptSection
from milp_ray.config.training import TrainingSection
from milp_ray.errors import MilpError
from milp_ray.evaluation.answers import answer_users
from milp_ray.evaluation.human import HumanChoice, SheetLine, read_choices, write_sheet
from milp_ray.evaluation.judgements import COLUMNS, read_judgements, write_judgements
from milp_ray.evaluation.judges.embedded import PersonaJudge, ReferenceJudge
from milp_ray.evaluation.judges.protocol import Question
from milp_ray.evaluation.judging import WinRateOptions, judge_users, some_users
from milp_ray.evaluation.table_file import as_table
from milp_ray.evaluation.win_rate import agreement, win_rates
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.personalize.governance import traces
from milp_ray.personalize.governance.needles import IdFinder
from milp_ray.personalize.pool import Outcome
from milp_ray.personalize.recipe import Recipe
from milp_ray.personalize.store import AdapterStore
from milp_ray.pipeline import quality
from milp_ray.pipeline.work import Work
from milp_ray.report.win_rate_text import agreement_sentence, win_rate_table, win_rate_verdict
from milp_ray.rundir import RunFolder
from milp_ray.training.base import load_base
from milp_ray.users.records import UserSplit

DRAWS = {"n_bootstrap": 200, "confidence": 0.95, "seed": 0}
TRAINING = TrainingSection(memory_epochs=1, instruction_epochs=1, learning_rate=1e-2)
SECTION = EvaluationSection(max_new_tokens=4, n_bootstrap=50)
LAYOUT = CanonicalLayout((False, True, False, True), 2)
PAIR = ("milp", "text_prompt")


def judgement(user: str, example: int, choice: int, **changes: Any) -> dict[str, Any]:
    row = {"user_id": user, "example": example, "method": "milp", "against": "text_prompt"}
    return {**row, "judge": "embedded", "score": float(choice), "choice": choice, **changes}


def table(rows: list[dict[str, Any]]) -> Any:
    return as_table(rows, COLUMNS)


# --------------------------------------------------------------------------------------- rows → win rates


def test_every_user_weighs_the_same_and_wins_ties_and_losses_add_up() -> None:
    rows = [judgement("a", i, 1) for i in range(8)] + [judgement("b", 0, -1), judgement("b", 1, 0)]
    [rate] = win_rates(table(rows), DRAWS)
    assert (rate["n_wins"], rate["n_ties"], rate["n_losses"]) == (8, 1, 1)
    assert [rate[name]["mean"] for name in ("wins", "ties", "losses", "net")] == [0.5, 0.25, 0.25, 0.25]
    assert (rate["n_users"], rate["n_examples"]) == (2, 10)
    json.dumps(rate, allow_nan=False)


def test_judges_and_pairs_are_told_apart() -> None:
    rows = [judgement("a", 0, 1), judgement("a", 0, -1, judge="other"), judgement("a", 0, 0, method="base")]
    found = win_rates(table(rows), DRAWS)
    assert [(r["method"], r["judge"], r["net"]["mean"]) for r in found] == [
        ("base", "embedded", 0.0),
        ("milp", "embedded", 1.0),
        ("milp", "other", -1.0),
    ]
    assert found[0]["net"]["low"] is None


def test_the_verdict_waits_for_an_interval_off_zero() -> None:
    one_sided = win_rates(table([judgement(f"u{i}", 0, -1) for i in range(5)]), DRAWS)[0]
    mixed = win_rates(table([judgement(f"u{i}", 0, (-1) ** i) for i in range(6)]), DRAWS)[0]
    assert "prefers text prompt to MiLP" in win_rate_verdict(one_sided)
    assert "does not tell" in win_rate_verdict(mixed)


def test_the_page_has_a_row_a_judge_under_the_pair() -> None:
    rates = win_rates(table([judgement("a", 0, 1), judgement("a", 0, 1, judge="other")]), DRAWS)
    shown = win_rate_table(rates)
    assert shown is not None
    assert [row.label for row in shown.rows] == ["MiLP against text prompt", "embedded", "other"]
    assert win_rate_table([]) is None


# --------------------------------------------------------------------------------------------------- file


def test_a_users_new_judgements_replace_that_users_old_ones(tmp_path: Path) -> None:
    path = tmp_path / "a=b" / "judgements.parquet"
    path.parent.mkdir()
    write_judgements(path, [judgement("a", 0, 1), judgement("a", 1, 1), judgement("b", 0, 1)])
    write_judgements(path, [judgement("a", 0, -1), judgement("a", 0, 0, judge="other")])
    found = {(r["user_id"], r["example"], r["judge"]): r["choice"] for r in read_judgements(path).to_pylist()}
    assert found == {("a", 0, "embedded"): -1, ("a", 0, "other"): 0, ("b", 0, "embedded"): 1}


def test_a_damaged_file_is_told(tmp_path: Path) -> None:
    path = tmp_path / "judgements.parquet"
    path.write_bytes(b"PAR1 or not")
    with pytest.raises(MilpError, match="damaged"):
        read_judgements(path)


def test_forgetting_a_user_takes_the_judgements_away(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    write_judgements(run.judgements_file, [judgement("u-1", 0, 1), judgement("u-12", 0, -1)])
    removed = traces.tables(run, IdFinder("u-1"), dry_run=False)
    assert removed.count == 1
    assert read_judgements(run.judgements_file)["user_id"].to_pylist() == ["u-12"]
    traces.tables(run, IdFinder("u-12"), dry_run=False)
    assert win_rates(read_judgements(run.judgements_file), DRAWS) == []


# ------------------------------------------------------------------------------------------------- people


def human(user: str, example: int, choice: Any, *methods: str) -> HumanChoice:
    return HumanChoice(user, example, *(methods or PAIR), choice=choice)


def test_agreement_is_accuracy_and_pearson_over_the_choices_that_both_made() -> None:
    judged, chosen = [1, 1, -1, 0, -1, 1], [1, 0, -1, -1, -1, 1]
    rows = [judgement(f"u{i % 3}", i, choice) for i, choice in enumerate(judged)]
    people = [human(f"u{i % 3}", i, choice) for i, choice in enumerate(chosen)]
    [found] = agreement(table(rows), [*people, human("stranger", 0, 1)], DRAWS)
    assert (found["n_choices"], found["n_matched"]) == (7, 6)
    assert found["accuracy"]["mean"] == pytest.approx(4 / 6, abs=1e-6)
    assert found["pearson"]["mean"] == pytest.approx(np.corrcoef(judged, chosen)[0, 1], abs=1e-6)
    assert found["pearson"]["low"] <= found["pearson"]["mean"] <= found["pearson"]["high"] <= 1.0
    assert "6 of 7" in agreement_sentence(found)


def test_a_choice_counts_in_either_order_of_the_methods_and_for_no_other_pair() -> None:
    rows = [judgement("a", 0, 1), judgement("a", 1, -1)]
    people = [human("a", 0, -1, "text_prompt", "milp"), human("a", 1, 1, "base", "milp")]
    [found] = agreement(table(rows), people, DRAWS)
    assert (found["n_matched"], found["accuracy"]["mean"]) == (1, 1.0)
    assert found["pearson"] is None  # one choice does not vary


def test_without_a_match_there_is_no_agreement_to_tell() -> None:
    [found] = agreement(table([judgement("a", 0, 1)]), [human("b", 0, 1)], DRAWS)
    assert (found["accuracy"], found["pearson"]) == (None, None)
    assert "compare user_id" in agreement_sentence(found)


def test_a_sheet_filled_in_is_read_back_whatever_order_its_answers_stand_in(tmp_path: Path) -> None:
    path = tmp_path / "sheet.csv"
    lines = [
        SheetLine("u,1", i, PAIR, Question("q", "r", "from milp,\n with a break", "from prompt"))
        for i in range(20)
    ]
    assert write_sheet(path, lines, seed=0) == 20
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["first"] for row in rows} == set(PAIR)
    for row in rows[:19]:  # the last stays open
        row["choice"] = " First " if row["first_answer"].startswith("from milp") else "2"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    found = read_choices(path)
    assert len(found) == 19
    assert {one.oriented(*PAIR).choice for one in found} == {1}
    with pytest.raises(MilpError, match="there already"):
        write_sheet(path, lines, seed=0)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("user_id,example,first,second\na,0,milp,base\n", "choice"),
        ("user_id,example,first,second,choice\na,0,milp,base,secret\n", "line 2"),
        ("user_id,example,first,second,choice\na,secret,milp,base,tie\n", "line 2"),
    ],
)
def test_choices_that_cannot_be_read_are_told_by_line_without_their_text(
    tmp_path: Path, content: str, words: str
) -> None:
    path = tmp_path / "choices.csv"
    path.write_text(content)
    with pytest.raises(MilpError, match=words) as caught:
        read_choices(path)
    assert "secret" not in str(caught.value)


def test_a_missing_file_of_choices_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(MilpError, match="--sheet"):
        read_choices(tmp_path / "none.csv")


# ----------------------------------------------------------------------------------- answers → judgements


class StoppedPool(InlinePool):
    """Is interrupted after its first item."""

    def map(self, function: Any, items: Any, **options: Any) -> Iterator[Outcome]:
        yield from super().map(function, list(items)[:1], **options)
        raise KeyboardInterrupt


@pytest.fixture(scope="module")
def base(tiny_llama_dir: Path) -> Any:
    return load_base(BaseSection(model=str(tiny_llama_dir), device="cpu"))


@pytest.fixture(scope="module")
def recipe(tiny_llama_dir: Path) -> Recipe:
    section = BaseSection(model=str(tiny_llama_dir), device="cpu")
    return Recipe(LAYOUT, section, TRAINING, PromptSection(), seed=0)


@pytest.fixture(scope="module")
def splits(make_split: Any) -> list[UserSplit]:
    return [make_split(f"u-{i}", n_turns=3, n_train=2, n_val=1, n_test=2) for i in range(3)]


@pytest.fixture(scope="module")
def store(base: Any, splits: list[UserSplit], tmp_path_factory: pytest.TempPathFactory) -> AdapterStore:
    from milp_ray.training.job import Job
    from milp_ray.training.train import train

    store = AdapterStore(tmp_path_factory.mktemp("judged") / "adapters")
    jobs = [Job(s.user_id, s, LAYOUT, frozenset({"memory"}), 0) for s in splits]
    for result in train(base, jobs, TRAINING, PromptSection()):
        assert result.adapter is not None
        store.publish(result.job_id, result.adapter, {}, fingerprint="any")
    return store


def judged(
    file: Path, recipe: Recipe, store: AdapterStore, pool: Any, splits: Sequence[UserSplit], **options: Any
) -> Any:
    judge = options.pop("judge", ReferenceJudge())
    methods = options.pop("methods", PAIR)
    return judge_users(
        file, splits, recipe, SECTION, judge, methods=methods, pool=pool, store=store, **options
    )


def test_every_query_is_judged_and_no_text_is_kept(
    tmp_path: Path, recipe: Recipe, base: Any, store: AdapterStore, splits: list[UserSplit]
) -> None:
    file = tmp_path / "judgements.parquet"
    found = judged(file, recipe, store, InlinePool(base), splits, with_sheet=True)
    assert (found.n_users, found.n_failed, len(found.sheet)) == (3, 0, 6)
    rows = read_judgements(file).to_pylist()
    assert {(r["user_id"], r["example"]) for r in rows} == {(s.user_id, i) for s in splits for i in range(2)}
    scores = ReferenceJudge().prefer([line.question for line in found.sheet])
    assert [r["score"] for r in rows] == pytest.approx(scores)
    texts = [line.question.query for line in found.sheet] + [line.question.reference for line in found.sheet]
    assert not any(text.encode() in file.read_bytes() for text in texts)


def test_the_answers_are_those_that_evaluation_scores(
    recipe: Recipe, base: Any, store: AdapterStore, splits: list[UserSplit]
) -> None:
    from milp_ray.evaluation.scores import score_rows
    from milp_ray.evaluation.user import Subject, evaluate_users

    found: dict[int, Any] = {}
    answer_users(store, recipe, SECTION, PAIR, base, splits, found.__setitem__)
    subjects = [Subject(s, store.load(s.user_id), 0) for s in splits]
    expected = evaluate_users(base, subjects, PAIR, LAYOUT, TRAINING, PromptSection(), SECTION)
    for place, split in enumerate(splits):
        answers = found[place]
        own = [
            row
            for method in PAIR
            for row in score_rows(
                split.user_id,
                method,
                split.test,
                answers.by_method[method],
                [(0.0, 1)] * 2,
                persona=answers.persona,
                history_fits=True,
            )
        ]
        assert [(r["rouge_l"], r["persona_f1"]) for r in own] == [
            (r["rouge_l"], r["persona_f1"]) for r in expected[place]
        ]


def test_a_user_without_an_adapter_fails_and_the_others_are_judged(
    tmp_path: Path, recipe: Recipe, base: Any, store: AdapterStore, splits: list[UserSplit], make_split: Any
) -> None:
    file = tmp_path / "judgements.parquet"
    stranger = make_split("stranger", n_turns=2, n_train=1, n_val=0, n_test=1)
    found = judged(file, recipe, store, InlinePool(base), [stranger, splits[0]])
    assert (found.n_users, found.n_failed) == (1, 1)
    assert ["personalize" in reason for reason in found.failed_reasons] == [True]
    with pytest.raises(MilpError, match="1 users failed"):
        judged(file, recipe, store, InlinePool(base), [stranger])


def test_the_empty_layout_answers_as_the_base_does(
    tmp_path: Path, recipe: Recipe, base: Any, splits: list[UserSplit]
) -> None:
    file = tmp_path / "judgements.parquet"
    empty = replace(recipe, layout=CanonicalLayout((False,) * 4, 0))
    nothing = AdapterStore(tmp_path / "adapters")
    judged(file, empty, nothing, InlinePool(base), splits, methods=("milp", "base"))
    assert set(read_judgements(file)["choice"].to_pylist()) == {0}


def test_what_was_judged_before_an_interruption_is_kept(
    tmp_path: Path, recipe: Recipe, base: Any, store: AdapterStore, splits: list[UserSplit]
) -> None:
    file = tmp_path / "judgements.parquet"
    with pytest.raises(KeyboardInterrupt):
        judged(file, recipe, store, StoppedPool(base), splits)
    assert set(read_judgements(file)["user_id"].to_pylist()) == {"u-0"}


def test_a_method_that_does_not_apply_is_counted(
    tmp_path: Path, recipe: Recipe, base: Any, store: AdapterStore, splits: list[UserSplit]
) -> None:
    bare = [replace(splits[0], profile=None), splits[1], replace(splits[2], test=())]
    methods = ("base", "oracle_profile")
    file = tmp_path / "judgements.parquet"
    found = judged(file, recipe, store, InlinePool(base), bare, methods=methods, judge=PersonaJudge())
    assert (found.n_users, found.n_inapplicable) == (1, 1)
    with pytest.raises(MilpError, match="no test examples"):
        judged(file, recipe, store, InlinePool(base), bare[2:])


def test_a_sample_of_users_is_seeded_and_keeps_their_order(splits: list[UserSplit]) -> None:
    two = some_users(splits, 2, seed=1)
    assert two == some_users(splits, 2, seed=1)
    assert [s for s in splits if s in two] == two
    assert some_users(splits, None, 0) == some_users(splits, 9, 0) == splits


def test_the_work_reaches_workers(recipe: Recipe, store: AdapterStore) -> None:
    work = partial(answer_users, store, recipe, SECTION, PAIR)
    assert pickle.loads(pickle.dumps(work)).func is answer_users


# ------------------------------------------------------------------------------------------------ command


def test_a_sheet_does_not_go_into_the_run_folder(tmp_path: Path) -> None:
    options = WinRateOptions(ReferenceJudge, sheet=tmp_path / "run" / "sub" / "sheet.csv")
    with pytest.raises(MilpError, match="run folder"):
        options.check_sheet(tmp_path / "run")
    WinRateOptions(ReferenceJudge, sheet=tmp_path / "sheet.csv").check_sheet(tmp_path / "run")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--judge", "reward_model"], "--model"),
        (["--judge", "openai", "--model", "m"], "--base-url"),
        (["--model", "m"], "none of"),
        (
            ["--judge", "openai", "--model", "m", "--base-url", "http://localhost/v1", "--margin", "1"],
            "margin",
        ),
        (["--against", "milp"], "two different"),
        (["--method", "magic"], "use one of"),
    ],
)
def test_options_that_do_not_fit_are_told_before_anything_is_done(
    tmp_path: Path, arguments: list[str], words: str
) -> None:
    done = CliRunner().invoke(cli.app, ["winrate", str(tmp_path), *arguments])
    assert done.exit_code == 2
    assert words in done.output


def test_the_command_prints_a_table_or_one_json_object(
    tmp_path: Path, make_study_run: Any, study_events: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_study_run(tmp_path, study_events())
    [rate] = win_rates(table([judgement("a", 0, 1), judgement("b", 0, 0)]), DRAWS)
    matched = agreement(table([judgement("a", 0, 1)]), [human("a", 0, 1)], DRAWS)[0]
    asked: list[WinRateOptions] = []

    def answer(run: Any, config: Any, options: WinRateOptions, quiet: bool) -> dict[str, Any]:
        asked.append(options)
        extras = {"confidence": 0.95, "n_unclear": 2, "n_failed": 1, "n_inapplicable": 0}
        return {**rate, **extras, "failed_reasons": {"no adapter": 1}, "agreement": matched}

    monkeypatch.setattr(quality, "win_rate", answer)
    done = CliRunner().invoke(cli.app, ["winrate", str(run.path), "--users", "5", "--margin", "2"])
    assert done.exit_code == 3  # a user failed
    for words in ("MiLP against text prompt", "50 [0, 100]", "does not tell", "accuracy 1.00", "2 replies"):
        assert words in done.output
    assert (asked[0].n_users, asked[0].judge().margin) == (5, 2.0)
    done = CliRunner().invoke(cli.app, ["winrate", str(run.path), "--json"])
    assert json.loads(done.output)["wins"]["mean"] == 0.5


def test_the_command_judges_a_run_compares_it_with_people_and_the_report_has_it(
    tmp_path: Path,
    recipe: Recipe,
    base: Any,
    store: AdapterStore,
    splits: list[UserSplit],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from milp_ray.report.content import read_content, summary_of

    run = RunFolder.create(Config(name="judged", output_dir=tmp_path, base=recipe.base, evaluation=SECTION))
    write_chosen(run)
    use_inline_pool(monkeypatch, base)
    monkeypatch.setattr(Work, "splits", splits)
    monkeypatch.setattr("milp_ray.personalize.store.run_store", lambda *_: store)
    sheet = tmp_path / "sheet.csv"
    arguments = ["winrate", str(run.path), "--judge", "embedded_free"]
    done = CliRunner().invoke(cli.app, [*arguments, "--sheet", str(sheet)])
    assert done.exit_code == 0, done.output
    assert "remove it afterwards" in done.output
    choices = {
        (row["user_id"], row["example"]): ("tie", "first", "second")[row["choice"]]
        for row in read_judgements(run.judgements_file).to_pylist()
    }
    filled = tmp_path / "filled.csv"
    with sheet.open(newline="") as file, filled.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["user_id", "example", "first", "second", "choice"])
        for row in csv.DictReader(file):
            choice = choices[row["user_id"], int(row["example"])]
            writer.writerow([row["user_id"], row["example"], *PAIR, choice])
    done = CliRunner().invoke(cli.app, [*arguments, "--human", str(filled), "--json"])
    found = json.loads(done.stdout)
    assert (found["n_users"], found["judge"], found["n_failed"]) == (3, "embedded_free", 0)
    assert (found["agreement"]["n_matched"], found["agreement"]["accuracy"]["mean"]) == (6, 1.0)
    [reported] = summary_of(read_content(run))["win_rates"]
    assert reported["net"] == found["net"]

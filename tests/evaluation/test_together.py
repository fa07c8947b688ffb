"""Measures of answers taken together come out of the rows' counts, with intervals over users."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from rich.console import Console

from milp_ray.config.base import BaseSection
from milp_ray.config.evaluation import EvaluationSection
from milp_ray.config.prompt import PromptSection
from milp_ray.config.training import TrainingSection
from milp_ray.evaluation.bootstrap import interval, pooled_interval
from milp_ray.evaluation.compare import compare
from milp_ray.evaluation.ngrams import corpus_bleu, distinct_n, sentence_bleu
from milp_ray.evaluation.scores import LATER_COLUMNS, Row, as_table, read_scores, score_rows, write_scores
from milp_ray.evaluation.tables import task_table, terminal_tables
from milp_ray.evaluation.tasks import closed_questions, macro_f1
from milp_ray.evaluation.user import Subject, evaluate_users
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.training.base import load_base
from milp_ray.users.records import Example

SECTION = EvaluationSection(n_bootstrap=100)
TAGS = SECTION.model_copy(update={"task": "classification", "labels": ("comedy", "drama", "horror")})
STARS = SECTION.model_copy(update={"task": "rating", "scale": (1.0, 5.0)})


def rows_of(
    user: str, pairs: Sequence[tuple[str, str]], method: str = "milp", section: EvaluationSection = SECTION
) -> list[Row]:
    """Rows of (answer, wanted response)."""
    examples = [Example("?", wanted) for _, wanted in pairs]
    losses = [(2.0 * (i + 1), i + 1) for i in range(len(pairs))]
    answers = [answer for answer, _ in pairs]
    return score_rows(
        user,
        method,
        examples,
        answers,
        losses,
        persona=frozenset({"dog"}),
        history_fits=True,
        section=section,
    )


def together(rows: list[Row], section: EvaluationSection = SECTION) -> dict[str, Any]:
    return compare(as_table(rows), section, seed=0)["together"]


ANNA = [("a dog runs in the park", "the dog runs in the park"), ("a dog", "my dog is here now")]
BERT = [("we like a cat that sings", "we like a cat that sings so well")]


@pytest.fixture
def rows() -> list[Row]:
    return [*rows_of("anna", ANNA), *rows_of("bert", BERT)]


def test_bleu_is_that_of_all_answers_and_distinct_n_the_mean_of_the_users(rows: list[Row]) -> None:
    found = together(rows)["scores"]["milp"]
    assert found["bleu"]["mean"] == pytest.approx(corpus_bleu(*zip(*ANNA, *BERT, strict=True)), abs=1e-5)
    for n in (1, 2):
        own = [distinct_n([answer for answer, _ in pairs], n) for pairs in (ANNA, BERT)]
        assert found[f"distinct_{n}"]["mean"] == pytest.approx(np.mean(own), abs=1e-5)
    own = [float(np.mean([sentence_bleu(*pair) for pair in pairs])) for pairs in (ANNA, BERT)]
    assert found["sentence_bleu"]["mean"] == pytest.approx(np.mean(own), abs=1e-5)
    assert found["persona_f1_share"]["mean"] == pytest.approx(
        np.mean([np.mean([r["persona_f1"] for r in rows[:2]]), rows[2]["persona_f1"]]) / 100, abs=1e-5
    )
    assert (found["bleu"]["n_users"], found["bleu"]["n_examples"]) == (2, 3)


def test_perplexity_is_of_all_tokens(rows: list[Row]) -> None:
    found = together(rows)["scores"]["milp"]["perplexity"]
    assert found["mean"] == pytest.approx(math.exp((2.0 + 4.0 + 2.0) / (1 + 2 + 1)), abs=1e-5)


def test_differences_draw_the_same_users_for_both_methods() -> None:
    pairs = {f"u{i}": [(f"a dog of {'red ' * i} wool is here", "a dog of wool is here")] for i in range(5)}
    rows = [row for user, own in pairs.items() for m in ("milp", "base") for row in rows_of(user, own, m)]
    cell = together(rows)["differences"]["milp - base"]["bleu"]
    assert (cell["low"], cell["mean"], cell["high"]) == (0.0, 0.0, 0.0)


def test_differences_are_over_the_users_that_both_methods_have(rows: list[Row]) -> None:
    found = together([*rows, *rows_of("bert", [("no", "we like it")], "base")])
    cell = found["differences"]["milp - base"]["bleu"]
    assert cell["n_users"] == 1
    assert cell["mean"] == pytest.approx(corpus_bleu(*zip(*BERT, strict=True)), abs=1e-5)


def test_yes_no_is_measured_where_it_was_asked(rows: list[Row]) -> None:
    assert "yes_no" not in together(rows)["scores"]["milp"]
    asked = [*rows, *rows_of("carl", [("Yes", "Yes, you did."), ("Yes", "No."), ("hm", "You do.")])]
    cell = together(asked)["scores"]["milp"]["yes_no"]
    assert (cell["mean"], cell["n_examples"], cell["n_users"]) == (0.5, 2, 1)


def test_labels_are_measured_and_what_names_none_is_wrong_and_counted() -> None:
    pairs = [("Comedy!", "comedy"), ("a drama", "horror"), ("boring", "drama"), ("drama", "no tag")]
    found = together(rows_of("u", pairs, section=TAGS), TAGS)["scores"]["milp"]
    assert found["accuracy"]["mean"] == pytest.approx(1 / 3, abs=1e-5)
    assert found["unparsed"]["mean"] == pytest.approx(1 / 3, abs=1e-5)
    assert found["macro_f1"]["mean"] == pytest.approx(macro_f1([0, 1, None], [0, 2, 1]), abs=1e-5)
    assert found["accuracy"]["n_examples"] == 3  # the last wants no label that there is


def test_ratings_are_measured_on_their_scale() -> None:
    pairs = [("4", "5"), ("I say 2/5", "2"), ("no idea", "2")]
    found = together(rows_of("u", pairs, section=STARS), STARS)["scores"]["milp"]
    assert found["mae"]["mean"] == pytest.approx((1 + 0 + 3) / 3, abs=1e-5)
    assert found["rmse"]["mean"] == pytest.approx(math.sqrt(10 / 3), abs=1e-5)
    assert found["unparsed"]["mean"] == pytest.approx(1 / 3, abs=1e-5)


def test_every_seeds_answers_count_and_an_example_once() -> None:
    said = ["I do not know", "comedy", "no idea"]
    of_seeds = [rows_of("u", [(answer, "comedy")], section=TAGS) for answer in said]
    answers = as_table([row for rows in of_seeds for row in rows])
    found = compare(as_table(of_seeds[0]), TAGS, seed=0, answers=answers)["together"]["scores"]["milp"]
    assert found["accuracy"]["mean"] == pytest.approx(1 / 3, abs=1e-5)
    assert found["unparsed"]["mean"] == pytest.approx(2 / 3, abs=1e-5)
    assert found["accuracy"]["n_examples"] == 1


def test_labels_of_an_earlier_and_longer_list_do_not_break_the_table() -> None:
    rows = rows_of("u", [("horror", "horror")], section=TAGS)
    shorter = TAGS.model_copy(update={"labels": ("comedy", "drama")})
    assert together(rows, shorter)["scores"]["milp"]["macro_f1"]["mean"] == 1.0


def test_the_terminal_has_a_table_of_closed_questions_only_where_there_were_any(rows: list[Row]) -> None:
    assert task_table(compare(as_table(rows), SECTION, seed=0)) is None
    asked = [r for u in "ab" for r in rows_of(u, [("4", "5"), ("1", "x")], section=STARS)]
    console = Console(width=120, record=True)
    for table in terminal_tables(compare(as_table(asked), STARS, seed=0)):
        console.print(table)
    text = console.export_text()
    assert "RMSE (points) ↓" in text
    assert "1.000 [1.000, 1.000]" in text


def test_a_row_holds_counts_and_no_text() -> None:
    [row] = rows_of("u", [("Yes, a dog", "Yes, a big dog")])
    assert [row[name] for name in LATER_COLUMNS] == [4, 2, 1, 0, 4, 5, 4, 3, 1.0, None, None]


def test_scores_of_an_earlier_version_are_read_and_compared(tmp_path: Path, rows: list[Row]) -> None:
    path = tmp_path / "scores.parquet"
    write_scores(path, rows)
    old = pq.ParquetFile(path).read().drop_columns(list(LATER_COLUMNS))
    pq.write_table(old, path)
    table = read_scores(path)
    assert all(table[name].null_count == len(rows) for name in LATER_COLUMNS)
    found = compare(table, SECTION, seed=0)
    assert set(found["together"]["scores"]["milp"]) == {"perplexity", "persona_f1_share"}
    assert found["scores"]["milp"] == compare(as_table(rows), SECTION, seed=0)["scores"]["milp"]


@settings(max_examples=30)
@given(st.lists(st.integers(-9, 9), min_size=1, max_size=12))
def test_a_pooled_mean_of_one_answer_a_user_is_the_mean_over_users(values: list[int]) -> None:
    sums = np.array([[value, 1.0] for value in values])
    found = pooled_interval(sums, lambda s: s[:, 0] / s[:, 1], n_bootstrap=200)
    expected = interval([float(value) for value in values], n_bootstrap=200)
    assert found is not None
    assert expected is not None
    assert (found.mean, found.low, found.high) == pytest.approx((expected.mean, expected.low, expected.high))


def test_many_users_are_drawn_in_pieces_with_the_same_meaning(monkeypatch: pytest.MonkeyPatch) -> None:
    sums = np.random.default_rng(0).normal(5.0, 1.0, size=(40, 1))
    whole = pooled_interval(sums, lambda s: s[:, 0], n_bootstrap=500)
    monkeypatch.setattr("milp_ray.evaluation.bootstrap._ELEMENTS_AT_ONCE", 100)
    pieces = pooled_interval(sums, lambda s: s[:, 0], n_bootstrap=500)
    assert whole == pieces  # the same stream of positions, two users' draws at a time


def test_without_users_or_a_value_there_is_no_interval() -> None:
    assert pooled_interval(np.zeros((0, 2)), lambda s: s[:, 0]) is None
    assert pooled_interval(np.zeros((3, 2)), lambda s: s[:, 0] * np.nan) is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"task": "classification"},
        {"task": "classification", "labels": ("a", "A")},
        {"labels": ("a", "b")},
        {"scale": (5.0, 1.0)},
    ],
)
def test_a_task_without_its_answers_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="evaluation"):
        EvaluationSection(**wrong)


def test_how_closed_questions_are_read_decides_who_is_scored_again() -> None:
    assert closed_questions(SECTION) == []  # free answers: as if there were no such thing
    fewer = TAGS.model_copy(update={"labels": TAGS.labels[:2]})
    wider = STARS.model_copy(update={"scale": (1.0, 10.0)})
    assert len({json.dumps(closed_questions(section)) for section in (TAGS, fewer, STARS, wider)}) == 4


def test_evaluation_reads_answers_as_the_configuration_says(tiny_llama_dir: Path, make_split: Any) -> None:
    base = load_base(BaseSection(model=str(tiny_llama_dir), device="cpu"))
    split = make_split("u-1", n_turns=1, n_train=1, n_val=0, n_test=2)
    colours = tuple(sorted({str(example.answer) for example in split.test} | {"gold"}))
    update = {"task": "classification", "labels": colours, "max_new_tokens": 2, "n_bootstrap": 50}
    section = SECTION.model_copy(update=update)
    layout = CanonicalLayout((False,) * 4, 0)
    subjects = [Subject(split, None, seed=0)]
    [rows] = evaluate_users(base, subjects, ("base",), layout, TrainingSection(), PromptSection(), section)
    assert [row["wanted"] for row in rows] == [colours.index(str(example.answer)) for example in split.test]

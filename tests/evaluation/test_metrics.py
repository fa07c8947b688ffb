"""The metrics: bounds, symmetries, and the smallest cases that show each rule."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from milp_ray.evaluation.metrics import (
    STOP_WORDS,
    content_words,
    fact_accuracy,
    perplexity,
    persona_f1,
    persona_f1_share,
    rouge_1,
    rouge_l,
    set_f1,
    words,
)

WORDS = st.sampled_from(["dog", "cat", "lily", "palm", "the", "a", "likes", "Osaka", "no", "two"])
SENTENCE = st.lists(WORDS, max_size=12).map(" ".join)
ANY_TEXT = st.text(max_size=40)


@settings(deadline=None)
@given(ANY_TEXT | SENTENCE, ANY_TEXT | SENTENCE)
def test_every_overlap_is_between_0_and_100(prediction: str, reference: str) -> None:
    for value in (
        rouge_1(prediction, reference),
        rouge_l(prediction, reference),
        persona_f1(prediction, reference),
    ):
        assert 0.0 <= value <= 100.0


@settings(deadline=None)
@given(SENTENCE, SENTENCE)
def test_overlaps_are_symmetric(first: str, second: str) -> None:
    assert rouge_1(first, second) == pytest.approx(rouge_1(second, first))
    assert rouge_l(first, second) == pytest.approx(rouge_l(second, first))
    assert persona_f1(first, second) == pytest.approx(persona_f1(second, first))


@settings(deadline=None)
@given(SENTENCE.filter(bool))
def test_a_text_against_itself_scores_100(text: str) -> None:
    assert rouge_1(text, text) == pytest.approx(100.0)
    assert rouge_l(text, text) == pytest.approx(100.0)
    assert persona_f1(text, text) == (100.0 if content_words(text) else 0.0)


@settings(deadline=None)
@given(SENTENCE, SENTENCE)
def test_rouge_l_is_never_above_rouge_1(prediction: str, reference: str) -> None:
    assert rouge_l(prediction, reference) <= rouge_1(prediction, reference) + 1e-9


@settings(max_examples=50, deadline=None)
@given(SENTENCE, SENTENCE)
def test_rouge_is_what_the_package_says(prediction: str, reference: str) -> None:
    from rouge_score.rouge_scorer import RougeScorer

    expected = RougeScorer(["rouge1", "rougeL"], use_stemmer=False).score(reference, prediction)
    assert rouge_1(prediction, reference) == pytest.approx(100 * expected["rouge1"].fmeasure)
    assert rouge_l(prediction, reference) == pytest.approx(100 * expected["rougeL"].fmeasure)


def test_rouge_by_hand() -> None:
    # Three of four predicted and three of five reference words are shared, in order: F = 2·3 / (4 + 5).
    assert rouge_l("the cat sat down", "the cat sat on mats") == pytest.approx(100 * 6 / 9)
    # Shared words in another order count for ROUGE-1 only.
    assert rouge_1("cat the", "the cat") == pytest.approx(100.0)
    assert rouge_l("cat the", "the cat") == pytest.approx(50.0)


def test_rouge_does_not_stem() -> None:
    assert rouge_1("lilies", "lily") == 0.0


def test_persona_f1_counts_content_words_once() -> None:
    # {dog, max} against {dog, park, named, max}: 2·2 / (2 + 4).
    history = ["My dog is at the park", "The dog, the DOG, is named Max."]
    assert persona_f1("I have the dog Max", history) == pytest.approx(100 * 4 / 6)


@pytest.mark.parametrize(("response", "history"), [("", ["a dog"]), ("a dog", []), ("the of and", ["a dog"])])
def test_persona_f1_is_0_where_a_side_is_empty(response: str, history: list[str]) -> None:
    assert persona_f1(response, history) == 0.0


def test_persona_f1_has_two_scales() -> None:
    history = ["My dog is at the park", "The dog, the DOG, is named Max."]
    assert persona_f1_share("I have the dog Max", history) == pytest.approx(4 / 6)


def test_perplexity_by_hand() -> None:
    # Eight equally likely words: 8, whatever the number of tokens.
    assert perplexity(5 * math.log(8), 5) == pytest.approx(8.0)
    assert perplexity(0.0, 3) == 1.0
    assert perplexity(0.0, 0) is None
    assert perplexity(1e6, 1) == math.inf


@given(st.floats(0, 1e6), st.integers(1, 1000))
def test_perplexity_is_at_least_1(nll: float, n_tokens: int) -> None:
    value = perplexity(nll, n_tokens)
    assert value is not None
    assert value >= 1.0


def test_persona_f1_reads_one_text_as_a_text_and_not_as_letters() -> None:
    assert persona_f1("dog", "dog") == 100.0


def test_stop_words_keep_negations_and_numbers() -> None:
    assert content_words("I do not have two cats, no") == {"not", "two", "cats", "no"}
    assert all(word == word.lower() for word in STOP_WORDS)


def test_words_hold_inner_apostrophes_of_either_kind() -> None:
    assert words("Don’t — it's Bob's.") == ["don't", "it's", "bob's"]


@settings(deadline=None)
@given(st.frozensets(WORDS), st.frozensets(WORDS))
def test_set_f1_is_100_only_for_equal_sets(first: frozenset[str], second: frozenset[str]) -> None:
    assert (set_f1(first, second) == 100.0) == (first == second and bool(first))


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        ("You have a Cat.", "cat", 1.0),
        ("See the catalogue.", "cat", 0.0),
        ("A low-salt diet, as ever.", "low-salt", 1.0),
        ("He lives in New\n York now", "new york", 1.0),
        ("He lives in New Jersey", "New York", 0.0),
        ("It costs 20$ (about)", "20$", 1.0),
        ("", "cat", 0.0),
        ("cat", None, None),
        ("cat", "  ", None),
    ],
)
def test_fact_accuracy_wants_the_whole_phrase(
    response: str, answer: str | None, expected: float | None
) -> None:
    assert fact_accuracy(response, answer) == expected


@settings(deadline=None)
@given(ANY_TEXT, ANY_TEXT.filter(str.strip), ANY_TEXT)
def test_an_answer_between_spaces_is_found_whatever_it_is_made_of(
    before: str, answer: str, after: str
) -> None:
    assert fact_accuracy(f"{before} {answer} {after}", answer) == 1.0


def test_importing_the_metrics_loads_nothing_heavy() -> None:
    heavy = ("torch", "ray", "nltk", "numpy")
    modules = "milp_ray.evaluation.metrics, milp_ray.evaluation.ngrams, milp_ray.evaluation.tasks"
    code = f"import sys, {modules}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

"""BLEU and distinct-n: sacreBLEU's values, the formula by hand, bounds, and what may be summed."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from milp_ray.evaluation.ngrams import (
    BLEU_COUNTS,
    bleu,
    bleu_counts,
    bleu_statistics,
    bleu_tokens,
    corpus_bleu,
    distinct_n,
    new_n_grams,
    sentence_bleu,
)

WORDS = st.sampled_from(["dog", "cat", "the", "The", "a", "likes", "3.5", "no,", "U.S."])
SENTENCE = st.lists(WORDS, max_size=9).map(" ".join)
TEXT = SENTENCE | st.text(max_size=30)
SENTENCES = st.lists(SENTENCE, max_size=5)

# (answer, reference, sacreBLEU 2.6.0's sentence score with effective order)
SACREBLEU = [
    ("The dog bit the man.", "The dog bit the man.", 100.0),
    ("It was not unexpected.", "It was not surprising.", 42.72870063962342),
    ("The man bit him first.", "The man had just bitten the dog.", 12.872632311973014),
    ("the cat sat on the mat", "the cat is on the mat", 37.99178428257963),
    (
        "I'm at 3.5% — it's $4,000, e.g. U.S.A.-wide",
        "I'm at 3.5% - it's $4,000 in the U.S.A.",
        42.0628882417221,
    ),
    ("", "a b", 0.0),
    ("x", "y", 0.0),
]


@pytest.mark.parametrize(("answer", "reference", "expected"), SACREBLEU)
def test_sentence_bleu_is_what_sacrebleu_says(answer: str, reference: str, expected: float) -> None:
    assert sentence_bleu(answer, reference) == pytest.approx(expected, abs=1e-9)


def test_corpus_bleu_is_what_sacrebleu_says() -> None:
    answers, references, _ = zip(*SACREBLEU, strict=True)
    assert corpus_bleu(answers[:3], references[:3]) == pytest.approx(46.44326825375925, abs=1e-9)
    assert corpus_bleu(answers, references) == pytest.approx(44.25, abs=0.005)


def test_bleu_by_hand() -> None:
    # Six of six tokens match, four of five bigrams, two of four trigrams, one of three, of seven wanted.
    answer, reference = "a b c d x e", "a b c d e x e"
    assert bleu_counts(answer, reference)[:4] == (6, 4, 2, 1)
    expected = 100 * math.exp(1 - 7 / 6) * (6 / 6 * 4 / 5 * 2 / 4 * 1 / 3) ** 0.25
    assert sentence_bleu(answer, reference) == pytest.approx(expected)


def test_orders_without_a_match_count_as_a_half_and_a_quarter_of_one() -> None:
    expected = 100 * (4 / 4 * 0.5 / 3 * 0.25 / 2 * 0.125 / 1) ** 0.25
    assert sentence_bleu("d c b a", "a b c d") == pytest.approx(expected)


def test_a_short_answer_alone_is_measured_by_the_orders_it_has() -> None:
    assert sentence_bleu("a dog", "a dog") == pytest.approx(100.0)
    assert corpus_bleu(["a dog"], ["a dog"]) == 0.0


def test_a_word_said_more_often_than_wanted_matches_only_as_often_as_wanted() -> None:
    assert bleu_counts("the the the", "the cat")[0] == 1


def test_tokens_are_those_of_13a() -> None:
    assert bleu_tokens("I'm at 3.5%, e.g. 2-3 &quot;days&quot;.\n") == (
        ["I'm", "at", "3.5", "%", ",", "e", ".", "g", ".", "2", "-", "3", '"', "days", '"', "."]
    )


@settings(max_examples=40)
@given(TEXT, TEXT)
def test_bleu_is_between_0_and_100_and_100_of_a_text_with_itself(answer: str, reference: str) -> None:
    assert 0.0 <= sentence_bleu(answer, reference) <= 100.0
    assert 0.0 <= corpus_bleu([answer], [reference]) <= 100.0
    assert sentence_bleu(answer, answer) == pytest.approx(100.0 if bleu_tokens(answer) else 0.0)


@settings(max_examples=40)
@given(st.lists(st.tuples(SENTENCE, SENTENCE), min_size=1, max_size=5))
def test_the_order_of_answers_does_not_matter(pairs: list[tuple[str, str]]) -> None:
    forwards, backwards = (corpus_bleu(*zip(*some, strict=True)) for some in (pairs, pairs[::-1]))
    assert forwards == pytest.approx(backwards)


@settings(max_examples=40)
@given(st.lists(st.tuples(SENTENCE, SENTENCE), min_size=1, max_size=5))
def test_bleu_of_many_sums_at_once_is_bleu_of_each(pairs: list[tuple[str, str]]) -> None:
    counts = np.array([bleu_counts(*pair) for pair in pairs], dtype=np.float64)
    assert counts.shape[1] == len(BLEU_COUNTS)
    together = bleu(bleu_statistics(counts), effective_order=True)
    assert together == pytest.approx([sentence_bleu(*pair) for pair in pairs])


def test_bleu_of_no_answers_is_0() -> None:
    assert corpus_bleu([], []) == 0.0


def test_distinct_n_by_hand() -> None:
    # a dog a cat | A dog: three different tokens of six, three different pairs (a dog, dog a, a cat) of four.
    assert distinct_n(["a dog a cat", "A dog"], 1) == pytest.approx(3 / 6)
    assert distinct_n(["a dog a cat", "A dog"], 2) == pytest.approx(3 / 4)
    assert new_n_grams(["a dog a cat", "A dog", "bird"], 1) == [3, 0, 1]


@pytest.mark.parametrize("responses", [[], ["", " "], ["dog", "cat"]])
def test_distinct_2_of_responses_without_pairs_is_unknown(responses: list[str]) -> None:
    assert distinct_n(responses, 2) is None


@given(SENTENCES, st.integers(1, 3))
def test_distinct_n_is_a_share_that_repetition_halves(responses: list[str], n: int) -> None:
    once, twice = distinct_n(responses, n), distinct_n([*responses, *responses], n)
    if once is None or twice is None:
        assert once is twice
    else:
        assert 0.0 < once <= 1.0
        assert twice == pytest.approx(once / 2)


@given(SENTENCES, st.integers(1, 3))
def test_how_many_n_grams_are_new_does_not_depend_on_the_order(responses: list[str], n: int) -> None:
    assert sum(new_n_grams(responses, n)) == sum(new_n_grams(responses[::-1], n))

"""Closed sets of answers: what an answer is taken for, and what one that says nothing counts as."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from milp_ray.evaluation.tasks import (
    accuracy,
    label_counts,
    macro_f1,
    macro_f1_of,
    mae,
    parse_label,
    parse_rating,
    parse_yes_no,
    rating_error,
    rmse,
    yes_no_accuracy,
)

TAGS = ("comedy", "dark comedy", "sci-fi", "action")
CLASS = st.integers(0, 3)
ANSWERS = st.lists(st.tuples(st.none() | CLASS, CLASS), min_size=1, max_size=20)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes, you do.", True),
        ("No. Yes would be wrong.", False),
        ("Well, I think yes", True),
        ("I know nothing of it; yesterday neither", None),
        ("", None),
    ],
)
def test_the_first_yes_or_no_counts_as_a_whole_word(text: str, expected: bool | None) -> None:
    assert parse_yes_no(text) is expected


@pytest.mark.parametrize(
    ("response", "wanted", "expected"),
    [
        ("yes", "Yes, you told me so.", 1.0),
        ("No, you never said.", "no", 1.0),
        ("No", "Yes", 0.0),
        ("I cannot tell", "Yes", 0.0),
        ("Yes", "You have a dog, yes.", None),
        ("Yes", "", None),
    ],
)
def test_yes_no_accuracy(response: str, wanted: str, expected: float | None) -> None:
    assert yes_no_accuracy(response, wanted) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Comedy", 0),
        (" DARK  comedy ", 1),
        ("It is a dark comedy.", 1),
        ("Action, not comedy", 3),
        ("sci-fi!", 2),
        ("reactions", None),
        ("", None),
    ],
)
def test_the_label_that_stands_first_is_meant_and_of_several_there_the_longest(
    text: str, expected: int | None
) -> None:
    assert parse_label(text, TAGS) == expected


def test_labels_in_brackets_are_found() -> None:
    assert parse_label("The reference is [2].", ("[1]", "[2]")) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4", 4.0),
        ("I give it 4/5.", 4.0),
        ("4,5 of 5", 4.5),
        ("score: 3.", 3.0),
        ("9 of 10", None),
        ("-1", None),
        ("the 4th, as v2", None),
        ("five", None),
    ],
)
def test_the_first_number_is_the_rating_where_it_lies_on_the_scale(text: str, expected: float | None) -> None:
    assert parse_rating(text, 1, 5) == expected


@given(st.integers(0, 100), st.text(alphabet="abc ,:!", max_size=5))
def test_every_rating_of_a_scale_is_read_in_any_sentence(rating: int, around: str) -> None:
    assert parse_rating(f"{around} {rating} {around}", 0, 100) == rating


@given(st.text(max_size=30))
def test_no_text_breaks_a_parser(text: str) -> None:
    assert parse_yes_no(text) in (True, False, None)
    assert parse_label(text, TAGS) in (0, 1, 2, 3, None)
    rating = parse_rating(text, 1, 5)
    assert rating is None or 1 <= rating <= 5


def test_macro_f1_by_hand() -> None:
    # Label 0: 1 hit, 2 given, 1 wanted → 2/3. Label 1: 1, 1, 2 → 2/3. Label 3: 0, 0, 1 → 0. Label 2: absent.
    given_labels, wanted = [0, 0, 1, None], [0, 1, 1, 3]
    assert macro_f1(given_labels, wanted) == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
    assert accuracy(given_labels, wanted) == 0.5


@given(ANSWERS)
def test_classification_measures_are_shares_and_1_only_where_all_is_right(
    answers: list[tuple[int | None, int]],
) -> None:
    given_labels, wanted = ([pair[i] for pair in answers] for i in range(2))
    share, f1 = accuracy(given_labels, wanted), macro_f1(given_labels, wanted)
    assert share is not None
    assert f1 is not None
    assert 0.0 <= min(share, f1) <= max(share, f1) <= 1.0
    assert (share == 1.0) == (given_labels == wanted) == (f1 == pytest.approx(1.0))


@given(ANSWERS)
def test_what_labels_are_called_does_not_matter(answers: list[tuple[int | None, int]]) -> None:
    swapped = [(None if g is None else 3 - g, 3 - w) for g, w in answers]
    one, other = (macro_f1([g for g, _ in some], [w for _, w in some]) for some in (answers, swapped))
    assert one == pytest.approx(other)


def test_counts_of_labels_may_be_summed() -> None:
    given_labels, wanted = [0, 1, None, 2], [0, 2, 1, 2]
    counts = label_counts(given_labels, wanted, 3)
    assert counts.shape == (4, 9)
    assert macro_f1_of(counts[:2].sum(0) + counts[2:].sum(0)) == pytest.approx(macro_f1(given_labels, wanted))


def test_without_answers_nothing_is_measured() -> None:
    assert accuracy([], []) is macro_f1([], []) is mae([]) is rmse([]) is None


def test_a_rating_that_says_nothing_is_as_wrong_as_the_scale_allows() -> None:
    errors = [rating_error(None, 2, 1, 5), rating_error(None, 4, 1, 5), rating_error(5.0, 4, 1, 5)]
    assert errors == [3.0, 3.0, 1.0]
    assert mae(errors) == pytest.approx(7 / 3)
    assert rmse(errors) == pytest.approx((19 / 3) ** 0.5)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=20))
def test_rmse_lies_between_the_mean_and_the_largest_error(errors: list[float]) -> None:
    mean, root = mae(errors), rmse(errors)
    assert mean is not None
    assert root is not None
    assert mean <= root + 1e-9
    assert root <= max(errors) + 1e-9


def test_without_any_wanted_label_there_is_no_macro_f1() -> None:
    counts = label_counts([], [], 3)
    assert counts.shape == (0, 9)
    assert np.isnan(macro_f1_of(counts.sum(axis=0)))

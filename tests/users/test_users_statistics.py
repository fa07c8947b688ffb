"""Rules of the figures that describe a dataset."""

from __future__ import annotations

import pytest

from milp_ray.users.records import Example, Turn, UserSplit
from milp_ray.users.statistics import Spread, count_words, dataset_statistics


def split(history: list[str], *sizes: int, profile: str | None = None, kind: str = "a") -> UserSplit:
    examples = [
        tuple(Example("two words", "just three words", kind=kind) for _ in range(size)) for size in sizes
    ]
    return UserSplit("u", profile, tuple(Turn(text) for text in history), *examples)


@pytest.mark.parametrize(
    ("text", "n"),
    [
        ("I don't know, well-known.", 5),
        ("it’s 3.5", 3),
        ("", 0),
        ("…!", 0),
        ("干桂花是点睛", 6),
        ("new York风格", 4),
    ],
)
def test_words_are_runs_of_letters_and_single_ideographs(text: str, n: int) -> None:
    assert count_words([text]) == [n]


def test_users_parts_and_lengths_are_counted_over_all_users() -> None:
    splits = [split(["one", "two words"], 2, 1, 1, profile="p"), split([], 1, 0, 0, kind="b")]
    found = dataset_statistics(iter(splits), {"words": count_words})
    assert (found.n_users, found.n_profiles, found.n_untested) == (2, 1, 1)
    assert (found.n_train, found.n_validation, found.n_test) == (3, 1, 1)
    assert found.kinds == {"a": 4, "b": 1}
    assert found.turns_a_user == Spread(1.0, 1.0, 0, 2)
    assert found.examples_a_user == Spread(2.5, 2.5, 1, 4)
    words = found.lengths["words"]
    assert words.history == Spread(1.5, 1.5, 0, 3)
    assert words.turn == Spread(1.5, 1.5, 1, 2)
    assert words.query == Spread(2.0, 2.0, 2, 2)
    assert words.response == Spread(3.0, 3.0, 3, 3)


def test_nobody_has_figures_of_nothing() -> None:
    found = dataset_statistics([], {"words": count_words})
    assert found.n_users == 0
    assert found.lengths["words"].query == Spread(0.0, 0.0, 0, 0)

"""Rules of the split: shares, few examples, order in time, and no leak whatever the history holds."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from milp_ray.config.users import SplitSection
from milp_ray.errors import MilpError
from milp_ray.users.records import Example, Turn, User, UserSplit
from milp_ray.users.splits import check_no_leak, normalised, split_user

START = datetime(2024, 5, 1, tzinfo=UTC)
DEFAULT = SplitSection()


def at(day: int) -> datetime:
    return START + timedelta(days=day)


def numbered(n: int, timed: bool = True) -> tuple[Example, ...]:
    return tuple(Example(f"question {i}", f"reply {i}", at(i) if timed else None) for i in range(n))


def sizes(split: UserSplit) -> tuple[int, int, int]:
    return len(split.train), len(split.validation), len(split.test)


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (0, (0, 0, 0)),
        (1, (1, 0, 0)),
        (2, (1, 0, 1)),
        (3, (1, 1, 1)),
        (4, (2, 1, 1)),
        (5, (3, 1, 1)),
        (10, (7, 1, 2)),
        (20, (14, 2, 4)),
        (50, (35, 5, 10)),
        (1000, (700, 100, 200)),
    ],
)
def test_seventy_ten_twenty_and_few_examples_go_to_train_then_test_then_validation(
    n: int, expected: tuple[int, int, int]
) -> None:
    assert sizes(split_user(User("u", examples=numbered(n)), DEFAULT)) == expected


@pytest.mark.parametrize(
    ("section", "n", "expected"),
    [
        (SplitSection(train=0.0, validation=0.0), 3, (0, 0, 3)),
        (SplitSection(train=0.5, validation=0.0), 4, (2, 0, 2)),
        (SplitSection(train=0.0, validation=0.5), 1, (0, 0, 1)),
        (SplitSection(train=0.98, validation=0.01), 3, (1, 1, 1)),
    ],
)
def test_a_part_with_the_share_0_stays_empty(
    section: SplitSection, n: int, expected: tuple[int, int, int]
) -> None:
    assert sizes(split_user(User("u", examples=numbered(n)), section)) == expected


@given(st.integers(0, 300), st.floats(0, 1), st.floats(0, 1))
def test_every_example_is_in_one_part_and_parts_differ_from_their_shares_by_few(
    n: int, train: float, validation: float
) -> None:
    if train + validation >= 1.0:
        train, validation = train / 2.1, validation / 2.1
    section = SplitSection(train=train, validation=validation)
    split = split_user(User("u", examples=numbered(n)), section)
    assert (*split.train, *split.validation, *split.test) == numbered(n)
    assert all(part for part in (split.train, split.test)) or n < 2 or not train
    assert abs(len(split.train) - n * train) <= 2
    assert abs(len(split.validation) - n * validation) <= 2


@given(st.permutations(range(12)))
def test_parts_follow_each_other_in_time_whatever_the_order_of_the_file(order: list[int]) -> None:
    examples = numbered(12)
    split = split_user(User("u", examples=tuple(examples[i] for i in order)), DEFAULT)
    assert (*split.train, *split.validation, *split.test) == examples


def test_without_times_the_order_of_the_file_is_the_order_in_time() -> None:
    examples = numbered(10, timed=False)
    split = split_user(User("u", (Turn("b"), Turn("a")), examples), DEFAULT)
    assert (*split.train, *split.validation, *split.test) == examples
    assert split.history == (Turn("b"), Turn("a"))


def test_a_record_without_a_time_stays_behind_the_one_before_it() -> None:
    turns = (Turn("d", time=at(3)), Turn("e"), Turn("a", time=at(1)), Turn("b"))
    split = split_user(User("u", turns, numbered(1)), DEFAULT)
    assert [turn.text for turn in split.history] == ["a", "b", "d", "e"]


def test_turns_at_or_after_the_first_held_out_example_are_dropped() -> None:
    turns = tuple(Turn(f"turn of day {i}", time=at(i)) for i in range(10))
    split = split_user(User("u", turns, numbered(10)), DEFAULT)
    assert split.validation[0].time == at(7)
    assert [turn.text for turn in split.history] == [f"turn of day {i}" for i in range(7)]


def test_an_untimed_turn_after_a_dropped_one_is_dropped_with_it() -> None:
    turns = (Turn("early", time=at(0)), Turn("late", time=at(8)), Turn("later, without a time"))
    assert split_user(User("u", turns, numbered(10)), DEFAULT).history == turns[:1]


def test_the_first_time_known_of_a_held_out_example_ends_the_history() -> None:
    train, validation, test = (replace(e, time=None) for e in numbered(3))
    turns = (Turn("no time"), Turn("before", time=at(4)), Turn("after", time=at(5)))
    split = split_user(User("u", turns, (train, validation, replace(test, time=at(5)))), DEFAULT)
    assert split.history == turns[:2]


def test_zones_are_compared_as_instants_and_a_time_without_one_is_utc() -> None:
    west = timezone(timedelta(hours=-5))
    turns = (
        Turn("before", time=at(7).replace(tzinfo=None) - timedelta(minutes=1)),
        Turn("at the same instant", time=at(7).astimezone(west)),
    )
    split = split_user(User("u", turns, numbered(10)), DEFAULT)
    assert [turn.text for turn in split.history] == ["before"]


HELD_OUT = Example("Which plants suit my home?", "No lilies, because of your cat.", at(5))


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("Which plants suit my home?", False),
        ("  which PLANTS suit\nmy home ", False),
        ("I asked: which plants suit my home? And he said no.", False),
        ("He said “No lilies, because of your cat”.", False),
        ("No lilies because of your cats", True),
        ("I have a cat.", True),
    ],
)
def test_turns_that_repeat_held_out_text_are_dropped_whatever_their_time(text: str, kept: bool) -> None:
    train = Example("Which pet have I got?", "A cat.", at(1))
    user = User("u", (Turn(text, time=at(0)),), (train, HELD_OUT))
    split = split_user(user, DEFAULT)
    assert split.test == (HELD_OUT,)
    assert bool(split.history) is kept


def test_a_short_answer_within_a_turn_is_a_fact_to_remember_and_no_leak() -> None:
    test = Example("Which pet have I got?", "A turtle.", at(5))
    turns = (Turn("I have a turtle at home."), Turn("a turtle!"))
    split = split_user(User("u", turns, (numbered(1)[0], test)), DEFAULT)
    assert split.history == turns[:1]


def test_training_examples_that_repeat_a_held_out_pair_are_dropped() -> None:
    repeated = Example("question  9?", "Reply 9!", at(0))
    same_query = Example("question 9", "another reply", at(0))
    split = split_user(User("u", examples=(repeated, same_query, *numbered(10))), DEFAULT)
    assert split.test[-1].query == "question 9"
    assert repeated not in split.train
    assert same_query in split.train


words = st.sampled_from(("dog", "cat", "red", "no", "lily", "my", "the", "is"))
sentences = st.lists(words, min_size=1, max_size=6).map(" ".join)
times = st.none() | st.integers(0, 6).map(at)


@st.composite
def users(draw: st.DrawFn) -> User:
    turns = draw(st.lists(st.builds(Turn, text=sentences, time=times), max_size=12))
    examples = draw(
        st.lists(st.builds(Example, query=sentences, response=sentences, time=times), max_size=12)
    )
    return User("u", tuple(turns), tuple(examples))


@settings(max_examples=300)
@given(users())
def test_no_split_of_any_user_leaks(user: User) -> None:
    split = split_user(user, DEFAULT)
    check_no_leak(split)
    assert set(map(id, split.history)) <= set(map(id, user.history))
    assert len(split.validation) + len(split.test) + len(split.train) <= len(user.examples)
    # Stated anew, without the module's own helpers.
    for held_out in (*split.validation, *split.test):
        assert all(turn.text not in (held_out.query, held_out.response) for turn in split.history)
        assert (held_out.query, held_out.response) not in {(e.query, e.response) for e in split.train}
        if held_out.time:
            assert all(turn.time < held_out.time for turn in split.history if turn.time)
            assert all(e.time <= held_out.time for e in split.train if e.time)


def leaky(**changes: object) -> UserSplit:
    clean = split_user(User("u-1", (Turn("hello", time=at(0)),), numbered(10)), DEFAULT)
    check_no_leak(clean)
    return replace(clean, **changes)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (leaky(history=(Turn("x", time=at(7)),)), "1 turns at or after"),
        (leaky(history=(Turn("Question 9!"), Turn("reply 7"))), "2 turns that repeat"),
        (leaky(train=numbered(10)[8:]), "training examples that repeat"),
        (leaky(validation=numbered(10)[9:], test=numbered(10)[7:8]), "out of time order"),
    ],
)
def test_a_leak_made_elsewhere_is_found_and_told_without_text(split: UserSplit, message: str) -> None:
    with pytest.raises(MilpError, match=message) as caught:
        check_no_leak(split)
    assert "u-1" in str(caught.value)
    assert "uestion" not in str(caught.value)


def test_normalised_texts_have_words_only_and_signs_stand_for_themselves() -> None:
    assert normalised("  Don’t  PANIC — ﬁne! ") == "don t panic fine"
    assert normalised(" :-) ") == ":-)"

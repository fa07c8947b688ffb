"""MaLP's three memories."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from milp_ray.config.methods import MalpSection
from milp_ray.methods.memories import Memories

SMALL = MalpSection(working=2, short_term=3, promote_after=2, k=2)


def observed(texts: list[str], section: MalpSection = SMALL) -> Memories:
    memories = Memories(texts, section)
    for place in range(len(texts)):
        memories.observe(place)
    return memories


def test_what_nothing_comes_back_to_is_forgotten_in_time_order() -> None:
    memories = observed([f"word{i}" for i in range(8)])
    assert memories.kept == [3, 4, 5, 6, 7]
    assert memories.long_term == []


def test_a_turn_that_others_come_back_to_is_kept_for_good() -> None:
    texts = ["turtle", "a1", "b1", "turtle again", "turtle once more", *(f"c{i}" for i in range(9))]
    memories = observed(texts)
    assert memories.long_term == [0]
    assert 0 in memories.kept


def test_queries_use_turns_as_well() -> None:
    memories = observed(["turtle", "piano", "rain", "sun"])
    for _ in range(2):
        memories.use("the turtle", k=2)
    assert memories.long_term == [0]


def test_a_used_turn_is_dropped_after_the_unused_ones() -> None:
    texts = ["turtle", "a1", "b1", "c1", "d1"]  # working: the last two; short-term: the first three
    memories = Memories([*texts, "e1", "f1"], SMALL)
    for place in range(5):
        memories.observe(place)
    memories.use("turtle", k=1)
    memories.observe(5)
    memories.observe(6)
    assert 0 in memories.kept
    assert 1 not in memories.kept


@given(st.lists(st.sampled_from(["turtle", "piano", "rain", "sun turtle", "the"]), max_size=30))
def test_memories_hold_each_turn_once_and_no_more_than_they_may(texts: list[str]) -> None:
    memories = observed(texts)
    assert memories.kept == sorted(set(memories.kept))
    most = SMALL.working + SMALL.short_term + len(memories.long_term)
    assert len(memories.kept) <= most
    assert set(range(max(0, len(texts) - SMALL.working), len(texts))) <= set(memories.kept)

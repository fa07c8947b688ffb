"""The texts that a model reads, character for character."""

from __future__ import annotations

import pytest

from milp_ray.config.prompt import PromptSection
from milp_ray.errors import MilpError
from milp_ray.training.text import (
    history_context,
    memory_blocks,
    profile_context,
    query_prompt,
    response_text,
)
from milp_ray.users.records import Turn, UserSplit

PROMPT = PromptSection()
TURNS = (Turn("I have a dog."), Turn("Nice!", role="assistant"), Turn("It is brown."))


def words(texts):
    return [len(text.split()) for text in texts]


def user(*turns: Turn) -> UserSplit:
    return UserSplit("u", None, turns, (), (), ())


def test_a_history_document_is_the_phrase_the_turns_and_a_line_end() -> None:
    assert history_context(TURNS, PROMPT) == "User history:\nI have a dog.\nAssistant: Nice!\nIt is brown.\n"


def test_a_question_follows_its_context_and_the_response_follows_after_one_space() -> None:
    context = profile_context("Has a dog.", PROMPT)
    text = query_prompt("Which pet?", PROMPT, context) + response_text("A dog.")
    assert text == "User profile:\nHas a dog.\nQuestion: Which pet?\nAnswer: A dog."


def test_nothing_known_gives_no_context() -> None:
    assert history_context((), PROMPT) == profile_context(None, PROMPT) == profile_context("", PROMPT) == ""


def test_braces_in_a_users_text_or_in_the_template_are_left_alone() -> None:
    prompt = PromptSection(query='{"q": "{query}"}')
    assert query_prompt("Why {query} {x}?", prompt) == '{"q": "Why {query} {x}?"}'


def test_a_template_without_its_slot_is_refused_by_the_options_name() -> None:
    with pytest.raises(MilpError, match=r"prompt\.query .* must hold \{query\}"):
        query_prompt("Why?", PromptSection(query="Question:"))


def test_blocks_hold_as_many_whole_turns_as_fit_in_time_order() -> None:
    turns = [Turn(f"one two {i}") for i in range(7)]  # three words each, and two of "User history:"
    blocks = memory_blocks(user(*turns), PROMPT, count_tokens=words, max_tokens=2 + 9)
    assert [len(block) for block in blocks] == [3, 3, 1]
    assert [turn for block in blocks for turn in block] == turns


def test_block_turns_limits_the_turns_of_a_block() -> None:
    turns = [Turn("a")] * 5
    blocks = memory_blocks(user(*turns), PROMPT, count_tokens=words, max_tokens=100, block_turns=2)
    assert [len(block) for block in blocks] == [2, 2, 1]


def test_a_turn_too_long_for_a_block_stands_alone() -> None:
    turns = (Turn("a"), Turn("b " * 50), Turn("c"))
    blocks = memory_blocks(user(*turns), PROMPT, count_tokens=words, max_tokens=10)
    assert blocks == [(turns[0],), (turns[1],), (turns[2],)]


def test_no_history_gives_no_blocks() -> None:
    assert memory_blocks(user(), PROMPT, count_tokens=words, max_tokens=10) == []

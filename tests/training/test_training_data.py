"""Tokenised sequences: what counts in the loss, what is cut, and how batches are made."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from milp_ray.config.base import BaseSection
from milp_ray.config.prompt import PromptSection
from milp_ray.errors import MilpError
from milp_ray.training.base import Base, load_base
from milp_ray.training.data import (
    Sequence,
    cut_left,
    epoch_plan,
    fit,
    instruction_set,
    make_batch,
    make_batches,
    memory_set,
    pieces,
)
from milp_ray.users.records import Example, Turn, UserSplit

PROMPT = PromptSection()


@pytest.fixture(scope="module")
def base(tiny_llama_dir: Path) -> Base:
    return load_base(BaseSection(model=str(tiny_llama_dir), device="cpu"))


def targets(base: Base, sequence: Sequence) -> str:
    return base.tokenizer.decode(list(sequence.ids[sequence.target_from :]))


def sequence(length: int, kind: str = "instruction") -> Sequence:
    return Sequence(tuple(range(length)), 1, kind)


def test_the_loss_of_a_pair_is_on_the_response_and_its_end_token_only(base: Base) -> None:
    (pair,) = instruction_set([Example("Which pet?", "A dog.")], base, PROMPT, max_length=100)
    assert base.tokenizer.decode(list(pair.ids)) == "Question: Which pet?\nAnswer: A dog.</s>"
    assert targets(base, pair) == " A dog.</s>"


def test_a_context_stands_before_the_question_and_changes_no_target(base: Base) -> None:
    example = [Example("Which pet?", "A dog.")]
    (plain,) = instruction_set(example, base, PROMPT, max_length=200)
    (told,) = instruction_set(example, base, PROMPT, max_length=200, contexts=["User profile:\nDog.\n"])
    assert base.tokenizer.decode(list(told.ids)).startswith("User profile:\nDog.\nQuestion:")
    assert targets(base, told) == targets(base, plain)


def test_the_loss_of_a_history_is_on_its_turns_and_not_on_the_phrase(base: Base) -> None:
    split = UserSplit("u", None, (Turn("I have a dog."), Turn("It barks.")), (), (), ())
    (block,) = memory_set(split, base, PROMPT, max_length=100, block_turns=None)
    assert targets(base, block) == "I have a dog.\nIt barks.\n"


def test_no_token_of_a_history_is_lost_however_long_a_turn_is(base: Base) -> None:
    text = "abcdefghij" * 30
    split = UserSplit("u", None, (Turn("first"), Turn(text), Turn("last")), (), (), ())
    blocks = memory_set(split, base, PROMPT, max_length=64, block_turns=None)
    assert max(len(block.ids) for block in blocks) <= 64
    whole = "".join(base.tokenizer.decode(list(block.ids)) for block in blocks)
    assert whole.replace(PROMPT.history, "") == f"first\n{text}\nlast\n"


def test_a_long_pair_keeps_the_end_of_its_prompt_and_the_beginning_of_its_response() -> None:
    prompt, response = list(range(100)), list(range(500, 510))
    assert fit(prompt, response, 40) == (prompt[-30:], response)
    assert fit(prompt, list(range(500, 600)), 40) == (prompt[-10:], list(range(500, 530)))


def test_the_kept_response_does_not_depend_on_the_prompt() -> None:
    response = list(range(500, 600))
    assert fit([1], response, 40)[1] == fit(list(range(90)), response, 40)[1]


def test_cutting_from_the_left_keeps_what_is_nearest_to_the_answer() -> None:
    assert cut_left([1, 2, 3, 4], 2) == [3, 4]
    assert cut_left([1, 2], 5) == [1, 2]


@given(n_prompt=st.integers(0, 60), n_response=st.integers(1, 60), room=st.integers(2, 50))
def test_a_pair_fits_the_room_and_keeps_some_of_both(n_prompt: int, n_response: int, room: int) -> None:
    prompt, response = fit(list(range(n_prompt)), list(range(n_response)), room)
    assert len(prompt) + len(response) <= room
    assert response == list(range(len(response)))
    assert len(response) >= 1
    assert prompt == list(range(n_prompt - len(prompt), n_prompt))
    assert len(prompt) >= min(1, n_prompt)


def test_nothing_is_left_where_there_is_no_room() -> None:
    assert cut_left([1, 2, 3], 0) == cut_left([1, 2, 3], -1) == []


@pytest.mark.parametrize("start_ids", [(), (7,)])
def test_a_length_without_room_for_a_token_and_the_one_before_it_is_refused(
    start_ids: tuple[int, ...], base: Base
) -> None:
    base, least = replace(base, start_ids=start_ids), len(start_ids) + 2
    examples, split = [Example("Which pet?", "A dog.")], UserSplit("u", None, (Turn("hi"),), (), (), ())
    for length in range(1, least):
        with pytest.raises(MilpError, match=rf"at most {length} tokens .* be {least} or more"):
            instruction_set(examples, base, PROMPT, max_length=length)
        with pytest.raises(MilpError, match=rf"at most {length} tokens .* be {least} or more"):
            memory_set(split, base, PROMPT, max_length=length, block_turns=None)
    made = instruction_set(examples, base, PROMPT, max_length=least)
    made += memory_set(split, base, PROMPT, max_length=least, block_turns=None)
    assert max(len(one.ids) for one in made) == least
    assert all(1 <= one.target_from < len(one.ids) for one in made)


def test_an_epoch_holds_every_sequence_once_in_either_order() -> None:
    sequences = [sequence(3 + i % 5) for i in range(23)]
    for order in ("chronological", "shuffled"):
        plan = epoch_plan(sequences, 4, order, random.Random(0))
        assert sorted(i for batch in plan for i in batch) == list(range(23))
        assert all(len(batch) <= 4 for batch in plan)


def test_chronological_keeps_time_order() -> None:
    sequences = [sequence(length) for length in (9, 3, 40, 5, 6)]
    assert epoch_plan(sequences, 2, "chronological", random.Random(0)) == [(0, 1), (2, 3), (4,)]


def test_a_batch_is_run_in_pieces_only_where_that_saves_much_padding(base: Base) -> None:
    assert pieces([480, 20, 19, 18]) == [1, 3]
    assert pieces([480, 470, 250, 240, 20, 19]) == [2, 2, 2]
    assert pieces([30, 25, 20, 10]) == [4]
    assert pieces([7]) == [1]
    sequences = [sequence(20), sequence(200), sequence(19)]
    batches = make_batches(sequences, (0, 1, 2), base)
    assert [[len(s.ids) for s in batch.sequences] for batch in batches] == [[200], [20, 19]]


def test_shuffled_batches_hold_near_equal_lengths_and_differ_by_seed() -> None:
    sequences = [sequence(length) for length in (3, 90, 4, 91, 3, 92, 4, 93)]
    plan = epoch_plan(sequences, 4, "shuffled", random.Random(0))
    assert sorted(sorted(batch) for batch in plan) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    plans = {tuple(epoch_plan([sequence(5)] * 9, 2, "shuffled", random.Random(seed))) for seed in range(5)}
    assert len(plans) > 1


def test_a_batch_is_padded_on_the_right_and_keeps_the_positions_before_targets(base: Base) -> None:
    sequences = [Sequence((5, 6, 7, 8), 2, "instruction"), Sequence((9, 10), 1, "memory")]
    batch = make_batch(sequences, base)
    pad = base.pad_id
    assert batch.ids.tolist() == [[5, 6, 7, 8], [9, 10, pad, pad]]
    assert batch.keep.tolist() == [[False, True, True, False], [True, False, False, False]]
    assert batch.labels.tolist() == [7, 8, 10]
    assert batch.rows.tolist() == [0, 0, 1]
    assert batch.n_tokens == 6
    assert torch.equal(batch.ids[0][1:][batch.keep[0][:-1]], batch.labels[:2])


def test_prompt_tokens_are_the_same_in_training_and_in_generation(shared_dir: Path) -> None:
    """A tokenizer that merges across spaces must not see the response while it cuts the prompt."""
    base = load_base(BaseSection(model=str(shared_dir / "models" / "TinyStories-656K"), device="cpu"))
    (pair,) = instruction_set([Example("Which pet?", "A dog.")], base, PROMPT, max_length=200)
    prompt = base.tokenize(["Question: Which pet?\nAnswer:"])[0]
    assert list(pair.ids[: pair.target_from]) == [*base.start_ids, *prompt]
    assert pair.ids[-1] == base.eos_id
    assert targets(base, pair).strip().startswith("A dog.")

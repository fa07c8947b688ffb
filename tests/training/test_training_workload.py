"""Counts of what there is to train: those that training itself reports."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from milp_ray.config.base import BaseSection
from milp_ray.config.prompt import PromptSection
from milp_ray.config.training import TrainingSection
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.training.base import load_base, load_tokenizer
from milp_ray.training.data import Sequence
from milp_ray.training.job import Job
from milp_ray.training.train import train
from milp_ray.training.workload import (
    TOKENS_A_TURN,
    CharacterTokens,
    TokenizerTokens,
    invented_work,
    pass_work,
    user_work,
)
from milp_ray.users.records import UserSplit

BOTH = frozenset({"memory", "instruction"})
TRAINING = TrainingSection(memory_epochs=2, instruction_epochs=1, batch_size=3, gradient_accumulation=2)


@pytest.mark.parametrize("stages", ["sequential", "joint"])
def test_tokens_and_steps_are_those_that_training_reports(
    tiny_llama_dir: Path, make_split: Callable[..., UserSplit], stages: str
) -> None:
    section = BaseSection(model=str(tiny_llama_dir), device="cpu")
    training = TrainingSection.model_validate({**TRAINING.model_dump(), "stages": stages})
    split, prompt, base = make_split(), PromptSection(), load_base(section)
    layout = CanonicalLayout((False, False, False, True), 2)
    [result] = train(base, [Job("a", split, layout, BOTH, seed=0)], training, prompt)
    work = user_work(
        [split],
        TokenizerTokens(load_tokenizer(section)),
        training,
        prompt,
        parts=BOTH,
        context_length=base.context_length,
        max_new_tokens=8,
    )
    assert work.trained_tokens == result.tokens
    assert sum(stage.epochs * stage.work.steps for stage in work.stages) == result.steps
    assert work.validation_queries.queries == len(split.validation)


def test_padding_counts_up_to_the_longest_row_of_a_piece() -> None:
    rows = [Sequence((0,) * n, 1, "memory") for n in (4, 10, 9)]
    work = pass_work(rows, batch_size=2)
    assert (work.tokens, work.padded, work.pairs) == (23, 2 * 10 + 4, 2 * 100 + 16)
    assert (work.passes, work.steps, work.targets) == (2, 2, 20)
    assert (work.longest_row, work.step_tokens, work.step_targets) == (10, 20, 17)
    assert pass_work(rows, batch_size=2, accumulation=2).steps == 1
    assert pass_work([], batch_size=2).steps == 0


def test_users_are_averaged_and_their_largest_batch_is_kept(make_split: Callable[..., UserSplit]) -> None:
    split = make_split()
    short = UserSplit(split.user_id, None, split.history[:1], split.train, split.validation, ())

    def work(*splits: UserSplit) -> tuple[float, int]:
        found = user_work(
            splits,
            CharacterTokens(),
            TRAINING,
            PromptSection(),
            parts=frozenset({"memory"}),
            context_length=256,
            max_new_tokens=8,
        )
        return found.trained_tokens, found.largest.longest_row

    (long_tokens, long_row), (short_tokens, short_row) = work(split), work(short)
    assert short_row < long_row
    assert work(split, short) == ((long_tokens + short_tokens) / 2, long_row)


def test_without_a_tokenizer_four_characters_are_a_token() -> None:
    assert CharacterTokens().count_tokens(["", "abcd", "abcde"]) == [0, 1, 2]
    assert [len(ids) for ids in CharacterTokens().tokenize(["abcde"])] == [2]


def test_invented_users_have_what_they_are_said_to() -> None:
    work = invented_work(
        TRAINING,
        history_tokens=600,
        n_train=10,
        n_validation=2,
        example_tokens=20,
        parts=BOTH,
        context_length=256,
        max_new_tokens=8,
    )
    assert work.history_tokens == 600
    assert work.trained_tokens == 2 * 600 + 1 * 10 * 20
    assert work.largest.longest_row == 256
    assert (work.validation_queries.prompt_tokens, work.validation_queries.new_tokens) == (10, 8)


def test_invented_histories_are_cut_into_blocks_of_turns() -> None:
    training = TRAINING.model_copy(update={"memory_block_turns": 2})
    work = invented_work(
        training,
        history_tokens=600,
        n_train=0,
        n_validation=0,
        example_tokens=20,
        parts=frozenset({"memory"}),
        context_length=256,
        max_new_tokens=8,
    )
    assert work.largest.longest_row == 2 * TOKENS_A_TURN
    assert work.validation_queries.queries == 0

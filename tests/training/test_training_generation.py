"""Batched greedy generation equals one-by-one greedy, whatever the architecture."""

from __future__ import annotations

import pytest
import torch

from milp_ray.config.base import BaseSection
from milp_ray.errors import MilpError
from milp_ray.training.base import Base, load_base
from milp_ray.training.generation import Questions, generate, prompt_tokens

PROMPTS = (
    "Question: What is the colour of my dog?\nAnswer:",
    "Hi",
    "A much longer prompt, so that the shorter ones need padding on their left. Question: Why?\nAnswer:",
    "Question: Who?\nAnswer:",
)


@pytest.fixture(scope="module", params=["tiny_llama_dir", "tiny_gpt2_dir", "tiny_roberta_dir"])
def base(request: pytest.FixtureRequest) -> Base:
    return load_base(BaseSection(model=str(request.getfixturevalue(request.param)), device="cpu"))


def answers_of(base: Base, prompts: list[str], **options: int) -> list[str]:
    [answers] = generate(base, [Questions(prompts)], **options)
    return answers


def greedy_one_by_one(base: Base, prompt: str, max_new_tokens: int) -> list[int]:
    """The definition: the whole sequence again for every token, no cache, no padding."""
    ids = prompt_tokens(base, [prompt], max_new_tokens)[0]
    answer: list[int] = []
    while len(answer) < max_new_tokens:
        with torch.no_grad():
            token = int(base.model(input_ids=torch.tensor([ids + answer])).logits[0, -1].argmax())
        if token == base.eos_id:
            break
        answer.append(token)
    return answer


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_batched_answers_equal_greedy_decoding_of_each_prompt_alone(base: Base, batch_size: int) -> None:
    expected = [greedy_one_by_one(base, prompt, 12) for prompt in PROMPTS]
    texts = [t.strip() for t in base.tokenizer.batch_decode(expected, skip_special_tokens=True)]
    assert answers_of(base, PROMPTS, max_new_tokens=12, batch_size=batch_size) == texts


def test_a_row_ends_at_the_end_token_while_the_others_go_on(base: Base) -> None:
    answers = [greedy_one_by_one(base, prompt, 12) for prompt in PROMPTS]
    end = answers[0][2]  # a token that the first answer holds early: let it be the end token
    original, base.eos_id = base.eos_id, end
    try:
        expected = [a[: a.index(end)] if end in a else a for a in answers]
        assert len({len(a) for a in expected}) > 1, "the case needs rows that end at different times"
        texts = [t.strip() for t in base.tokenizer.batch_decode(expected, skip_special_tokens=True)]
        assert answers_of(base, PROMPTS, max_new_tokens=12, batch_size=4) == texts
    finally:
        base.eos_id = original


def test_a_prompt_too_long_for_the_context_keeps_its_end(base: Base) -> None:
    long = "abcdefghij" * 60
    (ids,) = prompt_tokens(base, [long], 16)
    assert len(ids) == base.context_length - 16
    assert ids == base.tokenize([long])[0][-len(ids) :]
    assert answers_of(base, [long], max_new_tokens=16, batch_size=1) == [
        base.tokenizer.decode(greedy_one_by_one(base, long, 16), skip_special_tokens=True).strip()
    ]


def test_no_room_for_a_prompt_is_refused_with_the_allowed_range(base: Base) -> None:
    with pytest.raises(MilpError, match=f"use 1 to {base.context_length - 1}"):
        answers_of(base, PROMPTS, max_new_tokens=base.context_length, batch_size=1)


def test_no_prompts_give_no_answers(base: Base) -> None:
    assert answers_of(base, [], max_new_tokens=4, batch_size=2) == []

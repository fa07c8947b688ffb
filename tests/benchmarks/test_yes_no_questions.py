"""The questions from which PLUM's base is made: their answers are true, and none sees another."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pretrain_yes_no
import pytest
import torch
from plum_questions import HELD_OUT_FRAMES, NO, PROMPT, YES
from pretrain_yes_no import Questions, answer_loss
from yes_no_questions import LEVELS, Asked, draw_asked

from milp_ray.config.base import BaseSection
from milp_ray.methods.plum import world
from milp_ray.methods.plum.rule import YES_NO_FRAMES, clauses_of_text
from milp_ray.training.base import Base, load_base
from milp_ray.training.text import history_context, query_prompt, response_text
from milp_ray.users.persona_world import pretraining_rng
from milp_ray.users.records import Turn


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base(BaseSection(device="cpu"))


def drawn(level: int, n: int = 40) -> list[Asked]:
    return [draw_asked(LEVELS[level], pretraining_rng(7_000 + i)) for i in range(n)]


def clause_of(question: str) -> str:
    [clause] = {
        question.removeprefix(before).removesuffix(after)
        for frame in YES_NO_FRAMES
        for before, after in [frame.split("{clause}")]
        if question.startswith(before) and question.endswith(after)
    }
    return clause


@pytest.mark.parametrize("level", range(len(LEVELS)))
def test_yes_is_the_answer_exactly_where_it_was_said(level: int) -> None:
    answers = set()
    for asked in drawn(level):
        said = {thing for text in asked.turns for c in clauses_of_text(text) for thing in world.things_of(c)}
        for question, is_yes in asked.questions:
            assert (world.things_of(clause_of(question))[0] in said) is is_yes
            answers.add(is_yes)
    assert answers == {True, False}


def test_levels_are_ever_harder() -> None:
    for level, hard in ((0, False), (1, True)):
        topics_alike = False
        for asked in drawn(level):
            clauses = {clause for text in asked.turns for clause in clauses_of_text(text)}
            topics = {thing.topic for clause in clauses for thing in world.things_of(clause)}
            for question, is_yes in asked.questions:
                clause = clause_of(question)
                if is_yes:
                    assert clause in clauses
                else:
                    topics_alike |= world.things_of(clause)[0].topic in topics
        assert topics_alike is hard
    assert any(not asked.turns for asked in drawn(3, 200))
    assert max(len(asked.turns) for asked in drawn(3, 200)) == 32


def test_nothing_of_what_plum_is_measured_with_is_asked() -> None:
    frames = [frame.split("{clause}")[0] for frame in HELD_OUT_FRAMES]
    for asked in drawn(3):
        assert not any(question.startswith(frame) for question, _ in asked.questions for frame in frames)


def test_a_question_among_others_is_answered_as_alone(base: Base) -> None:
    questions = Questions(base.tokenizer, 1500, base.context_length)
    batch = next(questions.batches(LEVELS[3]))
    assert len(batch.ids) > 1, "this test is about padding, too"
    with torch.inference_mode():
        hidden = base.model.model(
            input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions
        ).last_hidden_state
        together = base.model.lm_head(hidden[batch.rows, batch.places])[batch.decides]
        n_checked, token = 0, iter(together)
        first = iter(
            one
            for i in range(1000)
            if (one := draw_asked(LEVELS[3], pretraining_rng(5 * 10**8 + i))).questions
        )
        while n_checked < len(together):
            asked = next(first)
            for question, is_yes in asked.questions:
                context = history_context([Turn(text) for text in asked.turns], PROMPT)
                answer = base.tokenize([response_text(YES if is_yes else NO)])[0]
                prompt = [base.tokenize([text])[0] for text in (context, query_prompt(question, PROMPT))]
                alone = [*base.start_ids, *prompt[0], *prompt[1], answer[0]]
                logits = base.model(input_ids=torch.tensor([alone])).logits[0, -1]
                assert torch.allclose(logits, next(token), atol=1e-3)
                n_checked += 1
    loss, share = answer_loss(base.model, batch, questions.choices)
    assert loss.item() > 0
    assert 0 <= share <= 1


def test_a_lesson_that_was_interrupted_ends_as_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Every second step is a level, so that there is one on either side of the interruption.
    monkeypatch.setattr(pretrain_yes_no, "LEVEL_STEPS", 2)
    monkeypatch.setattr(pretrain_yes_no, "NEXT_LEVEL_ACCURACY", -1.0)

    def teach(name: str) -> None:
        given = ["--steps", "6", "--batch-tokens", "400", "--keep-every", "3", "--out", str(tmp_path / name)]
        monkeypatch.setattr("sys.argv", ["pretrain_yes_no.py", *given])
        pretrain_yes_no.main()

    teach("whole")
    with monkeypatch.context() as patch:
        ask, asked = pretrain_yes_no.answer_loss, itertools.count()

        def interrupted(*arguments: Any) -> tuple[torch.Tensor, float]:
            if next(asked) == 4:
                raise KeyboardInterrupt
            return ask(*arguments)

        patch.setattr(pretrain_yes_no, "answer_loss", interrupted)
        with pytest.raises(SystemExit, match="the same command goes on"):
            teach("interrupted")
    assert not (tmp_path / "interrupted" / "model.safetensors").exists()
    capsys.readouterr()
    teach("interrupted")
    assert "going on from step 3" in capsys.readouterr().out
    whole, resumed = ((tmp_path / name / "model.safetensors") for name in ("whole", "interrupted"))
    assert resumed.read_bytes() == whole.read_bytes()
    assert not list((tmp_path / "interrupted").glob("*.pt"))

"""What PLUM keeps without data of earlier conversations: what the adapter itself says of everything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from milp_ray.config.base import BaseSection
from milp_ray.config.methods import MethodsSection, PlumSection, TeacherSection
from milp_ray.config.prompt import PromptSection
from milp_ray.config.training import LoraAlphaSection, TrainingSection
from milp_ray.errors import MilpError
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.methods.plum import rehearsal, train_adapters, world
from milp_ray.methods.plum.lessons import Lesson, lessons_of
from milp_ray.methods.plum.qa import yes_no
from milp_ray.methods.plum.rehearsal import margins_of, rehearsed, stands, things_in
from milp_ray.methods.plum.rule import YES_NO_FRAMES, RuleTeacher, things_asked
from milp_ray.methods.plum.stages import Course
from milp_ray.methods.plum.world import Thing
from milp_ray.methods.protocol import FitRequest
from milp_ray.training.base import Base, load_base
from milp_ray.training.job import Stage
from milp_ray.training.text import query_prompt
from milp_ray.users.records import Turn, UserSplit

SAID = ("I keep a dog at home.", "I live in Oslo.", "I take lithium every day.")
DOG, CAT = world.own("pet", "dog"), world.own("pet", "cat")
OSLO, LIMA = world.own("city", "Oslo"), world.own("city", "Lima")


@pytest.fixture(scope="module")
def base(tiny_llama_dir: Path) -> Base:
    return load_base(BaseSection(model=str(tiny_llama_dir), device="cpu"))


@pytest.fixture
def request_for(base: Base) -> Callable[..., FitRequest]:
    def make(*said: str, **plum: Any) -> FitRequest:
        section = {"conversation": {"turns": 1}, "questions_per_statement": 4, "epochs": 2, **plum}
        training = TrainingSection(
            learning_rate=2e-2, batch_size=16, lora_alpha=LoraAlphaSection(rule="constant", value=8)
        )
        split = UserSplit("alpha", None, tuple(map(Turn, said or SAID)), (), (), ())
        methods = MethodsSection(plum=PlumSection(**{"rehearsal_rounds": 4, **section}))
        layout = CanonicalLayout((True,) * base.n_layers, 8)
        return FitRequest(base, split, layout, training, PromptSection(), 8, 4, 3, methods=methods)

    return make


@pytest.fixture
def own_facts_only(monkeypatch: pytest.MonkeyPatch) -> tuple[Thing, ...]:
    things = tuple(thing for thing in world.everything() if thing == world.own(thing.topic, thing.value))
    monkeypatch.setattr(world, "everything", lambda: things)
    return things


def taught(request: FitRequest) -> list[Lesson]:
    return lessons_of(request, RuleTeacher(request.methods.plum.questions_per_statement))


def texts_of(base: Base, stage: Stage | None) -> list[str]:
    assert stage is not None
    return [base.tokenizer.decode(one.ids, skip_special_tokens=True) for one in stage.sequences]


def second_stage(request: FitRequest, margins: dict[Thing, float]) -> Stage:
    """The first round of the second lesson, with these margins after the first one's."""
    course = rehearsed(request, taught(request)[:2], ())
    next(course)
    stage = course.send(dict.fromkeys(margins, -3.0))
    while stage is None or stage.name != "conversation 1, round 0":
        stage = course.send(margins)
    return stage


def second_lesson(request: FitRequest, margins: dict[Thing, float]) -> list[str]:
    """What :func:`second_stage` trains on."""
    return texts_of(request.base, second_stage(request, margins))


def asked_about(texts: list[str], answer: str) -> set[Thing]:
    found = [text.partition("Question: ")[2].partition("\nAnswer: ") for text in texts]
    return {thing for question, _, given in found if given == answer for thing in things_asked(question)}


# ------------------------------------------------------------------------------------- the vocabulary


def test_everything_is_recognised_in_each_of_its_wordings() -> None:
    things = world.everything()
    assert len(set(things)) == len(things) > 900
    for thing in things:
        for clause in world.wordings(thing):
            assert world.things_of(clause) == [thing]


def test_a_question_of_the_teacher_tells_what_it_is_about() -> None:
    for frame in YES_NO_FRAMES:
        assert things_asked(frame.format(clause="I live in Oslo")) == [OSLO]
    assert things_asked("Where do I live?") == []


def test_a_lesson_tells_what_was_said_and_what_was_not(request_for: Any) -> None:
    told = things_in(taught(request_for())[0].pairs)
    assert [thing for thing, is_said in told.items() if is_said] == [DOG]
    denied = [thing for thing, is_said in told.items() if not is_said]
    assert denied
    assert all(thing.topic == "pet" for thing in denied)


# ---------------------------------------------------------------------------------------- what stands


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, True),
        ({CAT: 0.4}, False),  # believed, and about to be lost
        ({LIMA: 3.0}, True),  # one alone may come
        ({OSLO: 0.9}, False),  # said just now, and hardly learnt
        ({DOG: 0.6}, False),  # denied just now, and believed
    ],
)
def test_what_must_stand_after_a_round(changed: dict[Thing, float], expected: bool) -> None:
    margins = {CAT: 2.0, LIMA: -2.0, OSLO: 2.0, DOG: -2.0, **changed}
    unknown = Thing("", "", "I take lithium")
    assert stands({CAT: True, LIMA: False}, {OSLO: True, DOG: False, unknown: True}, margins) is expected


def test_no_more_than_a_few_may_come() -> None:
    beliefs = dict.fromkeys(world.everything()[:20], False)
    for n, expected in ((rehearsal.MOST_GAINED, True), (rehearsal.MOST_GAINED + 1, False)):
        margins = {thing: 1.0 if i < n else -1.0 for i, thing in enumerate(beliefs)}
        assert stands(beliefs, {}, margins) is expected


# --------------------------------------------------------------------------------------- what is asked


def test_margins_are_the_log_odds_of_the_answer_yes(
    base: Base, request_for: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world, "everything", lambda: (DOG, OSLO))
    monkeypatch.setattr(world, "wordings", lambda thing: [f"I like {thing.value}"])
    monkeypatch.setattr(rehearsal, "YES_NO_FRAMES", ("Did I say that {clause}?",))
    request = request_for(yes="It is so.", no="It was not.")
    [found] = margins_of([(request, None)], 0)
    for thing in (DOG, OSLO):
        prompt = query_prompt(f"Did I say that I like {thing.value}?", request.prompt)
        yes, no = (
            [*base.start_ids, *base.tokenize([f"{prompt} {words}"])[0]]
            for words in ("It is so.", "It was not.")
        )
        at = next(i for i, (a, b) in enumerate(zip(yes, no, strict=False)) if a != b)
        with torch.no_grad():
            chances = base.model(torch.tensor([yes[:at]])).logits[0, -1].double().softmax(-1)
        odds = chances[yes[at]] / (1.0 - chances[yes[at]])
        assert found[thing] == pytest.approx(odds.log().item(), abs=1e-3)


def test_what_is_in_doubt_is_asked_again(request_for: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "everything", lambda: (DOG, OSLO))
    answers = {DOG: [1.0, -3.0, 5.0], OSLO: [6.0]}

    def log_odds(asked: Any, things: list[list[Thing]], rngs: list[Random]) -> list[dict[Thing, float]]:
        return [{thing: answers[thing].pop(0) for thing in own} for own in things]

    monkeypatch.setattr(rehearsal, "_log_odds", log_odds)
    assert margins_of([(request_for(), None)], 0) == [{DOG: 1.0, OSLO: 6.0}]
    assert answers == {DOG: [], OSLO: []}


# ---------------------------------------------------------------------------------- what is trained on


def test_beliefs_are_rehearsed_whether_they_are_true_or_not(
    base: Base, request_for: Any, own_facts_only: tuple[Thing, ...]
) -> None:
    request = request_for()
    texts = second_lesson(request, {thing: 3.0 if thing == CAT else -3.0 for thing in own_facts_only})
    assert {OSLO, CAT} <= asked_about(texts, "Yes.")
    unsaid = asked_about(texts, "No.")
    assert DOG in unsaid, "nothing but the adapter's own answers is known of earlier conversations"
    assert not unsaid & {OSLO, CAT}
    assert unsaid == set(own_facts_only) - {OSLO, CAT}
    assert sum(text.endswith(world.open_answer(CAT)) for text in texts) == 1, "openly, too"


def test_nothing_is_believed_before_the_first_lesson(
    base: Base, request_for: Any, own_facts_only: tuple[Thing, ...]
) -> None:
    request = request_for()
    course = rehearsed(request, taught(request), ())
    assert next(course) is None
    texts = texts_of(base, course.send(dict.fromkeys(own_facts_only, 9.0)))
    assert asked_about(texts, "Yes.") == {DOG}


@pytest.mark.parametrize("believed", [{OSLO}, {LIMA}, {OSLO, LIMA}, {world.own("city", "Porto")}])
def test_what_a_lesson_is_about_is_not_asked_openly_by_the_adapters_beliefs(
    believed: set[Thing], request_for: Any, own_facts_only: tuple[Thing, ...]
) -> None:
    request = request_for("I keep a dog at home.", "I live in Oslo.")
    texts = second_lesson(request, {thing: 3.0 if thing in believed else -3.0 for thing in own_facts_only})
    answers = [text.partition("Answer: ")[2] for text in texts]
    assert {answer for answer in answers if "live in" in answer} == {world.open_answer(OSLO)}


def test_of_two_values_none_is_the_answer_to_an_open_question(
    request_for: Any, own_facts_only: tuple[Thing, ...]
) -> None:
    request = request_for("I take lithium every day.", "I keep a dog at home.")
    for believed, expected in (({OSLO}, 1), ({OSLO, LIMA}, 0)):
        texts = second_lesson(
            request, {thing: 3.0 if thing in believed else -3.0 for thing in own_facts_only}
        )
        assert sum("live in" in text.partition("Answer: ")[2] for text in texts) == expected


def test_what_the_teacher_writes_about_is_no_matter_of_belief(
    base: Base, request_for: Any, own_facts_only: tuple[Thing, ...]
) -> None:
    """What a pair is about that is written and not chosen is not rehearsed as unsaid."""
    request = request_for()
    [_, lesson] = taught(request)[:2]
    lesson = replace(
        lesson, written=(*lesson.written, yes_no("Did I say that I live in Lima?", is_positive=True))
    )
    course = rehearsed(request, [taught(request)[0], lesson], ())
    next(course)
    learnt = dict.fromkeys(own_facts_only, -3.0) | {DOG: 3.0}
    course.send(dict.fromkeys(own_facts_only, -3.0))
    assert LIMA not in asked_about(texts_of(base, course.send(learnt)), "No.")


def test_the_lesson_is_right_and_not_the_adapter(request_for: Any, own_facts_only: tuple[Thing, ...]) -> None:
    request = request_for()
    [denied, *_] = [thing for thing, said in things_in(taught(request)[1].pairs).items() if not said]
    texts = second_lesson(request, {thing: 3.0 if thing == denied else -3.0 for thing in own_facts_only})
    assert denied not in asked_about(texts, "Yes.")
    assert OSLO not in asked_about(texts, "No.")


def test_rounds_end_when_everything_stands_or_they_are_used_up(
    request_for: Any, own_facts_only: tuple[Thing, ...]
) -> None:
    request = request_for(rehearsal_rounds=3)
    course = rehearsed(request, taught(request)[:2], ())
    nothing = dict.fromkeys(own_facts_only, -3.0)
    learnt = nothing | {DOG: 3.0}
    next(course)
    names = [
        stage.name
        for margins in (nothing, nothing, learnt, learnt, learnt)
        if (stage := course.send(margins))
    ]
    assert names == [
        *(f"conversation 0, round {number}" for number in (0, 1)),
        *(f"conversation 1, round {number}" for number in (0, 1, 2)),
    ]
    with pytest.raises(StopIteration):
        course.send(learnt)


def test_both_sides_weigh_alike_once_enough_is_believed(
    base: Base, request_for: Any, own_facts_only: tuple[Thing, ...]
) -> None:
    request = request_for()
    lesson = taught(request)[1]
    others = [thing for thing in own_facts_only if thing not in things_in(lesson.written)]
    for n_believed, is_enough in ((1, False), (len(others) // 3, True)):
        margins = dict.fromkeys(own_facts_only, -3.0) | dict.fromkeys(others[:n_believed], 3.0)
        beside = second_stage(request, margins).sequences[len(lesson.sequences) :]
        yes, no = (
            sum(max(one.target_weights) for one in beside if base.tokenizer.decode(one.ids).count(answer))
            for answer in ("Answer: Yes.", "Answer: No.")
        )
        assert yes == n_believed
        assert (no == pytest.approx(yes)) is is_enough
        assert is_enough or no == pytest.approx(rehearsal.LEAST_WEIGHT * (len(others) - n_believed))


# ------------------------------------------------------------------------------------------ the adapter


def test_an_adapter_that_forgets_whatever_it_is_not_trained_on_keeps_all_conversations(
    base: Base, request_for: Any, own_facts_only: tuple[Thing, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place of adapters: what the last stage said of each thing, and no to everything else."""

    def trained(courses: list[Course]) -> list[Any]:
        return [asked_about(texts_of(base, course.stages[-1]), "Yes.") for course in courses]

    def margins(asked: list[tuple[FitRequest, set[Thing] | None]], number: int) -> list[dict[Thing, float]]:
        return [
            {thing: 3.0 if thing in (said or ()) else -3.0 for thing in own_facts_only} for _, said in asked
        ]

    monkeypatch.setattr(rehearsal, "train_courses", trained)
    monkeypatch.setattr(rehearsal, "margins_of", margins)
    requests = [request_for("I live in Oslo.", "I keep a dog at home."), request_for("I live in Lima.")]
    told = [(request, taught(request)) for request in requests]
    assert rehearsal.train_rehearsed(told, ()) == [{OSLO, DOG}, {LIMA}]


def test_a_second_call_gives_the_same_bits(request_for: Any, own_facts_only: tuple[Thing, ...]) -> None:
    requests = [replace(request_for(*SAID[1:], rehearsal_rounds=2), seed=8), request_for(rehearsal_rounds=2)]
    for one, other in zip(train_adapters(requests), train_adapters(requests), strict=True):
        assert one is not None
        assert other is not None
        assert one.tensors.keys() == other.tensors.keys()
        for name, tensor in one.tensors.items():
            assert torch.equal(tensor, other.tensors[name])


def test_answers_that_are_the_same_to_the_base_are_refused(request_for: Any) -> None:
    begin = "I am quite certain, as certain as can be, that this was "
    request = request_for(yes=begin + "said.", no=begin + "not said.")
    request = replace(request, training=request.training.model_copy(update={"max_length": 12}))
    with pytest.raises(
        MilpError, match=r"methods\.plum\.yes and no are the same to this base in the \d+ tokens"
    ):
        train_adapters([request])


# ----------------------------------------------------------------------------------- the configuration


@pytest.mark.parametrize(
    "other",
    [
        {"earlier_pairs": 4},
        {"negatives": False},
        {"teacher": TeacherSection(kind="hf", model="some/model")},
    ],
)
def test_rehearsal_is_refused_where_it_cannot_be(other: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="rehearsal_rounds asks about the vocabulary"):
        PlumSection(rehearsal_rounds=1, **other)
    PlumSection(**other)


def test_yes_and_no_are_told_apart() -> None:
    with pytest.raises(ValidationError, match=r"yes and no are both 'Right\.'"):
        PlumSection(yes="Right.", no="Right.")

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
from milp_ray.methods.plum.rehearsal import State, margins_of, rehearsed, things_in
from milp_ray.methods.plum.rule import RuleTeacher, things_asked
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


class Pupil:
    """A user's training, of whose adapters nothing but what they say of everything is told."""

    def __init__(self, request: FitRequest, lessons: list[Lesson]) -> None:
        self._going = rehearsed(request, lessons, ())
        assert next(self._going).stages == ()
        self.courses: list[Course] = []

    def says(self, margins: dict[Thing, float], adapter: Any = None) -> Stage:
        """What it goes through next, now that it says this."""
        course = self._going.send(State(adapter, margins))
        self.courses.append(course)
        [stage] = course.stages
        return stage

    def ends(self, margins: dict[Thing, float], adapter: Any = None) -> Any:
        """The adapter that it has in the end."""
        with pytest.raises(StopIteration) as stop:
            self._going.send(State(adapter, margins))
        return stop.value.value


def texts_of(base: Base, stage: Stage) -> list[str]:
    return [base.tokenizer.decode(one.ids, skip_special_tokens=True) for one in stage.sequences]


def second_stage(request: FitRequest, margins: dict[Thing, float]) -> Stage:
    """The first round of the second lesson, with these margins after the first one's."""
    pupil = Pupil(request, taught(request)[:2])
    stage = pupil.says(dict.fromkeys(margins, -3.0))
    while stage.name != "conversation 1, round 0":
        stage = pupil.says(margins)
    return stage


def second_lesson(request: FitRequest, margins: dict[Thing, float]) -> list[str]:
    """What :func:`second_stage` trains on."""
    return texts_of(request.base, second_stage(request, margins))


def asked_about(texts: list[str], answer: str) -> set[Thing]:
    found = [text.partition("Question: ")[2].partition("\nAnswer: ") for text in texts]
    return {thing for question, _, given in found if given == answer for thing in things_asked(question)}


# ------------------------------------------------------------------------------------- what is written


def test_a_lesson_tells_what_was_said_and_what_was_not(request_for: Any) -> None:
    told = things_in(taught(request_for())[0].pairs)
    assert [thing for thing, is_said in told.items() if is_said] == [DOG]
    denied = [thing for thing, is_said in told.items() if not is_said]
    assert denied
    assert all(thing.topic == "pet" for thing in denied)


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
    pupil = Pupil(request, taught(request))
    texts = texts_of(base, pupil.says(dict.fromkeys(own_facts_only, 9.0)))
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
    pupil = Pupil(request, [taught(request)[0], lesson])
    learnt = dict.fromkeys(own_facts_only, -3.0) | {DOG: 3.0}
    pupil.says(dict.fromkeys(own_facts_only, -3.0))
    assert LIMA not in asked_about(texts_of(base, pupil.says(learnt)), "No.")


def test_of_what_is_far_from_being_believed_only_some_is_trained_on(
    base: Base, request_for: Any, own_facts_only: tuple[Thing, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rehearsal, "ANY", 3)
    request = request_for()
    margins = dict.fromkeys(own_facts_only, -20.0) | {CAT: -1.0, LIMA: -2.0, OSLO: 2.0}
    assert {DOG, OSLO, CAT, LIMA} <= set(margins)
    unsaid = asked_about(second_lesson(request, margins), "No.")
    own = {thing for thing, said in things_in(taught(request)[1].pairs).items() if not said}
    assert {CAT, LIMA} - own <= unsaid
    assert len(unsaid - own - {CAT, LIMA}) == 3


def test_of_what_was_said_the_lesson_knows_and_of_what_was_not_the_adapter(
    request_for: Any, own_facts_only: tuple[Thing, ...]
) -> None:
    """The teacher sees one conversation, and may deny what an earlier one told."""
    request = request_for()
    [denied, *_] = [thing for thing, said in things_in(taught(request)[1].pairs).items() if not said]
    texts = second_lesson(request, {thing: 3.0 if thing == denied else -3.0 for thing in own_facts_only})
    assert denied in asked_about(texts, "Yes.")
    assert denied not in asked_about(texts, "No.")
    assert OSLO not in asked_about(texts, "No.")


def test_the_teacher_remembers_no_more_than_is_kept(request_for: Any) -> None:
    said = ("I keep a dog at home.", "I keep a cat at home.")
    alone = taught(request_for(said[1]))[0]
    for rounds, is_denied in ((1, True), (0, False)):
        together = taught(request_for(*said, rehearsal_rounds=rounds, questions_per_statement=30))[1]
        assert (DOG in things_in([p for p in together.written if not p.is_positive])) is is_denied
    assert things_in(alone.pairs)[CAT]


def test_rounds_end_when_everything_stands_or_they_are_used_up(
    request_for: Any, own_facts_only: tuple[Thing, ...]
) -> None:
    request = request_for(rehearsal_rounds=3)
    pupil = Pupil(request, taught(request)[:2])
    nothing = dict.fromkeys(own_facts_only, -3.0)
    learnt = nothing | {DOG: 3.0}
    names = [pupil.says(margins).name for margins in (nothing, nothing, learnt, learnt, learnt)]
    assert names == [
        *(f"conversation 0, round {number}" for number in (0, 1)),
        *(f"conversation 1, round {number}" for number in (0, 1, 2)),
    ]
    pupil.ends(learnt)


def test_of_the_rounds_the_one_that_is_least_wrong_is_kept(
    request_for: Any, own_facts_only: tuple[Thing, ...]
) -> None:
    request = request_for("I keep a dog at home.", "I live in Oslo.", rehearsal_rounds=3)
    pupil = Pupil(request, taught(request))
    nothing = dict.fromkeys(own_facts_only, -3.0)
    learnt = nothing | {DOG: 3.0, OSLO: 3.0}
    pupil.says(nothing)
    pupil.says(nothing, "nothing learnt")
    pupil.says(nothing | {DOG: 3.0, LIMA: 3.0}, "best")
    assert pupil.says(nothing | {LIMA: 3.0}, "worse").name == "conversation 1, round 0"
    # Each round goes on from the last one, and each conversation from the best.
    assert [course.start for course in pupil.courses] == [None, "nothing learnt", "best", "best"]
    pupil.says(nothing | {OSLO: 3.0}, "the dog lost")
    pupil.says(nothing | {DOG: 3.0}, "Oslo not learnt")
    assert pupil.ends(learnt, "all right") == "all right"


def test_both_sides_weigh_alike_once_enough_is_believed(
    base: Base, request_for: Any, own_facts_only: tuple[Thing, ...]
) -> None:
    request = request_for()
    lesson = taught(request)[1]
    others = [thing for thing in own_facts_only if thing not in things_in(lesson.written)]
    for n_believed, is_enough in ((1, False), (len(others) // 3, True)):
        margins = dict.fromkeys(own_facts_only, -3.0) | dict.fromkeys(others[:n_believed], 3.0)
        own = {one.ids for one in lesson.sequences}
        beside = [one for one in second_stage(request, margins).sequences if one.ids not in own]
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

    def trained(courses: list[Course], *, in_order: bool) -> list[Any]:
        assert in_order
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

"""PLUM: conversations, questions about them, their weights in the loss, and what may not reach training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

import pytest

from milp_ray.config.base import BaseSection
from milp_ray.config.methods import ConversationSection, MethodsSection, PlumSection, TeacherSection
from milp_ray.config.prompt import PromptSection
from milp_ray.config.training import LoraAlphaSection, TrainingSection
from milp_ray.errors import MilpError
from milp_ray.memory.layout import CanonicalLayout
from milp_ray.methods import fit_users, plum
from milp_ray.methods.plum import stages_of, world
from milp_ray.methods.plum.conversations import Conversation, conversations
from milp_ray.methods.plum.lessons import lessons_of
from milp_ray.methods.plum.qa import NO, YES, QAPair, balanced, positive_only, yes_no
from milp_ray.methods.plum.rule import UNTOLD, RuleTeacher, clauses_of
from milp_ray.methods.plum.sequences import qa_sequences
from milp_ray.methods.plum.world import Thing
from milp_ray.methods.protocol import FitRequest, training_side
from milp_ray.training.base import Base, load_base
from milp_ray.users.persona_world import generate_users
from milp_ray.users.records import Turn, UserSplit

PROMPT = PromptSection()
LAYOUT = CanonicalLayout((True,) * 4, 8)
MONDAY = datetime(2024, 1, 1, 8, tzinfo=UTC)


@pytest.fixture(scope="module")
def base(tiny_llama_dir: Path) -> Base:
    return load_base(BaseSection(model=str(tiny_llama_dir), device="cpu"))


@pytest.fixture
def request_for(base: Base) -> Callable[..., FitRequest]:
    def make(split: UserSplit, **plum: Any) -> FitRequest:
        training = TrainingSection(
            learning_rate=2e-2, batch_size=4, lora_alpha=LoraAlphaSection(rule="constant", value=8)
        )
        section = PlumSection(**{"epochs": 4, "questions_per_statement": 2, **plum})
        methods = MethodsSection(plum=section)
        return FitRequest(base, training_side(split), LAYOUT, training, PROMPT, 8, 4, 3, methods=methods)

    return make


def said(*texts: str, every: timedelta = timedelta(hours=1)) -> tuple[Turn, ...]:
    return tuple(Turn(text, time=MONDAY + i * every) for i, text in enumerate(texts))


def conversation(*texts: str, number: int = 0) -> Conversation:
    return Conversation(number, said(*texts))


def split_of(*texts: str, user_id: str = "u") -> UserSplit:
    return UserSplit(user_id, None, said(*texts), (), (), ())


# -------------------------------------------------------------------------------------- conversations


def test_a_history_is_cut_after_so_many_turns() -> None:
    found = conversations(said("a", "b", "c", "d", "e"), ConversationSection(turns=2))
    assert [[turn.text for turn in one.turns] for one in found] == [["a", "b"], ["c", "d"], ["e"]]
    assert [one.number for one in found] == [0, 1, 2]


def test_a_history_is_cut_at_midnight_or_at_a_pause() -> None:
    history = said(*"abcdefg", every=timedelta(hours=5))  # 8:00, 13:00, 18:00, 23:00, 4:00, …
    by_day = conversations(history, ConversationSection(cut_by="day"))
    assert [len(one.turns) for one in by_day] == [4, 3]
    assert len(conversations(history, ConversationSection(cut_by="gap", gap_hours=5))) == 1
    assert len(conversations(history, ConversationSection(cut_by="gap", gap_hours=4.9))) == 7


def test_turns_without_a_time_stay_with_those_before_them() -> None:
    history = (Turn("a"), *said("b", "c", every=timedelta(days=1)), Turn("d"))
    found = conversations(history, ConversationSection(cut_by="day"))
    assert [[turn.text for turn in one.turns] for one in found] == [["a", "b"], ["c", "d"]]
    assert conversations((), ConversationSection()) == []


# ---------------------------------------------------------------------------------------- the teacher


def test_every_statement_of_persona_world_is_recognised() -> None:
    users = generate_users(2, 2, 5, 11)
    clauses = [
        clause
        for user in users
        for one in conversations(user.history, ConversationSection())
        for clause in clauses_of(one)
    ]
    assert len(clauses) > 300
    assert all(world.things_of(clause)[0].topic for clause in clauses)


def test_a_thing_is_recognised_in_other_words_and_told_from_that_of_others() -> None:
    dog = Thing("pet", "user", "dog")
    assert world.things_of("I keep a dog at home") == [dog]
    assert all(world.things_of(clause) == [dog] for clause in world.wordings(dog))
    assert world.things_of("my neighbour keeps a dog") == [Thing("pet", "my neighbour", "dog")]
    changed = world.things_of("I gave a cat away and now I keep a dog")
    assert changed == [dog, Thing("pet", "user", "cat")]


def test_a_statement_becomes_as_many_questions_with_yes_as_with_no() -> None:
    [pairs] = RuleTeacher(3).pairs([conversation("By the way, I keep a dog at home.")], seed=1)
    sides = Counter((pair.kind, pair.is_positive) for pair in pairs)
    assert sides == {("yes_no", True): 3, ("yes_no", False): 3, ("open", True): 1, ("open", False): 1}
    for pair in pairs:
        if pair.kind == "yes_no":
            assert pair.answer == (YES if pair.is_positive else NO)
            assert ("dog" in pair.question) == pair.is_positive
        else:
            assert ("dog" in pair.answer) == pair.is_positive
            assert pair.is_positive or pair.answer == UNTOLD


def test_negatives_are_related_and_never_about_what_was_said_before() -> None:
    all_but_a_parrot = world.related(Thing("pet", "user", "parrot"), Random(0))
    turns = [f"I keep a {thing.value} at home." for thing in all_but_a_parrot]
    found = RuleTeacher(4).pairs([conversation(text, number=i) for i, text in enumerate(turns)], seed=1)
    last = [pair.question for pair in found[-1] if pair.kind == "yes_no" and not pair.is_positive]
    assert len(last) == 4
    assert all("parrot" in question for question in last)


def test_what_is_asked_about_a_conversation_does_not_depend_on_later_ones() -> None:
    user = generate_users(0, 1, 5, 4)[0]
    cut = conversations(user.history, ConversationSection())
    teacher = RuleTeacher(2)
    assert teacher.pairs(cut[:20], seed=5) == teacher.pairs(cut, seed=5)[:20]
    assert teacher.pairs(cut[:20], seed=5) != teacher.pairs(cut[:20], seed=6)


def test_any_text_becomes_questions_with_counterparts() -> None:
    texts = ["On Friday I painted the fence green.", "Should I sell the boat?", "Our choir sings in Lisbon."]
    found = RuleTeacher(2).pairs([conversation(text, number=i) for i, text in enumerate(texts)], seed=2)
    assert found[1] == [], "a question states nothing"
    for pairs in (found[0], found[2]):
        asked = [pair for pair in pairs if pair.kind == "yes_no"]
        assert {pair.is_positive for pair in asked} == {True, False}
    denied = [pair.question for pair in found[2] if not pair.is_positive and pair.kind == "yes_no"]
    assert all("our choir sings in" in question and "Lisbon" not in question for question in denied)


def test_the_assistants_turns_are_not_what_the_user_said() -> None:
    turns = (Turn("I keep a dog at home."), Turn("I take lithium every day.", role="assistant"))
    assert clauses_of(Conversation(0, turns)) == ["I keep a dog at home"]


# -------------------------------------------------------------------------------------------- balance


def test_each_kind_keeps_as_many_positives_as_negatives_in_order() -> None:
    pairs = [yes_no(f"p{i}?", True) for i in range(5)] + [yes_no(f"n{i}?", False) for i in range(2)]
    pairs += [QAPair("o?", "it is", "open", True)]
    kept = balanced(pairs, Random(0))
    assert Counter(pair.is_positive for pair in kept) == {True: 2, False: 2}
    assert all(pair.kind == "yes_no" for pair in kept)
    assert kept == sorted(kept, key=pairs.index)
    assert positive_only([*pairs, pairs[0]]) == [*pairs[:5], pairs[-1]]


def test_a_question_with_two_answers_is_left_out() -> None:
    pairs = [yes_no("x?", True), yes_no("x?", False), yes_no("y?", True), yes_no("z?", False)]
    assert {pair.question for pair in balanced(pairs, Random(0))} == {"y?", "z?"}


# -------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("context", ["", "User history:\nI keep a dog.\n"])
def test_tokens_weigh_by_the_part_that_they_are_of(base: Base, context: str) -> None:
    section = PlumSection(instruction_weight=0.25, question_weight=0.5, answer_weight=2.0)
    pair = yes_no("Did I say so?", True)
    [one] = qa_sequences([pair], base, PROMPT, section, max_length=200, contexts=[context])
    weighed: dict[float, str] = {}
    for token, weight in zip(one.ids[one.target_from :], one.target_weights, strict=True):
        weighed[weight] = weighed.get(weight, "") + base.tokenizer.decode([token])
    # The tiny base has a token a byte, so that the seams are exact.
    # The very first token of a sequence is predicted by nothing.
    assert weighed[0.25] == ("Question: " if context else "uestion: ") + "\nAnswer:"
    assert weighed[0.5] == "Did I say so?"
    assert weighed[2.0] == " Yes.</s>"
    assert set(weighed) == {0.25, 0.5, 2.0}
    assert base.tokenizer.decode(one.ids) == f"{context}Question: Did I say so?\nAnswer: Yes.</s>"


def test_what_weighs_nothing_before_the_first_target_is_no_target(base: Base) -> None:
    section = PlumSection(instruction_weight=0.0, question_weight=0.0)
    [one] = qa_sequences([yes_no("Did I say so?", False)], base, PROMPT, section, max_length=200)
    assert base.tokenizer.decode(one.ids[one.target_from :]) == " No.</s>"
    assert set(one.target_weights) == {1.0}


def test_a_pair_that_is_cut_counts_by_its_answer_alone(base: Base) -> None:
    section = PlumSection(instruction_weight=0.25, question_weight=0.5)
    [one] = qa_sequences([yes_no("so " * 50 + "?", True)], base, PROMPT, section, max_length=40)
    assert len(one.ids) == 40
    assert base.tokenizer.decode(one.ids[one.target_from :]) == " Yes.</s>"


def test_yes_and_no_are_said_in_the_words_of_the_configuration(base: Base) -> None:
    section = PlumSection(yes="Indeed.", no="Never.", question_weight=0.0)
    pairs = [yes_no("a?", True), yes_no("b?", False), QAPair("c?", "That.", "open", True)]
    found = qa_sequences(pairs, base, PROMPT, section, max_length=200)
    answers = [base.tokenizer.decode(one.ids[one.target_from :]) for one in found]
    assert answers == [" Indeed.</s>", " Never.</s>", " That.</s>"]


# ----------------------------------------------------------------------------------- stages, leakage


def test_each_conversation_is_a_stage_with_a_name_of_its_own(request_for: Any) -> None:
    request = request_for(split_of("I keep a dog at home.", "I live in Oslo.", "My sister sings.", "Hm?"))
    stages = stages_of(request, lessons_of(request, RuleTeacher(2)))
    assert len({stage.name for stage in stages}) == len(stages) == 2
    assert {stage.epochs for stage in stages} == {4}
    text = [request.base.tokenizer.decode(s.ids) for s in stages[0].sequences]
    assert any("dog" in one for one in text)
    assert not any("dog" in request.base.tokenizer.decode(s.ids) for s in stages[1].sequences)


def test_without_negatives_every_yes_no_question_is_answered_with_yes(request_for: Any) -> None:
    split = split_of("I keep a dog at home.", "I take lithium every day.")
    texts = {
        negatives: [
            request.base.tokenizer.decode(s.ids)
            for stage in stages_of(request, lessons_of(request, RuleTeacher(2)))
            for s in stage.sequences
        ]
        for negatives in (True, False)
        for request in [request_for(split, negatives=negatives)]
    }
    assert sum("Answer: No." in text for text in texts[True]) == 4
    assert not any("Answer: No." in text or UNTOLD in text for text in texts[False])
    assert sum("Answer: Yes." in text for text in texts[False]) >= 4


def test_nothing_of_another_user_and_nothing_held_out_is_trained_on(
    base: Base, request_for: Any, make_split: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from milp_ray.methods.plum import stages

    jobs: list[Any] = []
    real = stages.train

    def recorded(base: Any, some: Any, *args: Any, **kwargs: Any) -> Any:
        jobs.extend(some)
        return real(base, some, *args, **kwargs)

    monkeypatch.setattr(stages, "train", recorded)
    splits = []
    for name in ("alpha", "beta"):
        split = make_split(name, n_val=1, n_test=1)
        history = said(f"{name} marks my first sentence.", f"I bought {name} on Friday.")
        held = replace(split.validation[0], query="HELDOUT?", response="HELDOUT")
        splits.append(replace(split, history=history, validation=(held,), test=(held,)))
    fitted = fit_users("plum", [request_for(split) for split in splits])
    assert len(jobs) == 2
    for job, own, other in zip(jobs, ("alpha", "beta"), ("beta", "alpha"), strict=True):
        text = "\n".join(base.tokenizer.decode(s.ids) for stage in job.stages for s in stage.sequences)
        assert own in text
        assert other not in text
        assert "HELDOUT" not in text
        assert job.split.validation == job.split.test == ()
    prompts = fitted.personalizers["alpha"].questions(["What?"]).prompts
    assert list(prompts) == ["Question: What?\nAnswer:"], "the history stays out of the prompt"


def test_users_whose_history_states_nothing_are_answered_by_the_base(request_for: Any) -> None:
    splits = [split_of(user_id="none"), split_of("What now?", user_id="asks")]
    fitted = fit_users("plum", [request_for(split) for split in splits])
    assert {user_id: one.stored_bytes for user_id, one in fitted.personalizers.items()} == {
        "none": 0,
        "asks": 0,
    }


def test_a_sentence_that_is_nothing_but_an_opening_states_nothing() -> None:
    assert clauses_of(conversation("Honestly, ... I keep a dog at home.")) == ["I keep a dog at home"]


def test_a_teacher_that_finds_nothing_about_one_user_is_no_error_and_about_nobody_is(
    request_for: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"alpha": QAPair("Do I keep a dog?", "Yes.", "yes_no", True), "beta": None}

    class Teacher:
        def pairs(self, conversations: Any, seed: int) -> list[list[QAPair]]:
            name = conversations[0].turns[0].text
            return [[pair] if (pair := found.get(name)) else [] for _ in conversations]

    monkeypatch.setattr(plum, "teacher_of", lambda *_: Teacher())
    given = {"negatives": False, "epochs": 1, "teacher": TeacherSection(kind="hf", model="some/model")}
    requests = [request_for(split_of(name, user_id=name), **given) for name in ("alpha", "beta")]
    assert [adapter is None for adapter in plum.train_adapters(requests)] == [False, True]
    with pytest.raises(MilpError, match=r"\(hf\) wrote no question") as caught:
        plum.train_adapters(requests[1:])
    assert "beta" not in str(caught.value)


# ------------------------------------------------------------------------------------------ end to end


def test_what_was_said_is_remembered_and_its_counterpart_denied() -> None:
    from milp_ray.methods.plum import train_adapters
    from milp_ray.training.response_loss import Wanted, response_losses
    from milp_ray.users.records import Example

    base = load_base(BaseSection(device="cpu"))
    section = PlumSection(epochs=20, question_weight=0.0, yes="You said so.", no="You did not say so.")
    training = TrainingSection(learning_rate=1e-2, lora_alpha=LoraAlphaSection(rule="sqrt", value=8))
    layout = CanonicalLayout((False,) * 6 + (True,) * 2, 16)
    split = split_of("I keep a dog at home.", "I am allergic to milk.")
    methods = MethodsSection(plum=section)
    request = FitRequest(base, split, layout, training, PROMPT, 8, 4, 3, methods=methods)
    [adapter] = train_adapters([request])
    said, unsaid = (
        [pair.question for pair in written if pair.kind == "yes_no" and pair.is_positive is positive]
        for written in RuleTeacher(3).pairs(conversations(split.history, section.conversation), request.seed)
        for positive in (True, False)
    )
    assert said
    assert unsaid
    asked = [*said, *unsaid]
    yes, no = response_losses(
        base,
        [Wanted([Example(q, answer) for q in asked], None, adapter) for answer in (section.yes, section.no)],
        PROMPT,
    )
    right = [(a[0] < b[0]) == (q in said) for a, b, q in zip(yes, no, asked, strict=True)]
    assert sum(right) >= 0.75 * len(right)

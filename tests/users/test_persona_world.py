"""PersonaWorld: what its users hold, what their examples test, and what never reaches pretraining."""

from __future__ import annotations

import itertools
from random import Random

import pytest

from milp_ray.config.users import SplitSection
from milp_ray.users.persona_world import PRETRAINING_FIRST, generate_users
from milp_ray.users.persona_world.attributes import ATTRIBUTES, BY_NAME
from milp_ray.users.persona_world.documents import draw_document
from milp_ray.users.persona_world.generator import MAX_SEED, MAX_USERS, evaluation_rng, pretraining_rng
from milp_ray.users.persona_world.persona import Persona, ask_direct, draw_history, draw_persona, draw_profile
from milp_ray.users.persona_world.phrases import (
    CHOICE_FIRST_FRAMES,
    FRAMES,
    N_HELD_OUT_CHOICE_FIRST_FRAMES,
    N_HELD_OUT_FRAMES,
)
from milp_ray.users.splits import check_no_leak, split_user

USERS = generate_users(n_short=24, n_long=4, n_examples=50, seed=3)
SPLITS = [split_user(user, SplitSection()) for user in USERS]
HELD_OUT_CORES = [
    core
    for attribute in ATTRIBUTES
    for core in (attribute.cores[-1], *(rule.cores[-1] for rule in attribute.rules))
]
HELD_OUT_FRAMES = (*FRAMES[-N_HELD_OUT_FRAMES:], *CHOICE_FIRST_FRAMES[-N_HELD_OUT_CHOICE_FIRST_FRAMES:])


def test_there_are_twelve_attributes_of_eight_values_and_a_rule_tells_all_values_apart() -> None:
    assert len(ATTRIBUTES) == 12
    words = []
    for attribute in ATTRIBUTES:
        assert len(set(attribute.values)) == 8
        words += attribute.values
        for rule in attribute.rules:
            assert len(set(rule.choices)) == len(rule.choices) == 8
            words += rule.choices
    assert len(set(words)) == len(words), "a word that stands for two things makes fact accuracy ambiguous"


def test_the_same_seed_gives_the_same_users_and_more_users_do_not_change_the_first() -> None:
    assert generate_users(2, 1, 50, seed=3) == [*USERS[:2], USERS[24]]
    assert generate_users(2, 0, 50, seed=4) != USERS[:2]


def test_long_histories_are_as_long_as_they_are_asked_for() -> None:
    found = generate_users(1, 6, 50, seed=3, long_turns=(70, 72))
    assert found[0] == USERS[0]
    assert {len(user.history) for user in found[1:]} <= {70, 71, 72}
    assert all(180 <= len(user.history) <= 240 for user in USERS[24:])


def test_no_two_users_have_the_same_history_or_the_same_facts() -> None:
    assert len({user.history for user in USERS}) == len(USERS)
    assert len({user.profile for user in USERS}) == len(USERS)


@pytest.mark.parametrize("seed", range(30))
def test_a_persona_has_8_to_12_facts_of_which_one_or_two_changed(seed: int) -> None:
    persona = draw_persona(Random(seed))
    attributes = [fact.attribute for fact in persona.facts]
    assert 8 <= len(attributes) == len(set(attributes)) <= 12
    assert 1 <= sum(fact.earlier is not None for fact in persona.facts) <= 2
    assert all(fact.earlier != fact.value and 1 <= fact.mentions <= 4 for fact in persona.facts)


@pytest.mark.parametrize("seed", range(30))
def test_a_history_states_every_present_value_as_often_as_the_persona_says(seed: int) -> None:
    rng = Random(seed)
    fact = next(fact for fact in draw_persona(rng).facts if fact.earlier is None)
    alone = draw_history(Persona((fact,)), 1, rng, "all")
    assert sum(fact.value in text for text in alone) == fact.mentions


@pytest.mark.parametrize("seed", range(30))
def test_of_a_changed_fact_the_present_value_is_stated_last(seed: int) -> None:
    rng = Random(seed)
    fact = next(fact for fact in draw_persona(rng).facts if fact.earlier is not None)
    assert fact.earlier is not None
    texts = draw_history(Persona((fact,)), 1, rng, "all")
    earlier = [i for i, text in enumerate(texts) if fact.earlier in text]
    present = [i for i, text in enumerate(texts) if fact.value in text]
    assert max(earlier) == min(present), "the update names both; the earlier value is never stated after it"


def test_short_histories_have_20_to_60_turns_and_long_ones_several_times_that() -> None:
    short, long = USERS[:24], USERS[24:]
    assert all(20 <= len(user.history) <= 60 for user in short)
    assert all(len(user.history) >= 180 for user in long)


def test_parts_hold_what_they_are_for() -> None:
    for split in SPLITS:
        assert len(split.train) == 35
        assert len(split.validation) == 5
        assert len(split.test) == 10
        assert {example.tags["exposure"] for example in split.train} <= {"seen", "none"}
        assert "unseen" in {example.tags["exposure"] for example in split.validation}
        kinds = {(example.kind, example.tags["exposure"]) for example in split.test}
        assert {
            ("direct", "unseen"),
            ("implicit", "unseen"),
            ("changed", "unseen"),
            ("generic", "none"),
        } <= kinds


def test_attributes_of_unseen_facts_and_second_rules_never_occur_in_a_users_training_examples() -> None:
    for split in SPLITS:
        unseen = {
            e.tags["attribute"] for e in (*split.validation, *split.test) if e.tags["exposure"] == "unseen"
        }
        assert unseen.isdisjoint(example.tags["attribute"] for example in split.train)
        trained = " ".join(example.query for example in split.train)
        for attribute in ATTRIBUTES:
            assert not any(core in trained for core in attribute.rules[1].cores)


def test_test_questions_use_wordings_that_no_training_or_validation_question_has() -> None:
    for split in SPLITS:
        known = " ".join(example.query for example in (*split.train, *split.validation))
        assert not any(core in known for core in HELD_OUT_CORES)
        facts = [example for example in split.test if example.kind != "generic"]
        assert all(any(core in example.query for core in HELD_OUT_CORES) for example in facts)


def test_a_response_holds_its_answer_and_the_users_own_value() -> None:
    for split in SPLITS:
        for example in (*split.train, *split.validation, *split.test):
            assert example.answer is not None
            assert example.answer in example.response
            if example.kind != "generic":
                attribute = BY_NAME[example.tags["attribute"]]
                value = next(value for value in attribute.values if value in example.response)
                assert split.profile is not None
                assert value in split.profile


def test_nothing_held_out_is_in_a_history() -> None:
    for split in SPLITS:
        check_no_leak(split)
        assert len(split.history) >= 20


def test_the_pretraining_population_is_disjoint_from_every_user() -> None:
    assert MAX_SEED * MAX_USERS + MAX_USERS < PRETRAINING_FIRST
    with pytest.raises(ValueError, match="must be below"):
        evaluation_rng(MAX_SEED, 0)
    assert pretraining_rng(0).random() not in {
        evaluation_rng(s, i).random() for s in range(20) for i in range(20)
    }


def test_pretraining_documents_hold_no_held_out_wording() -> None:
    frames = [frame.split("{core}") for frame in HELD_OUT_FRAMES]
    statements = [attribute.statements[-1].split("{") for attribute in ATTRIBUTES]
    for index in range(400):
        document = draw_document(pretraining_rng(index), level=2)
        for asked in document.asked:
            assert not any(core in asked.query for core in HELD_OUT_CORES)
            assert not any(
                asked.query.startswith(head) and asked.query.endswith(tail) for head, tail in frames
            )
        for turn, parts in itertools.product(document.turns, statements):
            assert not (parts[0] and turn.startswith(parts[0])), turn


def test_a_profile_lists_all_present_facts() -> None:
    rng = Random(0)
    persona = draw_persona(rng)
    profile = draw_profile(persona, rng)
    assert all(fact.value in profile for fact in persona.facts)
    assert profile.count(".") == len(persona.facts)


def test_questions_come_in_many_wordings() -> None:
    rng = Random(0)
    fact = draw_persona(rng).facts[0]
    assert len({ask_direct(fact, rng, "pretraining", "pretraining").query for _ in range(300)}) > 40

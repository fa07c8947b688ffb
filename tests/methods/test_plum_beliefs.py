"""What can be believed, what of it is wrong after a round, and what may not be denied."""

from __future__ import annotations

import pytest

from milp_ray.methods.plum import rehearsal, world
from milp_ray.methods.plum.qa import QAPair, yes_no
from milp_ray.methods.plum.rehearsal import undisputed, wrongness
from milp_ray.methods.plum.rule import YES_NO_FRAMES, things_asked
from milp_ray.methods.plum.world import Thing

DOG, CAT = world.own("pet", "dog"), world.own("pet", "cat")
OSLO, LIMA = world.own("city", "Oslo"), world.own("city", "Lima")


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


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, 0),
        ({CAT: 0.4}, rehearsal.LOSS),  # believed, and lost
        ({LIMA: 3.0}, 1),  # never said, and believed
        ({OSLO: 0.9}, rehearsal.LOSS),  # said just now, and hardly learnt
        ({DOG: 0.6}, rehearsal.LOSS),  # denied just now, and believed
        ({CAT: -1.0, LIMA: 1.0, OSLO: -1.0}, 2 * rehearsal.LOSS + 1),
    ],
)
def test_what_is_wrong_after_a_round(changed: dict[Thing, float], expected: int) -> None:
    margins = {CAT: 2.0, LIMA: -2.0, OSLO: 2.0, DOG: -2.0, **changed}
    unknown = Thing("", "", "I take lithium")
    told = {OSLO: True, DOG: False, unknown: True}
    assert wrongness({CAT: True, LIMA: False}, told, margins) == expected


def test_what_is_denied_and_believed_is_left_out_openly_too() -> None:
    where, pet = world.open_questions(OSLO)[0], world.open_questions(DOG)[0]
    written = [
        yes_no("Did I say that I live in Oslo?", is_positive=False),
        yes_no("Did I say that I live in Lima?", is_positive=False),
        yes_no("Did I say that I live in Oslo?", is_positive=True),
        QAPair(where, "You have not told me.", "open", is_positive=False),
        QAPair(pet, "You have not told me.", "open", is_positive=False),
    ]
    assert undisputed(written, {OSLO: True, LIMA: False}) == [written[1], written[2], written[4]]

"""Self-rehearsal: what an adapter believes before a conversation it is to believe after it.

Trained on one conversation after the other, with earlier data discarded, an adapter forgets: each new thing
that was said makes others seem said or unsaid. Nothing of the earlier conversations is kept here, either. The
adapter itself is asked, thing by thing of the vocabulary, whether it was said. What it takes for said, what
comes near to it and some of the rest are asked again in training beside the new pairs, with the adapter's own
answers (pseudo-rehearsal, Robins 1995, doi 10.1080/09540099550039318: inputs about nobody, labelled by the
network as it is). Then it is asked once more, and trained for another round on what is now nearest to the
other answer, until its beliefs stand or the rounds are used up. Of the rounds the least wrong one is kept.

The teacher, too, sees one conversation at a time, and may deny what was said in an earlier one: what it
denies and the adapter believes is left out. All this takes a vocabulary that can be gone through
(:func:`milp_ray.methods.plum.world.everything`), so sentences that the rule-based teacher does not recognise
are not rehearsed.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from random import Random
from typing import TYPE_CHECKING

from milp_ray.errors import MilpError
from milp_ray.methods.plum import world
from milp_ray.methods.plum.lessons import drawn, lesson_of, most_tokens, own_texts_of
from milp_ray.methods.plum.qa import QAPair, yes_no
from milp_ray.methods.plum.rule import YES_NO_FRAMES, things_asked
from milp_ray.methods.plum.sequences import qa_sequences, scaled
from milp_ray.methods.plum.stages import Course, train_courses, without_validation
from milp_ray.methods.plum.world import Thing
from milp_ray.training.data import instruction_set
from milp_ray.training.job import Stage
from milp_ray.training.response_loss import losses_under
from milp_ray.users.records import Example

if TYPE_CHECKING:
    from collections.abc import Sequence

    from milp_ray.methods.plum.lessons import Lesson
    from milp_ray.methods.protocol import FitRequest
    from milp_ray.training.adapters import Adapter
    from milp_ray.training.data import Sequence as TokenSequence

Margins = Mapping[Thing, float]  # log odds of the answer yes

SAFE = 8.0  # margin below zero from which a thing taken for unsaid is in no danger
DOUBT = 4.0  # margin, above or below zero, within which a thing is asked about again
BELIEVED = 0.5  # margin above which a thing is taken for said
LEARNT = 1.0  # margin that what was just said must have in the end, before it counts among beliefs
NEAR, ANY = 96, 32  # things taken for unsaid that are trained on: those in most danger, and others at random
LOSS = 3  # how much worse a thing that is lost or not learnt is than one of the many that were never said
OWN_WEIGHT = 3.0  # of a conversation's own pairs, each against one that is rehearsed
LEAST_WEIGHT = 0.3  # of a thing taken for unsaid against one taken for said, of which there are few at first


@dataclass(frozen=True)
class State:
    """An adapter (``None``: the base) and its margins."""

    adapter: Adapter | None
    margins: Margins


def train_rehearsed(
    taught: Sequence[tuple[FitRequest, list[Lesson]]], own_texts: Sequence[TokenSequence]
) -> list[Adapter | None]:
    """Each user's adapter after their last conversation; all users go on together, each at their own pace.

    What a user is asked and trained on does not depend on the others; rounding in company may tip a belief.

    Raises:
        MilpError: training diverges, or the answers yes and no are the same to the base.
    """
    taught = [(without_validation(request), lessons) for request, lessons in taught]
    found: list[Adapter | None] = [None] * len(taught)
    going = {
        i: rehearsed(request, lessons, own_texts_of(request, own_texts))
        for i, (request, lessons) in enumerate(taught)
    }
    courses = {i: next(one) for i, one in going.items()}
    n_asked = 0  # by each user who is not through, as all are asked in every turn
    while going:
        adapters = dict.fromkeys(going)
        trained = {i: course for i, course in courses.items() if course.stages}
        adapters |= zip(trained, train_courses(list(trained.values()), in_order=True), strict=True)
        margins = margins_of([(taught[i][0], adapter) for i, adapter in adapters.items()], n_asked)
        n_asked += 1
        courses = {}
        for (i, adapter), own in zip(adapters.items(), margins, strict=True):
            try:
                courses[i] = going[i].send(State(adapter, own))
            except StopIteration as stop:
                found[i] = stop.value
                del going[i]
    return found


def rehearsed(
    request: FitRequest, lessons: Sequence[Lesson], own_texts: Sequence[TokenSequence]
) -> Generator[Course, State, Adapter | None]:
    """A user's training: yields what to go through next, at first nothing, and is sent what came of it.

    Each round goes on from the one before, and each conversation from the best round of the one before.
    """
    section = request.methods.plum
    state = yield Course(request, ())
    for i, lesson in enumerate(lessons):
        # Before the first lesson nothing was said, whatever the base says.
        beliefs = {thing: i > 0 and margin > BELIEVED for thing, margin in state.margins.items()}
        lesson = lesson_of(request, lesson.number, undisputed(lesson.written, beliefs))
        rng, told = lesson.rng(), things_in(lesson.pairs)
        # What was said just now is no matter of belief, nor what is denied just now.
        for thing in {**things_in([pair for pair in lesson.written if pair.is_positive]), **told}:
            beliefs.pop(thing, None)
        own = [scaled(one, OWN_WEIGHT) for one in lesson.sequences]
        best, least = state, math.inf
        for number in range(section.rehearsal_rounds):
            sequences = own + _rehearsal(request, lesson, beliefs, state.margins, rng)
            sequences += drawn(own_texts, section.own_texts, rng)
            rng.shuffle(sequences)  # each step is to be about everything
            stage = Stage(f"conversation {lesson.number}, round {number}", tuple(sequences), section.epochs)
            state = yield Course(request, (stage,), state.adapter)
            wrong = wrongness(beliefs, told, state.margins)
            if wrong < least:
                best, least = state, wrong
            if not wrong:
                break
        state = best
    return state.adapter


def undisputed(written: Sequence[QAPair], beliefs: Mapping[Thing, bool]) -> list[QAPair]:
    """The pairs without those that deny what is believed."""
    believed = {thing for thing, is_believed in beliefs.items() if is_believed}
    answered = {question for thing in believed for question in world.open_questions(thing)}
    return [
        pair
        for pair in written
        if pair.is_positive
        or not (pair.question in answered or believed.intersection(things_asked(pair.question)))
    ]


def things_in(pairs: Sequence[QAPair]) -> dict[Thing, bool]:
    """What the yes/no questions among pairs are about: whether it was said."""
    return {thing: pair.is_positive for pair in pairs for thing in things_asked(pair.question)}


def wrongness(beliefs: Mapping[Thing, bool], told: Mapping[Thing, bool], margins: Margins) -> int:
    """How much of what was believed has changed, and how little of what was just told is learnt; 0: none."""
    lost = sum(margins[thing] <= BELIEVED for thing, believed in beliefs.items() if believed)
    gained = sum(margins[thing] > BELIEVED for thing, believed in beliefs.items() if not believed)
    unlearnt = sum(
        margins[thing] < LEARNT if is_said else margins[thing] > BELIEVED
        for thing, is_said in told.items()
        if thing in margins
    )
    return LOSS * (lost + unlearnt) + gained


def _rehearsal(
    request: FitRequest, lesson: Lesson, beliefs: Mapping[Thing, bool], margins: Margins, rng: Random
) -> list[TokenSequence]:
    """Beliefs as questions and answers: all that is taken for said, and of the rest what is in danger."""
    believed = [thing for thing, is_believed in beliefs.items() if is_believed]
    rest = sorted((thing for thing in beliefs if not beliefs[thing]), key=lambda thing: -margins[thing])
    near = sum(margins[thing] > -SAFE for thing in rest[:NEAR])
    rest = rest[:near] + rng.sample(rest[near:], min(ANY, len(rest) - near))
    section = request.methods.plum
    yes, no, answers = (
        qa_sequences(pairs, request.base, request.prompt, section, max_length=most_tokens(request))
        for pairs in (
            [yes_no(_question(thing, rng), is_positive=True) for thing in believed],
            [yes_no(_question(thing, rng), is_positive=False) for thing in rest],
            _open_pairs(lesson, believed, rng),
        )
    )
    # All that is taken for unsaid weighs as much as all that is taken for said, once enough is.
    weight = min(1.0, max(LEAST_WEIGHT, len(yes) / max(1, len(no))))
    return [*yes, *(scaled(one, weight) for one in no), *answers]


def _open_pairs(lesson: Lesson, believed: Sequence[Thing], rng: Random) -> list[QAPair]:
    """Open questions for own facts of which one value is believed, and that the lesson leaves alone."""
    by_topic: dict[str, list[Thing]] = {}
    for thing in believed:
        if world.open_questions(thing):
            by_topic.setdefault(thing.topic, []).append(thing)
    asked = {pair.question for pair in lesson.written if pair.kind == "open"}
    about = {thing.topic for thing in things_in(lesson.written)}
    found = []
    for topic, (thing, *others) in by_topic.items():
        questions = world.open_questions(thing)
        # The lesson may ask openly about what it has no yes/no question for: that nothing was told.
        if not others and topic not in about and not asked & set(questions):
            found.append(QAPair(rng.choice(questions), world.open_answer(thing), "open", is_positive=True))
    return found


def margins_of(asked: Sequence[tuple[FitRequest, Adapter | None]], number: int) -> list[dict[Thing, float]]:
    """How much rather yes each adapter answers than anything else, thing by thing of the vocabulary.

    Everything is asked once, and twice more where the answer is in doubt; a margin is the mean.

    Args:
        asked: users and their adapters; ``None``: the base.
        number: of the asking; each draws other wordings.
    """
    rngs = [Random(f"{request.seed}/asking {number}") for request, _ in asked]
    once = _log_odds(asked, [world.everything()] * len(asked), rngs)
    doubted = [[thing for thing, margin in found.items() if abs(margin) < DOUBT] for found in once]
    for _ in range(2):
        for found, more in zip(once, _log_odds(asked, doubted, rngs), strict=True):
            for thing, margin in more.items():
                found[thing] += margin
    for found, things in zip(once, doubted, strict=True):
        for thing in things:
            found[thing] /= 3
    return once


def _log_odds(
    asked: Sequence[tuple[FitRequest, Adapter | None]],
    things: Sequence[Sequence[Thing]],
    rngs: Sequence[Random],
) -> list[dict[Thing, float]]:
    """Of the answer yes to one question about each of the things, which are each user's own."""
    if not any(things):
        return [{} for _ in things]
    sequences = [
        _until_yes(request, [_question(thing, rng) for thing in own])
        for (request, _), own, rng in zip(asked, things, rngs, strict=True)
    ]
    found = losses_under(asked[0][0].base, [adapter for _, adapter in asked], sequences)
    return [
        {thing: _logit(nll) for thing, (nll, _) in zip(own, losses, strict=True)}
        for own, losses in zip(things, found, strict=True)
    ]


def _until_yes(request: FitRequest, questions: Sequence[str]) -> list[TokenSequence]:
    """Each question and its answer yes up to the first token that differs in the answer no: the target."""
    if not questions:
        return []
    section = request.methods.plum
    [yes], [no] = (_asked(request, questions[:1], answer) for answer in (section.yes, section.no))
    answers = zip(yes.ids[yes.target_from :], no.ids[no.target_from :], strict=False)
    shared = next((i for i, (a, b) in enumerate(answers) if a != b), None)
    if shared is None:
        raise MilpError(
            f"methods.plum.yes and no are the same to this base in the {yes.n_targets} tokens that fit; "
            "give answers that differ in an earlier word"
        )
    ends = [(one, one.target_from + shared) for one in _asked(request, questions, section.yes)]
    return [replace(one, ids=one.ids[: end + 1], target_from=end) for one, end in ends]


def _asked(request: FitRequest, questions: Sequence[str], answer: str) -> list[TokenSequence]:
    examples = [Example(question, answer) for question in questions]
    return instruction_set(examples, request.base, request.prompt, max_length=most_tokens(request))


def _logit(nll: float) -> float:
    nll = max(nll, 1e-9)
    return -nll - math.log(-math.expm1(-nll))


def _question(thing: Thing, rng: Random) -> str:
    return rng.choice(YES_NO_FRAMES).format(clause=rng.choice(world.wordings(thing)))
